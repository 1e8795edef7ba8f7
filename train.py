"""Pretrain data2vec-text: what one run does.

    python train.py --data_path DIR                        the base model
    python train.py --data_path DIR --config_name tiny     a small one
    torchrun --nproc_per_node 8 train.py --data_path DIR   on several devices

Run the same command again to continue from checkpoint_last.pt in --save_dir. Figures go to train.jsonl there.
"""

import contextlib
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import config
from config import PARTS, Config, InputError, ModelConfig, RunError, TrainConfig
from run import flags


def add_flags(parser):
    parser.add_argument(
        "--no_resume", action="store_true", help="start over; --save_dir must be empty"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="with --no_resume: remove the old run there"
    )
    parser.add_argument(
        "--reset_data_position",
        action="store_true",
        help="on changed data: resume at the next epoch",
    )
    parser.add_argument(
        "--distributed_world_size", type=int, metavar="N", help="must be torchrun's"
    )


if __name__ == "__main__":
    flags.answer_early(
        PARTS, __doc__, add_flags, check=lambda parts: Config(*parts)
    )  # torch takes seconds to import


import ema
from data import Batch, Corpus, prefetch
from hardware.device import Device, open_device, use_all_cores, worker
from hardware.flops import update_flops
from hardware.vectors import LongVectors, Separate
from judge.quality import verdict
from judge.validation import Validation
from model import Data2VecText, data2vec_loss, loss_with_words, places_of, teacher_targets
from optim import Optimizer, Step
from run import checkpoint, resume
from run.clock import Clock
from run.guard import Health, Signals, check_memory, explained_out_of_memory
from run.lock import Lock
from run.log import Log, describe_start
from run.saves import Saves

import torch
from torch.profiler import record_function


def lr_at(updates: float, cfg: TrainConfig) -> float:
    """Learning rate of the update that follows `updates` finished ones: linear warm-up from 0, then cosine to 0."""
    if updates < cfg.warmup_updates:
        return cfg.lr * updates / cfg.warmup_updates
    done = (updates - cfg.warmup_updates) / max(1, cfg.max_update - cfg.warmup_updates)
    return 0.5 * cfg.lr * (1 + math.cos(math.pi * done))


class Run:
    """The state of a run: student, teacher, optimizer, and how far it has come."""

    def __init__(self, cfg: Config, device: Device, vocabulary_size: int):
        self.cfg, self.device = cfg, device
        check_memory(cfg.model, vocabulary_size, device)
        device.seed(cfg.data.seed)  # every worker begins with the same weights
        self.student = Data2VecText(cfg.model, vocabulary_size).to(device.torch_device).train()
        self.teacher = ema.make_teacher(self.student.encoder)
        layout = LongVectors if device.wants_long_vectors else Separate
        self.weights = layout(self.student, self.teacher, device.amp)
        if cfg.train.compile:
            device.check_compile()
            for layer in (*self.student.encoder.layers, *self.teacher.layers):
                layer.compile(dynamic=True)  # in place: names and weights stay what they are
        self.optimizer = Optimizer(self.weights, cfg.optim, device, cfg.train.update_freq)
        self.clock = Clock(device, cfg.train)
        self.num_updates = self.teacher_updates = (
            0  # updates of the student, and those that the teacher has taken in
        )
        self.epoch, self.batches_done = (
            1,
            0,
        )  # the data position: batches of this worker done in this epoch
        self.best_loss = self.best_gain = self.first_target_var = None  # of the validations

    def seed_dropout(self):
        """Dropout of update n is the same whether or not the run was interrupted before it."""
        # differs from fairseq: workers draw different dropout, where its workers all draw the same
        worker = 0 if self.cfg.train.fairseq_exact else 1_000_003 * self.device.rank
        self.device.seed(self.cfg.data.seed + self.num_updates + worker)

    @record_function("ema")
    def move_teacher(self):
        """Bring the teacher up to the student's updates, once for each."""
        if self.teacher_updates < self.num_updates:
            ema.step(
                *self.weights.averaged,
                ema.decay_at(self.clock.at(self.num_updates), self.cfg.ema),
                self.cfg.ema,
            )
            self.teacher_updates = self.num_updates

    def load(self, student: dict, teacher: dict | None, path):
        """Take the weights of two state dicts; without a teacher's, the teacher is the student's encoder again. Raises
        InputError if they do not fit; `path` is where they are from."""
        checkpoint.put(student, self.student, "the student", path)
        checkpoint.put(
            teacher or self.student.encoder.state_dict(), self.teacher, "the teacher", path
        )

    def is_finished(self) -> bool:
        over = self.num_updates >= self.clock.last_update or self.clock.left <= 0
        return over or 0 < self.cfg.train.max_epoch < self.epoch


@dataclass
class Turn:
    """What one update reads."""

    batches: list[Batch]  # host batches; none for a worker that has run out
    taken: int  # how many batches of the epoch that is, empty ones included
    epoch: int
    ends_epoch: bool


@dataclass
class Update(Step):
    """What one update did."""

    number: int  # from 1
    epoch: int
    blocks: list  # this worker's block numbers
    last_batch: tuple | None  # (prediction, target) of the last batch; the log clears it after use
    lr: float
    ema_decay: float  # of the step that made this update's teacher
    flops: float  # of this worker


def update(run: Run, batches: list[Batch]) -> Update | None:
    """One optimizer step over this worker's host batches. Returns None if float16 overflowed: then it was no update."""
    cfg, device = run.cfg, run.device
    at = run.clock.at(run.num_updates)  # what the schedules go by
    lr, decay = lr_at(at, cfg.train), ema.decay_at(at, cfg.ema)
    run.seed_dropout()
    run.move_teacher()  # a no-op, unless fairseq_exact left the last update out

    last, total = (
        (torch.zeros(0, cfg.model.embed_dim, device=device.torch_device),) * 2,
        run.optimizer.begin(),
    )
    with device.autocast():  # one for all batches: it casts the student's weights once
        for batch in map(device.upload, batches):
            if cfg.model.predicts_words:
                loss, prediction, target = loss_with_words(
                    run.student, run.teacher, batch, cfg.model
                )
            else:
                target = teacher_targets(run.teacher, batch, cfg.model)  # (M, C), no gradient
                prediction = run.student(batch.source, batch.masked, batch.source_padded)  # (M, C)
                loss = data2vec_loss(prediction, target, cfg.model)
            run.optimizer.backward(loss)
            total += loss.detach()
            last = prediction.detach(), target

    run.clock.look()  # before the step: a worker lost here must find the weights as they were
    step = run.optimizer.step(lr, run.num_updates, total, count(batches, cfg.model))
    if step is None:
        return None
    run.num_updates += 1
    if (
        not cfg.train.fairseq_exact
    ):  # there the teacher waits for the next update, also while validating and saving
        run.move_teacher()
    done = dict(
        number=run.num_updates,
        epoch=run.epoch,
        lr=lr,
        ema_decay=decay,
        flops=update_flops(batches, run),
    )
    return Update(
        **vars(step),
        **done,
        blocks=[int(i) for batch in batches for i in batch.ids],
        last_batch=last,
    )


def count(batches: list[Batch], cfg: ModelConfig) -> torch.Tensor:
    """(3,) int64 on the host: places in the loss, blocks, tokens."""
    counts = [[len(places_of(batch, cfg)), batch.nsentences, batch.ntokens] for batch in batches]
    return torch.tensor(counts, dtype=torch.int64).reshape(len(batches), 3).sum(0)


def turns(run: Run, corpus: Corpus):
    """What the updates from here on read, epoch after epoch, without an end; an update never crosses an epoch's end."""
    device, freq = run.device, run.cfg.train.update_freq
    while True:
        epoch, dataset = run.epoch, corpus.split("train", run.epoch)
        rest = dataset.epoch_batches(epoch, device.rank, device.world_size)[run.batches_done :]
        made = map(device.pin, dataset.batches(rest, epoch))
        with contextlib.closing(prefetch(made, min(2 * freq, 32), use_all_cores)) as batches:
            for first in range(0, len(rest), freq):
                part = rest[first : first + freq]
                ready = [next(batches) for ids in part if len(ids)]
                yield Turn(ready, len(part), epoch, ends_epoch=first + freq >= len(rest))


def is_due(run: Run, turn: Turn, counted: bool, updates: int, epochs: int) -> bool:
    """Whether something is due that is done every so many updates (0: never), every so many epochs, and at the end."""
    by_updates = counted and updates > 0 and run.num_updates % updates == 0
    by_epochs = turn.ends_epoch and epochs > 0 and turn.epoch % epochs == 0
    return by_updates or by_epochs or run.is_finished()


def loop(
    run: Run,
    corpus: Corpus,
    validation: Validation | None,
    log: Log,
    saves: Saves,
    signals: Signals,
    profiled,
) -> tuple:
    """Update, log, validate and save, until the end or a signal. Returns the last validation's figures, exit code."""
    t, health, figures = run.cfg.train, saves.health, {}
    stop = run.device.agree([signals.stop])[0]
    with saves, contextlib.closing(turns(run, corpus)) as source:
        while not stop and not run.is_finished():
            turn = next(source)
            with explained_out_of_memory(run.device, turn.batches, run.num_updates + 1):
                done = update(run, turn.batches)
            profiled()
            run.epoch = turn.epoch + turn.ends_epoch
            run.batches_done = 0 if turn.ends_epoch else run.batches_done + turn.taken

            with log.paused():  # what follows is no training time
                if done is None:
                    log.overflow(turn, run.num_updates, run.optimizer.loss_scale)
                    health.check_loss_scale(run.optimizer.loss_scale)
                else:
                    log.add(done)
                    log_now = run.num_updates % t.log_interval == 0 or run.is_finished()
                    if log_now or run.device.type == "cpu":  # where asking costs nothing
                        saves.look_at_skipped()
                    if log_now:
                        saves.settle_if_idle()
                        health.check_variance(log.write(), run.first_target_var)

                due = functools.partial(is_due, run, turn, done is not None)
                save_now, best = due(t.save_interval_updates, t.save_interval), False
                probe = t.probe_interval_updates > 0 and due(t.probe_interval_updates, 0)
                if validation and (
                    save_now or probe or due(t.validate_interval_updates, t.validate_interval)
                ):
                    saves.settle()  # a failed save takes its best loss back
                    figures = validation(probe)
                    best = saves.note(figures)
                    log.validation(figures, run.best_loss, run.num_updates, turn.epoch)
                if save_now or best:
                    saves.save(*saves.names(best, done is not None, turn.epoch))
                stop, wanted, late = signals.agreed(saves.is_late())
                if wanted or (stop and not run.is_finished()):
                    saves.save_now("as the signal asked")
                elif late:
                    saves.save()
    return figures, 0 if run.is_finished() else 128 + stop


def train(cfg: Config, device: Device, args) -> tuple[dict, int]:
    """The run from its start, or from where it was interrupted, to its end or a signal.

    Returns the last validation's figures and the exit code.
    """
    t, folder = cfg.train, Path(cfg.train.save_dir)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals(device))
        corpus = Corpus(cfg.data)
        dataset = corpus.split("train", 1)
        if not t.disable_validation:
            corpus.split("valid")  # what is wrong with it shows now
        fingerprint = resume.fingerprint_of(corpus)
        if device.rank == 0:
            resume.prepare_save_dir(folder, args)
            stack.callback(Lock(folder).release)
            resume.remove(
                folder, "checkpoint_*.pt.tmp", "train.*jsonl.tmp"
            )  # what a broken save left
        device.barrier()  # rank 0 has prepared the directory
        check_memory(cfg.model, len(corpus.dictionary), device, copies=5)
        run = Run(cfg, device, len(corpus.dictionary))
        log = Log(device, folder / "train.jsonl", t.tensorboard_logdir, run.clock)
        stack.callback(log.close)
        found = None if args.no_resume else resume.find_checkpoint(folder, log.say)
        if found:
            resume.resume(run, corpus, fingerprint, *found, args.reset_data_position, log.say)
            log.restore(found[1].content["log"])
        elif t.init_from:
            resume.init_from(run, corpus, checkpoint.load(t.init_from), t.init_from)
        device.check_profile(t.npu_profile, run.num_updates, run.clock.last_update)
        resume.check_agreement(run, corpus, fingerprint)  # and every worker has read what it needs
        if device.rank == 0 and args.no_resume:
            resume.remove(
                folder, "checkpoint_*.pt", "train.jsonl"
            )  # only after every check has passed
        describe_start(run, dataset, log, found and found[0])
        del found  # all of it has been copied
        profiled = stack.enter_context(device.profile(t.npu_profile, folder))
        saves = Saves(
            run,
            corpus,
            fingerprint,
            log,
            Health(cfg.guard, t.warmup_updates, log.say, run.clock.at),
        )
        validation = None if t.disable_validation else Validation(run, corpus)
        return loop(run, corpus, validation, log, saves, signals, profiled)


def main(argv: list | None = None) -> int:
    parts, args = flags.parse(PARTS, __doc__, argv, extra=add_flags)
    cfg = Config(*parts)
    _, world_size, _ = worker()
    there = args.distributed_world_size
    if there not in (None, world_size):
        raise InputError(
            f"distributed_world_size {there}, but there is {world_size} worker; start with: torchrun --nproc_per_node"
            f" {there} train.py ..., or leave it out: --update_freq {-(-there * cfg.train.update_freq // world_size)}"
            " keeps the batch"
        )
    device = open_device(cfg.device)
    try:
        figures, code = train(cfg, device, args)
    except RuntimeError as e:
        if isinstance(e, RunError) or not (why := device.lost_worker(e)):
            raise
        raise RunError(why) from None
    finally:
        device.close()
    if device.rank == 0 and figures and code == 0:
        print(f"valid loss {figures['loss']:.4f}, {verdict(figures)}")
        print(config.printable(f"{cfg.train.save_dir}/checkpoint_last.pt"))
    return code


if __name__ == "__main__":
    flags.program(main)
