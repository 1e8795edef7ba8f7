"""Fine-tuning: equal to the reference's recorded runs, its rules by formula, and its use."""

import json

import eval as evaluation
import finetune
import train
from config import InputError, ModelConfig, RunError
from model import Data2VecText
from run import checkpoint
from run import flags as command_line
from tasks import baselines, classifier, labelled
from test.helpers import CPU, GOLDEN, SMALL, call, few, golden, random_encoder, small_content

import numpy as np
import pytest
import torch
import torch.nn.functional as F

WORDS = [f"w{i}" for i in range(36)]


def write_table(path, seed, count):
    """Sentences that are good if they hold w1 and bad if they hold w2."""
    rng = np.random.default_rng(seed)
    rows = ["text\tlabel\n"]
    for i in range(count):
        words = [WORDS[k] for k in rng.integers(3, len(WORDS), rng.integers(2, 9))]
        words.insert(int(rng.integers(0, len(words))), ("w1", "w2")[i % 2])
        rows.append(f"{' '.join(words)}\t{('good', 'bad')[i % 2]}\n")
    path.write_text("".join(rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a pretrained checkpoint, data/dict.txt, and train.tsv, valid.tsv, test.tsv."""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "data").mkdir()
    (folder / "data" / "dict.txt").write_text("".join(f"{word} 1\n" for word in WORDS[:-1]))
    torch.manual_seed(1)
    cfg = ModelConfig(**SMALL)
    model = Data2VecText(cfg, 40)
    settings = {**vars(cfg), "data_path": str(folder / "data"), "tokens_per_sample": 32}
    teacher = {k: v + 0.01 for k, v in model.encoder.state_dict().items()}
    content = small_content(config=settings, student=model.state_dict(), teacher=teacher)
    checkpoint.save(content, folder / "pretrained.pt")
    for seed, (split, count) in enumerate((("train", 120), ("valid", 40), ("test", 30))):
        write_table(folder / f"{split}.tsv", seed, count)
    return folder


def flags(place, out, **options):
    """finetune.py's arguments; an option that is None is left out."""
    known = dict(ckpt=place / "pretrained.pt", save_dir=out, device="cpu", text="text")
    known |= dict(train=place / "train.tsv", valid=place / "valid.tsv", label="label", lr=3e-3)
    known |= dict(max_epoch=8, dropout=0)
    return [f"--{k}={v}" for k, v in {**known, **options}.items() if v is not None]


def read_rows(path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(folder, key="loss") -> list:
    return [row for row in read_rows(folder / "finetune.jsonl") if key in row]


def labels_of(table, column=1) -> list:
    return [line.split("\t")[column] for line in table.read_text().splitlines()[1:]]


def predicted(ckpt, source, *argv) -> list:
    """The rows that finetune.py prints for a file's texts, as cells."""
    out = call(finetune.main, "--ckpt", ckpt, "--predict", source, "--device", "cpu", *argv)
    return [row.split("\t") for row in out.splitlines()]


def head_of(path) -> dict:
    return checkpoint.load(path).content["classifier"]["head"]


def spy(monkeypatch, name) -> list:
    """The arguments of each call of a function of finetune.py."""
    calls, function = [], getattr(finetune, name)

    def spied(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(finetune, name, spied)
    return calls


# ----------------------------------------------------------------------------------- the reference


@golden
@pytest.mark.parametrize("name", ["polarity", "entailment", "overlap"])
def test_recorded_runs_come_out_equal(name, tmp_path, monkeypatch):
    folder = GOLDEN / "finetune" / name
    settings = json.loads((folder / "config.json").read_text())
    forwards, figures = spy(monkeypatch, "forward"), spy(monkeypatch, "figures_of")
    argv = [f"--{k}={v}" for k, v in settings["config"].items() if k != "num_classes"]
    start = ["--data_path", folder / "bin", "--ckpt", folder / "init.pt", "--fairseq_exact"]
    call(finetune.main, *start, "--save_dir", tmp_path, *argv)

    theirs = read_rows(folder / "trajectory.jsonl")
    assert [ids.tolist() for _, ids in forwards] == [ids for row in theirs for ids in row["ids"]]
    rows = forwards[0][0].data.train.rows
    shapes = [list(classifier.pad([rows[i] for i in ids])[0].shape) for _, ids in forwards]
    assert shapes == [shape for row in theirs for shape in row["shapes"]]
    for row, recorded in zip(rows_of(tmp_path), theirs, strict=True):
        assert row["num_updates"] == recorded["update"]
        assert row["sample_size"] == recorded["sample_size"]
        assert row["loss"] == pytest.approx(recorded["loss"], rel=5e-6)
        assert row["gnorm"] == pytest.approx(recorded["gnorm"], rel=1e-4)
        assert row["lr"] == pytest.approx(recorded["lr"], abs=1e-15)

    valid = json.loads((folder / "valid.json").read_text())
    ours = rows_of(tmp_path, "valid_loss")
    for (outputs, *_), row, recorded in zip(figures, ours, valid, strict=True):
        assert row["num_updates"] == recorded["update"]
        assert row["valid_loss"] == pytest.approx(recorded["loss"], rel=5e-6)
        accuracy = recorded["accuracy"] and pytest.approx(recorded["accuracy"], rel=1e-6)
        assert row["valid_accuracy"] == accuracy
        assert np.abs(outputs.numpy() - np.array(recorded["logits"])).max() < 1e-5
    labels = checkpoint.load(tmp_path / "checkpoint_best.pt").content["classifier"]["labels"]
    assert labels == (settings["labels"] and settings["labels"][:2])


# -------------------------------------------------------------------------------- rules by formula


def test_learning_rate_climbs_and_falls_in_straight_lines():
    rates = [finetune.tuning_lr_at(u, 2.0, 4, 12) for u in range(13)]
    assert rates == pytest.approx([0, 0.5, 1, 1.5, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25, 0])
    assert finetune.tuning_lr_at(0, 2.0, 0, 10) == 2.0


def test_batches_end_where_the_next_example_would_not_fit():
    lengths = np.random.default_rng(0).integers(3, 40, 200)
    order = classifier.training_order(200, 5)
    assert np.random.RandomState(5).permutation(200)[order].tolist() == list(range(200))
    walked = [[]]
    for i in order:
        more = [*walked[-1], i]
        if walked[-1] and (len(more) > 8 or len(more) * max(lengths[more]) > 150):
            more = [i]
            walked.append(more)
        walked[-1] = more
    cut = classifier.cut_batches(lengths, order, 8, 150)
    assert [batch.tolist() for batch in cut] == walked
    np.random.RandomState(5 + 2).shuffle(walked)
    assert [batch.tolist() for batch in classifier.epoch_batches(cut, 5, 2)] == walked
    # sorted by length within groups that chance decides
    grouped = classifier.group_lengths(lengths, order, 64)
    for i in range(0, 200, 64):
        assert sorted(grouped[i : i + 64]) == sorted(order[i : i + 64])
        assert (np.diff(lengths[grouped[i : i + 64]]) >= 0).all()


def test_an_update_is_the_mean_over_all_examples_of_its_batches(place, tmp_path):
    argv = flags(place, tmp_path, max_update=1, max_epoch=0, update_freq=99, batch_size=7)
    call(finetune.main, *argv)
    first = rows_of(tmp_path)[0]
    # one update has no room for a warm-up
    assert first["sample_size"] == 120 and first["lr"] == 3e-3
    (cfg, _), _ = command_line.parse(finetune.PARTS, "", argv)
    task = finetune.read_task(cfg, CPU)
    model = finetune.new_classifier(task, finetune.Job(3e-3, 1, False)).train()
    tokens, _ = classifier.pad(task.data.train.rows)
    outputs = model(torch.from_numpy(tokens), True)
    loss = F.cross_entropy(outputs, torch.from_numpy(task.data.train.labels))
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["gnorm"] == pytest.approx(norm.item(), rel=1e-4)


def test_a_text_with_the_word_for_padding_means_the_same_alone_and_in_a_batch():
    rows = [np.array([0, 1, 9, 2]), np.array([0, 8, 9, 2]), np.array([0, 2])]
    model, _ = random_encoder()
    compute = classifier.Classifier(model.encoder, None).eval().features
    cfg = finetune.FinetuneConfig()

    def features(*rows):
        return classifier.outputs_of(compute, CPU, labelled.Split(list(rows), None), cfg)

    alone = torch.cat([features(row) for row in rows])
    for some in (rows[:2], rows):
        torch.testing.assert_close(features(*some), alone[: len(some)], rtol=1e-5, atol=1e-6)


def test_a_bag_of_tokens_is_tf_idf_and_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    rows = [np.r_[0, rng.integers(4, 24, rng.integers(0, 12)), 2] for _ in range(60)]
    labels = np.array([int(7 in row) + int(9 in row) for row in rows])
    counts = np.array([np.bincount(row, minlength=24) for row in rows], float)  # (60, 24)
    counts[:, :4] = 0
    rarity = np.log(61 / (1 + (counts > 0).sum(0))) + 1
    dense = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * rarity
    dense /= np.maximum(np.linalg.norm(dense, axis=1), 1e-9)[:, None]
    split = labelled.Split(rows, labels)
    data = finetune.Data(split, {"valid": split}, None, ["0", "1", "2"], 1)
    best = baselines.bag_of_tokens(data, 24, "accuracy")
    right = []
    for strength in baselines.STRENGTHS:
        fit = linear_model.LogisticRegression(C=strength, max_iter=9999).fit(dense, labels)
        right.append(fit.score(dense, labels))
    assert best["valid"]["accuracy"] == max(right)
    assert best["strength"] == baselines.STRENGTHS[np.argmax(right)]


# of three outputs and two labels, a class is missing; one output is of scores
@pytest.mark.parametrize("outputs, classes", [(2, 2), (3, 3), (3, 2), (1, 0)])
def test_a_linear_fit_has_the_least_loss(outputs, classes):
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(2)
    features = rng.normal(size=(40, 5))
    scores = rng.normal(size=40).astype(np.float32)
    labels = rng.integers(0, classes, 40) if classes else scores
    weight, bias = baselines.fit(features, labels, outputs, strength=0.3)
    weight.requires_grad_()
    logits = torch.from_numpy(features).float() @ weight.T + bias
    loss = finetune.loss_sum(logits, torch.from_numpy(labels))
    (0.3 * loss + weight.square().sum() / 2).backward()
    assert weight.grad.abs().max() < 1e-3


# --------------------------------------------------------------------------------------------- use


@pytest.mark.parametrize("pool, lr", [("cls", 1e-2), ("mean", 3e-2)])
def test_a_task_is_learned_and_raw_lines_get_names(place, tmp_path, pool, lr):
    own = dict(train=write_table(tmp_path / "many.tsv", 3, 600), test=place / "test.tsv")
    out = call(finetune.main, *flags(place, tmp_path, **own, max_epoch=10, lr=lr, pool=pool))
    assert "2 classes: bad, good" in out and "test accuracy 1.0000" in out
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["valid"]["accuracy"] == run["test"]["accuracy"] == 1
    best = tmp_path / "checkpoint_best.pt"
    assert ("dense.weight" in head_of(best)) == (pool == "cls")
    (tmp_path / "lines").write_text("w5 w1 w6\n\nw2\n")
    cells = predicted(best, tmp_path / "lines")
    assert cells[0] == ["label", "bad", "good"]
    assert cells[1][0] == "good" and cells[3][0] == "bad"
    for _, *shares in cells[1:]:
        assert sum(map(float, shares)) == pytest.approx(1, abs=1e-5)
    argv = ["--text", "1", "--out", tmp_path / "o.tsv", "--batch_size", 7]
    predicted(best, place / "test.tsv", *argv)
    assert labels_of(tmp_path / "o.tsv", 0) == labels_of(place / "test.tsv")
    # the same file gives features
    features = ["--features", place / "train.tsv", "--out", tmp_path / "f.npy"]
    call(evaluation.main, "--ckpt", best, *features, "--data_path", tmp_path, "--device", "cpu")
    assert np.load(tmp_path / "f.npy").shape == (121, 16)


def test_several_rates_and_seeds_are_all_shown_and_the_best_one_stays(place, tmp_path):
    pytest.importorskip("sklearn")
    out = call(finetune.main, *flags(place, tmp_path, lr="1e-5,1e-2", seeds=2, untrained=True))
    results = json.loads((tmp_path / "results.json").read_text())
    groups = [f"{u}lr {lr}" for u in ("", "untrained ") for lr in ("1e-05", "0.01")]
    names = [f"{group} seed {seed}" for group in groups for seed in (1, 2)]
    assert [run["name"] for run in results["runs"]] == names
    assert results["best"].startswith("lr 0.01")
    values = [run["valid"]["accuracy"] for run in results["runs"][2:4]]
    assert f"lr 0.01: valid accuracy {np.mean(values):.4f} +- {np.std(values, ddof=1):.4f}" in out
    bag = results["bag"]["valid"]["accuracy"]
    assert bag > 0.9 and out.count(f"without an encoder: valid accuracy {bag:.4f}\n") == 2
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["checkpoint_best.pt"]
    folders = {path.parent.name for path in tmp_path.rglob("finetune.jsonl")}
    assert folders == {name.replace(" ", "_") for name in names}
    # all of it goes with --overwrite, but no other fine-tuning below
    call(finetune.main, *flags(place, tmp_path / "my_seed_1", max_epoch=1))
    call(finetune.main, *flags(place, tmp_path, max_epoch=1, overwrite=True))
    assert {path.parent for path in tmp_path.rglob("*.pt")} == {tmp_path, tmp_path / "my_seed_1"}
    assert not list(tmp_path.glob("lr*"))


def test_a_frozen_encoder_stays_as_it_is_under_a_linear_probe(place, tmp_path):
    pytest.importorskip("sklearn")
    call(finetune.main, *flags(place, tmp_path, freeze=True))
    best = tmp_path / "checkpoint_best.pt"
    tuned = checkpoint.load(best).student
    for name, tensor in checkpoint.load(place / "pretrained.pt").student.items():
        assert not name.startswith("encoder.") or torch.equal(tuned[name], tensor)
    rows = predicted(best, place / "valid.tsv", "--text", "text")[1:]
    hits = [row[0] == y for row, y in zip(rows, labels_of(place / "valid.tsv"))]
    accuracy = max(row["valid_accuracy"] for row in rows_of(tmp_path, "valid_accuracy"))
    assert np.mean(hits) == accuracy > 0.8


def test_without_scikit_learn_the_bag_is_left_out_and_a_probe_refused(place, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "is_installed", lambda: False)
    out = call(finetune.main, *flags(place, tmp_path, max_epoch=1))
    assert "pip install scikit-learn" in out
    assert json.loads((tmp_path / "results.json").read_text())["bag"] is None
    with pytest.raises(InputError, match="--freeze.* scikit-learn"):
        finetune.main(flags(place, tmp_path / "probe", freeze=True))


def test_embeddings_of_another_size_give_the_same_outputs(place, tmp_path):
    losses = []
    for rms in (0, 0.3):
        call(finetune.main, *flags(place, tmp_path / str(rms), embed_rms=rms, lr=0, max_epoch=1))
        losses.append(rows_of(tmp_path / str(rms), "valid_loss")[0]["valid_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    after = checkpoint.load(tmp_path / "0.3" / "checkpoint_best.pt").student
    tokens = after["encoder.embed_tokens.weight"]
    assert tokens.square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-5)


def test_weights_that_diverge_end_in_one_line(place, tmp_path):
    with pytest.raises(RunError, match="--lr"):
        finetune.main(flags(place, tmp_path, lr=1e30, warmup_updates=0))


@pytest.mark.parametrize("objective", ["data2vec", "mlm"])
def test_what_train_py_wrote_is_fine_tuned(objective, corpus_dir, place, tmp_path):
    call(train.main, *few(corpus_dir, tmp_path, "--objective", objective, "--max_update", 2))
    last = tmp_path / "checkpoint_last.pt"
    call(finetune.main, *flags(place, tmp_path / "out", ckpt=last, lr=0, max_epoch=1))
    after = checkpoint.load(tmp_path / "out" / "checkpoint_best.pt").student
    before = checkpoint.load(last).student
    assert set(after) == {name for name in before if name.startswith("encoder.")}
    assert all(torch.equal(after[name], before[name]) for name in after)
