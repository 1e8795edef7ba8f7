"""How fast is a training step, and is it right?

    python bench.py [--data_path DIR]          a step, and its share of the matmul peak
    python bench.py --check --device npu       the same updates here and on the CPU: right numbers?

Without --data_path, the blocks are full and random. The output is a table, then one line of JSON.
Throughput is the median over the updates after the warm-up, each timed between two
synchronizations, data included. Matmuls run after every update, so that a busy machine slows both.
Where the time goes shows in a profile; its parts have the names of the paper (--npu_profile).
"""

import dataclasses
import json
import tempfile
from pathlib import Path

from config import PARTS, Config, InputError
from run import flags


def add_flags(parser):
    flag = parser.add_argument
    flag("--check", action="store_true", help="compare with the CPU; ends with 1 if they differ")
    flag("--updates", type=int, default=20, metavar="N", help="updates to measure [20]")
    flag("--warmup", type=int, default=3, metavar="N", help="updates before those [3]")
    flag("--vocabulary", type=int, default=50264, metavar="N", help="of the random text [50264]")


if __name__ == "__main__":
    # torch takes seconds to import
    flags.answer_early(PARTS, __doc__, add_flags)

from data import Corpus
from hardware.check import check, print_check
from hardware.device import Device
from hardware.flops import Matmuls, timed, update_flops
from hardware.opening import open_device
from run.guard import check_memory
from run.progress import Bar
from text.binarized import EOS, write_dataset
from train import Run, turns, update

import numpy as np
import torch


def synthetic(cfg: Config, vocabulary: int) -> Config:
    """Write a dataset of full blocks of random tokens; returns the settings that read it so."""
    data, folder = cfg.data, Path(cfg.data.data_path)
    # eight updates of full batches, read again and again
    blocks = max(1, data.max_tokens // data.tokens_per_sample) * cfg.train.update_freq * 8
    shape = (blocks, data.tokens_per_sample - 1)
    sentences = np.random.default_rng(0).integers(4, vocabulary, shape)
    sentences[:, -1] = EOS
    write_dataset(folder / "train", sentences, vocabulary)
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(vocabulary - 4)))
    return dataclasses.replace(cfg, data=dataclasses.replace(data, sample_break_mode="none"))


def measure(run: Run, corpus: Corpus, warmup: int, updates: int) -> dict:
    """Medians over `updates` updates."""
    device, source = run.device, turns(run, corpus)
    batches = []

    def work():
        turn = next(source)
        batches[:] = turn.batches
        run.epoch += turn.ends_epoch
        update(run, batches)

    rows, matmuls = [], None
    for i in Bar(range(warmup + updates), device.rank, unit="update"):
        # with the data's time: what a run does between two updates counts
        seconds = timed(device, work)
        if i == warmup - 1 or matmuls is None:
            peak_memory = device.peak_memory()  # before the matmuls allocate theirs
            matmuls = Matmuls(device)
        if i >= warmup:
            blocks = sum(batch.nsentences for batch in batches)
            tokens = sum(batch.ntokens for batch in batches)
            flops = update_flops(batches, run)
            rows.append((seconds, blocks, tokens, flops, matmuls.burst(0.1)))
    source.close()

    # medians, since these machines are shared
    seconds, blocks, tokens, flops, peak = np.array(rows).T  # (updates,) each
    return dict(
        parameters=sum(p.numel() for p in run.student.parameters()),
        blocks=np.median(blocks),
        tokens=np.median(tokens),
        fps=np.median(blocks / seconds) * device.world_size,
        wps=np.median(tokens / seconds) * device.world_size,
        ups=np.median(1 / seconds),
        ms=1e3 * np.median(seconds),
        ms_fastest=1e3 * seconds.min(),
        ms_slowest=1e3 * seconds.max(),
        model_tflops=np.median(flops / seconds) / 1e12,
        matmul_peak_tflops=matmuls.best / 1e12,
        peak_share=np.median(flops / seconds / peak),
        peak_memory_bytes=peak_memory,
    )


def main(argv: list | None = None) -> int:
    (data, *others), args = flags.parse(PARTS, __doc__, argv, extra=add_flags)
    if args.updates < 1 or args.warmup < 0 or args.vocabulary < 8:
        raise InputError("--updates and --warmup from 1 and 0 on, --vocabulary at least 8")
    # of the random blocks
    with tempfile.TemporaryDirectory() as folder:
        path = data.data_path or folder
        cfg = Config(dataclasses.replace(data, data_path=path), *others)
        device = open_device(cfg.device)
        try:
            if not data.data_path:  # random blocks are as good: speed does not depend on the words
                check_memory(cfg.model, args.vocabulary, device, copies=5)
                cfg = synthetic(cfg, args.vocabulary)
            result = bench(cfg, device, Corpus(cfg.data), args)
        finally:
            device.close()
    if device.rank == 0:
        print(json.dumps(result))
    return int(args.check and result["check"]["beyond"] > 0)


def bench(cfg: Config, device: Device, corpus: Corpus, args) -> dict:
    """Measure or check, and print a table. Returns its figures and their conditions."""
    # a figure without them says little
    conditions = dict(
        device=f"{device.world_size} x {device.type} ({device.name})",
        amp=device.amp_name,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        tokens_per_sample=cfg.data.tokens_per_sample,
        max_tokens=cfg.data.max_tokens,
        teacher_input=cfg.data.teacher_input,
    )
    print_rows(device, conditions)
    if args.check:
        result = check(cfg, device, corpus, args.updates)
        if device.rank == 0:
            print_check(result)
        return dict(conditions, check=result)
    run = Run(cfg, device, len(corpus.dictionary))
    figures = measure(run, corpus, args.warmup, args.updates)
    print_rows(device, figures)
    return conditions | figures


def print_rows(device: Device, rows: dict):
    # flushed: the conditions show while the updates run
    if device.rank == 0:
        for name, value in rows.items():
            text = value if isinstance(value, str) else f"{value:,.5g}"
            print(f"{name:18} {text}", flush=True)


if __name__ == "__main__":
    flags.program(main)
