"""A fine-tuned checkpoint in transformers, and a transformers folder fine-tuned here."""

import json

import convert
import finetune
from config import InputError
from test.helpers import RAW, call, golden
from test.test_finetune import flags, place, rows_of  # noqa: F401

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")


def probabilities(best, lines) -> list:
    said = call(finetune.main, "--ckpt", best, "--predict", lines, "--device", "cpu").splitlines()
    names = said[0].split("\t")[1:]
    return [dict(zip(names, map(float, row.split("\t")[1:]))) for row in said[1:]]


def tuned(place, folder, **options):  # noqa: F811
    """The best checkpoint of a short fine-tuning, and the folder into which it was converted."""
    call(finetune.main, *flags(place, folder / "out", **options))
    best = folder / "out" / "checkpoint_best.pt"
    call(convert.main, "--ckpt", best, "--to", "hf", folder / "hf")
    return best, str(folder / "hf")


def table(path, *rows) -> dict:
    """The options to fine-tune on these rows."""
    path.write_text("".join(f"{row}\n" for row in rows))
    return dict(train=path, valid=path)


def test_the_pipeline_gives_our_names_and_probabilities(place, tmp_path):  # noqa: F811
    best, folder = tuned(place, tmp_path, max_epoch=2)
    texts = ["w5 w1 w6", "w2 w9", "w3 w4 w1 w7 w8 unheard"]
    (tmp_path / "lines").write_text("\n".join(texts))
    pipeline = transformers.pipeline("text-classification", model=folder, top_k=None)
    assert type(pipeline.model).__name__ == "Data2VecTextForSequenceClassification"
    for answer, ours in zip(pipeline(texts), probabilities(best, tmp_path / "lines"), strict=True):
        assert {row["label"]: pytest.approx(row["score"], abs=2e-6) for row in answer} == ours


def test_logits_of_pairs_are_the_same(place, tmp_path):  # noqa: F811
    rows = [f"w{1 + i % 2} w5,w{1 + i // 2 % 2},{i % 3}" for i in range(30)]
    data = table(tmp_path / "t.csv", "a,b,y", *rows)
    best, folder = tuned(place, tmp_path, **data, text="a,b", label="y", max_epoch=1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (tmp_path / "lines").write_text("w1 w5\tw2\nw2\tw2 w7\n")
    pairs = tokenizer(["w1 w5", "w2"], ["w2", "w2 w7"], return_tensors="pt", padding=True)
    with torch.no_grad():
        rows = model(**pairs).logits.softmax(1).tolist()
    for row, ours in zip(rows, probabilities(best, tmp_path / "lines"), strict=True):
        assert [ours[model.config.id2label[i]] for i in range(3)] == pytest.approx(row, abs=2e-6)


def test_scores_have_the_units_of_the_labels(place, tmp_path):  # noqa: F811
    rows = [f"w{4 + i % 9} w{1 + i % 2}\t{2 + 2 * (i % 2)}" for i in range(30)]
    data = table(tmp_path / "t.tsv", "text\tlabel", *rows)
    best, folder = tuned(place, tmp_path, **data, regression=True, label_scale=5, max_epoch=3)
    (tmp_path / "lines").write_text("w5 w1\nw6 w2\n")
    argv = ["--ckpt", best, "--predict", tmp_path / "lines", "--device", "cpu"]
    ours = [float(score) for score in call(finetune.main, *argv).split()[1:]]
    options = dict(model=folder, function_to_apply="none")
    pipeline = transformers.pipeline("text-classification", **options)
    theirs = [row["score"] for row in pipeline(["w5 w1", "w6 w2"])]
    assert theirs == pytest.approx(ours, abs=2e-6)
    assert pipeline.model.config.problem_type == "regression"


def test_a_linear_probe_has_no_place_there(place, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="--pool mean"):
        tuned(place, tmp_path, pool="mean", max_epoch=1)
    assert not (tmp_path / "hf").exists()


# noqa: F811
def test_a_transformers_folder_is_fine_tuned_as_the_checkpoint_it_was_made_from(place, tmp_path):
    call(convert.main, "--ckpt", place / "pretrained.pt", "--to", "hf", tmp_path / "hf")
    losses = []
    for name, ckpt in (("a", place / "pretrained.pt"), ("b", tmp_path / "hf")):
        call(finetune.main, *flags(place, tmp_path / name, ckpt=ckpt, max_epoch=1))
        losses.append([row["loss"] for row in rows_of(tmp_path / name)])
    assert losses[0] == losses[1]


@golden
def test_a_bpe_of_transformers_gives_fairseqs_tokens(place, tmp_path):  # noqa: F811
    from tasks import pretrained

    ids = json.loads((RAW.parent / "gpt2_bpe" / "encoder.json").read_text())
    dictionary = pretrained.Dictionary(RAW.parent / "gpt2_bpe" / "dict.txt")
    special = {symbol: i for i, symbol in enumerate(dictionary.symbols) if not symbol.isdigit()}
    vocabulary = {
        token: dictionary.ids[str(i)] for token, i in ids.items() if str(i) in dictionary.ids
    } | special
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_bytes((RAW.parent / "gpt2_bpe" / "vocab.bpe").read_bytes())
    for name, content in pretrained.hf_text_files(tmp_path, len(dictionary)).items():
        (tmp_path / name).write_bytes(content)
    text = [" = Valkyria Chronicles = ", "naïve 中文 <s> don't"]
    ours = pretrained.load_tokenizer(tmp_path, pretrained.Dictionary(tmp_path / "dict.txt"))(text)
    files = [RAW.parent / "gpt2_bpe" / name for name in ("encoder.json", "vocab.bpe")]
    theirs = pretrained.load_tokenizer(tmp_path, dictionary, *files)(text)
    assert [row.tolist() for row in ours] == [row.tolist() for row in theirs]


def test_a_head_that_does_not_fit_is_refused_in_one_line(place, tmp_path):  # noqa: F811
    call(finetune.main, *flags(place, tmp_path / "out", max_epoch=1))
    content = torch.load(tmp_path / "out" / "checkpoint_best.pt", weights_only=True)
    entry = content["classifier"]
    head = {k: v for k, v in entry["head"].items() if k != "out_proj.weight"}
    wrong = {**head, "out_proj.weight": torch.ones(3)}
    for state, message in ((wrong, r"out_proj.weight is \(3,\)"), (head, "has no out_proj.weight")):
        changed = {**content, "classifier": {**entry, "head": state}}
        torch.save(changed, tmp_path / "x.pt")
        with pytest.raises(InputError, match=f"x.pt: the classification head {message}"):
            call(convert.main, "--ckpt", tmp_path / "x.pt", "--to", "hf", tmp_path / "hf")
    torch.save({**content, "classifier": [1]}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="x.pt: damaged: its classifier"):
        call(convert.main, "--ckpt", tmp_path / "x.pt", "--to", "hf", tmp_path / "hf")
