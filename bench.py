"""How fast: the training step of train.py, its parts, and how near it comes to the device's own matmul speed.

    python bench.py [--config_name base] [--data_path DIR] [--device ...] [--amp ...] [--updates 20]

Without --data_path the blocks are synthetic and full. Prints a table, then one JSON line. Throughput is the median over
the updates behind the warm-up, each from one synchronization to the next, data included; the split into parts is
measured in further updates, since synchronizing behind every part costs time.

Model FLOPs, per block of n tokens, C wide, F the feed-forward's inner width, L layers:
    encoder(n) = L * (n * (8 C^2 + 4 C F) + 4 n^2 C)            projections, feed-forward, attention; 2 per multiply-add
    update     = 3 * (encoder(student's n) + head) + encoder(teacher's n)     forward and backward; the teacher forward
over real tokens only: padding is work, but not useful work. head = 2 * (its weights) per masked token.

    python bench.py --loader --data_path DIR                    the loader's tokens a second, beside a plain loop
    python bench.py --startup [--sentences 1.8e6,1e7]           process start to first batch: seconds and memory

--loader takes one process from block numbers to finished host batches, at the lengths of the npu_1p and the base
preset, by default and as fairseq does, in turn with the plain loop and over as many epochs as it takes. --startup makes
a corpus like WikiText-103 in a temporary folder, unless --data_path names one, and starts a process that does what
train.py does before its first update, building the model aside. Other flags of the data hold for both.
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

# first: device has a word with torch before torch is imported
from device import Device, open_device  # isort: split

import numpy as np
import torch

import config
from config import InputError
from data import (
    BOS,
    EOS,
    HEADER,
    MAGIC,
    PAD,
    Batch,
    BlockDataset,
    Corpus,
    DataConfig,
    mask_block,
    pieces,
    write_dataset,
)
from model import ModelConfig
from train import PARTS, Config, Run, epoch_updates, update


def encoder_flops(lengths: np.ndarray, cfg: ModelConfig) -> float:
    """Forward FLOPs of one encoder over blocks of these lengths."""
    n, n2, C = float(lengths.sum()), float(np.square(lengths, dtype=np.float64).sum()), cfg.embed_dim
    return cfg.layers * (n * (8 * C**2 + 4 * C * cfg.ffn_embed_dim) + 4 * n2 * C)


def update_flops(batches: list[Batch], run: Run) -> float:
    """Model FLOPs of one update, by the formula above."""
    head = 2 * sum(p.numel() for p in run.student.regression_head.parameters() if p.ndim == 2)
    total = 0.0
    for batch in batches:
        student, teacher = ((tokens != PAD).sum(1) for tokens in (batch.source, batch.target))
        total += 3 * (encoder_flops(student, run.cfg.model) + head * batch.sample_size)
        total += encoder_flops(teacher, run.cfg.model)
    return total


def matmul_peak(device: Device, seconds: float = 1.0) -> float:
    """The best FLOP/s that plain square matmuls reach here, in the type that training uses."""
    dtype, best = device.amp or torch.float32, 0.0
    for n in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device.torch_device, dtype=dtype) for _ in range(2))
        a @ b
        device.synchronize()
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            for _ in range(1 if device.type == "cpu" else 20):
                a @ b
                count += 1
            device.synchronize()
            best = max(best, 2 * n**3 * (1 if device.type == "cpu" else 20) / (time.perf_counter() - start))
    return best


def synthetic_corpus(folder: Path, tokens_per_sample: int, blocks: int, vocabulary: int):
    """Random tokens in full blocks, in the format that training reads."""
    rng = np.random.default_rng(0)
    sentences = rng.integers(4, vocabulary, (blocks, tokens_per_sample - 1))
    sentences[:, -1] = EOS
    write_dataset(folder / "train", sentences, vocabulary)
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(vocabulary - 4)))


def measure(run: Run, dataset, warmup: int, updates: int) -> dict:
    """Medians over `updates` updates, and of their parts over as many more."""
    device = run.device

    def endless():
        while True:
            for batches, _, _ in epoch_updates(run, dataset):
                yield batches
            run.epoch += 1

    source, rows, parts = endless(), [], []
    for i in range(warmup + 2 * updates):
        timed = i >= warmup + updates
        device.synchronize()
        begin = last = time.perf_counter()
        spent = {}

        def mark(part):
            nonlocal last
            device.synchronize()
            spent[part] = spent.get(part, 0.0) - last
            last = time.perf_counter()
            spent[part] += last

        batches = next(source)
        if timed:
            mark("data")
        update(run, batches, mark if timed else lambda part: None)
        device.synchronize()
        seconds = time.perf_counter() - begin
        if i < warmup:
            continue
        if timed:
            parts.append(spent)
        else:
            blocks, tokens = sum(b.nsentences for b in batches), sum(b.ntokens for b in batches)
            rows.append((seconds, blocks, tokens, update_flops(batches, run)))
    middle = statistics.median
    return dict(
        fps=middle(blocks / s for s, blocks, _, _ in rows) * device.world_size,
        wps=middle(tokens / s for s, _, tokens, _ in rows) * device.world_size,
        ups=middle(1 / s for s, *_ in rows),
        ms=1e3 * middle(s for s, *_ in rows),
        ms_fastest=1e3 * min(s for s, *_ in rows),
        ms_slowest=1e3 * max(s for s, *_ in rows),
        ms_parts={part: 1e3 * middle(row.get(part, 0.0) for row in parts) for part in parts[0]},
        model_tflops=middle(flops / s for s, *_, flops in rows) / 1e12,
        blocks=middle(row[1] for row in rows),
        tokens=middle(row[2] for row in rows),
    )


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


def main(argv: list | None = None) -> int:
    def extra(parser):
        parser.add_argument("--loader", action="store_true", help="measure the loader alone")
        parser.add_argument("--startup", action="store_true", help="measure the start, up to the first batch")
        parser.add_argument(
            "--sentences", type=config.numbers, default=(1.8e6,), help="sizes of the corpus of --startup [1.8e6]"
        )
        parser.add_argument("--updates", type=int, default=20, help="updates to measure [20]")
        parser.add_argument("--warmup", type=int, default=3, help="updates before that [3]")
        parser.add_argument("--vocabulary", type=int, default=50264, help="words of the synthetic corpus [50264]")

    parts, args = config.parse(PARTS, __doc__, argv, extra=extra)
    if args.updates < 1 or args.warmup < 0 or args.vocabulary < 8:
        raise InputError("--updates must be at least 1, --warmup at least 0, --vocabulary at least 8")
    data, rest = parts[0], parts[1:]
    if args.loader:
        rows = loader(data)
        print_loader(rows)
        print(json.dumps(dict(loader=rows, data=data.data_path)))
        return 0
    if args.startup:
        if min(args.sentences, default=0) < 100:
            raise InputError("--sentences: numbers of at least 100, such as 1.8e6,1e7")
        rows = startup(data, [int(n) for n in args.sentences], args.vocabulary)
        print_startup(rows)
        print(json.dumps(dict(startup=rows, tokens_per_sample=data.tokens_per_sample)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if not data.data_path:
            data = dataclasses.replace(data, data_path=folder, sample_break_mode="none")
            blocks = max(1, data.max_tokens // data.tokens_per_sample) * rest[-1].update_freq * 8
            synthetic_corpus(Path(folder), data.tokens_per_sample, blocks, args.vocabulary)
        cfg = Config(data, *rest)
        device = open_device(cfg.device)
        try:
            corpus = Corpus(cfg.data)
            dataset = corpus.split("train")
            run = Run(cfg, device, len(corpus.dictionary))
            result = measure(run, dataset, args.warmup, args.updates)
            peak_memory = device.peak_memory()  # before the matmuls below take theirs
            peak = matmul_peak(device) / 1e12
        finally:
            device.close()
    result.update(
        matmul_peak_tflops=peak,
        peak_share=result["model_tflops"] / peak,
        peak_memory_bytes=peak_memory,
        device=device.name,
        device_type=device.type,
        amp=device.amp_name,
        world_size=device.world_size,
        torch=torch.__version__,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        teacher_input=cfg.data.teacher_input,
        fairseq_exact=cfg.train.fairseq_exact,
        tokens_per_sample=cfg.data.tokens_per_sample,
        max_tokens=cfg.data.max_tokens,
        parameters=sum(p.numel() for p in run.parameters),
        updates=args.updates,
        warmup=args.warmup,
        data="synthetic" if data.data_path == folder else data.data_path,
    )
    if device.rank == 0:
        print_table(result)
        print(json.dumps(result))
    return 0


def print_table(r: dict):
    for name, text in (
        ("device", f"{r['world_size']} x {r['device_type']} ({r['device']}), amp {r['amp']}, torch {r['torch']}"),
        ("update", f"{r['blocks']:g} blocks, {r['tokens']:g} tokens; {r['parameters']:,} parameters"),
        ("FPS", f"{r['fps']:.2f} blocks/s"),
        ("tokens/s", f"{r['wps']:.0f}"),
        ("updates/s", f"{r['ups']:.3f}"),
        ("ms an update", f"{r['ms']:.1f} (median of {r['updates']}; {r['ms_fastest']:.1f} to {r['ms_slowest']:.1f})"),
        *((f"  {part}", f"{ms:.1f}") for part, ms in r["ms_parts"].items()),
        ("model TFLOP/s", f"{r['model_tflops']:.3f}"),
        ("matmul TFLOP/s", f"{r['matmul_peak_tflops']:.3f}, of which the model reaches {100 * r['peak_share']:.0f}%"),
        ("peak memory", f"{r['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ):
        print(f"{name:16} {text}")


if __name__ == "__main__":
    config.program(main)
