"""What goes in: masks by the rule, batches, epochs.

    python data.py --data_path DIR [--json]     describe a dataset: what a run would see, and lose
    python data.py --make_demo DIR              write a small demo corpus

A *block* is one training sample: `<s>` and consecutive sentences of the dataset. A *batch* holds
several blocks, padded to one length. The rules are those of fairseq's MaskTokensDataset and its
masked language modeling task, at commit 3f6ba43f; comments mark where the default differs.

Shapes: B blocks of a batch, T tokens of its longest, U tokens that the teacher reads of each,
K places chosen for masking, M of them that show `<mask>`.
"""

from dataclasses import dataclass
from pathlib import Path

from config import DataConfig, InputError

if __name__ == "__main__":
    from run import flags

    flags.start()

from text.binarized import BOS, PAD, SPECIAL, Dictionary, TokenStream, missing
from text.blocks import cut_batches, cut_blocks, order_by_length
from text.masks import hide_blocks, hide_blocks_is_exact, ranges

import numpy as np

DRAWN_AT_ONCE = 1 << 17  # tokens of the batches whose masks are drawn together

# ------------------------------------------------------------------------------------------- masks


def mask_block(
    length: int, dictionary: Dictionary, cfg: DataConfig, epoch: int, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the mask of block number `index` of `length` tokens, `<s>` included.

    Returns the places chosen for masking, bool (T,), and what the student reads at each, int64
    (T,): `<mask>`, a random token, or -1 for the token itself. Each block of each epoch has a
    generator of its own, so masks depend neither on the order of blocks nor on the number of
    workers.
    """
    # fairseq's seed, to the bit: the float remainder of Python's own hash of the three integers
    rng = np.random.default_rng(int(hash((cfg.seed, epoch, index)) % 1e6))
    count = int(cfg.mask_prob * length / cfg.mask_multiple_length + rng.random())
    starts = rng.choice(length, count, replace=False)
    spans = np.full(count, cfg.mask_multiple_length)
    if cfg.mask_stdev > 0:
        drawn = rng.normal(cfg.mask_multiple_length, cfg.mask_stdev, size=count)
        spans = np.maximum(np.rint(drawn), 0).astype(np.int64)
    places = ranges(starts, spans)
    hidden = np.zeros(length, bool)
    hidden[places[places < length]] = True

    # some hidden places keep their token or get a random one; with neither, nothing more is drawn
    shows = np.where(hidden, dictionary.mask_id, -1)
    special = cfg.random_token_prob + cfg.leave_unmasked_prob
    if special == 0:
        return hidden, shows
    chosen = hidden & (rng.random(length) < special)
    left = np.full(length, cfg.leave_unmasked_prob > 0)
    if cfg.random_token_prob > 0 and cfg.leave_unmasked_prob > 0:
        left = rng.random(length) < cfg.leave_unmasked_prob / special
    shows[chosen & left] = -1
    random = chosen & ~left
    if random.any():
        weights = np.ones(len(dictionary))
        weights[: len(SPECIAL)] = 0
        p = weights / weights.sum()
        shows[random] = rng.choice(len(dictionary), int(random.sum()), p=p)
    return hidden, shows


def padded(values: np.ndarray, lengths: np.ndarray, fill) -> np.ndarray:
    """Values of N rows, one after the other, as rows of one length: (N, longest or 1)."""
    is_value = np.arange(max(1, lengths.max())) < lengths[:, None]
    rows = np.full(is_value.shape, fill, values.dtype)
    rows[is_value] = values
    return rows


# ----------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Masked blocks, on the host; arrays are int64.

    The teacher reads the whole blocks (U = T) or, with teacher_input=masked, their masked tokens
    squeezed together. What can be counted is counted here, so that no step has to ask the device.
    """

    source: np.ndarray  # (B, T): what the student reads
    target: np.ndarray  # (B, U): what the teacher reads
    masked: np.ndarray  # (M,): flat places in `source` that show `<mask>`
    target_places: np.ndarray  # (M,): flat places of the same tokens in `target`
    chosen: np.ndarray  # (K,): flat places in `source` chosen for masking, whatever they show
    ids: np.ndarray  # (B,) block numbers
    ntokens: int  # tokens that are not padding
    source_padded: bool  # holds at least one <pad>
    target_padded: bool
    pinned: object = None  # all arrays in one tensor that a device can copy itself (Device.pin)


class BlockDataset:
    """The blocks of one split of one folder, cut into batches once.

    In training the order of batches is shuffled each epoch, and blocks longer than max_tokens are
    skipped. In any other split the order is fixed, the masks are those of epoch 1, and such a block
    is an error.
    """

    def __init__(self, cfg: DataConfig, folder, split: str, dictionary: Dictionary):
        self.cfg = cfg
        self.dictionary = dictionary
        self.split = split
        self.training = split == "train"
        self.stream = TokenStream(folder, split)
        self.limit = min(cfg.tokens_per_sample, cfg.max_tokens)  # tokens of the longest block
        # differs from fairseq: with long_sentences=split a max_tokens below tokens_per_sample
        # shortens the blocks; fairseq drops those longer than max_tokens
        split_long = cfg.long_sentences == "split"
        block_size = (self.limit if split_long else cfg.tokens_per_sample) - 1
        if block_size < 1:
            raise InputError(f"--max_tokens {cfg.max_tokens}: too small for <s> and a token")
        sizes = self.stream.sizes
        self.starts, ends = cut_blocks(sizes, cfg.sample_break_mode, block_size, split_long)
        self.lengths = (ends - self.starts + 1).astype(np.int32)  # with <s>
        self._cut_batches()
        if len(self.batch_ends) == 0:
            raise InputError(
                f"{folder}: {split} gives no batch: {len(sizes)} sentences, {len(self.lengths)}"
                f" blocks, {len(self.too_long)} longer than {self.limit} tokens,"
                f" {len(self.remainder)} in a dropped remainder"
            )

    def _cut_batches(self):
        """Set `order`, the blocks by length, `batch_ends` in it, and what is left out."""
        cfg = self.cfg
        order = order_by_length(self.lengths, cfg.seed)
        lengths = self.lengths[order]
        limit = self.limit if self.training else cfg.tokens_per_sample
        fit = int(np.searchsorted(lengths, limit, side="right"))
        self.order, self.too_long = np.split(order, [fit])
        longest = lengths[:fit].max(initial=0)
        if longest > cfg.max_tokens:
            raise InputError(
                f"{self.stream.folder}: {self.split} has a block of {longest} tokens,"
                f" above --max_tokens {cfg.max_tokens}"
            )
        multiple = cfg.required_batch_size_multiple
        ends = cut_batches(lengths[:fit], cfg.max_tokens, cfg.batch_size, multiple)
        last = int(ends[-2]) if len(ends) > 1 else 0  # where the last batch begins
        end = last if cfg.drop_remainder and (fit - last) % multiple else fit
        self.batch_ends = ends[ends <= end]
        self.remainder = self.order[end:]

    def dropped_tokens(self) -> tuple[int, int]:
        """Tokens that training never sees: (in blocks too long, in the dropped remainder)."""
        parts = (self.too_long, self.remainder)
        return tuple(int(self.lengths[part].sum()) - len(part) for part in parts)

    def epoch_batches(self, epoch: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """Block numbers of this worker's batches; all get as many, the last may be empty."""
        begins = np.concatenate([[0], self.batch_ends[:-1]])
        which = np.arange(len(self.batch_ends))
        if self.training:
            np.random.RandomState((self.cfg.seed + epoch) % 2**32).shuffle(which)
        mine = which[rank::world_size].tolist()
        lists = [self.order[begins[i] : self.batch_ends[i]] for i in mine]
        if len(lists) < -(-len(which) // world_size):
            lists.append(self.order[:0])
        return lists

    def read_block(self, index: int) -> np.ndarray:
        """`<s>` and the block's tokens, int64 (length,), unchecked."""
        start = self.starts[index]
        return np.concatenate([[BOS], self.stream.read(start, start + self.lengths[index] - 1)])

    def draw(self, ids: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """mask_block of the blocks `ids` in training epoch `epoch`, one after the other: (P,)."""
        cfg = self.cfg
        ids = ids.astype(np.int64)
        lengths = self.lengths[ids].astype(np.int64)
        ends = np.cumsum(lengths)
        if not self.training or cfg.fixed_masks:
            epoch = 1
        # all at once where only places are drawn; what this cannot draw, block by block
        hidden = np.zeros(ends[-1], bool)
        rest = range(len(ids))
        only_places = cfg.mask_stdev == cfg.random_token_prob == cfg.leave_unmasked_prob == 0
        if only_places and hide_blocks_is_exact(mask_block):
            hidden, rest = hide_blocks(lengths, ids, cfg, epoch)
        shows = np.where(hidden, self.dictionary.mask_id, -1)
        for i in rest:
            block = slice(ends[i] - lengths[i], ends[i])
            mask = mask_block(int(lengths[i]), self.dictionary, cfg, epoch, int(ids[i]))
            hidden[block], shows[block] = mask
        return hidden, shows

    def mask(self, ids: np.ndarray, epoch: int, drawn=None) -> tuple[np.ndarray, ...]:
        """The blocks `ids` (at least one), read and masked in training epoch `epoch`: (B, T) each.

        Returns the tokens, int64; what the student reads, int64; the places chosen for masking,
        bool, of which those with `<mask>` enter the loss. drawn: what `draw` returns, if known.
        Raises InputError if a block holds a token that training cannot take.
        """
        hidden, shows = drawn or self.draw(ids, epoch)  # (P,)
        lengths = self.lengths[ids].astype(np.int64)  # (B,) with <s>
        places = ranges(self.starts[ids], lengths - 1)  # of the text in the stream
        text = self.stream.take(places)
        self.stream.check_tokens(text, places, self.dictionary)
        is_text = np.ones(len(hidden), bool)  # (P,)
        is_text[np.cumsum(lengths) - lengths] = False
        tokens = np.full(len(hidden), BOS)
        tokens[is_text] = text
        source = np.where(shows < 0, tokens, shows)
        rows = ((tokens, PAD), (source, PAD), (hidden, False))
        return tuple(padded(values, lengths, fill) for values, fill in rows)

    def batch(self, ids: np.ndarray, epoch: int, drawn=None) -> Batch:
        """The masked batch of the blocks `ids` (at least one) in training epoch `epoch`."""
        tokens, source, hidden = self.mask(ids, epoch, drawn)  # (B, T)
        shows_mask = source == self.dictionary.mask_id
        masked = np.flatnonzero(shows_mask)  # (M,)
        chosen = np.flatnonzero(hidden)  # (K,)
        target = tokens
        target_places = masked
        if self.cfg.teacher_input == "masked":
            # fairseq's teacher reads <pad> at every other place, and pads count neither for
            # attention nor for positions: the same as the masked tokens squeezed together, at a
            # fraction of the work
            counts = hidden.sum(1)  # (B,)
            target = padded(tokens[hidden], counts, PAD)  # (B, U)
            target_places = np.flatnonzero(padded(shows_mask[hidden], counts, False))  # (M,)
        return Batch(
            source=source,
            target=target,
            masked=masked,
            target_places=target_places,
            chosen=chosen,
            ids=ids.astype(np.int64),
            ntokens=int(self.lengths[ids].sum()),
            source_padded=bool((source == PAD).any()),
            target_padded=bool((target == PAD).any()),
        )

    def batches(self, lists: list[np.ndarray], epoch: int):
        """The batch of each list of blocks that is not empty, in order, made when asked for."""
        lists = [ids for ids in lists if len(ids)]
        # masks of one batch alone would take longer than all the rest of it
        at_once = max(1, DRAWN_AT_ONCE // self.cfg.max_tokens)
        for first in range(0, len(lists), at_once):
            group = lists[first : first + at_once]
            ends = np.cumsum([self.lengths[ids].sum() for ids in group])
            masks = self.draw(np.concatenate(group), epoch)
            parts = [np.split(part, ends[:-1]) for part in masks]
            for ids, *drawn in zip(group, *parts):
                yield self.batch(ids, epoch, drawn)


# ------------------------------------------------------------------------------------------ epochs


class Corpus:
    """All n folders of `data_path`: epoch e trains on number (e - 1) mod n, else the first."""

    def __init__(self, cfg: DataConfig):
        cfg.check()
        self.cfg = cfg
        self.folders = [Path(folder) for folder in cfg.data_path.split(":") if folder]
        if not self.folders:
            raise InputError(f"--data_path {cfg.data_path}: names no folder")
        for folder in self.folders:
            if not folder.is_dir():
                raise InputError(missing(folder / "dict.txt"))
        self.dictionary = Dictionary(self.folders[0] / "dict.txt")
        for folder in self.folders[1:]:
            self.dictionary.check_same(folder / "dict.txt")
        self._splits = {}  # the last dataset of each name

    def split(self, name: str, epoch: int = 1) -> BlockDataset:
        number = (epoch - 1) % len(self.folders) if name == "train" else 0
        folder = self.folders[number]
        dataset = self._splits.get(name)
        if dataset is None or dataset.stream.folder != folder:
            dataset = BlockDataset(self.cfg, folder, name, self.dictionary)
            self._splits[name] = dataset
        return dataset


if __name__ == "__main__":
    from run import describe, flags

    flags.program(describe.main)
