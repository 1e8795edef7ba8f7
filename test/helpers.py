"""What several test files share: small datasets and runs, the recorded numbers, programs as
functions."""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import config
import convert
import preprocess
import train
from config import DataConfig, ModelConfig
from data import Corpus
from hardware.device import Device
from model import Data2VecText
from run import checkpoint, flags
from text.binarized import DTYPES, EOS, MAGIC, PAD, TokenStream, write_dataset

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent.parent  # the project
GOLDEN = HERE.parent / "shared" / "golden"
RAW, GPT2 = GOLDEN / "corpora" / "raw", GOLDEN / "corpora" / "gpt2_bpe"
golden = pytest.mark.skipif(
    not GOLDEN.is_dir(),
    reason="needs recordings of fairseq that are too large to be part of the project, and not"
    " public; test/golden has others",
)

CPU = Device(torch.device("cpu"), "test", None)

SMALL = dict(layers=2, embed_dim=16, ffn_embed_dim=32, attention_heads=2, average_top_k_layers=2)
SMALL |= dict(dropout=0.0, attention_dropout=0.0, max_source_positions=64)
# data2vec 2.0
COPIES = dict(objective="data2vec2", mask_multiple_length=1, clone_batch=3, decoder_dim=12)
COPIES |= dict(decoder_kernel=3, decoder_groups=2)


def flags_of(settings: dict) -> list[str]:
    """Settings as a command line."""
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


FEW = (
    "--config_name tiny --device cpu --amp off --log_interval 1 --tokens_per_sample 32"
    " --max_tokens 256 --warmup_updates 2 --validate_interval_updates 0"
).split() + flags_of(SMALL)


def config_of(*argv) -> config.Config:
    """The settings of a run with these arguments."""
    return config.Config(*flags.parse(config.PARTS, "", [str(word) for word in argv])[0])


def few(corpus_dir, folder, *argv) -> list[str]:
    """train.py's arguments for a short run into `folder`."""
    return [str(a) for a in (*FEW, "--data_path", corpus_dir, "--save_dir", folder, *argv)]


def call(main, *argv) -> str:
    """A program's standard output; its errors are raised."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([str(a) for a in argv]) == 0
    return out.getvalue()


def rows_of(folder, key="loss") -> list:
    """The rows of train.jsonl that have this key."""
    rows = map(json.loads, (Path(folder) / "train.jsonl").read_text().splitlines())
    return [row for row in rows if key in row]


def progress_of(folder, name: str = "checkpoint_last.pt") -> dict:
    """How far a checkpoint is."""
    return checkpoint.load(Path(folder) / name).content["progress"]


def same_figures(ours: list, theirs: list):
    """Compare the rows of updates with those that fairseq logged, of float32."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a["sample_size"], a["nsentences"]) == (b["sample_size"], b["nsentences"])
        assert [a["lr"], a["ema_decay"]] == pytest.approx([b["lr"], b["ema_decay"]], abs=1e-12)
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-6)
        assert a["gnorm"] == pytest.approx(b["gnorm"], rel=5e-5)


def speed_aside(rows: list) -> list:
    """Log rows without the figures that differ from run to run."""
    speed = ("fps", "ups", "wps", "wall")
    return [{name: value for name, value in row.items() if name not in speed} for row in rows]


def make_dataset(folder, sentences=None, words=60, seed=0):
    """A small dataset of random sentences in documents; the ids 4 .. words - 1."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    if sentences is None:
        sentences = []
        for _ in range(30):
            for _ in range(rng.integers(1, 8)):
                sentences.append([*rng.integers(4, words, rng.integers(1, 40)).tolist(), EOS])
            sentences.append([EOS])
    for split in ("train", "valid"):
        write_dataset(folder / split, sentences, words)
    (folder / "dict.txt").write_text("".join(f"w{i} {100 - i}\n" for i in range(words - 4)))
    return folder, sentences


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("corpus"))[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, corpus_dir):
    """The folder of a finished run of four updates with its interval checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    argv = "--max_update 4 --save_interval_updates 1 --keep_interval_updates 3"
    call(train.main, *few(corpus_dir, folder, *argv.split()))
    return folder


@pytest.fixture
def tokenizers():
    return pytest.importorskip("tokenizers", reason="BPE needs the tokenizers package")


def dataset_of(folder, split="train", **options):
    """A split in short blocks and small batches."""
    sizes = dict(tokens_per_sample=32, max_tokens=256)
    return Corpus(DataConfig(**{"data_path": str(folder), **sizes, **options})).split(split)


@pytest.fixture
def block_dataset(corpus_dir):
    return functools.partial(dataset_of, corpus_dir)


def write_index(prefix, sentences, code):
    """An .idx and .bin of any integer type."""
    blobs = [np.asarray(sentence, DTYPES[code]).tobytes() for sentence in sentences]
    Path(f"{prefix}.bin").write_bytes(b"".join(blobs))
    offsets = np.cumsum([0, *map(len, blobs)], dtype="<i8")[:-1]
    lengths = np.array([*map(len, sentences)], "<i4")
    head = MAGIC + struct.pack("<QBQ", 1, code, len(blobs))
    Path(f"{prefix}.idx").write_bytes(head + lengths.tobytes() + offsets.tobytes())


def random_encoder(seed=0, vocabulary=40, **options):
    """An encoder whose every parameter is random, biases and norms too, so that none can be
    forgotten unseen."""
    cfg = ModelConfig(**{**SMALL, **options})
    torch.manual_seed(seed)
    model = Data2VecText(cfg, vocabulary).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name and p.ndim == 1 else 0.0, 0.3)
    with torch.no_grad():
        model.encoder.embed_tokens.weight[PAD] = 0
        model.encoder.embed_positions.weight[PAD] = 0
    return model, cfg


def hidden_states(encoder, tokens) -> list:
    """The input of each layer and the output of the last, as transformers lists them."""
    x, attend = encoder.embed(tokens, True)
    states = [x]
    for layer in encoder.layers:
        x, _ = layer(x, attend)
        states.append(x)
    if encoder.layer_norm is not None:
        states[-1] = encoder.layer_norm(x)
    return states


def make_run(corpus_dir, device=CPU, **options):
    """A train.Run and its training split."""
    plain = dict(SMALL, tokens_per_sample=32, max_tokens=256, lr=1e-3, warmup_updates=0)
    cfg = config_of(*flags_of({**plain, "data_path": corpus_dir, **options}))
    corpus = Corpus(cfg.data)
    return train.Run(cfg, device, len(corpus.dictionary)), corpus.split("train")


def small_content(updates=0, **entries) -> dict:
    """A small checkpoint that is complete."""
    state = {"weight": torch.arange(100.0)}
    content = {**convert.beginning(1), "config": {"lr": 0.1}, "student": state, "teacher": state}
    content |= entries
    return {**content, "progress": {**content["progress"], "num_updates": updates}}


def tensors_of(path) -> list:
    """Student, teacher and the optimizer's moments of a checkpoint."""
    content = checkpoint.load(path).content
    moments = [t for state in content["optimizer"]["state"].values() for t in state.values()]
    return [*content["student"].values(), *content["teacher"].values(), *moments]


def compare_checkpoints(a, b, exactly=True):
    both = tensors_of(a), tensors_of(b)
    assert len(both[0]) > 50
    for x, y in zip(*both, strict=True):
        assert torch.equal(x, y) if exactly else torch.allclose(x, y, atol=2e-6)
    measured = {"world_size", "batches", "best_loss", "first_target_var", "hours"}
    a, b = (checkpoint.load(path).content["progress"] for path in (a, b))
    assert {k: a[k] for k in a.keys() - measured} == {k: b[k] for k in b.keys() - measured}


def program(name, *argv, **environment):
    """A program of the project in a process of its own, finished, with its output as text."""
    env = {**os.environ, **{k: str(v) for k, v in environment.items()}}
    command = [sys.executable, HERE / name, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def torchrun_command(workers, *argv):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*launcher, "--nproc_per_node", workers, HERE / "train.py", *argv]
    return [str(word) for word in words]


def torchrun(workers, *argv):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = torchrun_command(workers, *argv)
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)


def start_training(*argv):
    """train.py in a process of its own."""
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, HERE / "train.py", *argv], **streams)


def wait_for(process, text: str):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended before {text!r}")


def terminate_after(process, text: str, number=signal.SIGTERM):
    try:
        wait_for(process, text)
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()


class Payload:
    """An object whose unpickling makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def run_preprocess(dest, *argv, **texts) -> str:
    """preprocess.py's output; texts: {split: files}."""
    named = [part for split, names in texts.items() for part in (f"--{split}", *names)]
    return call(preprocess.main, "--dest", dest, *named, *argv)


def preprocess_words(dest, *argv, **texts) -> str:
    return run_preprocess(dest, "--bpe", "none", "--workers", 1, *argv, **texts)


def dataset_files(folder) -> dict:
    """{name: bytes} of a dataset, without the log, whose times differ."""
    paths = [p for p in Path(folder).iterdir() if p.name not in ("preprocess.log", ".lock")]
    return {path.name: path.read_bytes() for path in paths}


def sentences_of(folder, split) -> list:
    """The sentences of a split as lists of token ids."""
    stream = TokenStream(folder, split)
    starts = stream.starts.tolist()
    return [stream.read(begin, end).tolist() for begin, end in zip(starts, starts[1:])]


def small_corpus(folder, splits=("train", "valid", "test")) -> dict:
    """Text files of 200 lines of words for each split, some of them empty: {split: [file]}."""
    rng, texts = random.Random(0), {}
    for split in splits:
        counts = rng.choices([0, 3, 9], k=200)
        lines = [" ".join(f"w{rng.randrange(40)}" for _ in range(count)) for count in counts]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
        texts[split] = [folder / f"{split}.txt"]
    return texts


def copy_of_the_project(folder) -> dict:
    """Copy what run_1p.sh needs; returns an environment in which it uses this Python."""
    patterns = ("*.py", "*/*.py", "run_1p.sh", "requirements.txt", "*/requirements.txt")
    for path in [path for pattern in patterns for path in HERE.glob(pattern)]:
        copy = Path(folder) / path.relative_to(HERE)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
