"""What the loss cannot tell: figures of a run's predictions and targets beside those of guesses
that read no word.

A target can follow from where it is: position and block alone may explain most of it, so a low loss
and a high cosine prove little. Three guesses show how much:

    constant   the mean target
    position   the mean target of each position in the block, from some batches of the training
               split
    block      the same, plus the mean of what that leaves at the block's other masked places. It
               reads the targets of the block itself, so no encoder could make this guess; it says
               what the block's signature explains.

Each has a `cosine_`, the last two also `r2_` and `loss_`; R2 is the share of the targets' variance
that is explained. `gain_position` and `gain_block` are the student's R2 less theirs, `..._error`
the standard error (all places of a block as one observation); `beyond_block` is the student's share
of what the block guess leaves unexplained.
"""

import math

from config import InputError
from data import Batch, BlockDataset, Corpus
from data2vec2 import loss_of_copies, make_student, masked_copies
from judge import neighbours, probe
from model import data2vec_loss, places_of, teacher_targets, word_loss, words_of
from run.guard import ALIKE
from run.log import moments, quality
from run.progress import Bar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FIT_BATCHES = 32  # of the training split, for the position guess
GUESSES = ("position", "block")
# a gain of R2 counts if it is above both
LEAST_GAIN = 0.02
LEAST_ERRORS = 3  # standard errors
# masked places to fit the probe on while training, and as many to ask; it costs seconds
PROBE_PLACES = 10_000


@torch.no_grad()
def evaluate(run, dataset: BlockDataset, train: BlockDataset | None = None) -> dict:
    """The loss per masked place and the figures of `run.log.quality`, of all workers, no dropout.

    Also those of `Guesses` with a training split, and of `WordFigures` with a head for words.
    Raises InputError if nothing is masked.
    """
    device, cfg = run.device, run.cfg.model
    has_targets = cfg.objective != "mlm"
    run.student.eval()
    guesses = Guesses(run, train) if train and has_targets else None
    words = WordFigures(device, train) if cfg.predicts_words else None
    loss = torch.zeros((), device=device.torch_device)
    sums = torch.zeros(6, cfg.embed_dim, device=device.torch_device)
    sample_size = batches = 0

    lists = dataset.epoch_batches(1, device.rank, device.world_size)
    for host in Bar(dataset.batches(lists, 1), device.rank, what=dataset.split, total=len(lists)):
        host = masked_copies(host, 0, run.cfg, 1)
        sample_size += len(places_of(host, cfg))
        batches += 1
        batch = device.upload(host)
        with device.autocast():
            part, prediction, target, logits = answers(run, batch)
        if has_targets:
            loss += part
            sums += moments(prediction, target)
        if guesses:
            guesses.add(batch, prediction, target)
        if words:
            words.add(logits, words_of(batch, cfg))
    run.student.train()

    # over all workers
    counts = torch.tensor([sample_size, batches], device=device.torch_device)
    for tensor in (loss, sums, counts):
        device.all_reduce(tensor)
    sample_size, batches = counts.tolist()
    if sample_size == 0:
        what = "has nothing masked; is --mask_prob too small?"
        raise InputError(f"{dataset.stream.folder}: {dataset.split} {what}")
    figures = dict(loss=float(loss) / sample_size, sample_size=sample_size, batches=batches)
    if has_targets:
        figures |= quality(sums, sample_size)
    if guesses:
        figures |= guesses.figures(sums, sample_size)
    if words:
        figures |= words.figures(dataset, sample_size)
    if not has_targets:
        figures["loss"] = figures["mlm_loss"]
    return figures


def answers(run, batch: Batch) -> tuple:
    """The loss () of a batch on the device, prediction and target (M, C), and logits (M, V).

    None for what the objective has not.
    """
    student, teacher, cfg = run.student, run.teacher, run.cfg.model
    if cfg.objective == "data2vec2":
        return *loss_of_copies(student, teacher, batch, cfg), None
    output = student(batch.source, places_of(batch, cfg), batch.source_padded)
    if cfg.objective == "mlm":
        return None, None, None, output
    prediction, logits = output if cfg.predicts_words else (output, None)
    target = teacher_targets(teacher, batch, cfg)  # (M, C)
    return data2vec_loss(prediction, target, cfg), prediction, target, logits


class Validation:
    """The measurements of one run. Called, it returns the figures of the student as it is now."""

    def __init__(self, run, corpus: Corpus):
        """run: a train.Run. Raises InputError if the valid split cannot be read."""
        self.run = run
        self.corpus = corpus
        self.valid = corpus.split("valid")
        self.probe = self.untrained = None

    def __call__(self, with_probe: bool = False) -> dict:
        figures = evaluate(self.run, self.valid, self.corpus.split("train", self.run.epoch))
        if not with_probe:
            return figures
        # gains of the student, and of counts, over the first weights, in nats
        if self.probe is None:
            self.probe = probe.Probe(self.run, self.corpus, "valid", PROBE_PLACES)
            self.untrained = self.probe.ask(self.first_student())
        result = self.probe.result(self.untrained, self.probe.ask(self.run.student))
        for name in probe.GAINS:
            figures[f"probe_{name}"] = result[name]
        return figures | dict(probe_accuracy=result["trained"]["accuracy"])

    def first_student(self) -> torch.nn.Module:
        """The student before its first update; a resumed run no longer has it."""
        device, cfg = self.run.device, self.run.cfg
        state = device.rng_state()
        device.seed(cfg.data.seed)
        student = make_student(cfg.model, len(self.corpus.dictionary)).to(device.torch_device)
        device.set_rng_state(state)
        return student


# ------------------------------------------------------------------ guesses of a data2vec's targets


class Guesses:
    """The position and the block guess: fitted once, then asked about each evaluated batch."""

    def __init__(self, run, train: BlockDataset):
        self.run = run
        self.table = position_means(run, train)  # (T + 1, C)
        # over all places: squared error and cosine of the student and of each guess, then the loss
        where = run.device.torch_device
        self.sums = {name: torch.zeros(3, device=where) for name in ("student", *GUESSES)}
        # over all blocks: d, d^2, d n and n^2, where d is a guess's squared error less the
        # student's, summed over the n places of a block
        self.blocks = {name: torch.zeros(5, device=where) for name in GUESSES}

    def add(self, batch: Batch, prediction: Tensor, target: Tensor):
        """Take in a batch on the device with its prediction and target (M, C)."""
        blocks, width = batch.source.shape
        rows = batch.masked // width  # (M,)
        count = sums_of_rows(torch.ones_like(target[:, 0]), rows, blocks)  # (B,)

        # the block guess: what the position leaves, on average over the block's other places
        position = self.table[batch.masked % width]  # (M, C)
        left = target - position
        others = sums_of_rows(left, rows, blocks)[rows] - left
        block = position + others / (count[rows] - 1).clamp(min=1)[:, None]

        errors = {}
        guesses = dict(student=prediction.float(), position=position, block=block)
        for name, guess in guesses.items():
            errors[name] = (guess - target).square().sum(1)  # (M,)
            cosine = F.cosine_similarity(guess, target).sum()
            loss = data2vec_loss(guess, target, self.run.cfg.model)
            self.sums[name] += torch.stack([errors[name].sum(), cosine, loss])
        for name, sums in self.blocks.items():
            d = sums_of_rows(errors[name] - errors["student"], rows, blocks)  # (B,)
            parts = (d, d.square(), d * count, count.square(), (count > 0).float())
            sums += torch.stack([part.sum() for part in parts])

    def figures(self, moment_sums: Tensor, places: int) -> dict:
        """moment_sums: `moments` over all places and workers."""
        for sums in (*self.sums.values(), *self.blocks.values()):
            self.run.device.all_reduce(sums)
        _, _, target, squares, *_ = moment_sums.cpu().double()
        total = float((squares - target.square() / places).sum())  # the constant guess's error
        if total <= 0:
            total = 1.0
        error, *_ = self.sums["student"].tolist()
        figures = dict(r2=1 - error / total)
        for name in GUESSES:
            error, cosine, loss = self.sums[name].tolist()
            figures[f"r2_{name}"] = 1 - error / total
            figures[f"cosine_{name}"] = cosine / places
            figures[f"loss_{name}"] = loss / places
            # the sum over blocks of (d - n mean)^2, where mean is that of a place
            d, d2, dn, n2, blocks = self.blocks[name].tolist()
            spread = max(0.0, d2 - 2 * dn * d / places + n2 * (d / places) ** 2)
            figures[f"gain_{name}"] = d / total
            variance = spread * blocks / (blocks - 1) if blocks > 1 else math.inf
            figures[f"gain_{name}_error"] = math.sqrt(variance) / total
        figures["beyond_block"] = 1 - (1 - figures["r2"]) / max(1e-9, 1 - figures["r2_block"])
        return figures


def position_means(run, train: BlockDataset) -> Tensor:
    """The mean target of each position in a block, (T + 1, C), from FIT_BATCHES batches."""
    device, cfg = run.device, run.cfg
    width = cfg.data.tokens_per_sample
    # the last column counts
    sums = torch.zeros(width + 1, cfg.model.embed_dim + 1, device=device.torch_device)
    share = -(-FIT_BATCHES // device.world_size)
    lists = train.epoch_batches(1, device.rank, device.world_size)[:share]
    for host in Bar(train.batches(lists, 1), device.rank, what="position guess", total=len(lists)):
        batch = device.upload(masked_copies(host, 0, cfg, 1))
        with device.autocast():
            # (M, C); with data2vec2 the teacher reads the student's features
            if cfg.model.objective == "data2vec2":
                _, _, target, _ = answers(run, batch)
            else:
                target = teacher_targets(run.teacher, batch, cfg.model)
        sums.index_add_(0, batch.masked % host.source.shape[1], F.pad(target, (0, 1), value=1.0))
    device.all_reduce(sums)
    sums[width] = sums.sum(0)  # for positions that the batches never masked: the mean over all
    rows = torch.where(sums[:, -1:] > 0, sums, sums[width])
    return rows[:, :-1] / rows[:, -1:].clamp(min=1)


def sums_of_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """The sum of the values (M, ...) in each of `count` rows; rows (M,) says where each belongs."""
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, rows, values)


# ------------------------------------------------------------------------------------------- words


class WordFigures:
    """How well the student names hidden words, beside frequencies and counts of the train split."""

    def __init__(self, device, train: BlockDataset | None):
        """Without a training split there are only the student's figures."""
        self.device = device
        self.train = train
        if train:
            # as if each word had been seen once more
            counts = train.stream.counts(train.dictionary) + 1.0
            self.frequency = device.tensor(np.log(counts / counts.sum()).astype(np.float32))
        self.sums = torch.zeros(3, device=device.torch_device)

    def add(self, logits: Tensor, words: Tensor):
        """Take in a batch's logits (M, V) and its words (M,)."""
        hits = (logits.argmax(1) == words).sum()
        unigram = -self.frequency[words].sum() if self.train else hits * 0
        self.sums += torch.stack([word_loss(logits, words), hits, unigram])

    def figures(self, dataset: BlockDataset, places: int) -> dict:
        """Mean cross-entropies in nats, perplexity, accuracy; places: of all workers."""
        sums = self.device.all_reduce(self.sums).tolist()
        loss, accuracy, unigram = (value / places for value in sums)
        figures = dict(mlm_loss=loss)
        if self.train:
            figures["mlm_loss_frequency"] = unigram
        figures["mlm_perplexity"] = math.exp(min(loss, 700))
        figures |= dict(mlm_accuracy=accuracy, mlm_places=places)
        counted = neighbours.word_loss(dataset, self.train) if self.train else None
        if counted is not None:
            figures["mlm_loss_neighbours"] = counted
        return figures


# ---------------------------------------------------------------------------------------- in words


def verdict(figures: dict) -> str:
    """Whether the student beats the guesses that read no word. figures: those of `evaluate`."""
    lines = []
    if "r2" in figures:
        lines.append(verdict_on_targets(figures))
        position = "R2 {r2:.3f}; position {r2_position:.3f}"
        lines.append(position + " (gain {gain_position:.3f} +- {gain_position_error:.3f}),")
        block = "position and block {r2_block:.3f}"
        lines.append(block + " (gain {gain_block:.3f} +- {gain_block_error:.3f})")
    if "mlm_loss" in figures:
        words = "words: {mlm_loss:.3f} nats (perplexity {mlm_perplexity:.1f})"
        lines.append(words + "; accuracy {mlm_accuracy:.3f}")
    if "mlm_loss_frequency" in figures:
        lines.append("no model: frequencies {mlm_loss_frequency:.3f} nats")
    if "mlm_loss_neighbours" in figures:
        lines[-1] += "; left and right counted {mlm_loss_neighbours:.3f}"
    if "probe_gain" in figures:
        lines += probe.verdict(*(figures[f"probe_{name}"] for name in probe.GAINS))
    if "r2" not in figures and "mlm_loss_frequency" not in figures:
        lines.append("no training split here, so what guesses without words would get is not known")
    return "\n".join(lines).format(**figures)


def verdict_on_targets(figures: dict) -> str:
    """Whether the student predicts targets better than each guess does, by enough."""
    if figures["cosine_constant"] > ALIKE:  # there R2 is a share of next to nothing
        mean = "their mean has a cosine of {cosine_constant:.3f}"
        return f"NOT learned: the targets are alike, {mean}"
    for name, title in (("position", ""), ("block", " and the block's mean")):
        least = max(LEAST_GAIN, LEAST_ERRORS * figures[f"gain_{name}_error"])
        if not figures[f"gain_{name}"] > least:
            return f"NOT learned: no better than positions{title}"
    words = "" if "probe_gain" in figures else "; whether words, --probe tells"
    return f"learned: better than both guesses{words}"
