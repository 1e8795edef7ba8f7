"""What the loss cannot tell: figures of a run's predictions and targets beside those of guesses
that read no word.

A target can follow from where it is: position and block alone may explain most of it, so a low loss
and a high cosine prove little. Three guesses show how much:

    constant   the mean target
    position   the mean target of each position in the block, from some batches of the training split
    block      the same, plus the mean of what that leaves at the block's other masked places. It reads the targets of
               the block itself, so no encoder could make this guess; it says what the block's signature explains.

Each has a `cosine_`, the last two also `r2_` and `loss_`; R2 is the share of the targets' variance
that is explained. `gain_position` and `gain_block` are the student's R2 less theirs, `..._error`
the standard error (all places of a block as one observation); `beyond_block` is the student's share
of what the block guess leaves unexplained.
"""

import math

from config import InputError
from data import Batch, BlockDataset
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
LEAST_GAIN, LEAST_ERRORS = (
    0.02,
    3,
)  # a gain of R2 counts if it is above the first, and above so many errors
GUESSES = ("position", "block")


def verdict(figures: dict) -> str:
    """In words, whether the student beats the guesses that know no word. figures: of `evaluate`,
    with a train split."""
    words = []
    if "mlm_loss" in figures:
        words = [
            "words: {mlm_loss:.3f} nats (perplexity {mlm_perplexity:.1f}); accuracy {mlm_accuracy:.3f}"
        ]
        if "mlm_loss_frequency" in figures:
            words.append("no model: frequencies {mlm_loss_frequency:.3f} nats")
        if "mlm_loss_neighbours" in figures:
            words[-1] += "; left and right counted {mlm_loss_neighbours:.3f}"
    if "probe_gain" in figures:
        words += probe.verdict(
            *(figures[f"probe_gain{part}"] for part in ("", "_error", "_neighbours"))
        )
    if "r2" not in figures:
        nothing = ["no training split here, so what guesses without words would get is not known"]
        return "\n".join(words if figures.get("mlm_loss_frequency") else [*words, *nothing]).format(
            **figures
        )
    beaten = {
        name: figures[f"gain_{name}"]
        > max(LEAST_GAIN, LEAST_ERRORS * figures[f"gain_{name}_error"])
        for name in GUESSES
    }
    what = "positions and the block's mean" if beaten["position"] else "positions"
    begin = f"NOT learned: no better than {what}"
    if all(beaten.values()):
        begin = f"learned: better than both guesses{'; whether words, --probe tells' * ('probe_gain' not in figures)}"
    if figures["cosine_constant"] > ALIKE:  # there R2 is a share of next to nothing
        begin = (
            "NOT learned: the targets are alike, their mean has a cosine of {cosine_constant:.3f}"
        )
    told = (
        "R2 {r2:.3f}; position {r2_position:.3f} (gain {gain_position:.3f} +- {gain_position_error:.3f}),"
        "\nposition and block {r2_block:.3f} (gain {gain_block:.3f} +- {gain_block_error:.3f})"
    )
    return "\n".join([begin, told, *words]).format(**figures)


class Guesses:
    """The position and the block guess: fitted once, then asked about each evaluated batch."""

    def __init__(self, run, train: BlockDataset):
        device, cfg = run.device, run.cfg
        self.run, width = run, cfg.data.tokens_per_sample
        sums = torch.zeros(
            width + 1, cfg.model.embed_dim + 1, device=device.torch_device
        )  # the last column counts
        lists = train.epoch_batches(1, device.rank, device.world_size)[
            : -(-FIT_BATCHES // device.world_size)
        ]
        for host in Bar(
            train.batches(lists, 1), device.rank, what="position guess", total=len(lists)
        ):
            target, places = (
                targets_of(run, host),
                device.upload(host).masked % host.source.shape[1],
            )
            sums.index_add_(0, places, F.pad(target, (0, 1), value=1.0))
        device.all_reduce(sums)
        sums[width] = sums.sum(0)  # for positions that the batches never masked: the mean over all
        rows = torch.where(sums[:, -1:] > 0, sums, sums[width])
        self.table = rows[:, :-1] / rows[:, -1:].clamp(min=1)  # (width + 1, C)
        # over all places: squared error and cosine of the student and of each guess, then their
        # loss
        self.sums = {
            name: torch.zeros(3, device=device.torch_device) for name in ("student", *GUESSES)
        }
        # of each guess' squared error less the student's, summed over a block's n places, d: d,
        # d^2, dn, n^2
        self.blocks = {name: torch.zeros(4, device=device.torch_device) for name in GUESSES}

    def add(self, batch: Batch, prediction: Tensor, target: Tensor):
        """Take in a batch on the device with its prediction and target (M, C)."""
        width, cfg = batch.source.shape[1], self.run.cfg.model
        rows = batch.masked // width
        position = self.table[batch.masked % width]  # (M, C)
        count = target.new_zeros(len(batch.source)).index_add_(
            0, rows, target.new_ones(len(rows))
        )  # (B,)
        left = target - position
        of_block = target.new_zeros(len(batch.source), left.shape[1]).index_add_(0, rows, left)
        others = (of_block[rows] - left) / (count[rows] - 1).clamp(min=1)[:, None]
        guesses = dict(student=prediction.float(), position=position, block=position + others)
        errors = {}
        for name, guess in guesses.items():
            errors[name] = (guess - target).square().sum(1)  # (M,)
            loss = data2vec_loss(guess, target, cfg)
            self.sums[name] += torch.stack(
                [errors[name].sum(), F.cosine_similarity(guess, target).sum(), loss]
            )
        for name, sums in self.blocks.items():
            gain = target.new_zeros(len(count)).index_add_(
                0, rows, errors[name] - errors["student"]
            )  # (B,)
            sums += torch.stack(
                [gain.sum(), gain.square().sum(), (gain * count).sum(), count.square().sum()]
            )

    def figures(self, moment_sums: Tensor, places: int) -> dict:
        """moment_sums: `moments` over all places and workers."""
        for sums in (*self.sums.values(), *self.blocks.values()):
            self.run.device.all_reduce(sums)
        target, squares = (moment_sums[i].cpu().double() for i in (2, 3))
        total = float(
            (squares - target.square() / places).sum()
        )  # the squared error of the constant guess
        total = total if total > 0 else 1.0
        found = {name: sums.tolist() for name, sums in self.sums.items()}
        out = dict(r2=1 - found["student"][0] / total)
        for name in GUESSES:
            error, cosine, loss = found[name]
            out |= {
                f"r2_{name}": 1 - error / total,
                f"cosine_{name}": cosine / places,
                f"loss_{name}": loss / places,
            }
            d, d2, dn, n2 = self.blocks[name].tolist()
            spread = max(0.0, d2 - 2 * dn * d / places + n2 * (d / places) ** 2)
            out |= {f"gain_{name}": d / total, f"gain_{name}_error": math.sqrt(spread) / total}
        return {**out, "beyond_block": 1 - (1 - out["r2"]) / max(1e-9, 1 - out["r2_block"])}


def targets_of(run, host: Batch) -> Tensor:
    """The teacher's targets (M, C) of a host batch."""
    with run.device.autocast():
        return teacher_targets(run.teacher, run.device.upload(host), run.cfg.model)


@torch.no_grad()
def evaluate(run, dataset: BlockDataset, train: BlockDataset | None = None) -> dict:
    """Validation loss per masked place and the figures of `quality`, over all workers, without
    dropout; with the training split also those of `Guesses`. run: a train.Run. Raises InputError if
    nothing is masked."""
    device, cfg = run.device, run.cfg.model
    run.student.eval()
    has_targets = cfg.objective == "data2vec"
    guesses = Guesses(run, train) if train and has_targets else None
    words = WordFigures(run, train) if cfg.predicts_words else None
    loss = torch.zeros((), device=device.torch_device)
    sums = torch.zeros(6, cfg.embed_dim, device=device.torch_device)
    sample_size = batches = 0
    lists = dataset.epoch_batches(1, device.rank, device.world_size)
    for host in Bar(dataset.batches(lists, 1), device.rank, what=dataset.split, total=len(lists)):
        batch = device.upload(host)
        with device.autocast():
            found = run.student(batch.source, places_of(batch, cfg), batch.source_padded)
            if has_targets:
                target = teacher_targets(run.teacher, batch, cfg)
                prediction = found[0] if words else found
                loss += data2vec_loss(prediction, target, cfg)
        if has_targets:
            sums += moments(prediction, target)
        if guesses:
            guesses.add(batch, prediction, target)
        if words:
            words.add(found[1] if has_targets else found, words_of(batch, cfg))
        sample_size, batches = sample_size + len(places_of(host, cfg)), batches + 1
    run.student.train()
    counts = torch.tensor([sample_size, batches], device=device.torch_device)
    for tensor in (loss, sums, counts):
        device.all_reduce(tensor)
    sample_size, batches = counts.tolist()
    if sample_size == 0:
        raise InputError(
            f"{dataset.stream.folder}: {dataset.split} has nothing masked; is --mask_prob too small?"
        )
    named = words.figures() if words else {}
    counted = neighbours.word_loss(dataset, train) if words and train else None
    if counted is not None:
        named["mlm_loss_neighbours"] = counted
    if not has_targets:
        return dict(loss=named["mlm_loss"], sample_size=sample_size, batches=batches, **named)
    beside = guesses.figures(sums, sample_size) if guesses else {}
    counted = dict(loss=float(loss) / sample_size, sample_size=sample_size, batches=batches)
    return {**counted, **quality(sums, sample_size), **beside, **named}


class WordFigures:
    """How well the student names hidden words, over all workers, beside the word frequencies of the
    training split."""

    def __init__(self, run, train: BlockDataset | None):
        """Without a training split the frequencies are not known, and left out."""
        self.device, self.frequency = run.device, None
        if train is not None:
            counts = (
                train.stream.counts(train.dictionary) + 1.0
            )  # as if each word had been seen once more
            self.frequency = run.device.tensor(np.log(counts / counts.sum()).astype(np.float32))
        self.sums = torch.zeros(4, device=run.device.torch_device)

    def add(self, logits: Tensor, words: Tensor):
        """Take in a batch's logits (M, V) and its words (M,)."""
        hits, places = (logits.argmax(1) == words).sum(), words.new_tensor(len(words))
        unigram = places * 0 if self.frequency is None else -self.frequency[words].sum()
        self.sums += torch.stack([word_loss(logits, words), hits, unigram, places])

    def figures(self) -> dict:
        """Mean cross-entropy in nats, that of the frequencies, perplexity, accuracy, and the number
        of places."""
        loss, hits, unigram, places = self.device.all_reduce(self.sums).tolist()
        loss, unigram = loss / max(1, places), unigram / max(1, places)
        known = {} if self.frequency is None else dict(mlm_loss_frequency=unigram)
        rest = dict(mlm_perplexity=math.exp(min(loss, 700)), mlm_accuracy=hits / max(1, places))
        return dict(mlm_loss=loss, **known, **rest, mlm_places=int(places))
