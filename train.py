"""Pretrain data2vec-text: what one run does.

    python train.py --data_path DIR                        the base model
    python train.py --data_path DIR --config_name tiny     a small one
    torchrun --nproc_per_node 8 train.py --data_path DIR   on several devices

Run the same command again to continue from checkpoint_last.pt in --save_dir. Figures go to
train.jsonl there.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config import PARTS, Config, ModelConfig, RunError, TrainConfig, printable
from run import flags


def add_flags(parser):
    flag = parser.add_argument
    flag("--no_resume", action="store_true", help="start over; --save_dir must be empty")
    flag("--overwrite", action="store_true", help="with --no_resume: remove the old run there")
    flag("--reset_data_position", action="store_true", help="resume at the next epoch's start")
    flag("--distributed_world_size", type=int, metavar="N", help="must be torchrun's")


if __name__ == "__main__":
    # torch takes seconds to import
    flags.answer_early(PARTS, __doc__, add_flags, check=Config)


import ema
from data import Batch, Corpus
from data2vec2 import loss_of_copies, make_student, masked_copies
from formats.load import load
from hardware.device import Device, use_all_cores
from hardware.opening import check_world_size, open_device
from hardware.vectors import LongVectors, Separate
from judge.quality import Validation, verdict
from model import data2vec_loss, loss_with_words, places_of, teacher_targets
from optim import Optimizer, Step
from run import checkpoint, resume
from run.guard import Clock, Health, Signals, check_memory, explained_out_of_memory
from run.lock import lock
from run.log import Log
from run.saves import Saves
from run.start import describe_start
from text.workers import prefetch

import torch
from torch.profiler import record_function


def lr_at(updates: int, cfg: TrainConfig) -> float:
    """Learning rate after so many updates: linear warm-up from 0, then half a cosine to 0."""
    if updates < cfg.warmup_updates:
        return cfg.lr * updates / cfg.warmup_updates
    done = (updates - cfg.warmup_updates) / max(1, cfg.max_update - cfg.warmup_updates)
    return 0.5 * cfg.lr * (1 + math.cos(math.pi * done))


# ------------------------------------------------------------------------------ the state of a run


class Run:
    """The state of a run: student, teacher, optimizer, and how far it has come."""

    def __init__(self, cfg: Config, device: Device, vocabulary_size: int):
        self.cfg, self.device = cfg, device
        check_memory(cfg.model, vocabulary_size, device)
        device.seed(cfg.data.seed)  # every worker begins with the same weights
        self.student = make_student(cfg.model, vocabulary_size).to(device.torch_device).train()
        self.teacher = ema.make_teacher(self.student.encoder)
        layout = LongVectors if device.wants_long_vectors else Separate
        # differs from fairseq: 2.0's second group of weights, biases and norms, is meant to have no
        # decay, and has it all the same
        spares_vectors = cfg.model.objective == "data2vec2" and not cfg.train.fairseq_exact
        self.weights = layout(self.student, self.teacher, device.amp, spares_vectors)
        if cfg.train.compile:
            device.check_compile()
            for layer in (*self.student.encoder.layers, *self.teacher.layers):
                layer.compile(dynamic=True)  # in place: names and weights stay what they are
        self.optimizer = Optimizer(self.weights, cfg.optim, device, cfg.train.update_freq)
        self.clock = Clock(device, cfg.train.max_hours)

        self.num_updates = 0
        self.teacher_updates = 0  # those that the teacher has taken in
        # the data position: batches of this worker done in this epoch
        self.epoch = 1
        self.batches_done = 0
        # of the validations
        self.best_loss = self.best_gain = self.first_target_var = None

    def seed_dropout(self):
        """Dropout of an update is the same whether or not the run was interrupted before it."""
        # differs from fairseq: workers draw different dropout, where its workers all draw the same
        worker = 0 if self.cfg.train.fairseq_exact else 1_000_003 * self.device.rank
        self.device.seed(self.cfg.data.seed + self.num_updates + worker)

    @record_function("ema")
    def move_teacher(self):
        """Bring the teacher up to the student's updates, once for each."""
        if self.teacher_updates < self.num_updates:
            decay = ema.decay_at(self.num_updates, self.cfg.ema)
            teacher, student = self.weights.averaged
            ema.step(teacher, student, decay, self.cfg.ema)
            self.teacher_updates = self.num_updates

    def load(self, student: dict, teacher: dict | None, path):
        """Take the weights of two state dicts; without a teacher's, it is the student's encoder.

        path: where they are from. Raises InputError if they do not fit.
        """
        checkpoint.put(student, self.student, "the student", path)
        teacher = teacher or self.student.encoder.state_dict()
        checkpoint.put(teacher, self.teacher, "the teacher", path)

    def is_finished(self) -> bool:
        t = self.cfg.train
        is_last_epoch = 0 < t.max_epoch < self.epoch
        return self.num_updates >= t.max_update or self.clock.left <= 0 or is_last_epoch


# ---------------------------------------------------------------------------------- one update


@dataclass
class Update:
    """What one update did."""

    step: Step
    number: int  # from 1
    epoch: int
    blocks: list  # this worker's block numbers
    last_batch: tuple | None  # (prediction, target) of the last batch; the log clears it
    lr: float
    ema_decay: float  # of the step that made this update's teacher


def update(run: Run, batches: list[Batch]) -> Update | None:
    """One optimizer step over this worker's host batches. Returns None if float16 overflowed."""
    cfg = run.cfg
    lr = lr_at(run.num_updates, cfg.train)
    decay = ema.decay_at(run.num_updates, cfg.ema)
    run.seed_dropout()
    run.move_teacher()  # a no-op, unless fairseq_exact left the last update out
    batches = [masked_copies(b, run.num_updates, cfg, cfg.model.clone_batch) for b in batches]
    loss, last_batch = accumulate(run, batches)

    run.clock.look()  # before the step: a worker lost here must find the weights as they were
    step = run.optimizer.step(lr, run.num_updates, loss, count(batches, cfg.model))
    if step is None:
        return None
    run.num_updates += 1
    if not cfg.train.fairseq_exact:  # its teacher waits for the next update, also while saving
        run.move_teacher()
    return Update(
        step=step,
        number=run.num_updates,
        epoch=run.epoch,
        blocks=[int(i) for batch in batches for i in batch.ids],
        last_batch=last_batch,
        lr=lr,
        ema_decay=decay,
    )


def accumulate(run: Run, batches: list[Batch]) -> tuple[torch.Tensor, tuple | None]:
    """Forward and backward: adds up the gradients of the batches.

    Returns the sum of their losses () and (prediction, target) of the last one.
    """
    cfg, device = run.cfg, run.device
    networks = (run.student, run.teacher)
    total = run.optimizer.begin()
    last = None
    with device.autocast():  # one for all batches: it casts the student's weights once
        for batch in map(device.upload, batches):
            if cfg.model.objective == "data2vec2":
                loss, prediction, target = loss_of_copies(*networks, batch, cfg.model)
            elif cfg.model.predicts_words:
                loss, prediction, target = loss_with_words(*networks, batch, cfg.model)
            else:
                target = teacher_targets(run.teacher, batch, cfg.model)  # (M, C), no gradient
                prediction = run.student(batch.source, batch.masked, batch.source_padded)  # (M, C)
                loss = data2vec_loss(prediction, target, cfg.model)
            run.optimizer.backward(loss)
            total += loss.detach()
            last = prediction.detach(), target
    return total, last


def count(batches: list[Batch], cfg: ModelConfig) -> torch.Tensor:
    """(3,) int64 on the host: places in the loss, blocks, tokens."""
    counts = torch.zeros(3, dtype=torch.int64)
    for batch in batches:
        counts += torch.tensor([len(places_of(batch, cfg)), len(batch.ids), batch.ntokens])
    return counts


# ----------------------------------------------------------------------------------- the loop


class Turn(NamedTuple):
    """What one update reads."""

    batches: list  # host batches; none for a worker that has run out
    taken: int  # how many batches of the epoch that is, empty ones included
    epoch: int
    ends_epoch: bool


def turns(run: Run, corpus: Corpus):
    """What the updates from here on read, epoch after epoch, without an end.

    An update never crosses an epoch's end.
    """
    device, freq = run.device, run.cfg.train.update_freq
    while True:
        epoch = run.epoch
        dataset = corpus.split("train", epoch)
        rest = dataset.epoch_batches(epoch, device.rank, device.world_size)[run.batches_done :]
        pinned = map(device.pin, dataset.batches(rest, epoch))
        with contextlib.closing(prefetch(pinned, min(2 * freq, 32), use_all_cores)) as batches:
            for first in range(0, len(rest), freq):
                part = rest[first : first + freq]
                ready = [next(batches) for ids in part if len(ids)]
                yield Turn(ready, len(part), epoch, ends_epoch=first + freq >= len(rest))


def is_due(run: Run, turn: Turn, done: Update | None, updates: int, epochs: int = 0) -> bool:
    """Whether it is due: every so many updates or epochs (0: never), and at the end."""
    by_updates = done is not None and updates > 0 and run.num_updates % updates == 0
    by_epochs = turn.ends_epoch and epochs > 0 and turn.epoch % epochs == 0
    return by_updates or by_epochs or run.is_finished()


def loop(run: Run, source, validation: Validation | None, saves: Saves, signals: Signals, profiled):
    """Update, log, validate and save, until the end or a signal.

    source: of `turns`. Returns the last validation's figures and the exit code.
    """
    t, log, health, figures = run.cfg.train, saves.log, saves.health, {}
    stop = run.device.agree([signals.stop])[0]
    while not stop and not run.is_finished():
        turn = next(source)
        with explained_out_of_memory(run.device, turn.batches, run.num_updates + 1):
            done = update(run, turn.batches)
        profiled()
        run.epoch = turn.epoch + turn.ends_epoch
        run.batches_done = 0 if turn.ends_epoch else run.batches_done + turn.taken

        with log.paused():  # what follows is no training time
            if done is None:
                log.overflow(turn)
                health.check_loss_scale(run.optimizer.loss_scale)
            else:
                log.add(done)
                log_now = run.num_updates % t.log_interval == 0 or run.is_finished()
                if log_now or run.device.asking_is_free:
                    saves.look_at_skipped()
                if log_now:
                    health.check_variance(log.write(), run.first_target_var)

            now = run, turn, done
            save = is_due(*now, t.save_interval_updates, t.save_interval)
            probe = t.probe_interval_updates > 0 and is_due(*now, t.probe_interval_updates)
            validate = is_due(*now, t.validate_interval_updates, t.validate_interval)
            is_best = False
            if validation and (save or probe or validate):
                figures = validation(probe)
                is_best = saves.note(figures)
                log.validation(figures, turn.epoch)
            if save or is_best:
                saves.save(is_best, turn.epoch if done else 0)  # an overflow is no update
            stop, save_now, late = signals.agreed(saves.is_late())
            if save_now or (stop and not run.is_finished()):
                saves.save_for_signal()
            elif late:
                saves.save()
    return figures, 0 if run.is_finished() else 128 + stop


# ---------------------------------------------------------------------------------- a whole run


def train(cfg: Config, device: Device, args) -> tuple[dict, int]:
    """The run from its start, or from where it was interrupted, to its end or a signal.

    Returns the last validation's figures and the exit code.
    """
    t, folder = cfg.train, Path(cfg.train.save_dir)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals(device))
        # what is wrong with the data shows before anything is made
        corpus = Corpus(cfg.data)
        dataset = corpus.split("train", 1)
        fingerprint = resume.fingerprint_of(corpus)
        if not t.disable_validation:
            fingerprint["valid"] = corpus.split("valid").stream.digest()
        if device.rank == 0:
            resume.prepare_save_dir(folder, args)
            stack.enter_context(lock(folder))
            resume.remove(folder, "checkpoint_*.pt.tmp", "train.*jsonl.tmp")  # of a broken save
        device.barrier()  # rank 0 has prepared the folder

        check_memory(cfg.model, len(corpus.dictionary), device, copies=5)
        found = None if args.no_resume else resume.find_checkpoint(folder, device)
        cfg, device = resume.with_amp_of_the_start(cfg, device, found)
        run = Run(cfg, device, len(corpus.dictionary))
        log = Log(run)
        stack.callback(log.close)
        path = None
        if found:
            path = found[0]
            resume.resume(run, corpus, fingerprint, found, args.reset_data_position, log)
        elif t.init_from:
            resume.init_from(run, corpus, load(t.init_from), t.init_from)
        del found  # the weights once more
        profiled = stack.enter_context(device.profile(t, run.num_updates))
        resume.check_agreement(run, corpus, fingerprint)  # and every worker has read what it needs
        if device.rank == 0 and args.no_resume:  # only after every check has passed
            resume.remove(folder, "checkpoint_*.pt", "train.jsonl")
        describe_start(run, dataset, log, path)

        health = Health(cfg.guard, t.warmup_updates, log.say)
        saves = stack.enter_context(Saves(run, corpus, fingerprint, log, health))
        validation = None if t.disable_validation else Validation(run, corpus)
        source = stack.enter_context(contextlib.closing(turns(run, corpus)))
        return loop(run, source, validation, saves, signals, profiled)


def main(argv: list | None = None) -> int:
    parts, args = flags.parse(PARTS, __doc__, argv, extra=add_flags)
    cfg = Config(*parts)
    check_world_size(args.distributed_world_size, cfg.train.update_freq)
    device = open_device(cfg.device)
    try:
        figures, code = train(cfg, device, args)
    except RuntimeError as e:
        why = device.lost_worker(e)
        if isinstance(e, RunError) or not why:
            raise
        raise RunError(why) from None
    finally:
        device.close()
    if device.rank == 0 and figures and code == 0:
        print(f"valid loss {figures['loss']:.4f}, {verdict(figures)}")
        print(printable(f"{cfg.train.save_dir}/checkpoint_last.pt"))
    return code


if __name__ == "__main__":
    flags.program(main)
