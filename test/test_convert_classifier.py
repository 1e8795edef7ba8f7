"""A fine-tuned checkpoint in transformers."""

import convert
import finetune
from config import InputError
from test.helpers import call
from test.test_finetune import flags, predicted

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")


@pytest.mark.parametrize("kind", ["texts", "pairs", "scores"])
def test_the_pipeline_gives_our_names_probabilities_and_scores(place, tmp_path, kind):
    path, texts = tmp_path / "t.csv", ["w5 w1 w6", "w2 w9", "w3 w4 w1 w7 w8 unheard"]
    options = dict(label_scale=5)  # of scores alone
    if kind == "pairs":
        rows = [f"w{1 + i % 2} w5,w{1 + i // 2 % 2},{i % 3}" for i in range(30)]
        path.write_text("\n".join(["a,b,y", *rows]))
        options = dict(train=path, valid=path, text="a,b", label="y")
        texts = ["w1 w5\tw2", "w2\tw2 w7"]
    if kind == "scores":
        rows = [f"w{4 + i % 9} w{1 + i % 2},{2 + 2 * (i % 2)}" for i in range(30)]
        path.write_text("\n".join(["text,label", *rows]))
        options = dict(train=path, valid=path, regression=True, label_scale=5)
    call(finetune.main, *flags(place, tmp_path / "out", max_epoch=2, **options))
    best, folder = tmp_path / "out" / "checkpoint_best.pt", tmp_path / "hf"
    call(convert.main, "--ckpt", best, "--to", "hf", folder)
    (tmp_path / "lines").write_text("\n".join(texts))
    names, *rows = predicted(best, tmp_path / "lines")
    how = dict(function_to_apply="none") if kind == "scores" else {}
    options = dict(model=str(folder), top_k=None, **how)
    pipeline = transformers.pipeline("text-classification", **options)
    assert type(pipeline.model).__name__ == "Data2VecTextForSequenceClassification"
    for text, row in zip(texts, rows, strict=True):
        pair = dict(zip(("text", "text_pair"), text.split("\t")))
        theirs = {answer["label"]: answer["score"] for answer in pipeline(pair)}
        numbers = map(float, row if kind == "scores" else row[1:])
        assert theirs == pytest.approx(dict(zip(names[-len(theirs) :], numbers)), abs=2e-6)


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
