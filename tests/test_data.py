"""The fast loader gives what the plain one gives, to the bit: numpy's generator, masks, blocks, batches; the thread."""

import dataclasses
import hashlib
import json
import threading

import numpy as np
import pytest

import bench
import data
from config import InputError
from data import Corpus, DataConfig, TokenStream, mask_block, prefetch
from fast import masks as rng
from tests.helpers import (
    GOLDEN,
    blocks_by_walking,
    call,
    golden,
    make_dataset,
    write_index,
)
from tools import bench_data


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
                assert x.dtype == np.int64 and x.shape == y.shape and np.array_equal(x, y), field.name
            else:
                assert type(x) is type(y) and x == y, field.name


# ---------------------------------------------------------------------------------------------- rng


def test_hashes_of_three_integers_are_python_s():
    random = np.random.default_rng(0)
    for first, second in [(0, 0), (2**32 - 1, 10**6), *random.integers(0, 2**20, (50, 2)).tolist()]:
        thirds = np.concatenate([np.arange(20), random.integers(0, 2**61 - 1, 50)])
        expected = [hash((first, second, third)) for third in thirds.tolist()]
        assert rng.tuple_hashes(first, second, thirds).tolist() == expected


def test_seeds_and_floats_are_numpy_s():
    seeds = np.concatenate([[0, 1, 10**6 - 1, 2**32 - 1], np.random.default_rng(1).integers(0, 2**32, 500)])
    words, floats = rng._seed_words(seeds), rng.Generators(seeds).random()
    for i, seed in enumerate(seeds.tolist()):
        assert np.array_equal(words[:, i], np.random.SeedSequence(seed).generate_state(4, np.uint64))
        assert floats[i] == np.random.default_rng(seed).random()


def choices(seeds, n, count):
    """The places chosen for each seed, as bool (n,); and the numbers of those that numpy may have redrawn."""
    begin, chosen = np.cumsum(n) - n, np.zeros(int(n.sum()), bool)
    generators = rng.Generators(seeds)
    generators.random()
    redrawn = generators.choose(n, count, begin, chosen)
    return np.split(chosen, begin[1:]), redrawn.tolist()


def numpy_s_choice(seed, n, count):
    generator, chosen = np.random.default_rng(seed), np.zeros(n, bool)
    generator.random()
    chosen[generator.choice(n, count, replace=False)] = True
    return chosen


def test_choices_are_numpy_s_from_none_to_all():
    random, checked = np.random.default_rng(2), 0
    for most in (1, 2, 3, 70, 520, 10_000):
        n = np.concatenate([[most], random.integers(1, most + 1, 400)])
        count = np.minimum(n, (random.choice([0, 0.1, 0.3, 1, 1.1], len(n)) * n).astype(np.int64))
        seeds = random.integers(0, 10**6, len(n))
        chosen, redrawn = choices(seeds, n, count)
        for i, case in enumerate(zip(seeds.tolist(), n.tolist(), count.tolist())):
            if i not in redrawn:
                assert np.array_equal(chosen[i], numpy_s_choice(*case)), case
                checked += 1
    assert checked > 2300


def test_a_choice_for_which_numpy_draws_again_is_reported():
    seeds = np.arange(5000)
    n, count = np.full(len(seeds), 10_000), np.full(len(seeds), 1000)
    chosen, redrawn = choices(seeds, n, count)
    wrong = [i for i in redrawn if not np.array_equal(chosen[i], numpy_s_choice(i, 10_000, 1000))]
    assert 0 < len(wrong) <= len(redrawn) < 50


# ---------------------------------------------------------------------------------------------- masks


def test_masks_of_many_blocks_at_once_are_those_of_one_at_a_time():
    random, checked = np.random.default_rng(3), 0
    for longest, blocks, rounds in ((2, 20, 20), (80, 60, 40), (600, 50, 20), (12_000, 12, 10)):
        for _ in range(rounds):
            cfg = DataConfig(
                seed=int(random.choice([1, random.integers(0, 2**32 - 10**6)])),
                mask_prob=float(random.choice([1e-4, 0.15, 0.35, 0.8, 0.999, random.random() * 0.99 + 0.001])),
                mask_multiple_length=int(random.choice([1, 2, 4, 10, 300, 10_000])),
            )
            epoch, ids = int(random.integers(1, 200)), random.integers(0, random.choice([50, 10**9]), blocks)
            lengths = random.integers(2, longest + 1, blocks)
            widths = lengths + random.integers(0, 5, blocks)
            begins, hidden = np.cumsum(widths) - widths, np.zeros(int(widths.sum()), bool)
            data.hide_blocks(hidden, begins, lengths, None, cfg, epoch, ids)
            for begin, width, length, index in zip(*(x.tolist() for x in (begins, widths, lengths, ids))):
                expected = np.zeros(width, bool)
                expected[:length] = mask_block(length, None, cfg, epoch, index)[0]
                assert np.array_equal(hidden[begin : begin + width], expected), (cfg, epoch, length, index)
                checked += 1
    assert checked > 3000


def test_another_python_or_numpy_is_noticed_and_its_blocks_are_masked_one_at_a_time(corpus_dir, monkeypatch):
    dataset = Corpus(DataConfig(data_path=str(corpus_dir), tokens_per_sample=32, max_tokens=256)).split("train")
    lists, exact = dataset.epoch_batches(1), data.hide_blocks_is_exact.__wrapped__
    expected = list(dataset.batches(lists, 3))
    assert exact()
    for where, name, other in (
        (data, "tuple_hashes", lambda *args: rng.tuple_hashes(*args) + 2**40),
        (np.random, "default_rng", lambda seed: np.random.Generator(np.random.MT19937(seed))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, other)
            assert not exact()
    monkeypatch.setattr(data, "hide_blocks_is_exact", lambda: False)
    monkeypatch.setattr(data, "hide_blocks", None)
    check_same_batches(dataset.batches(lists, 3), expected)


# ---------------------------------------------------------------------------------------------- blocks and batches


@pytest.mark.parametrize("piece", [1, 2, 7, 40])
def test_a_corpus_worked_through_in_pieces_gives_the_same_blocks_runs_and_digest(tmp_path, monkeypatch, piece):
    random = np.random.default_rng(piece)
    cases = []
    for _ in range(60):
        sizes = random.integers(random.integers(0, 2), random.integers(2, 30), random.integers(0, 60)).astype(np.int32)
        for mode in ("none", "eos", "complete", "complete_doc"):
            for split_long in (True, False):
                argv = sizes, mode, int(random.integers(1, 25)), split_long
                cases.append((argv, data.cut_blocks(*argv)))
    sentences = [random.integers(4, 60, n).tolist() for n in random.integers(0, 9, 50)]
    write_index(tmp_path / "train", sentences, 8, order=random.permutation(50))
    write_index(tmp_path / "train1", sentences, 5)
    digest = TokenStream(tmp_path, "train").digest()

    monkeypatch.setattr(data, "PIECE", piece)
    for (sizes, mode, block_size, split_long), whole in cases:
        got = data.cut_blocks(sizes, mode, block_size, split_long)
        assert all(np.array_equal(a, b) and a.dtype == np.int64 for a, b in zip(got, whole))
        if mode.startswith("complete") and not split_long:
            walked = blocks_by_walking(sizes[sizes > 0].tolist(), mode, block_size)
            assert list(zip(*(x.tolist() for x in got))) == walked
    stream, flat = TokenStream(tmp_path, "train"), sum(2 * sentences, [])
    assert stream.read(0, stream.tokens).tolist() == flat and stream.digest() == digest
    places = random.permutation(len(flat))
    assert stream.take(places).tolist() == [flat[i] for i in places]


@golden
def test_the_corpus_s_digest_is_that_of_sizes_and_samples_as_older_checkpoints_hold_it():
    stream = TokenStream(GOLDEN / "corpora" / "bpe-bin", "train")
    tokens = np.fromfile(GOLDEN / "corpora" / "bpe-bin" / "train.bin", np.uint16).astype(np.int64)
    digest = hashlib.sha256(np.asarray(stream.sizes, np.int64).tobytes())
    for start in np.linspace(0, len(tokens) - 1024, 64).astype(np.int64):
        digest.update(tokens[start : start + 1024].tobytes())
    assert stream.digest() == digest.hexdigest() and stream.tokens == len(tokens)


def test_order_is_by_length_with_ties_by_the_legacy_permutation():
    random = np.random.default_rng(6)
    for n, longest in ((0, 2), (1, 2), (500, 8), (500, 600), (300, 100_000)):
        lengths, seed = random.integers(2, longest + 1, n).astype(np.int32), int(random.integers(0, 2**32))
        shuffled = np.random.RandomState(seed).permutation(n)
        assert np.array_equal(data.order_by_length(lengths, seed), np.lexsort((shuffled, lengths)))


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
def test_batches_equal_those_of_the_plain_loop(corpus_dir, monkeypatch, teacher_input, options):
    monkeypatch.setattr(data, "PIECE", 1000)  # three batches at once
    cfg = DataConfig(
        data_path=str(corpus_dir), tokens_per_sample=32, max_tokens=256, teacher_input=teacher_input, **options
    )
    for split in ("train", "valid"):
        dataset = Corpus(cfg).split(split)
        lists = dataset.epoch_batches(2)[:12]
        plain = [bench_data.plain_batch(dataset, ids, 2) for ids in lists]
        check_same_batches(dataset.batches([lists[0][:0], *lists, lists[0][:0]], 2), plain)
        turned = [ids[::-1] for ids in lists]  # the longest first
        plain = [bench_data.plain_batch(dataset, ids, 2) for ids in turned]
        check_same_batches(map(dataset.batch, turned, [2] * 99), plain)


@golden
@pytest.mark.parametrize("tokens_per_sample", [64, 512])
def test_batches_of_the_golden_corpus_equal_those_of_the_plain_loop(tokens_per_sample):
    for teacher_input in ("full", "masked"):
        cfg = DataConfig(
            data_path=str(GOLDEN / "corpora" / "bpe-bin"),
            tokens_per_sample=tokens_per_sample,
            max_tokens=20 * tokens_per_sample,
            teacher_input=teacher_input,
        )
        dataset = Corpus(cfg).split("train")
        lists = dataset.epoch_batches(3)[: 12_800 // tokens_per_sample]
        check_same_batches(dataset.batches(lists, 3), (bench_data.plain_batch(dataset, ids, 3) for ids in lists))


def test_a_pad_symbol_in_the_text_counts_as_padding(tmp_path):
    folder, _ = make_dataset(tmp_path, [[1, 5, 6, 2], [2], [7, 8, 9, 2], [2]] * 8)
    cfg = DataConfig(data_path=str(folder), tokens_per_sample=8, max_tokens=16)
    dataset = Corpus(cfg).split("train")
    check_same_batches(
        dataset.batches(dataset.epoch_batches(1), 1),
        [bench_data.plain_batch(dataset, ids, 1) for ids in dataset.epoch_batches(1)],
    )
    assert {batch.target_padded for batch in dataset.batches(dataset.epoch_batches(1), 1)} == {True, False}


def test_the_batches_before_a_bad_token_come_and_its_own_names_the_sentence(tmp_path):
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
    with pytest.raises(InputError, match=f"sentence {dataset.stream.sentence_at(place)} holds <mask>"):
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


def test_prefetch_raises_an_error_at_its_place_and_leaves_no_thread():
    def source(error):
        yield from range(7)
        raise error

    for error in (InputError("here"), MemoryError(), KeyboardInterrupt()):
        came = []
        with pytest.raises(type(error)):
            for item in prefetch(source(error), 4):
                came.append(item)
        assert came == list(range(7)) and not threads()


def test_prefetch_ends_its_thread_when_it_is_closed_or_its_reader_fails():
    made = []

    def source():
        for i in range(10**9):
            made.append(i)
            yield i

    items = prefetch(source(), 3)
    assert not threads()  # nothing begins before the first item is asked for
    assert next(items) == 0 and threads()
    items.close()
    assert not threads() and len(made) <= 4

    def reader():
        for item in prefetch(source(), 3):
            if item == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reader()
    assert not threads()


# ---------------------------------------------------------------------------------------------- bench


def test_the_bench_of_loader_and_start_print_their_figures(corpus_dir, monkeypatch):
    monkeypatch.setattr(bench_data.loader, "__defaults__", (0.002, 1))
    printed = call(bench.main, "--loader", "--data_path", corpus_dir).splitlines()
    rows = json.loads(printed[-1])["loader"]
    assert [(row["tokens_per_sample"], row["teacher_input"]) for row in rows] == [
        (n, mode) for n in (64, 512) for mode in ("full", "masked")
    ]
    assert all(row["tokens_per_s"] > 0 and row["plain_tokens_per_s"] > 0 for row in rows)
    monkeypatch.setattr(bench_data.startup, "__defaults__", (1,))  # one process
    printed = call(bench.main, "--startup", "--sentences", "600", "--tokens_per_sample", "64").splitlines()
    (row,) = json.loads(printed[-1])["startup"]
    assert row["sentences"] == 600 and row["total_s"] > row["beyond_torch_s"] > row["data_s"] > 0
    assert row["peak_beyond_torch_bytes"] >= row["beyond_torch_bytes"] > 0
    with pytest.raises(InputError, match="--sentences"):
        bench.main(["--startup", "--sentences", "5"])
    with pytest.raises(InputError, match="--data_path"):
        bench.main(["--loader"])
