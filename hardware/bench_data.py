"""How fast is the data: the loader, and the time from process start to the first batch.

Run as `python bench.py --loader | --startup`.
"""

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

import config
from config import DataConfig, InputError
from data import Batch, BlockDataset, Corpus, mask_block
from run.progress import Bar
from text.binarized import BOS, HEADER, MAGIC, PAD, pieces

import numpy as np

# ---------------------------------------------------------------------------------------------- loader


def plain_batch(dataset: BlockDataset, ids: np.ndarray, epoch: int) -> Batch:
    """dataset.batch as a loop over the blocks: the fast one is measured and tested against it."""
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
        np.flatnonzero(hidden),
        ids,
        ntokens=sum(lengths),
        source_padded=bool((source == PAD).any()),
        target_padded=bool((target == PAD).any()),
    )


def loader(data: DataConfig, seconds: float = 0.5, rounds: int = 7) -> list[dict]:
    """Tokens per second at two block lengths, by default and under --fairseq_exact, in turns with the plain loop."""
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

            fast, slow = [], []
            for _ in Bar(range(rounds), what=f"{preset}, {mode}"):
                fast.append(rate(dataset.batches))
                slow.append(rate(plain))
            rows.append(
                dict(
                    preset=preset,
                    mode=mode,
                    tokens_per_sample=cfg.tokens_per_sample,
                    max_tokens=cfg.max_tokens,
                    teacher_input=cfg.teacher_input,
                    tokens_per_s=statistics.median(fast),
                    slowest=min(fast),
                    fastest=max(fast),
                    plain_tokens_per_s=statistics.median(slow),
                    ratio=statistics.median(a / b for a, b in zip(fast, slow)),
                )
            )
    return rows


def loader_report(data: DataConfig) -> dict:
    """Measure the loader and print its table."""
    rows = loader(data)
    print_loader(rows)
    return dict(loader=rows, data=data.data_path)


def print_loader(rows: list[dict]):
    print(f"{'million tokens/s':32}{'median':>8}{'from':>8}{'to':>8}{'plain loop':>12}{'ratio':>8}")
    for r in rows:
        print(
            f"{r['tokens_per_sample']:>3} tokens, {r['mode']:20}"
            + "".join(f"{r[k] / 1e6:8.1f}" for k in ("tokens_per_s", "slowest", "fastest"))
            + f"{r['plain_tokens_per_s'] / 1e6:12.2f}{r['ratio']:8.1f}"
        )


# ---------------------------------------------------------------------------------------------- start


def startup_corpus(folder: Path, sentences: int, vocabulary: int):
    """Write a train split of this many sentences: 1/3 empty lines, 1/6 headings, 1/2 paragraphs of about 130 tokens.

    Only the index is written. The file of tokens is sparse: it reads as zeros and takes no space on the disk.
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
    """Medians over `runs` processes of hardware/first_batch.py that read `folder` with these flags."""
    if not Path("/proc/self/status").exists():
        raise InputError("--startup works on Linux only: it reads /proc/self/status")
    program, results = Path(__file__).with_name("first_batch.py"), []
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # as hardware/device.py sets it
    for _ in Bar(range(runs), what="start"):
        argv = [sys.executable, program, str(time.monotonic()), *flags, f"--data_path={folder}"]
        done = subprocess.run(argv, env=env, capture_output=True, text=True)
        if done.returncode:
            raise InputError(
                f"--startup: {(done.stderr.splitlines() or ['the process was killed'])[-1]}"
            )
        results.append(json.loads(done.stdout))
    return {k: statistics.median(result[k] for result in results) for k in results[0]}


def startup(data: DataConfig, sentences: list[int], vocabulary: int, runs: int = 5) -> list[dict]:
    """Measure the start on the dataset of `data`, or else on a corpus of each size."""
    flags = [
        f"--{k}={v}"
        for k, v in vars(data).items()
        if k != "data_path" and v != getattr(DataConfig, k)
    ]
    flags.append("--device=cpu")
    if data.data_path:
        return [first_batch(data.data_path, flags, runs)]
    rows = []
    for count in sentences:
        with tempfile.TemporaryDirectory() as folder:
            startup_corpus(Path(folder), count, vocabulary)
            rows.append(first_batch(folder, flags, runs if count < 5e6 else 1))
    return rows


def startup_report(data: DataConfig, args) -> dict:
    """Measure the start as bench.py's flags say, and print its table."""
    if min(args.sentences, default=0) < 100:
        raise InputError("--sentences: numbers of at least 100, such as 1.8e6,1e7")
    rows = startup(data, [int(n) for n in args.sentences], args.vocabulary)
    print_startup(rows)
    return dict(startup=rows, tokens_per_sample=data.tokens_per_sample)


def print_startup(rows: list[dict]):
    print("from process start to the first batch; `beyond`: without `import torch`")
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
    for k, name in names.items():  # a column for each corpus
        unit, places = (1e6, 0) if "bytes" in k else (1, 2 if "_s" in k else 0)
        print(f"{name:12}" + "".join(f"{r[k] / unit:15,.{places}f}" for r in rows))
