"""How fast is a training step, what do its parts cost, and what share of the device's matmul speed does it reach?

    python bench.py [--data_path DIR]          a step, its parts, and matmuls
    python bench.py --compare                  the same step written plainly
    python bench.py --peer transformers        the same step with that library
    python bench.py --check --device npu       the same updates here and on the CPU: are the numbers right?
    python bench.py --sweep                    block lengths and batch sizes
    python bench.py --checkpoint               how long training waits for one
    python bench.py --loader --data_path DIR   the data loader
    python bench.py --startup                  up to the first batch

Without --data_path, the blocks are full and random. The output is a table, then one line of JSON. Throughput is the
median over the updates after the warm-up, each timed between two synchronizations, data included. torch.profiler times
the parts in further updates, because it costs time: device time on CUDA, else host time (for an NPU's device time use
train.py's --npu_profile). Matmuls run after every update, so that a busy machine slows both.

--loader goes from block numbers to finished host batches in one process, with the lengths of two presets, by default
and under --fairseq_exact. --startup starts a process that does what train.py does before its first update, without the
model; without --data_path it makes a corpus like WikiText-103. Both take train.py's data flags.
"""

import dataclasses
import functools
import json
import os
import statistics
import tempfile
from pathlib import Path

import config
from config import PARTS, Config
from run import flags


def add_flags(parser):
    def whole_numbers(text):
        return [config.whole_number(part) for part in text.split(",")]

    flag, some, number = (
        parser.add_argument,
        dict(type=whole_numbers, metavar="N,N"),
        dict(type=int, metavar="N"),
    )
    flag("--compare", action="store_true", help="compare with the same step written plainly")
    flag("--peer", choices=["transformers"], help="compare with the same step around that library")
    flag(
        "--check",
        action="store_true",
        help="compare --updates updates with the CPU's; ends with 1 if they differ",
    )
    flag("--sweep", action="store_true", help="measure several block lengths and batch sizes")
    flag("--sweep_lengths", default=[64, 128, 512], help="tokens in a block [64,128,512]", **some)
    flag(
        "--sweep_tokens",
        default=[1280, 4096, 8192],
        help="tokens in a batch [1280,4096,8192]",
        **some,
    )
    flag(
        "--checkpoint", action="store_true", help="measure how long training waits for a checkpoint"
    )
    flag("--loader", action="store_true", help="measure the data loader alone")
    flag("--startup", action="store_true", help="measure the start, up to the first batch")
    flag(
        "--sentences",
        type=config.numbers,
        default=(1.8e6,),
        metavar="N,N",
        help="its corpus sizes [1.8e6]",
    )
    flag("--updates", default=20, help="updates to measure [20]", **number)
    flag("--warmup", default=3, help="updates before the measured ones [3]", **number)
    flag(
        "--vocabulary",
        default=50264,
        help="vocabulary size of the synthetic corpus [50264]",
        **number,
    )


if __name__ == "__main__":
    flags.answer_early(PARTS, __doc__, add_flags)  # torch takes seconds to import


os.environ.setdefault(
    "KINETO_LOG_LEVEL", "6"
)  # else torch.profiler writes two lines to stderr; read on import
from data import Corpus
from hardware.device import Device, open_device
from hardware.flops import Matmuls, timed, update_flops
from run.guard import check_memory
from run.progress import Bar
from train import Run, turns, update

import torch
from torch.profiler import ProfilerActivity, record_function

PARTS_OF_AN_UPDATE = (
    "data",
    "teacher",
    "student",
    "backward",
    "optimizer",
    "ema",
)  # as train.update names them


def endless(run: Run, corpus: Corpus):
    """The batches of each update, epoch after epoch."""
    for turn in turns(run, corpus):
        yield turn.batches
        run.epoch += turn.ends_epoch


@dataclasses.dataclass
class Timed:  # one update
    seconds: float
    blocks: int
    tokens: int
    flops: float
    peak_share: float  # of the speed of the matmuls that follow


def measure(run: Run, corpus: Corpus, warmup: int, updates: int) -> dict:
    """Medians over `updates` updates, and the parts' means over as many more."""
    device, source, rows, matmuls = run.device, endless(run, corpus), [], None
    for i in Bar(range(warmup + updates), device.rank, unit="update"):
        batches = []
        seconds = timed(device, lambda: (batches.extend(next(source)), update(run, batches)))
        if i == warmup - 1 or matmuls is None:
            peak_memory = device.peak_memory()  # before the matmuls allocate theirs
            matmuls = Matmuls(device)
        if i >= warmup:
            blocks, tokens = sum(b.nsentences for b in batches), sum(b.ntokens for b in batches)
            flops = update_flops(batches, run)
            rows.append(Timed(seconds, blocks, tokens, flops, flops / seconds / matmuls.burst(0.1)))

    def work():
        with record_function("data"):
            batches = next(source)
        update(run, batches)

    parts, middle, workers = time_parts(device, work, updates), statistics.median, device.world_size
    source.close()
    return dict(
        fps=middle(row.blocks / row.seconds for row in rows) * workers,
        wps=middle(row.tokens / row.seconds for row in rows) * workers,
        ups=middle(1 / row.seconds for row in rows),
        ms=1e3 * middle(row.seconds for row in rows),
        ms_fastest=1e3 * min(row.seconds for row in rows),
        ms_slowest=1e3 * max(row.seconds for row in rows),
        ms_parts=parts,
        model_tflops=middle(row.flops / row.seconds for row in rows) / 1e12,
        matmul_peak_tflops=matmuls.best / 1e12,
        peak_share=middle(row.peak_share for row in rows),
        peak_memory_bytes=peak_memory,
        blocks=middle(row.blocks for row in rows),
        tokens=middle(row.tokens for row in rows),
    )


def time_parts(device: Device, work, calls: int) -> dict[str, float]:
    """Milliseconds of each named part in one call of `work`, mean over `calls`; 0 for a part that it does not name."""
    on_cuda = device.type == "cuda"
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
    ) as profile:
        for _ in Bar(range(calls), device.rank, what="parts", unit="update"):
            work()
        device.synchronize()
    parts = dict.fromkeys(PARTS_OF_AN_UPDATE, 0.0)
    for event in profile.key_averages():
        if event.key in parts:  # CUDA has a second row for the same name: its span on the device
            spent = (
                event.device_time_total if on_cuda and event.key != "data" else event.cpu_time_total
            )
            parts[event.key] = max(parts[event.key], spent / 1e3 / calls)
    return parts


def main(argv: list | None = None) -> int:
    parts, args = flags.parse(PARTS, __doc__, argv, extra=add_flags)
    if args.updates < 1 or args.warmup < 0 or args.vocabulary < 8:
        raise config.InputError(
            "--updates must be at least 1, --warmup at least 0, --vocabulary at least 8"
        )
    data = parts[0]
    if args.loader or args.startup:
        from hardware import bench_data

        print(
            json.dumps(
                bench_data.loader_report(data)
                if args.loader
                else bench_data.startup_report(data, args)
            )
        )
        return 0
    with tempfile.TemporaryDirectory() as folder:  # of the synthetic dataset
        cfg = Config(dataclasses.replace(data, data_path=data.data_path or folder), *parts[1:])
        device = open_device(cfg.device)
        try:
            result = bench(cfg, device, Path(folder), args, synthetic_data=not data.data_path)
        finally:
            device.close()
    if device.rank == 0:
        print(json.dumps(result))
    return int(args.check and result["check"]["beyond"] > 0)


def bench(cfg: Config, device: Device, folder: Path, args, synthetic_data: bool) -> dict:
    """Run the benchmark that the flags ask for, and print its table."""
    from hardware import bench_step

    data, threads = cfg.data, torch.get_num_threads() if device.type == "cpu" else None
    result = dict(
        device=device.name,
        device_type=device.type,
        amp=device.amp_name,
        world_size=device.world_size,
    )
    result |= dict(torch=torch.__version__, threads=threads, fairseq_exact=cfg.train.fairseq_exact)
    result |= {k: getattr(data, k) for k in ("teacher_input", "tokens_per_sample", "max_tokens")}
    result |= dict(
        updates=args.updates,
        warmup=args.warmup,
        data="synthetic" if synthetic_data else data.data_path,
    )
    if device.rank == 0:
        where = f"{device.world_size} x {device.type} ({device.name})"
        print(f"{'device':16} {where}, amp {device.amp_name}, torch {torch.__version__}")
    if args.sweep:
        return result | dict(sweep=bench_step.sweep(cfg, device, args))
    if synthetic_data:
        check_memory(cfg.model, args.vocabulary, device, copies=5)
    cfg, corpus = (
        bench_step.synthetic(cfg, folder, args.vocabulary)
        if synthetic_data
        else (cfg, Corpus(cfg.data))
    )
    if args.check:
        from hardware import bench_check

        result["check"] = bench_check.check(cfg, device, corpus, args.updates)
        bench_check.print_check(result)
        return result
    run = Run(cfg, device, len(corpus.dictionary))
    result["parameters"] = sum(p.numel() for p in run.student.parameters())
    if args.compare or args.peer:
        other = (bench_step.Transformers if args.peer else bench_step.Plain)(
            run, len(corpus.dictionary)
        )
        result |= bench_step.compare(run, corpus, other, args.warmup, args.updates)
        show = functools.partial(bench_step.print_compare, other=args.peer or "plain")
    elif args.checkpoint:
        result |= bench_step.pauses(run, corpus, args.updates)
        show = bench_step.print_pauses
    else:
        result |= measure(run, corpus, args.warmup, args.updates)
        show = bench_step.print_table
    if device.rank == 0:
        show(result)
    return result


if __name__ == "__main__":
    flags.program(main)
