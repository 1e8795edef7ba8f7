"""Masked language modelling, alone and beside data2vec."""

import json
import math

import eval as evaluation
import train
from data import Corpus
from formats import fairseq_names
from judge import quality
from model import data2vec_loss, teacher_targets
from run import checkpoint
from test.helpers import CPU, call, few, flags_of, make_run, rows_of

import numpy as np
import pytest
import torch
import torch.nn.functional as F

BASELINE = dict(objective="mlm", mask_multiple_length=1, mask_prob=0.3)
BASELINE |= dict(random_token_prob=0.1, leave_unmasked_prob=0.1)


def logits_by_formula(student, x):
    head, embedding = student.lm_head, student.encoder.embed_tokens.weight
    h = x @ head.dense.weight.T + head.dense.bias
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (h * head.layer_norm.weight + head.layer_norm.bias) @ embedding.T + head.bias


def test_the_loss_is_the_cross_entropy_at_all_chosen_places(corpus_dir):
    run, dataset = make_run(corpus_dir, **BASELINE)
    assert run.student.regression_head is None
    for ids in dataset.epoch_batches(1)[:3]:
        batch = dataset.batch(ids, 1)
        tokens, source, hidden = dataset.mask(ids, 1)
        assert np.array_equal(batch.chosen, np.flatnonzero(hidden))
        assert len(batch.chosen) > len(batch.masked)
        with torch.no_grad():
            x, _ = run.student.encoder(torch.from_numpy(source))
            logits = logits_by_formula(run.student, x.flatten(0, 1)[batch.chosen])
        words = torch.from_numpy(tokens.ravel()[batch.chosen])
        expected = float(F.cross_entropy(logits, words, reduction="sum"))
        step = train.update(run, [batch]).step
        assert float(step.loss) == pytest.approx(expected, rel=1e-5)
        assert int(step.counts[0]) == len(words)
    assert run.student.lm_head.bias.abs().max() > 0


def test_beside_data2vec_it_adds_its_weight_times_the_loss_at_the_mask_places(corpus_dir):
    run, dataset = make_run(corpus_dir, mlm_weight=0.5)
    host = dataset.batch(dataset.epoch_batches(1)[0], 1)
    batch = CPU.upload(host)
    target = teacher_targets(run.teacher, batch, run.cfg.model)
    prediction, logits = run.student(batch.source, batch.masked)
    words = batch.target.flatten()[batch.target_places]
    expected = data2vec_loss(prediction, target, run.cfg.model)
    expected += 0.5 * F.cross_entropy(logits, words, reduction="sum")
    step = train.update(run, [host]).step
    assert float(step.loss) == pytest.approx(expected.item(), rel=1e-6)
    assert int(step.counts[0]) == len(host.masked)


def test_it_is_evaluated_beside_the_word_frequencies(corpus_dir):
    run, dataset = make_run(corpus_dir, objective="mlm")
    valid = Corpus(run.cfg.data).split("valid")
    figures = quality.evaluate(run, valid, dataset)
    text = dataset.stream.read(0, dataset.stream.tokens)
    counts = np.bincount(text, minlength=len(dataset.dictionary)) + 1
    losses = []
    for ids in valid.epoch_batches(1):
        tokens, _, hidden = valid.mask(ids, 1)
        losses += (-np.log(counts / counts.sum()))[tokens[hidden]].tolist()
    assert figures["mlm_loss_frequency"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert figures["mlm_places"] == len(losses)
    assert figures["mlm_perplexity"] == pytest.approx(math.exp(figures["mlm_loss"]))


@pytest.mark.parametrize("options", [BASELINE, dict(mlm_weight=1)])
def test_such_a_run_trains_validates_and_serves_eval(tmp_path, corpus_dir, options, capsys):
    call(train.main, *few(corpus_dir, tmp_path, "--max_update", 6, *flags_of(options)))
    argv = ["--ckpt", tmp_path / "checkpoint_last.pt", "--untrained", "--probe"]
    result = json.loads(call(evaluation.main, *argv, "--probe_places", 50, "--json"))
    row = rows_of(tmp_path, "valid_mlm_loss")[-1]
    assert result["mlm_loss"] == pytest.approx(row["valid_mlm_loss"], rel=1e-5)
    assert row["valid_loss"] > 0 and "probe" in result and "mlm_loss" in result["untrained"]
    assert "frequencies" in call(evaluation.main, *argv[:2])
    assert "warning" not in capsys.readouterr().err


def test_an_encoder_of_another_objective_is_taken_and_heads_are_told(tmp_path, corpus_dir, capsys):
    still = "--max_update 1 --lr 0 --weight_decay 0".split()

    def start(name, *argv) -> str:
        call(train.main, *few(corpus_dir, tmp_path / name, *still, *argv))
        return capsys.readouterr().err

    words, plain = (tmp_path / name / "checkpoint_last.pt" for name in ("words", "plain"))
    start("words", "--objective", "mlm")
    said = start("plain", "--init_from", words)
    assert "no regression head" in said and "the head for words in" in said
    said = start("both", "--init_from", plain, "--mlm_weight", 1)
    assert "no head for words" in said and "regression head" not in said
    # a student without its teacher, as an average of checkpoints often is
    torch.save(fairseq_names.to_reference(checkpoint.load(plain).student, {}), tmp_path / "a.pt")
    assert "has no teacher" in start("averaged", "--init_from", tmp_path / "a.pt")
    assert "has no teacher" not in said
    words, both = (checkpoint.load(tmp_path / n / "checkpoint_last.pt") for n in ("words", "both"))
    for name, value in words.student.items():
        assert not name.startswith("encoder.") or torch.equal(value, both.student[name]), name
    assert "lm_head.bias" in both.student
