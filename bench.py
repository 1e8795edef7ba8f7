"""How fast is a training step, what do its parts cost, and is it right?

    python bench.py [--data_path DIR]          a step, its parts, and the share of the matmul peak
    python bench.py --compare                  the same step written plainly
    python bench.py --check --device npu       the same updates here and on the CPU: right numbers?

Without --data_path, the blocks are full and random. The output is a table, then one line of JSON.
Throughput is the median over the updates after the warm-up, each timed between two
synchronizations, data included. torch.profiler times the parts in further updates, because it costs
time: device time on CUDA, else host time (for an NPU's device time use train.py's --npu_profile).
Matmuls run after every update, so that a busy machine slows both.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from pathlib import Path

from config import PARTS, Config, InputError
from run import flags


def add_flags(parser):
    flag = parser.add_argument
    flag("--compare", action="store_true", help="compare with the same step written plainly")
    flag("--check", action="store_true", help="compare with the CPU; ends with 1 if they differ")
    flag("--updates", type=int, default=20, metavar="N", help="updates to measure [20]")
    flag("--warmup", type=int, default=3, metavar="N", help="updates before those [3]")
    flag("--vocabulary", type=int, default=50264, metavar="N", help="of the random text [50264]")


if __name__ == "__main__":
    # torch takes seconds to import
    flags.answer_early(PARTS, __doc__, add_flags)

# else torch.profiler, which reads this on import, writes two lines to stderr
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import ema
from data import Corpus
from hardware.check import check, endless, print_check
from hardware.device import Device
from hardware.flops import Matmuls, time_parts, timed, update_flops
from hardware.opening import open_device
from model import Data2VecText, data2vec_loss
from run.guard import check_memory
from run.progress import Bar
from text.binarized import EOS, PAD, write_dataset
from text.files import with_nulls
from train import Run, lr_at, update

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import record_function


def synthetic(cfg: Config, vocabulary: int, workers: int) -> Config:
    """Write a dataset of full blocks of random tokens; returns the settings that read it so."""
    data, folder = cfg.data, Path(cfg.data.data_path)
    # eight updates of full batches, read again and again
    full = max(1, data.max_tokens // data.tokens_per_sample)
    blocks = full * cfg.train.update_freq * workers * 8
    shape = (blocks, data.tokens_per_sample - 1)
    sentences = np.random.default_rng(0).integers(4, vocabulary, shape)
    sentences[:, -1] = EOS
    write_dataset(folder / "train", sentences, vocabulary)
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(vocabulary - 4)))
    return dataclasses.replace(cfg, data=dataclasses.replace(data, sample_break_mode="none"))


# ---------------------------------------------------------------------------------------- a step


def measure(run: Run, corpus: Corpus, warmup: int, updates: int) -> dict:
    """Medians over `updates` updates, and the parts' means over as many more."""
    device, source = run.device, endless(run, corpus)
    last = []  # batches and train.Update of the last call

    # train.update names its own parts; the loader's is named here
    def work():
        with record_function("data"):
            batches = next(source)
        last[:] = batches, update(run, batches)

    rows = []
    for i in Bar(range(warmup + updates), device.rank, unit="update"):
        seconds = timed(device, work)
        if i == max(0, warmup - 1):
            peak_memory = device.peak_memory()  # before the matmuls allocate theirs
            matmuls = Matmuls(device)
        if i >= warmup:
            batches, done = last
            # of all workers; an update whose gradients overflowed was none
            counts = [int(count) for count in done.step.counts] if done else [0, 0, 0]
            rows.append((seconds, *counts, update_flops(batches, run), matmuls.burst(0.1)))
    parts = time_parts(device, work, updates)
    source.close()

    seconds, predictions, blocks, tokens, flops, peak = np.array(rows).T  # (updates,) each
    return dict(
        fps=np.median(blocks / seconds),
        wps=np.median(tokens / seconds),
        predictions=np.median(predictions / seconds),
        ups=np.median(1 / seconds),
        ms=1e3 * np.median(seconds),
        ms_fastest=1e3 * seconds.min(),
        ms_slowest=1e3 * seconds.max(),
        ms_parts=parts,
        model_tflops=np.median(flops / seconds) / 1e12,
        matmul_peak_tflops=matmuls.best / 1e12,
        peak_share=np.median(flops / seconds / peak),
        peak_memory_bytes=peak_memory,
        blocks=np.median(blocks),
        tokens=np.median(tokens),
    )


def print_table(r: dict):
    ms = f"{r['ms']:.1f} (median of {r['updates']}; {r['ms_fastest']:.1f} to {r['ms_slowest']:.1f})"
    share = f"the model reaches {100 * r['peak_share']:.0f}% of it"
    rows = {
        "update": f"{r['blocks']:g} blocks, {r['tokens']:g} tokens; {r['parameters']:,} parameters",
        "FPS": f"{r['fps']:.2f} blocks/s",
        "tokens/s": f"{r['wps']:.0f}",
        "predictions/s": f"{r['predictions']:.0f} hidden places",
        "updates/s": f"{r['ups']:.3f}",
        "ms an update": ms,
        **{f"  {part}": f"{spent:.1f}" for part, spent in r["ms_parts"].items()},
        "model TFLOP/s": f"{r['model_tflops']:.3f}",
        "matmul TFLOP/s": f"{r['matmul_peak_tflops']:.3f}; {share}",
        "peak memory": f"{r['peak_memory_bytes'] / 2**20:,.0f} MiB",
    }
    for name, text in rows.items():
        print(f"{name:16} {text}")


# ------------------------------------------------------------------- the same step written plainly


class Plain:
    """train.update in its most direct form, with torch's optimizer.

    Teacher and student compute every layer at every place, padding included, and targets for every
    place; weights are cast at each use; unscaling, division and clipping are separate passes over
    the gradients.
    """

    ONLY = dict(objective="data2vec", mlm_weight=0.0, layer_norm_target_layer=True)
    ONLY |= dict(batch_norm_target_layer=False, instance_norm_target_layer=False)
    ONLY |= dict(layer_norm_targets=False, instance_norm_targets=False)

    def __init__(self, run: Run, vocabulary_size: int):
        cfg, device = run.cfg, run.device
        self.run, self.num_updates = run, 0
        # run's own may lie in long vectors, and share their weights with them
        self.student = Data2VecText(cfg.model, vocabulary_size).to(device.torch_device).train()
        self.student.load_state_dict(run.student.state_dict())
        self.teacher = ema.make_teacher(self.student.encoder)
        self.teacher.load_state_dict(run.teacher.state_dict())
        rules = dict(betas=cfg.optim.adam_betas, weight_decay=cfg.optim.weight_decay)
        self.adam = torch.optim.AdamW(self.student.parameters(), **rules)
        self.scaler = device.scaler(cfg.train.update_freq)

    def update(self, batches: list) -> torch.Tensor:
        """Returns the loss summed over the masked places, ()."""
        cfg, device = self.run.cfg, self.run.device
        device.seed(cfg.data.seed + self.num_updates)
        total = torch.zeros((), device=device.torch_device)
        for batch in batches:
            with device.autocast():
                loss = self.loss_of(batch)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.adam)
        grads = [p.grad for p in self.student.parameters() if p.grad is not None]
        torch._foreach_div_(grads, sum(len(batch.masked) for batch in batches))
        limit = cfg.optim.clip_norm or float("inf")
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), limit)

        # fairseq's epsilon, as in optim.py
        group = self.adam.param_groups[0]
        group["lr"] = lr_at(self.num_updates, cfg.train)
        self.num_updates += 1
        root = (1 - cfg.optim.adam_betas[1] ** self.num_updates) ** 0.5
        group["eps"] = cfg.optim.adam_eps / root
        self.scaler.step(self.adam)
        self.scaler.update()
        self.adam.zero_grad()
        decay = ema.decay_at(self.num_updates, cfg.ema)
        ema.step(self.teacher, self.student.encoder, decay, cfg.ema)
        return total

    def loss_of(self, batch) -> torch.Tensor:
        """The loss () of a host batch."""
        cfg, device = self.run.cfg, self.run.device
        tokens = batch.target
        if cfg.data.teacher_input == "masked":  # padded as in fairseq, without random tokens
            tokens = np.full_like(batch.source, PAD)
            tokens.ravel()[batch.masked] = batch.target.ravel()[batch.target_places]
        source, tokens, masked = map(device.tensor, (batch.source, tokens, batch.masked))
        with torch.no_grad():
            _, layers = self.teacher(tokens, top_k=cfg.model.average_top_k_layers)
            target = sum(F.layer_norm(y.float(), y.shape[-1:]) for y in layers) / len(layers)
            target = target.flatten(0, 1).index_select(0, masked)  # (M, C)
        x, _ = self.student.encoder(source)
        x = x.flatten(0, 1).index_select(0, masked)  # (M, C)
        return data2vec_loss(self.student.regression_head(x), target, cfg.model)


def compare(run: Run, corpus: Corpus, warmup: int, updates: int) -> dict:
    """Time train.update and `Plain` in turn on the same batches; the ratio is that of each pair."""
    device, source = run.device, endless(run, corpus)
    plain = Plain(run, len(corpus.dictionary))
    pairs = []
    for i in Bar(range(warmup + updates), device.rank, unit="update"):
        batches = next(source)
        # in turn, so that a machine that slows down slows both
        ours = timed(device, lambda: update(run, batches))
        theirs = timed(device, lambda: plain.update(batches))
        if i >= warmup:
            pairs.append((1e3 * ours, 1e3 * theirs, theirs / ours))
    source.close()
    figures = {}
    # the range beside the median: these machines are shared
    for name, values in zip(("ms", "other_ms", "ratio"), np.array(pairs).T):
        figures[name] = np.median(values)
        figures[f"{name}_range"] = [values.min(), values.max()]
    figures["tokens"] = sum(batch.ntokens for batch in batches)
    figures["blocks"] = sum(len(batch.ids) for batch in batches)
    return figures


def print_compare(r: dict):
    print(f"{'':13}{'ms an update':>13}{'from':>9}{'to':>9}")
    for name, key in (("train.py", ""), ("plain", "other_")):
        low, high = r[f"{key}ms_range"]
        print(f"{name:13}{r[f'{key}ms']:13.1f}{low:9.1f}{high:9.1f}")
    low, high = r["ratio_range"]
    rounds = f"median of rounds; {low:.2f} to {high:.2f}"
    print(f"ratio {r['ratio']:.2f} ({rounds}), {r['tokens']} tokens an update")


# ------------------------------------------------------------------------------------ the program


def main(argv: list | None = None) -> int:
    (data, *others), args = flags.parse(PARTS, __doc__, argv, extra=add_flags)
    if args.updates < 1 or args.warmup < 0 or args.vocabulary < 8:
        raise InputError("--updates and --warmup from 1 and 0 on, --vocabulary at least 8")
    # without a dataset, random blocks are as good: speed does not depend on the words
    is_synthetic = not data.data_path
    with tempfile.TemporaryDirectory() as folder:
        if is_synthetic:
            data = dataclasses.replace(data, data_path=folder)
        cfg = Config(data, *others)
        with contextlib.closing(open_device(cfg.device)) as device:
            if is_synthetic:
                check_memory(cfg.model, args.vocabulary, device, copies=5)
                cfg = synthetic(cfg, args.vocabulary, device.world_size)
            result = describe(cfg, device, args, is_synthetic)
            result |= bench(cfg, device, Corpus(cfg.data), args)
    if device.rank == 0:
        if args.check:
            print_check(result["check"])
        elif args.compare:
            print_compare(result)
        else:
            print_table(result)
        print(json.dumps(with_nulls(result)))
    return int(args.check and result["check"]["beyond"] > 0)


def describe(cfg: Config, device: Device, args, is_synthetic: bool) -> dict:
    """The conditions of the measurement, the first line printed."""
    if device.rank == 0:
        where = f"{device.world_size} x {device.type} ({device.name})"
        print(f"{'device':16} {where}, amp {device.amp_name}, torch {torch.__version__}")
    settings = cfg.flat() | vars(args)
    names = "fairseq_exact teacher_input tokens_per_sample max_tokens updates warmup".split()
    return dict(
        device=device.name,
        device_type=device.type,
        amp=device.amp_name,
        world_size=device.world_size,
        torch=torch.__version__,
        threads=torch.get_num_threads() if device.asking_is_free else None,
        **{name: settings[name] for name in names},
        data="synthetic" if is_synthetic else cfg.data.data_path,
    )


def bench(cfg: Config, device: Device, corpus: Corpus, args) -> dict:
    """What the flags ask for."""
    plain = dataclasses.replace(cfg.model, **Plain.ONLY)
    if args.compare and plain != cfg.model:
        only = ", ".join(f"--{name} {value}" for name, value in Plain.ONLY.items())
        raise InputError(f"--compare: what is written plainly is the step of {only}")
    if device.world_size > 1 and (args.check or args.compare):
        raise InputError("--check and --compare: on one device, without torchrun")
    if args.check:
        return dict(check=check(cfg, device, corpus, args.updates))
    run = Run(cfg, device, len(corpus.dictionary))
    work = compare if args.compare else measure
    figures = work(run, corpus, args.warmup, args.updates)
    return dict(parameters=sum(p.numel() for p in run.student.parameters())) | figures


if __name__ == "__main__":
    flags.program(main)
