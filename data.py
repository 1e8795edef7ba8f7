"""What goes in: settings, masks by the rule, batches, epochs.

    python data.py --data_path DIR      describe a dataset; the command's other options are in text/demo.py

A *block* is one training sample: `<s>` and consecutive sentences of the dataset. A *batch* holds several blocks, padded
to one length. Rules are those of fairseq's MaskTokensDataset and its masked language modeling task, at commit 3f6ba43f;
comments mark where the default differs.
"""

import functools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config import DataConfig, InputError
from text.binarized import BOS, PAD, PIECE, SPECIAL, Dictionary, TokenStream, no_folder
from text.blocks import cut_batches, cut_blocks, order_by_length
from text.masks import hide_blocks, hide_blocks_is_exact, ranges

import numpy as np

# ---------------------------------------------------------------------------------------------- masks


class BlockMask(NamedTuple):
    hidden: np.ndarray  # (length,) bool: the places chosen for masking
    shown: (
        np.ndarray
    )  # (length,) bool: those of them where the student sees `<mask>` or a random token
    random: tuple | None  # (places (length,) bool, their tokens): those of them with a random token


def mask_block(
    length: int, dictionary: Dictionary, cfg: DataConfig, epoch: int, index: int
) -> BlockMask:
    """Draw the mask of block number `index` of `length` tokens, `<s>` included.

    Each block of each epoch has a generator of its own, so masks depend neither on the order of blocks nor on the
    number of workers.
    """
    # fairseq's seed, to the bit: the float remainder of Python's own hash of the three integers
    rng = np.random.default_rng(int(hash((cfg.seed, epoch, index)) % 1e6))
    count = int(cfg.mask_prob * length / cfg.mask_multiple_length + rng.random())
    starts = rng.choice(length, count, replace=False)
    if cfg.mask_stdev > 0:
        spans = np.rint(rng.normal(cfg.mask_multiple_length, cfg.mask_stdev, size=count))
        places = ranges(starts, np.maximum(spans, 0).astype(np.int64))
    else:
        places = (starts[:, None] + np.arange(cfg.mask_multiple_length)).ravel()
    hidden = np.zeros(length, bool)
    hidden[places[places < length]] = True

    # some hidden places keep their token or get a random one; with neither option nothing more is drawn
    special = cfg.random_token_prob + cfg.leave_unmasked_prob
    if special == 0:
        return BlockMask(hidden, hidden, None)
    chosen = hidden & (rng.random(length) < special)
    left = np.full(length, cfg.leave_unmasked_prob > 0)
    if cfg.random_token_prob > 0 and cfg.leave_unmasked_prob > 0:
        left = rng.random(length) < cfg.leave_unmasked_prob / special
    shown, random = hidden & ~(chosen & left), chosen & ~left
    if not random.any():
        return BlockMask(hidden, shown, None)
    weights = np.ones(len(dictionary))
    weights[: len(SPECIAL)] = 0
    tokens = rng.choice(len(dictionary), int(random.sum()), p=weights / weights.sum())
    return BlockMask(hidden, shown, (random, tokens))


# ---------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Masked blocks, on the host. B blocks, T their longest length, U the teacher's; arrays are int64.

    The teacher reads the whole blocks (U = T) or, with teacher_input=masked, their masked tokens squeezed together.
    Everything that can be counted is counted here, so no step has to ask the device.
    """

    source: np.ndarray  # (B, T): what the student reads
    target: np.ndarray  # (B, U): what the teacher reads
    masked: np.ndarray  # (M,): flat places in `source` that show `<mask>`
    target_places: np.ndarray  # (M,): flat places of the same tokens in `target`
    chosen: (
        np.ndarray
    )  # (K,): flat places in `source` chosen for masking, also those that show another token
    ids: np.ndarray  # (B,) block numbers
    ntokens: int  # tokens that are not padding
    source_padded: bool  # holds at least one <pad>
    target_padded: bool
    pinned: object = (
        None  # a tensor of the arrays, back to back, that a device can copy by itself (Device.pin)
    )

    @property
    def nsentences(self) -> int:
        return len(self.ids)

    @property
    def sample_size(self) -> int:
        return len(self.masked)


class MaskedRows(NamedTuple):  # padded blocks, back to back (P,), or (B, T)
    tokens: np.ndarray  # int64
    source: np.ndarray  # int64: what the student reads
    hidden: (
        np.ndarray
    )  # bool: the places chosen for masking; those that show `<mask>` enter the loss


def cut(array: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """The parts of an array between one end and the next."""
    ends = ends.tolist()
    return [array[begin:end] for begin, end in zip([0, *ends], ends)]


class BlockDataset:
    """The blocks of one split of one folder, cut into batches once.

    In training the order of batches is shuffled each epoch, and blocks longer than max_tokens are skipped. In any other
    split the order is fixed, the masks are those of epoch 1, and such a block is an error.
    """

    def __init__(self, cfg: DataConfig, folder, split: str, dictionary: Dictionary):
        cfg.check()
        self.cfg, self.dictionary, self.split = cfg, dictionary, split
        self.training = split == "train"
        self.stream = TokenStream(folder, split)
        split_long = cfg.long_sentences == "split"
        limit = min(cfg.tokens_per_sample, cfg.max_tokens)
        # differs from fairseq: with long_sentences=split a max_tokens below tokens_per_sample shortens the blocks;
        # fairseq drops those longer than max_tokens
        block_size = (limit if split_long else cfg.tokens_per_sample) - 1
        if block_size < 1:
            raise InputError(f"--max_tokens {cfg.max_tokens}: too small for <s> and a token")
        self.starts, ends = cut_blocks(
            self.stream.sizes, cfg.sample_break_mode, block_size, split_long
        )
        self.lengths = (ends - self.starts + 1).astype(np.int32)  # with <s>
        order = order_by_length(self.lengths, cfg.seed)
        ascending = self.lengths[order]
        fit = int(
            np.searchsorted(
                ascending, limit if self.training else cfg.tokens_per_sample, side="right"
            )
        )
        order, ascending, self.too_long = order[:fit], ascending[:fit], order[fit:]
        if not self.training and fit and ascending[-1] > cfg.max_tokens:
            raise InputError(
                f"{folder}: {split} has a block of {ascending[-1]} tokens, above --max_tokens {cfg.max_tokens}"
            )
        ends = cut_batches(
            ascending, cfg.max_tokens, cfg.batch_size, cfg.required_batch_size_multiple
        )
        last = int(ends[-2]) if len(ends) > 1 else 0  # where the last batch begins
        dropped = cfg.drop_remainder and (fit - last) % cfg.required_batch_size_multiple
        self.remainder = order[last:] if dropped else order[:0]
        self.order, self.batch_ends = order, ends[:-1] if dropped else ends
        if len(self.batch_ends) == 0:
            raise InputError(
                f"{folder}: {split} gives no batch: {len(self.stream.sizes)} sentences, {len(self.lengths)} blocks,"
                f" {len(self.too_long)} longer than {limit} tokens, {len(self.remainder)} in a dropped remainder"
            )

    def dropped_tokens(self) -> tuple[int, int]:
        """Tokens of the text that training never sees: (in blocks too long, in the dropped remainder)."""
        return tuple(
            int(self.lengths[part].sum()) - len(part) for part in (self.too_long, self.remainder)
        )

    def epoch_batches(self, epoch: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """Block numbers of this worker's batches, in order; all workers get as many lists, the last may be empty."""
        begins = np.concatenate([[0], self.batch_ends[:-1]])
        which = np.arange(len(self.batch_ends))
        if self.training:
            np.random.RandomState((self.cfg.seed + epoch) % 2**32).shuffle(which)
        mine = [
            self.order[begins[i] : self.batch_ends[i]] for i in which[rank::world_size].tolist()
        ]
        if len(mine) < -(-len(which) // world_size):
            mine.append(self.order[:0])
        return mine

    def read_block(self, index: int) -> np.ndarray:
        """`<s>` and the block's tokens, int64 (length,), unchecked."""
        start, end = int(self.starts[index]), int(self.starts[index] + self.lengths[index]) - 1
        return np.concatenate([[BOS], self.stream.read(start, end)])

    def _mask_rows(self, ids: np.ndarray, widths: np.ndarray, epoch: int) -> MaskedRows:
        """Read and mask the blocks `ids`, in rows of these widths. InputError: a token that training cannot take."""
        begins, lengths = np.cumsum(widths) - widths, self.lengths[ids].astype(np.int64)  # (R,)
        places = ranges(self.starts[ids], lengths - 1)  # of the text in the stream
        text = self.stream.take(places)
        self.stream.check_tokens(text, places, self.dictionary)
        tokens, of_text = np.full(widths.sum(), PAD, np.int64), np.ones(widths.sum(), bool)  # (P,)
        of_text[begins] = of_text[ranges(begins + lengths, widths - lengths)] = False
        tokens[begins], tokens[of_text] = BOS, text

        cfg, source, hidden = self.cfg, tokens.copy(), np.zeros(len(tokens), bool)
        mask_epoch = epoch if self.training and not cfg.fixed_masks else 1
        mask_one = functools.partial(
            mask_block, dictionary=self.dictionary, cfg=cfg, epoch=mask_epoch
        )
        if (
            cfg.mask_stdev == cfg.random_token_prob == cfg.leave_unmasked_prob == 0
            and hide_blocks_is_exact()
        ):
            rule = cfg.seed, mask_epoch, cfg.mask_prob, cfg.mask_multiple_length
            hide_blocks(hidden, begins, lengths, ids, *rule, mask_one)
            source[hidden] = self.dictionary.mask_id
        else:
            for begin, length, index in zip(begins.tolist(), lengths.tolist(), ids.tolist()):
                row, mask = slice(begin, begin + length), mask_one(length, index=index)
                hidden[row] = mask.hidden
                source[row][mask.shown] = self.dictionary.mask_id
                if mask.random is not None:
                    source[row][mask.random[0]] = mask.random[1]
        return MaskedRows(tokens, source, hidden)

    def mask(self, ids: np.ndarray, epoch: int) -> MaskedRows:
        """The blocks `ids` (at least one) read and masked in training epoch `epoch`, (B, T) each."""
        rows = self._mask_rows(
            ids.astype(np.int64), np.full(len(ids), self.lengths[ids].max()), epoch
        )
        return MaskedRows(*(array.reshape(len(ids), -1) for array in rows))

    def _make_batches(self, lists: list[np.ndarray], epoch: int) -> list[Batch]:
        """The masked batches of several lists of blocks, none empty. Made together, since numpy is slow on arrays as
        short as one batch. Axes: N batches, R rows of all batches, P places of all rows, M masked tokens."""
        ids, mask_id = np.concatenate(lists).astype(np.int64), self.dictionary.mask_id  # (R,)
        counts = np.array([len(part) for part in lists])  # (N,) rows
        first = np.cumsum(counts) - counts  # (N,) first row
        lengths = self.lengths[ids]  # (R,)
        widths = np.maximum.reduceat(lengths, first)  # (N,)
        row_widths = np.repeat(widths, counts)  # (R,)
        tokens, source, hidden = self._mask_rows(ids, row_widths, epoch)  # (P,)
        masked = np.flatnonzero(source == mask_id)  # (M,)
        target, target_widths, target_places = tokens, widths, masked
        if self.cfg.teacher_input == "masked":
            # fairseq's teacher reads <pad> at every other place, and pads count neither for attention nor for
            # positions: the same as the masked tokens squeezed together, at a fraction of the work
            places = np.flatnonzero(hidden)
            row_counts = np.diff(np.searchsorted(places, np.cumsum(row_widths)), prepend=0)  # (R,)
            target_widths = np.maximum(np.maximum.reduceat(row_counts, first), 1)  # (N,)
            row_widths = np.repeat(target_widths, counts)
            squeezed = ranges(np.cumsum(row_widths) - row_widths, row_counts)
            target = np.full(int(row_widths.sum()), PAD, np.int64)
            target[squeezed] = tokens[places]
            target_places = squeezed[source[places] == mask_id]  # (M,)

        # cut; flat places count from where their batch begins
        ends, target_ends = np.cumsum(counts * widths), np.cumsum(counts * target_widths)  # (N,)
        begins, target_begins = ends - counts * widths, target_ends - counts * target_widths
        masked_ends = np.searchsorted(masked, ends)
        masked_counts = np.diff(masked_ends, prepend=0)
        chosen, chosen_ends = masked, masked_ends
        if self.cfg.random_token_prob + self.cfg.leave_unmasked_prob > 0:
            chosen = np.flatnonzero(hidden)  # (K,)
            chosen_ends = np.searchsorted(chosen, ends)
        fields = dict(  # of every batch
            source=[
                part.reshape(count, -1) for part, count in zip(cut(source, ends), counts.tolist())
            ],
            target=[
                part.reshape(count, -1)
                for part, count in zip(cut(target, target_ends), counts.tolist())
            ],
            masked=cut(masked - np.repeat(begins, masked_counts), masked_ends),
            target_places=cut(target_places - np.repeat(target_begins, masked_counts), masked_ends),
            chosen=cut(chosen - np.repeat(begins, np.diff(chosen_ends, prepend=0)), chosen_ends),
            ids=cut(ids, np.cumsum(counts)),
            ntokens=np.add.reduceat(lengths, first).tolist(),
            source_padded=np.logical_or.reduceat(source == PAD, begins).tolist(),
            target_padded=np.logical_or.reduceat(target == PAD, target_begins).tolist(),
        )
        return [Batch(**dict(zip(fields, values))) for values in zip(*fields.values())]

    def batches(self, lists: list[np.ndarray], epoch: int):
        """Yield the masked batch of each list of blocks in training epoch `epoch`, in order; an empty list has none."""
        lists, at_once = [ids for ids in lists if len(ids)], max(1, PIECE // self.cfg.max_tokens)
        for first in range(0, len(lists), at_once):
            some = lists[first : first + at_once]
            try:
                yield from self._make_batches(some, epoch)
            except InputError:  # a bad token in one of them; the batches before it are good
                yield from (self.batch(ids, epoch) for ids in some)

    def batch(self, ids: np.ndarray, epoch: int) -> Batch:
        """The masked batch of the blocks `ids` (at least one) in training epoch `epoch`."""
        return self._make_batches([ids], epoch)[0]


# ---------------------------------------------------------------------------------------------- epochs


def prefetch(iterable, depth: int, begin=None):
    """Yield the items in their order while a thread, which calls `begin` first, makes up to `depth` of them in advance.

    An error of the iterable is raised in place of its item. If the generator is closed, or its consumer fails, the
    thread stops after the item it is working on.
    """
    items, end = iter(iterable), object()
    maker = ThreadPoolExecutor(1, "prefetch", begin)
    try:
        ahead = deque(maker.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(maker.submit(next, items, end))
            yield item
    finally:
        maker.shutdown(cancel_futures=True)


class Corpus:
    """All n folders of `data_path`: training epoch e reads number (e - 1) mod n, everything else the first."""

    def __init__(self, cfg: DataConfig):
        cfg.check()
        self.cfg = cfg
        self.folders = [Path(folder) for folder in cfg.data_path.split(":") if folder]
        if not self.folders:
            raise InputError(f"--data_path {cfg.data_path}: names no folder")
        if missing := [folder for folder in self.folders if not folder.is_dir()]:
            raise InputError(no_folder(missing[0]))
        self.dictionary = Dictionary(self.folders[0] / "dict.txt")
        self._kept = {}

    def split(self, name: str, epoch: int = 1) -> BlockDataset:
        folder = self.folders[(epoch - 1) % len(self.folders) if name == "train" else 0]
        if name not in self._kept or self._kept[name][0] != folder:
            self._kept[name] = folder, BlockDataset(self.cfg, folder, name, self.dictionary)
        return self._kept[name][1]


if __name__ == "__main__":
    from run import flags
    from text import demo

    flags.program(demo.main)
