"""The guesses that read no word, and what is said about a student beside them."""

import shutil

import eval as evaluation
import train
from config import DataConfig, GuardConfig
from data import Corpus
from judge import neighbours, probe, quality
from judge.validation import Validation
from model import data2vec_loss, teacher_targets
from run import guard
from run.guard import Health
from test.helpers import CPU, FEW, call, make_dataset, make_run, rows_of
from text.binarized import EOS, PAD

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def places(run, dataset):
    """(position, block, target, prediction) of every masked place of the valid split, or of some
    training batches."""
    lists = dataset.epoch_batches(1)[: quality.FIT_BATCHES if dataset.training else None]
    for ids in lists:
        batch = CPU.upload(dataset.batch(ids, 1))
        target = teacher_targets(run.teacher, batch, run.cfg.model)
        prediction = run.student(batch.source, batch.masked, batch.source_padded)
        for place, t, p in zip(batch.masked.tolist(), target.double(), prediction.double()):
            yield place % batch.source.shape[1], int(ids[place // batch.source.shape[1]]), t, p


@pytest.mark.parametrize("options", [{}, dict(fairseq_exact="true"), dict(loss_beta=0)])
@torch.no_grad()
def test_the_guesses_equal_their_definition_place_by_place(corpus_dir, options):
    run, dataset = make_run(corpus_dir, **options)
    for ids in dataset.epoch_batches(1)[:5]:
        with torch.enable_grad():
            train.update(run, [dataset.batch(ids, 1)])
    valid = Corpus(run.cfg.data).split("valid")
    figures = quality.evaluate(run, valid, dataset)
    run.student.eval()
    seen = {}
    for position, _, target, _ in places(run, dataset):
        seen.setdefault(position, []).append(target)
    everywhere = torch.stack([t for targets in seen.values() for t in targets]).mean(0)
    table = {position: torch.stack(targets).mean(0) for position, targets in seen.items()}
    rows = list(places(run, valid))
    guess = {"position": [table.get(position, everywhere) for position, *_ in rows], "block": []}
    for i, (position, block, target, _) in enumerate(rows):
        others = [
            t - guess["position"][j] for j, (_, b, t, _) in enumerate(rows) if b == block and j != i
        ]
        guess["block"].append(guess["position"][i] + (sum(others) / len(others) if others else 0))
    targets, predictions = (torch.stack([row[k] for row in rows]) for k in (2, 3))
    total = float((targets - targets.mean(0)).square().sum())
    own = (predictions - targets).square().sum(1)
    assert figures["r2"] == pytest.approx(1 - float(own.sum()) / total, abs=1e-4)
    for name, guesses in guess.items():
        guesses = torch.stack(guesses)
        error = (guesses - targets).square().sum(1)
        assert figures[f"r2_{name}"] == pytest.approx(1 - float(error.sum()) / total, abs=1e-4)
        assert figures[f"cosine_{name}"] == pytest.approx(
            float(F.cosine_similarity(guesses, targets).mean()), abs=1e-5
        )
        loss = data2vec_loss(guesses, targets.float(), run.cfg.model) / len(rows)
        assert figures[f"loss_{name}"] == pytest.approx(float(loss), rel=1e-4)
        gain = (error - own).numpy()
        _, block = np.unique([row[1] for row in rows], return_inverse=True)
        spread = np.bincount(block, gain - gain.mean())  # a block's places are one observation
        assert figures[f"gain_{name}"] == pytest.approx(gain.sum() / total, abs=1e-4)
        assert figures[f"gain_{name}_error"] == pytest.approx(
            np.sqrt(np.square(spread).sum()) / total, rel=1e-3
        )
    share = (figures["r2"] - figures["r2_block"]) / (1 - figures["r2_block"])
    assert figures["beyond_block"] == pytest.approx(share, abs=1e-6)


def test_learned_is_said_only_above_both_guesses_by_the_margin_and_three_errors():
    def said(position, block, error=0.001, constant=0.2):
        figures = dict(
            r2=0.8, r2_position=0.8 - position, r2_block=0.8 - block, gain_position=position
        )
        return quality.verdict(
            dict(
                figures,
                cosine_constant=constant,
                gain_block=block,
                gain_position_error=error,
                gain_block_error=error,
            )
        ).partition(":")[0]

    assert said(0.3, 0.1) == "learned" == said(0.3, 0.021)
    words_only = dict(mlm_loss=5.0, mlm_loss_frequency=7.0, mlm_perplexity=148.0, mlm_accuracy=0.1)
    probed = dict(probe_gain=0.01, probe_gain_error=0.004, probe_gain_neighbours=0.5)
    for figures, words in (
        (probed, "NO words learned"),
        ({**probed, "probe_gain": 0.02}, "words learned"),
    ):
        told = quality.verdict({**figures, **words_only})
        assert f"\n{words}: 0.0" in told and told.endswith("0.5000 nats, more than that")
    assert said(0.3, 0.019) == said(0.3, 0.1, error=0.04) == said(0.3, -0.2) != "learned"
    assert said(0.3, 0.019) == "NOT learned" == said(0.3, 0.1, constant=0.91)  # half a collapse
    told = quality.verdict(
        dict(
            r2=0.8,
            r2_position=0.5,
            r2_block=0.9,
            gain_position=0.3,
            gain_block=-0.1,
            cosine_constant=0.2,
        )
        | dict(gain_position_error=0.01, gain_block_error=0.01)
    )
    assert "no better than positions and the block's mean\nR2 0.800" in told
    assert "no better than positions\nR2" in quality.verdict(
        dict(
            r2=0.8,
            r2_position=0.8,
            r2_block=0.9,
            gain_position=0.0,
            gain_block=-0.1,
            cosine_constant=0.2,
        )
        | dict(gain_position_error=0.01, gain_block_error=0.01)
    )


def test_half_a_collapse_warns_once_until_it_is_over():
    told = []
    health = Health(
        GuardConfig(min_target_var=0.0, min_pred_var=0.0), warmup_updates=2, say=told.append
    )

    def row(update, variance, constant=0.2):
        health.check_variance(
            dict(num_updates=update, target_var=variance, pred_var=1.0, cosine_constant=constant),
            0.3,
        )

    row(2, 0.01)  # warming up
    row(3, 0.11)
    assert told == []
    row(4, 0.09)
    row(5, 0.08)
    assert len(told) == 1 and "update 4: target_var 0.09 was 0.3 at the first validation" in told[0]
    row(6, 0.3)
    row(7, 0.3, constant=0.95)
    assert len(told) == 2 and "cosine of 0.950" in told[1]
    assert guard.HALF_COLLAPSE == 3 and guard.ALIKE == 0.9


def test_the_probe_while_training_is_in_the_log_and_changes_nothing_else(tmp_path, corpus_dir):
    common = [*FEW, "--data_path", corpus_dir, "--max_update", 8, "--dropout", "0.1"]
    probing = ["--probe_interval_updates", 4, "--best_by", "probe"]
    call(train.main, *common, "--save_dir", tmp_path / "plain")
    call(train.main, *common, "--save_dir", tmp_path / "probed", *probing)
    rows = rows_of(tmp_path / "probed", "valid_probe_gain")
    assert [row["num_updates"] for row in rows] == [4, 8]
    assert all(
        row["valid_probe_gain_error"] > 0 and 0 <= row["valid_probe_accuracy"] <= 1 for row in rows
    )
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("plain", "probed")]
    assert losses[0] == losses[1]
    best = train.checkpoint.load(tmp_path / "probed" / "checkpoint_best.pt").content["progress"]
    assert best["best_gain"] == max(row["valid_probe_gain"] for row in rows)


def test_the_probe_compares_with_the_weights_before_the_first_update(corpus_dir):
    run, dataset = make_run(corpus_dir)
    first = {k: v.clone() for k, v in run.student.state_dict().items()}
    train.update(run, [dataset.batch(dataset.epoch_batches(1)[0], 1)])
    corpus, state = Corpus(run.cfg.data), torch.get_rng_state()
    again = Validation(run, corpus).first_student().state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first) and torch.equal(
        state, torch.get_rng_state()
    )


def test_a_folder_without_a_training_split_is_evaluated_without_the_guesses(tmp_path, corpus_dir):
    call(
        train.main,
        *FEW,
        "--data_path",
        corpus_dir,
        "--save_dir",
        tmp_path / "run",
        "--max_update",
        2,
    )
    for name in ("dict.txt", "valid.bin", "valid.idx"):
        shutil.copy(corpus_dir / name, tmp_path)
    last = tmp_path / "run" / "checkpoint_last.pt"
    alone = call(evaluation.main, "--ckpt", last, "--data_path", tmp_path)
    beside = call(evaluation.main, "--ckpt", last)
    assert "no training split here" in alone and "r2" not in alone.splitlines()[-1]
    assert (
        alone.splitlines()[2].split()[1:5] == beside.splitlines()[2].split()[1:5]
    )  # the student's own figures


# ---------------------------------------------------------------------------------------------- counts


def test_the_guess_by_neighbours_is_the_formula_over_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "AT_ONCE", 7)
    make_dataset(tmp_path, None, 30)
    corpus = Corpus(
        DataConfig(
            data_path=str(tmp_path), tokens_per_sample=32, max_tokens=256, mask_multiple_length=2
        )
    )
    mask, class_of = (
        corpus.dictionary.mask_id,
        probe.frequent_tokens(corpus.split("train").stream, corpus.dictionary),
    )
    counted, asked = (
        probe.find_places(corpus.split(split), class_of, 300) for split in ("train", "valid")
    )

    def contexts(places):  # (left, right, class) of each place
        labels = iter(places.labels.tolist())
        for batch, flat in places.batches:
            for row, column in (divmod(int(place), batch.source.shape[1]) for place in flat):
                text = [*batch.source[row].tolist(), PAD]
                yield text[column - 1], text[column + 1], next(labels)

    known, size = list(contexts(counted)), class_of.max() + 1
    share = np.array([1 + sum(label == k for *_, label in known) for k in range(size)]) / (
        len(known) + size
    )

    def shares_beside(token, side):
        if token in (mask, PAD):
            return share
        found = np.bincount(
            [label for *tokens, label in known if tokens[side] == token], minlength=size
        )
        return (found + neighbours.STRENGTH * share) / (found.sum() + neighbours.STRENGTH)

    guess = neighbours.Neighbours(counted.beside(), counted.labels, size, corpus.dictionary)
    answer = guess.answer(asked.beside(), asked.labels)
    for (left, right, label), hit, loss in zip(
        contexts(asked), answer["hit"], answer["loss"], strict=True
    ):
        likely = shares_beside(left, 0) * shares_beside(right, 1) / share
        assert loss == pytest.approx(-np.log(likely[label] / likely.sum()), rel=1e-9)
        assert hit == (likely.argmax() == label)
    assert len(set(answer["loss"].round(3))) > 20


def test_counts_know_a_word_that_follows_from_its_neighbour(tmp_path):
    starts = np.random.default_rng(0).integers(0, 20, 300).tolist()
    make_dataset(tmp_path, [[4 + (s + i) % 20 for i in range(24)] + [EOS] for s in starts], 24)
    run, train = make_run(tmp_path, mask_multiple_length=1, sample_break_mode="eos", mlm_weight=1)
    figures = quality.evaluate(run, Corpus(run.cfg.data).split("valid"), train)
    assert figures["mlm_loss_neighbours"] < 0.5 * figures["mlm_loss_frequency"]
    assert figures["mlm_loss"] == pytest.approx(
        figures["mlm_loss_frequency"], rel=0.05
    )  # nothing is trained
    valid = Corpus(DataConfig(data_path=str(tmp_path), leave_unmasked_prob=1.0)).split("valid")
    assert neighbours.word_loss(valid, train) is None  # no place shows <mask>
