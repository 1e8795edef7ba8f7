"""Features of raw lines: `eval.py --features`."""

import gzip
import io
import json
import sys

import eval as evaluation
from config import InputError
from judge import features
from run import checkpoint
from test.helpers import SMALL, call, random_encoder, small_content
from text.binarized import BOS, EOS, Dictionary

import numpy as np
import pytest
import torch

BLOCK = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory, corpus_dir):
    """An encoder with random weights, and its checkpoint."""
    path = tmp_path_factory.mktemp("model") / "model.pt"
    student, _ = random_encoder(0, len(Dictionary(corpus_dir / "dict.txt")))
    settings = dict(SMALL, data_path=str(corpus_dir), tokens_per_sample=BLOCK, max_tokens=100)
    weights = dict(student=student.state_dict(), teacher=student.encoder.state_dict())
    checkpoint.save(small_content(config=settings, **weights), path)
    return student.encoder, path


@pytest.fixture(scope="module")
def text(corpus_dir):
    """Lines of very different lengths, one of them empty and one an unknown word; their tokens."""
    symbols = Dictionary(corpus_dir / "dict.txt").symbols
    rng = np.random.default_rng(0)
    rows = [rng.integers(4, 50, n).tolist() for n in [*rng.integers(0, 30, 60), 0, 1, 30, 70]]
    lines = [" ".join(symbols[i] for i in row) for row in rows]
    return [*lines, "nowhere"], [[BOS, *row[: BLOCK - 2], EOS] for row in [*rows, [3]]]


def compute(model, source, out, *argv) -> dict:
    """What eval.py says it has done."""
    flags = ["--ckpt", model[1], "--device", "cpu", "--features", source, "--out", out, "--json"]
    return json.loads(call(evaluation.main, *flags, *argv))


@pytest.mark.parametrize(("amp", "least", "most"), [("off", 0, 1e-5), ("bf16", 1e-5, 0.2)])
def test_each_line_gets_the_mean_of_the_states_that_it_has_alone(
    tmp_path, model, text, monkeypatch, capsys, amp, least, most
):
    monkeypatch.setattr(features, "CHUNK", 300)  # several reads
    lines, rows = text
    raw = ("\ufeff" + "\n".join(lines)).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    facts = compute(model, "-", tmp_path / "f.npy", "--amp", amp)
    assert (facts["lines"], facts["cut"], facts["tokens"]) == (65, 1, sum(map(len, rows)))
    assert "1 of 65 lines were longer than 32 tokens" in capsys.readouterr().err
    vectors = np.load(tmp_path / "f.npy")
    assert vectors.dtype == np.float32
    expected = [model[0](torch.tensor([row]))[0][0].mean(0).detach().numpy() for row in rows]
    assert least <= np.abs(vectors - np.array(expected)).max() < most and vectors.std(1).min() > 0.1


def test_a_line_is_cut_where_the_training_blocks_end(tmp_path, model, text, capsys):
    (tmp_path / "text").write_text("\n".join(text[0]))
    facts = compute(model, tmp_path / "text", tmp_path / "f.npy", "--max_tokens", 20)
    assert facts["cut"] == sum(len(line.split()) > 18 for line in text[0]) > 1
    assert "longer than 20 tokens" in capsys.readouterr().err


def test_a_packed_text_and_one_with_byte_order_marks_are_read_as_for_training(tmp_path, model):
    for name, content in (
        ("plain", b"w1 w2\nw3\n"),
        ("t.gz", gzip.compress(b"w1 w2\nw3\n")),
        ("marks", "\ufeffw1 w2\n\ufeffw3\n".encode()),
    ):
        (tmp_path / name).write_bytes(content)
        compute(model, tmp_path / name, tmp_path / f"{name}.npy")
        assert (tmp_path / f"{name}.npy").read_bytes() == (tmp_path / "plain.npy").read_bytes()


def test_an_endless_line_is_refused_and_not_held(tmp_path, model, monkeypatch):
    monkeypatch.setattr(features, "LONGEST", 1000)
    (tmp_path / "text").write_text("w1\n" + "w2 " * 400)
    with pytest.raises(InputError, match="line 2: longer than"):
        compute(model, tmp_path / "text", tmp_path / "f.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_many_unknown_words_are_told(tmp_path, model, capsys):
    for text, share, warning in (("w1 w2 w3 other\n\nw4\n", 0.2, ""), ("w1 other\n", 0.5, "50%")):
        (tmp_path / "text").write_text(text)
        assert compute(model, tmp_path / "text", tmp_path / "f.npy")["unknown"] == share
        said = capsys.readouterr().err
        assert (warning in said) if warning else ("unk" not in said)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--out", "f.npz"], "--out f.npz: .* .npy"),
        (["--out", "nowhere/f.npy"], "nowhere/f.npy"),
        (["--out", ""], "--out : .* .npy"),
        (["--features", "nowhere"], "nowhere: no such file"),
        (["--features", "/dev/zero"], "/dev/zero: not a file"),
        (["--features", "{folder}/empty"], "no lines"),
        (["--features", "{folder}/pointer"], "pointer: .*Git LFS"),
        (["--features", "{folder}/latin"], "latin, line 2: not UTF-8 at byte 1"),
        (["--features", "{folder}/text.npy", "--out", "{folder}/text.npy"], "the text itself"),
        (["--untrained"], "without --untrained"),
    ],
)
def test_impossible_requests_are_refused_and_leave_no_file(tmp_path, model, argv, message):
    contents = {"empty": b"", "latin": b"w1 w2\nw\xe9\n", "text.npy": b"w1 w2\n"}
    contents["pointer"] = b"version https://git-lfs.github.com/spec/v1\n"
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    argv = [word.format(folder=tmp_path) for word in argv]
    with pytest.raises((InputError, OSError), match=message):
        compute(model, tmp_path / "text.npy", tmp_path / "f.npy", *argv)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents
