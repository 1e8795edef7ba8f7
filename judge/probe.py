"""Do the student's features at a masked place tell the word hidden there? The loss cannot answer.

    python eval.py --ckpt FILE --data_path DIR --probe [--probe_places 50000] [--json]

The student, frozen and without dropout, reads masked text. From its last hidden state at each
`<mask>`, a linear softmax classifier predicts the hidden token, one of the 1,000 most frequent in
the training split. It is fitted there. Accuracy and cross-entropy are measured on the valid split,
next to three baselines on the same places:

    most frequent   always the same guess; its cross-entropy is that of the training split's
                    frequencies
    untrained       the same classifier on the same model with its initial weights: what the
                    position reveals, and what a random network passes on of the visible words
    neighbours      no model: at the places of the fit, it counts what is between which tokens
                    (judge/neighbours.py)

A model that has learned nothing about words scores as `untrained` does, however low its loss. The
gain over it, in nats per word, is what the model has learned from context; treat a gain below three
standard errors (each block counts as one observation) as no gain. A model below `neighbours` tells
less about a hidden word than the two tokens beside it. Nothing can name all words of a masked span.
"""

import copy
import math
from dataclasses import dataclass

from config import Config, InputError, RunError
from data import Batch, BlockDataset, Corpus
from data2vec2 import Data2Vec2, masked_copies
from hardware.device import Device
from judge.neighbours import Neighbours, beside
from run.progress import Bar
from text.binarized import SPECIAL, TokenStream

import numpy as np
import torch
import torch.nn.functional as F

GAINS = ("gain", "gain_error", "gain_neighbours")  # of a result, in nats
ANSWERS = ("trained", "untrained", "neighbours", "most_frequent")
CLASSES = 1000
MASK_EPOCHS = 5  # a small split is read this many times, each time with the masks of another epoch
# for fitting the classifier
LR = 1e-3
BATCH = 512  # places
MOST_EPOCHS = 50
PATIENCE = 3  # epochs without a lower loss on the held-out blocks, after which the fit stops


def frequent_tokens(stream: TokenStream, dictionary) -> np.ndarray:
    """The class of each token id, (V,) int64: -1 outside the CLASSES most frequent ones.

    Reads the whole split once.
    """
    counts = stream.counts(dictionary).copy()
    counts[: len(SPECIAL)] = 0
    order = np.argsort(-counts, kind="stable")[:CLASSES]
    order = order[counts[order] > 0]
    classes = np.full(len(dictionary), -1)
    classes[order] = np.arange(len(order))
    return classes


@dataclass
class Places:
    """Masked places of one split whose hidden token is one of the classes, batch by batch."""

    batches: list[tuple[Batch, np.ndarray]]  # each with its flat places in (B x T), int64
    labels: np.ndarray  # (N,) int64, the classes of the hidden tokens
    blocks: np.ndarray  # (N,) number of the block that each place is in
    left_out: int  # number of masked places whose token is none of the classes

    def beside(self) -> np.ndarray:
        """The tokens left and right of the places, (2, N)."""
        return np.concatenate([beside(batch, flat) for batch, flat in self.batches], 1)


def find_places(dataset: BlockDataset, classes: np.ndarray, least: int, cfg: Config) -> Places:
    """At least `least` places, or all that the split has, from batches in random order.

    cfg: a run's, whose objective may mask in its own way. Raises InputError if there are none.
    """
    dataset = copy.copy(dataset)
    # for validation too: shuffled instead of sorted by length, and new masks in each epoch
    dataset.training = True
    epochs = 1 if dataset.cfg.fixed_masks else MASK_EPOCHS
    batches, labels, blocks = [], [], []
    count = left_out = 0
    for epoch in range(1, epochs + 1):
        for ids in dataset.epoch_batches(epoch):
            if count >= least:
                break
            batch = masked_copies(dataset.batch(ids, epoch), epoch, cfg, 1)
            label = classes[batch.target.ravel()[batch.target_places]]
            flat = batch.masked[label >= 0]
            batches.append((batch, flat))
            labels.append(label[label >= 0])
            blocks.append(ids[flat // batch.source.shape[1]])
            count += len(flat)
            left_out += int((label < 0).sum())
    if not count:
        what = f"{dataset.split} hides no token that --probe could ask for"
        raise InputError(f"{dataset.stream.folder}: {what}")
    return Places(batches, np.concatenate(labels), np.concatenate(blocks), left_out)


@torch.no_grad()
def features(student, device: Device, places: Places) -> torch.Tensor:
    """The frozen student's last hidden states at the places, (N, C) float32.

    Those of data2vec2 are the decoder's, since its encoder has none at hidden places.
    """
    student.eval()
    parts = []
    for batch, flat in Bar(places.batches, rank=device.rank, what="probe, reading"):
        batch, places = device.upload(batch), device.tensor(flat)
        with device.autocast():
            if isinstance(student, Data2Vec2):
                x, _, _ = student.decoded(batch, places)
            else:
                x, _ = student.encoder(batch.source, batch.source_padded, places=places)
        parts.append(x.float())
    student.train()
    return torch.cat(parts)


def whiten(x: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """x (N, C) and the others under the affine map that gives x mean 0 and unit covariance.

    Most variance of hidden states is about things that the classifier does not need, such as the
    position. Without whitening, early stopping would end the fit before it has used the small
    useful directions, above all in an untrained model.
    """
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / len(x)  # (C, C)
    values, vectors = torch.linalg.eigh(covariance.cpu().double())  # an NPU has no float64
    matrix = (vectors / values.clamp(min=1e-6 * float(values[-1])).sqrt()).float().to(x.device)
    return [(y - mean) @ matrix for y in (x, *others)]


class Probe:
    """Asks a student for the hidden words, each time at the same places and with the same fit."""

    def __init__(self, run, corpus: Corpus, split: str, places: int):
        """run: a train.Run. places: how many to fit on and to evaluate on, if there are as many.

        Raises InputError.
        """
        if places < 1 or split == "train":
            why = "it fits on that many places of train, and asks on another split, such as valid"
            raise InputError(f"--probe_places {places} --split {split}: {why}")
        dataset = corpus.split("train")
        classes = frequent_tokens(dataset.stream, corpus.dictionary)
        self.run = run
        self.classes = int(classes.max()) + 1
        self.train = find_places(dataset, classes, places, run.cfg)
        self.valid = find_places(corpus.split(split), classes, places, run.cfg)
        counts = Neighbours(self.train.beside(), self.train.labels, self.classes, corpus.dictionary)
        self.counted = counts.answer(self.valid.beside(), self.valid.labels)
        self.log_share = np.log(counts.share)  # (K,), of each class among the labels of the fit

        # a tenth of the blocks decides when the fit stops
        blocks = np.unique(self.train.blocks)
        if len(blocks) < 2:
            raise InputError(f"{dataset.stream.folder}: train has too few blocks for --probe")
        self.seed = corpus.cfg.seed
        blocks = np.random.RandomState(self.seed).permutation(blocks)
        self.held = np.isin(self.train.blocks, blocks[: -(-len(blocks) // 10)])  # (N,) bool

    def ask(self, student) -> dict:
        """Fit on a student's states, then predict the words at the valid places.

        Returns `hit` (N,) bool and `loss` (N,) float64 in nats.
        """
        device = self.run.device
        x, x_valid = (features(student, device, places) for places in (self.train, self.valid))
        if not (x.isfinite().all() and x_valid.isfinite().all()):
            raise RunError("--probe: the student's features are not finite")
        x, x_valid = whiten(x, x_valid)
        weight, bias = self.fit(x)
        y = device.tensor(self.valid.labels)
        hit, loss = [], []
        for part, label in zip(x_valid.split(8192), y.split(8192)):  # for the memory's sake
            logits = part @ weight + bias
            hit.append((logits.argmax(1) == label).cpu())
            loss.append(F.cross_entropy(logits, label, reduction="none").cpu())
        return dict(hit=torch.cat(hit).numpy(), loss=torch.cat(loss).double().numpy())

    def fit(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax regression by Adam on x (N, C) of the training places, from class frequencies on.

        Returns weight (C, K) and bias (K,) of the epoch with the lowest loss on the held-out
        blocks.
        """
        device = self.run.device
        y = device.tensor(self.train.labels)
        held = device.tensor(np.flatnonzero(self.held))
        x_held, y_held = x.index_select(0, held), y.index_select(0, held)
        bias = device.tensor(self.log_share.astype(np.float32)).requires_grad_()
        weight = torch.zeros(x.shape[1], self.classes, device=x.device, requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias], lr=LR)

        rng = np.random.RandomState(self.seed)
        lowest, best, waited = float("inf"), None, 0
        for _ in Bar(range(MOST_EPOCHS), rank=device.rank, what="probe, fitting at most"):
            order = rng.permutation(np.flatnonzero(~self.held))
            for part in device.tensor(order).split(BATCH):
                logits = x.index_select(0, part) @ weight + bias
                loss = F.cross_entropy(logits, y.index_select(0, part))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                loss = float(F.cross_entropy(x_held @ weight + bias, y_held))
            waited += 1
            if loss < lowest:
                lowest = loss
                waited = 0
                best = weight.detach().clone(), bias.detach().clone()
            if waited == PATIENCE:
                break
        return best

    def result(self, untrained: dict, trained: dict) -> dict:
        """Figures for a report, from what `ask` returned without and with training."""
        labels = self.valid.labels
        gain = untrained["loss"] - trained["loss"]
        # places of one block share their text: the standard error is that of the blocks' sums
        _, block = np.unique(self.valid.blocks, return_inverse=True)
        sums = np.bincount(block, gain - gain.mean())
        n = len(sums)
        variance = np.square(sums).sum() * n / (n - 1) if n > 1 else math.inf
        figures = dict(
            classes=self.classes,
            train_places=len(self.train.labels),
            valid_places=len(labels),
            train_left_out=self.train.left_out,
            valid_left_out=self.valid.left_out,
            gain=float(gain.mean()),
            gain_error=float(np.sqrt(variance) / len(labels)),
            gain_neighbours=float((untrained["loss"] - self.counted["loss"]).mean()),
        )
        guess = dict(hit=labels == self.log_share.argmax(), loss=-self.log_share[labels])
        for name, answer in zip(ANSWERS, (trained, untrained, self.counted, guess)):
            accuracy, loss = float(answer["hit"].mean()), float(answer["loss"].mean())
            figures[name] = dict(accuracy=accuracy, cross_entropy=loss)
        return figures


def table(result: dict, split: str) -> str:
    """The figures of `Probe.result` as text."""
    lines = [
        "probe: which of the {classes:,} most frequent tokens is hidden?",
        f"{{valid_places:,}} masked places of {split}, fitted on {{train_places:,}} of train;",
        "left out, since other tokens are hidden: {valid_left_out:,} and {train_left_out:,}",
    ]
    lines = [line.format(**result) for line in lines]
    lines.append(f"{'':14}{'accuracy':>16}{'cross-entropy (nats)':>24}")
    for name in ANSWERS:
        accuracy, loss = result[name].values()
        lines.append(f"{name.replace('_', ' '):14}{accuracy:16.4f}{loss:24.4f}")
    return "\n".join([*lines, *verdict(*(result[name] for name in GAINS))])


def verdict(gain: float, error: float, counted: float) -> list[str]:
    """In words, whether the features name hidden words, and what counts reach."""
    begin = "words learned" if gain > 3 * error else "NO words learned"
    more = ", more than that" if counted > gain else ""
    return [
        f"{begin}: {gain:.4f} nats a word above untrained, standard error {error:.4f}",
        f"counts of the tokens left and right: {counted:.4f} nats{more}",
    ]
