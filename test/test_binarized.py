"""The binarized dataset on disk: what is written, read and refused; and the demo corpus."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import convert
import eval as evaluation
import finetune
import train
from config import InputError
from formats import fairseq_names
from run import describe
from test.helpers import FEW, GOLDEN, call, dataset_files, golden, make_dataset, write_index
from text.binarized import DTYPES, EOS, Dictionary, TokenStream, write_dataset

import numpy as np
import pytest
import torch


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


def test_a_dictionary_takes_what_fairseq_takes_and_names_the_line_of_an_error(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_text("a b 3\n</s> 0 #fairseq:overwrite\n\u00a0x 1\r\n", encoding="utf-8", newline="")
    listed = ["a b", "</s>", "\u00a0x"]
    assert Dictionary(path).symbols == ["<s>", "<pad>", "</s>", "<unk>", *listed, "<mask>"]
    for text, size, mask_id in (("a 1\n<mask> 0\nb 1\n", 7, 5), ("", 5, 4)):
        path.write_text(text)
        assert (len(Dictionary(path)), Dictionary(path).mask_id) == (size, mask_id)
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


def test_every_dict_txt_that_data_bring_must_be_the_one_that_is_used(tmp_path, saved):
    """Each door: folders of a run, a checkpoint that does not tell its own, pairs of texts."""
    # datasets of the same words in two orders
    a, b, same = (make_dataset(tmp_path / name)[0] for name in ("a", "b", "same"))
    rows = (a / "dict.txt").read_text().splitlines()
    (same / "dict.txt").write_bytes("\r\n".join(rows).encode())  # as a's
    (b / "dict.txt").write_text("\n".join([rows[1], rows[0], *rows[2:], ""]))
    shutil.copytree(a, tmp_path / "none", ignore=lambda *_: ["dict.txt"])
    for part, source in (("input0", a), ("input1", b), ("label", a)):
        shutil.copytree(source, tmp_path / "pairs" / part)
    # each with a checkpoint that tells nothing of it
    last, bare = saved / "checkpoint_last.pt", tmp_path / "bare.pt"
    call(convert.main, "--ckpt", last, "--to", "fairseq", bare)
    content = torch.load(bare)
    del content["extra_state"][fairseq_names.OUR_ENTRY]
    for path in (bare, a / "bare.pt", b / "bare.pt"):
        torch.save(content, path)
    (tmp_path / "t.tsv").write_text("\n".join(["text\tlabel", *["w1 w2\tx", "w3\ty"] * 4, ""]))

    one = [*FEW, "--disable_validation", "--max_update", 1, "--save_dir", tmp_path / "r"]
    same = f"{a}:{same}:{tmp_path / 'none'}"
    tune = ["--device", "cpu", "--max_epoch", 1, "--save_dir", tmp_path / "tuned"]
    table = ["--train", tmp_path / "t.tsv", "--valid", tmp_path / "t.tsv", *tune]
    table += ["--text", "text", "--label", "label"]
    judge = ["--ckpt", b / "bare.pt", "--data_path", a, "--device", "cpu", *FEW[2:]]
    vectors = ["--features", tmp_path / "t.tsv", "--out", tmp_path / "f.npy"]
    for main, argv, wrong, used in (
        (describe.main, ["--data_path", f"{a}:{b}"], "b", "a"),
        (train.main, [*one, "--data_path", f"{a}:{tmp_path / 'none'}:{b}"], "b", "a"),
        (train.main, [*one, "--data_path", a, "--init_from", b / "bare.pt"], "a", "b"),
        (evaluation.main, judge, "a", "b"),
        (evaluation.main, [*judge, *vectors], "a", "b"),
        (convert.main, [*judge[:4], "--to", "hf", tmp_path / "hf"], "a", "b"),
        (finetune.main, ["--ckpt", b / "bare.pt", "--dict", a / "dict.txt", *table], "a", "b"),
        (finetune.main, ["--ckpt", last, "--dict", b / "dict.txt", *table], "b", ""),
        (finetune.main, ["--ckpt", bare, "--data_path", tmp_path / "pairs", *tune], "1", "0"),
    ):
        with pytest.raises(InputError) as error:
            call(main, *argv)
        fact = rf"{wrong}/dict.txt is not .*{used}/dict.txt: .*'w0'.* --dict .*{used}/dict.txt"
        fact = fact if used else "another dictionary"
        assert re.search(fact, str(error.value)) and "\n" not in str(error.value)
    call(describe.main, "--data_path", same)
    call(train.main, *one, "--data_path", same, "--init_from", a / "bare.pt")
    call(evaluation.main, "--ckpt", a / "bare.pt", *judge[2:])


def test_a_gap_in_the_numbers_of_train_is_noted(tmp_path, capsys):
    for name in ("train", "train1", "train3", "train10", "train-old", "valid", "valid2"):
        write_index(tmp_path / name, [[5, 2]], 8)
    assert TokenStream(tmp_path, "train").tokens == 4 and TokenStream(tmp_path, "valid").tokens == 2
    assert capsys.readouterr().err.count("there is no train2,") == 1
    for name in ("train3", "train10"):
        (tmp_path / f"{name}.idx").unlink()
    TokenStream(tmp_path, "train")
    assert not capsys.readouterr().err


def rename(name: str, new: str):
    return lambda idx, bin_: os.renames(idx.with_name(name), idx.parent / new)


def patch(path: Path, at: int, value: int, width: int):
    raw = bytearray(path.read_bytes())
    raw[at : at + width] = value.to_bytes(width, "little", signed=value < 0)
    path.write_bytes(raw)


OFFSETS = 26 + 4 * 60  # where they begin in the index of 60 sentences
DAMAGE = {
    "no such folder": lambda idx, bin_: shutil.rmtree(idx.parent),
    "it holds nothing": lambda idx, bin_: [path.unlink() for path in idx.parent.iterdir()],
    # as with a language
    r"no train\.idx in .*--only-source": rename("train.idx", "train.en-None.en.idx"),
    r"no dict\.txt in .*dict.en.txt, train.*--only-source": rename("dict.txt", "dict.en.txt"),
    r"no train\.bin in": lambda idx, bin_: bin_.unlink(),
    r"no dict\.txt in .*; it holds bin, train[^;]*$": rename("dict.txt", "bin/dict.txt"),
    "dict.txt, line 2": lambda idx, bin_: (idx.parent / "dict.txt").write_text("w0 1\nw1\n"),
    "wrong magic.*fairseq-preprocess": lambda idx, bin_: idx.write_bytes(b""),
    "wrong magic": lambda idx, bin_: patch(idx, 0, 0, 4),
    "60 sentences in 20 bytes": lambda idx, bin_: os.truncate(idx, 20),
    "60 sentences in 742 bytes": lambda idx, bin_: os.truncate(idx, 742),
    "60 sentences in 762 bytes": lambda idx, bin_: os.truncate(idx, 762),
    r"200 tokens, and a \.bin of 402 bytes": lambda idx, bin_: bin_.open("ab").write(bytes(2)),
    r"byte 100; expected byte 100 of a \.bin of 100": lambda idx, bin_: os.truncate(bin_, 100),
    "version 2": lambda idx, bin_: patch(idx, 9, 2, 8),
    "code 6": lambda idx, bin_: patch(idx, 17, 6, 1),
    "4611686018427387904 sentences": lambda idx, bin_: patch(idx, 18, 2**62, 8),
    "sentence 0 has -5": lambda idx, bin_: patch(idx, 26, -5, 4),
    "sentence 0 has 2147483647": lambda idx, bin_: patch(idx, 26, 2**31 - 1, 4),
    "byte -8": lambda idx, bin_: patch(idx, OFFSETS, -8, 8),
    "byte 1; expected byte 0": lambda idx, bin_: patch(idx, OFFSETS, 1, 8),
    "sentence 5 holds token id 999, but .* 61": lambda idx, bin_: patch(bin_, 34, 999, 2),
    "sentence 0 holds <mask>": lambda idx, bin_: patch(bin_, 6, 60, 2),
    "no batch: 0 sent": lambda idx, bin_: write_dataset(idx.with_suffix(""), [], 60),
    "no batch: 5 sent": lambda idx, bin_: write_dataset(idx.with_suffix(""), [[EOS]] * 5, 60),
    "1 longer": lambda idx, bin_: write_dataset(idx.with_suffix(""), [[*[5] * 600, EOS]], 60),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_broken_dataset_ends_in_one_line_that_says_what_and_where(tmp_path, message):
    folder, _ = make_dataset(tmp_path / "set", [[5, 6, 7, 8, 9, 2], [2], [10, 11, 2]] * 20)
    DAMAGE[message](folder / "train.idx", folder / "train.bin")
    exact = ["--data_path", folder, "--fairseq_exact", "--mask_prob", "0.9"]
    with pytest.raises(InputError, match=message) as error:
        call(describe.main, *exact, "--json")
    assert "\n" not in str(error.value)
    # training stops before its first update, or at the batch
    sizes = "--tokens_per_sample 512 --max_tokens 8192 --max_source_positions 512".split()
    with pytest.raises(InputError, match=message):
        call(train.main, *FEW, *exact, *sizes, "--save_dir", tmp_path / "run")


def test_the_demo_corpus_replaces_nothing_that_it_did_not_write(tmp_path):
    for name in ("a", "b"):
        call(describe.main, "--make_demo", tmp_path / name)
    files = dataset_files(tmp_path / "a")
    names = [f"{split}.{kind}" for split in ("test", "train", "valid") for kind in ("bin", "idx")]
    assert sorted(files) == ["dict.txt", *names] and files == dataset_files(tmp_path / "b")
    facts = call(describe.main, "--data_path", tmp_path / "a", "--json", "--config_name", "tiny")
    facts = json.loads(facts)
    assert facts["tokens"] > 50_000 and facts["documents"] > 40 and facts["dropped_percent"] == 0
    (tmp_path / "a" / "train.idx").write_text("mine")
    for folder, message in (("a", "a: is not empty"), ("", "is not empty")):
        with pytest.raises(InputError, match=message):
            call(describe.main, "--make_demo", tmp_path / folder)
    with pytest.raises(InputError, match="--make_demo needs"):
        describe.main(["--make_demo", ""])
    assert dataset_files(tmp_path / "a") == files | {"train.idx": b"mine"}
