"""Ways to look at a run: the probe of its features, TensorBoard curves, pictures of its curves."""

import importlib.util
import json
import math
import sys

import eval as evaluation
import train
from config import InputError
from data import Corpus
from hardware.device import Device
from judge import plot, probe
from run.curves import TensorBoard
from test.helpers import call, dataset_of, few, make_dataset, make_run, rows_of
from text.binarized import EOS, UNK

import numpy as np
import pytest
import torch

# ------------------------------------------------------------------------------------------- probe


@pytest.mark.parametrize("most, tokens", [(3, [5, 6, 8]), (1000, [5, 6, 8, 7])])
def test_the_classes_are_the_most_frequent_words_in_order(tmp_path, monkeypatch, most, tokens):
    monkeypatch.setattr(probe, "CLASSES", most)
    # in a tie the lower id is first; special tokens, and words that never occur, are no classes
    sentences = [[7] * 4 + [5] * 6 + [6] * 5 + [8] * 5 + [UNK] * 9 + [EOS]] * 3
    dataset = dataset_of(make_dataset(tmp_path, sentences, 12)[0])
    classes = probe.frequent_tokens(dataset.stream, dataset.dictionary)
    assert np.flatnonzero(classes >= 0).tolist() == sorted(tokens)
    assert classes[tokens].tolist() == list(range(len(tokens)))


@pytest.mark.parametrize("teacher_input", ["full", "masked"])
def test_the_labels_of_the_probe_are_the_tokens_under_the_masks(corpus_dir, teacher_input):
    run, training = make_run(corpus_dir, teacher_input=teacher_input)
    dataset = Corpus(run.cfg.data).split("valid")
    classes = probe.frequent_tokens(training.stream, training.dictionary)
    places = probe.find_places(dataset, classes, 10**6, run.cfg)
    answers = zip(places.labels, places.blocks, strict=True)
    masked = 0
    for batch, flat in places.batches:
        masked += len(batch.masked)
        assert (batch.source.ravel()[flat] == dataset.dictionary.mask_id).all()
        for place, (label, block) in zip(flat.tolist(), answers):
            row, column = divmod(place, batch.source.shape[1])
            assert batch.ids[row] == block
            assert classes[dataset.read_block(block)[column]] == label
    assert len(places.labels) + places.left_out == masked
    assert not dataset.training
    assert len(places.batches) == probe.MASK_EPOCHS * len(dataset.batch_ends)
    assert 50 <= len(probe.find_places(dataset, classes, 50, run.cfg).labels) < len(places.labels)


def test_whitening_gives_mean_0_and_unit_covariance():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=rng) @ torch.randn(5, 5, generator=rng)
    x = x * torch.tensor([0.1, 1, 1, 10, 1]) + 3
    white, first = probe.whiten(x, x[:7])
    assert torch.allclose(white.mean(0), torch.zeros(5), atol=1e-3)
    assert torch.allclose(white.T @ white / len(x), torch.eye(5), atol=1e-2)
    assert torch.equal(first, white[:7])  # others are mapped alike


class Oracle(torch.nn.Module):
    """Its state at a place is an embedding of the source token `shift` places before it."""

    def __init__(self, width, vocabulary, shift):
        super().__init__()
        self.code = torch.nn.Embedding(vocabulary, width)
        self.shift = shift

    def forward(self, tokens, padded, places):
        return self.code(tokens.roll(self.shift, 1)).flatten(0, 1)[places], []


def test_the_probe_finds_words_in_features_that_tell_them_and_none_in_others(tmp_path):
    # each word follows from the one before it: w + 1 comes after w, modulo 20
    starts = np.random.default_rng(0).integers(0, 20, 150).tolist()
    make_dataset(tmp_path, [[4 + (s + i) % 20 for i in range(24)] + [EOS] for s in starts], 24)
    run, _ = make_run(tmp_path, mask_multiple_length=1, sample_break_mode="eos")
    asked = probe.Probe(run, Corpus(run.cfg.data), "valid", 3000)
    answers = {}
    for name, shift in (("untrained", 0), ("trained", 1)):  # shift 0 sees nothing but <mask>
        torch.manual_seed(0)
        run.student.encoder = Oracle(32, 30, shift)
        answers[name] = asked.ask(run.student)
    result = asked.result(**answers)

    share = np.bincount(asked.train.labels, minlength=20) / len(asked.train.labels)
    constant, untrained, trained = (result[n] for n in ("most_frequent", "untrained", "trained"))
    expected = -np.log(share)[asked.valid.labels].mean()
    assert constant["cross_entropy"] == pytest.approx(expected, abs=1e-3)
    assert untrained["cross_entropy"] == pytest.approx(expected, abs=0.05)
    hits = (asked.valid.labels == share.argmax()).mean()
    assert constant["accuracy"] == untrained["accuracy"] == hits
    # the word before is visible at about two places in three; there the answer is certain
    assert 0.6 < trained["accuracy"] < 0.85
    gain = untrained["cross_entropy"] - trained["cross_entropy"]
    assert result["gain"] == pytest.approx(gain) and gain > 10 * result["gain_error"] > 0
    assert "\nwords learned: " in probe.table(result, "valid")


def test_the_probe_repeats_and_its_untrained_model_is_the_start_of_training(saved, corpus_dir):
    argv = ["--ckpt", saved / "checkpoint_last.pt", "--device", "cpu", "--probe"]
    argv += ["--probe_places", "300"]
    first, second = (json.loads(call(evaluation.main, *argv, "--json")) for _ in range(2))
    assert first == second
    result = first["probe"]
    assert min(result["train_places"], result["valid_places"]) >= 300 and result["classes"] == 56
    run, _ = make_run(corpus_dir)
    asked = probe.Probe(run, Corpus(run.cfg.data), "valid", 300)
    answer = asked.ask(run.student)
    assert run.student.training  # its mode is restored
    untrained = result["untrained"]["cross_entropy"]
    assert untrained == pytest.approx(answer["loss"].mean(), abs=1e-6)
    assert untrained != result["trained"]["cross_entropy"]
    text = call(evaluation.main, *argv)
    for name in ("trained", "untrained", "neighbours", "most_frequent"):
        assert f"{result[name]['cross_entropy']:.4f}" in text


def test_the_probe_refuses_what_it_cannot_do(corpus_dir, tmp_path):
    hides_nothing = make_dataset(tmp_path, [[UNK] * 20 + [EOS]] * 9)[0]
    for folder, split, places, message in (
        (corpus_dir, "valid", 0, "--probe_places 0"),
        (corpus_dir, "train", 9, "--split"),
        (hides_nothing, "valid", 100, "train hides no token"),
    ):
        run, _ = make_run(folder)
        with pytest.raises(InputError, match=message):
            probe.Probe(run, Corpus(run.cfg.data), split, places)


def test_the_probe_moves_no_float64_to_a_device(corpus_dir, monkeypatch):
    run, _ = make_run(corpus_dir)  # an NPU has no such tensors
    asked = probe.Probe(run, Corpus(run.cfg.data), "valid", 100)
    types = set()
    plain = Device.tensor

    def tensor(self, array):
        types.add(str(array.dtype))
        return plain(self, array)

    monkeypatch.setattr(Device, "tensor", tensor)
    asked.ask(run.student)
    assert types == {"int64", "float32"}


# ------------------------------------------------------------------------------------- TensorBoard


def points(folder) -> dict:
    """{tag: [(step, value)]} as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_tensorboard_has_fairseqs_names_and_a_resumed_run_repeats_no_row(tmp_path, corpus_dir):
    pytest.importorskip("tensorboard")
    argv = few(corpus_dir, tmp_path / "run", "--tensorboard_logdir", tmp_path / "tb")
    call(train.main, *argv, "--max_update", 3)
    # a killed run had got further than its checkpoint
    lost = TensorBoard(tmp_path / "tb")
    lost.open(3)
    lost.row(dict(loss=99.0, num_updates=4))
    lost.close()
    call(train.main, *argv, "--max_update", 6)

    rows, curves = rows_of(tmp_path / "run"), points(tmp_path / "tb" / "train_inner")
    assert [row["num_updates"] for row in rows] == [1, 2, 3, 4, 5, 6]
    names = {"wpb": "ntokens", "bsz": "nsentences"}
    assert set(curves) == set(rows[0]) - {"num_updates"} | set(names)
    for tag, curve in curves.items():
        values = [row[names.get(tag, tag)] for row in rows]
        assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6], tag
        assert [value for _, value in curve] == pytest.approx(values, rel=1e-6), tag
    rows, curves = rows_of(tmp_path / "run", "valid_loss"), points(tmp_path / "tb" / "valid")
    assert set(curves) == {key.removeprefix("valid_") for key in rows[0]} - {"num_updates"}
    assert [step for step, _ in curves["best_loss"]] == [3, 6]
    assert [value for _, value in curves["loss"]] == pytest.approx([r["valid_loss"] for r in rows])


def test_nulls_and_skipped_updates_make_no_points_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    curves = TensorBoard(tmp_path)
    curves.open(0)
    skipped = dict(num_updates=1, epoch=1, blocks=[3])
    curves.row(dict(skipped=True, **skipped))
    curves.row(dict(overflow=True, loss_scale=64.0, **skipped))
    curves.row(dict(loss=None, gnorm=None, lr=0.5, num_updates=2, epoch=1))
    expected = {"lr": [(2, 0.5)], "epoch": [(2, 1.0)]}
    assert points(tmp_path / "train_inner") == expected  # written before close()


def test_a_missing_tensorboard_or_a_bad_folder_is_refused(tmp_path, corpus_dir, monkeypatch):
    argv = few(corpus_dir, tmp_path / "run", "--tensorboard_logdir")
    (tmp_path / "file").write_text("")
    if importlib.util.find_spec("tensorboard"):
        with pytest.raises(InputError, match="--tensorboard_logdir .*file"):
            call(train.main, *argv, tmp_path / "file")
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        call(train.main, *argv, tmp_path / "tb")
    assert not (tmp_path / "tb").exists()
    assert not (tmp_path / "run" / "train.jsonl").exists()


# ---------------------------------------------------------------------------------------- pictures


def write_rows(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(rows))
    return folder


def test_curves_have_gaps_for_nulls_and_ignore_damaged_lines_and_skipped_updates(tmp_path):
    write_rows(
        tmp_path,
        '{"loss": 5.5, "lr": 0.1, "num_updates": 20}',
        '{"skipped": true, "num_updates": 21, "epoch": 1, "blocks": [3]}',
        '{"loss": 4.0, "num_up\n\n[1, 2]\n"text"',
        '{"loss": [3], "lr": 0.2, "num_updates": 40}',
        '{"valid_loss": 3.5, "num_updates": 40}',
    )
    for run in (tmp_path, tmp_path / "train.jsonl"):
        series = plot.read_run(str(run))
        assert series["lr"] == ([20, 40], [0.1, 0.2]) and series["valid_loss"] == ([40], [3.5])
        (begin, end), (value, gap) = series["loss"]
        assert (begin, end, value) == (20, 40, 5.5) and math.isnan(gap)
        assert series.keys() == {"lr", "loss", "valid_loss"}


def test_a_picture_shows_every_run_and_the_panels_that_any_run_has(saved, tmp_path):
    pytest.importorskip("matplotlib")
    text = (saved / "train.jsonl").read_text()
    runs = [write_rows(tmp_path / f"run_{i}", text) for i in range(7)]  # more than colours
    call(plot.main, *runs, "--out", tmp_path / "all.svg")
    picture = (tmp_path / "all.svg").read_text()
    titles = {title for title, *_ in plot.PANELS}
    absent = {"probe's gain", "words"}
    for name in (*map(str, runs), *titles, "validation", "prediction", "constant"):
        assert (f"<!-- {name}" in picture) == (name not in absent), name
    # the panels that these runs lack, and no other
    rows = '{"valid_probe_gain": 0.1, "valid_mlm_loss": 7, "lr": null, "num_updates": 20}'
    call(plot.main, write_rows(tmp_path / "p", rows), "--out", tmp_path / "all.svg")
    picture = (tmp_path / "all.svg").read_text()
    assert {title for title in titles if f"<!-- {title}" in picture} == absent
    call(plot.main, saved, "--out", tmp_path / "one.png")
    head = (tmp_path / "one.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG") and int.from_bytes(head[16:20], "big") == 1200


def test_odd_rows_and_names_do_not_spoil_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    odd = ["1e308", "-1e308", "1e999", "9" * 400, "9" * 5000, "[" * 100_000, '"5"', "true"]
    row = '{{"loss": {0}, "lr": {0}, "wps": {0}, "target_var": {0}, "num_updates": {1}}}'
    rows = [row.format(value, update) for value in odd for update in (1, value)]
    runs = [write_rows(tmp_path / name, *rows) for name in ("$\\frac{$ \x1b[2J_\n", "_b")]
    out = tmp_path / "x\x1b[2J.svg"
    for count in (1, 2):
        call(plot.main, *runs[:count], "--out", out)
    assert "\\frac{$ \\x1b[2J_\\n" in out.read_text()
    assert "\x1b" not in capsys.readouterr().out


def test_what_cannot_be_drawn_is_refused_in_one_line(saved, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "empty.jsonl").write_text('{"skipped": true, "num_updates": 1}\n')
    for run, name, message in (
        (tmp_path / "none", "x.png", "none: no such file"),
        (tmp_path, "x.png", "train.jsonl: no such file"),
        (tmp_path / "empty.jsonl", "x.png", "empty.jsonl: no row"),
        ("/dev/zero", "x.png", "/dev/zero: not a file"),
        (saved, "x.doc", "x.doc: .*png"),
        (saved, "no/x.png", "no/x.png"),
        (saved, "x.png", "pip install matplotlib"),
    ):
        if "pip" in message:
            monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(InputError, match=message):
            plot.main([str(run), "--out", str(tmp_path / name)])
    assert not list(tmp_path.glob("x.*"))
