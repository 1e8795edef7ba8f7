"""Masked language modelling, alone and beside data2vec."""

import json
import math

import eval as evaluation
import train
from data import Corpus
from judge import quality
from model import data2vec_loss, teacher_targets
from run import checkpoint
from test.helpers import CPU, FEW, call, make_run, rows_of

import numpy as np
import pytest
import torch
import torch.nn.functional as F

BASELINE = "--objective mlm --mask_multiple_length 1 --mask_prob 0.3 --random_token_prob 0.1 --leave_unmasked_prob 0.1"


def logits_by_formula(student, x):
    head, embedding = student.lm_head, student.encoder.embed_tokens.weight
    h = x @ head.dense.weight.T + head.dense.bias
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (h * head.layer_norm.weight + head.layer_norm.bias) @ embedding.T + head.bias


def test_the_loss_is_the_cross_entropy_at_all_chosen_places(corpus_dir):
    options = dict(word.split() for word in BASELINE.removeprefix("--").split(" --"))
    run, dataset = make_run(corpus_dir, **options)
    assert run.student.regression_head is None
    for ids in dataset.epoch_batches(1)[:3]:
        batch = dataset.batch(ids, 1)
        tokens, source, hidden = dataset.mask(ids, 1)
        assert np.array_equal(batch.chosen, np.flatnonzero(hidden)) and len(batch.chosen) > len(
            batch.masked
        )
        with torch.no_grad():
            x, _ = run.student.encoder(torch.from_numpy(source))
            logits = logits_by_formula(run.student, x.flatten(0, 1)[batch.chosen])
        words = torch.from_numpy(tokens.ravel()[batch.chosen])
        expected = float(F.cross_entropy(logits, words, reduction="sum"))
        done = train.update(run, [batch])
        assert float(done.step.loss) == pytest.approx(expected, rel=1e-5) and int(
            done.step.counts[0]
        ) == len(words)
    assert run.student.lm_head.bias.abs().max() > 0


def test_beside_data2vec_it_adds_its_weight_times_the_loss_at_the_mask_places(corpus_dir):
    run, dataset = make_run(corpus_dir, mlm_weight=0.5)
    batch = dataset.batch(dataset.epoch_batches(1)[0], 1)
    here = CPU.upload(batch)
    target = teacher_targets(run.teacher, here, run.cfg.model)
    prediction, logits = run.student(here.source, here.masked)
    words = here.target.flatten()[here.target_places]
    expected = data2vec_loss(prediction, target, run.cfg.model) + 0.5 * F.cross_entropy(
        logits, words, reduction="sum"
    )
    done = train.update(run, [batch])
    assert (
        float(done.step.loss) == pytest.approx(expected.item(), rel=1e-6)
        and int(done.step.counts[0]) == batch.sample_size
    )


def test_it_is_evaluated_beside_the_word_frequencies(corpus_dir):
    run, dataset = make_run(corpus_dir, objective="mlm")
    valid = Corpus(run.cfg.data).split("valid")
    figures = quality.evaluate(run, valid, dataset)
    counts = np.ones(len(dataset.dictionary))
    for begin, end in zip(dataset.stream.starts, dataset.stream.starts[1:]):
        np.add.at(counts, dataset.stream.read(int(begin), int(end)), 1)
    losses = []
    for ids in valid.epoch_batches(1):
        tokens, _, hidden = valid.mask(ids, 1)
        losses += (-np.log(counts / counts.sum()))[tokens[hidden]].tolist()
    assert figures["mlm_loss_frequency"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert figures["mlm_places"] == len(losses)
    assert figures["mlm_perplexity"] == pytest.approx(math.exp(figures["mlm_loss"]))


@pytest.mark.parametrize("flags", [BASELINE.split(), ["--mlm_weight", "1"]])
def test_such_a_run_trains_validates_and_serves_eval(tmp_path, corpus_dir, flags, capsys):
    call(
        train.main,
        *FEW,
        "--data_path",
        corpus_dir,
        "--save_dir",
        tmp_path,
        "--max_update",
        6,
        *flags,
    )
    last = tmp_path / "checkpoint_last.pt"
    row = rows_of(tmp_path, "valid_mlm_loss")[-1]
    assert 0 < row["valid_mlm_loss"] and row["valid_loss"] > 0
    result = json.loads(
        call(
            evaluation.main,
            "--ckpt",
            last,
            "--untrained",
            "--probe",
            "--probe_places",
            50,
            "--json",
        )
    )
    assert (
        result["mlm_loss"] == pytest.approx(row["valid_mlm_loss"], rel=1e-5) and "probe" in result
    )
    printed = call(evaluation.main, "--ckpt", last)
    assert "words: " in printed and "frequencies" in printed
    assert "warning" not in capsys.readouterr().err


def test_a_run_begins_with_the_encoder_of_another_objective_and_says_which_heads_differ(
    tmp_path, corpus_dir, capsys
):
    few = [
        *FEW,
        "--data_path",
        corpus_dir,
        "--max_update",
        1,
        "--lr",
        0,
        "--weight_decay",
        0,
        "--save_dir",
    ]
    call(train.main, *few, tmp_path / "words", "--objective", "mlm")
    call(
        train.main,
        *few,
        tmp_path / "plain",
        "--init_from",
        tmp_path / "words" / "checkpoint_last.pt",
    )
    said = capsys.readouterr().err
    assert "no regression head; it starts" in said and "the head for words in" in said
    call(
        train.main,
        *few,
        tmp_path / "both",
        "--init_from",
        tmp_path / "plain" / "checkpoint_last.pt",
        "--mlm_weight",
        1,
    )
    said = capsys.readouterr().err
    assert "no head for words; it starts" in said and "regression head" not in said
    words, both = (
        checkpoint.load(tmp_path / name / "checkpoint_last.pt").student
        for name in ("words", "both")
    )
    encoder = [name for name in words if name.startswith("encoder.")]
    assert all(torch.equal(words[name], both[name]) for name in encoder) and "lm_head.bias" in both
