"""The guesses that read no word, and what is said about a student beside them."""

import json
import math
import shutil

import eval as evaluation
import train
from config import DataConfig, GuardConfig, RunError
from data import Corpus
from judge import neighbours, probe, quality
from model import data2vec_loss, teacher_targets
from run.guard import Health
from test.helpers import CPU, call, few, make_dataset, make_run, progress_of, rows_of
from text.binarized import EOS, PAD

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def columns(run, dataset) -> list[torch.Tensor]:
    """(position, block, target, prediction) of every masked place of a split.

    Of the training split only those of the batches that the guesses are fitted on.
    """
    rows = []
    for ids in dataset.epoch_batches(1)[: quality.FIT_BATCHES if dataset.training else None]:
        batch = CPU.upload(dataset.batch(ids, 1))
        width = batch.source.shape[1]
        target = teacher_targets(run.teacher, batch, run.cfg.model)
        prediction = run.student(batch.source, batch.masked, batch.source_padded)
        where = batch.masked % width, torch.from_numpy(ids)[batch.masked // width]
        rows.append((*where, target.double(), prediction.double()))
    return [torch.cat(column) for column in zip(*rows)]


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
    at, _, targets, _ = columns(run, dataset)
    table = {int(i): targets[at == i].mean(0) for i in at.unique()}
    everywhere = targets.mean(0)
    at, block, targets, predictions = columns(run, valid)
    position = torch.stack([table.get(i, everywhere) for i in at.tolist()])
    left = targets - position
    others = (block[:, None] == block) & ~torch.eye(len(block), dtype=torch.bool)
    count = others.sum(1, keepdim=True).clamp(min=1)

    total = float((targets - targets.mean(0)).square().sum())
    own = (predictions - targets).square().sum(1)
    near = pytest.approx
    assert figures["r2"] == near(1 - float(own.sum()) / total, abs=1e-4)
    guess = dict(position=position, block=position + others.double() @ left / count)
    for name, guesses in guess.items():
        error = (guesses - targets).square().sum(1)
        assert figures[f"r2_{name}"] == near(1 - float(error.sum()) / total, abs=1e-4)
        cosine = float(F.cosine_similarity(guesses, targets).mean())
        assert figures[f"cosine_{name}"] == near(cosine, abs=1e-5)
        loss = data2vec_loss(guesses, targets.float(), run.cfg.model) / len(at)
        assert figures[f"loss_{name}"] == near(float(loss), rel=1e-4)
        gain = (error - own).numpy()
        spread = np.bincount(block, gain - gain.mean())  # a block's places are one observation
        assert figures[f"gain_{name}"] == near(gain.sum() / total, abs=1e-4)
        n = len(np.unique(block))
        standard_error = np.sqrt(np.square(spread).sum() * n / (n - 1)) / total
        assert figures[f"gain_{name}_error"] == near(standard_error, rel=1e-3)
    share = (figures["r2"] - figures["r2_block"]) / (1 - figures["r2_block"])
    assert figures["beyond_block"] == near(share, abs=1e-6)


@pytest.mark.parametrize(
    "position, block, error, constant, begin",
    [
        (0.3, 0.1, 0.001, 0.2, "learned"),
        (0.3, 0.021, 0.001, 0.2, "learned"),
        (0.3, 0.019, 0.001, 0.2, "NOT learned: no better than positions and the block's mean"),
        (0.3, 0.1, 0.04, 0.2, "NOT learned: no better than positions and the block's mean"),
        (0.0, 0.1, 0.001, 0.2, "NOT learned: no better than positions\n"),
        (0.3, 0.1, 0.001, 0.91, "NOT learned: the targets are alike"),
    ],
)
def test_learned_is_said_only_above_both_guesses_by_enough(position, block, error, constant, begin):
    figures = dict(r2=0.8, r2_position=0.8 - position, r2_block=0.8 - block)
    figures |= dict(gain_position=position, gain_block=block, cosine_constant=constant)
    figures |= dict(gain_position_error=error, gain_block_error=error)
    assert quality.verdict(figures).startswith(begin)


@pytest.mark.parametrize("gain, begin", [(0.01, "NO words learned: 0.01"), (0.02, "words learned")])
def test_words_are_said_to_be_learned_above_three_errors(gain, begin):
    figures = dict(mlm_loss=5.0, mlm_loss_frequency=7.0, mlm_perplexity=148.0, mlm_accuracy=0.1)
    figures |= dict(probe_gain=gain, probe_gain_error=0.004, probe_gain_neighbours=0.5)
    *_, student, counts = quality.verdict(figures).splitlines()
    assert student.startswith(begin) and counts.endswith("0.5000 nats, more than that")


def test_half_a_collapse_warns_once_until_it_is_over():
    warnings = []
    cfg = GuardConfig(min_target_var=0.0, min_pred_var=0.0)
    health = Health(cfg, warmup_updates=2, say=warnings.append)
    rows = [(2, 0.01, 0.2, 0), (3, 0.11, 0.2, 0)]  # warming up; above a third of 0.3
    rows += [(4, 0.09, 0.2, 1), (5, 0.08, 0.2, 1)]
    rows += [(6, 0.3, 0.2, 1), (7, 0.3, 0.95, 2)]
    for update, variance, constant, expected in rows:
        row = dict(num_updates=update, target_var=variance, pred_var=1.0, cosine_constant=constant)
        health.check_variance(row, 0.3)
        assert len(warnings) == expected, update


def test_the_probe_while_training_is_in_the_log_and_changes_nothing_else(tmp_path, corpus_dir):
    argv = ["--max_update", 8, "--dropout", "0.1"]
    call(train.main, *few(corpus_dir, tmp_path / "plain", *argv))
    argv += ["--probe_interval_updates", 4, "--best_by", "probe"]
    call(train.main, *few(corpus_dir, tmp_path / "probed", *argv))
    rows = rows_of(tmp_path / "probed", "valid_probe_gain")
    assert [row["num_updates"] for row in rows] == [4, 8]
    for row in rows:
        assert row["valid_probe_gain_error"] > 0 and 0 <= row["valid_probe_accuracy"] <= 1
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("plain", "probed")]
    assert losses[0] == losses[1]
    best = progress_of(tmp_path / "probed", "checkpoint_best.pt")["best_gain"]
    assert best == max(row["valid_probe_gain"] for row in rows)


def test_the_probe_compares_with_the_weights_before_the_first_update(corpus_dir):
    run, dataset = make_run(corpus_dir)
    first = {name: value.clone() for name, value in run.student.state_dict().items()}
    train.update(run, [dataset.batch(dataset.epoch_batches(1)[0], 1)])
    again = quality.Validation(run, Corpus(run.cfg.data)).first_student().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    run.student.encoder.layers[0].fc2.bias.data[0] = math.nan
    with pytest.raises(RunError, match="features are not finite"):
        probe.Probe(run, Corpus(run.cfg.data), "valid", 50).ask(run.student)


def test_a_folder_without_a_training_split_gives_no_guesses(tmp_path, corpus_dir, saved):
    for name in ("dict.txt", "valid.bin", "valid.idx"):
        shutil.copy(corpus_dir / name, tmp_path)
    argv = ["--ckpt", saved / "checkpoint_last.pt", "--json"]
    beside = json.loads(call(evaluation.main, *argv))
    alone = json.loads(call(evaluation.main, *argv, "--data_path", tmp_path))
    guesses = {name for name in beside if "position" in name or "block" in name or "r2" in name}
    assert len(guesses) == 12
    assert alone == {name: beside[name] for name in beside if name not in guesses}
    assert "no training split" in call(evaluation.main, *argv[:2], "--data_path", tmp_path)


def test_one_block_gives_no_standard_error(tmp_path):
    make_dataset(tmp_path, [[*range(4, 20), EOS]], 24)
    run, dataset = make_run(tmp_path, mask_multiple_length=1)
    assert quality.evaluate(run, dataset, dataset)["gain_block_error"] == math.inf


# ------------------------------------------------------------------------------------------ counts


def test_the_guess_by_neighbours_is_the_formula_over_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "AT_ONCE", 7)
    make_dataset(tmp_path, None, 30)
    cfg = make_run(tmp_path, mask_multiple_length=2)[0].cfg
    corpus = Corpus(cfg.data)
    class_of = probe.frequent_tokens(corpus.split("train").stream, corpus.dictionary)
    splits = (corpus.split(name) for name in ("train", "valid"))
    counted, asked = (probe.find_places(split, class_of, 300, cfg) for split in splits)
    batch, flat = asked.batches[0]
    row, column = divmod(int(flat[-1]), batch.source.shape[1])
    text = [*batch.source[row], PAD]
    assert asked.beside()[:, len(flat) - 1].tolist() == [text[column - 1], text[column + 1]]

    known = [*zip(*counted.beside(), counted.labels)]
    size = class_of.max() + 1
    share = (np.bincount(counted.labels, minlength=size) + 1) / (len(known) + size)

    def shares_beside(token, side):
        if token in (corpus.dictionary.mask_id, PAD):
            return share
        labels = [label for *tokens, label in known if tokens[side] == token]
        counts = np.bincount(labels, minlength=size) + neighbours.STRENGTH * share
        return counts / (len(labels) + neighbours.STRENGTH)

    guess = neighbours.Neighbours(counted.beside(), counted.labels, size, corpus.dictionary)
    answer = guess.answer(asked.beside(), asked.labels)
    rows = zip(*asked.beside(), asked.labels, answer["hit"], answer["loss"], strict=True)
    for left, right, label, hit, loss in rows:
        likely = shares_beside(left, 0) * shares_beside(right, 1) / share
        assert loss == pytest.approx(-np.log(likely[label] / likely.sum()), rel=1e-9)
        assert hit == (likely.argmax() == label)
    assert len(set(answer["loss"].round(3))) > 20


def test_counts_know_a_word_that_follows_from_its_neighbour(tmp_path):
    starts = np.random.default_rng(0).integers(0, 20, 300).tolist()
    make_dataset(tmp_path, [[4 + (s + i) % 20 for i in range(24)] + [EOS] for s in starts], 24)
    run, dataset = make_run(tmp_path, mask_multiple_length=1, sample_break_mode="eos", mlm_weight=1)
    figures = quality.evaluate(run, Corpus(run.cfg.data).split("valid"), dataset)
    frequency = figures["mlm_loss_frequency"]
    assert figures["mlm_loss_neighbours"] < 0.5 * frequency
    assert figures["mlm_loss"] == pytest.approx(frequency, rel=0.05)  # nothing is trained
    valid = Corpus(DataConfig(data_path=str(tmp_path), leave_unmasked_prob=1.0)).split("valid")
    assert neighbours.word_loss(valid, dataset) is None  # no place shows <mask>
