"""The binarized dataset on disk: what is written, read and refused."""

import hashlib
import json
import shutil
from pathlib import Path

import train
from config import InputError
from test.helpers import FEW, GOLDEN, call, dataset_files, golden, make_dataset, write_index
from run import describe as dataset
from text.binarized import DTYPES, EOS, Dictionary, TokenStream, write_dataset

import numpy as np
import pytest


@golden
def test_written_files_match_those_of_fairseq_preprocess(tmp_path):
    folder = GOLDEN / "corpora" / "words-bin"
    stream = TokenStream(folder, "valid")
    sentences = [stream.read(int(a), int(b)) for a, b in zip(stream.starts, stream.starts[1:])]
    write_dataset(tmp_path / "valid", sentences, 1000)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"valid.{suffix}").read_bytes() == (
            folder / f"valid.{suffix}"
        ).read_bytes()


@golden
def test_the_digest_of_a_corpus_is_of_sizes_and_samples_as_stored_in_older_checkpoints():
    stream = TokenStream(GOLDEN / "corpora" / "bpe-bin", "train")
    tokens = np.fromfile(GOLDEN / "corpora" / "bpe-bin" / "train.bin", np.uint16).astype(np.int64)
    digest = hashlib.sha256(np.asarray(stream.sizes, np.int64).tobytes())
    for start in np.linspace(0, len(tokens) - 1024, 64).astype(np.int64):
        digest.update(tokens[start : start + 1024].tobytes())
    assert stream.digest() == digest.hexdigest() and stream.tokens == len(tokens)


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_every_integer_type_reads_the_same_from_several_files(tmp_path, code):
    sentences = [[5, 6, 2], [], [2], [7, 8, 9, 10, 2], [11, 2]]
    write_index(tmp_path / "train", sentences, code)
    write_index(tmp_path / "train1", sentences[::-1], code)
    stream = TokenStream(tmp_path, "train")
    flat = sum(sentences, []) + sum(sentences[::-1], [])
    assert stream.tokens == len(flat)
    for start in range(len(flat)):
        for end in range(start + 1, len(flat) + 1):
            assert stream.read(start, end).tolist() == flat[start:end]


def test_sentences_that_do_not_lie_back_to_back_in_order_are_refused(tmp_path):
    sentences = [[5, 6, 2], [2], [7, 8, 9, 10, 2], [11, 2]]
    write_index(tmp_path / "train", sentences, 8, order=[0, 3, 2, 1])
    with pytest.raises(
        InputError,
        match="sentence 1 has 1 tokens at byte 20, not right after .* before it; rebuild",
    ):
        TokenStream(tmp_path, "train")


def test_a_dictionary_takes_what_fairseq_takes_and_names_the_line_of_an_error(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_text("a b 3\n</s> 0 #fairseq:overwrite\n\u00a0x 1\r\n", encoding="utf-8", newline="")
    assert Dictionary(path).symbols == [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "a b",
        "</s>",
        "\u00a0x",
        "<mask>",
    ]
    path.write_text("a 1\n<mask> 0\nb 1\n")
    listed = Dictionary(path)
    assert (listed.mask_id, len(listed)) == (5, 7)
    for text, line in (
        ("a 1\n\nb 1\n", 2),
        ("a\n", 1),
        ("a 1\nb x\n", 2),
        ("a 1\na 2\n", 2),
        ("<s> 1\n", 1),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=f"line {line}"):
            Dictionary(path)


def damage(folder: Path, what: str):
    """Break one thing in a dataset."""
    idx, bin_ = folder / "train.idx", folder / "train.bin"
    raw = bytearray(idx.read_bytes()) if idx.exists() else None
    count = int.from_bytes(raw[18:26], "little")

    def patch(at, value, width):
        raw[at : at + width] = value.to_bytes(width, "little", signed=value < 0)
        idx.write_bytes(raw)

    def token(value):
        items = np.fromfile(bin_, np.uint16)
        items[3] = value
        items.tofile(bin_)

    {
        "no folder": lambda: shutil.rmtree(folder),
        "no idx": lambda: idx.unlink(),
        "no bin": lambda: bin_.unlink(),
        "no dict": lambda: (folder / "dict.txt").unlink(),
        "raw": lambda: (idx.unlink(), (folder / "train").write_text("some text")),
        "empty idx": lambda: idx.write_bytes(b""),
        "cut header": lambda: idx.write_bytes(raw[:20]),
        "cut idx": lambda: idx.write_bytes(raw[:-4]),
        "cut bin": lambda: bin_.write_bytes(bin_.read_bytes()[:100]),
        "legacy": lambda: idx.write_bytes(b"TNTIDX\0\0" + bytes(40)),
        "huffman": lambda: idx.write_bytes(b"HUFFIDX\0\0" + bytes(40)),
        "magic": lambda: patch(0, 0, 4),
        "version": lambda: patch(9, 2, 8),
        "float": lambda: patch(17, 6, 1),
        "dtype": lambda: patch(17, 77, 1),
        "megatron": lambda: idx.write_bytes(raw + bytes(16)),
        "huge count": lambda: patch(18, 2**62, 8),
        "negative size": lambda: patch(26, -5, 4),
        "huge size": lambda: patch(26, 2**31 - 1, 4),
        "negative offset": lambda: patch(26 + 4 * count, -8, 8),
        "odd offset": lambda: patch(26 + 4 * count, 1, 8),
        "token": lambda: token(999),
        "mask": lambda: token(60),
        "malformed dict": lambda: (folder / "dict.txt").write_text("w0 1\nw1\n"),
        "no sentences": lambda: write_dataset(folder / "train", [], 60),
        "only separators": lambda: write_dataset(folder / "train", [[EOS]] * 5, 60),
        "one long": lambda: write_dataset(folder / "train", [[*([5] * 600), EOS]], 60),
    }[what]()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no folder", "no such folder"),
        ("no idx", r"no train\.idx in"),
        ("no bin", r"no train\.bin in"),
        ("no dict", r"no dict\.txt"),
        ("raw", "raw text.*fairseq-preprocess"),
        ("empty idx", "not an mmap index"),
        ("cut header", "cut off after 20"),
        ("cut idx", "cut or damaged"),
        ("cut bin", r"outside train\.bin"),
        ("legacy", "cached/lazy.*fairseq-preprocess --dataset-impl mmap"),
        ("huffman", "huffman"),
        ("magic", "wrong magic"),
        ("version", "version 2"),
        ("float", "code 6.*floating"),
        ("dtype", "code 77"),
        ("megatron", "Megatron"),
        ("huge count", "4611686018427387904 sentences"),
        ("negative size", "sentence 0 has -5"),
        ("huge size", "sentence 0 has 2147483647"),
        ("negative offset", "byte -8"),
        ("odd offset", "byte 1,"),
        ("token", "sentence 0 holds token id 999, but dict.txt has 61"),
        ("mask", "sentence 0 holds <mask>"),
        ("malformed dict", "line 2"),
        ("no sentences", "gives no batch"),
        ("only separators", "gives no batch"),
        ("one long", "1 longer than 512"),
    ],
)
def test_a_broken_dataset_ends_in_one_line_that_says_what_and_where(tmp_path, what, message):
    folder, _ = make_dataset(tmp_path / "set", [[5, 6, 7, 8, 9, 2], [2], [10, 11, 2]] * 20)
    damage(folder, what)
    with pytest.raises(InputError, match=message) as error:
        call(dataset.main, "--data_path", folder, "--json", "--fairseq_exact", "--mask_prob", "0.9")
    assert "\n" not in str(error.value)
    with pytest.raises(
        InputError, match=message
    ):  # training stops before its first update, or at the batch
        call(
            train.main,
            *FEW,
            "--fairseq_exact",
            "--mask_prob",
            "0.9",
            "--tokens_per_sample",
            "512",
            "--max_tokens",
            "8192",
            "--max_source_positions",
            "512",
            "--data_path",
            folder,
            "--save_dir",
            tmp_path / "run",
        )


def test_the_demo_corpus_is_deterministic_and_big_enough_to_train_on(tmp_path):
    for name in ("a", "b"):
        call(dataset.main, "--make_demo", tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["dict.txt"] + [
        f"{s}.{e}" for s in ("test", "train", "valid") for e in ("bin", "idx")
    ]
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    facts = json.loads(
        call(dataset.main, "--data_path", tmp_path / "a", "--json", "--config_name", "tiny")
    )
    assert facts["tokens"] > 50_000 and facts["documents"] > 40 and facts["dropped_percent"] == 0


def test_the_demo_corpus_replaces_nothing_that_it_did_not_write(tmp_path):
    folder, _ = make_dataset(tmp_path / "mine")
    before = dataset_files(folder)
    with pytest.raises(InputError, match="mine: .* in it is not this demo's"):
        dataset.main(["--make_demo", str(folder)])
    assert dataset_files(folder) == before and list(tmp_path.iterdir()) == [folder]
    for _ in range(2):  # its own files may be written again
        call(dataset.main, "--make_demo", tmp_path / "demo")
    (tmp_path / "demo" / "train.idx").unlink()  # a killed run's
    call(dataset.main, "--make_demo", tmp_path / "demo")
    (tmp_path / "demo" / "notes").write_text("")
    with pytest.raises(InputError, match="notes in it is not this demo's"):
        dataset.main(["--make_demo", str(tmp_path / "demo")])
