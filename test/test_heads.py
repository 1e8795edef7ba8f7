"""The classification head of a fine-tuned model goes along by the names of its classes."""

import convert
import finetune
from config import InputError
from formats.fairseq_names import split_qkv
from run import checkpoint
from tasks.pretrained import Head, classes_of
from test.converting import edit, replace
from test.helpers import call
from test.test_finetune import flags, head_of, rows_of

import pytest
import torch

COLORS = "red green blue".split()


def color_table(path, counts, names=COLORS):
    """Texts that are told apart by w1, w2 and w3, each so many times."""
    rows = [f"w{1 + k} w{9 + i % 5}\t{names[k]}\n" for k, n in enumerate(counts) for i in range(n)]
    path.write_text("text\tlabel\n" + "".join(rows))
    return path


@pytest.fixture(scope="module")
def colors(place, tmp_path_factory):
    """A checkpoint fine-tuned on three classes, of which blue is the first: blue, green, red."""
    folder = tmp_path_factory.mktemp("colors")
    train = color_table(folder / "t.tsv", (20, 30, 40))
    call(finetune.main, *flags(place, folder / "out", train=train, valid=train, max_epoch=20))
    return folder / "out" / "checkpoint_best.pt"


def as_transformers(colors, folder):
    pytest.importorskip("safetensors")
    call(convert.main, "--ckpt", colors, "--to", "hf", folder)
    return folder


def as_fairseq(colors, path):
    """A bare state dict under fairseq's names."""
    loaded = checkpoint.load(colors)
    encoder = {k.removeprefix("encoder."): v for k, v in loaded.student.items()}
    state = {f"encoder.sentence_encoder.{k}": v for k, v in split_qkv(encoder).items()}
    head = loaded.content["classifier"]["head"]
    torch.save(state | {f"classification_heads.x.{k}": v for k, v in head.items()}, path)
    return path


@pytest.mark.parametrize("kind", ["ours", "ours 2", "transformers", "transformers LABEL_0"])
def test_the_rows_of_a_head_go_by_class_names(kind, colors, place, tmp_path):
    ckpt, names = colors, COLORS
    counts = (30, 40, 20) if kind == "ours 2" else (40, 30, 20)
    if "transformers" in kind:
        ckpt = as_transformers(colors, tmp_path / "hf")
    if kind == "transformers LABEL_0":
        edit("config.json", id2label={str(i): f"LABEL_{i}" for i in range(3)})(ckpt)
        names = ["2", "1", "0"]  # their order is that of the rows: blue is 0
    train = color_table(tmp_path / "t.tsv", counts, names)
    own = dict(train=train, valid=train, lr=0, max_epoch=1, dict=colors.parent / "dict.txt")
    out = call(finetune.main, *flags(place, tmp_path / "o", ckpt=ckpt, attention_heads=2, **own))
    assert rows_of(tmp_path / "o", "valid_loss")[0]["valid_accuracy"] == 1
    assert ("does not name the classes" in out) == (kind == "transformers LABEL_0")
    assert f"note: the head of {ckpt} is taken" in out


@pytest.mark.parametrize(
    "counts, names, options, message",
    [
        ((2, 3, 4), ["red", "green", "violet"], {}, "new are violet; missing are blue"),
        ((2, 3, 4, 5), [*COLORS, "violet"], {}, "new are violet; missing are none"),
        ((2, 3), COLORS, {}, "new are none; missing are blue"),
        ((2, 3, 4), "123", dict(regression=True), "new are a score; missing are blue, green, red"),
    ],
)
def test_a_head_for_other_classes_is_an_error_that_names_them(
    counts, names, options, message, colors, place, tmp_path
):
    train = color_table(tmp_path / "t.tsv", counts, names)
    own = dict(ckpt=colors, train=train, valid=train, max_epoch=1, **options)
    with pytest.raises(InputError, match=message):
        finetune.main(flags(place, tmp_path / "out", **own))
    assert not (tmp_path / "out").exists()
    call(finetune.main, *flags(place, tmp_path / "out", new_head=True, **(own | dict(lr=0))))
    new = head_of(tmp_path / "out" / "checkpoint_best.pt")["dense.weight"]
    assert not torch.equal(new, head_of(colors)["dense.weight"])


def test_a_head_that_fairseqs_folder_numbers_is_told_and_has_as_many_rows(capsys):
    head = Head({"out_proj.bias": torch.zeros(3)}, is_sorted=True, is_numbered=True)
    assert classes_of(head, COLORS, "f.pt") == COLORS
    assert "does not name the classes of its head, taken for red, green" in capsys.readouterr().out
    with pytest.raises(InputError, match="the 3 classes of its head have no names"):
        classes_of(head, COLORS[:2], "f.pt")


def test_a_head_without_names_is_refused(colors, place, tmp_path):
    own = dict(ckpt=as_fairseq(colors, tmp_path / "f.pt"), dict=colors.parent / "dict.txt")
    with pytest.raises(InputError, match="3 classes of its head have no names; --new_head"):
        finetune.main(flags(place, tmp_path / "out", attention_heads=2, **own))


@pytest.mark.parametrize(
    "kind", ["another form", "two of fairseq", "transformers for tokens", "for several classes"]
)
def test_a_head_that_is_found_and_not_taken_is_told(kind, colors, place, tmp_path):
    own = dict(attention_heads=2, dict=colors.parent / "dict.txt", max_epoch=1)
    ckpt = colors
    if kind == "another form":
        own["pool"] = "mean"
    elif kind == "two of fairseq":
        ckpt = as_fairseq(colors, tmp_path / "f.pt")
        torch.save(torch.load(ckpt) | {"classification_heads.y.a": torch.ones(1)}, ckpt)
    else:
        ckpt = as_transformers(colors, tmp_path / "hf")
        if kind == "for several classes":
            edit("config.json", problem_type="multi_label_classification")(ckpt)
        else:
            replace(b"classifier.out_proj", b"qa_outputs.out_proj")(ckpt)
    out = call(finetune.main, *flags(place, tmp_path / "out", ckpt=ckpt, **own))
    assert "is not taken" in out
