"""Pretrain data2vec-text: what one run does.

    python train.py --data_path DIR                                     fairseq's base model
    python train.py --data_path DIR --config_name tiny                  a small one, for a look
    torchrun --nproc_per_node 8 train.py --data_path DIR                several devices of one machine

The same command again continues from checkpoint_last.pt in --save_dir. Figures go to train.jsonl there.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# first: device has a word with torch before torch is imported
from device import (  # isort: split
    LOWEST_LOSS_SCALE,
    PROFILE_FROM,
    Device,
    DeviceConfig,
    open_device,
    worker,
)

import torch

import config
import ema
from config import InputError, RunError, option, printable
from data import (
    Batch,
    BlockDataset,
    Corpus,
    DataConfig,
    TokenFile,
    prefetch,
    queries_of,
)
from ema import EmaConfig
from fast.vectors import Flat, Stretches
from model import Data2VecText, ModelConfig, data2vec_loss, teacher_targets
from runtime import checkpoint
from runtime.guard import GuardConfig, Health, Lock, Signals
from runtime.log import Log, moments, quality


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
    compile: bool = option(False, "let torch.compile fuse the encoder's layers; the first updates take a minute")
    log_interval: int = option(200, "updates between two log lines", low=1)
    disable_validation: bool = option(False, "never validate; no valid split is needed")
    validate_interval: int = option(1, "epochs between two validations (0: not at epoch ends)", low=0)
    validate_interval_updates: int = option(0, "updates between two validations (0: not by updates)", low=0)
    save_interval: int = option(1, "epochs between two checkpoints (0: not at epoch ends)", low=0)
    save_interval_updates: int = option(
        50000, "updates between two kept checkpoints, with a validation (0: none)", low=0
    )
    keep_interval_updates: int = option(1, "how many of those to keep (-1: all)", low=-1)
    save_dir: str = option("checkpoints", "where checkpoints and train.jsonl go")
    tensorboard_logdir: str = option("", "where TensorBoard curves go, under fairseq's names; needs tensorboard")
    npu_profile: int = option(0, "write torch_npu's profile of this many updates into --save_dir; on an NPU", low=0)
    init_from: str = option("", "start from the weights and teacher of this checkpoint, ours or fairseq's")

    def check(self):
        if len(self.adam_betas) != 2:
            raise InputError(f"--adam_betas {self.adam_betas}: two numbers, such as 0.9,0.98")
        if not self.save_dir:
            raise InputError("--save_dir is empty; the current folder is called .")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    data: DataConfig
    model: ModelConfig
    ema: EmaConfig
    device: DeviceConfig
    guard: GuardConfig
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
        student = Data2VecText(cfg.model, vocabulary_size, device.kernels(cfg.train.compile))
        self.student = student.to(device.torch_device).train()
        self.teacher = ema.make_teacher(self.student.encoder)
        if device.wants_flat_weights:
            if cfg.train.compile:
                raise InputError(f"--compile is not for an {device.type}, where layers run in eager mode")
            self.predict, self.reader = Flat(self.student, device.amp), Flat(self.teacher, device.amp)
            self.parameters = self.predict.vectors
            self.averaged = Stretches(self.reader), Stretches(self.predict, "encoder.")
        else:
            self.predict = self.student
            self.reader = ema.make_reader(self.teacher, device.amp)  # the teacher in the precision that it computes in
            self.parameters = list(self.student.parameters())
            self.averaged = self.teacher, self.student.encoder
        if cfg.train.compile:
            for layer in (*self.student.encoder.layers, *self.reader.layers):
                layer.compile(dynamic=True)  # in place: names and weights stay what they are
        self.optimizer = device.adamw(self.parameters, betas=cfg.train.adam_betas, weight_decay=cfg.train.weight_decay)
        self.scaler = device.scaler(cfg.train.update_freq)
        self.loss_scale = self.scaler.get_scale()  # kept on the host: asking for it waits for the device
        self.num_updates = self.teacher_updates = 0  # updates of the student, and those the teacher has taken in
        self.epoch, self.batches_done = 1, 0  # the data position: this worker's batches done in this epoch
        self.best_loss = None
        self.skipped = 0  # updates known to have left the weights alone

    def move_teacher(self):
        """Bring the teacher up to the student's updates, once for each."""
        if self.teacher_updates < self.num_updates:
            ema.step(*self.averaged, ema.decay_at(self.num_updates, self.cfg.ema), self.cfg.ema)
            self.refresh_reader()
            self.teacher_updates = self.num_updates

    def load(self, student: dict, teacher: dict | None, path):
        """Take the weights of two state dicts; without a teacher's, it is the student's encoder again. Raises
        InputError if they do not fit; `path` is where they are from."""
        checkpoint.put(student, self.student, "the student", path)
        checkpoint.put(teacher or self.student.encoder.state_dict(), self.teacher, "the teacher", path)
        self.refresh_reader()

    def refresh_reader(self):
        if not isinstance(self.reader, Flat):  # which casts at each use, in one kernel
            ema.refresh(self.reader, self.teacher)

    def optimizer_state(self) -> dict:
        """That of torch's AdamW of the student's parameters, whatever optimizer runs here."""
        content = self.optimizer.state_dict()
        if isinstance(self.predict, Flat):
            content["state"] = self.predict.split_state(content["state"])
            content["param_groups"][0]["params"] = list(range(len(self.predict.order)))
        return content

    def load_optimizer(self, state: dict):
        """Take the moments of an `optimizer_state`; the settings stay this command's."""
        if isinstance(self.predict, Flat):
            state = self.predict.join_state(state)
        if self.device.npu_fused_adamw:  # counts in plain integers
            state = {i: {**moments, "step": int(moments["step"])} for i, moments in state.items()}
        ours = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": ours})


@dataclass
class Update:
    """What one update did. Tensors stay on the device until a log line asks for them."""

    number: int  # from 1
    epoch: int
    blocks: list  # this worker's block numbers
    loss: torch.Tensor  # sum over the masked places, all workers'
    gnorm: torch.Tensor  # before clipping
    skipped: torch.Tensor  # bool: loss or gradient was not finite, and the weights were left alone
    counts: torch.Tensor  # int64 (sample_size, nsentences, ntokens), all workers'
    pair: tuple | None  # the last batch's (prediction, target); the log lets go of it
    lr: float
    ema_decay: float  # of the step that made this update's teacher
    loss_scale: float


def forward(run: Run, host: Batch, mark=lambda part: None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One host batch through teacher and student: prediction and target (M, C), and the sum of their loss ()."""
    cfg, device = run.cfg.model, run.device
    batch, width = device.upload(host), host.source.shape[1]
    queries = [device.tensor(array) for array in queries_of(host.masked, *host.source.shape)]
    mark("data")
    target = teacher_targets(
        run.reader,
        cfg,
        batch.target,
        batch.target_places,
        batch.target_padded,
        width,
        queries if run.cfg.data.teacher_input == "full" else None,  # the squeezed input is wanted at all its places
    )
    mark("teacher")
    prediction = run.predict(batch.source, batch.masked, batch.source_padded, queries)
    return prediction, target, data2vec_loss(prediction, target, cfg)


def update(run: Run, batches: list, mark=lambda part: None) -> Update | None:
    """One optimizer step over this worker's `batches` (host batches; none for a worker that has run out).

    Returns None if the loss scaler skipped the step: then it was no update. mark(name) is called behind each part, for
    the benchmark.
    """
    cfg, device = run.cfg, run.device
    lr, decay = lr_at(run.num_updates, cfg.train), ema.decay_at(run.num_updates, cfg.ema)
    # dropout of update n is the same whether or not the run was interrupted before it
    # differs from fairseq: workers draw different dropout, where its workers all draw the same
    device.seed(cfg.data.seed + run.num_updates + (0 if cfg.train.fairseq_exact else 1_000_003 * device.rank))
    run.move_teacher()  # does nothing, unless fairseq_exact left it one update behind
    mark("ema")

    loss, counts = torch.zeros((), device=device.torch_device), [0, 0, 0]
    pair = (torch.zeros(0, cfg.model.embed_dim, device=device.torch_device),) * 2
    blocks = [int(i) for batch in batches for i in batch.ids]
    # A scaler that has scaled nothing refuses to go on, as without a batch; and torch_npu's clears the chip's overflow
    # flag at the first scale(): here, so that an overflow in a forward counts too.
    run.scaler.scale(loss)
    with device.autocast():  # one for all batches: it casts the student's weights once
        for batch in batches:
            counts = [a + b for a, b in zip(counts, (batch.sample_size, batch.nsentences, batch.ntokens))]
            prediction, target, part = forward(run, batch, mark)
            mark("student")
            with device.autocast(enabled=False):
                run.scaler.scale(part).backward()
            mark("backward")
            loss += part.detach()
            pair = prediction.detach(), target

    for p in run.parameters:  # a worker without a batch still takes part
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    grads = [p.grad for p in run.parameters]
    sample_size, counts = counts[0], torch.tensor(counts)
    if device.world_size > 1:
        counts = device.all_reduce(device.tensor(counts.numpy()))
        sample_size = counts[0].clamp(min=1)
        flat = device.all_reduce(torch.cat([loss.view(1), *(g.flatten() for g in grads)]))
        loss, flat = flat[0], flat[1:].split([g.numel() for g in grads])
        if device.npu_fused_adamw:  # holds on to its gradients
            torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(flat, grads)])
        else:
            grads = [part.view_as(g) for part, g in zip(flat, grads)]
            for p, g in zip(run.parameters, grads):
                p.grad = g
    run.scaler.unscale_(run.optimizer)  # behind the sum, so that all workers see the same overflow
    gnorm, factor = norm_and_factor(grads, sample_size, cfg.train.clip_norm)
    skipped = ~torch.isfinite(gnorm + loss)

    group = run.optimizer.param_groups[0]
    fused = group.get("fused")
    group["lr"], steps = lr, run.num_updates + 1 - (run.skipped if fused else 0)
    # fairseq adds eps to the uncorrected second moment's root, torch to the corrected one's
    group["eps"] = cfg.train.adam_eps / math.sqrt(1 - cfg.train.adam_betas[1] ** steps)
    if fused and not run.scaler.is_enabled():
        # the kernel multiplies and skips on its way, by what it has for loss scalers
        run.optimizer.grad_scale, run.optimizer.found_inf = 1 / factor, skipped.float()
    else:
        torch._foreach_mul_(grads, factor)
        if not run.scaler.is_enabled():  # a scaler sees to it itself
            hide_from_step(grads, skipped)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=not device.npu_fused_adamw)
    mark("optimizer")
    scale, run.loss_scale = run.loss_scale, run.scaler.get_scale()
    if run.loss_scale < scale:  # gradients overflowed in float16
        return None
    run.num_updates += 1
    if not cfg.train.fairseq_exact:  # there the teacher waits for the next update, also while validating and saving
        run.move_teacher()
    mark("ema")
    return Update(run.num_updates, run.epoch, blocks, loss, gnorm, skipped, counts, pair, lr, decay, scale)


def hide_from_step(grads: list, skipped: torch.Tensor):
    """Make the coming step of an optimizer that cannot skip as harmless as can be where `skipped` is true, without
    asking the device: the gradient counts as zero, and only the moments' memory moves the weights."""
    for g in grads:
        g.masked_fill_(skipped, 0.0)


def norm_and_factor(grads: list, sample_size, clip_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """For summed gradients, without asking the device: the global norm of their mean over the masked places
    (sample_size is their number, int or tensor), and the factor that makes them that mean, clipped to `clip_norm` (0:
    not)."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    factor = torch.ones_like(norm) / (sample_size or 1 if isinstance(sample_size, int) else sample_size)
    norm = norm * factor
    if clip_norm > 0:
        factor = factor * (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm, factor


@torch.no_grad()
def evaluate(run: Run, dataset: BlockDataset) -> dict:
    """Validation loss per masked place and the figures of `quality`, over all workers; without dropout."""
    device, width = run.device, run.cfg.model.embed_dim
    run.student.eval()
    loss = torch.zeros((), device=device.torch_device)
    sums = torch.zeros(6, width, device=device.torch_device)
    sample_size = batches = 0
    for host in dataset.batches(dataset.epoch_batches(1, device.rank, device.world_size), 1):
        with device.autocast():
            prediction, target, part = forward(run, host)
        loss += part
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


# ---------------------------------------------------------------------------------------------- start and stop


def contents(run: Run, corpus: Corpus, fingerprint: dict) -> dict:
    """Everything that a resume needs."""
    return dict(
        config=run.cfg.flat(),
        dictionary=dict(
            size=len(corpus.dictionary), digest=corpus.dictionary.digest(), mask_id=corpus.dictionary.mask_id
        ),
        student=run.student.state_dict(),
        teacher=run.teacher.state_dict(),
        optimizer=run.optimizer_state(),
        scaler=run.scaler.state_dict(),
        rng=run.device.rng_state(),
        progress=dict(
            num_updates=run.num_updates,
            teacher_updates=run.teacher_updates,
            skipped=run.skipped,
            epoch=run.epoch,
            batches=run.batches_done,
            world_size=run.device.world_size,
            best_loss=run.best_loss,
            data=fingerprint,
        ),
    )


def check_dictionary(loaded: checkpoint.Loaded, corpus: Corpus, path):
    saved = loaded.content.get("dictionary")
    if saved and saved["digest"] != corpus.dictionary.digest():
        raise InputError(
            f"{path}: trained with another dictionary ({saved['size']} symbols; {corpus.folders[0] / 'dict.txt'} has"
            f" {len(corpus.dictionary)})" + (" in another order" if saved["size"] == len(corpus.dictionary) else "")
        )


# What a run that goes on may not change: the model, and, unless --reset_data_position, what decides which batch is
# next.
ARCHITECTURE = [f.name for f in dataclasses.fields(ModelConfig) if "dropout" not in f.name]
POSITION = [
    "sample_break_mode",
    "tokens_per_sample",
    "long_sentences",
    "max_tokens",
    "batch_size",
    "seed",
    "required_batch_size_multiple",
    "drop_remainder",
]


def find_checkpoint(folder: Path, say) -> tuple[Path, checkpoint.Loaded] | None:
    """The newest checkpoint of a save directory that can be read, if it holds any. Raises InputError if none can."""
    found = checkpoint.candidates(folder)
    if found and found[0].name != "checkpoint_last.pt":
        say(f"warning: {folder} has no checkpoint_last.pt; trying {found[0].name}")
    for path in found:
        try:
            return path, checkpoint.load(path)
        except InputError as e:
            say(f"warning: {e}; trying the next older checkpoint")
            failure = e
    if found:
        raise InputError(f"none of the {len(found)} checkpoints in {folder} can be read; the last error: {failure}")
    return None


def resume(
    run: Run, corpus: Corpus, fingerprint: dict, path: Path, loaded: checkpoint.Loaded, reset_position: bool, say
):
    """Continue from a checkpoint of this project. Raises InputError if it belongs to another run."""
    if loaded.kind != "ours":
        raise InputError(f"{path}: a fairseq file; start from it with --init_from and another --save_dir")
    check_dictionary(loaded, corpus, path)
    progress, world_size = loaded.content["progress"], run.device.world_size
    saved, now = {**loaded.config, **progress["data"]}, {**run.cfg.flat(), **fingerprint}

    def differing(names):
        return [k for k in names if k in saved and saved[k] != now.get(k)]

    def refuse(names, advice):
        shown = ", ".join(f"{k} was {saved[k]}, is {now[k]}" for k in names)
        raise InputError(f"{path} belongs to another run: {shown}; {advice}")

    if differing(ARCHITECTURE):
        refuse(differing(ARCHITECTURE), "use the old settings, or --init_from with another --save_dir")
    batches = progress["batches"] * progress["world_size"]  # of all workers
    moved = differing([*POSITION, *fingerprint])
    if batches % world_size:  # this many workers never stand at that batch
        saved["world_size"], now["world_size"] = progress["world_size"], world_size
        moved.append("world_size")
    if moved and not reset_position:
        refuse(moved, "use the old settings, or --reset_data_position to go on from the next epoch")
    unimportant = tuple("data_path init_from device npu_ log_ tensor validate_ save_ keep_ disable_".split())
    other = [k for k in differing(set(loaded.config) - set(moved)) if not k.startswith(unimportant)]
    if other:
        say(
            "note: changed since the checkpoint: " + ", ".join(f"{k} {saved[k]} -> {now.get(k)}" for k in sorted(other))
        )

    run.load(loaded.student, loaded.teacher, path)
    run.load_optimizer(loaded.content["optimizer"]["state"])
    if run.scaler.is_enabled() and loaded.content["scaler"]:
        run.scaler.load_state_dict({**run.scaler.state_dict(), **loaded.content["scaler"]})
        run.loss_scale = run.scaler.get_scale()
    run.device.set_rng_state(loaded.content["rng"])
    run.num_updates, run.teacher_updates = progress["num_updates"], progress["teacher_updates"]
    run.skipped, run.best_loss = progress["skipped"], progress["best_loss"]
    run.epoch, run.batches_done = progress["epoch"], batches // world_size
    if reset_position and run.batches_done:
        run.epoch, run.batches_done = run.epoch + 1, 0


def init_from(run: Run, corpus: Corpus, loaded: checkpoint.Loaded, path):
    """Take the weights and the teacher of any readable checkpoint; the optimizer and the schedule begin anew."""
    check_dictionary(loaded, corpus, path)
    if not any(name.startswith("regression_head.") for name in loaded.student):
        print(f"warning: {printable(str(path))} has no regression head; it starts from random weights", file=sys.stderr)
        loaded.student.update({k: v for k, v in run.student.state_dict().items() if k.startswith("regression_head.")})
    run.load(loaded.student, loaded.teacher, path)


def prepare_save_dir(folder: Path, args):
    """Make the directory and check that a fresh start in it loses nothing. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--save_dir {folder}: {e.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"--save_dir {folder}: not writable")
    if args.overwrite and not args.no_resume:
        raise InputError("--overwrite goes with --no_resume: it removes the old run in --save_dir")
    held = sorted(p.name for p in folder.iterdir() if p.name != ".lock")
    if args.no_resume and held and not args.overwrite:
        raise InputError(
            f"--no_resume: {folder} holds {held[0]}; add --overwrite to start over there, or choose another --save_dir"
        )


def remove(folder: Path, *patterns: str):
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


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
    """The rest of the current epoch, an update at a time: (this worker's host batches, how many batches that took,
    whether it is the epoch's last). An update never crosses an epoch's end."""
    device, freq = run.device, run.cfg.train.update_freq
    rest = dataset.epoch_batches(run.epoch, device.rank, device.world_size)[run.batches_done :]
    with contextlib.closing(prefetch(dataset.batches(rest, run.epoch), depth=2 * freq)) as batches:
        for first in range(0, len(rest), freq):
            part = rest[first : first + freq]
            yield [next(batches) for ids in part if len(ids)], len(part), first + freq >= len(rest)


def train(cfg: Config, device: Device, args) -> tuple[dict, int]:
    """The run from start, or from where it was interrupted, to its end or a signal.

    Returns the last validation's figures and the exit code.
    """
    t, folder = cfg.train, Path(cfg.train.save_dir)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals(echo=1.0 if device.world_size > 1 else 0.0))
        corpus = Corpus(cfg.data)
        dataset = corpus.split("train", 1)
        valid = None if t.disable_validation else corpus.split("valid")
        for other in corpus.folders[1:]:  # they are read epochs later; what is wrong with them shows now
            TokenFile(other / "train")
        fingerprint = dict(
            folders=len(corpus.folders),
            sentences=len(dataset.stream.sizes),
            tokens=dataset.stream.tokens,
            batches=len(dataset.batch_ends),
            dataset=dataset.stream.digest(),
        )
        if device.rank == 0:
            prepare_save_dir(folder, args)
            stack.callback(Lock(folder).release)
            remove(folder, "checkpoint_*.pt.tmp", "train.*jsonl.tmp")  # what a broken save left behind
        device.barrier()  # the directory is as it shall be
        run = Run(cfg, device, len(corpus.dictionary))
        log = Log(device, folder / "train.jsonl", t.tensorboard_logdir)
        stack.callback(log.close)
        found = None if args.no_resume else find_checkpoint(folder, log.say)
        if found:
            resume(run, corpus, fingerprint, *found, args.reset_data_position, log.say)
            log.restore(found[1].content["log"])
        elif t.init_from:
            init_from(run, corpus, checkpoint.load(t.init_from), t.init_from)
        if t.npu_profile:
            if device.type != "npu":
                raise InputError(f"--npu_profile: the profiler is torch_npu's, and this is {device.type}")
            last = run.num_updates + PROFILE_FROM + t.npu_profile - 1
            if last > t.max_update:
                raise InputError(f"--npu_profile {t.npu_profile} ends with update {last}, above --max_update")
        device.barrier()  # every worker has read what it needs
        if device.rank == 0 and args.no_resume:
            remove(folder, "checkpoint_*.pt", "train.jsonl")  # not before everything else has been found in order
        log.open(run.num_updates, t.max_update)
        describe_start(run, dataset, log)
        if found:
            log.say(f"continuing {found[0]} behind update {run.num_updates}, epoch {run.epoch}")
        profiled = stack.enter_context(device.profile(t.npu_profile, folder))
        return loop(run, corpus, valid, fingerprint, log, signals, profiled)


def loop(run: Run, corpus: Corpus, valid: BlockDataset | None, fingerprint: dict, log: Log, signals: Signals, profiled):
    """Update, log, validate, save, until the end or a signal. Returns (figures, exit code); raises RunError."""
    t, device, folder = run.cfg.train, run.device, Path(run.cfg.train.save_dir)
    health, figures = Health(run.cfg.guard, t.warmup_updates), {}
    saver, unsaved = checkpoint.Saver(device), None  # unsaved: what the last save failed with
    saving, best_saved = None, run.best_loss  # (update, best loss) of the save under way; the last good one's best loss

    def finished():
        return run.num_updates >= t.max_update or 0 < t.max_epoch < run.epoch

    def look_at_skipped() -> str | None:
        flags = log.read_skipped()
        run.skipped += sum(flags)
        return health.skipped(flags)

    def settle():
        """Wait for the save under way, if any. A failure loses nothing, and the next save tries again."""
        nonlocal unsaved, best_saved
        try:
            if saver.finish():
                best_saved = saving[1]
                checkpoint.prune(folder, t.keep_interval_updates)
        except OSError as e:
            run.best_loss = best_saved  # the better one's file was not written
            unsaved = f"update {saving[0]} could not be saved in {folder}: {e.strerror or e}"
            log.say(f"warning: {unsaved}; what was saved before is untouched, the next save tries again")

    def save(*also):
        """Begin to write checkpoint_last.pt and the like, in the background."""
        nonlocal unsaved, saving
        settle()
        unsaved, saving = None, (run.num_updates, run.best_loss)
        # a norm could overflow where the weights did not; isfinite() of each weight takes ten times as long
        if not torch.stack([end for p in run.parameters for end in (p.amin(), p.amax())]).isfinite().all():
            raise RunError(
                f"update {run.num_updates}: the weights are not finite, so the last checkpoint stays as it is; go on"
                " from it with a lower --lr"
            )
        look_at_skipped()
        if device.rank == 0:
            content = {**contents(run, corpus, fingerprint), "log": log.state()}
            saver.start(content, folder / "checkpoint_last.pt", *also)

    def stop(reason):
        save()
        settle()
        raise RunError(f"update {run.num_updates}: {reason} ({unsaved or f'saved update {run.num_updates}'})")

    def validate_and_save(epoch: int, epoch_end: bool, counted: bool):
        nonlocal figures

        def due(updates, epochs):
            by_updates = counted and updates and run.num_updates % updates == 0
            return by_updates or finished() or (epoch_end and epochs and epoch % epochs == 0)

        save_now, also = due(t.save_interval_updates, t.save_interval), []
        if valid and (save_now or due(t.validate_interval_updates, t.validate_interval)):
            settle()  # a failed save takes its best loss back
            figures = evaluate(run, valid)
            if math.isfinite(figures["loss"]) and (run.best_loss is None or figures["loss"] < run.best_loss):
                run.best_loss = figures["loss"]
                also.append(folder / "checkpoint_best.pt")
            log.row(
                dict(
                    valid_loss=figures["loss"],
                    valid_best_loss=run.best_loss,
                    **{f"valid_{k}": figures[k] for k in ("target_var", "pred_var", "cosine", "cosine_constant")},
                    num_updates=run.num_updates,
                    epoch=epoch,
                )
            )
        if counted and t.save_interval_updates and run.num_updates % t.save_interval_updates == 0:
            also.append(folder / f"checkpoint_{epoch}_{run.num_updates}.pt")
        if save_now or also:
            save(*also)

    def train_epoch():
        """The rest of this epoch, or less: updates with all that belongs to them."""
        dataset, epoch = corpus.split("train", run.epoch), run.epoch
        for batches, taken, epoch_end in epoch_updates(run, dataset):
            try:
                done = update(run, batches)
                profiled()
            except (RuntimeError, MemoryError) as e:
                if not device.is_out_of_memory(e):
                    raise
                shapes = ", ".join(f"{b.source.shape[0]} x {b.source.shape[1]}" for b in batches)
                raise RunError(
                    f"out of memory at update {run.num_updates + 1}: batch of {shapes} tokens, peak"
                    f" {device.peak_memory() / 2**30:.1f} GiB; lower --max_tokens (and raise --update_freq), use --amp;"
                    f" the device said: {' '.join(str(e).split())[:200]}"
                ) from None
            run.epoch, run.batches_done = (epoch + 1, 0) if epoch_end else (epoch, run.batches_done + taken)
            begin = time.perf_counter()
            if done is None:
                log.row(
                    dict(
                        overflow=True,
                        loss_scale=run.scaler.get_scale(),
                        num_updates=run.num_updates,
                        epoch=epoch,
                        blocks=[int(i) for b in batches for i in b.ids],
                    )
                )
                if run.scaler.get_scale() < LOWEST_LOSS_SCALE:
                    stop("gradients overflow float16 at any loss scale; lower --lr, or use --amp bf16")
            else:
                log.add(done)
                log_now = run.num_updates % t.log_interval == 0 or finished()
                if log_now or device.type == "cpu":  # where asking costs nothing
                    if reason := look_at_skipped():
                        stop(reason)
                if log_now:
                    if not saver.is_busy():
                        settle()
                    row = log.write()
                    if reason := health.collapsed(row, log.say):
                        stop(reason)
                    begin = time.perf_counter()
            validate_and_save(epoch, epoch_end, counted=done is not None)
            wanted_stop, wanted_save = device.agree([signals.stop, signals.save])
            signals.save = 0
            if wanted_save or (wanted_stop and not finished()):
                save()
                settle()
                log.say(f"update {run.num_updates}: saved, as the signal asked" if not unsaved else unsaved)
            log.since += time.perf_counter() - begin  # not training time
            if finished() or wanted_stop:
                break

    try:
        while not finished() and not device.agree([signals.stop])[0]:
            train_epoch()
    except (InputError, RuntimeError) as e:
        # between two updates everything is in order: a bad block, or a lost worker, costs nothing already done
        if isinstance(e, InputError) or (not isinstance(e, RunError) and device.is_lost_worker(e)):
            save()
        raise
    finally:
        settle()
    if unsaved:
        raise RunError(unsaved)
    return figures, 0 if finished() else 128 + device.agree([signals.stop])[0]


def main(argv: list | None = None) -> int:
    def extra(parser):
        parser.add_argument("--no_resume", action="store_true", help="start over; --save_dir must be empty")
        parser.add_argument(
            "--overwrite", action="store_true", help="with --no_resume: remove the old run in --save_dir"
        )
        parser.add_argument(
            "--reset_data_position", action="store_true", help="resume from the next epoch's start, on changed data"
        )
        parser.add_argument("--distributed_world_size", type=int, help="workers; must agree with torchrun's")

    parts, args = config.parse(PARTS, __doc__, argv, extra=extra)
    cfg = Config(*parts)
    _, world_size, _ = worker()
    if args.distributed_world_size not in (None, world_size):
        raise InputError(
            f"distributed_world_size {args.distributed_world_size}, but there is {world_size} worker;"
            f" start with: torchrun --nproc_per_node {args.distributed_world_size} train.py ..."
        )
    device = open_device(cfg.device)
    try:
        figures, code = train(cfg, device, args)
    except RuntimeError as e:
        if isinstance(e, RunError) or not device.is_lost_worker(e):
            raise
        raise RunError(f"worker {device.rank}: another worker ended; its own message says why") from None
    finally:
        device.close()
    if device.rank == 0 and figures and code == 0:
        print(
            f"valid loss {figures['loss']:.4f}, cosine of prediction and target {figures['cosine']:.4f}"
            f" (always predicting the mean: {figures['cosine_constant']:.4f}) | {cfg.train.save_dir}/checkpoint_last.pt"
        )
    return code


if __name__ == "__main__":
    config.program(main)
