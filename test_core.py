"""How do we know: the proofs of the core, against the formula written out and against numbers recorded from the
reference, which are skipped where these are not beside the project. CPU, no network: `bash run_1p.sh test`."""

import ast
import dataclasses
import json
import math
import re

import config
import ema
import train
from config import DataConfig, EmaConfig, ModelConfig
from data import mask_block
from formats import fairseq_names
from model import data2vec_loss, teacher_targets
from run import checkpoint
from test.helpers import (  # noqa: F401
    CPU,
    FEW,
    GOLDEN,
    HERE,
    SMALL,
    block_dataset,
    call,
    compare_checkpoints,
    corpus_dir,
    golden,
    make_run,
    random_encoder,
    rows_of,
)
from text import demo as dataset
from text.binarized import BOS, PAD, Dictionary

import numpy as np
import pytest
import torch


@golden
@pytest.mark.parametrize(
    "name", ["base", "base_valid", "npu_1p", "complete_256", "none_128", "eos_512"]
)
def test_batches_equal_the_references_recorded_ones(name):
    recorded = json.loads((GOLDEN / "batches" / f"{name}.json").read_text())
    folder = GOLDEN / "corpora" / {"bin": "bpe-bin"}.get(recorded["data"], recorded["data"])
    argv = ["--data_path", folder, "--fairseq_exact", "--json", "--split", recorded["split"]]
    argv += ["--max_tokens", recorded["max_tokens"]] + [
        w for k, v in recorded["config"].items() for w in (f"--{k}", v)
    ]
    for key, epoch in recorded["epochs"].items():
        number, rank, world_size = re.match(r"epoch(\d+)_shard(\d+)of(\d+)", key).groups()
        facts = json.loads(
            call(dataset.main, *argv, "--epoch", number, "--rank", rank, "--world_size", world_size)
        )
        for ours, theirs in (
            ("batches", "batches"),
            ("empty_batches", "empty"),
            ("sentences_used", "sentences"),
            ("tokens_used", "tokens"),
            ("masked", "masked"),
            ("sha256_source", "sha_src"),
            ("sha256_target", "sha_tgt"),
            ("sha256_ids", "sha_ids"),
        ):
            assert facts[ours] == epoch[theirs], (key, ours)
        for ours, theirs in (
            ("dictionary_size", "dictionary_size"),
            ("mask_id", "mask_id"),
            ("sentences", "sentences"),
            ("tokens", "tokens"),
            ("blocks", "n_blocks"),
        ):
            assert facts[ours] == recorded[theirs], (key, ours)


@pytest.mark.parametrize("stdev", [0.0, 1.5])
@pytest.mark.parametrize(("random", "leave"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.2, 0.3)])
def test_masks_follow_the_rule_step_by_step(corpus_dir, stdev, random, leave):
    dictionary = Dictionary(corpus_dir / "dict.txt")
    cfg = DataConfig(mask_stdev=stdev, random_token_prob=random, leave_unmasked_prob=leave, seed=9)
    for index in range(40):
        n, epoch = 5 + index, index % 3 + 1
        rng = np.random.default_rng(int(hash((9, epoch, index)) % 1e6))
        places = rng.choice(n, int(0.35 * n / 4 + rng.random()), replace=False)
        spans = (
            [max(0, int(round(x))) for x in rng.normal(4, stdev, size=len(places))]
            if stdev
            else [4] * len(places)
        )
        expected = {
            p + i for p, span in zip(places.tolist(), spans) for i in range(span) if p + i < n
        }
        special = rng.random(n) < random + leave if random + leave else np.zeros(n, bool)
        left = special & (leave > 0)
        if random and leave:
            left = special & (rng.random(n) < leave / (random + leave))
        hidden, shown, drawn = mask_block(n, dictionary, cfg, epoch, index)
        assert set(np.flatnonzero(hidden).tolist()) == expected
        assert set(np.flatnonzero(shown).tolist()) == {p for p in expected if not left[p]}
        places = sorted(p for p in expected if special[p] and not left[p])
        if drawn is None:
            assert not places
        else:
            assert (
                np.flatnonzero(drawn[0]).tolist() == places
                and drawn[1].min() >= 4
                and drawn[1].max() < len(dictionary)
            )


def test_a_batch_holds_blocks_padded_on_the_right_and_the_teacher_s_two_inputs(block_dataset):
    full, masked = block_dataset(teacher_input="full"), block_dataset(teacher_input="masked")
    assert any(full.batch(ids, 1).source_padded for ids in full.epoch_batches(1))
    for ids in full.epoch_batches(1):
        a, b = full.batch(ids, 1), masked.batch(ids, 1)
        blocks = [full.read_block(i) for i in ids.tolist()]
        assert all(block[0] == BOS for block in blocks) and a.ntokens == sum(map(len, blocks))
        for row, block in enumerate(blocks):
            assert (
                a.target[row, : len(block)].tolist() == block.tolist()
                and (a.target[row, len(block) :] == PAD).all()
            )
            mask = b.source[row, : len(block)] == full.dictionary.mask_id
            assert [t for t in b.target[row].tolist() if t != PAD] == block[mask].tolist()
        assert np.array_equal(a.source, b.source) and np.array_equal(a.target_places, a.masked)
        assert np.array_equal(a.target.ravel()[a.target_places], b.target.ravel()[b.target_places])
        assert np.array_equal(a.masked, np.flatnonzero(a.source == full.dictionary.mask_id))


@pytest.mark.parametrize(
    ("beta", "scale"), [(4.0, 1.0), (0.5, 2.0), (0.0, 1.0), (0.0, -1.0), (1.0, 0.0)]
)
def test_the_loss_equals_its_formula(beta, scale):
    prediction, target = torch.randn(7, 16) * 3, torch.randn(7, 16)
    d = (prediction - target).abs().double()
    smooth = d**2 if beta == 0 else torch.where(d < beta, d**2 / (2 * beta), d - beta / 2)
    expected = smooth.sum() * (scale if scale > 0 else 1 / 4)
    got = data2vec_loss(prediction, target, ModelConfig(**SMALL, loss_beta=beta, loss_scale=scale))
    assert float(got) == pytest.approx(float(expected), rel=1e-6)


def test_the_loss_ignores_unmasked_places_and_gradients_reach_every_parameter(block_dataset):
    dataset = block_dataset()
    batch = CPU.upload(dataset.batch(dataset.epoch_batches(1)[0], 1))
    model, cfg = random_encoder(vocabulary=61)
    target = torch.randn(batch.sample_size, cfg.embed_dim)
    x = model.encoder(batch.source)[0].flatten(0, 1)
    chosen = model.regression_head(x[batch.source.flatten() == dataset.dictionary.mask_id])
    assert torch.allclose(model(batch.source, batch.masked), chosen, atol=1e-6)
    data2vec_loss(model(batch.source, batch.masked), target, cfg).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@golden
@pytest.mark.parametrize("name", ["doc128", "doc128_full", "npu64", "npu64_one_worker"])
def test_a_whole_run_equals_the_references_recorded_one(tmp_path, name):
    folder = GOLDEN / "train" / name
    recorded = json.loads((folder / "config.json").read_text())
    options = {**recorded["config"], "data_path": GOLDEN / "corpora" / recorded["config"]["data"]}
    options.pop("data")
    argv = [part for k, v in options.items() for part in (f"--{k}", v)]
    call(
        train.main,
        "--config_name",
        "base",
        "--fairseq_exact",
        "--device",
        "cpu",
        "--log_interval",
        1,
        *argv,
        "--save_dir",
        tmp_path,
        "--init_from",
        folder / "init.pt",
    )
    expected = [json.loads(line) for line in (folder / "trajectory.jsonl").read_text().splitlines()]
    for mine, theirs in zip(rows_of(tmp_path), expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=5e-6)
        assert mine["gnorm"] == pytest.approx(theirs["gnorm"], rel=5e-5)
        assert mine["lr"] == pytest.approx(theirs["lr"], abs=1e-12) and mine[
            "ema_decay"
        ] == pytest.approx(theirs["ema_decay"], abs=1e-12)
        assert (mine["sample_size"], mine["nsentences"]) == (
            theirs["sample_size"],
            theirs["nsentences"],
        )
    assert rows_of(tmp_path, "valid_loss")[-1]["valid_loss"] == pytest.approx(
        recorded["final_valid"]["loss"], rel=5e-6
    )
    saved = checkpoint.load(tmp_path / "checkpoint_last.pt")
    mine, final = (
        fairseq_names.to_reference(saved.student, saved.teacher),
        torch.load(folder / "final.pt", weights_only=True),
    )
    for a, b in ((mine, final), (mine["encoder._ema"], final["encoder._ema"])):
        assert set(a) == set(b)
        assert all((a[k] - b[k]).abs().max() < 2e-5 for k in b if k != "encoder._ema")


def test_the_decay_follows_the_references_line():
    cfg = EmaConfig(ema_decay=0.9, ema_end_decay=0.99, ema_anneal_end_step=10)
    assert [ema.decay_at(u, cfg) for u in (0, 1, 5, 10, 11)] == pytest.approx(
        [0.9, 0.909, 0.945, 0.99, 0.99]
    )


@pytest.mark.parametrize("layers_only", [True, False])
def test_the_teacher_moves_by_the_formula(layers_only):
    student = random_encoder(1)[0].encoder
    teacher = ema.make_teacher(random_encoder(2)[0].encoder)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    cfg = EmaConfig(ema_transformer_layers_only=layers_only)
    ema.step(teacher, student, 0.75, cfg)
    for name, new in teacher.state_dict().items():
        copied = layers_only and not name.startswith("layers.")
        expected = (
            student.state_dict()[name]
            if copied
            else 0.75 * before[name] + 0.25 * student.state_dict()[name]
        )
        assert torch.allclose(new, expected, atol=1e-7), name
    assert (
        new.dtype == torch.float32
        and not teacher.training
        and not any(p.requires_grad for p in teacher.parameters())
    )


def test_the_learning_rate_warms_up_and_falls_as_the_formula_says():
    cfg = config.TrainConfig(lr=0.1, warmup_updates=4, max_update=12)
    cosine = [0.05 * (1 + math.cos(math.pi * i / 8)) for i in range(9)]
    assert [train.lr_at(u, cfg) for u in range(13)] == pytest.approx(
        [0, 0.025, 0.05, 0.075, *cosine]
    )
    assert train.lr_at(0, config.TrainConfig(lr=0.1, warmup_updates=0, max_update=5)) == 0.1
    assert train.lr_at(
        99, config.TrainConfig(lr=0.1, warmup_updates=200, max_update=100)
    ) == pytest.approx(0.0495)


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_an_update_is_the_references_adam_with_eps_beside_the_uncorrected_root(
    corpus_dir, clip_norm
):
    betas, eps, decay = (0.8, 0.9), 0.03, 0.1  # large, so that their places show
    run, dataset = make_run(
        corpus_dir,
        adam_betas="0.8,0.9",
        adam_eps=eps,
        weight_decay=decay,
        clip_norm=clip_norm,
        lr=0.01,
    )
    state = {n: (p.detach().double().clone(), 0.0, 0.0) for n, p in run.student.named_parameters()}
    for t, ids in enumerate(dataset.epoch_batches(1)[:5], 1):
        batch = dataset.batch(ids, 1)
        here = CPU.upload(batch)
        target = teacher_targets(run.teacher, here, run.cfg.model)
        loss = (
            data2vec_loss(run.student(here.source, here.masked), target, run.cfg.model)
            / batch.sample_size
        )
        grads = dict(zip(state, torch.autograd.grad(loss, list(run.student.parameters()))))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        lr = train.lr_at(t - 1, run.cfg.train)
        done = train.update(run, [batch])
        assert float(done.gnorm) == pytest.approx(norm, rel=1e-5)
        assert norm > 0.05  # so that clipping to it shows
        for name, (p, m, v) in state.items():
            g = grads[name].double() * (min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0)
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
            p = p - lr * decay * p
            p = p - lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * m / (v.sqrt() + eps)
            state[name] = p, m, v
            mine = dict(run.student.named_parameters())[name].detach().double()
            assert torch.allclose(mine, p, atol=2e-6), (t, name)


def test_the_teacher_begins_as_a_copy_steps_once_an_update_and_takes_no_gradient(corpus_dir):
    run, dataset = make_run(
        corpus_dir, update_freq=3, ema_anneal_end_step=10, ema_decay=0.5, ema_end_decay=0.9
    )
    expected = {k: v.clone() for k, v in run.teacher.state_dict().items()}
    assert all(torch.equal(v, run.student.encoder.state_dict()[k]) for k, v in expected.items())
    batches = [dataset.batch(ids, 1) for ids in dataset.epoch_batches(1)[:6]]
    for u in (1, 2):
        done = train.update(run, batches[3 * u - 3 : 3 * u])
        assert done.ema_decay == pytest.approx(ema.decay_at(u - 1, run.cfg.ema))
        decay, student = ema.decay_at(u, run.cfg.ema), run.student.encoder.state_dict()
        for name, new in run.teacher.state_dict().items():
            old = expected[name]
            expected[name] = (
                decay * old + (1 - decay) * student[name]
                if name.startswith("layers.")
                else student[name].clone()
            )
            assert torch.allclose(new, expected[name], atol=1e-6)
    assert all(p.grad is None and not p.requires_grad for p in run.teacher.parameters())


def test_fairseq_exact_leaves_the_teacher_one_update_behind(corpus_dir):
    run, dataset = make_run(corpus_dir, fairseq_exact="true")
    normal, _ = make_run(
        corpus_dir, teacher_input="masked", long_sentences="skip", drop_remainder="true"
    )
    batches = [dataset.batch(ids, 1) for ids in dataset.epoch_batches(1)[:3]]
    for batch in batches:
        before = {k: v.clone() for k, v in normal.teacher.state_dict().items()}
        losses = [float(train.update(r, [batch]).loss) for r in (run, normal)]
        assert losses[0] == losses[1]  # the same run, seen at another moment
        assert all(torch.equal(v, before[k]) for k, v in run.teacher.state_dict().items())
    run.move_teacher()
    assert all(
        torch.equal(v, normal.teacher.state_dict()[k]) for k, v in run.teacher.state_dict().items()
    )


def test_update_freq_2_equals_one_batch_of_twice_the_size(corpus_dir):
    runs = [make_run(corpus_dir)[0] for _ in range(2)]
    dataset = make_run(corpus_dir)[1]
    for ids in [ids for ids in dataset.epoch_batches(1) if len(ids) >= 4][:4]:
        one = train.update(runs[0], [dataset.batch(ids, 1)])
        two = train.update(
            runs[1],
            [dataset.batch(part, 1) for part in (ids[: len(ids) // 3], ids[len(ids) // 3 :])],
        )
        assert float(two.loss) == pytest.approx(float(one.loss), rel=1e-5)
        assert (
            float(two.gnorm) == pytest.approx(float(one.gnorm), rel=1e-5)
            and two.counts.tolist() == one.counts.tolist()
        )
    for a, b in zip(runs[0].weights.parameters, runs[1].weights.parameters):
        assert torch.allclose(a, b, atol=2e-6)


def test_an_update_without_a_masked_token_or_without_a_batch_counts_as_zero(corpus_dir):
    run, dataset = make_run(corpus_dir)
    batch = dataset.batch(dataset.epoch_batches(1)[0], 1)
    none = np.zeros(0, np.int64)
    bare = dataclasses.replace(batch, source=batch.target, masked=none, target_places=none)
    for batches in ([bare], []):
        done = train.update(run, batches)
        assert float(done.loss) == 0 and float(done.gnorm) == 0 and int(done.counts[0]) == 0
    assert all(p.isfinite().all() for p in run.weights.parameters) and run.num_updates == 2


def test_an_fp16_overflow_skips_the_update_and_is_not_counted(corpus_dir):
    run, dataset = make_run(corpus_dir, device=dataclasses.replace(CPU, amp=torch.float16))
    before = [p.detach().clone() for p in run.weights.parameters]
    scaler = run.optimizer.scaler
    scaler.scale(torch.zeros(()))  # makes the scale, which the next line sets
    scaler.update(2.0**30)
    run.optimizer.loss_scale = scaler.get_scale()
    batch = dataset.batch(dataset.epoch_batches(1)[0], 1)
    assert train.update(run, [batch]) is None
    assert run.num_updates == 0 and scaler.get_scale() == 2.0**29
    assert all(torch.equal(a, b) for a, b in zip(before, run.weights.parameters))


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--fairseq_exact"],
        ["--update_freq", "3"],
        ["--amp", "bf16"],
        ["--log_interval", "5"],
        ["--mlm_weight", "1"],
    ],
)
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, corpus_dir, monkeypatch, extra):
    # dropout on; about 20 batches an epoch (7 updates under update_freq 3): the interruptions are within epochs
    argv = [
        *FEW,
        "--data_path",
        corpus_dir,
        "--max_update",
        30,
        "--save_interval_updates",
        4,
        "--dropout",
        0.1,
        "--attention_dropout",
        0.1,
        *extra,
    ]
    call(train.main, *argv, "--save_dir", tmp_path / "whole")
    real, calls = train.update, []

    def failing(run, batches, *args):
        calls.append(run.num_updates)
        if run.num_updates in (6, 26) and calls.count(run.num_updates) == 1:
            raise KeyboardInterrupt
        return real(run, batches, *args)

    monkeypatch.setattr(train, "update", failing)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            call(train.main, *argv, "--save_dir", tmp_path / "parts")
    call(train.main, *argv, "--save_dir", tmp_path / "parts")
    assert (
        4 in calls and 24 in calls and calls.count(5) == 2
    )  # it did go back to the last checkpoint
    compare_checkpoints(
        tmp_path / "whole" / "checkpoint_last.pt", tmp_path / "parts" / "checkpoint_last.pt"
    )
    speed = {"fps", "ups", "wps", "wall"}
    strip = lambda rows: [{k: v for k, v in row.items() if k not in speed} for row in rows]  # noqa: E731
    for key in ("loss", "valid_loss"):
        assert strip(rows_of(tmp_path / "whole", key)) == strip(rows_of(tmp_path / "parts", key))
    step = 5 if "--log_interval" in extra else 1
    assert [row["num_updates"] for row in rows_of(tmp_path / "parts")] == list(
        range(step, 31, step)
    )


# ---------------------------------------------------------------------------------------------- the form itself

# Each may import only what comes before it; compat is imported by flags.parse and by the loading of checkpoints.
FLOORS = "config compat dataset fast model data device ema optim mlm runtime train bench eval tools convert".split()
FLOORS += ["finetune"]


def sources() -> list:
    return [*HERE.glob("*.py"), *HERE.glob("[a-z]*/*.py")]


def test_imports_point_one_way():
    for path in sources():
        room = path.parent.name if path.parent != HERE else path.stem
        if room not in FLOORS:
            continue
        for node in ast.parse(
            path.read_text()
        ).body:  # what a function imports, it imports when it is called
            used = [node.module] if isinstance(node, ast.ImportFrom) else []
            used += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in (name.split(".")[0] for name in used):
                assert name not in FLOORS or FLOORS.index(name) <= FLOORS.index(room), (path, name)


def test_each_file_is_read_in_one_sitting_and_each_room_says_its_rule():
    for path in sources():
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), path
        assert (
            len(text.splitlines()) <= 400 and max(map(len, text.splitlines()), default=0) <= 120
        ), path
    deciding = ["model.py", "ema.py", "data.py", "text/blocks.py", "optim.py", "train.py"]
    assert sum(len((HERE / name).read_text().splitlines()) for name in deciding) <= 1350


def test_the_loop_and_the_update_fit_on_a_screen():
    nodes = {
        node.name: node
        for node in ast.walk(ast.parse((HERE / "train.py").read_text()))
        if hasattr(node, "name")
    }
    functions = [node for node in nodes.values() if isinstance(node, ast.FunctionDef)]
    for node in functions:
        inner = [
            n
            for n in ast.walk(node)
            if isinstance(n, (ast.FunctionDef, ast.Lambda)) and n is not node
        ]
        assert not inner, f"a function inside {node.name}"
    lines = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert lines["loop"] <= 45 and lines["update"] <= 30
    assert sum(isinstance(node, ast.If) for node in ast.walk(nodes["loop"])) <= 8


def test_the_update_reads_like_the_paper():
    sentences = (
        r"target = teacher_targets\(.*\n +prediction = run\.student\(.*\n +loss = data2vec_loss\("
    )
    assert re.search(sentences, (HERE / "train.py").read_text())
