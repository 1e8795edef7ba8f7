"""How fast: the training step of train.py, its parts, and how near it comes to the device's own matmul speed.

    python bench.py [--config_name base] [--data_path DIR] [--device ...] [--amp ...] [--updates 20]

Without --data_path the blocks are synthetic and full. Prints a table, then one JSON line. Throughput is the median over
the updates behind the warm-up, each from one synchronization to the next, data included; the split into parts is
measured in further updates, since synchronizing behind every part costs time.

Model FLOPs, per block of n tokens, C wide, F the feed-forward's inner width, L layers:
    encoder(n) = L * (n * (8 C^2 + 4 C F) + 4 n^2 C)            projections, feed-forward, attention; 2 per multiply-add
    update     = 3 * (encoder(student's n) + head) + encoder(teacher's n)     forward and backward; the teacher forward
over real tokens only: padding is work, but not useful work. head = 2 * (its weights) per masked token.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

# first: device has a word with torch before torch is imported
from device import Device, open_device  # isort: split

import numpy as np
import torch

import config
from config import InputError
from data import EOS, PAD, Batch, Corpus, write_dataset
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


def main(argv: list | None = None) -> int:
    def extra(parser):
        parser.add_argument("--updates", type=int, default=20, help="updates to measure [20]")
        parser.add_argument("--warmup", type=int, default=3, help="updates before that [3]")
        parser.add_argument("--vocabulary", type=int, default=50264, help="words of the synthetic corpus [50264]")

    parts, args = config.parse(PARTS, __doc__, argv, extra=extra)
    if args.updates < 1 or args.warmup < 0 or args.vocabulary < 8:
        raise InputError("--updates must be at least 1, --warmup at least 0, --vocabulary at least 8")
    data, rest = parts[0], parts[1:]
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
