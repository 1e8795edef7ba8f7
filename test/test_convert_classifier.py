"""A fine-tuned checkpoint in transformers, and a transformers folder fine-tuned here."""

import convert
import finetune
from config import InputError
from test.helpers import call
from test.test_finetune import flags, place, rows_of  # noqa: F401

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")


def tuned(place, folder, **options):
    """The best checkpoint of a short fine-tuning, and the folder into which it was converted."""
    call(finetune.main, *flags(place, folder / "out", **options))
    best = folder / "out" / "checkpoint_best.pt"
    call(convert.main, "--ckpt", best, "--to", "hf", folder / "hf")
    return best, str(folder / "hf")


def table(path, rows) -> dict:
    """The options to fine-tune on these rows."""
    path.write_text("".join(f"{row}\n" for row in rows))
    return dict(train=path, valid=path)


def predicted(best, path, lines) -> list[list[str]]:
    path.write_text("".join(f"{line}\n" for line in lines))
    said = call(finetune.main, "--ckpt", best, "--predict", path, "--device", "cpu")
    return [row.split("\t") for row in said.splitlines()]


@pytest.mark.parametrize("kind", ["texts", "pairs", "scores"])
def test_the_pipeline_gives_our_names_probabilities_and_scores(place, tmp_path, kind):
    path, options, texts = tmp_path / "t.csv", {}, ["w5 w1 w6", "w2 w9", "w3 w4 w1 w7 w8 unheard"]
    if kind == "pairs":
        rows = [f"w{1 + i % 2} w5,w{1 + i // 2 % 2},{i % 3}" for i in range(30)]
        options = dict(table(path, ["a,b,y", *rows]), text="a,b", label="y")
        texts = ["w1 w5\tw2", "w2\tw2 w7"]
    if kind == "scores":
        rows = [f"w{4 + i % 9} w{1 + i % 2},{2 + 2 * (i % 2)}" for i in range(30)]
        options = dict(table(path, ["text,label", *rows]), regression=True, label_scale=5)
    best, folder = tuned(place, tmp_path, max_epoch=2, **options)
    names, *rows = predicted(best, tmp_path / "lines", texts)
    how = dict(function_to_apply="none") if kind == "scores" else {}
    pipeline = transformers.pipeline("text-classification", model=folder, top_k=None, **how)
    assert type(pipeline.model).__name__ == "Data2VecTextForSequenceClassification"
    for text, row in zip(texts, rows, strict=True):
        pair = dict(zip(("text", "text_pair"), text.split("\t")))
        theirs = {answer["label"]: answer["score"] for answer in pipeline(pair)}
        numbers = row if kind == "scores" else row[1:]
        assert theirs == pytest.approx(
            dict(zip(names[-len(theirs) :], map(float, numbers))), abs=2e-6
        )


def test_a_transformers_folder_is_fine_tuned_as_the_checkpoint_it_was_made_from(place, tmp_path):
    call(convert.main, "--ckpt", place / "pretrained.pt", "--to", "hf", tmp_path / "hf")
    losses = []
    for name, ckpt in (("a", place / "pretrained.pt"), ("b", tmp_path / "hf")):
        call(finetune.main, *flags(place, tmp_path / name, ckpt=ckpt, max_epoch=1))
        losses.append([row["loss"] for row in rows_of(tmp_path / name)])
    assert losses[0] == losses[1]


def test_a_head_that_does_not_fit_is_refused_in_one_line(place, tmp_path):
    call(finetune.main, *flags(place, tmp_path / "out", max_epoch=1))
    content = torch.load(tmp_path / "out" / "checkpoint_best.pt", weights_only=True)
    entry = content["classifier"]
    head = {k: v for k, v in entry["head"].items() if k != "out_proj.weight"}
    wrong = {**head, "out_proj.weight": torch.ones(3)}
    for classifier, message in (
        ({**entry, "head": wrong}, r"the classification head out_proj.weight is \(3,\)"),
        ({**entry, "head": head}, "the classification head has no out_proj.weight"),
        ({**entry, "head": {}}, "a linear probe"),
        ([1], "damaged: its classifier"),
    ):
        torch.save({**content, "classifier": classifier}, tmp_path / "x.pt")
        with pytest.raises(InputError, match=f"x.pt: {message}"):
            call(convert.main, "--ckpt", tmp_path / "x.pt", "--to", "hf", tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
