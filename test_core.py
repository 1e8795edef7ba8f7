"""How do we know: the tests of the core, in the order of the files. CPU, no network, a few minutes: `bash run_1p.sh
test`.

Tests against numbers recorded from the reference need its golden data beside the project and skip where it is not.
"""

import ast
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# first: device has a word with torch before torch is imported
from device import Device, DeviceConfig, open_device  # isort: split

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench
import checkpoint
import config
import data
import device
import ema
import eval as evaluation
import train
from config import InputError
from data import (
    BOS,
    EOS,
    PAD,
    Corpus,
    DataConfig,
    Dictionary,
    TokenStream,
    cut_batches,
    cut_blocks,
    mask_block,
    queries_of,
)
from ema import EmaConfig
from model import Data2VecText, ModelConfig, RegressionHead, data2vec_loss, explicit_attention, teacher_targets

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "shared" / "golden"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference's recorded numbers are not beside the project")
CPU = Device(torch.device("cpu"), "test", None)
SMALL = dict(
    layers=2,
    embed_dim=16,
    ffn_embed_dim=32,
    attention_heads=2,
    average_top_k_layers=2,
    dropout=0.0,
    attention_dropout=0.0,
    max_source_positions=64,
)
FEW = (
    "--config_name tiny --device cpu --log_interval 1 --tokens_per_sample 32 --max_tokens 256 --warmup_updates 2"
    " --validate_interval_updates 0"
).split() + [str(part) for k, v in SMALL.items() for part in (f"--{k}", v)]


def call(main, *argv) -> str:
    """A program's standard output; its errors are raised."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([str(a) for a in argv]) == 0
    return out.getvalue()


def rows_of(folder, key="loss") -> list:
    return [row for line in (Path(folder) / "train.jsonl").read_text().splitlines() if key in (row := json.loads(line))]


def make_dataset(folder, sentences=None, words=60, splits=("train", "valid"), seed=0):
    """A small dataset of random sentences in documents; the ids 4 .. words - 1."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    if sentences is None:
        sentences = []
        for _ in range(30):
            sentences += [
                [*rng.integers(4, words, rng.integers(1, 40)).tolist(), EOS] for _ in range(rng.integers(1, 8))
            ]
            sentences.append([EOS])
    for split in splits:
        data.write_dataset(folder / split, sentences, words)
    (folder / "dict.txt").write_text("".join(f"w{i} {100 - i}\n" for i in range(words - 4)))
    return folder, sentences


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("corpus"))[0]


@pytest.fixture
def block_dataset(corpus_dir):
    def make(split="train", **options):
        return Corpus(DataConfig(data_path=str(corpus_dir), tokens_per_sample=32, max_tokens=256, **options)).split(
            split
        )

    return make


# ---------------------------------------------------------------------------------------------- config


def test_every_config_field_has_a_flag_and_is_read():
    sources = "".join(path.read_text() for path in HERE.glob("*.py") if not path.name.startswith("test_"))
    for part in train.PARTS:
        for field in dataclasses.fields(part):
            value = {bool: "true", int: "3", float: "0.5", str: "x", tuple: "0.5,0.5"}[field.type]
            value = (field.metadata["choices"] or [value])[-1]
            parts, _ = config.parse(train.PARTS, "", [f"--{field.name}", str(value)])
            got = next(getattr(p, field.name) for p in parts if hasattr(p, field.name))
            assert str(got).lower().strip("()").replace(" ", "") == str(value).lower(), field.name
            # a read from a configuration: cfg.X, cfg.model.X, self.cfg.X, or t.X where train.py calls its own part t
            read = rf"\b(?:cfg(?:\.(?:data|model|ema|device|guard|train))?|t)\.{field.name}\b"
            assert re.search(read, sources), f"{field.name} is never read"


def test_presets_hold_only_fields_and_pass_the_checks():
    for name in config.PRESETS:
        parts, _ = config.parse(train.PARTS, "", ["--config_name", name, "--data_path", "x"])
        train.Config(*parts)
        assert not set(config.PRESETS[name]) - set(train.Config(*parts).flat())


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--mask_prob", "1.5"),
        ("--mask_prob", "nan"),
        ("--dropout", "-0.1"),
        ("--layers", "0"),
        ("--lr", "inf"),
        ("--lr", "x"),
        ("--update_freq", "1.5"),
        ("--sample_break_mode", "words"),
        ("--fixed_masks", "maybe"),
        ("--no_such_flag", "1"),
        ("--max_toke", "5"),
        ("--config_name", "huge"),
        ("--seed", "-1"),
    ],
)
def test_a_wrong_flag_or_value_is_named(flag, value):
    with pytest.raises(InputError, match=flag.lstrip("-")):
        config.parse(train.PARTS, "", [flag, value])


def test_the_reference_s_dotted_names_are_spellings_of_ours():
    argv = [
        "--task.data",
        "DIR",
        "task.tokens_per_sample=64",
        "--optimization.max_update=7",
        "optimization.lr=[0.0005]",
        "--model.transformer.encoder.embed_dim",
        "48",
        "optimizer.adam_betas=(0.9,0.95)",
        "optimization.update_freq=[4]",
        "model.transformer.encoder.layerdrop=0",
        "--max-tokens",
        "640",
        "--dataset.batch_size",
        "3",
        "--distributed_training.distributed_world_size",
        "1",
        "task._name=masked_lm",
    ]
    extra = lambda parser: parser.add_argument("--distributed_world_size", type=int)  # noqa: E731
    parts, args = config.parse(train.PARTS, "", argv, extra=extra)
    flat = {k: v for part in parts for k, v in vars(part).items()}
    expected = dict(
        data_path="DIR",
        tokens_per_sample=64,
        max_update=7,
        lr=5e-4,
        embed_dim=48,
        adam_betas=(0.9, 0.95),
        update_freq=4,
        max_tokens=640,
        batch_size=3,
    )
    assert {k: flat[k] for k in expected} == expected
    assert args.distributed_world_size == 1


@pytest.mark.parametrize(
    "word",
    [
        "common.log_format=json",
        "model.foo=3",
        "common.fp16=true",
        "common.amp=false",
        "criterion=cross_entropy",
        "model.transformer.encoder.layerdrop=0.1",
        "model.transformer.decoder.layers=3",
        "task._name=translation",
        "--task.shorten_method=truncate",
    ],
)
def test_a_dotted_name_that_is_none_of_ours_is_an_error_naming_it(word):
    with pytest.raises(InputError, match=re.escape(word.lstrip("-").split("=")[0])):
        config.parse(train.PARTS, "", [word])


def test_world_size_in_an_old_command_line_is_checked_against_torchrun(corpus_dir):
    with pytest.raises(InputError, match="torchrun --nproc_per_node 16"):
        train.main(["--task.data", str(corpus_dir), "--distributed_training.distributed_world_size", "16"])


def test_a_fairseq_yaml_is_mapped_and_what_has_no_meaning_is_printed(tmp_path, capsys):
    pytest.importorskip("yaml", reason="PyYAML is optional")
    (tmp_path / "mine.yaml").write_text(
        "# @package _group_\ncommon:\n  fp16: true\n  log_interval: 7\ntask:\n  _name: masked_lm\n  data: ???\n"
        "  mask_prob: 0.2\nmodel:\n  _name: data2vec_text\n"
        "  ema_decay: 0.5\n  max_positions: ${task.tokens_per_sample}\n"
        "  transformer:\n    encoder: {layers: 3, learned_pos: true}\n"
        "optimization:\n  lr: [0.003]\n  update_freq: [2]\n"
        "optimizer:\n  adam_betas: (0.9,0.9)\ndistributed_training:\n  distributed_world_size: 16\n"
    )
    argv = ["--config-dir", str(tmp_path), "--config-name", "mine", "--mask_prob", "0.3"]
    parts, _ = config.parse(train.PARTS, "", argv)
    flat = {k: v for part in parts for k, v in vars(part).items()}
    expected = dict(
        mask_prob=0.3, log_interval=7, ema_decay=0.5, layers=3, lr=3e-3, update_freq=2, adam_betas=(0.9, 0.9)
    )
    assert {k: flat[k] for k in expected} == expected
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 3 and all(
        any(name in line for line in printed) for name in ("common.fp16", "max_positions", "distributed_world_size")
    )
    with pytest.raises(InputError, match="no such file"):
        config.parse(train.PARTS, "", ["--config-dir", str(tmp_path), "--config-name", "other"])
    (tmp_path / "mine.yaml").write_text(
        "task: {tokens_per_sample: 99}\nmodel: {max_source_positions: '${task.tokens_per_sample}'}\ncriterion: model\n"
    )
    parts, _ = config.parse(train.PARTS, "", argv[:4])
    assert {k: v for part in parts for k, v in vars(part).items()}["max_source_positions"] == 99
    for text, message in (
        ("criterion: cross_entropy\n", "criterion"),
        ("model: {layers: '${other.layers}'}\n", "resolved"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            config.parse(train.PARTS, "", argv[:4])


def test_fairseq_exact_stands_between_preset_and_flags():
    exact = config.parse([DataConfig], "", ["--fairseq_exact"])[0][0]
    assert (exact.teacher_input, exact.long_sentences, exact.drop_remainder) == ("masked", "skip", True)
    assert not exact.fixed_masks
    assert config.parse([DataConfig], "", ["--teacher_input", "full", "--fairseq_exact"])[0][0].teacher_input == "full"


# ---------------------------------------------------------------------------------------------- data: files


@golden
@pytest.mark.parametrize("name", ["base", "base_valid", "npu_1p", "complete_256", "none_128", "eos_512"])
def test_batches_equal_the_reference_s_recorded_ones(name):
    recorded = json.loads((GOLDEN / "batches" / f"{name}.json").read_text())
    folder = GOLDEN / "corpora" / {"bin": "bpe-bin"}.get(recorded["data"], recorded["data"])
    argv = ["--data_path", folder, "--fairseq_exact", "--json", "--split", recorded["split"]]
    argv += ["--max_tokens", recorded["max_tokens"]] + [w for k, v in recorded["config"].items() for w in (f"--{k}", v)]
    for key, epoch in recorded["epochs"].items():
        number, rank, world_size = re.match(r"epoch(\d+)_shard(\d+)of(\d+)", key).groups()
        facts = json.loads(call(data.main, *argv, "--epoch", number, "--rank", rank, "--world_size", world_size))
        for ours, theirs in (
            ("batches", "batches"),
            ("empty_batches", "empty"),
            ("sentences_used", "sentences"),
            ("tokens_used", "tokens"),
            ("masked", "masked"),
            ("sha256_source", "sha_src"),
            ("sha256_target", "sha_tgt"),
            ("sha256_ids", "sha_ids"),
        ):
            assert facts[ours] == epoch[theirs], (key, ours)
        for ours, theirs in (
            ("dictionary_size", "dictionary_size"),
            ("mask_id", "mask_id"),
            ("sentences", "sentences"),
            ("tokens", "tokens"),
            ("blocks", "n_blocks"),
        ):
            assert facts[ours] == recorded[theirs], (key, ours)


@golden
def test_the_writer_s_files_equal_fairseq_preprocess_s(tmp_path):
    folder = GOLDEN / "corpora" / "words-bin"
    stream = TokenStream(folder, "valid")
    sentences = [stream.read(int(a), int(b)) for a, b in zip(stream.starts, stream.starts[1:])]
    data.write_dataset(tmp_path / "valid", sentences, 1000)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"valid.{suffix}").read_bytes() == (folder / f"valid.{suffix}").read_bytes()


def write_index(prefix, sentences, code, order=None):
    """An .idx and .bin of any integer type, with the sentences in the file in another order if asked."""
    dtype = np.dtype(data.DTYPES[code])
    order = range(len(sentences)) if order is None else order
    offsets, blob = {}, b""
    for i in order:
        offsets[i] = len(blob)
        blob += np.asarray(sentences[i], dtype).tobytes()
    Path(f"{prefix}.bin").write_bytes(blob)
    Path(f"{prefix}.idx").write_bytes(
        data.MAGIC
        + (1).to_bytes(8, "little")
        + bytes([code])
        + len(sentences).to_bytes(8, "little")
        + np.asarray([len(s) for s in sentences], "<i4").tobytes()
        + np.asarray([offsets[i] for i in range(len(sentences))], "<i8").tobytes()
    )


@pytest.mark.parametrize("code", sorted(data.DTYPES))
def test_every_integer_type_and_any_order_in_the_file_reads_the_same(tmp_path, code):
    sentences = [[5, 6, 2], [2], [7, 8, 9, 10, 2], [11, 2]]
    write_index(tmp_path / "train", sentences, code, order=[2, 0, 3, 1])
    write_index(tmp_path / "train1", sentences[::-1], code)
    stream = TokenStream(tmp_path, "train")
    flat = sum(sentences, []) + sum(sentences[::-1], [])
    assert stream.tokens == len(flat)
    for start in range(len(flat)):
        for end in range(start + 1, len(flat) + 1):
            assert stream.read(start, end).tolist() == flat[start:end]


def test_dictionary_rules(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_text("a b 3\n</s> 0 #fairseq:overwrite\n\u00a0x 1\r\n", encoding="utf-8", newline="")
    assert Dictionary(path).symbols == ["<s>", "<pad>", "</s>", "<unk>", "a b", "</s>", "\u00a0x", "<mask>"]
    path.write_text("a 1\n<mask> 0\nb 1\n")
    listed = Dictionary(path)
    assert (listed.mask_id, len(listed)) == (5, 7)
    for text, line in (("a 1\n\nb 1\n", 2), ("a\n", 1), ("a 1\nb x\n", 2), ("a 1\na 2\n", 2), ("<s> 1\n", 1)):
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
        "no sentences": lambda: data.write_dataset(folder / "train", [], 60),
        "only separators": lambda: data.write_dataset(folder / "train", [[EOS]] * 5, 60),
        "one long": lambda: data.write_dataset(folder / "train", [[*([5] * 600), EOS]], 60),
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
def test_a_broken_dataset_gets_one_line_that_says_what_and_where(tmp_path, what, message):
    folder, _ = make_dataset(tmp_path / "set", [[5, 6, 7, 8, 9, 2], [2], [10, 11, 2]] * 20)
    damage(folder, what)
    with pytest.raises(InputError, match=message) as error:
        call(data.main, "--data_path", folder, "--json", "--fairseq_exact", "--mask_prob", "0.9")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=message):  # and training meets it before its first update, or on the batch
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--attention_heads", "3"], "attention_heads 3 does not divide"),
        (["--tokens_per_sample", "100"], "position"),
        (["--average_top_k_layers", "5"], "only 2 layers"),
        (["--random_token_prob", "0.6", "--leave_unmasked_prob", "0.6"], "sum"),
        (["--init_from", "nowhere.pt"], "nowhere.pt: no such"),
        (["--adam_betas", "0.9"], "two numbers"),
        (["--mask_prob", "1e-9"], "nothing masked"),
        (["--save_dir", ""], "save_dir is empty"),
        (["--overwrite"], "goes with --no_resume"),
        (["--data_path", ":"], "names no folder"),
        (["--mask_multiple_length", "1000000000"], "mask_multiple_length"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_train(tmp_path, corpus_dir, argv, message):
    with pytest.raises(InputError, match=message):
        call(train.main, *FEW, "--max_update", "1", "--data_path", corpus_dir, "--save_dir", tmp_path / "run", *argv)


def test_a_negative_number_after_a_flag_is_its_value():
    parts, _ = config.parse([ModelConfig], "", ["--loss_scale", "-1e-3"])
    assert parts[0].loss_scale == -1e-3


@pytest.mark.parametrize(
    "variables", [dict(WORLD_SIZE="x"), dict(WORLD_SIZE="0"), dict(RANK="1"), dict(WORLD_SIZE="2", RANK="0")]
)
def test_a_broken_worker_environment_is_one_line(monkeypatch, corpus_dir, variables):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="environment|torchrun|WORLD_SIZE"):
        open_device(DeviceConfig(device="cpu"))


def test_programs_end_with_one_line_and_code_2(tmp_path):
    for program in ("train.py", "data.py", "eval.py", "bench.py"):
        result = subprocess.run(
            [
                sys.executable,
                HERE / program,
                "--data_path",
                tmp_path / "none",
                "--lr" if program != "data.py" else "--seed",
                "x",
            ],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith(f"{program}: error: ")


def test_the_demo_corpus_is_deterministic_and_its_splits_share_no_topic(tmp_path):
    for name in ("a", "b"):
        call(data.main, "--make_demo", tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["dict.txt"] + [f"{s}.{e}" for s in ("test", "train", "valid") for e in ("bin", "idx")]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    facts = json.loads(call(data.main, "--data_path", tmp_path / "a", "--json", "--config_name", "tiny"))
    assert facts["tokens"] > 50_000 and facts["documents"] > 40 and facts["dropped_percent"] == 0


# ---------------------------------------------------------------------------------------------- data: blocks and
# batches


def blocks_by_walking(sizes, mode, block_size):
    """The rule for cutting blocks, sentence by sentence."""
    blocks, at, current = [], 0, 0

    def close():
        nonlocal at, current
        if current > (1 if mode == "complete_doc" else 0):
            blocks.append((at, at + current))
        at, current = at + current, 0

    for size in sizes:
        if mode == "complete_doc" and size == 1:
            close()
            at += 1
            continue
        if current and current + size > block_size:
            close()
        current += size
    close()
    return blocks


@pytest.mark.parametrize("mode", ["complete", "complete_doc"])
def test_blocks_equal_the_rule_walked_sentence_by_sentence(mode):
    rng = np.random.default_rng(3)
    for _ in range(300):
        sizes = rng.integers(1, rng.integers(2, 30), rng.integers(0, 40))
        block_size = int(rng.integers(1, 25))
        got = list(zip(*(x.tolist() for x in cut_blocks(sizes, mode, block_size, split_long=False))))
        assert got == blocks_by_walking(sizes.tolist(), mode, block_size)


@pytest.mark.parametrize("mode", ["none", "eos", "complete", "complete_doc"])
def test_splitting_long_sentences_keeps_every_token_exactly_once(mode):
    rng = np.random.default_rng(4)
    for _ in range(300):
        sizes = rng.integers(1, rng.integers(2, 60), rng.integers(1, 40))
        block_size = int(rng.integers(1, 25))
        starts, ends = cut_blocks(sizes, mode, block_size, split_long=True)
        assert (ends - starts <= block_size).all() and (ends > starts).all()
        covered = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends)] or [np.zeros(0, int)])
        position = np.concatenate([[0], np.cumsum(sizes)])[:-1]
        expected = np.setdiff1d(np.arange(sizes.sum()), position[sizes == 1] if mode == "complete_doc" else [])
        assert np.array_equal(covered, expected)


def test_an_epoch_holds_every_token_of_the_corpus_once(block_dataset, corpus_dir):
    for world_size in (1, 3):
        dataset = block_dataset(long_sentences="split")
        stream = dataset.stream
        read = []
        for rank in range(world_size):
            for ids in dataset.epoch_batches(2, rank, world_size):
                for i in ids.tolist():
                    read += [(int(dataset.starts[i]) + j, t) for j, t in enumerate(dataset.read_block(i)[1:].tolist())]
        flat = stream.read(0, stream.tokens).tolist()
        separators = set(stream.starts[:-1][stream.sizes == 1].tolist())
        assert sorted(read) == [(i, t) for i, t in enumerate(flat) if i not in separators]


def batches_by_walking(lengths, max_tokens, batch_size, multiple):
    """The rule for cutting batches, block by block: a batch, and a tail. Also whether a tail overflowed."""
    done, batch, tail, overflowed = [], [], [], False

    def too_large(blocks):
        return len(blocks) * max(blocks) > max_tokens or (0 < batch_size < len(blocks))

    for length in lengths:
        tail = tail + [length]
        if too_large(batch + tail):
            if batch:
                done.append(batch)
            if len(tail) * max(tail) > max_tokens:
                overflowed = True
                if tail[:-1]:
                    done.append(tail[:-1])
                tail = tail[-1:]
            batch, tail = tail, []
        elif len(batch + tail) < multiple or len(batch + tail) % multiple == 0:
            batch, tail = batch + tail, []
    return done + [part for part in (batch, tail) if part], overflowed


def test_batches_equal_the_rule_walked_block_by_block():
    rng = np.random.default_rng(5)
    overflows = 0
    for _ in range(3000):
        spread = rng.choice([3, 30, 300])
        lengths = np.sort(rng.integers(1, spread + 2, rng.integers(0, 120)))
        if rng.random() < 0.5:
            lengths = np.sort(np.where(rng.random(len(lengths)) < 0.8, np.minimum(lengths, 9), lengths))
        max_tokens = int(max(lengths, default=1)) + int(rng.integers(0, rng.choice([20, 600])))
        batch_size, multiple = int(rng.choice([0, 0, 1, 5, 12, 40])), int(rng.choice([1, 2, 8]))
        expected, overflowed = batches_by_walking(lengths.tolist(), max_tokens, batch_size, multiple)
        overflows += overflowed
        ends = cut_batches(lengths, max_tokens, batch_size, multiple).tolist()
        got = [lengths[a:b].tolist() for a, b in zip([0, *ends], ends)]
        assert got == expected, (lengths.tolist(), max_tokens, batch_size, multiple)
    assert overflows >= 20  # the rare branch was reached


def test_batch_size_and_remainder(block_dataset):
    dataset = block_dataset(batch_size=8)
    assert max(map(len, dataset.epoch_batches(1))) == 8
    kept, dropped = block_dataset(), block_dataset(drop_remainder=True)
    lost = len(kept.order) - sum(map(len, dropped.epoch_batches(1)))
    assert lost == len(dropped.remainder) and sum(map(len, kept.epoch_batches(1))) == len(kept.order)


def test_workers_share_an_epoch_and_a_short_one_gets_an_empty_batch(block_dataset):
    dataset = block_dataset()
    one = [ids.tolist() for ids in dataset.epoch_batches(4)]
    for world_size in (2, 3, len(one) + 1):
        shards = [dataset.epoch_batches(4, rank, world_size) for rank in range(world_size)]
        assert len({len(shard) for shard in shards}) == 1
        for rank, shard in enumerate(shards):
            assert [ids.tolist() for ids in shard if len(ids)] == one[rank::world_size]


def test_several_folders_are_epochs_in_turn_and_validation_reads_the_first(tmp_path):
    folders = [str(make_dataset(tmp_path / str(i), seed=i)[0]) for i in range(3)]
    corpus = Corpus(DataConfig(data_path=":".join(folders)))
    for epoch in range(1, 8):
        assert str(corpus.split("train", epoch).stream.folder) == folders[(epoch - 1) % 3]
        assert str(corpus.split("valid", epoch).stream.folder) == folders[0]


# ---------------------------------------------------------------------------------------------- data: masks


@pytest.mark.parametrize("stdev", [0.0, 1.5])
@pytest.mark.parametrize(("random", "leave"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.2, 0.3)])
def test_masks_follow_the_rule_step_by_step(corpus_dir, stdev, random, leave):
    dictionary = Dictionary(corpus_dir / "dict.txt")
    cfg = DataConfig(mask_stdev=stdev, random_token_prob=random, leave_unmasked_prob=leave, seed=9)
    for index in range(40):
        n, epoch = 5 + index, index % 3 + 1
        rng = np.random.default_rng(int(hash((9, epoch, index)) % 1e6))
        places = rng.choice(n, int(0.35 * n / 4 + rng.random()), replace=False)
        spans = [max(0, int(round(x))) for x in rng.normal(4, stdev, size=len(places))] if stdev else [4] * len(places)
        expected = {p + i for p, span in zip(places.tolist(), spans) for i in range(span) if p + i < n}
        special = rng.random(n) < random + leave if random + leave else np.zeros(n, bool)
        left = special & (leave > 0)
        if random and leave:
            left = special & (rng.random(n) < leave / (random + leave))
        hidden, shown, drawn = mask_block(n, dictionary, cfg, epoch, index)
        assert set(np.flatnonzero(hidden).tolist()) == expected
        assert set(np.flatnonzero(shown).tolist()) == {p for p in expected if not left[p]}
        places = sorted(p for p in expected if special[p] and not left[p])
        if drawn is None:
            assert not places
        else:
            assert (
                np.flatnonzero(drawn[0]).tolist() == places and drawn[1].min() >= 4 and drawn[1].max() < len(dictionary)
            )


def test_masks_change_each_epoch_unless_fixed_and_validation_s_never(block_dataset):
    for split, fixed, same in (("train", False, False), ("train", True, True), ("valid", False, True)):
        dataset = block_dataset(split, fixed_masks=fixed)
        ids = dataset.epoch_batches(1)[-1]
        assert np.array_equal(dataset.batch(ids, 1).source, dataset.batch(ids, 2).source) == same


def test_a_batch_holds_blocks_padded_on_the_right_and_the_teacher_s_two_inputs(block_dataset):
    full, masked = block_dataset(teacher_input="full"), block_dataset(teacher_input="masked")
    assert any(full.batch(ids, 1).source_padded for ids in full.epoch_batches(1))
    for ids in full.epoch_batches(1):
        a, b = full.batch(ids, 1), masked.batch(ids, 1)
        blocks = [full.read_block(i) for i in ids.tolist()]
        assert all(block[0] == BOS for block in blocks) and a.ntokens == sum(map(len, blocks))
        for row, block in enumerate(blocks):
            assert a.target[row, : len(block)].tolist() == block.tolist() and (a.target[row, len(block) :] == PAD).all()
            mask = b.source[row, : len(block)] == full.dictionary.mask_id
            assert [t for t in b.target[row].tolist() if t != PAD] == block[mask].tolist()
        assert np.array_equal(a.source, b.source) and np.array_equal(a.target_places, a.masked)
        assert np.array_equal(a.target.ravel()[a.target_places], b.target.ravel()[b.target_places])
        assert np.array_equal(a.masked, np.flatnonzero(a.source == full.dictionary.mask_id))


# ---------------------------------------------------------------------------------------------- model


def random_encoder(seed=0, vocabulary=40, **options):
    """An encoder whose every parameter is random, biases and norms too, so that none can be forgotten unseen."""
    cfg = ModelConfig(**{**SMALL, **options})
    torch.manual_seed(seed)
    model = Data2VecText(cfg, vocabulary).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name and p.ndim == 1 else 0.0, 0.3)
    with torch.no_grad():
        model.encoder.embed_tokens.weight[PAD] = 0
        model.encoder.embed_positions.weight[PAD] = 0
    return model, cfg


def encoder_by_formula(encoder, cfg, tokens):
    """The encoder written out for one block without softmax kernels, dropout or batches; float64; pads anywhere."""
    w = {k: v.double() for k, v in encoder.state_dict().items()}
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)  # noqa: E731
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    real, C, H = tokens != 1, cfg.embed_dim, cfg.attention_heads
    positions, count = [], 1
    for token in tokens.tolist():
        count += token != 1
        positions.append(count if token != 1 else 1)
    x = norm(w["embed_tokens.weight"][tokens] + w["embed_positions.weight"][positions], "layernorm_embedding")
    x = x * real[:, None]
    targets = []
    for i in range(cfg.layers):
        name = f"layers.{i}"

        def attention(x):
            q, k, v = linear(x, f"{name}.self_attn.qkv").split(C, 1)
            heads = []
            for h in range(H):
                part = slice(h * C // H, (h + 1) * C // H)
                scores = q[:, part] @ k[:, part].T / math.sqrt(C // H)
                weights = torch.exp(scores) * real
                heads.append(weights @ v[:, part] / weights.sum(1, keepdim=True))
            return linear(torch.cat(heads, 1), f"{name}.self_attn.out_proj")

        def feed_forward(x):
            x = linear(x, f"{name}.fc1")
            x = torch.relu(x) if cfg.activation_fn == "relu" else x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
            return linear(x, f"{name}.fc2")

        if cfg.normalize_before:
            x = x + attention(norm(x, f"{name}.self_attn_layer_norm"))
            targets.append(feed_forward(norm(x, f"{name}.final_layer_norm")))
            x = x + targets[-1]
        else:
            x = norm(x + attention(x), f"{name}.self_attn_layer_norm")
            targets.append(feed_forward(x))
            x = norm(x + targets[-1], f"{name}.final_layer_norm")
    return (norm(x, "layer_norm") if cfg.normalize_before else x), targets, real


@pytest.mark.parametrize("options", [{}, {"normalize_before": True}, {"activation_fn": "relu", "layers": 3}])
@torch.no_grad()
def test_the_encoder_equals_the_formula_also_with_pads_inside(options):
    model, cfg = random_encoder(**options)
    tokens = torch.randint(4, 40, (3, 11))
    tokens[0, 7:] = 1
    tokens[1, [2, 5]] = 1  # a corpus may hold the pad symbol itself
    got, targets = model.encoder(tokens, True, cfg.layers)
    for b in range(3):
        expected, expected_targets, real = encoder_by_formula(model.encoder, cfg, tokens[b])
        assert torch.allclose(got[b][real].double(), expected[real], atol=2e-5, rtol=1e-5)
        for mine, formula in zip(targets, expected_targets, strict=True):
            assert torch.allclose(mine[b][real].double(), formula[real], atol=2e-5, rtol=1e-5)
    unpadded = tokens[2:]
    assert torch.allclose(model.encoder(unpadded, False)[0], model.encoder(unpadded, True)[0], atol=1e-6)


@torch.no_grad()
def test_padding_does_not_change_a_block_s_output():
    model, cfg = random_encoder()
    block = torch.randint(4, 40, (1, 9))
    alone, _ = model.encoder(block, False)
    for width in (10, 30):
        padded = torch.full((2, width), PAD)
        padded[0, :9], padded[1] = block, torch.randint(4, 40, (width,))
        assert torch.allclose(model.encoder(padded)[0][0, :9], alone[0], atol=1e-5)


@pytest.mark.parametrize("before", [False, True])
def test_the_last_layer_at_the_wanted_places_alone_equals_the_whole_layer_there(before):
    model, cfg = random_encoder(normalize_before=before, layers=3)
    tokens = torch.randint(4, 40, (4, 11))
    tokens[1, 8:] = PAD
    places = np.array([0, 3, 4, 10, 12, 33, 34, 43])  # none in the third block
    queries = queries_of(places, *tokens.shape)
    assert queries[0].shape == (4, 4) and np.array_equal(queries[0].ravel()[queries[1]], places)
    assert np.array_equal(queries[0] // 11, np.arange(4)[:, None].repeat(4, 1))  # each row is of its own block
    places, queries = torch.from_numpy(places), [torch.from_numpy(array) for array in queries]
    results = []
    for arguments in ({}, dict(places=places), dict(places=places, queries=queries)):
        x, targets = model.encoder(tokens, True, 3, **arguments)
        x, *targets = [y if arguments else y.flatten(0, 1)[places] for y in (x, *targets)]
        model.zero_grad()
        (x.square().sum() + targets[1].square().sum()).backward()
        results.append([x, *targets, *(p.grad.clone() for p in model.encoder.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.detach().abs().max()))


def test_attention_in_plain_matmuls_equals_torch_s():
    q, k, v = (torch.randn(3, 2, n, 8) for n in (4, 7, 7))
    attend = torch.rand(3, 1, 1, 7) < 0.6
    attend[1] = False  # nothing may be looked at: 0, not NaN
    for mask in (None, attend.expand(3, 1, 4, 7)):
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        assert torch.allclose(explicit_attention(q, k, v, mask, 0.0), expected, atol=1e-6)


def targets_as_the_reference_pads(teacher, cfg, padded_target, places):
    """The targets with torch's own norms over the padded form, (M, C)."""
    _, layers = teacher(padded_target, True, cfg.average_top_k_layers)
    layers = [y.transpose(1, 2) for y in layers]  # (B, C, T)
    if cfg.batch_norm_target_layer:
        layers = [F.batch_norm(y, None, None, training=True) for y in layers]
    if cfg.instance_norm_target_layer:
        layers = [F.instance_norm(y) for y in layers]
    layers = [y.transpose(1, 2) for y in layers]
    if cfg.layer_norm_target_layer:
        layers = [F.layer_norm(y, y.shape[-1:]) for y in layers]
    y = sum(layers) / len(layers)
    if cfg.layer_norm_targets:
        y = F.layer_norm(y, y.shape[-1:])
    if cfg.instance_norm_targets:
        y = F.instance_norm(y.transpose(1, 2)).transpose(1, 2)
    return y.flatten(0, 1)[places]


NORMS = [
    "batch_norm_target_layer",
    "instance_norm_target_layer",
    "layer_norm_target_layer",
    "layer_norm_targets",
    "instance_norm_targets",
]


@pytest.mark.parametrize("on", [[], *[[name] for name in NORMS], NORMS, NORMS[:3]])
@pytest.mark.parametrize("teacher_input", ["full", "masked"])
@torch.no_grad()
def test_all_target_normalizations_squeezed_or_padded(block_dataset, on, teacher_input):
    dataset = block_dataset(teacher_input=teacher_input)
    model, cfg = random_encoder(vocabulary=61, average_top_k_layers=2, **{name: name in on for name in NORMS})
    for ids in [dataset.epoch_batches(1)[0], max(dataset.epoch_batches(1), key=len)]:
        tokens, _, hidden = dataset.mask(ids, 1)
        if teacher_input == "masked":
            tokens = np.where(hidden, tokens, PAD)
        batch = CPU.upload(dataset.batch(ids, 1))
        got = teacher_targets(
            model.encoder, cfg, batch.target, batch.target_places, batch.target_padded, batch.source.shape[1]
        )
        expected = targets_as_the_reference_pads(model.encoder, cfg, torch.from_numpy(tokens), batch.masked)
        assert torch.allclose(got, expected, atol=3e-5, rtol=1e-4)


@torch.no_grad()
def test_a_block_with_nothing_masked_gives_no_nan():
    model, cfg = random_encoder(**{name: True for name in NORMS})
    target = torch.tensor([[5, 6, 7], [PAD, PAD, PAD]])
    y = teacher_targets(model.encoder, cfg, target, torch.tensor([0, 1, 2]), True, 10)
    assert y.isfinite().all()
    none = torch.zeros(0, dtype=torch.int64)
    y = teacher_targets(model.encoder, cfg, torch.full((2, 1), PAD), none, True, 10)
    prediction = model(torch.randint(4, 40, (2, 10)), none)
    assert float(data2vec_loss(prediction, y, cfg)) == 0


@pytest.mark.parametrize(("beta", "scale"), [(4.0, 1.0), (0.5, 2.0), (0.0, 1.0), (0.0, -1.0), (1.0, 0.0)])
def test_the_loss_equals_its_formula(beta, scale):
    prediction, target = torch.randn(7, 16) * 3, torch.randn(7, 16)
    d = (prediction - target).abs().double()
    smooth = d**2 if beta == 0 else torch.where(d < beta, d**2 / (2 * beta), d - beta / 2)
    expected = smooth.sum() * (scale if scale > 0 else 1 / 4)
    got = data2vec_loss(prediction, target, ModelConfig(**SMALL, loss_beta=beta, loss_scale=scale))
    assert float(got) == pytest.approx(float(expected), rel=1e-6)


def test_the_head_has_the_reference_s_widths():
    shapes = {1: [(16, 16)], 2: [(32, 16), (16, 32)], 3: [(32, 16), (32, 32), (16, 32)]}
    for layers, expected in shapes.items():
        head = RegressionHead(ModelConfig(**SMALL, head_layers=layers))
        assert [tuple(p.shape) for p in head.parameters() if p.ndim == 2] == expected
        assert {name.split(".")[0] for name in head.state_dict()} == {str(2 * i) for i in range(layers)}
    x = torch.randn(5, 16)
    head = RegressionHead(ModelConfig(**SMALL, head_layers=2))
    a, b = [m for m in head if isinstance(m, torch.nn.Linear)]
    assert torch.allclose(head(x), b(F.gelu(a(x))))


def test_initial_weights():
    model = Data2VecText(ModelConfig(**{**SMALL, "embed_dim": 64, "ffn_embed_dim": 256}), 500)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif p.ndim == 1:
            assert (p == 1).all()
        else:
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.1) and abs(float(p.detach().mean())) < 2e-3
    assert (model.encoder.embed_tokens.weight[PAD] == 0).all() and (
        model.encoder.embed_positions.weight[PAD] == 0
    ).all()
    assert model.encoder.embed_positions.num_embeddings == SMALL["max_source_positions"] + 2


@pytest.mark.parametrize("before", [False, True])
def test_dropout_stands_where_the_reference_has_it(monkeypatch, before):
    model, cfg = random_encoder(dropout=0.25, attention_dropout=0.4, activation_dropout=0.125, normalize_before=before)
    encoder, events = model.encoder.train(), []
    monkeypatch.setattr(
        F, "dropout", lambda x, p, training, inplace=False: (events.append((p, x.clone())), x)[1] if training else x
    )
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, m, p: (events.append((p, None)), plain(q, k, v, m))[1]
    )
    outputs = {}
    for name, module in encoder.named_modules():
        module.register_forward_hook(lambda m, i, out, name=name: outputs.setdefault(name, out))
    tokens = torch.randint(4, 40, (2, 9))
    _, targets = encoder(tokens, False, cfg.layers)
    assert [p for p, _ in events] == [0.25] + [0.4, 0.25, 0.125, 0.25] * cfg.layers
    assert torch.equal(events[0][1], outputs["layernorm_embedding"])
    for i in range(cfg.layers):
        _, attention, activation, last = (x for _, x in events[1 + 4 * i : 5 + 4 * i])
        assert torch.equal(attention, outputs[f"layers.{i}.self_attn.out_proj"])
        assert torch.allclose(activation, F.gelu(outputs[f"layers.{i}.fc1"]))
        assert torch.equal(last, outputs[f"layers.{i}.fc2"])
        assert targets[i] is outputs[f"layers.{i}.fc2"]
    events.clear()
    encoder.eval()(tokens)
    assert all(p == 0 for p, _ in events)


def test_the_loss_ignores_unmasked_places_and_gradients_reach_every_parameter(block_dataset):
    dataset = block_dataset()
    batch = CPU.upload(dataset.batch(dataset.epoch_batches(1)[0], 1))
    model, cfg = random_encoder(vocabulary=61)
    target = torch.randn(batch.sample_size, cfg.embed_dim)
    x = model.encoder(batch.source)[0].flatten(0, 1)
    chosen = model.regression_head(x[batch.source.flatten() == dataset.dictionary.mask_id])
    assert torch.allclose(model(batch.source, batch.masked), chosen, atol=1e-6)
    data2vec_loss(model(batch.source, batch.masked), target, cfg).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ---------------------------------------------------------------------------------------------- ema


def test_the_decay_follows_the_reference_s_line():
    cfg = EmaConfig(ema_decay=0.9, ema_end_decay=0.99, ema_anneal_end_step=10)
    assert [ema.decay_at(u, cfg) for u in (0, 1, 5, 10, 11)] == pytest.approx([0.9, 0.909, 0.945, 0.99, 0.99])


@pytest.mark.parametrize("layers_only", [True, False])
def test_the_teacher_moves_by_the_formula(layers_only):
    student = random_encoder(1)[0].encoder
    teacher = ema.make_teacher(random_encoder(2)[0].encoder)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    cfg = EmaConfig(ema_transformer_layers_only=layers_only)
    ema.step(teacher, student, 0.75, cfg)
    for name, new in teacher.state_dict().items():
        copied = layers_only and not name.startswith("layers.")
        expected = student.state_dict()[name] if copied else 0.75 * before[name] + 0.25 * student.state_dict()[name]
        assert torch.allclose(new, expected, atol=1e-7), name
    assert (
        new.dtype == torch.float32 and not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    )


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_reader_computes_what_autocast_makes_of_the_teacher_to_the_bit(amp):
    model, cfg = random_encoder(2)
    teacher = ema.make_teacher(random_encoder(1)[0].encoder)
    reader = ema.make_reader(teacher, amp)
    ema.step(teacher, model.encoder, 0.5, EmaConfig())
    ema.refresh(reader, teacher)
    tokens = torch.randint(4, 40, (3, 9))
    with torch.autocast("cpu", amp):
        for a, b in zip(teacher(tokens, True, 2)[1], reader(tokens, True, 2)[1]):
            assert a.dtype == amp and torch.equal(a, b)
    assert ema.make_reader(teacher, None) is teacher


# ---------------------------------------------------------------------------------------------- device


def test_the_cpu_s_dropout_keeps_the_expected_share_and_mean():
    for p, n in ((0.1, 400_001), (0.5, 7), (0.9999999, 3)):
        x = torch.full((n,), 3.0, requires_grad=True)
        torch.manual_seed(5)
        y = device.cpu_dropout(x, p)
        y.sum().backward()
        torch.manual_seed(5)
        assert torch.equal(y, device.cpu_dropout(x, p)) and torch.equal(y, x * x.grad)
        kept = y != 0
        assert torch.allclose(y[kept], torch.tensor(3 / (1 - min(p, 1 - 2**-16))), rtol=1e-4)
        if n > 1000:
            assert abs(float(kept.float().mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
            assert abs(float(y.detach().mean()) - 3) < 0.02
    assert device.cpu_dropout(torch.ones(2, 3, 5, dtype=torch.bfloat16), 0.25).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 12), (0, 12)])
def test_the_cpu_s_linear_layer_equals_torch_s_with_its_gradients(shape):
    results = []
    for linear in (F.linear, device.cpu_linear):
        torch.manual_seed(3)
        x, w, b = (torch.randn(s, requires_grad=True) for s in (shape, (20, 12), (20,)))
        y = linear(x, w[4:], b[4:])  # rows of a matrix, as queries and keys are
        y.sin().sum().backward()
        results.append((y, x.grad, w.grad, b.grad))
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert device.cpu_linear(torch.randn(2, 12), w, b).dtype == torch.bfloat16


def test_programs_import_without_torch_npu_and_keep_it_from_loading_itself():
    variable = "TORCH_DEVICE_BACKEND_AUTOLOAD"
    code = (
        "import sys, os\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        assert name != 'torch' or os.environ.get('{variable}') == '0', 'too late'\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import {0}\n"
        f"assert 'torch_npu' not in sys.modules; print(os.environ['{variable}'])"
    )
    env = {k: v for k, v in os.environ.items() if k != variable}
    for name in ("train", "eval", "bench", "soak"):
        run = subprocess.run(
            [sys.executable, "-c", code.format(name)], cwd=HERE, env=env, capture_output=True, text=True
        )
        assert run.stdout.strip() == "0", run.stderr


def test_devices_that_are_not_there_are_refused_in_one_line():
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda"):
            open_device(DeviceConfig(device="cuda"))
    try:
        import torch_npu  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="torch_npu is not installed.*requirements-npu.txt"):
            open_device(DeviceConfig(device="npu"))
    assert open_device(DeviceConfig(device="cpu", amp="auto")).amp is None


def test_the_loss_scaler_has_the_reference_s_rules():
    scaler = dataclasses.replace(CPU, amp=torch.float16, world_size=4).scaler(update_freq=2)
    assert scaler.get_scale() == 128 and scaler.get_growth_interval() == 2**14 // 8
    assert not dataclasses.replace(CPU, amp=torch.bfloat16).scaler(1).is_enabled()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_and_the_teacher_stays_in_float32(tmp_path, corpus_dir, amp):
    for name in ("off", amp):
        call(
            train.main, *FEW, "--max_update", 8, "--data_path", corpus_dir, "--save_dir", tmp_path / name, "--amp", name
        )
    plain, mixed = rows_of(tmp_path / "off"), rows_of(tmp_path / amp)
    assert [r["loss"] for r in mixed] == pytest.approx([r["loss"] for r in plain], rel=0.02)
    assert mixed[0]["loss"] != plain[0]["loss"] and mixed[0]["loss_scale"] == (128 if amp == "fp16" else 1)
    saved = checkpoint.load(tmp_path / amp / "checkpoint_last.pt")
    assert all(t.dtype == torch.float32 for t in [*saved.teacher.values(), *saved.student.values()])


# ---------------------------------------------------------------------------------------------- checkpoint


def test_names_map_one_to_one_to_the_reference_s():
    student, cfg = random_encoder(1, normalize_before=True)
    teacher = ema.make_teacher(random_encoder(2, normalize_before=True)[0].encoder)
    theirs = checkpoint.to_reference(student.state_dict(), teacher.state_dict())
    assert (
        "encoder.sentence_encoder.layers.1.self_attn.k_proj.bias" in theirs
        and "encoder.regression_head.2.weight" in theirs
    )
    back_student, back_teacher = checkpoint.from_reference(theirs)
    for back, module in ((back_student, student), (back_teacher, teacher)):
        assert set(back) == set(module.state_dict())
        assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())


@golden
def test_the_reference_s_names_are_all_known_and_none_is_made_up():
    theirs = torch.load(GOLDEN / "checkpoint" / "fairseq_doc128.pt", weights_only=True)["model"]
    made = checkpoint.to_reference(*checkpoint.from_reference(theirs))
    assert set(made) == set(theirs) and set(made["encoder._ema"]) == set(theirs["encoder._ema"])
    assert all(torch.equal(made[k], v) for k, v in theirs.items() if k != "encoder._ema")
    assert all(torch.equal(made["encoder._ema"][k], v) for k, v in theirs["encoder._ema"].items())


@golden
def test_a_fairseq_checkpoint_evaluates_to_its_own_validation_loss(tmp_path):
    recorded = json.loads((GOLDEN / "train" / "doc128" / "config.json").read_text())["final_valid"]
    file, words = GOLDEN / "checkpoint" / "fairseq_doc128.pt", GOLDEN / "corpora" / "words-bin"
    for flag in ("--ckpt", "--init_from"):
        result = json.loads(call(evaluation.main, flag, file, "--data_path", words, "--device", "cpu", "--json"))
        assert result["loss"] == pytest.approx(recorded["loss"], rel=5e-6)
        assert (result["sample_size"], result["batches"]) == (recorded["sample_size"], recorded["batches"])
    argv = [
        "--init_from",
        file,
        "--data_path",
        words,
        "--save_dir",
        tmp_path,
        "--embed_dim",
        64,
        "--ffn_embed_dim",
        256,
        "--layers",
        4,
        "--attention_heads",
        4,
        "--tokens_per_sample",
        128,
        "--average_top_k_layers",
        3,
        "--max_tokens",
        1024,
        "--max_update",
        2,
        "--device",
        "cpu",
        "--log_interval",
        1,
        "--disable_validation",
        "--dropout",
        0,
        "--attention_dropout",
        0,
    ]
    call(train.main, *argv, "--fairseq_exact")
    assert rows_of(tmp_path)[0]["loss"] < 2.2  # an untrained model begins at 2.6 here


def test_foreign_and_misfitting_checkpoints_are_refused(tmp_path, corpus_dir):
    good = tmp_path / "run"
    call(train.main, *FEW, "--max_update", 2, "--data_path", corpus_dir, "--save_dir", good)
    file = good / "checkpoint_last.pt"
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:5000])
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    for name, message in (
        ("text", "cannot be read"),
        ("cut", "cannot be read"),
        ("other", "neither"),
        ("list", "holds a list"),
    ):
        with pytest.raises(InputError, match=message):
            checkpoint.load(tmp_path / f"{name}.pt")
    bigger = make_dataset(tmp_path / "bigger", words=80)[0]
    start = [*FEW, "--max_update", "2", "--save_dir", str(tmp_path / "new"), "--init_from", str(file)]
    with pytest.raises(InputError, match="another dictionary"):
        call(train.main, *start, "--data_path", bigger)
    with pytest.raises(InputError, match=r"is \(.*this model's is"):
        call(train.main, *start, "--data_path", corpus_dir, "--embed_dim", "32")
    with pytest.raises(InputError, match="has no encoder.layers.2"):
        call(train.main, *start, "--data_path", corpus_dir, "--layers", "3")
    with pytest.raises(InputError, match="layers was 2, is 3"):
        call(train.main, *FEW, "--max_update", "4", "--save_dir", good, "--data_path", corpus_dir, "--layers", "3")
    with pytest.raises(InputError, match="another dictionary"):
        call(evaluation.main, "--ckpt", file, "--data_path", bigger)


def test_interval_checkpoints_are_pruned_and_share_the_bytes_of_the_last(tmp_path, corpus_dir):
    call(
        train.main,
        *FEW,
        "--max_update",
        6,
        "--data_path",
        corpus_dir,
        "--save_dir",
        tmp_path,
        "--save_interval_updates",
        2,
        "--keep_interval_updates",
        2,
    )
    names = sorted(p.name for p in tmp_path.glob("*.pt*"))
    assert names == ["checkpoint_1_4.pt", "checkpoint_1_6.pt", "checkpoint_best.pt", "checkpoint_last.pt"]
    assert checkpoint.load(tmp_path / "checkpoint_1_4.pt").content["progress"]["num_updates"] == 4


# ---------------------------------------------------------------------------------------------- train


@golden
@pytest.mark.parametrize("name", ["doc128", "doc128_full", "npu64", "npu64_one_worker"])
def test_a_whole_run_equals_the_reference_s_recorded_one(tmp_path, name):
    folder = GOLDEN / "train" / name
    recorded = json.loads((folder / "config.json").read_text())
    options = {**recorded["config"], "data_path": GOLDEN / "corpora" / recorded["config"]["data"]}
    options.pop("data")
    argv = [part for k, v in options.items() for part in (f"--{k}", v)]
    call(
        train.main,
        "--config_name",
        "base",
        "--fairseq_exact",
        "--device",
        "cpu",
        "--log_interval",
        1,
        *argv,
        "--save_dir",
        tmp_path,
        "--init_from",
        folder / "init.pt",
    )
    expected = [json.loads(line) for line in (folder / "trajectory.jsonl").read_text().splitlines()]
    for mine, theirs in zip(rows_of(tmp_path), expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=5e-6)
        assert mine["gnorm"] == pytest.approx(theirs["gnorm"], rel=5e-5)
        assert mine["lr"] == pytest.approx(theirs["lr"], abs=1e-12) and mine["ema_decay"] == pytest.approx(
            theirs["ema_decay"], abs=1e-12
        )
        assert (mine["sample_size"], mine["nsentences"]) == (theirs["sample_size"], theirs["nsentences"])
    assert rows_of(tmp_path, "valid_loss")[-1]["valid_loss"] == pytest.approx(recorded["final_valid"]["loss"], rel=5e-6)
    saved = checkpoint.load(tmp_path / "checkpoint_last.pt")
    mine, final = (
        checkpoint.to_reference(saved.student, saved.teacher),
        torch.load(folder / "final.pt", weights_only=True),
    )
    for a, b in ((mine, final), (mine["encoder._ema"], final["encoder._ema"])):
        assert set(a) == set(b)
        assert all((a[k] - b[k]).abs().max() < 2e-5 for k in b if k != "encoder._ema")


def test_the_learning_rate_warms_up_and_falls_as_the_formula_says():
    cfg = train.TrainConfig(lr=0.1, warmup_updates=4, max_update=12)
    cosine = [0.05 * (1 + math.cos(math.pi * i / 8)) for i in range(9)]
    assert [train.lr_at(u, cfg) for u in range(13)] == pytest.approx([0, 0.025, 0.05, 0.075, *cosine])
    assert train.lr_at(0, train.TrainConfig(lr=0.1, warmup_updates=0, max_update=5)) == 0.1
    assert train.lr_at(99, train.TrainConfig(lr=0.1, warmup_updates=200, max_update=100)) == pytest.approx(0.0495)


def make_run(corpus_dir, seed=1, device=CPU, **options):
    defaults = dict(
        SMALL, tokens_per_sample=32, max_tokens=256, data_path=str(corpus_dir), lr=1e-3, warmup_updates=0, seed=seed
    )
    argv = [part for k, v in {**defaults, **options}.items() for part in (f"--{k}", str(v))]
    cfg = train.Config(*config.parse(train.PARTS, "", argv)[0])
    corpus = Corpus(cfg.data)
    return train.Run(cfg, device, len(corpus.dictionary)), corpus.split("train")


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_an_update_is_the_reference_s_adam_with_eps_beside_the_uncorrected_root(corpus_dir, clip_norm):
    betas, eps, decay = (0.8, 0.9), 0.03, 0.1  # large, so that their places show
    run, dataset = make_run(
        corpus_dir, adam_betas="0.8,0.9", adam_eps=eps, weight_decay=decay, clip_norm=clip_norm, lr=0.01
    )
    state = {n: (p.detach().double().clone(), 0.0, 0.0) for n, p in run.student.named_parameters()}
    for t, ids in enumerate(dataset.epoch_batches(1)[:5], 1):
        batch = dataset.batch(ids, 1)
        here = CPU.upload(batch)
        target = teacher_targets(
            run.teacher, run.cfg.model, here.target, here.target_places, here.target_padded, here.source.shape[1]
        )
        loss = data2vec_loss(run.student(here.source, here.masked), target, run.cfg.model) / batch.sample_size
        grads = dict(zip(state, torch.autograd.grad(loss, list(run.student.parameters()))))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        lr = train.lr_at(t - 1, run.cfg.train)
        done = train.update(run, [batch])
        assert float(done.gnorm) == pytest.approx(norm, rel=1e-5)
        assert norm > 0.05  # so that clipping to it shows
        for name, (p, m, v) in state.items():
            g = grads[name].double() * (min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0)
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
            p = p - lr * decay * p
            p = p - lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * m / (v.sqrt() + eps)
            state[name] = p, m, v
            mine = dict(run.student.named_parameters())[name].detach().double()
            assert torch.allclose(mine, p, atol=2e-6), (t, name)


def test_the_teacher_begins_as_a_copy_steps_once_an_update_and_takes_no_gradient(corpus_dir):
    run, dataset = make_run(corpus_dir, update_freq=3, ema_anneal_end_step=10, ema_decay=0.5, ema_end_decay=0.9)
    expected = {k: v.clone() for k, v in run.teacher.state_dict().items()}
    assert all(torch.equal(v, run.student.encoder.state_dict()[k]) for k, v in expected.items())
    batches = [dataset.batch(ids, 1) for ids in dataset.epoch_batches(1)[:6]]
    for u in (1, 2):
        done = train.update(run, batches[3 * u - 3 : 3 * u])
        assert done.ema_decay == pytest.approx(ema.decay_at(u - 1, run.cfg.ema))
        decay, student = ema.decay_at(u, run.cfg.ema), run.student.encoder.state_dict()
        for name, new in run.teacher.state_dict().items():
            old = expected[name]
            expected[name] = (
                decay * old + (1 - decay) * student[name] if name.startswith("layers.") else student[name].clone()
            )
            assert torch.allclose(new, expected[name], atol=1e-6)
    assert all(p.grad is None and not p.requires_grad for p in run.teacher.parameters())


def test_fairseq_exact_leaves_the_teacher_one_update_behind(corpus_dir):
    run, dataset = make_run(corpus_dir, fairseq_exact="true")
    normal, _ = make_run(corpus_dir, teacher_input="masked", long_sentences="skip", drop_remainder="true")
    batches = [dataset.batch(ids, 1) for ids in dataset.epoch_batches(1)[:3]]
    for batch in batches:
        before = {k: v.clone() for k, v in normal.teacher.state_dict().items()}
        losses = [float(train.update(r, [batch]).loss) for r in (run, normal)]
        assert losses[0] == losses[1]  # the same run, seen at another moment
        assert all(torch.equal(v, before[k]) for k, v in run.teacher.state_dict().items())
    run.move_teacher()
    assert all(torch.equal(v, normal.teacher.state_dict()[k]) for k, v in run.teacher.state_dict().items())


def test_update_freq_2_equals_one_batch_of_twice_the_size(corpus_dir):
    runs = [make_run(corpus_dir)[0] for _ in range(2)]
    dataset = make_run(corpus_dir)[1]
    for ids in [ids for ids in dataset.epoch_batches(1) if len(ids) >= 4][:4]:
        one = train.update(runs[0], [dataset.batch(ids, 1)])
        two = train.update(runs[1], [dataset.batch(part, 1) for part in (ids[: len(ids) // 3], ids[len(ids) // 3 :])])
        assert float(two.loss) == pytest.approx(float(one.loss), rel=1e-5)
        assert (
            float(two.gnorm) == pytest.approx(float(one.gnorm), rel=1e-5) and two.counts.tolist() == one.counts.tolist()
        )
    for a, b in zip(runs[0].parameters, runs[1].parameters):
        assert torch.allclose(a, b, atol=2e-6)


def test_an_update_without_a_masked_token_or_without_a_batch_counts_as_zero(corpus_dir):
    run, dataset = make_run(corpus_dir)
    batch = dataset.batch(dataset.epoch_batches(1)[0], 1)
    none = np.zeros(0, np.int64)
    bare = dataclasses.replace(batch, source=batch.target, masked=none, target_places=none)
    for batches in ([bare], []):
        done = train.update(run, batches)
        assert float(done.loss) == 0 and float(done.gnorm) == 0 and int(done.counts[0]) == 0
    assert all(p.isfinite().all() for p in run.parameters) and run.num_updates == 2


def test_an_fp16_overflow_skips_the_update_and_is_not_counted(corpus_dir):
    run, dataset = make_run(corpus_dir, device=dataclasses.replace(CPU, amp=torch.float16))
    before = [p.detach().clone() for p in run.parameters]
    run.scaler.scale(torch.zeros(()))  # makes the scale, which the next line sets
    run.scaler.update(2.0**30)
    run.loss_scale = run.scaler.get_scale()
    batch = dataset.batch(dataset.epoch_batches(1)[0], 1)
    assert train.update(run, [batch]) is None
    assert run.num_updates == 0 and run.scaler.get_scale() == 2.0**29
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters))


def compare_checkpoints(a, b, exactly=True):
    a, b = checkpoint.load(a).content, checkpoint.load(b).content
    flat = lambda c: [
        *c["student"].values(),
        *c["teacher"].values(),  # noqa: E731
        *(t for s in c["optimizer"]["state"].values() for t in s.values()),
    ]
    assert len(flat(a)) == len(flat(b)) > 50
    for x, y in zip(flat(a), flat(b)):
        assert torch.equal(x, y) if exactly else torch.allclose(x, y, atol=2e-6)
    progress = [
        {k: v for k, v in c["progress"].items() if k not in ("world_size", "batches", "best_loss")} for c in (a, b)
    ]
    assert progress[0] == progress[1]


@pytest.mark.parametrize(
    "extra", [[], ["--fairseq_exact"], ["--update_freq", "3"], ["--amp", "bf16"], ["--log_interval", "5"]]
)
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, corpus_dir, monkeypatch, extra):
    # dropout on; about 20 batches an epoch (7 updates under update_freq 3): the interruptions lie within epochs
    argv = [
        *FEW,
        "--data_path",
        corpus_dir,
        "--max_update",
        30,
        "--save_interval_updates",
        4,
        "--dropout",
        0.1,
        "--attention_dropout",
        0.1,
        *extra,
    ]
    call(train.main, *argv, "--save_dir", tmp_path / "whole")
    real, calls = train.update, []

    def failing(run, batches, *args):
        calls.append(run.num_updates)
        if run.num_updates in (6, 26) and calls.count(run.num_updates) == 1:
            raise KeyboardInterrupt
        return real(run, batches, *args)

    monkeypatch.setattr(train, "update", failing)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            call(train.main, *argv, "--save_dir", tmp_path / "parts")
    call(train.main, *argv, "--save_dir", tmp_path / "parts")
    assert 4 in calls and 24 in calls and calls.count(5) == 2  # it did go back to the last checkpoint
    compare_checkpoints(tmp_path / "whole" / "checkpoint_last.pt", tmp_path / "parts" / "checkpoint_last.pt")
    speed = {"fps", "ups", "wps", "wall"}
    strip = lambda rows: [{k: v for k, v in row.items() if k not in speed} for row in rows]  # noqa: E731
    for key in ("loss", "valid_loss"):
        assert strip(rows_of(tmp_path / "whole", key)) == strip(rows_of(tmp_path / "parts", key))
    step = 5 if "--log_interval" in extra else 1
    assert [row["num_updates"] for row in rows_of(tmp_path / "parts")] == list(range(step, 31, step))


def test_a_finished_run_goes_on_when_max_update_is_raised_and_a_used_directory_is_guarded(tmp_path, corpus_dir):
    argv = [*FEW, "--data_path", corpus_dir, "--save_dir", tmp_path]
    call(train.main, *argv, "--max_update", 3)
    call(train.main, *argv, "--max_update", 5)
    assert [row["num_updates"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="seed was 1, is 2"):
        call(train.main, *argv, "--max_update", 6, "--seed", 2)
    with pytest.raises(InputError, match="--overwrite"):
        call(train.main, *argv, "--max_update", 2, "--no_resume")
    with pytest.raises(InputError, match="no such folder"):  # and nothing is removed before all else is in order
        call(train.main, *argv, "--no_resume", "--overwrite", "--data_path", tmp_path / "none")
    assert checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"] == 5
    call(train.main, *argv, "--max_update", 2, "--no_resume", "--overwrite")
    assert [row["num_updates"] for row in rows_of(tmp_path)] == [1, 2]


def torchrun_command(workers, *argv):
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        workers,
        HERE / "train.py",
    ]
    return [str(word) for word in (*words, *argv)]


def torchrun(workers, *argv):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(torchrun_command(workers, *argv), capture_output=True, text=True, env=env, timeout=200)


def test_two_workers_equal_one_with_update_freq_2(tmp_path, corpus_dir):
    argv = [*FEW, "--data_path", corpus_dir, "--max_update", 14, "--max_epoch", 1, "--validate_interval_updates", 5]
    call(train.main, *argv, "--save_dir", tmp_path / "one", "--update_freq", 2)
    result = torchrun(2, *argv, "--save_dir", tmp_path / "two", "--distributed_training.distributed_world_size", 2)
    assert result.returncode == 0, result.stderr
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert len(one) == len(two) > 5
    for a, b in zip(one, two):
        assert all(a[k] == b[k] for k in ("sample_size", "nsentences", "ntokens", "lr", "ema_decay"))
        assert all(a[k] == pytest.approx(b[k], rel=1e-5) for k in ("loss", "gnorm"))
    for a, b in zip(rows_of(tmp_path / "one", "valid_loss"), rows_of(tmp_path / "two", "valid_loss"), strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-4) for k in a)
    compare_checkpoints(tmp_path / "one" / "checkpoint_last.pt", tmp_path / "two" / "checkpoint_last.pt", exactly=False)


def test_train_warns_of_text_that_is_never_seen(tmp_path, corpus_dir):
    printed = call(
        train.main, *FEW, "--data_path", corpus_dir, "--max_update", 1, "--save_dir", tmp_path / "a", "--fairseq_exact"
    )
    assert re.search(r"^warning: \d+\.\d\d% of the training tokens are never seen", printed, re.M)
    printed = call(train.main, *FEW, "--data_path", corpus_dir, "--max_update", 1, "--save_dir", tmp_path / "b")
    assert re.search(r"^0\.00% of the training tokens are never seen", printed, re.M)


def test_the_small_model_learns_more_than_to_predict_the_mean(tmp_path):
    call(data.main, "--make_demo", tmp_path / "demo")
    call(
        train.main,
        "--config_name",
        "tiny",
        "--data_path",
        tmp_path / "demo",
        "--save_dir",
        tmp_path / "run",
        "--max_update",
        100,
        "--tokens_per_sample",
        64,
        "--max_tokens",
        1024,
        "--embed_dim",
        64,
        "--ffn_embed_dim",
        256,
        "--device",
        "cpu",
    )
    result = json.loads(
        call(evaluation.main, "--ckpt", tmp_path / "run" / "checkpoint_best.pt", "--untrained", "--json")
    )
    before = result["untrained"]
    assert result["loss"] < 0.8 * before["loss"]
    assert result["cosine"] > result["cosine_constant"] + 0.1 and result["cosine"] > before["cosine"] + 0.3
    assert result["pred_var"] > 0.05 and result["target_var"] > 0.05


# ---------------------------------------------------------------------------------------------- bench, run_1p.sh


@pytest.mark.parametrize("teacher_input", ["full", "masked"])
def test_the_plain_step_that_the_bench_compares_with_does_the_same(corpus_dir, teacher_input):
    run, dataset = make_run(corpus_dir, teacher_input=teacher_input, warmup_updates=1, lr=1e-2, ema_decay=0.9)
    plain = bench.Plain(run, len(dataset.dictionary))
    for ids in dataset.epoch_batches(1)[:4]:
        batch = dataset.batch(ids, 1)
        assert float(plain.update([batch])) == pytest.approx(float(train.update(run, [batch]).loss), rel=1e-4)
    for ours, theirs in ((run.student, plain.student), (run.teacher, plain.teacher)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_bench_prints_a_table_and_one_json_line_and_counts_flops_as_torch_does(corpus_dir, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    small = [*FEW, "--updates", "2", "--warmup", "1"]
    for argv in (["--vocabulary", "100"], ["--data_path", corpus_dir]):
        result = json.loads(call(bench.main, *small, *argv).splitlines()[-1])
        assert all(
            result[k] > 0 for k in ("fps", "wps", "ups", "model_tflops", "matmul_peak_tflops", "peak_memory_bytes")
        )
        assert set(result["ms_parts"]) == {"data", "teacher", "student", "backward", "optimizer", "ema"}
    run, dataset = make_run(corpus_dir)
    index = int(dataset.lengths.argmax())
    batch = dataset.batch(np.array([index]), 1)
    # attention and linear layers as plain matmuls, since torch does not count its fused kernels on the CPU
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train.update(run, [batch])
    assert bench.update_flops([batch], run) == counter.get_total_flops()


def test_run_1p_refuses_what_it_cannot_do():
    for argv, message in (
        ([["fly"]], "no mode 'fly'"),
        ([["full"]], "--data_path=DIR is missing"),
        ([["eval", "--data_path"]], "needs a value"),
    ):
        result = subprocess.run(["bash", HERE / "run_1p.sh", *argv[0]], capture_output=True, text=True)
        assert result.returncode == 2 and message in result.stderr


def copy_of_the_project(folder) -> dict:
    """Copy what run_1p.sh needs; the environment in which it takes this Python."""
    for path in [*HERE.glob("*.py"), HERE / "run_1p.sh", HERE / "requirements.txt"]:
        shutil.copy(path, folder)
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_run_1p_passes_the_exit_code_and_writes_the_modelzoo_s_files(tmp_path, corpus_dir):
    env = {**copy_of_the_project(tmp_path), "ASCEND_DEVICE_ID": "3"}
    if shutil.which("python3", path=env["PATH"]) is None:
        pytest.skip("no python3 beside this Python")
    run = lambda *argv: subprocess.run(
        ["bash", tmp_path / "run_1p.sh", *map(str, argv)], capture_output=True, text=True, env=env, cwd=HERE
    )  # noqa: E731
    few = [*FEW, "--max_update", "4"]
    relative = os.path.relpath(tmp_path / "none", HERE)  # of the caller's folder, not of the script's
    failed = run("full", "--data_path", relative, *few)
    assert failed.returncode == 2 and re.search(rf"{tmp_path.name}/none: no such folder", failed.stdout)
    done = run("full", f"--data_path={corpus_dir}", *few)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        r"Final Performance images/sec : [\d.]+",
        r"Final Valid Best Loss: [\d.]+",
        r"E2E Training Duration sec : \d+",
        r"UPS \(updates/s\) : [\d.]+",
        r"FPS \(blocks/s\) : [\d.]+",
        r"\| 1p-cpu \| - \| [\d.]+ \| 1 \| off \| 2\.",
    ):
        assert re.search(f"^{line}", done.stdout, re.M), (line, done.stdout)
    output = tmp_path / "output" / "3"
    assert len((output / "train_data2vec_for_PyTorch_1p_loss.txt").read_text().split()) == 4
    log = (output / "data2vec_for_PyTorch_1p.log").read_text()
    assert re.findall(r"^(\w+) = ", log, re.M) == [
        "Network",
        "RankSize",
        "DeviceType",
        "CaseName",
        "ActualUPS",
        "ActualFPS",
        "E2ETrainingTime",
    ]
    assert "update 4" in (output / "train_3.log").read_text()
    checked = run("eval", "--data_path", corpus_dir, "--checkpoint_path", output / "full" / "checkpoint_best.pt")
    assert checked.returncode == 0 and "cosine" in checked.stdout


def test_imports_point_one_way():
    order = "config data model ema flat device checkpoint train probe features eval bench convert".split()
    for i, name in enumerate(order):
        tree = ast.parse((HERE / f"{name}.py").read_text())
        used = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        used |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not used & set(order[i:]), (name, used & set(order[i:]))
