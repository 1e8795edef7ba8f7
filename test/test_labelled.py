"""Labelled text: GLUE's files, one's own tables, fairseq's folders; bad ones end in one line."""

import shutil
from unittest.mock import Mock

import finetune
from config import InputError
from run import flags as command_line
from tasks import labelled, predict, tables
from tasks.settings import RECIPES, FinetuneConfig
from tasks.tables import Columns
from test.helpers import call
from test.test_finetune import flags, predicted, rows_of
from text.binarized import EOS, UNK, Dictionary, write_dataset

import numpy as np
import pytest

NO_TABLE = dict(train=None, valid=None, text=None, label=None, lr=None)


def read_table(path, columns):
    return tables.read_tables(dict(train=(path, columns)))["train"]


def test_quotes_are_csvs_and_byte_order_marks_nobodys(tmp_path):
    files = {
        "x.tsv": 'one\ttwo\ty\na \'b\tc d\tyes\nsay "x"\te\tno\n\n',
        "x.csv": '\ufeffone,two,y\na \'b,c d,yes\n"say ""x""",e,no\n\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        table = read_table(tmp_path / name, Columns(("one", "two"), "y"))
        assert table.texts == [["a 'b", 'say "x"'], ["c d", "e"]]
        assert table.labels == ["yes", "no"] and table.lines == [2, 3]


# Of each set of files: the suffix, train, valid, text and label columns, and whether there is a
# header (None: one error for both files). The texts are always the words a, b, c, d.
AG_NEWS = "3\ta\n4\tb\n3\tc\n4\td\n"
KAGGLE = "id,text,target\n7,a,0\n8,b,1\n", "id,text,target\n1,c,1\n2,d,1\n"
PANDAS = ",0,1\n0,a,1\n1,b,0\n", ",0,1\n0,c,0\n1,d,1\n"
TITLED = "y\tt\nx\ta\nz\tb\n", "y\tt\nz\tc\nx\td\n"
SCORED = "t\ts\na\t1\nb\t2\n", "t\ts\nc\t.5\nd\t1\n"
JSON = '{"1":"a","2":"x"}\n{"1":"b","2":"y"}\n', '{"1":"c","2":"x"}\n{"1":"d","2":"y"}\n'
SETS = [
    ("tsv", AG_NEWS[:8], AG_NEWS[8:], "2", "1", False),  # 3 and 4 are labels, not places
    ("tsv", "a\t2\nb\t1\n", "c\t2\nd\t1\n", "1", "2", False),
    ("tsv", "a\tx\nb\ty\n", "c\ty\nd\tx\n", "1", "2", False),  # x is once in each file
    ("csv", "a,x,NA\nb,y,3\n", "c,y,1\nd,x,2\n", "1", "2", False),  # a missing value is no name
    ("csv", *KAGGLE, "2", "3", True),
    ("csv", *KAGGLE, "text", "target", True),
    ("csv", *PANDAS, "2", "3", True),
    ("csv", PANDAS[0].replace(",0,1", "0,1,2"), PANDAS[1].replace(",0,1", "0,1,2"), "2", "3", True),
    ("tsv", *TITLED, "2", "1", True),
    ("tsv", *TITLED, "t", "y", True),
    ("tsv", TITLED[0], TITLED[1][4:], "2", "1", None),
    ("tsv", *SCORED, "1", "2", True),
    ("tsv", SCORED[0][4:], SCORED[1][4:], "1", "2", False),
    ("tsv", SCORED[0], SCORED[1][4:], "1", "2", None),
    ("jsonl", *JSON, "1", "2", True),
]


@pytest.mark.parametrize("suffix, train, valid, text, label, header", SETS)
def test_a_number_is_a_place_and_a_header_is_one_decision(
    suffix, train, valid, text, label, header, tmp_path, capsys
):
    files, columns = {}, Columns((text,), label)
    for split, content in dict(train=train, valid=valid).items():
        files[split] = (tmp_path / f"{split}.{suffix}", columns)
        files[split][0].write_text(content)
    regression = "s\n" in train or ".5" in valid
    is_place = text.isdecimal() and suffix != "jsonl"
    if header is None:
        with pytest.raises(InputError, match="train.tsv.*valid.tsv|valid.tsv.*train.tsv"):
            tables.read_tables(files, regression)
        return
    read = tables.read_tables(files, regression)
    assert sum((table.texts[0] for table in read.values()), []) == list("abcd")
    assert (read["train"].header is not None) == header
    # what was guessed is said
    is_guess = header and is_place
    first = ", ".join(train.splitlines()[0].replace("\t", ",").split(","))
    err = capsys.readouterr().err
    assert err.count("\n") == is_guess and (first in err) == is_guess
    # --header decides in every case
    for flag in (True, False) if is_place else ():
        explicit = {s: (path, Columns((text,), label, flag)) for s, (path, _) in files.items()}
        table = tables.read_tables(explicit)["valid"]
        assert len(table.labels) == valid.count("\n") - flag


# A file to predict, where its texts are, the header that training found, and the texts: as many as
# the file has rows.
GIVEN = [
    ("x.tsv", "id\tq\ts\n0\ta\tc\n1\tb\td\n", "2,3", ["q", "s"], ["ab", "cd"]),  # as GLUE's test
    ("x.tsv", "q\ts\na\tc\nb\td\n", "1,2", ["q", "s"], ["ab", "cd"]),
    ("x.tsv", "q\ts\na\tc\nb\td\n", "q,s", ["q", "s"], ["ab", "cd"]),
    ("x.tsv", "a\tc\nb\td\n", "1,2", ["q", "s"], ["ab", "cd"]),
    ("x.tsv", "index\tq\n0\ta\n1\tb\n", "2", None, ["ab"]),  # of CoLA, whose train has none
    ("x.tsv", "a\tc\nb\td\n", "1,2", None, ["ab", "cd"]),
    ("x.tsv", "Q\tS \na\tc\nb\td\n", "1,2", ["q", "s"], ["ab", "cd"]),
    ("x.txt", "a\rb", "", None, ["ab"]),  # of an old Mac
    ("x.txt", "a\rb\nc\n", "", None, [["a\rb", "c"]]),  # a cell of one
    ("x.txt", "a\tb\nc\n", "", None, [["a\tb", "c"]]),
    ("x.tsv", "text\na\n  \n", "text", None, ["a"]),
    ("x.txt", "a\r\n\r\nb", "", None, [["a", "", "b"]]),
    ("x.txt", "a\tc\nb\td\n", "", None, ["ab", "cd"]),
    ("x.txt", "q\ts\nb\td\n", "", ["q", "s"], ["qb", "sd"]),  # told
    ("x.tsv", "text\tmore\na\tx\n\t\nb\ty\n", "text", None, [["a", "", "b"]]),  # as pandas'
    ("x.tsv", "text\na\n\nb\n\n", "text", None, [["a", "", "b"]]),
    ("x.csv", 'text\na\n\n"b\rc"\n', "text", None, [["a", "", "b\rc"]]),
    ("x.csv", "text,more\na,x\n\n,\nb,y\n", "text", None, [["a", "", "b"]]),
    ("x.jsonl", '{"text": "a"}\n\n{"text": null}\n{"text": NaN}\n', "text", None, [["a", "", ""]]),
]


@pytest.mark.parametrize("name, content, text, known, texts", GIVEN)
def test_every_row_to_predict_is_read_but_for_a_header(
    name, content, text, known, texts, tmp_path, capsys
):
    (tmp_path / name).write_text(content, newline="")
    cfg = FinetuneConfig(predict=str(tmp_path / name), text=text)
    entry = dict(texts=len(texts), header=known)
    assert predict.read_texts(cfg, entry) == [list(column) for column in texts]
    is_told = text == "1,2" and texts[0][0] == content[0]
    told = capsys.readouterr().err
    assert ("taken for a text: a, c" in told) == is_told
    assert ("is the header of training" in told) == (bool(known) and not text)
    entry["texts"] = 3 - len(texts)
    if name == "x.txt" and len(texts) == 2:  # a classifier of one text reads the tab as a space
        return
    with pytest.raises(InputError, match="line 1|--text"):
        predict.read_texts(cfg, entry)


def test_a_line_end_or_a_tab_within_a_text_is_a_space_and_unknown_tokens_are_told(capsys):
    tokenize = Mock(return_value=[np.array([UNK, 4, EOS])])
    labelled.encode(tokenize, [["a\tb\r\nc \n\n d\re"]], None, 64)
    tokenize.assert_called_once_with(["a b c d e"])
    assert "50% of the tokens are <unk>" in capsys.readouterr().err


# A line of each task's train.tsv: A and B are the texts, Y is the label.
GLUE_LINES = dict(
    cola="-\tY\t-\tA",
    sst2="A\tY",
    mrpc="Y\t-\t-\tA\tB",
    stsb="-\t-\t-\t-\t-\t-\t-\tA\tB\tY",
    qqp="-\t-\t-\tA\tB\tY",
    mnli="-\t-\t-\t-\t-\t-\t-\t-\tA\tB\t-\tY",
    qnli="-\tA\tB\tY",
    rte="-\tA\tB\tY",
)
GLUE_LABELS = dict(stsb=["0.0", "5.0", "2.5"], mnli=["neutral", "entailment", "contradiction"])


def write_glue(task, folder, header):
    names = GLUE_LABELS.get(task, ["1", "0"])
    for split in ("train", "dev", "dev_matched", "dev_mismatched"):
        line = GLUE_LINES[task]
        if task == "mnli" and split != "train":
            line = line.replace("-\tY", "-\t-\t-\t-\t-\tY")
        rows = [line] if header or task != "cola" else []
        for i in range(12):
            row = line.replace("A", f'"w{3 + i % 9} w1').replace("B", f"w{5 + i % 7}")
            rows.append(row.replace("Y", names[i % len(names)]))
        if task == "qqp":
            rows.append("1\t2\t3\tcut\toff")
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")


# as they are shipped, and of CoLA with a header, which it lacks
@pytest.mark.parametrize("task, header", [*((task, None) for task in RECIPES), ("cola", "true")])
def test_the_files_of_glue_are_read(task, header, place, tmp_path):
    write_glue(task, tmp_path, header)
    own = dict(NO_TABLE, task=task, data_path=tmp_path, header=header, max_update=2, max_epoch=0)
    out = call(finetune.main, *flags(place, tmp_path / "out", **own))
    metric = RECIPES[task].metric
    assert "12 train, 12 valid" in out and f"best by {metric} on valid" in out
    row = rows_of(tmp_path / "out", "valid_loss")[-1]
    assert f"valid_{metric}" in row
    assert ("valid_mismatched_accuracy" in row) == (task == "mnli")
    table = read_table(tmp_path / "train.tsv", tables.GLUE[task])
    assert [column[-12] for column in table.texts] == ['"w3 w1', "w5"][: len(table.texts)]


@pytest.mark.parametrize(
    "argv, values",
    [
        ("--task qqp", dict(RECIPES["qqp"]._asdict(), lr=(1e-5,))),
        ("--task stsb", dict(RECIPES["stsb"]._asdict(), lr=(2e-5,), regression=True)),
        ("--task qqp --max_update 100", dict(warmup_updates=25)),
        ("--task qqp --warmup_updates 9", dict(warmup_updates=9)),
        ("--task qqp --lr 1 --batch_size 7", dict(lr=(1.0,), batch_size=7)),
        ("--fairseq_exact", dict(dropout=0.0)),
    ],
)
def test_the_recipes_of_glue_are_defaults_that_flags_override(argv, values):
    (cfg, _), _ = command_line.parse(finetune.PARTS, "", argv.split())
    base = finetune.implied(cfg)
    (cfg, _), _ = command_line.parse(finetune.PARTS, "", argv.split(), base=base)
    assert {name: getattr(cfg, name) for name in values} == values


A, B = [7, 8, 9, 2], [5, 2]
LONG = [*range(4, 34), 2], [*range(4, 24), 2]


@pytest.mark.parametrize(
    "parts, longest, row",
    [
        ([A], 9, [0, *A]),
        ([A, B], 8, [0, *A, 2, *B]),
        ([A, B], 7, [0, 7, 8, 2, 2, *B]),
        (LONG, 14, [0, *range(4, 9), 2, 2, *range(4, 9), 2]),
    ],
)
def test_an_example_is_fairseqs_and_a_long_one_is_cut(parts, longest, row):
    example, is_cut = labelled.join([np.array(part) for part in parts], longest)
    assert example.tolist() == row
    assert is_cut == (len(row) < sum(map(len, parts)) + len(parts))


def test_scores_are_learned_scaled_and_keep_their_units(place, tmp_path):
    rows = [f"w{4 + i % 9} w{1 + i % 2}\t{2 + 2 * (i % 2)}\n" for i in range(60)]
    table = tmp_path / "t.tsv"
    table.write_text("text\tlabel\n" + "".join(rows))
    own = dict(train=table, valid=table, regression=True)
    call(finetune.main, *flags(place, tmp_path / "a", **own, label_scale=5, max_epoch=20, lr=1e-2))
    (tmp_path / "lines").write_text("w5 w1\nw6 w2\n")
    best = tmp_path / "a" / "checkpoint_best.pt"
    (name,), *scores = predicted(best, tmp_path / "lines")
    assert name == "score" and [round(float(score)) for (score,) in scores] == [2, 4]
    # its head, for scores of another scale
    call(finetune.main, *flags(place, tmp_path / "b", **own, ckpt=best, lr=0, max_epoch=1))
    measure = "valid_pearson_and_spearman"
    first = max(rows_of(tmp_path / "a", measure), key=lambda row: row[measure])
    (second,) = rows_of(tmp_path / "b", "valid_loss")
    assert second["valid_loss"] == pytest.approx(25 * first["valid_loss"], rel=1e-4)
    assert second["valid_pearson"] > 0.9


TABLE = "text\tlabel\n"


@pytest.mark.parametrize(
    "name, text, options, message",
    [
        ("x.tsv", TABLE + "w1\tgood\nw2\tawful\n", {}, "x.tsv, line 3: label 'awful'"),
        ("x.tsv", TABLE + "w1\tgood\n\tbad\n", {}, "x.tsv, line 3: the column text"),
        ("x.tsv", TABLE + "w1\tgood\nw1\t\n", {}, "x.tsv, line 3: the column label"),
        ("x.tsv", TABLE + "w1\tgood\nw1\tw2\tbad\n", {}, "line 3: 3 columns"),
        ("x.tsv", TABLE, {}, "x.tsv: no rows"),
        ("x.tsv", TABLE + "w1\t" + "a" * 100_000 + "\n", {}, "line 2: label 'a{80}"),
        ("x.csv", 'text,label\n"w1,good\n', {}, "line 2: not a table"),
        ("x.jsonl", '{"text": "a", "label": "good"}\n[1]\n', {}, "line 2: .* JSON object"),
        ("x.json", '[\n{"text": "a", "label": "good"}]\n', {}, "line 1: an array"),
        ("x.csv", 'text;label\n"w1;";good\n', {}, "line 2: not a table: .* semicolons"),
        ("x.tsv", "label\ttext\ngood\tw1\n", dict(text=1, label=2), "column 1 is 'label' here"),
        ("x.jsonl", '{"text": [1], "label": "good"}\n', {}, "line 1: .* under text, label"),
        ("x.jsonl", '{"body": "a", "label": 1}\n', {}, "no 'text' in it, but body, label"),
        ("x.jsonl", '{"text": "\\ud800", "label": 1}\n', {}, "line 1: not JSON"),
        ("x.jsonl", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", {}, "line 1: not JSON"),
        ("x.txt", "w1\tgood\n", {}, "x.txt: .*.tsv, .csv or .jsonl"),
        ("x.tsv", TABLE + "w1\t1e300\n", dict(regression=True), "line 2: '1e300' / 1 is no number"),
        ("x.tsv", TABLE + "w1\tgood\n", dict(regression=True), "line 2: 'good' .* is no number"),
        ("x.tsv", TABLE + "w1\tgood\nw2\tgood\n", {}, "all training labels are 'good'"),
        ("x.tsv", TABLE + "".join(f"w1\t{i}\n" for i in range(1001)), {}, "1,001 classes"),
        ("x.tsv", TABLE + "".join(f"w1\t{i}\n" for i in range(11)), {}, "11 classes in 11 rows"),
        ("x.tsv", "text\ttext\tlabel\nw1\tw2\tgood\n", {}, "no column text, or more"),
        ("x.tsv", TABLE + "w1\tgood\nw2\tbad\n", dict(label="text"), "name one column twice"),
        ("x.tsv", TABLE + "w1\tgood\nw2\tbad\n", dict(text="body"), "no column body"),
        ("x.tsv", TABLE + "w1\tgood\nw2\tbad\n", dict(label="9" * 5000), "no column 999"),
        ("x.tsv", TABLE + "w1\tgood\nw2\tbad\n", dict(header="false"), "--header false"),
        ("x.tsv", TABLE + "w1\tgood\nw2\tbad\n", dict(text="a,b,c"), "--text a,b,c"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(name, text, options, message, place, tmp_path):
    table = tmp_path / name
    table.write_text(text)
    # what training alone must have is tried with train
    if "awful" in message or "80" in message or "column 1" in message:
        options = dict(train=place / "train.tsv", **options)
    own = dict(train=table, valid=table) | options
    with pytest.raises(InputError, match=message) as error:
        finetune.main(flags(place, tmp_path / "out", **own))
    assert len(str(error.value)) < 1000


def test_a_text_longer_than_the_table_is_cut_and_counted(place, tmp_path, capsys):
    table = tmp_path / "t.tsv"
    table.write_text(f"{TABLE}{'w5 ' * 80}\tgood\nw2\tbad\n")
    own = dict(train=table, valid=place / "valid.tsv", max_epoch=1)
    printed = call(finetune.main, *flags(place, tmp_path / "out", **own))
    assert "1 of 2 examples of train are longer than 64 tokens" in capsys.readouterr().err
    assert "note: 1 examples of train are longer than the 32 tokens of" in printed
    with pytest.raises(InputError, match="--fairseq_exact: 1 of 2 examples of train"):
        finetune.main(flags(place, tmp_path / "out2", fairseq_exact=True, **own))


def test_scores_that_are_taken_for_classes_are_told(tmp_path, capsys):
    path = tmp_path / "t.tsv"
    names, noted = [f"c{i}" for i in range(11)], []
    for labels, said in ((range(11), True), (range(3), False), (names, False)):
        path.write_text(TABLE + "".join(f"w1\t{label}\n" for label in labels for _ in "ab"))
        cfg = FinetuneConfig(train=str(path), valid=str(path), text="text", label="label")
        labelled.read_data(cfg, 64, None, lambda column: [np.array([4, EOS]) for _ in column])
        captured = capsys.readouterr()
        assert ("--regression" in captured.out) == said
        noted.append("t.tsv is several of --train, --valid" in captured.err)
    assert noted == [True, False, False]  # once
    with pytest.raises(InputError, match="v.tsv, line 2: label '2.5' .* --regression"):
        labelled.class_numbers(tables.Table("v.tsv", [2], [["w1"]], ["2.5"]), ["1", "2"])


@pytest.fixture
def folders(place, tmp_path):
    """The folders input0, input1, label of two examples in tmp_path; a fine-tuning's arguments."""
    rows = dict(input0=[[5, 6, EOS], [7, EOS]], input1=[[8, EOS], [9, 5, EOS]])
    rows["label"] = [[5, EOS], [4, EOS]]
    for name, part in rows.items():
        (tmp_path / name).mkdir()
        shutil.copy(place / "data" / "dict.txt", tmp_path / name)
        for split in ("train", "valid", "valid1"):
            write_dataset(tmp_path / name / split, part, 40)
    (tmp_path / "label" / "dict.txt").write_text("yes 1\nno 1\nmadeupword0000 0\n")
    own = dict(NO_TABLE, task="mnli", data_path=tmp_path, max_update=2, max_epoch=0)
    return flags(place, tmp_path / "out", **own)


def test_a_task_can_be_read_from_fairseqs_binarized_folders(folders, place, tmp_path):
    call(finetune.main, *folders)
    assert "valid1_accuracy" in rows_of(tmp_path / "out", "valid_loss")[-1]
    dictionary = Dictionary(place / "data" / "dict.txt")
    split, names = labelled.read_binarized(tmp_path, "train", dictionary, 512)
    assert [row.tolist() for row in split.rows] == [[0, 5, 6, 2, 2, 8, 2], [0, 7, 2, 2, 9, 5, 2]]
    assert names == ["yes", "no"] and split.labels.tolist() == [1, 0]


def test_scores_of_fairseqs_folders_are_divided_as_those_of_tables(folders, place, tmp_path):
    for split in ("train", "valid", "valid1"):
        (tmp_path / "label" / f"{split}.label").write_text("2\n4\n")
    dictionary = Dictionary(place / "data" / "dict.txt")
    # but for those that fairseq's script has divided already
    for task, scores in (("none", [0.4, 0.8]), ("stsb", [2, 4])):
        settings = dict(data_path=str(tmp_path), regression=True, label_scale=5.0, task=task)
        data = labelled.read_data(FinetuneConfig(**settings), 64, dictionary, None)
        assert data.train.labels.tolist() == pytest.approx(scores)


@pytest.mark.parametrize(
    "labels, classes, message",
    [
        ([[4, EOS]], 2, "2 rows, but there are 1 labels"),
        ([[4, EOS], [6, EOS]], 2, "label/train: row 1"),
        ([[4], []], 2, "label/train: row 1"),
        ([[4, EOS], [5, 4, EOS]], 2, "label/train: row 1"),
        ([[4, EOS], [5, EOS]], 1001, "1,001 classes"),
        ([[4, EOS], [4, EOS]], 2, "all training labels are 'class0'"),
    ],
)
def test_binarized_labels_that_cannot_be_used_are_one_line(
    labels, classes, message, folders, tmp_path
):
    symbols = "".join(f"class{i} 1\n" for i in range(classes))
    (tmp_path / "label" / "dict.txt").write_text(symbols)
    write_dataset(tmp_path / "label" / "train", labels, 40)
    with pytest.raises(InputError, match=message):
        finetune.main(folders)
