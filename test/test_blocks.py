"""Blocks, batches and epochs against their rules, walked one item at a time."""

from config import DataConfig
from data import Corpus
from test.helpers import make_dataset, write_index
from text import binarized
from text.binarized import TokenStream
from text.blocks import cut_batches, cut_blocks, order_by_length

import numpy as np
import pytest

MODES = ["none", "eos", "complete", "complete_doc"]


def pairs(starts, ends) -> list:
    return list(zip(starts.tolist(), ends.tolist()))


def blocks_by_walking(sizes, mode, block_size):
    """The rule for cutting blocks, sentence by sentence."""
    blocks, begin, end = [], 0, 0
    for size in sizes:
        ends_document = mode == "complete_doc" and size == 1
        if ends_document or end + size > begin + block_size:
            blocks.append((begin, end))
            begin = end
        end += size
        if ends_document:  # itself it is in no block
            begin = end
    least = 2 if mode == "complete_doc" else 1
    return [(a, b) for a, b in [*blocks, (begin, end)] if b - a >= least]


@pytest.mark.parametrize("mode", ["complete", "complete_doc"])
def test_blocks_follow_the_rule_walked_sentence_by_sentence(mode):
    rng = np.random.default_rng(3)
    for _ in range(300):
        sizes = rng.integers(1, rng.integers(2, 30), rng.integers(0, 40))
        size = int(rng.integers(1, 25))
        blocks = pairs(*cut_blocks(sizes, mode, size, split_long=False))
        assert blocks == blocks_by_walking(sizes.tolist(), mode, size)


@pytest.mark.parametrize("mode", MODES)
def test_splitting_long_sentences_keeps_every_token_exactly_once(mode):
    rng = np.random.default_rng(4)
    for _ in range(300):
        sizes = rng.integers(1, rng.integers(2, 60), rng.integers(1, 40))
        size = int(rng.integers(1, 25))
        starts, ends = cut_blocks(sizes, mode, size, split_long=True)
        assert (ends - starts <= size).all() and (ends > starts).all()
        covered = [place for a, b in pairs(starts, ends) for place in range(a, b)]
        position = np.cumsum(sizes) - sizes
        separators = position[sizes == 1] if mode == "complete_doc" else []
        assert covered == np.setdiff1d(np.arange(sizes.sum()), separators).tolist()


@pytest.mark.parametrize("piece", [1, 2, 7, 40])
def test_a_corpus_in_pieces_gives_the_same_blocks_tokens_and_digest(tmp_path, monkeypatch, piece):
    random = np.random.default_rng(piece)
    cases = []
    for _ in range(60):
        shape = random.integers(0, 2), random.integers(2, 30), random.integers(0, 60)
        sizes = random.integers(*shape).astype(np.int32)
        for mode in MODES:
            for split_long in (True, False):
                arguments = sizes, mode, int(random.integers(1, 25)), split_long
                cases.append((arguments, pairs(*cut_blocks(*arguments))))
    sentences = [random.integers(4, 60, n).tolist() for n in random.integers(0, 9, 50)]
    write_index(tmp_path / "train", sentences, 8)
    write_index(tmp_path / "train1", sentences, 5)
    digest = TokenStream(tmp_path, "train").digest()

    monkeypatch.setattr(binarized, "PIECE", piece)
    for arguments, whole in cases:
        assert pairs(*cut_blocks(*arguments)) == whole
    stream, flat = TokenStream(tmp_path, "train"), sum(2 * sentences, [])
    assert stream.read(0, stream.tokens).tolist() == flat and stream.digest() == digest
    places = random.permutation(len(flat))
    assert stream.take(places).tolist() == [flat[i] for i in places]


def test_order_is_by_length_with_ties_by_the_legacy_permutation():
    random = np.random.default_rng(6)
    for n, longest in ((0, 2), (1, 2), (500, 8), (500, 600), (300, 100_000)):
        lengths = random.integers(2, longest + 1, n).astype(np.int32)
        seed = int(random.integers(0, 2**32))
        shuffled = np.random.RandomState(seed).permutation(n)
        assert np.array_equal(order_by_length(lengths, seed), np.lexsort((shuffled, lengths)))


def batches_by_walking(lengths, max_tokens, batch_size, multiple):
    """The rule for cutting batches, block by block. Also whether a tail became too large."""
    done, batch, tail, overflowed = [], [], [], False

    def too_large(blocks):
        return len(blocks) * max(blocks) > max_tokens or (0 < batch_size < len(blocks))

    for length in lengths:
        tail = tail + [length]
        if too_large(batch + tail):
            if batch:
                done.append(batch)
            if len(tail) * max(tail) > max_tokens:
                overflowed = True
                if tail[:-1]:
                    done.append(tail[:-1])
                tail = tail[-1:]
            batch, tail = tail, []
        elif len(batch + tail) < multiple or len(batch + tail) % multiple == 0:
            batch, tail = batch + tail, []
    return done + [part for part in (batch, tail) if part], overflowed


def test_batches_follow_the_rule_walked_block_by_block():
    rng = np.random.default_rng(5)
    overflows = 0
    for _ in range(3000):
        lengths = rng.integers(1, rng.choice([3, 30, 300]) + 2, rng.integers(0, 120))
        if rng.random() < 0.5:  # many of one length
            short = rng.random(len(lengths)) < 0.8
            lengths = np.where(short, np.minimum(lengths, 9), lengths)
        lengths = np.sort(lengths)
        max_tokens = int(max(lengths, default=1)) + int(rng.integers(0, rng.choice([20, 600])))
        batch_size, multiple = int(rng.choice([0, 0, 1, 5, 12, 40])), int(rng.choice([1, 2, 8]))
        rule = max_tokens, batch_size, multiple
        expected, overflowed = batches_by_walking(lengths.tolist(), *rule)
        overflows += overflowed
        ends = cut_batches(lengths, *rule).tolist()
        batches = [lengths[a:b].tolist() for a, b in zip([0, *ends], ends)]
        assert batches == expected, (lengths.tolist(), rule)
    assert overflows >= 10  # so the rare branch is tested


def test_workers_share_an_epoch_and_one_with_too_few_batches_gets_an_empty_one(block_dataset):
    dataset = block_dataset()
    one = [ids.tolist() for ids in dataset.epoch_batches(4)]
    for world_size in (2, 3, len(one) + 1):
        shards = [dataset.epoch_batches(4, rank, world_size) for rank in range(world_size)]
        assert len({len(shard) for shard in shards}) == 1
        for rank, shard in enumerate(shards):
            assert [ids.tolist() for ids in shard if len(ids)] == one[rank::world_size]


def test_several_folders_are_read_one_per_epoch_and_validation_reads_the_first(tmp_path):
    folders = [str(make_dataset(tmp_path / str(i), seed=i)[0]) for i in range(3)]
    corpus = Corpus(DataConfig(data_path=":".join(folders)))
    for epoch in range(1, 8):
        assert str(corpus.split("train", epoch).stream.folder) == folders[(epoch - 1) % 3]
        assert str(corpus.split("valid", epoch).stream.folder) == folders[0]
