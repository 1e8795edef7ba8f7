"""Parts of bench.py: the synthetic corpus, the steps to compare with, the sweep over shapes, the pause for a
checkpoint, and the tables.

Run as `python bench.py --compare | --peer transformers | --sweep | --checkpoint`.
"""

import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ema
from bench import endless, measure
from config import Config, InputError, ModelConfig
from data import Batch, Corpus
from hardware.device import Device
from hardware.flops import Matmuls, timed, update_flops
from model import Data2VecText, Encoder, RegressionHead, data2vec_loss
from run import checkpoint
from run.progress import Bar
from run.resume import contents
from text.binarized import EOS, PAD, write_dataset
from train import Run, lr_at, update

import numpy as np
import torch
import torch.nn.functional as F


def synthetic(cfg: Config, folder: Path, vocabulary: int, **changes) -> tuple[Config, Corpus]:
    """Write full blocks of random tokens into `folder`, as a dataset; returns the settings that read it, and it."""
    data = dataclasses.replace(cfg.data, data_path=str(folder), sample_break_mode="none", **changes)
    blocks = max(1, data.max_tokens // data.tokens_per_sample) * cfg.train.update_freq * 8
    sentences = np.random.default_rng(0).integers(
        4, vocabulary, (blocks, data.tokens_per_sample - 1)
    )
    sentences[:, -1] = EOS
    write_dataset(folder / "train", sentences, vocabulary)
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(vocabulary - 4)))
    return dataclasses.replace(cfg, data=data), Corpus(data)


class Plain:
    """The step of train.update in its most direct form: teacher and student compute every layer at every place, padding
    included, and targets for every place; weights are cast at each use; unscaling, division and clipping are separate
    passes over the gradients; kernels and optimizer are torch's; the teacher moves parameter by parameter."""

    def __init__(self, run: Run, vocabulary_size: int):
        self.run, self.num_updates = run, 0
        self.student, self.teacher = self.models(run.cfg.model, vocabulary_size)
        self.student.to(run.device.torch_device).train()
        self.teacher.to(run.device.torch_device).eval().requires_grad_(False)
        optim = run.cfg.optim
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), betas=optim.adam_betas, weight_decay=optim.weight_decay
        )
        self.scaler = run.device.scaler(run.cfg.train.update_freq)

    def models(self, cfg: ModelConfig, vocabulary_size: int):
        """Returns the student, with .encoder and .regression_head, and the teacher."""
        student = Data2VecText(cfg, vocabulary_size)
        student.load_state_dict(self.run.student.state_dict())
        teacher = Encoder(cfg, vocabulary_size)
        teacher.load_state_dict(self.run.teacher.state_dict())
        return student, teacher

    def encode(self, encoder, tokens) -> tuple:
        """Returns the last hidden states (B, T, C), and a list of each layer's target (B, T, C)."""
        return encoder(tokens, top_k=self.run.cfg.model.layers)

    def update(self, batches: list[Batch]) -> torch.Tensor:
        """Returns the loss summed over the masked places, ()."""
        cfg, device, lr = self.run.cfg, self.run.device, lr_at(self.num_updates, self.run.cfg.train)
        optim = cfg.optim
        device.seed(cfg.data.seed + self.num_updates)
        total = torch.zeros((), device=device.torch_device)
        for host in batches:
            tokens = host.target
            if (
                cfg.data.teacher_input == "masked"
            ):  # padded as in fairseq; without random or kept tokens
                tokens = np.full_like(host.source, PAD)
                tokens.ravel()[host.masked] = host.target.ravel()[host.target_places]
            source, tokens, masked = (device.tensor(x) for x in (host.source, tokens, host.masked))
            with device.autocast():
                with torch.no_grad():
                    layers = self.encode(self.teacher, tokens)[1][-cfg.model.average_top_k_layers :]
                    target = sum(F.layer_norm(y.float(), y.shape[-1:]) for y in layers) / len(
                        layers
                    )
                    target = target.flatten(0, 1).index_select(0, masked)
                x = (
                    self.encode(self.student.encoder, source)[0]
                    .flatten(0, 1)
                    .index_select(0, masked)
                )
                loss = data2vec_loss(self.student.regression_head(x), target, cfg.model)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.student.parameters() if p.grad is not None]
        torch._foreach_div_(grads, sum(b.sample_size for b in batches))
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), optim.clip_norm or float("inf"))
        self.optimizer.param_groups[0]["lr"] = lr
        steps = self.num_updates + 1
        self.optimizer.param_groups[0]["eps"] = (
            optim.adam_eps / (1 - optim.adam_betas[1] ** steps) ** 0.5
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.num_updates += 1
        decay = ema.decay_at(self.num_updates, cfg.ema)
        with torch.no_grad():
            for (name, old), new in zip(
                self.teacher.named_parameters(), self.student.encoder.parameters()
            ):
                copied = cfg.ema.ema_transformer_layers_only and "emb" in name.split(".")[0]
                old.copy_(new) if copied else old.mul_(decay).add_(new, alpha=1 - decay)
        return total


class Transformers(Plain):
    """The same step, written with Hugging Face's Data2VecTextModel."""

    def models(self, cfg: ModelConfig, vocabulary_size: int):
        try:
            from transformers import Data2VecTextConfig, Data2VecTextModel
        except ImportError:
            raise InputError(
                "--peer transformers: that package is not installed; pip install transformers"
            ) from None
        settings = Data2VecTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=cfg.embed_dim,
            num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.attention_heads,
            intermediate_size=cfg.ffn_embed_dim,
            hidden_act=cfg.activation_fn,
            hidden_dropout_prob=cfg.dropout,
            attention_probs_dropout_prob=cfg.attention_dropout,
            max_position_embeddings=cfg.max_source_positions + PAD + 1,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            pad_token_id=PAD,
        )
        student = torch.nn.Module()
        student.encoder = Data2VecTextModel(settings, add_pooling_layer=False)
        student.regression_head = RegressionHead(cfg)
        teacher = Data2VecTextModel(settings, add_pooling_layer=False)
        teacher.load_state_dict(student.encoder.state_dict())
        return student, teacher

    def encode(self, encoder, tokens) -> tuple:
        targets = []
        hooks = [  # this library does not return the feed-forward's output before dropout and residual
            layer.output.dense.register_forward_hook(lambda module, given, y: targets.append(y))
            for layer in encoder.encoder.layer
        ]
        x = encoder(tokens, attention_mask=tokens != PAD).last_hidden_state
        for hook in hooks:
            hook.remove()
        return x, targets


def kept_bytes(work) -> int:
    """Bytes of activations that autograd keeps for the backward pass while `work` runs, weights not counted."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(kept.values())


@dataclass
class Round:
    """Both steps on the same batches."""

    ours: float  # seconds
    theirs: float
    ratio: float  # theirs / ours
    peak_share: float  # of the best matmul speed right before and after the step
    other_peak_share: float


def compare(run: Run, corpus: Corpus, other: Plain, warmup: int, updates: int) -> dict:
    """Time train.update and another step that does the same, on the same batches, with matmuls between them."""
    device, source, rounds = run.device, endless(run, corpus), []
    matmuls = Matmuls(device)
    for i in Bar(range(warmup + updates), device.rank, unit="update"):
        batches = next(source)
        before = matmuls.burst(0.2)
        ours = timed(device, lambda: update(run, batches))
        between = matmuls.burst(0.2)
        theirs = timed(device, lambda: other.update(batches))
        after = matmuls.burst(0.2)
        if i >= warmup:
            flops = update_flops(batches, run)
            shares = (
                flops / ours / max(before, between),
                flops / theirs / max(before, between, after),
            )
            rounds.append(Round(ours, theirs, theirs / ours, *shares))
    source.close()
    tokens = sum(b.ntokens for b in batches)
    steps = (lambda: update(run, batches), lambda: other.update(batches))
    kept = [kept_bytes(step) for step in steps]
    peaks = []
    if device.type != "cpu":
        for step in steps:
            device.reset_peak_memory()
            before = device.peak_memory()
            step()
            peaks.append(device.peak_memory() - before)

    def ordered(name, unit=1):
        return sorted(unit * getattr(r, name) for r in rounds)

    def middle(values):
        return values[len(values) // 2]

    ours, theirs, ratios = ordered("ours", 1e3), ordered("theirs", 1e3), ordered("ratio")
    return dict(
        ms=middle(ours),
        ms_range=[ours[0], ours[-1]],
        other_ms=middle(theirs),
        other_ms_range=[theirs[0], theirs[-1]],
        ratio=middle(ratios),
        ratio_range=[ratios[0], ratios[-1]],
        peak_share=middle(ordered("peak_share")),
        other_peak_share=middle(ordered("other_peak_share")),
        matmul_peak_tflops=matmuls.best / 1e12,
        kept_bytes_per_token=kept[0] / tokens,
        other_kept_bytes_per_token=kept[1] / tokens,
        device_bytes_above_weights=peaks[:1],
        other_device_bytes_above_weights=peaks[1:],
        tokens=tokens,
        blocks=sum(b.nsentences for b in batches),
    )


def print_compare(r: dict, other: str):
    print(
        f"{'':13}{'ms an update':>13}{'from':>9}{'to':>9}{'matmul peak':>13}{'kept for backward':>20}"
    )
    for name, key in (("train.py", ""), (other, "other_")):
        low, high = r[f"{key}ms_range"]
        print(
            f"{name:13}{r[f'{key}ms']:13.1f}{low:9.1f}{high:9.1f}{100 * r[f'{key}peak_share']:12.0f}%"
            f"{r[f'{key}kept_bytes_per_token'] / 2**10:12.0f} KiB/tok"
        )
        for peak in r[f"{key}device_bytes_above_weights"]:
            print(
                f"{'':13}{peak / 2**20:,.0f} MiB above the weights, {peak / r['tokens'] / 2**10:.0f} KiB a token"
            )
    low, high = r["ratio_range"]
    print(
        f"ratio {r['ratio']:.2f} (median of rounds; {low:.2f} to {high:.2f}), {r['tokens']} tokens an update"
    )


def sweep(base: Config, device: Device, args) -> list[dict]:
    """Cost per token for each block length and batch size, with one model."""
    rows, run = [], None
    for length in args.sweep_lengths:
        for tokens in args.sweep_tokens:
            if tokens < length or length > base.model.max_source_positions:
                continue
            with tempfile.TemporaryDirectory() as folder:
                shape = dict(tokens_per_sample=length, max_tokens=tokens)
                cfg, corpus = synthetic(base, Path(folder), args.vocabulary, **shape)
                run = run or Run(cfg, device, len(corpus.dictionary))
                run.cfg, run.epoch = cfg, 1
                r = measure(run, corpus, args.warmup, args.updates)
            rows.append(
                {
                    k: r[k]
                    for k in (
                        "ms",
                        "wps",
                        "model_tflops",
                        "peak_share",
                        "tokens",
                        "peak_memory_bytes",
                    )
                }
                | dict(shape, us_per_token=1e3 * r["ms"] / r["tokens"])
            )
            print_sweep(rows)
    return rows


def print_sweep(rows: list[dict]):
    if len(rows) == 1:
        print(
            f"{'tokens/block':>12}{'tokens/batch':>14}{'ms an update':>14}{'us a token':>12}{'matmul peak':>13}"
        )
    r = rows[-1]
    print(
        f"{r['tokens_per_sample']:12}{r['tokens']:14.0f}{r['ms']:14.1f}{r['us_per_token']:12.1f}"
        f"{100 * r['peak_share']:12.0f}%"
    )


@dataclass
class Save:
    """One checkpoint, in seconds."""

    pause: float  # training waits
    whole: float  # until the file is complete
    plain: float  # torch.save of the same state
    cost: float  # what the updates while it is written, and the pause, take longer than as many updates without a save
    updates: int  # that many


def pauses(run: Run, corpus: Corpus, rounds: int) -> dict:
    """How long training waits for a checkpoint, and torch.save of the same state for comparison. The first save is
    reported by itself: it allocates the memory that later ones reuse."""
    source, saver, saves = (
        endless(run, corpus),
        checkpoint.Saver(run.device, run.optimizer.adam),
        [],
    )
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "checkpoint_last.pt"
        for _ in Bar(range(rounds + 1), run.device.rank, unit="save"):
            update(run, next(source))
            state = {**contents(run, corpus, {}), "log": {}}
            pause = timed(run.device, lambda: saver.start(state, path))
            whole = pause + timed(run.device, saver.finish)
            plain = timed(run.device, lambda: torch.save(state, Path(folder) / "plain.pt"))
            begin, count = time.perf_counter(), 0
            saver.start(state, path)
            while saver.is_busy() or not count:
                timed(run.device, lambda: update(run, next(source)))
                count += 1
            saver.finish()
            cost = time.perf_counter() - begin
            cost -= timed(run.device, lambda: [update(run, next(source)) for _ in range(count)])
            saves.append(Save(pause, whole, plain, cost, count))
        size = path.stat().st_size
    source.close()
    later, middle = saves[1:], statistics.median
    return dict(
        bytes=size,
        first_pause_s=saves[0].pause,
        pause_s=middle(s.pause for s in later),
        whole_s=middle(s.whole for s in later),
        torch_save_s=middle(s.plain for s in later),
        cost_s=middle(s.cost for s in later),
        updates_meanwhile=middle(s.updates for s in later),
        pause_share=middle(s.pause / s.plain for s in later),
        copies=saver.copies,
    )


def print_pauses(r: dict):
    print(f"{'state':16} {r['bytes'] / 2**20:,.0f} MiB")
    waits = f"{r['pause_s']:.2f} s ({r['first_pause_s']:.2f} s for the first save)"
    print(
        f"{'training waits':16} {waits if r['copies'] else 'before the next step, which is part of the cost'}"
    )
    print(f"{'written after':16} {r['whole_s']:.2f} s, including checksum and fsync")
    print(
        f"{'costs in all':16} {r['cost_s']:.2f} s, over {r['updates_meanwhile']:.0f} updates while it is written"
    )
    print(f"{'torch.save':16} {r['torch_save_s']:.2f} s")


def print_table(r: dict):
    for name, text in (
        (
            "update",
            f"{r['blocks']:g} blocks, {r['tokens']:g} tokens; {r['parameters']:,} parameters",
        ),
        ("FPS", f"{r['fps']:.2f} blocks/s"),
        ("tokens/s", f"{r['wps']:.0f}"),
        ("updates/s", f"{r['ups']:.3f}"),
        (
            "ms an update",
            f"{r['ms']:.1f} (median of {r['updates']}; {r['ms_fastest']:.1f} to {r['ms_slowest']:.1f})",
        ),
        *((f"  {part}", f"{ms:.1f}") for part, ms in r["ms_parts"].items()),
        ("model TFLOP/s", f"{r['model_tflops']:.3f}"),
        (
            "matmul TFLOP/s",
            f"{r['matmul_peak_tflops']:.3f}; the model reaches {100 * r['peak_share']:.0f}% of it",
        ),
        ("peak memory", f"{r['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ):
        print(f"{name:16} {text}")
