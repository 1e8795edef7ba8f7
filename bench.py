"""How fast: the training step of train.py, its parts, and how near it comes to the device's own matmul speed.

    python bench.py [--config_name base] [--data_path DIR] [--device ...] [--amp ...] [--updates 20]
    python bench.py --compare                 beside the same step written plainly, in turn
    python bench.py --peer transformers       beside the same step around Hugging Face's Data2VecTextModel
    python bench.py --sweep                   over block lengths and tokens in a batch: cost per token
    python bench.py --checkpoint              how long training waits for a checkpoint
    python bench.py --loader --data_path DIR  the loader's tokens a second, beside a plain loop
    python bench.py --startup [--sentences 1.8e6,1e7]    process start to first batch: seconds and memory

Without --data_path the blocks are synthetic and full. Prints a table, then one JSON line. Throughput is the median over
the updates behind the warm-up, each from one synchronization to the next, data included; the split into parts is
measured in further updates, since synchronizing behind every part costs time. Machines are noisy: a share of the matmul
speed is the median over rounds of update and matmuls in turn.

--loader takes one process from block numbers to finished host batches, at the lengths of the npu_1p and the base
preset, by default and as fairseq does, in turn with the plain loop and over as many epochs as it takes. --startup makes
a corpus like WikiText-103 in a temporary folder, unless --data_path names one, and starts a process that does what
train.py does before its first update, building the model aside. Other flags of the data hold for both.

Model FLOPs, per block of n tokens of which m are wanted, C wide, F the feed-forward's inner width, L layers:
    layer(n, q)   = n * 4 C^2 + q * (4 C^2 + 4 C F) + 4 n q C    keys, values; queries, output, feed-forward; attention
    encoder(n, m) = (L - 1) * layer(n, n) + layer(n, m)          the last layer only where it is wanted
    update        = 3 * (encoder(student's n, masked) + head) + encoder(teacher's)    forward and backward; forward
2 for a multiply-add, over real tokens only: padding is work, but not useful work. head = 2 * (its weights) per masked
token.
"""

import dataclasses
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

# first: device has a word with torch before torch is imported
from device import Device, open_device  # isort: split

import numpy as np
import torch
import torch.nn.functional as F

import config
import ema
from config import InputError
from data import Batch, Corpus
from dataset.binarized import EOS, PAD, write_dataset
from model import Data2VecText, Encoder, ModelConfig, RegressionHead, data2vec_loss
from runtime import checkpoint
from tools import bench_data
from train import PARTS, Config, Run, contents, epoch_updates, lr_at, update


def encoder_flops(lengths: np.ndarray, wanted: np.ndarray, cfg: ModelConfig) -> float:
    """Forward FLOPs of one encoder over blocks of these lengths, (B,) each."""
    n, m, C = lengths.astype(np.float64), wanted.astype(np.float64), cfg.embed_dim

    def layer(q):
        return float((n * 4 * C**2 + q * (4 * C**2 + 4 * C * cfg.ffn_embed_dim) + 4 * n * q * C).sum())

    return (cfg.layers - 1) * layer(n) + layer(m)


def update_flops(batches: list[Batch], run: Run) -> float:
    """Model FLOPs of one update, by the formula above."""
    head = 2 * sum(p.numel() for p in run.student.regression_head.parameters() if p.ndim == 2)
    total = 0.0
    for batch in batches:
        student, teacher = ((tokens != PAD).sum(1) for tokens in (batch.source, batch.target))
        masked = np.bincount(batch.masked // batch.source.shape[1], minlength=len(student))
        total += 3 * (encoder_flops(student, masked, run.cfg.model) + head * batch.sample_size)
        # the squeezed input is read by the last layer's queries at all its places
        wanted = masked if run.cfg.data.teacher_input == "full" else teacher
        total += encoder_flops(teacher, wanted, run.cfg.model)
    return total


class Matmuls:
    """Plain square matmuls in the type that training uses: what this device can do."""

    def __init__(self, device: Device):
        self.device, self.best, dtype = device, 0.0, device.amp or torch.float32
        sizes, self.repeat = ((1024, 2048), 1) if device.type == "cpu" else ((4096, 8192), 20)
        self.pairs = [[torch.randn(n, n, device=device.torch_device, dtype=dtype) for _ in range(2)] for n in sizes]
        self.burst(0.2)

    def burst(self, seconds: float = 0.5) -> float:
        """The best FLOP/s of some time of matmuls."""
        best = 0.0
        for a, b in self.pairs:
            end = time.perf_counter() + seconds / len(self.pairs)
            while time.perf_counter() < end:
                self.device.synchronize()
                begin = time.perf_counter()
                for _ in range(self.repeat):
                    a @ b
                self.device.synchronize()
                best = max(best, 2 * len(a) ** 3 * self.repeat / (time.perf_counter() - begin))
        self.best = max(self.best, best)
        return best


def synthetic_corpus(folder: Path, tokens_per_sample: int, blocks: int, vocabulary: int):
    """Random tokens in full blocks, in the format that training reads."""
    rng = np.random.default_rng(0)
    sentences = rng.integers(4, vocabulary, (blocks, tokens_per_sample - 1))
    sentences[:, -1] = EOS
    write_dataset(folder / "train", sentences, vocabulary)
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(vocabulary - 4)))


def endless(run: Run, dataset):
    """The batches of each update, epoch after epoch."""
    while True:
        for batches, _, _ in epoch_updates(run, dataset):
            yield batches
        run.epoch += 1


def timed(device: Device, work) -> float:
    device.synchronize()
    begin = time.perf_counter()
    work()
    device.synchronize()
    return time.perf_counter() - begin


def measure(run: Run, dataset, warmup: int, updates: int) -> dict:
    """Medians over `updates` updates, and of their parts over as many more."""
    device, source, rows, parts, matmuls = run.device, endless(run, dataset), [], [], None
    for i in range(warmup + updates):
        batches = []
        seconds = timed(device, lambda: (batches.extend(next(source)), update(run, batches)))
        if i == warmup - 1 or matmuls is None:
            peak_memory = device.peak_memory()  # before the matmuls take theirs
            matmuls = Matmuls(device)
        if i >= warmup:
            blocks, tokens = sum(b.nsentences for b in batches), sum(b.ntokens for b in batches)
            flops = update_flops(batches, run)
            rows.append((seconds, blocks, tokens, flops, flops / seconds / matmuls.burst(0.1)))
    for _ in range(updates):
        spent, last = {}, time.perf_counter()

        def mark(part):
            nonlocal last
            device.synchronize()
            spent[part] = spent.get(part, 0.0) - last
            last = time.perf_counter()
            spent[part] += last

        batches = next(source)
        mark("data")
        update(run, batches, mark)
        parts.append(spent)
    source.close()
    middle = statistics.median
    return dict(
        fps=middle(blocks / s for s, blocks, *_ in rows) * device.world_size,
        wps=middle(tokens / s for s, _, tokens, *_ in rows) * device.world_size,
        ups=middle(1 / s for s, *_ in rows),
        ms=1e3 * middle(s for s, *_ in rows),
        ms_fastest=1e3 * min(s for s, *_ in rows),
        ms_slowest=1e3 * max(s for s, *_ in rows),
        ms_parts={part: 1e3 * middle(row.get(part, 0.0) for row in parts) for part in parts[0]},
        model_tflops=middle(flops / s for s, *_, flops, _ in rows) / 1e12,
        matmul_peak_tflops=matmuls.best / 1e12,
        peak_share=middle(row[-1] for row in rows),
        peak_memory_bytes=peak_memory,
        blocks=middle(row[1] for row in rows),
        tokens=middle(row[2] for row in rows),
    )


# ---------------------------------------------------------------------------------------------- compared with


class Plain:
    """The step of train.update as one writes it down first: the teacher reads the padded block, every layer of both is
    computed everywhere and targets are made everywhere, weights are cast at each use, gradients are scaled and clipped
    in passes of their own, torch's kernels and its optimizer come as they are, the teacher moves by parameter."""

    def __init__(self, run: Run, vocabulary_size: int):
        self.run, self.num_updates = run, 0
        self.student, self.teacher = self.models(run.cfg.model, vocabulary_size)
        self.student.to(run.device.torch_device).train()
        self.teacher.to(run.device.torch_device).eval().requires_grad_(False)
        train = run.cfg.train
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), betas=train.adam_betas, weight_decay=train.weight_decay
        )
        self.scaler = run.device.scaler(train.update_freq)

    def models(self, cfg: ModelConfig, vocabulary_size: int):
        """(student with .encoder and .regression_head, teacher)."""
        student = Data2VecText(cfg, vocabulary_size)
        student.load_state_dict(self.run.student.state_dict())
        teacher = Encoder(cfg, vocabulary_size)
        teacher.load_state_dict(self.run.teacher.state_dict())
        return student, teacher

    def encode(self, encoder, tokens) -> tuple:
        """Last hidden states and the layers' targets, (B, T, C) each."""
        return encoder(tokens, targets=self.run.cfg.model.layers)

    def update(self, batches: list[Batch]) -> torch.Tensor:
        """Returns the sum of the loss."""
        cfg, device, lr = self.run.cfg, self.run.device, lr_at(self.num_updates, self.run.cfg.train)
        device.seed(cfg.data.seed + self.num_updates)
        total = torch.zeros((), device=device.torch_device)
        for host in batches:
            tokens = host.target
            if cfg.data.teacher_input == "masked":  # padded as the reference has it; without random or kept tokens
                tokens = np.full_like(host.source, PAD)
                tokens.ravel()[host.masked] = host.target.ravel()[host.target_places]
            source, tokens, masked = (device.tensor(x) for x in (host.source, tokens, host.masked))
            with device.autocast():
                with torch.no_grad():
                    layers = self.encode(self.teacher, tokens)[1][-cfg.model.average_top_k_layers :]
                    target = sum(F.layer_norm(y.float(), y.shape[-1:]) for y in layers) / len(layers)
                    target = target.flatten(0, 1).index_select(0, masked)
                x = self.encode(self.student.encoder, source)[0].flatten(0, 1).index_select(0, masked)
                loss = data2vec_loss(self.student.regression_head(x), target, cfg.model)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.student.parameters() if p.grad is not None]
        torch._foreach_div_(grads, sum(b.sample_size for b in batches))
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), cfg.train.clip_norm or float("inf"))
        self.optimizer.param_groups[0]["lr"] = lr
        steps = self.num_updates + 1
        self.optimizer.param_groups[0]["eps"] = cfg.train.adam_eps / (1 - cfg.train.adam_betas[1] ** steps) ** 0.5
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.num_updates += 1
        decay = ema.decay_at(self.num_updates, cfg.ema)
        with torch.no_grad():
            for (name, old), new in zip(self.teacher.named_parameters(), self.student.encoder.parameters()):
                copied = cfg.ema.ema_transformer_layers_only and "emb" in name.split(".")[0]
                old.copy_(new) if copied else old.mul_(decay).add_(new, alpha=1 - decay)
        return total


class Transformers(Plain):
    """The same step around Hugging Face's Data2VecTextModel, as one would write it with that library today."""

    def models(self, cfg: ModelConfig, vocabulary_size: int):
        try:
            from transformers import Data2VecTextConfig, Data2VecTextModel
        except ImportError:
            raise InputError("--peer transformers needs that package: pip install transformers") from None
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
        hooks = [  # the feed-forward's output before dropout and residual, which this library does not give
            layer.output.dense.register_forward_hook(lambda module, given, y: targets.append(y))
            for layer in encoder.encoder.layer
        ]
        x = encoder(tokens, attention_mask=tokens != PAD).last_hidden_state
        for hook in hooks:
            hook.remove()
        return x, targets


def kept_bytes(work) -> int:
    """Bytes that autograd keeps for the backward pass while `work` runs: the activations' peak, on every device."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(kept.values())


def compare(run: Run, dataset, other: Plain, warmup: int, updates: int) -> dict:
    """The step and another that does the same, each round on the same batches, and matmuls in turn."""
    device, source, rows = run.device, endless(run, dataset), []
    matmuls = Matmuls(device)
    for i in range(warmup + updates):
        batches = next(source)
        peak = matmuls.burst(0.2)
        ours = timed(device, lambda: update(run, batches))
        peak = max(peak, matmuls.burst(0.2))
        theirs = timed(device, lambda: other.update(batches))
        peak_theirs = max(peak, matmuls.burst(0.2))
        if i >= warmup:
            flops = update_flops(batches, run)
            rows.append((ours, theirs, theirs / ours, flops / ours / peak, flops / theirs / peak_theirs))
    tokens = sum(b.ntokens for b in batches)
    held = [kept_bytes(lambda: step(batches)) for step in (lambda b: update(run, b), other.update)]
    peaks = []
    if device.type != "cpu":
        for step in (lambda b: update(run, b), other.update):
            device.reset_peak_memory()
            before = device.peak_memory()
            step(batches)
            peaks.append(device.peak_memory() - before)
    source.close()
    columns = [sorted(column) for column in zip(*rows)]
    middle, low, high = ([column[at] for column in columns] for at in (len(rows) // 2, 0, -1))
    return dict(
        ms=1e3 * middle[0],
        ms_range=[1e3 * low[0], 1e3 * high[0]],
        other_ms=1e3 * middle[1],
        other_ms_range=[1e3 * low[1], 1e3 * high[1]],
        ratio=middle[2],
        ratio_range=[low[2], high[2]],
        peak_share=middle[3],
        other_peak_share=middle[4],
        matmul_peak_tflops=matmuls.best / 1e12,
        kept_bytes_per_token=held[0] / tokens,
        other_kept_bytes_per_token=held[1] / tokens,
        device_bytes_above_weights=peaks[:1],
        other_device_bytes_above_weights=peaks[1:],
        tokens=tokens,
        blocks=sum(b.nsentences for b in batches),
    )


def print_compare(r: dict, other: str):
    print(f"{'':16}{'ms an update':>14}{'from':>9}{'to':>9}{'matmul peak':>13}{'kept for backward':>21}")
    for name, key in (("train.py", ""), (other, "other_")):
        low, high = r[f"{key}ms_range"]
        print(
            f"{name:16}{r[f'{key}ms']:14.1f}{low:9.1f}{high:9.1f}{100 * r[f'{key}peak_share']:12.0f}%"
            f"{r[f'{key}kept_bytes_per_token'] / 2**10:14.0f} KiB/tok"
        )
        for peak in r[f"{key}device_bytes_above_weights"]:
            print(f"{'':16}{peak / 2**20:,.0f} MiB above the weights, {peak / r['tokens'] / 2**10:.0f} KiB a token")
    low, high = r["ratio_range"]
    print(f"ratio {r['ratio']:.2f} (median of rounds in turn; {low:.2f} to {high:.2f}), {r['tokens']} tokens an update")


def sweep(base: Config, device: Device, lengths: list, batch_tokens: list, args) -> list[dict]:
    """Cost per token over block lengths and tokens in a batch, one model for all."""
    rows, run = [], None
    for length in lengths:
        for tokens in batch_tokens:
            if tokens < length or length > base.model.max_source_positions:
                continue
            with tempfile.TemporaryDirectory() as folder:
                shape = dict(tokens_per_sample=length, max_tokens=tokens)
                cfg, corpus = synthetic(base, Path(folder), args.vocabulary, **shape)
                run = run or Run(cfg, device, len(corpus.dictionary))
                run.cfg, run.epoch = cfg, 1
                r = measure(run, corpus.split("train"), args.warmup, args.updates)
            rows.append(
                {k: r[k] for k in ("ms", "wps", "model_tflops", "peak_share", "tokens", "peak_memory_bytes")}
                | dict(shape, us_per_token=1e3 * r["ms"] / r["tokens"])
            )
            print_sweep(rows)
    return rows


def print_sweep(rows: list[dict]):
    if len(rows) == 1:
        print(f"{'tokens/block':>12}{'tokens/batch':>14}{'ms an update':>14}{'us a token':>12}{'matmul peak':>13}")
    r = rows[-1]
    print(
        f"{r['tokens_per_sample']:12}{r['tokens']:14.0f}{r['ms']:14.1f}{r['us_per_token']:12.1f}"
        f"{100 * r['peak_share']:12.0f}%"
    )


def pauses(run: Run, corpus: Corpus, dataset, rounds: int) -> dict:
    """How long training waits for a checkpoint, against torch.save of the same state, in turn; the first save makes the
    memory that the later ones use again."""
    source, saver, rows = endless(run, dataset), checkpoint.Saver(run.device), []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "checkpoint_last.pt"
        for _ in range(rounds + 1):
            update(run, next(source))
            state = {**contents(run, corpus, {}), "log": {}}
            pause = timed(run.device, lambda: saver.start(state, path))
            whole = pause + timed(run.device, saver.finish)
            rows.append((pause, whole, timed(run.device, lambda: torch.save(state, Path(folder) / "plain.pt"))))
        size = path.stat().st_size
    source.close()
    first, later = rows[0], [statistics.median(column) for column in zip(*rows[1:])]
    return dict(
        bytes=size,
        first_pause_s=first[0],
        pause_s=later[0],
        whole_s=later[1],
        torch_save_s=later[2],
        pause_share=statistics.median(pause / plain for pause, _, plain in rows[1:]),
    )


def print_pauses(r: dict):
    print(f"{'state':16} {r['bytes'] / 2**20:,.0f} MiB")
    print(f"{'training waits':16} {r['pause_s']:.2f} s ({r['first_pause_s']:.2f} s for the first save)")
    print(f"{'written after':16} {r['whole_s']:.2f} s, checksum and fsync included")
    print(f"{'torch.save':16} {r['torch_save_s']:.2f} s, of which training waits {100 * r['pause_share']:.0f}%")


# ---------------------------------------------------------------------------------------------- the command


def synthetic(cfg: Config, folder: Path, vocabulary: int, **changes) -> tuple[Config, Corpus]:
    """The settings on a corpus of full random blocks in `folder`."""
    data = dataclasses.replace(cfg.data, data_path=str(folder), sample_break_mode="none", **changes)
    blocks = max(1, data.max_tokens // data.tokens_per_sample) * cfg.train.update_freq * 8
    synthetic_corpus(folder, data.tokens_per_sample, blocks, vocabulary)
    cfg = dataclasses.replace(cfg, data=data)
    return cfg, Corpus(data)


def positive_ints(text: str) -> list[int]:
    return [config.whole_number(part) for part in text.split(",")]


def main(argv: list | None = None) -> int:
    def extra(parser):
        parser.add_argument("--compare", action="store_true", help="measure beside the same step written plainly")
        parser.add_argument("--peer", choices=["transformers"], help="measure beside the same step around that library")
        parser.add_argument("--sweep", action="store_true", help="measure over lengths and tokens in a batch")
        parser.add_argument("--sweep_lengths", type=positive_ints, default=[64, 128, 512], help="tokens in a block")
        parser.add_argument("--sweep_tokens", type=positive_ints, default=[1280, 4096, 8192], help="tokens in a batch")
        parser.add_argument("--checkpoint", action="store_true", help="measure the pause for a checkpoint")
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
    data = parts[0]
    if args.loader:
        rows = bench_data.loader(data)
        bench_data.print_loader(rows)
        print(json.dumps(dict(loader=rows, data=data.data_path)))
        return 0
    if args.startup:
        if min(args.sentences, default=0) < 100:
            raise InputError("--sentences: numbers of at least 100, such as 1.8e6,1e7")
        rows = bench_data.startup(data, [int(n) for n in args.sentences], args.vocabulary)
        bench_data.print_startup(rows)
        print(json.dumps(dict(startup=rows, tokens_per_sample=data.tokens_per_sample)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        # the check of the settings wants a dataset's name; a synthetic one gets its own
        cfg = Config(dataclasses.replace(data, data_path=data.data_path or folder), *parts[1:])
        device = open_device(cfg.device)
        try:
            result = bench(cfg, device, Path(folder), args, synthetic_data=not data.data_path)
        finally:
            device.close()
    if device.rank == 0:
        print(json.dumps(result))
    return 0


def bench(cfg: Config, device: Device, folder: Path, args, synthetic_data: bool) -> dict:
    """Measure what is asked for and print its table."""
    result = dict(
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
        updates=args.updates,
        warmup=args.warmup,
        data="synthetic" if synthetic_data else cfg.data.data_path,
    )
    if device.rank == 0:
        print(
            f"{'device':16} {device.world_size} x {device.type} ({device.name}), amp {device.amp_name},"
            f" torch {torch.__version__}"
        )
    if args.sweep:
        return result | dict(sweep=sweep(cfg, device, args.sweep_lengths, args.sweep_tokens, args))
    cfg, corpus = synthetic(cfg, folder, args.vocabulary) if synthetic_data else (cfg, Corpus(cfg.data))
    dataset, run = corpus.split("train"), Run(cfg, device, len(corpus.dictionary))
    result["parameters"] = sum(p.numel() for p in run.parameters)
    if args.compare or args.peer:
        other = (Transformers if args.peer else Plain)(run, len(corpus.dictionary))
        figures = compare(run, dataset, other, args.warmup, args.updates)
        show = functools.partial(print_compare, other=args.peer or "plain")
    elif args.checkpoint:
        figures = pauses(run, corpus, dataset, args.updates)
        show = print_pauses
    else:
        figures = measure(run, dataset, args.warmup, args.updates)
        show = print_table
    result |= figures
    if device.rank == 0:
        show(result)
    return result


def print_table(r: dict):
    for name, text in (
        ("update", f"{r['blocks']:g} blocks, {r['tokens']:g} tokens; {r['parameters']:,} parameters"),
        ("FPS", f"{r['fps']:.2f} blocks/s"),
        ("tokens/s", f"{r['wps']:.0f}"),
        ("updates/s", f"{r['ups']:.3f}"),
        ("ms an update", f"{r['ms']:.1f} (median of {r['updates']}; {r['ms_fastest']:.1f} to {r['ms_slowest']:.1f})"),
        *((f"  {part}", f"{ms:.1f}") for part, ms in r["ms_parts"].items()),
        ("model TFLOP/s", f"{r['model_tflops']:.3f}"),
        ("matmul TFLOP/s", f"{r['matmul_peak_tflops']:.3f}; the model reaches {100 * r['peak_share']:.0f}% in turn"),
        ("peak memory", f"{r['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ):
        print(f"{name:16} {text}")


if __name__ == "__main__":
    config.program(main)
