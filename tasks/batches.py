"""Which examples make a batch, in which order, and how an encoder's answers come back to them.

The order and the batches are those of fairseq's task sentence_prediction at commit 3f6ba43f, but
for group_lengths, which it does not have.
"""

from hardware.device import Device
from tasks.labelled import Split
from text.binarized import PAD

import numpy as np
import torch
from torch import Tensor


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
    lengths = [len(row) for row in rows]
    tokens = np.full((len(rows), max(lengths)), PAD, np.int64)
    for place, row in zip(tokens, rows):
        place[: len(row)] = row
    return tokens, min(lengths) < max(lengths)


@torch.no_grad()
def outputs_of(function, device: Device, split: Split, cfg, sort: bool = False) -> Tensor:
    """function(tokens, padded) of all examples, a row each in their order, float32 on the CPU.

    cfg: its batch_size and max_tokens; sort: put examples of like length into one batch.
    """
    order = np.arange(len(split.rows))
    if sort:
        order = np.argsort(-split.lengths, kind="stable")
    batches = cut_batches(split.lengths, order, cfg.batch_size, cfg.max_tokens)
    outputs = []
    for ids in batches:
        tokens, padded = pad([split.rows[i] for i in ids])
        with device.autocast():
            outputs.append(function(device.tensor(tokens), padded).float().cpu())
    place = torch.from_numpy(np.argsort(np.concatenate(batches)))  # of each example
    return torch.cat(outputs)[place]
