"""The fast loader equals the plain one, to the bit: numpy's generator, masks, batches. And the prefetch thread."""

import dataclasses
import functools
import json
import threading

import bench
import data
from config import DataConfig, InputError
from data import Corpus, mask_block, prefetch
from hardware import bench_data
from test.helpers import GOLDEN, call, golden, make_dataset
from text import masks

import numpy as np
import pytest


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("corpus"))[0]


def check_same_batches(got, expected):
    got, expected = list(got), list(expected)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(y, np.ndarray):
                assert x.dtype == np.int64 and x.shape == y.shape and np.array_equal(x, y), (
                    field.name
                )
            else:
                assert type(x) is type(y) and x == y, field.name


# ---------------------------------------------------------------------------------------------- numpy's generator


def test_hashes_of_three_integers_match_python():
    random = np.random.default_rng(0)
    for first, second in [(0, 0), (2**32 - 1, 10**6), *random.integers(0, 2**20, (50, 2)).tolist()]:
        thirds = np.concatenate([np.arange(20), random.integers(0, 2**61 - 1, 50)])
        expected = [hash((first, second, third)) for third in thirds.tolist()]
        assert masks.tuple_hashes(first, second, thirds).tolist() == expected


def test_seeds_and_floats_match_numpy():
    seeds = np.concatenate(
        [[0, 1, 10**6 - 1, 2**32 - 1], np.random.default_rng(1).integers(0, 2**32, 500)]
    )
    words, floats = masks._seed_words(seeds), masks.Generators(seeds).random()
    for i, seed in enumerate(seeds.tolist()):
        assert np.array_equal(
            words[:, i], np.random.SeedSequence(seed).generate_state(4, np.uint64)
        )
        assert floats[i] == np.random.default_rng(seed).random()


def choices(seeds, n, count):
    """The places chosen for each seed, as bool (n,); and which of the seeds numpy may have drawn again for."""
    begin, chosen = np.cumsum(n) - n, np.zeros(int(n.sum()), bool)
    generators = masks.Generators(seeds)
    generators.random()
    redrawn = generators.choose(n, count, begin, chosen)
    return np.split(chosen, begin[1:]), redrawn.tolist()


def numpy_choice(seed, n, count):
    generator, chosen = np.random.default_rng(seed), np.zeros(n, bool)
    generator.random()
    chosen[generator.choice(n, count, replace=False)] = True
    return chosen


def test_choices_of_none_to_all_match_numpy():
    random, checked = np.random.default_rng(2), 0
    for most in (1, 2, 3, 70, 520, 10_000):
        n = np.concatenate([[most], random.integers(1, most + 1, 400)])
        count = np.minimum(n, (random.choice([0, 0.1, 0.3, 1, 1.1], len(n)) * n).astype(np.int64))
        seeds = random.integers(0, 10**6, len(n))
        chosen, redrawn = choices(seeds, n, count)
        for i, case in enumerate(zip(seeds.tolist(), n.tolist(), count.tolist())):
            if i not in redrawn:
                assert np.array_equal(chosen[i], numpy_choice(*case)), case
                checked += 1
    assert checked > 2300


def test_choices_for_which_numpy_draws_again_are_reported():
    seeds = np.arange(5000)
    n, count = np.full(len(seeds), 10_000), np.full(len(seeds), 1000)
    chosen, redrawn = choices(seeds, n, count)
    wrong = [i for i in redrawn if not np.array_equal(chosen[i], numpy_choice(i, 10_000, 1000))]
    assert 0 < len(wrong) <= len(redrawn) < 50


# ---------------------------------------------------------------------------------------------- masks


def test_masks_of_many_blocks_at_once_match_the_rule_block_by_block():
    random, checked = np.random.default_rng(3), 0
    for longest, blocks, rounds in ((2, 20, 20), (80, 60, 40), (600, 50, 20), (12_000, 12, 10)):
        for _ in range(rounds):
            cfg = DataConfig(
                seed=int(random.choice([1, random.integers(0, 2**32 - 10**6)])),
                mask_prob=float(
                    random.choice([1e-4, 0.15, 0.35, 0.8, 0.999, random.random() * 0.99 + 0.001])
                ),
                mask_multiple_length=int(random.choice([1, 2, 4, 10, 300, 10_000])),
            )
            epoch, ids = (
                int(random.integers(1, 200)),
                random.integers(0, random.choice([50, 10**9]), blocks),
            )
            lengths = random.integers(2, longest + 1, blocks)
            widths = lengths + random.integers(0, 5, blocks)
            begins, hidden = np.cumsum(widths) - widths, np.zeros(int(widths.sum()), bool)
            rule = cfg.seed, epoch, cfg.mask_prob, cfg.mask_multiple_length
            mask_one = functools.partial(mask_block, dictionary=None, cfg=cfg, epoch=epoch)
            masks.hide_blocks(hidden, begins, lengths, ids, *rule, mask_one)
            for begin, width, length, index in zip(
                *(x.tolist() for x in (begins, widths, lengths, ids))
            ):
                expected = np.zeros(width, bool)
                expected[:length] = mask_one(length, index=index).hidden
                assert np.array_equal(hidden[begin : begin + width], expected), (
                    cfg,
                    epoch,
                    length,
                    index,
                )
                checked += 1
    assert checked > 3000


def test_a_block_for_which_numpy_draws_again_gets_the_mask_of_the_rule():
    cfg, ids = DataConfig(mask_multiple_length=1, mask_prob=0.1), np.arange(5000)
    lengths = np.full(len(ids), 10_000)
    seeds = masks.block_seeds(cfg.seed, 1, ids)
    counts = np.array([int(1000 + np.random.default_rng(int(seed)).random()) for seed in seeds])
    redrawn = choices(seeds, lengths, counts)[1]
    asked = []

    def mask_one(length, index):
        asked.append(index)
        return mask_block(length, None, cfg, 1, index)

    hidden = np.zeros(lengths.sum(), bool)
    masks.hide_blocks(hidden, ids * 10_000, lengths, ids, cfg.seed, 1, cfg.mask_prob, 1, mask_one)
    assert asked == redrawn and len(asked) > 0
    for index in asked:
        assert np.array_equal(
            hidden[index * 10_000 :][:10_000], mask_block(10_000, None, cfg, 1, index).hidden
        )


def test_another_python_or_numpy_is_noticed_and_blocks_are_then_masked_by_the_rule(
    corpus_dir, monkeypatch
):
    dataset = Corpus(
        DataConfig(data_path=str(corpus_dir), tokens_per_sample=32, max_tokens=256)
    ).split("train")
    lists, exact = dataset.epoch_batches(1), masks.hide_blocks_is_exact.__wrapped__
    expected, tuple_hashes = list(dataset.batches(lists, 3)), masks.tuple_hashes
    assert exact()
    for where, name, other in (
        (masks, "tuple_hashes", lambda *args: tuple_hashes(*args) + 2**40),
        (np.random, "default_rng", lambda seed: np.random.Generator(np.random.MT19937(seed))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, other)
            assert not exact()
    monkeypatch.setattr(data, "hide_blocks_is_exact", lambda: False)
    monkeypatch.setattr(data, "hide_blocks", None)
    check_same_batches(dataset.batches(lists, 3), expected)


# ---------------------------------------------------------------------------------------------- batches


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
def test_batches_match_the_plain_loop(corpus_dir, monkeypatch, teacher_input, options):
    monkeypatch.setattr(data, "PIECE", 1000)  # three batches at once
    cfg = DataConfig(
        data_path=str(corpus_dir),
        tokens_per_sample=32,
        max_tokens=256,
        teacher_input=teacher_input,
        **options,
    )
    for split in ("train", "valid"):
        dataset = Corpus(cfg).split(split)
        lists = dataset.epoch_batches(2)[:12]
        plain = [bench_data.plain_batch(dataset, ids, 2) for ids in lists]
        check_same_batches(dataset.batches([lists[0][:0], *lists, lists[0][:0]], 2), plain)
        turned = [ids[::-1] for ids in lists]  # longest first
        plain = [bench_data.plain_batch(dataset, ids, 2) for ids in turned]
        check_same_batches(map(dataset.batch, turned, [2] * 99), plain)


@golden
@pytest.mark.parametrize("tokens_per_sample", [64, 512])
def test_batches_of_the_golden_corpus_match_the_plain_loop(tokens_per_sample):
    for teacher_input in ("full", "masked"):
        cfg = DataConfig(
            data_path=str(GOLDEN / "corpora" / "bpe-bin"),
            tokens_per_sample=tokens_per_sample,
            max_tokens=20 * tokens_per_sample,
            teacher_input=teacher_input,
        )
        dataset = Corpus(cfg).split("train")
        lists = dataset.epoch_batches(3)[: 12_800 // tokens_per_sample]
        check_same_batches(
            dataset.batches(lists, 3), (bench_data.plain_batch(dataset, ids, 3) for ids in lists)
        )


def test_a_pad_symbol_in_the_text_counts_as_padding(tmp_path):
    folder, _ = make_dataset(tmp_path, [[1, 5, 6, 2], [2], [7, 8, 9, 2], [2]] * 8)
    cfg = DataConfig(data_path=str(folder), tokens_per_sample=8, max_tokens=16)
    dataset = Corpus(cfg).split("train")
    check_same_batches(
        dataset.batches(dataset.epoch_batches(1), 1),
        [bench_data.plain_batch(dataset, ids, 1) for ids in dataset.epoch_batches(1)],
    )
    assert {batch.target_padded for batch in dataset.batches(dataset.epoch_batches(1), 1)} == {
        True,
        False,
    }


def test_batches_before_a_bad_token_are_yielded_and_the_error_names_its_sentence(tmp_path):
    folder, _ = make_dataset(tmp_path)
    cfg = DataConfig(data_path=str(folder), tokens_per_sample=32, max_tokens=256)
    dataset = Corpus(cfg).split("train")
    lists = dataset.epoch_batches(1)
    place = int(dataset.starts[lists[5][0]])
    good = list(dataset.batches(lists[:5], 1))
    items = np.fromfile(folder / "train.bin", np.uint16)
    items[place] = 60  # <mask>
    items.tofile(folder / "train.bin")
    batches, came = prefetch(Corpus(cfg).split("train").batches(lists, 1), depth=3), []
    with pytest.raises(
        InputError, match=f"sentence {dataset.stream.sentence_at(place)} holds <mask>"
    ):
        for batch in batches:
            came.append(batch)
    check_same_batches(came, good)


# ---------------------------------------------------------------------------------------------- the thread


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_keeps_the_order_and_is_at_most_depth_items_ahead():
    made = []

    def source():
        for i in range(50):
            made.append(threading.current_thread().name)
            yield i

    for depth in (1, 4, 100):
        made.clear()
        for count, item in enumerate(prefetch(source(), depth)):
            assert item == count and len(made) <= count + 1 + depth
        assert count == 49 and all(name.startswith("prefetch") for name in made)
    assert list(prefetch(map(str, range(5)), 2)) == list("01234") and list(prefetch([], 2)) == []
    assert not threads()


def test_prefetch_raises_an_error_in_place_of_its_item_and_leaves_no_thread():
    def source(error):
        yield from range(7)
        raise error

    for error in (InputError("here"), MemoryError(), KeyboardInterrupt()):
        came = []
        with pytest.raises(type(error)):
            for item in prefetch(source(error), 4):
                came.append(item)
        assert came == list(range(7)) and not threads()


def test_prefetch_stops_its_thread_when_it_is_closed_or_its_consumer_fails():
    made = []

    def source():
        for i in range(10**9):
            made.append(i)
            yield i

    items = prefetch(source(), 3)
    assert not threads()  # nothing starts before the first item is asked for
    assert next(items) == 0 and threads()
    items.close()
    assert not threads() and len(made) <= 4

    def consumer():
        for item in prefetch(source(), 3):
            if item == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consumer()
    assert not threads()


# ---------------------------------------------------------------------------------------------- bench


def test_the_loader_and_startup_benchmarks_print_their_figures(corpus_dir, monkeypatch):
    monkeypatch.setattr(bench_data.loader, "__defaults__", (0.002, 1))
    printed = call(bench.main, "--loader", "--data_path", corpus_dir).splitlines()
    rows = json.loads(printed[-1])["loader"]
    assert [(row["tokens_per_sample"], row["teacher_input"]) for row in rows] == [
        (n, mode) for n in (64, 512) for mode in ("full", "masked")
    ]
    assert all(row["tokens_per_s"] > 0 and row["plain_tokens_per_s"] > 0 for row in rows)
    monkeypatch.setattr(bench_data.startup, "__defaults__", (1,))  # one process
    printed = call(
        bench.main, "--startup", "--sentences", "600", "--tokens_per_sample", "64"
    ).splitlines()
    (row,) = json.loads(printed[-1])["startup"]
    assert row["sentences"] == 600 and row["total_s"] > row["beyond_torch_s"] > row["data_s"] > 0
    assert row["peak_beyond_torch_bytes"] >= row["beyond_torch_bytes"] > 0
    with pytest.raises(InputError, match="--sentences"):
        bench.main(["--startup", "--sentences", "5"])
    with pytest.raises(InputError, match="--data_path"):
        bench.main(["--loader"])
