"""The classifier of fine-tuning: its batches, encoder and head, their loss, and its checkpoint.

Source: fairseq at commit 3f6ba43f, RobertaClassificationHead, task and criterion
sentence_prediction; but for group_lengths, which fairseq does not have.
"""

import math

from config import reading
from data import padded
from hardware.device import Device
from model import PAD, Encoder
from run import checkpoint
from run.checkpoint import Loaded
from tasks import metrics
from tasks.labelled import Split
from tasks.tables import score_of

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------- its batches


def training_order(count: int, seed: int) -> np.ndarray:
    """The order in which examples are cut into batches: sorted by the value that each one drew."""
    return np.argsort(np.random.RandomState(seed).permutation(count), kind="stable")


def group_lengths(lengths: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """The order with each `count` examples in a row sorted by length, so that little is padding."""
    parts = np.split(order, range(count, len(order), count))
    return np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])


def cut_batches(
    lengths: np.ndarray, order: np.ndarray, batch_size: int, max_tokens: int
) -> list[np.ndarray]:
    """Row numbers of each batch.

    An example that would make the batch longer than `batch_size`, or its examples times the longest
    above `max_tokens` (0: no limit), begins the next one.
    """
    batches = []
    begin = longest = 0
    for i, length in enumerate(lengths[order].tolist()):
        count = i - begin + 1
        longer = max(longest, length)
        is_full = count > batch_size or 0 < max_tokens < count * longer
        if is_full and i > begin:
            batches.append(order[begin:i])
            begin, longer = i, length
        longest = longer
    return batches + [order[begin:]] if len(order) else []


def epoch_batches(batches: list, seed: int, epoch: int) -> list:
    """The batches in the order of an epoch, from 1; their content stays what it is."""
    order = list(range(len(batches)))
    np.random.RandomState(seed + epoch).shuffle(order)
    return [batches[i] for i in order]


def pad(rows: list[np.ndarray]) -> tuple[np.ndarray, bool]:
    """Rows of tokens -> (B, T) int64, filled up with PAD on the right; whether any PAD is in it."""
    tokens = padded(np.concatenate(rows), np.array([len(row) for row in rows]), PAD)
    return tokens, bool((tokens == PAD).any())  # a dictionary of words may find <pad> in a text


# --------------------------------------------------------------------------------- encoder and head


class SentenceHead(nn.Module):
    """The reference's head: the hidden state at <s> -> Linear -> tanh -> Linear."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, outputs)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        """hidden (B, T, C), real (B, T) bool, True at text -> (B, outputs)."""
        x = torch.tanh(self.dense(hidden[:, 0]))  # (B, C)
        return self.out_proj(x)


class LinearProbe(nn.Module):
    """The head of --freeze and --pool mean: the mean hidden state of an example -> Linear."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.out_proj = nn.Linear(width, outputs)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        """hidden (B, T, C), real (B, T) bool, True at text -> (B, outputs)."""
        return self.out_proj(mean_state(hidden, real))


def mean_state(hidden: Tensor, real: Tensor) -> Tensor:
    """(B, T, C) -> (B, C) float32, the mean over the text."""
    return (hidden.float() * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)


class Classifier(nn.Module):
    """An encoder and a head on it."""

    def __init__(self, encoder: Encoder, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, tokens: Tensor, padded: bool) -> Tensor:
        """tokens (B, T) int64; padded: whether PAD may occur in them -> (B, outputs)."""
        hidden, _ = self.encoder(tokens, padded)
        return self.head(hidden, tokens != PAD)

    def features(self, tokens: Tensor, padded: bool) -> Tensor:
        """What a linear probe reads, (B, C)."""
        hidden, _ = self.encoder(tokens, padded)
        return mean_state(hidden, tokens != PAD)


def loss_sum(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (nats), or squared error of scores, summed over the examples; float32."""
    if labels.is_floating_point():  # scores, (N,); outputs are (N, 1)
        return F.mse_loss(outputs.float().view(-1), labels, reduction="sum")
    return F.cross_entropy(outputs.float(), labels, reduction="sum")


@torch.no_grad()
def outputs_of(function, device: Device, split: Split, cfg, sort: bool = False) -> Tensor:
    """function(tokens, padded) of all examples, a row each in their order, float32 on the CPU.

    cfg: its batch_size and max_tokens; sort: put examples of like length into one batch.
    """
    order = np.arange(len(split.rows))
    # fairseq validates unsorted; where nothing is compared with it, less padding is faster
    if sort:
        order = np.argsort(-split.lengths, kind="stable")
    outputs = []
    for ids in cut_batches(split.lengths, order, cfg.batch_size, cfg.max_tokens):
        tokens, padded = pad([split.rows[i] for i in ids])
        with device.autocast():
            outputs.append(function(device.tensor(tokens), padded).float().cpu())
    return torch.cat(outputs)[np.argsort(order)]  # each example at its place


def figures_of(outputs: Tensor, split: Split, names: list | None) -> dict:
    """Loss (mean, nats) and all measures of a split, from the model's outputs (N, outputs)."""
    loss = loss_sum(outputs, torch.from_numpy(split.labels)).item() / len(outputs)
    if names is None:
        measures = metrics.of_scores(outputs.view(-1).numpy(), split.labels)
        return dict(loss=loss, accuracy=None, **measures)
    # F1 is that of the class 1, where there are two
    ones = [i for i, name in enumerate(names) if score_of(name) == 1]
    positive = ones[0] if len(names) == 2 and ones else None
    return dict(loss=loss, **metrics.of_classes(outputs.argmax(1).numpy(), split.labels, positive))


# --------------------------------------------------------------------------------- in a checkpoint


def entry_of(loaded: Loaded, path) -> dict:
    """The entry `classifier` of a fine-tuned checkpoint.

    It holds head (a state dict), labels (the names of the classes, or None for scores), texts (1,
    or 2 for pairs), label_scale and, since 0.4.0, header (what the table's first row called the
    text columns, or None). Raises InputError.
    """
    with reading(f"{path}: damaged: its classifier"):
        entry = loaded.content["classifier"]
        # what is used later without another look
        names = entry["labels"]
        is_right = names is None or (names and all(isinstance(name, str) for name in names))
        is_right = is_right and isinstance(entry["head"], dict) and entry["texts"] in (1, 2)
        if not is_right or not 0 < entry["label_scale"] < math.inf:
            raise ValueError("not what a fine-tuning writes there")
    return entry


def rebuild(entry: dict, encoder: Encoder, path) -> Classifier:
    """The classifier of such an entry around an encoder. Raises InputError if it does not fit."""
    # the names of the weights tell which head it is
    kind = SentenceHead if "dense.weight" in entry["head"] else LinearProbe
    head = kind(encoder.embed_tokens.embedding_dim, len(entry["labels"] or ["score"]))
    checkpoint.put(entry["head"], head, "the classification head", path)
    return Classifier(encoder, head)
