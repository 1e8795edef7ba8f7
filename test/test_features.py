"""Features of raw lines: `eval.py --features`."""

import io
import json
import sys

import convert
import eval as evaluation
from config import InputError
from formats import fairseq_names
from judge import features
from test.helpers import SMALL, call, make_dataset, random_encoder
from text.binarized import BOS, EOS, Dictionary

import numpy as np
import pytest
import torch

BLOCK = 32


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("corpus"))[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory, corpus_dir):
    """An encoder with random weights, and its checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    student, _ = random_encoder(0, len(Dictionary(corpus_dir / "dict.txt")))
    torch.save(
        fairseq_names.to_reference(student.state_dict(), dict(student.encoder.state_dict())),
        folder / "bare.pt",
    )
    settings = {**SMALL, "data_path": corpus_dir, "tokens_per_sample": BLOCK, "max_tokens": 100}
    argv = [part for k, v in settings.items() for part in (f"--{k}", v)]
    call(convert.main, "--ckpt", folder / "bare.pt", "--to", "native", folder / "model.pt", *argv)
    return student.encoder, folder / "model.pt"


@pytest.fixture(scope="module")
def text(corpus_dir):
    """Lines of very different lengths, among them an empty one and an unknown word; and their
    tokens."""
    symbols, rng = Dictionary(corpus_dir / "dict.txt").symbols, np.random.default_rng(0)
    rows = [rng.integers(4, 50, n).tolist() for n in [*rng.integers(0, 30, 60), 0, 1, 30, 70]]
    lines = [" ".join(symbols[i] for i in row) for row in rows] + ["nowhere"]
    return lines, [
        [BOS, *row, EOS] if len(row) <= BLOCK - 2 else [BOS, *row[: BLOCK - 2], EOS]
        for row in [*rows, [3]]
    ]


def compute(model, source, out, *argv) -> str:
    return call(
        evaluation.main,
        "--ckpt",
        model[1],
        "--device",
        "cpu",
        "--features",
        source,
        "--out",
        out,
        *argv,
    )


def test_each_line_gets_the_mean_of_the_states_that_it_has_alone(
    tmp_path, model, text, monkeypatch, capsys
):
    monkeypatch.setattr(features, "CHUNK", 300)  # several reads
    (tmp_path / "text").write_text("\n".join(text[0]), "utf-8")
    facts = json.loads(compute(model, tmp_path / "text", tmp_path / "f.npy", "--json"))
    tokens = sum(map(len, text[1]))
    assert (facts["lines"], facts["cut"], facts["tokens"]) == (len(text[1]), 1, tokens)
    assert "1 of 65 lines were longer than 32 tokens and were cut" in capsys.readouterr().err
    vectors = np.load(tmp_path / "f.npy")
    assert vectors.dtype == np.float32 and len(vectors) == len(text[1])
    for vector, row in zip(vectors, text[1]):
        with torch.no_grad():
            states, _ = model[0](torch.tensor([row]))
        assert np.abs(vector - states[0].mean(0).numpy()).max() < 1e-5 and vector.std() > 0.1


def test_standard_input_gives_the_same_and_mixed_precision_almost_the_same(
    tmp_path, model, text, monkeypatch
):
    raw = "\n".join([*text[0], ""]).encode()
    (tmp_path / "text").write_bytes(raw)
    compute(model, tmp_path / "text", tmp_path / "a.npy")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    compute(model, "-", tmp_path / "b.npy")
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    compute(model, tmp_path / "text", tmp_path / "c.npy", "--amp", "bf16")
    a, c = np.load(tmp_path / "a.npy"), np.load(tmp_path / "c.npy")
    assert 0 < np.abs(a - c).max() < 0.2 and c.dtype == np.float32


def test_an_endless_line_is_refused_and_not_held(tmp_path, model, monkeypatch):
    monkeypatch.setattr(features, "LONGEST", 1000)
    (tmp_path / "text").write_text("w1\n" + "w2 " * 400)
    with pytest.raises(InputError, match="line 2: longer than"):
        compute(model, tmp_path / "text", tmp_path / "f.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_the_share_of_unknown_words_is_told(tmp_path, model, capsys):
    (tmp_path / "text").write_text("w1 w2 w3 other\n\nw4\n")
    assert (
        json.loads(compute(model, tmp_path / "text", tmp_path / "f.npy", "--json"))["unknown"]
        == 0.2
    )
    assert ", 20.0% <unk>, " in compute(model, tmp_path / "text", tmp_path / "f.npy")
    assert "unk" not in capsys.readouterr().err
    (tmp_path / "text").write_text("w1 w2 other\n")
    compute(model, tmp_path / "text", tmp_path / "f.npy")
    assert (
        "warning: 33% of the tokens are <unk>: the model does not know this text"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--out", "f.npz"], "the name must end in .npy"),
        (["--out", "nowhere/f.npy"], "--out nowhere/f.npy: no such folder"),
        (["--out", ""], "--out is missing"),
        (["--features", "nowhere"], "--features nowhere: no such file"),
        (["--features", "/dev/zero"], "--features /dev/zero: not a file"),
        (["--features", "{empty}"], "it has no lines"),
        (["--features", "{latin}"], "latin, line 2: not UTF-8 at byte 1 of the line"),
        (["--untrained"], "--untrained and --probe go with an evaluation"),
    ],
)
def test_impossible_requests_are_refused_in_one_line_and_leave_no_file(
    tmp_path, model, argv, message
):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin").write_bytes(b"w1 w2\nw\xe9\n")
    argv = [str(a).format(empty=tmp_path / "empty", latin=tmp_path / "latin") for a in argv]
    with pytest.raises(InputError, match=message):
        compute(model, tmp_path / "latin", tmp_path / "f.npy", *argv)
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "latin"}


def test_a_text_is_not_replaced_by_its_features(tmp_path, model):
    (tmp_path / "text.npy").write_text("w1 w2\n")
    with pytest.raises(InputError, match="text.npy is the text itself; choose another name"):
        compute(model, tmp_path / "text.npy", tmp_path / "text.npy")
    assert (tmp_path / "text.npy").read_text() == "w1 w2\n"
