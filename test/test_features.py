"""Features of raw lines: `eval.py --features`."""

import io
import json
import sys
import tracemalloc

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
    """Lines of very different lengths, among them an empty one and an unknown word; and their tokens."""
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


@pytest.mark.parametrize("pool", ["mean", "cls", "none"])
@pytest.mark.parametrize("layer", [None, 0, -2])
def test_each_line_gets_the_features_that_it_has_alone(
    tmp_path, model, text, pool, layer, monkeypatch, capsys
):
    monkeypatch.setattr(features, "BYTES", 300)  # several reads
    (tmp_path / "text").write_text("\n".join(text[0]), "utf-8")
    argv = ["--pool", pool, *([] if layer is None else ["--layer", layer])]
    done = json.loads(compute(model, tmp_path / "text", tmp_path / "f.npy", "--json", *argv))
    assert (done["lines"], done["cut"], done["tokens"]) == (len(text[1]), 1, sum(map(len, text[1])))
    assert done["layer"] == {None: 2, 0: 0, -2: 1}[layer]
    assert "1 of 65 lines were longer than 32 tokens and were cut" in capsys.readouterr().err
    expected = []
    for tokens in text[1]:
        with torch.no_grad():
            x = (
                model[0]
                .hidden_states(torch.tensor([tokens]))[-1 if layer is None else layer][0]
                .numpy()
            )
        expected.append({"mean": x.mean(0), "cls": x[0], "none": x}[pool])
    found = np.load(tmp_path / "f.npy", mmap_mode="r")
    assert found.dtype == np.float32
    if pool == "none":
        offsets = np.load(tmp_path / "f.offsets.npy")
        found = [found[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.shape == b.shape and np.abs(a - b).max() < 1e-5 and b.std() > 0.1


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


def test_an_endless_line_takes_little_memory_and_is_cut_as_any_other(tmp_path, model, corpus_dir):
    words = Dictionary(corpus_dir / "dict.txt").symbols[4:50]
    endless = " ".join(words * 12_000)
    (tmp_path / "text").write_text(endless)
    tracemalloc.start()
    done = json.loads(compute(model, tmp_path / "text", tmp_path / "long.npy", "--json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done["cut"] == 1 and peak < 6 * len(endless)
    (tmp_path / "text").write_text(" ".join(words))
    compute(model, tmp_path / "text", tmp_path / "short.npy")
    assert (tmp_path / "long.npy").read_bytes() == (tmp_path / "short.npy").read_bytes()


class Endless(io.RawIOBase):
    """A line that ends after so many bytes, as a pipe gives it."""

    def __init__(self, text: bytes, size: int):
        self.text, self.left = text, size

    def readable(self):
        return True

    def readinto(self, into):
        size = min(len(into), self.left, len(self.text))
        into[:size], self.left = self.text[:size], self.left - size
        return size


def test_an_endless_line_on_standard_input_is_not_held(tmp_path, model, monkeypatch, capsys):
    text = b"w1 w2 w3 " * 1000
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless(text, 300 << 20))))
    tracemalloc.start()
    done = json.loads(compute(model, "-", tmp_path / "f.npy", "--json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (done["lines"], done["cut"], done["tokens"]) == (1, 1, BLOCK) and peak < 50e6
    assert (
        "standard input, line 1: longer than 256 KiB; the rest of it is left out"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(features, "ENDLESS", 1 << 20)
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless(bytes(4096), 1 << 40)))
    )
    with pytest.raises(InputError, match="standard input, line 1: longer than 0 GiB; not a text"):
        compute(model, "-", tmp_path / "g.npy")


def test_a_cut_line_may_end_within_a_character_and_the_next_line_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BYTES", 8)
    (tmp_path / "text").write_bytes("\ufeff中中中\n1234567\n12345678\nlast".encode())
    lines = [line for part in features.read_lines(str(tmp_path / "text")) for line in part]
    assert lines == ["中", "1234567", "12345678", "last"]


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
        (["--layer", 3], "--layer 3: the model has 0 .* to 2"),
        (["--layer", -4], "--layer -4: the model has"),
        (["--out", "f.npz"], "the name must end in .npy"),
        (["--out", "nowhere/f.npy"], "--out nowhere/f.npy: no such folder"),
        (["--out", ""], "--out is missing"),
        (["--features", "nowhere"], "--features nowhere: no such file"),
        (["--features", "/dev/zero"], "--features /dev/zero: not a file"),
        (["--features", "{empty}"], "it has no lines"),
        (["--features", "{latin}"], "latin, line 2: not UTF-8 at byte 1 of the line"),
        (["--untrained"], "--untrained and --probe go with an evaluation"),
        (["--pool", "max"], "invalid choice: 'max'"),
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
