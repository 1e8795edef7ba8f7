"""What counting reaches, without a model: a hidden token is guessed from the tokens on its left and
right.

    p(w | left, right)  ~  p(w | left) p(w | right) / p(w)

p(w) is the share of w among the places that are counted, p(w | left) its share after the token
`left`, as if STRENGTH more tokens with the shares p had come there, and p(w | right) the same
before `right`. A neighbour that is hidden too, or outside the block, tells nothing. A model that
learns from context should come to know more than this.
"""

import functools

from data import Batch, BlockDataset
from text.binarized import PAD, Dictionary
from text.masks import ranges

import numpy as np

MOST_TOKENS = 10_000_000  # of the training split, that are counted for all tokens
MOST_PLACES = 20_000  # of the evaluated split, that are asked for all tokens
STRENGTH = 100.0  # on film reviews 200 changes the loss by 0.02 nats
AT_ONCE = 64  # places, for the memory's sake


def beside(batch: Batch, flat: np.ndarray) -> np.ndarray:
    """The tokens left and right of the flat places (N,) in (B x T): (2, N), PAD outside the block."""
    text = np.pad(batch.source, ((0, 0), (1, 1)), constant_values=PAD)
    row, column = np.divmod(flat, batch.source.shape[1])
    return np.stack([text[row, column], text[row, column + 2]])


class Neighbours:
    """Counts of K classes beside each token."""

    def __init__(
        self, tokens: np.ndarray, labels: np.ndarray, classes: int, dictionary: Dictionary
    ):
        """tokens: those left and right (2, N) of places that hide the classes `labels` (N,), of
        `classes` ones."""
        counts = np.bincount(labels, minlength=classes) + 1.0
        self.share, self.hidden, self.sides = counts / counts.sum(), dictionary.mask_id, []
        for neighbour in tokens:
            keys, counts = np.unique(neighbour * classes + labels, return_counts=True)
            begins, found = (
                np.searchsorted(keys, np.arange(len(dictionary) + 1) * classes),
                keys % classes,
            )
            # where a token's row begins, the classes in it, and by how much each is more likely
            # there, before scaling
            self.sides.append((begins, found, counts / (STRENGTH * self.share[found])))

    def answer(self, tokens: np.ndarray, labels: np.ndarray) -> dict:
        """`hit` (N,) bool and `loss` (N,) float64 in nats at places with the tokens (2, N) beside
        them."""
        hit, loss = [], []
        for i in range(0, len(labels), AT_ONCE):
            likely, label = self.share, labels[i : i + AT_ONCE]
            for side, neighbours in zip(self.sides, tokens[:, i : i + AT_ONCE]):
                likely = likely * self.factors(side, neighbours)
            hit.append(likely.argmax(1) == label)
            loss.append(np.log(likely.sum(1) / likely[np.arange(len(label)), label]))
        return dict(hit=np.concatenate(hit), loss=np.concatenate(loss))

    def factors(self, side: tuple[np.ndarray, ...], tokens: np.ndarray) -> np.ndarray:
        """By how much each class is more likely beside each of the tokens (N,), up to a factor for
        each: (N, K)."""
        begins, classes, more = side
        lengths = np.where(
            (tokens == PAD) | (tokens == self.hidden), 0, begins[tokens + 1] - begins[tokens]
        )
        out, where = np.ones((len(tokens), len(self.share))), ranges(begins[tokens], lengths)
        out[np.repeat(np.arange(len(tokens)), lengths), classes[where]] += more[where]
        return out


@functools.lru_cache(1)  # a validation comes again with the same masks
def word_loss(dataset: BlockDataset, train: BlockDataset) -> float | None:
    """The guess's mean cross-entropy at some places of a split that show `<mask>`, in nats, among
    all tokens; None if there are none."""
    lists, asked, words, places = dataset.epoch_batches(1), [], [], 0
    for i in np.random.RandomState(0).permutation(len(lists)):
        batch = dataset.batch(lists[i], 1)
        asked.append(beside(batch, batch.masked))
        words.append(batch.target.ravel()[batch.target_places])
        places += len(batch.masked)
        if places >= MOST_PLACES:
            break
    if not places:
        return None
    parts, room = [], MOST_TOKENS
    for part in train.stream.checked(train.dictionary):
        parts.append(part[:room].astype(np.int64))
        room -= len(parts[-1])
        if not room:
            break
    text = np.concatenate(parts)
    counted = Neighbours(
        np.stack([text[:-2], text[2:]]), text[1:-1], len(train.dictionary), train.dictionary
    )
    return float(counted.answer(np.concatenate(asked, 1), np.concatenate(words))["loss"].mean())
