"""Fine-tuning: equal to the reference's recorded runs, its rules by formula, and what a user does with it."""

import json
import shutil
from pathlib import Path

import config
import convert
import eval as evaluation
import finetune
import train
from config import ModelConfig
from model import Data2VecText
from run import checkpoint, flags
from tasks import baselines as bag
from tasks import labelled
from test.helpers import CPU, GOLDEN, SMALL, call, few, golden

import numpy as np
import pytest
import torch
import torch.nn.functional as F

WORDS = [f"w{i}" for i in range(36)]


def write_table(path, seed, count, header="text\tlabel\n"):
    """Sentences that are good if they hold w1 and bad if they hold w2."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        words = [WORDS[k] for k in rng.integers(3, len(WORDS), rng.integers(2, 9))]
        words.insert(int(rng.integers(0, len(words))), ("w1", "w2")[i % 2])
        rows.append(f"{' '.join(words)}\t{('good', 'bad')[i % 2]}\n")
    Path(path).write_text(header + "".join(rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a pretrained checkpoint, its dictionary in data/, and train.tsv, valid.tsv, test.tsv."""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "data").mkdir()
    (folder / "data" / "dict.txt").write_text("".join(f"{word} 1\n" for word in WORDS[:-1]))
    torch.manual_seed(1)
    cfg = ModelConfig(**SMALL)
    model = Data2VecText(cfg, 40)
    student, encoder = model.state_dict(), model.encoder.state_dict()
    parts = convert.beginning(1)
    teacher = {k: v + 0.01 for k, v in encoder.items()}
    settings = {**vars(cfg), "data_path": str(folder / "data")}
    checkpoint.save(
        {"config": settings, "student": student, "teacher": teacher, **parts},
        folder / "pretrained.pt",
    )
    for seed, (split, count) in enumerate((("train", 120), ("valid", 40), ("test", 30))):
        write_table(folder / f"{split}.tsv", seed, count)
    return folder


def flags(place, out, **options):
    known = dict(
        ckpt=place / "pretrained.pt",
        save_dir=out,
        device="cpu",
        text="text",
        label="label",
        lr=3e-3,
    )
    known |= dict(
        train=place / "train.tsv",
        valid=place / "valid.tsv",
        max_epoch=8,
        dropout=0,
        attention_dropout=0,
    )
    return [f"--{k}={v}" for k, v in {**known, **options}.items() if v is not None]


def rows_of(folder, key="loss"):
    rows = [json.loads(line) for line in (Path(folder) / "finetune.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


# ---------------------------------------------------------------------------------------------- the reference


@golden
@pytest.mark.parametrize("name", ["polarity", "entailment", "overlap"])
def test_recorded_runs_come_out_equal(name, tmp_path, monkeypatch):
    folder, batches, outputs = GOLDEN / "finetune" / name, [], []
    settings = json.loads((folder / "config.json").read_text())
    forward, figures_of = finetune.forward, finetune.figures_of
    monkeypatch.setattr(
        finetune, "forward", lambda run, ids: (batches.append((run, ids)), forward(run, ids))[1]
    )
    monkeypatch.setattr(
        finetune, "figures_of", lambda x, *rest: (outputs.append(x), figures_of(x, *rest))[1]
    )
    argv = [f"--{k}={v}" for k, v in settings["config"].items()]
    start = ["--data_path", folder / "bin", "--init_from", folder / "init.pt", "--fairseq_exact"]
    call(finetune.main, *start, "--save_dir", tmp_path, *argv)
    theirs = [json.loads(line) for line in (folder / "trajectory.jsonl").read_text().splitlines()]
    assert [ids.tolist() for _, ids in batches] == [ids for row in theirs for ids in row["ids"]]
    shapes = [
        list(labelled.pad([run.data.train.rows[i] for i in ids])[0].shape) for run, ids in batches
    ]
    assert shapes == [shape for row in theirs for shape in row["shapes"]]
    ours = rows_of(tmp_path)
    assert len(ours) == len(theirs)
    for row, recorded in zip(ours, theirs):
        assert (
            row["num_updates"] == recorded["update"]
            and row["sample_size"] == recorded["sample_size"]
        )
        assert row["loss"] == pytest.approx(recorded["loss"], rel=5e-6)
        assert row["gnorm"] == pytest.approx(recorded["gnorm"], rel=1e-4)
        assert row["lr"] == pytest.approx(recorded["lr"], abs=1e-15)
    recorded, ours = (
        json.loads((folder / "valid.json").read_text()),
        rows_of(tmp_path, "valid_loss"),
    )
    for x, row, valid in zip(outputs, ours, recorded, strict=True):
        assert row["num_updates"] == valid["update"] and row["valid_loss"] == pytest.approx(
            valid["loss"], rel=5e-6
        )
        assert row["valid_accuracy"] == (
            valid["accuracy"] and pytest.approx(valid["accuracy"], rel=1e-6)
        )
        assert np.abs(x.numpy() - np.array(valid["logits"])).max() < 1e-5
    labels = checkpoint.load(tmp_path / "checkpoint_best.pt").content["classifier"]["labels"]
    assert labels == (settings["labels"] and settings["labels"][:2])


# ---------------------------------------------------------------------------------------------- rules by formula


def test_learning_rate_climbs_and_falls_in_straight_lines():
    rates = [finetune.lr_at(u, 2.0, 4, 12) for u in range(13)]
    assert rates == pytest.approx([0, 0.5, 1, 1.5, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25, 0])
    assert finetune.lr_at(0, 2.0, 0, 10) == 2.0


def test_an_example_is_fairseqs_and_a_long_one_is_cut():
    a, b = np.array([7, 8, 9, 2]), np.array([5, 2])
    assert labelled.join([a], 9)[0].tolist() == [0, 7, 8, 9, 2]
    assert labelled.join([a, b], 9)[0].tolist() == [0, 7, 8, 9, 2, 2, 5, 2]
    assert labelled.join([a, b], 8)[1] is False
    row, cut = labelled.join([a, b], 7)
    assert cut and row.tolist() == [0, 7, 8, 2, 2, 5, 2]
    row, cut = labelled.join([np.r_[4:34, 2], np.r_[4:24, 2]], 14)
    assert cut and row.tolist() == [0, *range(4, 9), 2, 2, *range(4, 9), 2]


def test_batches_end_where_the_next_example_would_not_fit():
    rng = np.random.default_rng(0)
    lengths, order = rng.integers(3, 40, 200), labelled.training_order(200, 5)
    drawn = np.random.RandomState(5).permutation(200)
    assert drawn[order].tolist() == list(range(200))
    walked = [[]]
    for i in order:
        more = [*walked[-1], i]
        if walked[-1] and (len(more) > 8 or len(more) * max(lengths[more]) > 150):
            more = [i]
            walked.append(more)
        walked[-1] = more
    cut = labelled.cut_batches(lengths, order, 8, 150)
    assert [batch.tolist() for batch in cut] == walked
    shuffled = list(range(len(cut)))
    np.random.RandomState(5 + 2).shuffle(shuffled)
    assert [batch.tolist() for batch in labelled.epoch_batches(cut, 5, 2)] == [
        walked[i] for i in shuffled
    ]


def test_batches_of_similar_lengths_hold_the_same_examples_with_little_padding():
    lengths, order = (
        np.random.default_rng(0).integers(3, 40, 1000),
        labelled.training_order(1000, 5),
    )
    grouped = labelled.group_lengths(lengths, order, 128)
    for i in range(0, 1000, 128):  # chance decides which examples are sorted together
        assert sorted(grouped[i : i + 128]) == sorted(order[i : i + 128])
        assert (np.diff(lengths[grouped[i : i + 128]]) >= 0).all()
    padding = [
        sum(len(ids) * lengths[ids].max() for ids in labelled.cut_batches(lengths, o, 8, 0))
        / lengths.sum()
        - 1
        for o in (order, grouped)
    ]
    assert padding[0] > 0.5 and padding[1] < 0.15


def test_an_update_is_the_mean_over_all_examples_of_its_batches(place, tmp_path):
    call(
        finetune.main,
        *flags(place, tmp_path, max_update=1, max_epoch=0, update_freq=99, batch_size=7),
    )
    first = rows_of(tmp_path)[0]
    assert (
        first["sample_size"] == 120 and first["lr"] == 3e-3
    )  # one update has no room for a warm-up
    cfg, _ = flags.parse(finetune.PARTS, "", flags(place, tmp_path / "b"))
    (tmp_path / "b").mkdir()
    program = finetune.Program(cfg[0], CPU)
    model, data = program.new_model(1, False).train(), program.data
    tokens, _ = labelled.pad(data.train.rows)
    loss = F.cross_entropy(
        model(torch.from_numpy(tokens), True), torch.from_numpy(data.train.labels)
    )
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["gnorm"] == pytest.approx(norm.item(), rel=1e-4)


def test_classes_count_from_the_most_frequent_and_ties_by_alphabet():
    assert labelled.label_names(["b", "c", "c", "a"]) == ["c", "a", "b"]


# ---------------------------------------------------------------------------------------------- use


@pytest.mark.parametrize("pool, lr", [("cls", 1e-2), ("mean", 3e-2)])
def test_a_task_is_learned_and_raw_lines_get_names(place, tmp_path, pool, lr):
    options = dict(
        train=write_table(tmp_path / "many.tsv", 3, 600), test=place / "test.tsv", max_epoch=10
    )
    shown = call(finetune.main, *flags(place, tmp_path, **options, lr=lr, pool=pool))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["runs"][0]["valid"]["accuracy"] == results["runs"][0]["test"]["accuracy"] == 1
    assert (
        "2 classes: bad, good" in shown and "valid accuracy 1.0000, test accuracy 1.0000" in shown
    )
    best = tmp_path / "checkpoint_best.pt"
    made = torch.load(best, weights_only=True)["classifier"]
    assert made["labels"] == ["bad", "good"] and ("dense.weight" in made["head"]) == (pool == "cls")
    (tmp_path / "lines").write_text("w5 w1 w6\n\nw2\n")
    rows = call(
        finetune.main, "--ckpt", best, "--predict", tmp_path / "lines", "--device", "cpu"
    ).splitlines()
    assert rows[0] == "label\tbad\tgood" and [row.split("\t")[0] for row in (rows[1], rows[3])] == [
        "good",
        "bad",
    ]
    assert all(
        sum(map(float, row.split("\t")[1:])) == pytest.approx(1, abs=1e-5) for row in rows[1:]
    )
    out = tmp_path / "out.tsv"
    table = ["--predict", place / "test.tsv", "--text", "text", "--out", out, "--batch_size", 7]
    call(finetune.main, "--ckpt", best, *table, "--device", "cpu")
    truth = [line.split("\t")[1] for line in (place / "test.tsv").read_text().splitlines()[1:]]
    assert [line.split("\t")[0] for line in out.read_text().splitlines()[1:]] == truth


def test_several_rates_and_seeds_are_all_shown_and_the_best_one_stays(place, tmp_path):
    options = dict(lr="1e-5,1e-2", seeds=2, untrained=True, max_epoch=8)
    shown = call(finetune.main, *flags(place, tmp_path, **options))
    results = json.loads((tmp_path / "results.json").read_text())
    names = [
        f"{u}lr {lr} seed {s}"
        for u in ("", "untrained ")
        for lr in ("1e-05", "0.01")
        for s in (1, 2)
    ]
    assert [run["name"] for run in results["runs"]] == names
    assert results["best"].startswith("lr 0.01")
    values = [run["valid"]["accuracy"] for run in results["runs"][2:4]]
    assert f"lr 0.01: valid accuracy {np.mean(values):.4f} +- {np.std(values, ddof=1):.4f}" in shown
    told = f"a bag of the tokens, without an encoder: valid accuracy {results['bag']['valid']['accuracy']:.4f}\n"
    assert shown.count(told) == 2 and results["bag"]["valid"]["accuracy"] > 0.9  # a word decides
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["checkpoint_best.pt"]
    assert len(list(tmp_path.rglob("finetune.jsonl"))) == 8


def test_a_bag_of_tokens_is_tf_idf_and_logistic_regression():
    rng = np.random.default_rng(1)
    rows = [np.r_[0, rng.integers(4, 24, rng.integers(0, 12)), 2] for _ in range(60)]
    labels = np.array([int(7 in row) + int(9 in row) for row in rows])
    has = np.array(
        [[np.sum(row == token) for token in range(24)] for row in rows], float
    )  # (60, 24)
    has[:, :4] = 0
    rarity = np.log(61 / (1 + (has > 0).sum(0))) + 1
    dense = np.where(has > 0, 1 + np.log(np.maximum(has, 1)), 0) * rarity
    dense = torch.from_numpy(
        dense / np.maximum(np.linalg.norm(dense, axis=1), 1e-9)[:, None]
    ).float()
    bags, weight = bag.Bags(bag.count(rows), 60, rarity), torch.randn(24, 3, requires_grad=True)
    outputs, target = bag.Product.apply(weight, bags), torch.randn(60, 3)
    assert torch.allclose(outputs, dense @ weight, atol=1e-6)
    assert torch.allclose(
        torch.autograd.grad((outputs * target).sum(), weight)[0], dense.T @ target, atol=1e-5
    )

    split = labelled.Split(rows, labels)
    data = finetune.Data(split, {"valid": split}, None, ["0", "1", "2"], 1)
    found = bag.fit(data, 24, "accuracy")
    linear_model = pytest.importorskip("sklearn.linear_model")
    fits = [
        linear_model.LogisticRegression(C=c, max_iter=9999).fit(dense, labels)
        for c in bag.STRENGTHS
    ]
    scores = [fit.score(dense, labels) for fit in fits]
    assert (
        found["valid"]["accuracy"] == max(scores)
        and found["strength"] == bag.STRENGTHS[np.argmax(scores)]
    )
    loss = -np.log(fits[np.argmax(scores)].predict_proba(dense)[np.arange(60), labels]).mean()
    assert found["valid"]["loss"] == pytest.approx(loss, rel=1e-3)


def test_a_frozen_encoder_stays_as_it_is_under_a_linear_probe(place, tmp_path):
    call(finetune.main, *flags(place, tmp_path, freeze=True))
    best, before = (
        checkpoint.load(tmp_path / "checkpoint_best.pt"),
        checkpoint.load(place / "pretrained.pt"),
    )
    assert all(
        torch.equal(best.student[k], v)
        for k, v in before.student.items()
        if k.startswith("encoder.")
    )
    assert json.loads((tmp_path / "results.json").read_text())["runs"][0]["valid"]["accuracy"] > 0.8
    predict = ["--predict", place / "valid.tsv", "--text", "text"]
    said = call(finetune.main, "--ckpt", tmp_path / "checkpoint_best.pt", *predict)
    truth = [line.split("\t")[1] for line in (place / "valid.tsv").read_text().splitlines()[1:]]
    right = np.mean(
        [
            row.split("\t")[0] == label
            for row, label in zip(said.splitlines()[1:], truth, strict=True)
        ]
    )
    assert right == max(row["valid_accuracy"] for row in rows_of(tmp_path, "valid_accuracy"))


def test_patience_ends_a_run_that_gets_no_better(place, tmp_path):
    call(finetune.main, *flags(place, tmp_path, lr=0, patience=2, max_epoch=9))
    assert [row["epoch"] for row in rows_of(tmp_path, "valid_loss")] == [1, 2, 3]


def test_the_teacher_can_be_what_is_fine_tuned(place, tmp_path):
    call(finetune.main, *flags(place, tmp_path, teacher=True, lr=0, max_epoch=1))
    best = checkpoint.load(tmp_path / "checkpoint_best.pt").student
    for name, tensor in checkpoint.load(place / "pretrained.pt").teacher.items():
        assert torch.equal(best[f"encoder.{name}"], tensor)


def test_a_small_encoder_with_a_large_ones_learning_rate_is_told(place, tmp_path):
    for lr, known in ((2e-5, 1), ("2e-5,1e-3", 0)):
        shown = call(
            finetune.main, *flags(place, tmp_path, lr=lr, max_epoch=1, max_update=1, overwrite=True)
        )
        assert shown.count("note: width 16 needs a higher --lr") == known


def test_embeddings_of_another_size_give_the_same_outputs(place, tmp_path):
    before, losses = checkpoint.load(place / "pretrained.pt").student, []
    for rms in (0, 0.3):
        call(finetune.main, *flags(place, tmp_path / str(rms), embed_rms=rms, lr=0, max_epoch=1))
        losses.append(rows_of(tmp_path / str(rms), "valid_loss")[0]["valid_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    after = checkpoint.load(tmp_path / "0.3" / "checkpoint_best.pt").student
    tokens, positions = "encoder.embed_tokens.weight", "encoder.embed_positions.weight"
    assert after[tokens].square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-5)
    factor = 0.3 / before[tokens].square().mean().sqrt()
    for name, tensor in before.items():
        if name.startswith("encoder."):
            assert torch.allclose(
                after[name], tensor * factor if name in (tokens, positions) else tensor
            ), name


def test_init_from_takes_the_head_too_and_ckpt_draws_a_new_one(place, tmp_path):
    call(finetune.main, *flags(place, tmp_path / "a"))
    first, heads = tmp_path / "a" / "checkpoint_best.pt", []
    for name in ("init_from", "ckpt"):
        options = {"ckpt": None, name: first, "lr": 0, "max_epoch": 1}
        call(finetune.main, *flags(place, tmp_path / name, **options))
        heads.append(
            checkpoint.load(tmp_path / name / "checkpoint_best.pt").content["classifier"]["head"]
        )
    made = checkpoint.load(first).content["classifier"]["head"]
    assert torch.equal(made["dense.weight"], heads[0]["dense.weight"])
    assert not torch.equal(made["dense.weight"], heads[1]["dense.weight"])


def test_nothing_is_lost_unasked(place, tmp_path):
    call(finetune.main, *flags(place, tmp_path, max_epoch=1))
    with pytest.raises(config.InputError, match="holds finetune.jsonl; add --overwrite"):
        finetune.main(flags(place, tmp_path))
    with pytest.raises(config.InputError, match="holds the run to start from"):
        finetune.main(flags(place, tmp_path, ckpt=tmp_path / "checkpoint_best.pt", overwrite=True))
    call(finetune.main, *flags(place, tmp_path, max_epoch=1, overwrite=True))


def test_weights_that_diverge_end_in_one_line(place, tmp_path):
    with pytest.raises(config.RunError, match="try a lower --lr"):
        finetune.main(flags(place, tmp_path, lr=1e30, warmup_updates=0))


@golden
def test_a_checkpoint_of_fairseq_is_fine_tuned(tmp_path):
    shutil.copy(GOLDEN / "corpora" / "words-bin" / "dict.txt", tmp_path)
    rows = (GOLDEN / "tasks" / "polarity" / "train.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "t.tsv").write_text("".join(rows[:40]))
    own = [
        "--train",
        tmp_path / "t.tsv",
        "--valid",
        tmp_path / "t.tsv",
        "--text",
        "sentence",
        "--label",
        "label",
    ]
    start = [
        "--ckpt",
        GOLDEN / "checkpoint" / "fairseq_doc128.pt",
        "--dict",
        tmp_path / "dict.txt",
        "--max_update",
        2,
    ]
    call(finetune.main, *start, *own, "--save_dir", tmp_path / "out", "--device", "cpu")
    assert len(rows_of(tmp_path / "out")) == 2


def test_a_fine_tuned_checkpoint_serves_features_and_a_damaged_one_is_refused(place, tmp_path):
    call(finetune.main, *flags(place, tmp_path / "out", max_epoch=1))
    best = tmp_path / "out" / "checkpoint_best.pt"
    features = [
        "--features",
        place / "train.tsv",
        "--out",
        tmp_path / "f.npy",
        "--data_path",
        tmp_path / "out",
    ]
    call(evaluation.main, "--ckpt", best, *features, "--device", "cpu")
    assert np.load(tmp_path / "f.npy").shape == (121, 16)
    content = torch.load(best, weights_only=True)
    content["classifier"]["labels"] = [1, 2]
    torch.save(content, best)
    with pytest.raises(config.InputError, match="its classifier is not what"):
        finetune.main(["--ckpt", str(best), "--predict", str(place / "train.tsv")])


@pytest.mark.parametrize("objective", ["data2vec", "mlm"])
def test_what_train_py_wrote_is_fine_tuned(objective, corpus_dir, place, tmp_path):
    call(
        train.main, *few(corpus_dir, tmp_path / "run", "--objective", objective, "--max_update", 2)
    )
    last = tmp_path / "run" / "checkpoint_last.pt"
    call(finetune.main, *flags(place, tmp_path / "out", ckpt=last, lr=0, max_epoch=1))
    found, made = (
        checkpoint.load(path).student for path in (tmp_path / "out" / "checkpoint_best.pt", last)
    )
    assert all(torch.equal(found[name], made[name]) for name in found)
    assert set(found) == {name for name in made if name.startswith("encoder.")}
