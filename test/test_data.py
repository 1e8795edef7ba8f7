"""The fast masks equal the rule, to the bit; batches equal a plain loop; the prefetch thread."""

import contextlib
import dataclasses
import threading
from types import SimpleNamespace

import data
from config import DataConfig, InputError
from data import Batch, mask_block
from test.helpers import dataset_of, make_dataset
from text import masks
from text.binarized import PAD
from text.workers import prefetch

import numpy as np
import pytest

SYMBOLS = SimpleNamespace(mask_id=9)  # all that a mask without random tokens needs to know


# ----------------------------------------------------------------------------------------- masks


def check_masks(cfg, lengths, ids, epoch) -> np.ndarray:
    """Compare hide_blocks with the rule; returns the blocks that it could not do, and differ."""
    hidden, invalid = masks.hide_blocks(lengths, ids, cfg, epoch)
    different = []
    rows = np.split(hidden, np.cumsum(lengths)[:-1])
    for i, (row, length, index) in enumerate(zip(rows, lengths.tolist(), ids.tolist())):
        if not np.array_equal(row, mask_block(length, SYMBOLS, cfg, epoch, index)[0]):
            assert i in invalid, (cfg, epoch, length, index)
            different.append(i)
    too_long = np.flatnonzero(lengths > masks.FLOYD_LIMIT)
    assert {*too_long.tolist()} <= {*invalid.tolist()} and len(invalid) < len(too_long) + 20
    return np.setdiff1d(different, too_long)


def test_masks_of_many_blocks_at_once_match_the_rule_block_by_block():
    random = np.random.default_rng(3)
    for longest, blocks, rounds in ((2, 20, 20), (80, 60, 30), (600, 50, 20), (12_000, 12, 10)):
        for _ in range(rounds):
            cfg = DataConfig(
                seed=int(random.choice([1, random.integers(0, 2**32 - 10**6)])),
                mask_prob=float(random.choice([1e-4, 0.15, 0.35, 0.8, 0.999])),
                mask_multiple_length=int(random.choice([1, 2, 4, 10, 300, 10_000])),
            )
            ids = random.integers(0, random.choice([50, 10**9]), blocks)
            lengths = random.integers(2, longest + 1, blocks)
            check_masks(cfg, lengths, ids, int(random.integers(1, 200)))


def test_blocks_for_which_numpy_draws_again_are_reported():
    ids = np.arange(1000)
    cfg = DataConfig(mask_prob=0.1, mask_multiple_length=1)
    assert len(check_masks(cfg, np.full(len(ids), 10_000), ids, epoch=1))


def test_another_python_or_numpy_is_noticed_and_masks_follow_the_rule(corpus_dir, monkeypatch):
    dataset = dataset_of(corpus_dir)
    lists = dataset.epoch_batches(1)
    exact, tuple_hashes = masks.hide_blocks_is_exact.__wrapped__, masks.tuple_hashes
    expected = list(dataset.batches(lists, 3))
    assert exact(mask_block)
    for where, name, other in (
        (masks, "tuple_hashes", lambda *args: tuple_hashes(*args) + 2**40),
        (np.random, "default_rng", lambda seed: np.random.Generator(np.random.MT19937(seed))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, other)
            assert not exact(mask_block)
    monkeypatch.setattr(data, "hide_blocks_is_exact", lambda _: False)
    monkeypatch.setattr(data, "hide_blocks", None)
    check_same_batches(dataset.batches(lists, 3), expected)


# --------------------------------------------------------------------------------------- batches


def plain_batch(dataset, ids, epoch) -> Batch:
    """dataset.batch as a loop over the blocks."""
    cfg, dictionary, lengths = dataset.cfg, dataset.dictionary, dataset.lengths[ids].tolist()
    mask_epoch = epoch if dataset.training and not cfg.fixed_masks else 1
    tokens = np.full((len(ids), max(lengths)), PAD)
    source, hidden = tokens.copy(), np.zeros(tokens.shape, bool)
    for row, (index, n) in enumerate(zip(ids.tolist(), lengths)):
        tokens[row, :n] = dataset.read_block(index)
        hidden[row, :n], shows = mask_block(n, dictionary, cfg, mask_epoch, index)
        source[row, :n] = np.where(shows < 0, tokens[row, :n], shows)
    target, place = tokens, np.arange(tokens.size).reshape(tokens.shape)
    if cfg.teacher_input == "masked":
        width = max(1, int(hidden.sum(1).max()))
        target = np.full((len(ids), width), PAD)
        for row in range(len(ids)):
            squeezed = tokens[row][hidden[row]]
            target[row, : len(squeezed)] = squeezed
            place[row][hidden[row]] = row * width + np.arange(len(squeezed))
    masked = source == dictionary.mask_id
    return Batch(
        source,
        target,
        np.flatnonzero(masked),
        place[masked],
        np.flatnonzero(hidden),
        ids,
        ntokens=sum(lengths),
        source_padded=bool((source == PAD).any()),
        target_padded=bool((target == PAD).any()),
    )


def check_same_batches(batches, expected):
    batches, expected = list(batches), list(expected)
    assert len(batches) == len(expected) > 0
    for a, b in zip(batches, expected):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(y, np.ndarray):
                assert x.dtype == np.int64 and np.array_equal(x, y), field.name
            else:
                assert type(x) is type(y) and x == y, field.name


@pytest.mark.parametrize("teacher_input", ["full", "masked"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(long_sentences="skip", drop_remainder=True),
        dict(sample_break_mode="none", mask_multiple_length=1),
        dict(sample_break_mode="eos", fixed_masks=True),
        dict(mask_stdev=1.5),
        dict(random_token_prob=0.3),
        dict(random_token_prob=0.2, leave_unmasked_prob=0.3),
        dict(mask_prob=1e-6),
    ],
)
def test_batches_match_the_plain_loop(corpus_dir, teacher_input, options):
    for split in ("train", "valid"):
        dataset = dataset_of(corpus_dir, split, teacher_input=teacher_input, **options)
        lists = dataset.epoch_batches(2)[:12]
        lists += [ids[::-1] for ids in lists]  # longest first
        plain = [plain_batch(dataset, ids, 2) for ids in lists]
        check_same_batches(dataset.batches([lists[0][:0], *lists, lists[0][:0]], 2), plain)
        check_same_batches((dataset.batch(ids, 2) for ids in lists), plain)


def test_a_pad_symbol_in_the_text_counts_as_padding(tmp_path):
    folder, _ = make_dataset(tmp_path, [[1, 5, 6, 2], [2], [7, 8, 9, 2], [2]] * 8)
    dataset = dataset_of(folder, tokens_per_sample=8, max_tokens=16)
    batches = list(dataset.batches(dataset.epoch_batches(1), 1))
    check_same_batches(batches, [plain_batch(dataset, batch.ids, 1) for batch in batches])
    assert {batch.target_padded for batch in batches} == {True, False}


# ------------------------------------------------------------------------------------ the thread


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def counting(makers: list, end: int, error=None):
    for i in range(end):
        makers.append(threading.current_thread().name)
        yield i
    if error:
        raise error


@pytest.mark.parametrize("depth", [1, 4, 100])
@pytest.mark.parametrize("error", [None, InputError("here"), MemoryError(), KeyboardInterrupt()])
def test_prefetch_keeps_the_order_and_raises_an_error_in_place_of_its_item(depth, error):
    makers, came = [], []
    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        for item in prefetch(counting(makers, 50, error), depth):
            came.append(item)
            assert len(makers) <= len(came) + depth
    assert came == list(range(50)) and not threads()
    assert all(name.startswith("prefetch") for name in makers)


def test_prefetch_stops_its_thread_when_it_is_closed_or_its_consumer_fails():
    makers = []
    items = prefetch(counting(makers, 10**9), 3)
    assert not threads()  # nothing starts before the first item is asked for
    assert next(items) == 0 and threads()
    items.close()
    assert not threads() and len(makers) <= 4
    with pytest.raises(KeyboardInterrupt):
        for item in prefetch(counting([], 10**9), 3):
            if item == 5:
                raise KeyboardInterrupt
    assert not threads()
