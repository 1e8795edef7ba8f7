"""Ways to look at a run: the probe of its features, TensorBoard curves, pictures of its curves."""

import json
import math
import sys

import eval as evaluation
import train
from config import DataConfig, InputError
from data import Corpus
from hardware.device import Device
from judge import plot, probe
from run.curves import TensorBoard
from test.helpers import FEW, call, make_dataset, make_run, rows_of
from text.binarized import EOS, UNK

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("corpus"))[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus_dir):
    """The folder of a run of six updates with a validation at the end."""
    folder = tmp_path_factory.mktemp("run")
    call(train.main, *FEW, "--data_path", corpus_dir, "--save_dir", folder, "--max_update", 6)
    return folder


# ---------------------------------------------------------------------------------------------- probe


def corpus_of(folder, sentences, words, **options):
    make_dataset(folder, sentences, words)
    return Corpus(
        DataConfig(data_path=str(folder), tokens_per_sample=32, max_tokens=256, **options)
    )


def test_the_classes_of_the_probe_are_the_most_frequent_words_in_order_without_special_tokens(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(probe, "CLASSES", 3)
    sentences = [[7] * 4 + [5] * 6 + [6] * 5 + [8] * 5 + [UNK] * 9 + [EOS]] * 3
    corpus = corpus_of(tmp_path, sentences, 12)
    classes = probe.frequent_tokens(corpus.split("train").stream, corpus.dictionary)
    assert {token: c for token, c in enumerate(classes.tolist()) if c >= 0} == {
        5: 0,
        6: 1,
        8: 2,
    }  # in a tie the lower id is first
    monkeypatch.setattr(probe, "CLASSES", 1000)
    classes = probe.frequent_tokens(corpus.split("train").stream, corpus.dictionary)
    assert np.flatnonzero(classes >= 0).tolist() == [
        5,
        6,
        7,
        8,
    ]  # words that never occur get no class


@pytest.mark.parametrize("teacher_input", ["full", "masked"])
def test_the_labels_of_the_probe_are_the_tokens_under_the_masks(tmp_path, teacher_input):
    corpus = corpus_of(tmp_path, None, 60, teacher_input=teacher_input)
    dataset = corpus.split("valid")
    classes = probe.frequent_tokens(corpus.split("train").stream, corpus.dictionary)
    places = probe.find_places(dataset, classes, 10**6)
    at = masked = 0
    for batch, flat in places.batches:
        assert (batch.source.ravel()[flat] == corpus.dictionary.mask_id).all()
        for place, label, block in zip(flat.tolist(), places.labels[at:], places.blocks[at:]):
            row, column = divmod(place, batch.source.shape[1])
            assert batch.ids[row] == block
            assert classes[dataset.read_block(block)[column]] == label
        at, masked = at + len(flat), masked + batch.sample_size
    assert at == len(places.labels) == len(places.blocks) and at + places.left_out == masked
    assert not dataset.training and len(places.batches) == probe.MASK_EPOCHS * len(
        dataset.batch_ends
    )
    few = probe.find_places(dataset, classes, 50)
    assert 50 <= len(few.labels) < len(places.labels)


def test_whitening_gives_mean_0_and_unit_covariance_and_maps_the_others_alike():
    rng = torch.Generator().manual_seed(0)
    x = (
        torch.randn(400, 5, generator=rng)
        @ torch.randn(5, 5, generator=rng)
        * torch.tensor([0.1, 1, 1, 10, 1])
        + 3
    )
    white, first = probe.whiten(x, x[:7])
    assert torch.allclose(white.mean(0), torch.zeros(5), atol=1e-3)
    assert torch.allclose(white.T @ white / len(x), torch.eye(5), atol=1e-2)
    assert torch.equal(first, white[:7])


class Oracle(torch.nn.Module):
    """An encoder whose hidden state at a place is an embedding of the source token `shift` places
    before it."""

    def __init__(self, width, vocabulary, shift):
        super().__init__()
        self.code, self.shift = torch.nn.Embedding(vocabulary, width), shift

    def forward(self, tokens, padded, places):
        return self.code(tokens.roll(self.shift, 1)).flatten(0, 1)[places], []


def test_the_probe_finds_words_in_features_that_tell_them_and_none_in_features_that_do_not(
    tmp_path,
):
    # each word follows from the one before it: w + 1 comes after w, modulo 20
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 20, 150).tolist()
    make_dataset(tmp_path, [[4 + (s + i) % 20 for i in range(24)] + [EOS] for s in starts], 24)
    run, _ = make_run(tmp_path, mask_multiple_length=1, sample_break_mode="eos")
    asked = probe.Probe(run, Corpus(run.cfg.data), "valid", 3000)
    answers = {}
    for name, shift in (("untrained", 0), ("trained", 1)):  # shift 0 sees nothing but <mask>
        torch.manual_seed(0)
        run.student.encoder = Oracle(32, 30, shift)
        answers[name] = asked.ask(asked.run.student)
    result = asked.result(**answers)
    share = np.bincount(asked.train.labels, minlength=20) / len(asked.train.labels)
    assert result["most_frequent"]["cross_entropy"] == pytest.approx(
        -np.log(share)[asked.valid.labels].mean(), abs=1e-3
    )
    assert result["most_frequent"]["accuracy"] == (asked.valid.labels == share.argmax()).mean()
    assert result["untrained"]["accuracy"] == result["most_frequent"]["accuracy"]
    assert result["untrained"]["cross_entropy"] == pytest.approx(
        result["most_frequent"]["cross_entropy"], abs=0.05
    )
    # the word before is visible at about two places in three; there the answer is certain
    assert 0.6 < result["trained"]["accuracy"] < 0.85
    gain = result["untrained"]["cross_entropy"] - result["trained"]["cross_entropy"]
    assert result["gain"] == pytest.approx(gain) and result["gain"] > 10 * result["gain_error"] > 0
    assert "\nwords learned: " in probe.table(result, "valid")
    assert "\nNO words learned: " in probe.table({**result, "gain": result["gain_error"]}, "valid")


def test_the_probe_is_deterministic_and_its_untrained_model_is_the_start_of_training(
    finished, corpus_dir
):
    argv = [
        "--ckpt",
        finished / "checkpoint_last.pt",
        "--device",
        "cpu",
        "--probe",
        "--probe_places",
        "300",
        "--json",
    ]
    first, second = (json.loads(call(evaluation.main, *argv)) for _ in range(2))
    assert first == second
    result = first["probe"]
    assert (
        result["train_places"] >= 300 and result["valid_places"] >= 300 and result["classes"] == 56
    )
    run, _ = make_run(corpus_dir)
    asked = probe.Probe(run, Corpus(run.cfg.data), "valid", 300)
    answer = asked.ask(asked.run.student)
    assert run.student.training  # its mode is restored
    assert result["untrained"]["cross_entropy"] == pytest.approx(answer["loss"].mean(), abs=1e-6)
    assert result["trained"]["cross_entropy"] != result["untrained"]["cross_entropy"]
    text = call(evaluation.main, *[a for a in argv if a != "--json"])
    for name in ("trained", "untrained", "most frequent"):
        key = name.replace(" ", "_")
        assert (
            f"{name:14}{result[key]['accuracy']:16.4f}{result[key]['cross_entropy']:24.4f}" in text
        )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--probe_places", "0"], "--probe_places 0: must be at least 1"),
        (["--split", "train"], "--probe fits on the train split; --split names"),
    ],
)
def test_the_probe_refuses_what_it_cannot_do(finished, argv, message):
    with pytest.raises(InputError, match=message):
        call(
            evaluation.main,
            "--ckpt",
            finished / "checkpoint_last.pt",
            "--device",
            "cpu",
            "--probe",
            *argv,
        )


def test_the_probe_refuses_a_corpus_that_hides_nothing(tmp_path):
    run, _ = make_run(make_dataset(tmp_path, [[UNK] * 20 + [EOS]] * 9)[0])
    with pytest.raises(InputError, match="train hides no token that --probe could ask for"):
        probe.Probe(run, Corpus(run.cfg.data), "valid", 100)


def test_the_probe_runs_where_only_the_cpu_has_float64(corpus_dir, monkeypatch):
    # an NPU has no float64 tensors; the device here is the CPU, so the test records what is moved
    # to it
    run, _ = make_run(corpus_dir)
    asked, seen = probe.Probe(run, Corpus(run.cfg.data), "valid", 100), []
    plain = Device.tensor
    monkeypatch.setattr(
        Device, "tensor", lambda self, array: seen.append(array.dtype) or plain(self, array)
    )
    asked.ask(asked.run.student)
    assert seen and set(map(str, seen)) == {"int64", "float32"}


# ---------------------------------------------------------------------------------------------- TensorBoard


def points(folder) -> dict:
    """{tag: [(step, value)]} as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_the_rows_under_fairseqs_names_and_a_resumed_run_repeats_none(
    tmp_path, corpus_dir
):
    pytest.importorskip("tensorboard")
    few = [
        *FEW,
        "--data_path",
        corpus_dir,
        "--save_dir",
        tmp_path / "run",
        "--tensorboard_logdir",
        tmp_path / "tb",
    ]
    call(train.main, *few, "--max_update", 3)
    # a killed run had got further than its checkpoint
    lost = TensorBoard(tmp_path / "tb")
    lost.open(3)
    lost.row(dict(loss=99.0, num_updates=4))
    lost.row(dict(loss=99.0, num_updates=5))
    lost.close()
    call(train.main, *few, "--max_update", 6)
    rows, shown = rows_of(tmp_path / "run"), points(tmp_path / "tb" / "train_inner")
    assert [row["num_updates"] for row in rows] == [1, 2, 3, 4, 5, 6]
    names = {"wpb": "ntokens", "bsz": "nsentences"}
    assert set(shown) == set(rows[0]) - {"num_updates"} | set(names)
    for tag, curve in shown.items():
        expected = [(row["num_updates"], row[names.get(tag, tag)]) for row in rows]
        assert [step for step, _ in curve] == [step for step, _ in expected], tag
        assert [v for _, v in curve] == pytest.approx([v for _, v in expected], rel=1e-6), tag
    valid, shown = rows_of(tmp_path / "run", "valid_loss"), points(tmp_path / "tb" / "valid")
    assert set(shown) == {key.removeprefix("valid_") for key in valid[0]} - {"num_updates"}
    assert set(shown) > {
        "loss",
        "best_loss",
        "target_var",
        "cosine",
        "cosine_position",
        "r2",
        "gain_block",
        "epoch",
    }
    assert (
        [step for step, _ in shown["best_loss"]] == [row["num_updates"] for row in valid] == [3, 6]
    )
    assert [v for _, v in shown["loss"]] == pytest.approx([row["valid_loss"] for row in valid])


def test_nulls_and_skipped_updates_make_no_points_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    curves = TensorBoard(tmp_path)
    curves.open(0)
    curves.row(dict(skipped=True, num_updates=1, epoch=1, blocks=[3]))
    curves.row(dict(overflow=True, loss_scale=64.0, num_updates=1, epoch=1, blocks=[3]))
    curves.row(dict(loss=None, gnorm=None, lr=0.5, num_updates=2, epoch=1))
    assert points(tmp_path / "train_inner") == {
        "lr": [(2, 0.5)],
        "epoch": [(2, 1.0)],
    }  # written before close()
    curves.close()


def test_a_missing_tensorboard_or_a_bad_folder_is_refused_at_the_start(
    tmp_path, corpus_dir, monkeypatch
):
    few = [*FEW, "--data_path", corpus_dir, "--save_dir", tmp_path / "run", "--tensorboard_logdir"]
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
        without.setitem(sys.modules, "tensorboard", None)
        with pytest.raises(InputError, match="tensorboard package: pip install tensorboard"):
            call(train.main, *few, tmp_path / "tb")
    assert not (tmp_path / "run" / "train.jsonl").exists() and not (tmp_path / "tb").exists()
    pytest.importorskip("tensorboard")
    with pytest.raises(InputError, match="--tensorboard_logdir .*file"):
        call(train.main, *few, tmp_path / "file")
    assert not (tmp_path / "run" / "train.jsonl").exists()


def test_a_full_disk_ends_the_curves_and_not_the_run(tmp_path, corpus_dir, monkeypatch):
    pytest.importorskip("tensorboard")

    def full(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoard, "row", full)
    few = [
        *FEW,
        "--data_path",
        corpus_dir,
        "--save_dir",
        tmp_path / "run",
        "--tensorboard_logdir",
        tmp_path / "tb",
    ]
    printed = call(train.main, *few, "--max_update", 3)
    assert printed.count("No space left on device; no more curves until the next start") == 1
    assert [row["num_updates"] for row in rows_of(tmp_path / "run")] == [1, 2, 3]


# ---------------------------------------------------------------------------------------------- pictures


def test_a_picture_has_gaps_for_nulls_and_ignores_damaged_lines_and_skipped_updates(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        '{"loss": 5.5, "lr": 0.1, "num_updates": 20}\n'
        '{"skipped": true, "num_updates": 21, "epoch": 1, "blocks": [3]}\n'
        '{"loss": 4.0, "num_up\n\n[1, 2]\n"text"\n{"loss": [3], "num_updates": 30}\n'
        '{"loss": null, "lr": 0.2, "num_updates": 40}\n'
        '{"valid_loss": 3.5, "num_updates": 40}\n'
    )
    for run in (tmp_path, tmp_path / "train.jsonl"):
        series = plot.read_run(str(run))
        assert series["lr"] == ([20, 40], [0.1, 0.2]) and series["valid_loss"] == ([40], [3.5])
        assert (
            series["loss"][0] == [20, 40]
            and series["loss"][1][0] == 5.5
            and math.isnan(series["loss"][1][1])
        )
        assert series["wps"] == ([], [])


def test_runs_are_named_by_the_part_of_their_paths_that_differs():
    assert plot.names_of(["output/0/demo"]) == ["demo"]
    assert plot.names_of(["a/b/full/train.jsonl", "a/c/full"]) == ["b/full", "c/full"]
    assert plot.names_of(["x/run", "x/run/two"]) == ["run", "run/two"]


def test_a_picture_shows_every_run_and_every_panel(finished, tmp_path):
    pytest.importorskip("matplotlib")
    runs = []
    for i in range(7):  # more than there are colours
        runs.append(tmp_path / f"run_{i}" / "train.jsonl")
        runs[i].parent.mkdir()
        runs[i].write_text((finished / "train.jsonl").read_text())
    call(plot.main, *runs, "--out", tmp_path / "all.svg")
    picture = (tmp_path / "all.svg").read_text()
    titles = [title for title, *_ in plot.PANELS]
    for text in (
        [f"run_{i}" for i in range(7)]
        + titles
        + ["validation", "prediction", "R2", "block", "constant"]
    ):
        assert (f"<!-- {text}" in picture) == (text not in ("probe's gain", "words")), (
            text
        )  # which this run has not
    call(plot.main, finished, "--out", tmp_path / "one.png")
    head = (tmp_path / "one.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG") and int.from_bytes(head[16:20], "big") == 1200
    assert not list(tmp_path.glob("*.tmp"))


def test_odd_rows_names_and_links_do_not_spoil_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run, other = tmp_path / "$\\frac{$ \x1b[2J_\n", tmp_path / "_b"
    huge = [
        "1e308",
        "-1e308",
        "1e999",
        "9" * 400,
        "9" * 5000,
        "[" * 100_000,
        '"5"',
        "true",
        "1e-320",
    ]
    rows = [
        f'{{"loss": {v}, "lr": {v}, "wps": {v}, "target_var": {v}, "num_updates": {u}}}'
        for v in huge
        for u in (1, v)
    ]
    for folder in (run, other):
        folder.mkdir()
        (folder / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "mine").write_text("mine")
    for name in ("x.svg", "x.png", "x\x1b[2J.pdf"):
        (tmp_path / f"{name}.tmp").symlink_to(tmp_path / "mine")
        for runs in ((run,), (run, other)):
            call(plot.main, *runs, "--out", tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    assert (
        "\\frac{$ \\x1b[2J_\\n" in (tmp_path / "x.svg").read_text()
        and (tmp_path / "mine").read_text() == "mine"
    )
    assert "\x1b" not in capsys.readouterr().out


def test_a_picture_shows_the_words_and_the_probe_of_the_runs_that_have_them(tmp_path):
    pytest.importorskip("matplotlib")
    rows = {
        "old": '{"loss": 5.5, "lr": 0.1, "target_var": null, "num_updates": 20}\n',
        "probed": '{"valid_loss": 3.5, "valid_probe_gain": 0.1, "num_updates": 20}\n',
        "mlm": '{"valid_loss": 7, "valid_mlm_loss": 7, "valid_mlm_loss_frequency": 7.1, "num_updates": 20}\n',
    }
    for name, text in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(text)
    expected = {
        "old": ["loss", "learning rate"],
        "probed": ["loss", "probe's gain"],
        "mlm": ["loss", "words"],
    }
    expected["old probed mlm"] = ["loss", "probe's gain", "words", "learning rate"]
    for names, titles in expected.items():
        call(plot.main, *(tmp_path / name for name in names.split()), "--out", tmp_path / "all.svg")
        picture = (tmp_path / "all.svg").read_text()
        drawn = [
            title
            for title, unit, *_ in plot.PANELS
            if f"<!-- {title}{f' ({unit})' if unit else ''} -->" in picture
        ]
        assert drawn == titles


def test_what_cannot_be_drawn_is_refused_in_one_line(finished, tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text('{"skipped": true, "num_updates": 1}\n')
    for argv, message in (
        ([tmp_path / "none"], "none: no such file; RUN is a --save_dir"),
        ([tmp_path], "train.jsonl: no such file"),
        ([tmp_path / "empty.jsonl"], "no row of a log interval or a validation .*1 lines"),
        ([], "required: RUN"),
        (["/dev/zero"], "/dev/zero: not a file"),
    ):
        with pytest.raises(InputError, match=message):
            plot.main([*map(str, argv), "--out", str(tmp_path / "x.png")])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(InputError, match="pip install matplotlib"):
            plot.main([str(finished), "--out", str(tmp_path / "x.png")])
    pytest.importorskip("matplotlib")
    for name, message in (
        ("x.doc", "the suffix chooses the format; use one of .*png"),
        ("x.pgf", "the suffix chooses the format"),
        ("no/x.png", "no: no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            plot.main([str(finished), "--out", str(tmp_path / name)])
    assert not list(tmp_path.glob("x.*"))
