"""How fast is what goes in: the loader, and the start up to the first batch. `python bench.py --loader | --startup`."""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import config
from config import InputError
from data import Batch, BlockDataset, Corpus, DataConfig, mask_block
from dataset.binarized import BOS, HEADER, MAGIC, PAD, pieces

# ---------------------------------------------------------------------------------------------- loader


def plain_batch(dataset: BlockDataset, ids: np.ndarray, epoch: int) -> Batch:
    """dataset.batch written as a loop over the blocks: what the fast one is measured and tested against."""
    cfg, dictionary, lengths = dataset.cfg, dataset.dictionary, dataset.lengths[ids].tolist()
    mask_epoch = epoch if dataset.training and not cfg.fixed_masks else 1
    tokens = np.full((len(ids), max(lengths)), PAD)
    source, hidden = tokens.copy(), np.zeros(tokens.shape, bool)
    for row, (index, n) in enumerate(zip(ids.tolist(), lengths)):
        text = dataset.stream.read(int(dataset.starts[index]), int(dataset.starts[index]) + n - 1)
        dataset.stream.check_tokens(text, dataset.starts[index] + np.arange(n - 1), dictionary)
        tokens[row, 0], tokens[row, 1:n] = BOS, text
        hidden[row, :n], shown, random = mask_block(n, dictionary, cfg, mask_epoch, index)
        source[row, :n] = np.where(shown, dictionary.mask_id, tokens[row, :n])
        if random is not None:
            source[row, :n][random[0]] = random[1]
    target, place = tokens, np.arange(tokens.size).reshape(tokens.shape)
    if cfg.teacher_input == "masked":
        width = max(1, int(hidden.sum(1).max()))
        target = np.full((len(ids), width), PAD)
        for row in range(len(ids)):
            squeezed = tokens[row][hidden[row]]
            target[row, : len(squeezed)] = squeezed
            place[row][hidden[row]] = row * width + np.arange(len(squeezed))
    masked = source == dictionary.mask_id
    return Batch(
        source,
        target,
        np.flatnonzero(masked),
        place[masked],
        ids,
        ntokens=sum(lengths),
        source_padded=bool((source == PAD).any()),
        target_padded=bool((target == PAD).any()),
    )


def loader(data: DataConfig, seconds: float = 0.5, rounds: int = 7) -> list[dict]:
    """Tokens a second at two lengths, by default and as fairseq does, in turn with the plain loop."""
    exact = {k: v for k, v in config.FAIRSEQ_EXACT.items() if hasattr(data, k)}
    default = {k: getattr(DataConfig, k) for k in exact}
    base = {k: getattr(DataConfig, k) for k in config.PRESETS["npu_1p"]}
    rows = []
    for preset, lengths in (("npu_1p", config.PRESETS["npu_1p"]), ("base", base)):
        for mode, settings in (("default", default), ("fairseq_exact", exact)):
            cfg = dataclasses.replace(data, **lengths, **settings)
            dataset = Corpus(cfg).split("train")

            def plain(lists, epoch):
                return (plain_batch(dataset, ids, epoch) for ids in lists)

            def rate(make):
                begin, tokens = time.perf_counter(), 0
                for epoch in itertools.count(1):
                    for batch in make(dataset.epoch_batches(epoch), epoch):
                        tokens += batch.ntokens
                        spent = time.perf_counter() - begin
                        if spent > seconds:
                            return tokens / spent

            pairs = [(rate(dataset.batches), rate(plain)) for _ in range(rounds)]
            rows.append(
                dict(
                    preset=preset,
                    mode=mode,
                    tokens_per_sample=cfg.tokens_per_sample,
                    max_tokens=cfg.max_tokens,
                    teacher_input=cfg.teacher_input,
                    tokens_per_s=statistics.median(fast for fast, _ in pairs),
                    slowest=min(fast for fast, _ in pairs),
                    fastest=max(fast for fast, _ in pairs),
                    plain_tokens_per_s=statistics.median(plain for _, plain in pairs),
                    ratio=statistics.median(fast / plain for fast, plain in pairs),
                )
            )
    return rows


def print_loader(rows: list[dict]):
    print(f"{'million tokens/s':32}{'median':>8}{'from':>8}{'to':>8}{'plain loop':>12}{'ratio':>8}")
    for r in rows:
        print(
            f"{r['tokens_per_sample']:>3} tokens, {r['mode']:20}"
            + "".join(f"{r[k] / 1e6:8.1f}" for k in ("tokens_per_s", "slowest", "fastest"))
            + f"{r['plain_tokens_per_s'] / 1e6:12.2f}{r['ratio']:8.1f}"
        )


# ---------------------------------------------------------------------------------------------- start

# What a fresh process runs: argv is the project's folder, the time of its start, and train.py's flags.
FIRST_BATCH = """
import json, re, sys, time
sys.path[0] = sys.argv[1]

def look():
    with open("/proc/self/status") as f:
        status = dict(re.findall(r"(VmRSS|VmHWM):\\s+(\\d+) kB", f.read()))
    resident, peak = (int(status[key]) * 1024 for key in ("VmRSS", "VmHWM"))
    return time.monotonic() - float(sys.argv[2]), resident, peak, time.process_time()

began = look()
import torch
bare = look()
import config, train
from device import open_device
cfg = train.Config(*config.parse(train.PARTS, "", sys.argv[3:])[0])
imported = look()
run = type("Run", (), dict(cfg=cfg, device=open_device(cfg.device), epoch=1, batches_done=0))
corpus = train.Corpus(cfg.data)
dataset = corpus.split("train")
dataset.stream.digest()
updates = train.epoch_updates(run, dataset)
next(updates)
ready = look()
updates.close()
print(json.dumps(dict(
    torch_s=bare[0] - began[0],
    modules_s=imported[0] - bare[0],
    data_s=ready[0] - imported[0],
    data_cpu_s=ready[3] - imported[3],
    total_s=ready[0],
    beyond_torch_s=ready[0] - (bare[0] - began[0]),
    torch_bytes=bare[2],
    beyond_torch_bytes=ready[1] - bare[1],
    peak_beyond_torch_bytes=ready[2] - bare[2],
    sentences=len(dataset.stream.sizes),
    blocks=len(dataset.lengths),
    batches=len(dataset.batch_ends),
    tokens=dataset.stream.tokens,
)))
"""


def startup_corpus(folder: Path, sentences: int, vocabulary: int):
    """A train split with as many sentences: a third empty lines, a sixth headings, the rest paragraphs of 130 tokens.

    Only the index is written; the tokens are a hole in the file, which reads as zeros and takes no room on the disk.
    """
    rng, tokens = np.random.default_rng(0), 0
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(vocabulary - 4)))
    with open(folder / "train.idx", "wb") as idx:
        idx.write(MAGIC + (1).to_bytes(8, "little") + bytes([8]) + sentences.to_bytes(8, "little"))
        for part in pieces(sentences):
            n = min(part.stop, sentences) - part.start
            kind = np.arange(n) % 6
            long = np.minimum(rng.geometric(1 / 130, n) + 1, 1000)
            sizes = np.where(kind % 3 == 0, 1, np.where(kind == 1, 6, long)).astype("<i4")
            offsets = 2 * (tokens + np.cumsum(sizes) - sizes)
            tokens += int(sizes.sum())
            idx.seek(HEADER + 4 * part.start)
            idx.write(sizes.tobytes())
            idx.seek(HEADER + 4 * sentences + 8 * part.start)
            idx.write(offsets.astype("<i8").tobytes())
    with open(folder / "train.bin", "wb") as bin_:
        bin_.truncate(2 * tokens)


def first_batch(folder, flags: list, runs: int) -> dict:
    """Medians over `runs` processes that read `folder`, under train.py's flags."""
    if not Path("/proc/self/status").exists():
        raise InputError("--startup reads its figures from /proc/self/status, which Linux alone has")
    here, results = str(Path(__file__).resolve().parent), []
    for _ in range(runs):
        argv = [sys.executable, "-c", FIRST_BATCH, here, str(time.monotonic()), *flags, f"--data_path={folder}"]
        env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # as device.py sets it
        done = subprocess.run(argv, env=env, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"--startup: {(done.stderr.splitlines() or ['the process was killed'])[-1]}")
        results.append(json.loads(done.stdout))
    return {k: statistics.median(result[k] for result in results) for k in results[0]}


def startup(data: DataConfig, sentences: list[int], vocabulary: int, runs: int = 5) -> list[dict]:
    """The start on the dataset of `data`, or on a corpus of each size."""
    flags = [f"--{k}={v}" for k, v in vars(data).items() if k != "data_path" and v != getattr(DataConfig, k)]
    flags.append("--device=cpu")
    if data.data_path:
        return [first_batch(data.data_path, flags, runs)]
    rows = []
    for count in sentences:
        with tempfile.TemporaryDirectory() as folder:
            startup_corpus(Path(folder), count, vocabulary)
            rows.append(first_batch(folder, flags, runs if count < 5e6 else 1))
    return rows


def print_startup(rows: list[dict]):
    print("from process start to the first batch; beyond `import torch`: all but that import")
    names = dict(
        sentences="sentences",
        tokens="tokens",
        blocks="blocks",
        total_s="s in all",
        beyond_torch_s="s beyond",
        data_cpu_s="CPU s, data",
        beyond_torch_bytes="MB beyond",
        peak_beyond_torch_bytes="MB at peak",
    )
    print("".join(f"{name:>15}" for name in names.values()))
    for r in rows:
        shown = {
            k: f"{r[k] / 1e6:,.0f}" if "bytes" in k else f"{r[k]:,.2f}" if "_s" in k else f"{r[k]:,.0f}" for k in names
        }
        print("".join(f"{text:>15}" for text in shown.values()))
