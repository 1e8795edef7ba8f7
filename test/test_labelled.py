"""Labelled text: GLUE's files, one's own tables, fairseq's folders, and one line for whatever cannot be used."""

import json
import os

import finetune
from config import InputError
from run import flags
from tasks import labelled, predict
from tasks.labelled import Columns
from test.helpers import GOLDEN, call, golden
from test.test_finetune import flags, place, rows_of  # noqa: F401
from text.binarized import EOS, write_dataset

import numpy as np
import pytest

ROWS = [("a 'b", "c\td", "yes"), ('say "x"', "e", "no"), ("f", "g", "no")]


def test_tsv_csv_and_jsonl_hold_the_same_with_and_without_a_header(tmp_path):
    csv_rows = ["a 'b,c d,yes", '"say ""x""",e,no', "f,g,no"]
    tsv_rows = ["\t".join(cell.replace("\t", " ") for cell in row) for row in ROWS]
    json_rows = [json.dumps(dict(one=a, two=b.replace("\t", " "), y=y)) for a, b, y in ROWS]
    files = {
        "plain.tsv": tsv_rows,
        "named.tsv": ["one\ttwo\ty", *tsv_rows],
        "plain.csv": csv_rows,
        "named.csv": ["\ufeffone,two,y", *csv_rows],
        "named.jsonl": json_rows,
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("\n".join(rows) + "\n\n")
        columns = (
            Columns(("one", "two"), "y")
            if name.startswith("named")
            else Columns(("1", "2"), "3", header=False)
        )
        table = labelled.read_table(tmp_path / name, columns)
        assert table.texts == [["a 'b", 'say "x"', "f"], ["c d", "e", "g"]], name
        assert table.labels == ["yes", "no", "no"]
    (tmp_path / "twice.tsv").write_text("\n".join(["one\ttwo\ty", *tsv_rows, *tsv_rows]))
    assert labelled.read_table(
        tmp_path / "twice.tsv", Columns((1, 2), 3)
    ).header  # `y` is no label of any other row
    assert (
        labelled.read_table(tmp_path / "twice.tsv", Columns((1, 2), 3, header=False)).labels[0]
        == "y"
    )
    (tmp_path / "scores.tsv").write_text("text\tscore\na\t0.5\nb\t0.7\n")
    assert labelled.read_table(tmp_path / "scores.tsv", Columns((1,), 2), regression=True).header
    assert labelled.read_table(tmp_path / "scores.tsv", Columns(("text",), None)).texts == [
        ["a", "b"]
    ]


def glue_row(task, text, other, label, width=None):
    columns = labelled.GLUE[task]
    cells = ["-"] * (width or max(*columns.text, columns.label))
    for column, cell in zip(
        (*columns.text, columns.label), (text, other, label)[: len(columns.text)] + (label,)
    ):
        cells[column - 1] = cell
    return cells


@pytest.mark.parametrize("task", finetune.RECIPES)
def test_the_files_of_glue_are_read_as_they_are_shipped(task, place, tmp_path):  # noqa: F811
    columns, names = labelled.GLUE[task], ["entailment", "not_entailment"]
    labels = {"mnli": ["neutral", "entailment", "contradiction"], "qnli": names, "rte": names}.get(
        task, ["1", "0"]
    )
    labels = ["0.0", "5.0", "2.5"] if task == "stsb" else labels
    rows = [
        glue_row(task, f'"w{3 + i % 9} w1', f"w{5 + i % 7}", labels[i % len(labels)])
        for i in range(12)
    ]
    head = [["head"] * len(rows[0])] if columns.header else []
    if task == "qqp":
        rows.append(["1", "2", "3", "cut", "off"])
    text = "".join("\t".join(row) + "\n" for row in head + rows)
    (tmp_path / "train.tsv").write_text(text)
    for split in ("dev", "dev_matched", "dev_mismatched"):
        (tmp_path / f"{split}.tsv").write_text(text)
    if task == "mnli":  # 16 columns there
        wide = [row[:11] + ["someone"] * 4 + row[11:] for row in head + rows]
        for split in ("dev_matched", "dev_mismatched"):
            (tmp_path / f"{split}.tsv").write_text("".join("\t".join(row) + "\n" for row in wide))
    own = dict(train=None, valid=None, text=None, label=None, lr=None)
    argv = flags(
        place, tmp_path / "out", task=task, data_path=tmp_path, max_update=2, max_epoch=0, **own
    )
    shown = call(finetune.main, *argv)
    size, lr, updates, warmup, metric = finetune.RECIPES[task]
    assert "12 train, 12 valid" in shown and f"best by {metric} on valid" in shown
    row = rows_of(tmp_path / "out", "valid_loss")[-1]
    assert f"valid_{metric}" in row and ("valid_mismatched_accuracy" in row) == (task == "mnli")
    made = labelled.read_table(tmp_path / "train.tsv", columns)
    assert (
        made.left_out == (task == "qqp")
        and made.texts[0][0] == '"w3 w1'
        and len(made.texts) == len(columns.text)
    )


def test_the_recipes_of_glue_are_defaults_that_flags_override():
    read = lambda *argv: flags.parse(finetune.PARTS, "", argv)[0][0]  # noqa: E731
    recipe = finetune.implied(read("--task", "qqp"))
    assert (
        recipe["warmup_updates"] == 28318
        and recipe["max_update"] == 113272
        and recipe["lr"] == (1e-5,)
    )
    assert recipe["metric"] == "accuracy_and_f1" and recipe["batch_size"] == 32
    assert finetune.implied(read("--task", "stsb"))["label_scale"] == 5
    short = finetune.implied(read("--task", "qqp", "--max_update", "100"))
    assert short["warmup_share"] == pytest.approx(0.25) and "warmup_updates" not in short
    assert "warmup_updates" not in finetune.implied(read("--task", "qqp", "--warmup_share", "0.1"))


def test_scores_are_learned_scaled_and_predicted_unscaled(place, tmp_path):  # noqa: F811
    rows = [f"w{4 + i % 9} w{1 + i % 2}\t{2 + 2 * (i % 2)}\n" for i in range(60)]
    (tmp_path / "t.tsv").write_text("text\tlabel\n" + "".join(rows))
    own = dict(
        train=tmp_path / "t.tsv",
        valid=tmp_path / "t.tsv",
        regression=True,
        label_scale=5,
        max_epoch=20,
        lr=1e-2,
    )
    call(finetune.main, *flags(place, tmp_path / "out", **own))
    (tmp_path / "lines").write_text("w5 w1\nw6 w2\n")
    best = ["--ckpt", tmp_path / "out" / "checkpoint_best.pt", "--device", "cpu"]
    said = call(finetune.main, *best, "--predict", tmp_path / "lines").split()
    assert said[0] == "score" and [round(float(s)) for s in said[1:]] == [2, 4]
    assert rows_of(tmp_path / "out", "valid_pearson")[-1]["valid_pearson"] > 0.9


def test_a_pair_is_two_columns_and_a_tab_in_raw_lines(place, tmp_path):  # noqa: F811
    rows = [
        f"w{1 + i % 2} w5,w{1 + i // 2 % 2},{'same' if i % 2 == i // 2 % 2 else 'other'}\n"
        for i in range(40)
    ]
    (tmp_path / "t.csv").write_text("a,b,y\n" + "".join(rows))
    own = dict(
        train=tmp_path / "t.csv", valid=tmp_path / "t.csv", text="a,b", label="y", max_epoch=1
    )
    call(finetune.main, *flags(place, tmp_path / "out", **own))
    predict = ["--ckpt", tmp_path / "out" / "checkpoint_best.pt", "--device", "cpu", "--predict"]
    (tmp_path / "lines").write_text("w1 w5\tw2\nw1\tw1\n")
    assert len(call(finetune.main, *predict, tmp_path / "lines").splitlines()) == 3
    (tmp_path / "lines").write_text("w1 w5\tw2\nw1 w1\n")
    with pytest.raises(InputError, match="line 2: expected two texts with one tab"):
        finetune.main([*map(str, predict), str(tmp_path / "lines")])


BAD = {
    "label unseen in training": (
        "w1\tgood\nw2\tawful\n",
        r"valid.tsv, line 3: label 'awful' does not occur in training",
    ),
    "empty text": ("w1\tgood\n\tbad\n", r"valid.tsv, line 3: the column text is empty"),
    "empty label": ("w1\tgood\nw1\t\n", r"valid.tsv, line 3: the column label is empty"),
    "row of another width": (
        "w1\tgood\nw1\tw2\tbad\n",
        r"line 3: 3 columns, but the first row has 2",
    ),
    "no rows": ("", r"no rows in it but the header"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_table_that_cannot_be_used_is_one_line(what, place, tmp_path):  # noqa: F811
    text, message = BAD[what]
    (tmp_path / "valid.tsv").write_text("text\tlabel\n" + text)
    with pytest.raises(InputError, match=message):
        finetune.main(flags(place, tmp_path / "out", valid=tmp_path / "valid.tsv"))


def test_other_input_that_cannot_be_used_is_one_line(place, tmp_path):  # noqa: F811
    (tmp_path / "same.tsv").write_text("text\tlabel\nw1\tgood\nw2\tgood\n")
    (tmp_path / "x.csv").write_text('text,label\n"w1,good\n')
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": 1}\n[1]\n')
    (tmp_path / "latin.tsv").write_bytes(b"text\tlabel\n\xe9\tgood\n")
    for options, message in (
        (dict(text="body"), "no column body; it has 'text', 'label'"),
        (dict(label="9"), "no column 9"),
        (dict(text="text,a,b"), "one column, or two joined by a comma"),
        (dict(train=tmp_path / "none.tsv"), "none.tsv: no such file"),
        (
            dict(train=tmp_path / "same.tsv", valid=tmp_path / "same.tsv"),
            "all training labels are 'good'",
        ),
        (dict(train=tmp_path / "x.csv"), "not CSV"),
        (dict(train=tmp_path / "x.jsonl"), "line 2: expected a JSON object"),
        (dict(train=tmp_path / "latin.tsv"), "not UTF-8 at byte 11"),
        (dict(train=place / "pretrained.pt"), "ends in .tsv, .csv or .jsonl"),
        (dict(regression=True), "'good' is no number"),
        (dict(num_classes=1), "--num_classes 1: the labels are good, bad|bad, good"),
        (dict(metric="pearson"), "--metric pearson: choose from accuracy"),
        (dict(data_path=tmp_path), "one of them says where the labelled text is"),
        (dict(train=None, valid=None, data_path=tmp_path), "no folder input0 in it"),
        (dict(init_from=place / "pretrained.pt"), "give one of them"),
        (dict(ckpt=place / "none.pt"), "no such checkpoint file"),
        (dict(ckpt=None), "--ckpt is missing"),
        (dict(dict=place / "train.tsv"), "expected '<symbol> <count>'"),
        (dict(predict="x"), "not fine-tuned"),
        (dict(config_name="tiny"), "settings are for pretraining"),
    ):
        with pytest.raises(InputError, match=message):
            finetune.main(flags(place, tmp_path / "out", **options))


def test_a_text_longer_than_the_table_is_cut_and_counted(place, tmp_path, capsys):  # noqa: F811
    (tmp_path / "t.tsv").write_text(f"text\tlabel\n{'w5 ' * 80}\tgood\nw2\tbad\n")
    own = dict(train=tmp_path / "t.tsv", valid=tmp_path / "t.tsv", max_epoch=1)
    call(finetune.main, *flags(place, tmp_path / "out", **own))
    assert (
        "warning: 1 of 2 examples of train are longer than 64 tokens, and cut there"
        in capsys.readouterr().err
    )
    with pytest.raises(InputError, match="--fairseq_exact: 1 examples of train are longer than 64"):
        finetune.main(flags(place, tmp_path / "out2", fairseq_exact=True, **own))


def test_a_task_can_be_read_from_fairseqs_binarized_folders(place, tmp_path):  # noqa: F811
    for name, rows in (
        ("input0", [[5, 6, 2], [7, 2]]),
        ("input1", [[8, 2], [9, 5, 2]]),
        ("label", [[5, 2], [4, 2]]),
    ):
        (tmp_path / name).mkdir()
        symbols = (
            "yes 1\nno 1\nmadeupword0000 0\n"
            if name == "label"
            else (place / "data" / "dict.txt").read_text()
        )
        (tmp_path / name / "dict.txt").write_text(symbols)
        for split in ("train", "valid", "valid1"):
            write_dataset(tmp_path / name / split, rows, 40)
    own = dict(train=None, valid=None, text=None, label=None, lr=None)
    argv = flags(
        place, tmp_path / "out", task="mnli", data_path=tmp_path, max_update=2, max_epoch=0, **own
    )
    call(finetune.main, *argv)
    assert "valid1_accuracy" in rows_of(tmp_path / "out", "valid_loss")[-1]
    split, names = labelled.read_binarized(
        tmp_path, "train", labelled.Dictionary(place / "data" / "dict.txt"), 512
    )
    assert [row.tolist() for row in split.rows] == [[0, 5, 6, 2, 2, 8, 2], [0, 7, 2, 2, 9, 5, 2]]
    assert names == ["yes", "no"] and split.labels.tolist() == [1, 0]
    write_dataset(tmp_path / "label" / "valid", [[4, 2]], 40)
    with pytest.raises(InputError, match="valid: 2 rows, but there are 1 labels"):
        finetune.main([*argv, "--overwrite"])
    write_dataset(tmp_path / "label" / "valid", [[4, 2], [6, 2]], 40)
    with pytest.raises(InputError, match="row 1 has a label that label/dict.txt does not name"):
        finetune.main([*argv, "--overwrite"])


@golden
def test_binarized_folders_hold_what_their_raw_text_holds(tmp_path):
    folder = GOLDEN / "finetune" / "entailment"
    dictionary = labelled.Dictionary(folder / "bin" / "input0" / "dict.txt")
    split, names = labelled.read_binarized(folder / "bin", "valid", dictionary, 512)
    raw = [
        (folder / "raw" / f"valid.{part}").read_text().splitlines()
        for part in ("input0", "input1", "label")
    ]
    assert names == ["entailment", "not_entailment"] and [names[i] for i in split.labels] == raw[2]
    for row, a, b in zip(split.rows, *raw[:2], strict=True):
        end = 1 + len(a.split())
        assert (
            row[0] == 0
            and row[end : end + 2].tolist() == [2, 2]
            and len(row) == end + len(b.split()) + 3
        )
    rows = np.concatenate(split.rows)
    assert rows.dtype == np.int64 and 3 <= rows.max() < len(dictionary)


def test_a_pipe_and_a_deep_row_are_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.tsv")
    with pytest.raises(InputError, match="pipe.tsv: not a file"):
        labelled.read_cells(tmp_path / "pipe.tsv")
    with pytest.raises(InputError, match="pipe.tsv: not a file"):
        predict.read_texts(str(tmp_path / "pipe.tsv"), "", "auto", 1)
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(InputError, match="deep.jsonl, line 1: not JSON"):
        labelled.read_cells(tmp_path / "deep.jsonl")


def test_binarized_labels_without_a_token_or_with_endless_names_are_refused_in_one_line(
    place, tmp_path
):  # noqa: F811
    for name in ("input0", "label"):
        (tmp_path / name).mkdir()
    (tmp_path / "input0" / "dict.txt").write_bytes((place / "data" / "dict.txt").read_bytes())
    for labels, classes, message in (
        ([[4], [5], []], 2, "label/train: row 2 is empty"),
        ([[4], [5], [4]], 1001, "1,001 different labels, of at most 1,000"),
    ):
        (tmp_path / "label" / "dict.txt").write_text(
            "".join(f"class{i} 1\n" for i in range(classes))
        )
        for split in ("train", "valid"):
            write_dataset(tmp_path / "input0" / split, [[4, EOS]] * 3, 40)
            write_dataset(tmp_path / "label" / split, labels, 8)
        with pytest.raises(InputError, match=message):
            finetune.main(
                flags(place, tmp_path / "out", data_path=tmp_path, train=None, valid=None)
            )
