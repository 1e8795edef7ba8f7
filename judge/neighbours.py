"""What counting reaches, without a model: a hidden token guessed from the two beside it.

    p(w | left, right)  ~  p(w | left) p(w | right) / p(w)

p(w) is the share of w among the places that are counted, p(w | left) its share after the token
`left`, as if STRENGTH more tokens with the shares p had come there, and p(w | right) the same
before `right`. A neighbour that is hidden too, or outside the block, tells nothing. A model that
learns from context should come to know more than this.
"""

import functools

from data import Batch, BlockDataset
from text.binarized import PAD
from text.masks import ranges

import numpy as np

MOST_TOKENS = 10_000_000  # of the training split, that are counted for all tokens
MOST_PLACES = 20_000  # of the evaluated split, that are asked for all tokens
STRENGTH = 100.0  # on film reviews 200 changes the loss by 0.02 nats
AT_ONCE = 64  # places, for the memory's sake


def beside(batch: Batch, flat: np.ndarray) -> np.ndarray:
    """The tokens left and right of the flat places (N,) in (B x T): (2, N), PAD outside a block."""
    text = np.pad(batch.source, ((0, 0), (1, 1)), constant_values=PAD)
    row, column = np.divmod(flat, batch.source.shape[1])
    return np.stack([text[row, column], text[row, column + 2]])


class Neighbours:
    """Counts of K classes beside each token."""

    def __init__(self, tokens: np.ndarray, labels: np.ndarray, classes: int, dictionary):
        """tokens: those left and right (2, N) of places that hide the classes `labels` (N,).

        classes: K; dictionary: a text.binarized.Dictionary.
        """
        counts = np.bincount(labels, minlength=classes) + 1.0
        self.share = counts / counts.sum()  # (K,)
        self.tells_nothing = (PAD, dictionary.mask_id)
        self.sides = []
        for neighbour in tokens:
            keys, counts = np.unique(neighbour * classes + labels, return_counts=True)
            # where each token's row of classes begins
            begins = np.searchsorted(keys, np.arange(len(dictionary) + 1) * classes)
            of_key = keys % classes
            # how much more likely than elsewhere each class of the row is, before scaling
            more = counts / (STRENGTH * self.share[of_key])
            self.sides.append((begins, of_key, more))

    def answer(self, tokens: np.ndarray, labels: np.ndarray) -> dict:
        """`hit` (N,) bool and `loss` (N,) float64 in nats at places beside the tokens (2, N)."""
        hit, loss = [], []
        for i in range(0, len(labels), AT_ONCE):
            label = labels[i : i + AT_ONCE]
            likely = self.share
            for side, neighbours in zip(self.sides, tokens[:, i : i + AT_ONCE]):
                likely = likely * self.factors(*side, neighbours)  # (N, K)
            hit.append(likely.argmax(1) == label)
            loss.append(np.log(likely.sum(1) / likely[np.arange(len(label)), label]))
        return dict(hit=np.concatenate(hit), loss=np.concatenate(loss))

    def factors(self, begins, classes, more, tokens: np.ndarray) -> np.ndarray:
        """How much more likely each class is beside each token (N,), up to scale: (N, K)."""
        lengths = begins[tokens + 1] - begins[tokens]
        lengths[np.isin(tokens, self.tells_nothing)] = 0
        entries = ranges(begins[tokens], lengths)
        row = np.repeat(np.arange(len(tokens)), lengths)
        factors = np.ones((len(tokens), len(self.share)))
        factors[row, classes[entries]] += more[entries]
        return factors


@functools.lru_cache(1)  # a validation comes again with the same masks
def word_loss(dataset: BlockDataset, train: BlockDataset) -> float | None:
    """The guess's mean cross-entropy in nats, among all tokens, at places that show `<mask>`.

    None if the split has no such place.
    """
    lists = dataset.epoch_batches(1)
    tokens, words, places = [], [], 0
    for i in np.random.RandomState(0).permutation(len(lists)):
        batch = dataset.batch(lists[i], 1)
        tokens.append(beside(batch, batch.masked))
        words.append(batch.target.ravel()[batch.target_places])
        places += len(batch.masked)
        if places >= MOST_PLACES:
            break
    if not places:
        return None

    # count in the beginning of the training split
    train.stream.counts(train.dictionary)  # checks every token, once
    text = train.stream.read(0, min(MOST_TOKENS, train.stream.tokens))
    sides = np.stack([text[:-2], text[2:]])
    counts = Neighbours(sides, text[1:-1], len(train.dictionary), train.dictionary)
    answer = counts.answer(np.concatenate(tokens, axis=1), np.concatenate(words))
    return float(answer["loss"].mean())
