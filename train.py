"""Pretrain data2vec-text: what one run does.

    python train.py --data_path DIR                                     fairseq's base model
    python train.py --data_path DIR --config_name tiny                  a small one, for a look
    torchrun --nproc_per_node 8 train.py --data_path DIR                several devices of one machine

The same command again continues from checkpoint_last.pt in --save_dir. Figures go to train.jsonl there.
"""

import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from device import LOWEST_LOSS_SCALE, Device, DeviceConfig, open_device  # first: it has a word with torch before torch is imported

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import config
import ema
from config import InputError, RunError, option
from data import BlockDataset, Corpus, DataConfig
from ema import EmaConfig
from model import Data2VecText, ModelConfig, data2vec_loss, teacher_targets


@dataclass(frozen=True)
class TrainConfig:
    fairseq_exact: bool = option(False, "the released code bug for bug")
    lr: float = option(2e-4, "highest learning rate", low=0)
    warmup_updates: int = option(10000, "updates of linear warm-up", low=0)
    max_update: int = option(1_000_000, "updates in all; the cosine schedule ends there", low=1)
    max_epoch: int = option(0, "stop after this many epochs (0: no limit)", low=0)
    update_freq: int = option(1, "batches that make one update, per worker", low=1)
    clip_norm: float = option(5.0, "largest global gradient norm (0: no clipping)", low=0)
    adam_betas: tuple = option((0.9, 0.98), "Adam's decays", low=0, below=1)
    adam_eps: float = option(1e-6, "Adam's epsilon, beside the uncorrected second moment as in fairseq", above=0)
    weight_decay: float = option(0.01, "decoupled weight decay, on all parameters", low=0)
    log_interval: int = option(200, "updates between two log lines", low=1)
    disable_validation: bool = option(False, "never validate; no valid split is needed")
    validate_interval: int = option(1, "epochs between two validations (0: not at epoch ends)", low=0)
    validate_interval_updates: int = option(0, "updates between two validations (0: not by updates)", low=0)
    save_interval: int = option(1, "epochs between two checkpoints (0: not at epoch ends)", low=0)
    save_interval_updates: int = option(50000, "updates between two kept checkpoints, with a validation (0: none)", low=0)
    keep_interval_updates: int = option(1, "how many of those to keep (-1: all)", low=-1)
    save_dir: str = option("checkpoints", "where checkpoints and train.jsonl go")
    init_from: str = option("", "start from the weights and teacher of this checkpoint, ours or fairseq's")

    def check(self):
        if len(self.adam_betas) != 2:
            raise InputError(f"--adam_betas {self.adam_betas}: two numbers, such as 0.9,0.98")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    data: DataConfig
    model: ModelConfig
    ema: EmaConfig
    device: DeviceConfig
    train: TrainConfig

    def __post_init__(self):
        for part in (self.data, self.model, self.train):
            part.check()
        if self.data.tokens_per_sample > self.model.max_source_positions:
            raise InputError(
                f"--tokens_per_sample {self.data.tokens_per_sample} is above --max_source_positions"
                f" {self.model.max_source_positions}, the length of the position table"
            )

    def flat(self) -> dict:
        return {k: v for part in dataclasses.fields(self) for k, v in vars(getattr(self, part.name)).items()}


PARTS = [part.type for part in dataclasses.fields(Config)]


def lr_at(updates: int, cfg: TrainConfig) -> float:
    """Learning rate of the update that follows `updates` finished ones: linear warm-up from 0, then cosine to 0."""
    if updates < cfg.warmup_updates:
        return cfg.lr * updates / cfg.warmup_updates
    done = (updates - cfg.warmup_updates) / max(1, cfg.max_update - cfg.warmup_updates)
    return 0.5 * cfg.lr * (1 + math.cos(math.pi * done))


class Run:
    """The state of a run: student, teacher, optimizer, and how far it has come."""

    def __init__(self, cfg: Config, device: Device, vocabulary_size: int):
        self.cfg, self.device = cfg, device
        device.seed(cfg.data.seed)  # every worker begins with the same weights
        self.student = Data2VecText(cfg.model, vocabulary_size, device.gelu()).to(device.torch_device).train()
        self.teacher = ema.make_teacher(self.student.encoder)
        self.parameters = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, betas=cfg.train.adam_betas, weight_decay=cfg.train.weight_decay,
            fused=device.adamw_is_fused(),
        )  # fmt: skip
        self.scaler = device.scaler(cfg.train.update_freq)
        self.num_updates = self.teacher_updates = 0  # updates of the student, and those the teacher has taken in
        self.epoch, self.batches_done = 1, 0  # the data position: this worker's batches done in this epoch
        self.best_loss = None

    def move_teacher(self):
        """Bring the teacher up to the student's updates, once for each."""
        if self.teacher_updates < self.num_updates:
            ema.step(self.teacher, self.student.encoder, ema.decay_at(self.num_updates, self.cfg.ema), self.cfg.ema)
            self.teacher_updates = self.num_updates


@dataclass
class Update:
    """What one update did. Tensors stay on the device until a log line asks for them."""

    loss: torch.Tensor  # sum over the masked places, all workers'
    gnorm: torch.Tensor  # before clipping
    counts: torch.Tensor  # int64 (sample_size, nsentences, ntokens), all workers'
    lr: float
    ema_decay: float  # of the step that made this update's teacher
    pair: tuple | None  # the last batch's (prediction, target)


def update(run: Run, batches: list, mark=lambda part: None) -> Update | None:
    """One optimizer step over this worker's `batches` (host batches; none for a worker that has run out).

    Returns None if the loss scaler skipped the step. mark(name) is called behind each part, for the benchmark.
    """
    cfg, device = run.cfg, run.device
    lr, decay = lr_at(run.num_updates, cfg.train), ema.decay_at(run.num_updates, cfg.ema)
    # dropout of update n is the same whether or not the run was interrupted before it
    # differs from fairseq: workers draw different dropout, where its workers all draw the same
    device.seed(cfg.data.seed + run.num_updates + (0 if cfg.train.fairseq_exact else 1_000_003 * device.rank))
    run.move_teacher()  # does nothing, unless fairseq_exact left it one update behind
    mark("ema")

    loss, counts, pair = torch.zeros((), device=device.torch_device), [0, 0, 0], None
    for batch in batches:
        counts = [a + b for a, b in zip(counts, (batch.sample_size, batch.nsentences, batch.ntokens))]
        batch = device.upload(batch)
        mark("data")
        with device.autocast():
            target = teacher_targets(
                run.teacher, cfg.model, batch.target, batch.target_places, batch.target_padded, batch.source.shape[1]
            )  # (M, C)
            mark("teacher")
            prediction = run.student(batch.source, batch.masked, batch.source_padded)  # (M, C)
            part = data2vec_loss(prediction, target, cfg.model)
        mark("student")
        run.scaler.scale(part).backward()
        mark("backward")
        loss += part.detach()
        pair = prediction.detach(), target

    if not batches:
        run.scaler.scale(loss)  # a scaler that has scaled nothing refuses to go on
    for p in run.parameters:  # a worker without a batch still takes part
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    run.scaler.unscale_(run.optimizer)
    grads = [p.grad for p in run.parameters]
    sample_size, counts = counts[0], torch.tensor(counts)
    if device.world_size > 1:
        counts = device.all_reduce(device.tensor(counts.numpy()))
        sample_size = counts[0].clamp(min=1)
        flat = device.all_reduce(torch.cat([loss.view(1), *(g.flatten() for g in grads)]))
        loss, flat = flat[0], flat[1:].split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(flat, grads)])
    gnorm = normalize_and_clip(grads, sample_size, cfg.train.clip_norm)

    group = run.optimizer.param_groups[0]
    group["lr"] = lr
    # fairseq adds eps to the uncorrected second moment's root, torch to the corrected one's
    group["eps"] = cfg.train.adam_eps / math.sqrt(1 - cfg.train.adam_betas[1] ** (run.num_updates + 1))
    scale = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    mark("optimizer")
    if run.scaler.get_scale() < scale:  # gradients overflowed in float16: not an update
        return None
    run.num_updates += 1
    if not cfg.train.fairseq_exact:  # there the teacher waits for the next update, also while validating and saving
        run.move_teacher()
    mark("ema")
    return Update(loss, gnorm, counts, lr, decay, pair)


def normalize_and_clip(grads: list, sample_size, clip_norm: float) -> torch.Tensor:
    """Divide summed gradients by the number of masked places (int or tensor ()) and clip them, in place and without asking the device.

    Returns the global norm before clipping.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    factor = torch.ones_like(norm) / (sample_size or 1 if isinstance(sample_size, int) else sample_size)
    norm = norm * factor
    if clip_norm > 0:
        factor = factor * (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, factor)
    return norm


# ---------------------------------------------------------------------------------------------- figures


def moments(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sums over the M places from which `quality` makes its figures, (6, C) float32; sums of several batches add up."""
    p, t = prediction.float(), target.float()
    unit = F.normalize(t, dim=-1)
    cosine = F.normalize(p, dim=-1) * unit
    return torch.stack([x.sum(0) for x in (p, p.square(), t, t.square(), unit, cosine)])


def quality(sums: torch.Tensor, count: int) -> dict:
    """What the loss cannot tell. Variances are over the masked places, averaged over channels: near 0 is a collapse.

    cosine: mean cosine of prediction and target; cosine_constant: what always predicting the mean target would get.
    """
    p, p2, t, t2, unit, cosine = (sums.double().cpu() / max(1, count)).unbind()
    constant = float((F.normalize(t, dim=0) * unit).sum())
    return dict(
        target_var=float((t2 - t.square()).clamp(min=0).mean()),
        pred_var=float((p2 - p.square()).clamp(min=0).mean()),
        cosine=float(cosine.sum()),
        cosine_constant=constant,
    )


@torch.no_grad()
def evaluate(run: Run, dataset: BlockDataset) -> dict:
    """Validation loss per masked place and the figures of `quality`, over all workers. Dropout is off, masks are fixed."""
    device, cfg = run.device, run.cfg.model
    run.student.eval()
    loss = torch.zeros((), device=device.torch_device)
    sums = torch.zeros(6, cfg.embed_dim, device=device.torch_device)
    sample_size = batches = 0
    for ids in dataset.epoch_batches(1, device.rank, device.world_size):
        if len(ids) == 0:
            continue
        host = dataset.batch(ids, 1)
        batch = device.upload(host)
        with device.autocast():
            target = teacher_targets(
                run.teacher, cfg, batch.target, batch.target_places, batch.target_padded, batch.source.shape[1]
            )
            prediction = run.student(batch.source, batch.masked, batch.source_padded)
            loss += data2vec_loss(prediction, target, cfg)
        sums += moments(prediction, target)
        sample_size, batches = sample_size + host.sample_size, batches + 1
    run.student.train()
    counts = torch.tensor([sample_size, batches], device=device.torch_device)
    for tensor in (loss, sums, counts):
        device.all_reduce(tensor)
    sample_size, batches = counts.tolist()
    if sample_size == 0:
        raise InputError(f"{dataset.stream.folder}: {dataset.split} has nothing masked; is --mask_prob too small?")
    return dict(loss=float(loss) / sample_size, sample_size=sample_size, batches=batches, **quality(sums, sample_size))


class Log:
    """Averages over a log interval; train.jsonl, and a line or a progress bar for a person. Only rank 0 writes."""

    def __init__(self, run: Run, path: Path):
        self.run, self.path, self.begin = run, path, time.perf_counter()
        if path.exists():  # what an interrupted run logged after its last checkpoint will be logged again
            rows = [row for row in path.read_text().splitlines() if _updates_of(row) <= run.num_updates]
            checkpoint.write_text(path, "".join(row + "\n" for row in rows))
        self.bar = None
        if run.device.rank == 0 and sys.stderr.isatty():
            self.bar = tqdm(total=run.cfg.train.max_update, initial=run.num_updates, unit="update", dynamic_ncols=True)
        self.reset()

    def reset(self):
        self.loss = self.gnorm = self.counts = 0
        self.updates, self.since = 0, time.perf_counter()

    def add(self, done: Update):
        self.loss, self.gnorm, self.counts = self.loss + done.loss, self.gnorm + done.gnorm, self.counts + done.counts
        self.updates += 1
        if self.bar is not None:
            self.bar.update()

    def write(self, done: Update, epoch: int):
        """One row: means per update over the interval (the loss per masked place), lr and the like of the last one."""
        run = self.run
        sample_size, nsentences, ntokens = self.counts.tolist()
        pred = done.pair or (torch.zeros(0, run.cfg.model.embed_dim, device=run.device.torch_device),) * 2
        sums = torch.cat([moments(*pred).flatten(), torch.tensor([float(len(pred[0]))], device=run.device.torch_device)])
        run.device.all_reduce(sums)
        figures = quality(sums[:-1].view(6, -1), int(sums[-1]))
        loss, gnorm = float(self.loss), float(self.gnorm)  # the interval's first wait for the device
        seconds = time.perf_counter() - self.since
        row = dict(
            loss=loss / max(1, sample_size), sample_size=sample_size / self.updates, nsentences=nsentences / self.updates,
            ntokens=ntokens / self.updates, gnorm=gnorm / self.updates, lr=done.lr, ema_decay=done.ema_decay,
            loss_scale=run.scaler.get_scale(), target_var=figures["target_var"], pred_var=figures["pred_var"],
            num_updates=run.num_updates, epoch=epoch, fps=nsentences / seconds, ups=self.updates / seconds,
            wps=ntokens / seconds, wall=time.perf_counter() - self.begin,
        )  # fmt: skip
        self.row(row)
        if not math.isfinite(row["loss"]):
            raise RunError(f"the loss is {row['loss']} at update {run.num_updates}; lower --lr or --clip_norm, or use bf16")
        self.reset()

    def row(self, row: dict):
        if self.run.device.rank:
            return
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")
        if self.bar is not None and "loss" in row:
            self.bar.set_postfix_str(f"epoch {row['epoch']} loss {row['loss']:.3f} gnorm {row['gnorm']:.2f} lr {row['lr']:.2e}"
                                     f" ema {row['ema_decay']:.4f} var {row['target_var']:.2f}/{row['pred_var']:.2f}"
                                     f" fps {row['fps']:.0f} wps {row['wps']:.0f}")  # fmt: skip
        else:
            hidden = ("num_updates", "sample_size", "nsentences", "ntokens", "wall")
            shown = dict(update=row["num_updates"], **{k: v for k, v in row.items() if k not in hidden})
            self.say(" | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()))

    def say(self, text: str):
        if self.run.device.rank == 0:
            tqdm.write(text) if self.bar is not None else print(text, flush=True)


def _updates_of(row: str) -> float:
    try:
        return json.loads(row)["num_updates"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a row that a crash cut short


# ---------------------------------------------------------------------------------------------- start and stop


def contents(run: Run, corpus: Corpus, fingerprint: dict) -> dict:
    """Everything that a resume needs."""
    return dict(
        config=run.cfg.flat(),
        dictionary=dict(size=len(corpus.dictionary), digest=corpus.dictionary.digest(), mask_id=corpus.dictionary.mask_id),
        student=run.student.state_dict(),
        teacher=run.teacher.state_dict(),
        optimizer=run.optimizer.state_dict(),
        scaler=run.scaler.state_dict(),
        rng=run.device.rng_state(),
        progress=dict(
            num_updates=run.num_updates, teacher_updates=run.teacher_updates, epoch=run.epoch, batches=run.batches_done,
            world_size=run.device.world_size, best_loss=run.best_loss, data=fingerprint,
        ),
    )  # fmt: skip


def check_dictionary(loaded: checkpoint.Loaded, corpus: Corpus, path):
    saved = loaded.content.get("dictionary")
    if saved and saved["digest"] != corpus.dictionary.digest():
        raise InputError(
            f"{path}: trained with another dictionary ({saved['size']} symbols; {corpus.folders[0] / 'dict.txt'} has"
            f" {len(corpus.dictionary)})" + (" in another order" if saved["size"] == len(corpus.dictionary) else "")
        )


# Settings that may change when a run goes on: they decide neither the model nor which batch comes next.
FREE_TO_CHANGE = {
    "data_path", "device", "amp", "lr", "warmup_updates", "max_update", "max_epoch", "clip_norm", "weight_decay",
    "log_interval", "disable_validation", "validate_interval", "validate_interval_updates", "save_interval",
    "save_interval_updates", "keep_interval_updates", "save_dir", "init_from",
}  # fmt: skip


def resume(run: Run, corpus: Corpus, fingerprint: dict, path):
    """Continue from a checkpoint of this project. Raises InputError if it belongs to another run."""
    loaded = checkpoint.load(path)
    if loaded.kind != "ours":
        raise InputError(f"{path}: a fairseq file; start from it with --init_from")
    check_dictionary(loaded, corpus, path)
    progress, now = loaded.content["progress"], run.cfg.flat()
    saved = {**loaded.config, "world_size": progress["world_size"], **progress["data"]}
    now = {**now, "world_size": run.device.world_size, **fingerprint}
    changed = [k for k in saved if k not in FREE_TO_CHANGE and saved[k] != now.get(k)]
    if changed:
        raise InputError(
            f"{path} belongs to another run: " + ", ".join(f"{k} was {saved[k]}, is {now.get(k)}" for k in changed)
            + "; use the old settings, another --save_dir, or --init_from"
        )  # fmt: skip
    checkpoint.put(loaded.student, run.student, "the student", path)
    checkpoint.put(loaded.teacher, run.teacher, "the teacher", path)
    run.optimizer.load_state_dict(loaded.content["optimizer"])
    if run.scaler.is_enabled() and loaded.content["scaler"]:
        run.scaler.load_state_dict({**run.scaler.state_dict(), **loaded.content["scaler"]})
    run.device.set_rng_state(loaded.content["rng"])
    run.num_updates, run.teacher_updates = progress["num_updates"], progress["teacher_updates"]
    run.epoch, run.batches_done, run.best_loss = progress["epoch"], progress["batches"], progress["best_loss"]


def init_from(run: Run, corpus: Corpus, loaded: checkpoint.Loaded, path):
    """Take the weights and the teacher of any readable checkpoint; the optimizer and the schedule begin anew."""
    check_dictionary(loaded, corpus, path)
    if not any(name.startswith("regression_head.") for name in loaded.student):
        print(f"warning: {path} has no regression head; it starts from random weights", file=sys.stderr)
        loaded.student.update({k: v for k, v in run.student.state_dict().items() if k.startswith("regression_head.")})
    checkpoint.put(loaded.student, run.student, "the student", path)
    checkpoint.put(
        loaded.teacher if loaded.teacher is not None else run.student.encoder.state_dict(), run.teacher, "the teacher", path
    )


def prepare_save_dir(folder: Path, args) -> Path | None:
    """Make the directory; the checkpoint to resume from, if there is one. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--save_dir {folder}: {e.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"--save_dir {folder}: not writable")
    last = folder / "checkpoint_last.pt"
    old = sorted(p.name for p in folder.iterdir() if p.name.startswith("checkpoint_") or p.name == "train.jsonl")
    if args.no_resume:
        if old and not args.overwrite:
            raise InputError(f"--no_resume: {folder} holds {old[0]}; add --overwrite to lose it, or choose another --save_dir")
        return None
    if not last.exists() and any(name.endswith(".pt") for name in old):
        raise InputError(f"{folder} holds {old[0]} but no checkpoint_last.pt; use --init_from, another --save_dir or --overwrite")
    return last if last.exists() else None


def describe_start(run: Run, train: BlockDataset, log: Log):
    device, cfg = run.device, run.cfg
    log.say(f"config {json.dumps(cfg.flat())}")
    parameters = sum(p.numel() for p in run.parameters)
    log.say(
        f"{device.world_size} x {device.type} ({device.name}), amp {device.amp_name} | {parameters:,} parameters"
        f" | {len(train.lengths):,} blocks in {len(train.batch_ends):,} batches an epoch"
    )
    too_long, remainder = train.dropped_tokens()
    percent = 100 * (too_long + remainder) / max(1, train.stream.tokens)
    advice = "; --long_sentences split --drop_remainder false keep all" if percent else ""
    log.say(
        f"{'warning: ' if percent > 1 else ''}{percent:.2f}% of the training tokens are never seen"
        f" ({too_long:,} in too long blocks, {remainder:,} in the remainder){advice}"
    )
    if cfg.train.warmup_updates >= cfg.train.max_update:
        log.say(f"note: the learning rate is still warming up at the last of {cfg.train.max_update} updates")


def epoch_updates(run: Run, dataset: BlockDataset):
    """The rest of the current epoch, an update at a time: (this worker's host batches, how many batches that took, whether
    it is the epoch's last). An update never crosses an epoch's end."""
    device, freq = run.device, run.cfg.train.update_freq
    todo = dataset.epoch_batches(run.epoch, device.rank, device.world_size)[run.batches_done :]
    for first in range(0, len(todo), freq):
        part = todo[first : first + freq]
        yield [dataset.batch(ids, run.epoch) for ids in part if len(ids)], len(part), first + freq >= len(todo)


def train(cfg: Config, device: Device, args) -> dict:
    """The run from start, or from where it was interrupted, to its end. Returns the last validation's figures."""
    t, folder = cfg.train, Path(cfg.train.save_dir)
    corpus = Corpus(cfg.data)
    dataset = corpus.split("train", 1)
    valid = None if t.disable_validation else corpus.split("valid")
    fingerprint = dict(sentences=len(dataset.stream.sizes), tokens=dataset.stream.tokens, batches=len(dataset.batch_ends))
    last = prepare_save_dir(folder, args)
    run = Run(cfg, device, len(corpus.dictionary))
    if last:
        resume(run, corpus, fingerprint, last)
    elif t.init_from:
        init_from(run, corpus, checkpoint.load(t.init_from), t.init_from)
    device.barrier()  # nobody reads the directory any more
    if not last and device.rank == 0:
        for old in [*folder.glob("checkpoint_*.pt"), *folder.glob("train.jsonl")]:
            old.unlink()
    log = Log(run, folder / "train.jsonl")
    describe_start(run, dataset, log)
    if last:
        log.say(f"continuing {last} behind update {run.num_updates}, epoch {run.epoch}")

    def finished():
        return run.num_updates >= t.max_update or 0 < t.max_epoch < run.epoch

    figures = {}

    def validate_and_save(epoch: int, epoch_end: bool, fresh: bool):
        nonlocal figures
        begin = time.perf_counter()

        def due(updates, epochs):
            by_updates = fresh and updates and run.num_updates % updates == 0
            return by_updates or finished() or (epoch_end and epochs and epoch % epochs == 0)

        save_now, keep = due(t.save_interval_updates, t.save_interval), t.save_interval_updates
        best = False
        if valid and (save_now or due(t.validate_interval_updates, t.validate_interval)):
            figures = evaluate(run, valid)
            best = run.best_loss is None or figures["loss"] < run.best_loss
            run.best_loss = figures["loss"] if best else run.best_loss
            log.row(dict(valid_loss=figures["loss"], valid_best_loss=run.best_loss,
                         **{f"valid_{k}": figures[k] for k in ("target_var", "pred_var", "cosine", "cosine_constant")},
                         num_updates=run.num_updates, epoch=epoch))  # fmt: skip
            save_now = save_now or best
        if save_now and device.rank == 0:
            also = [folder / "checkpoint_best.pt"] if best else []
            if keep and run.num_updates % keep == 0 and fresh:
                also.append(folder / f"checkpoint_{epoch}_{run.num_updates}.pt")
            checkpoint.save(contents(run, corpus, fingerprint), folder / "checkpoint_last.pt", *also)
            checkpoint.prune(folder, t.keep_interval_updates)
        log.since += time.perf_counter() - begin  # not training time

    while not finished():
        dataset, epoch = corpus.split("train", run.epoch), run.epoch
        for batches, taken, epoch_end in epoch_updates(run, dataset):
            done = update(run, batches)
            run.epoch, run.batches_done = (epoch + 1, 0) if epoch_end else (epoch, run.batches_done + taken)
            if done is not None:
                log.add(done)
                if run.num_updates % t.log_interval == 0 or finished():
                    log.write(done, epoch)
            elif run.scaler.get_scale() < LOWEST_LOSS_SCALE:
                raise RunError("gradients overflow float16 at any loss scale; lower --lr, or use --amp bf16")
            validate_and_save(epoch, epoch_end, fresh=done is not None)
            if finished():
                break
    if log.bar is not None:
        log.bar.close()
    return figures


def main(argv: list | None = None) -> int:
    def extra(parser):
        parser.add_argument("--no_resume", action="store_true", help="start over; --save_dir must be empty")
        parser.add_argument("--overwrite", action="store_true", help="with --no_resume: remove the old run in --save_dir")
        parser.add_argument("--distributed_world_size", type=int, help="workers; must agree with torchrun's")

    parts, args = config.parse(PARTS, __doc__, argv, extra=extra)
    cfg = Config(*parts)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.distributed_world_size not in (None, world_size):
        raise InputError(
            f"distributed_world_size {args.distributed_world_size}, but there is {world_size} worker;"
            f" start with: torchrun --nproc_per_node {args.distributed_world_size} train.py ..."
        )
    device = open_device(cfg.device)
    try:
        figures = train(cfg, device, args)
    finally:
        device.close()
    if device.rank == 0 and figures:
        print(f"valid loss {figures['loss']:.4f}, cosine of prediction and target {figures['cosine']:.4f}"
              f" (always predicting the mean: {figures['cosine_constant']:.4f}) | {cfg.train.save_dir}/checkpoint_last.pt")  # fmt: skip
    return 0


if __name__ == "__main__":
    config.program(main)
