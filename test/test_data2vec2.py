"""data2vec 2.0: equal to recordings of the reference, and by formula."""

import json
import math
import shutil
from dataclasses import replace

import config
import convert
import eval as evaluation
import train
from config import InputError
from data import Batch, Corpus
from data2vec2 import Data2Vec2, masked_copies, targets_of_copies
from formats import fairseq_state, fairseq_v2
from run import checkpoint, flags
from tasks import pretrained
from test.helpers import (
    CPU,
    GOLDEN,
    SMALL,
    call,
    compare_checkpoints,
    few,
    golden,
    hidden_states,
    make_run,
    rows_of,
    speed_aside,
    torchrun,
)
from text.binarized import BOS, PAD

import numpy as np
import pytest
import torch

FOLDER = GOLDEN / "data2vec2"
LAST = "checkpoint_last.pt"
NAMES = dict(depth="layers", num_heads="attention_heads")


def recorded(name: str) -> list:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def flags_of(name: str, **options) -> list:
    """train.py's arguments for the recorded run `name`."""
    theirs = json.loads((FOLDER / name / "config.json").read_text())
    parts = (theirs, theirs["optimizer"], theirs["model"], theirs["text"], theirs["decoder"])
    known = {field for part in config.PARTS for field in part.__dataclass_fields__}
    values = {"data_path": GOLDEN / "corpora" / theirs["data"]}
    for part in parts:
        values |= {NAMES.get(k, k): v for k, v in part.items() if NAMES.get(k, k) in known}
    values["adam_betas"] = "0.9,0.98"
    values |= dict(ffn_embed_dim=4 * values["embed_dim"], head_layers=2, save_dir="x")
    values |= dict(fairseq_exact=True, objective="data2vec2", min_target_var=0, min_pred_var=0)
    values |= options
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def start(name: str, **options) -> tuple:
    """The recorded run at its beginning, its first weights, and an iterator of its batches."""
    cfg = config.Config(*flags.parse(config.PARTS, "", flags_of(name, **options))[0])
    corpus = Corpus(cfg.data)
    run = train.Run(cfg, CPU, len(corpus.dictionary))
    state = torch.load(FOLDER / name / "init.pt", weights_only=True)
    student, _ = fairseq_v2.from_reference(state)
    dataset = corpus.split("train")
    return run, student, dataset.batches(dataset.epoch_batches(1), 1)


def same(step, row: dict):
    assert float(step.loss) / row["sample_size"] == pytest.approx(row["loss"], rel=1e-6)
    assert float(step.gnorm) == pytest.approx(row["gnorm"], rel=1e-6)
    assert int(step.counts[0]) == row["sample_size"]


@golden
@pytest.mark.parametrize("name", ["small", "groups1"])
def test_a_run_equals_the_recorded_one(name):
    run, student, batches = start(name)
    for key, value in run.student.state_dict().items():
        assert torch.equal(value, student[key]), key
    inputs = np.load(FOLDER / name / "inputs.npz")
    for i, row in enumerate(recorded(f"{name}/trajectory.jsonl")):
        batch = next(batches)
        copies = masked_copies(batch, i, run.cfg, run.cfg.model.clone_batch)
        rows, T = copies.restore.shape
        hidden = np.zeros((rows, T), bool)
        hidden.ravel()[copies.masked] = True
        assert np.array_equal(copies.target, inputs["source"][i])
        assert np.array_equal(copies.ids, inputs["ids"][i])
        assert np.array_equal(hidden, inputs["mask"][i])
        begins = np.arange(len(copies.visible))[:, None] // run.cfg.model.clone_batch * T
        assert np.array_equal(copies.visible - begins, inputs["keep"][i])
        done = train.update(run, [batch])
        same(done.step, row)
        assert done.lr == pytest.approx(row["lr"], rel=1e-12)
    final, teacher = fairseq_v2.from_reference(
        torch.load(FOLDER / name / "final.pt", weights_only=True)
    )
    for module, state in ((run.student, final), (run.teacher.layers, teacher)):
        for key, value in module.state_dict().items():
            theirs = state[key] if module is run.student else state[f"layers.{key}"]
            assert (value - theirs).norm() <= 1e-5 * theirs.norm(), key


@golden
def test_the_resumed_run_and_two_batches_an_update_equal_the_recorded_ones(tmp_path):
    def argv(folder, **options):
        options |= dict(save_dir=tmp_path / folder, disable_validation=True, log_interval=1)
        return flags_of("small", **options, device="cpu")

    call(train.main, *argv("two", update_freq=2, max_update=8))
    call(train.main, *argv("whole", save_interval_updates=8, keep_interval_updates=-1))
    (tmp_path / "rest").mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint_1_8.pt", tmp_path / "rest" / LAST)
    call(train.main, *argv("rest"))
    for folder, name in (("whole", "trajectory"), ("two", "accumulated"), ("rest", "resumed")):
        for ours, row in zip(
            rows_of(tmp_path / folder), recorded(f"small/{name}.jsonl"), strict=True
        ):
            assert ours["loss"] == pytest.approx(row["loss"], rel=1e-6), (folder, row["update"])
            assert ours["gnorm"] == pytest.approx(row["gnorm"], rel=1e-6)


# ------------------------------------------------------------------------- by default, without it

SMALL2 = "--objective data2vec2 --mask_multiple_length 1 --clone_batch 3 --decoder_dim 12".split()
SMALL2 += "--decoder_kernel 3 --decoder_layers 2 --decoder_groups 2 --mask_prob 0.48".split()


def few2(corpus_dir, folder, *argv) -> list[str]:
    return few(corpus_dir, folder, *SMALL2, *argv)


def test_a_resumed_run_equals_an_uninterrupted_one(corpus_dir, tmp_path):
    argv = "--max_update 12 --save_interval_updates 3 --keep_interval_updates -1 --dropout 0.1"
    call(train.main, *few2(corpus_dir, tmp_path / "whole", *argv.split()))
    (tmp_path / "parts").mkdir()
    for name in ("train.jsonl", "checkpoint_1_3.pt", "checkpoint_1_6.pt"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "parts")
    call(train.main, *few2(corpus_dir, tmp_path / "parts", *argv.split()))
    compare_checkpoints(tmp_path / "whole" / LAST, tmp_path / "parts" / LAST)
    assert speed_aside(rows_of(tmp_path / "whole")) == speed_aside(rows_of(tmp_path / "parts"))


def test_two_workers_equal_one(corpus_dir, tmp_path):
    argv = ["--max_update", 6, "--mask_noise_std", 0]
    result = torchrun(2, *few2(corpus_dir, tmp_path / "two", *argv))
    assert result.returncode == 0, result.stderr
    call(train.main, *few2(corpus_dir, tmp_path / "one", *argv, "--update_freq", 2))
    for a, b in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert all(a[k] == b[k] for k in ("sample_size", "nsentences", "ntokens", "num_updates"))
        assert all(a[k] == pytest.approx(b[k], rel=2e-5) for k in ("loss", "gnorm"))
    compare_checkpoints(tmp_path / "one" / LAST, tmp_path / "two" / LAST, exactly=False)


def blocks_of(*lengths: int, words: int = 60) -> Batch:
    """Whole blocks of these lengths, padded."""
    rng = np.random.default_rng(0)
    tokens = np.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(tokens, lengths):
        row[:length] = [BOS, *rng.integers(4, words, length - 1)]
    none = np.zeros(0, np.int64)
    padded = bool((tokens == PAD).any())
    ids = np.arange(7, 7 + len(lengths))
    return Batch(tokens, tokens, none, none, none, ids, sum(lengths), padded, padded)


def settings(**options) -> config.Config:
    values = dict(
        SMALL, data_path="x", save_dir="x", clone_batch=3, decoder_dim=12, decoder_kernel=4
    )
    values |= dict(decoder_layers=3, decoder_groups=2, head_layers=3, mask_noise_std=0.5)
    values |= dict(tokens_per_sample=64)
    argv = [str(word) for item in (values | options).items() for word in (f"--{item[0]}", item[1])]
    return config.Config(*flags.parse(config.PARTS, "", ["--objective", "data2vec2", *argv])[0])


@pytest.mark.parametrize("lengths", [(20, 20), (20, 19, 7, 2, 1), (1, 1), (3, 40)])
@pytest.mark.parametrize("mask_prob", [0.48, 0.1, 0.95])
def test_each_copy_hides_its_share_of_the_text_and_no_pad(lengths, mask_prob):
    cfg, batch, T = settings(mask_prob=mask_prob), blocks_of(*lengths), max(lengths)
    copies = masked_copies(batch, 3, cfg, 4)
    hidden = np.zeros((4 * len(lengths), T), bool)
    hidden.ravel()[copies.masked] = True
    left = [max(1, int(n * (1 - mask_prob))) for n in lengths for _ in range(4)]
    is_text = (batch.target != PAD).repeat(4, 0)
    assert ((is_text & ~hidden).sum(1) == left).all() and not (hidden & ~is_text).any()
    assert np.array_equal(copies.source == PAD, hidden | ~is_text)
    for row, visible in enumerate(copies.visible - np.arange(len(hidden))[:, None] // 4 * T):
        assert set(np.flatnonzero(is_text[row] & ~hidden[row])) <= set(visible)
        assert len(set(visible)) == len(visible) and not hidden[row, visible].any()
    assert np.array_equal(
        copies.target.ravel()[copies.target_places], batch.target.repeat(4, 0)[hidden]
    )
    # each update has masks of its own, and so has each set of blocks
    if copies.sample_size > 20:
        others = (
            masked_copies(batch, 4, cfg, 4),
            masked_copies(replace(batch, ids=batch.ids + 1), 3, cfg, 4),
        )
        assert not any(np.array_equal(copies.masked, other.masked) for other in others)
        assert np.array_equal(copies.masked, masked_copies(batch, 3, cfg, 4).masked)


def conv_by_formula(x, conv):
    """x (T, C) -> (T, D), zeros beyond both ends, an even kernel reaching further to the left."""
    T, k = len(x), conv.kernel_size[0]
    x = np.pad(x, ((k // 2, k // 2), (0, 0)))
    weight, bias = (p.detach().double().numpy() for p in (conv.weight, conv.bias))
    out = np.tile(bias, (T, 1))
    of_group = len(bias) // conv.groups
    for d in range(len(bias)):
        first = d // of_group * weight.shape[1]
        for j in range(k):
            out[:, d] += x[j : j + T, first : first + weight.shape[1]] @ weight[d, :, j]
    return out


def gelu(x):
    return x * np.vectorize(math.erf)(x / math.sqrt(2)) / 2 + x / 2


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, dict(decoder_residual=True, decoder_dim=16)])
def test_predictions_and_targets_follow_the_formula_row_by_row(options):
    cfg = settings(average_top_k_layers=1, **options)
    torch.manual_seed(0)
    student = Data2Vec2(cfg.model, 60)
    for p in student.parameters():
        torch.nn.init.normal_(p, 0.1, 0.4)
    host = masked_copies(blocks_of(20, 13, 3), 5, cfg, 3)
    copies, T, L = CPU.upload(host), 20, host.visible.shape[1]
    torch.manual_seed(3)
    prediction, features, real = student(copies)
    torch.manual_seed(3)  # torch's global generator, in the order of the hidden places' draw
    noise = torch.empty(9, T - L, 16).normal_(0, 0.5).double().numpy()
    expected, targets = [], []
    for row in range(9):
        block = host.target[row // 3]
        length = int((block != PAD).sum())
        x, _ = student.encoder.features(torch.from_numpy(block[None]), True)
        text = np.flatnonzero(host.source[row] != PAD)
        y, _ = student.encoder(None, embedded=(x[:, text], None))
        h = np.zeros((length, 16))
        h[text] = y[0]
        for place in np.setdiff1d(np.arange(length), text):
            h[place] = noise[row, host.restore[row, place] - row * T - L]
        for (conv,) in student.decoder.blocks:
            y = conv_by_formula(h, conv)
            y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
            h = gelu(y) + (h if cfg.model.decoder_residual else 0)
        for part in student.decoder.proj:
            if isinstance(part, torch.nn.Linear):
                h = h @ part.weight.double().numpy().T + part.bias.double().numpy()
            else:
                h = gelu(h)
        hidden = np.setdiff1d(np.arange(length), text)
        expected.append(h[hidden])
        # the last layer's target, with mean 0 and variance 1 over the tokens of the block
        _, (t,) = student.encoder(None, top_k=1, embedded=(x[:, :length], None))
        t = t[0].double().numpy()
        targets.append(((t - t.mean(0)) / np.sqrt(t.var(0) + 1e-5))[hidden])
    assert np.allclose(prediction, np.concatenate(expected), rtol=1e-4, atol=1e-4)
    target = targets_of_copies(student.encoder, features, real, copies, cfg.model)
    assert np.allclose(target, np.concatenate(targets), rtol=1e-4, atol=1e-4)


def test_biases_and_norms_do_not_decay_but_in_exact_mode(corpus_dir):
    for exact in (False, True):
        options = dict(objective="data2vec2", mask_multiple_length=1, fairseq_exact=exact, lr=0.5)
        run, dataset = make_run(corpus_dir, **options, weight_decay=0.5)
        before = {name: p.detach().clone() for name, p in run.student.named_parameters()}
        weights = run.optimizer.weights
        for p in run.student.parameters():
            p.grad = torch.zeros_like(p)
        run.optimizer.step(0.5, 0, torch.zeros(()), torch.ones(3, dtype=torch.int64))
        for name, p in run.student.named_parameters():
            factor = 0.75 if exact or p.ndim > 1 else 1.0
            assert torch.allclose(p, before[name] * factor), name
        numbers = [number for group in weights.groups for number in group]
        assert sorted(numbers) == list(range(len(before)))


# ------------------------------------------------------------------------------ the other programs


@pytest.fixture(scope="module")
def saved2(tmp_path_factory, corpus_dir):
    folder = tmp_path_factory.mktemp("saved2")
    argv = "--max_update 3 --average_top_k_layers 2 --instance_norm_target_layer true"
    call(train.main, *few2(corpus_dir, folder, *argv.split()))
    return folder / LAST


def shapes_of(state: dict) -> dict:
    return {k: shapes_of(v) if isinstance(v, dict) else list(v.shape) for k, v in state.items()}


def test_a_checkpoint_goes_to_fairseqs_form_and_back_bit_for_bit(saved2, tmp_path):
    call(convert.main, "--ckpt", saved2, "--to", "fairseq", tmp_path / "fairseq.pt")
    call(convert.main, "--ckpt", tmp_path / "fairseq.pt", "--to", "native", tmp_path / "native.pt")
    compare_checkpoints(saved2, tmp_path / "native.pt")
    file = torch.load(tmp_path / "fairseq.pt", weights_only=False)
    # names, shapes and settings are found again where no entry of ours tells
    del file["extra_state"][fairseq_state.OURS]
    file["cfg"]["distributed_training"] = dict(distributed_world_size=1)
    torch.save(file, tmp_path / "plain.pt")
    call(convert.main, "--ckpt", tmp_path / "plain.pt", "--to", "native", tmp_path / "again.pt")
    ours, again = (checkpoint.load(p).content for p in (saved2, tmp_path / "again.pt"))
    states = ours["optimizer"]["state"].items(), again["optimizer"]["state"].items()
    for (i, a), (j, b) in zip(*states, strict=True):
        assert i == j and all(torch.equal(a[name], b[name]) for name in checkpoint.MOMENTS)
    elsewhere = {"data_path", "save_dir", "device", *config.FAIRSEQ_EXACT, "fairseq_exact"}
    for name in set(ours["config"]) - elsewhere:
        assert ours["config"][name] == again["config"][name], name
    assert again["config"]["fairseq_exact"] and again["config"]["teacher_input"] == "full"


@golden
def test_names_shapes_and_config_are_those_of_the_recorded_checkpoint(tmp_path):
    recorded = json.loads((FOLDER / "checkpoint.json").read_text())
    argv = dict(save_dir=tmp_path, disable_validation=True, device="cpu", max_update=1)
    call(train.main, *flags_of("small", **argv))
    call(convert.main, "--ckpt", tmp_path / LAST, "--to", "fairseq", tmp_path / "fairseq.pt")
    file = torch.load(tmp_path / "fairseq.pt", weights_only=False)
    assert set(file) == set(recorded["top_level"])
    assert shapes_of(file["model"]) == recorded["model"]
    assert list(file["model"])[:-1] == list(recorded["model"])[:-1]  # the optimizer counts so
    for name, group in recorded["last_optimizer_state"].items():
        ours = file["last_optimizer_state"][name]
        assert len(ours["state"]) == group["param_groups"][0]["params"]
        assert list(ours["state"][0]["exp_avg"].shape) == group["state_of_first"]["exp_avg"]
    recorded["cfg"]["task"].pop("mask_prob")  # not read there
    of_run = {"max_update", "min_target_var", "min_pred_var"}

    def same(ours: dict, theirs: dict):
        for name in set(ours) & set(theirs) - of_run:
            if isinstance(theirs[name], dict):
                same(ours[name], theirs[name])
            else:
                assert ours[name] == theirs[name], name

    same(file["cfg"], recorded["cfg"])
    assert len(set(recorded["cfg"]["model"]) - set(file["cfg"]["model"])) <= 5


@golden
@torch.no_grad()
def test_fine_tuning_reads_whole_text_as_the_recorded_classifier_does():
    recorded = np.load(FOLDER / "small" / "features.npz")
    source = pretrained.load(FOLDER / "small" / "init.pt", attention_heads=4)
    encoder = source.encoder(dropout=0.0).eval()
    tokens, real = torch.from_numpy(recorded["source"]).long(), ~recorded["pad"]
    states = hidden_states(encoder, tokens)
    for ours, theirs in zip(states[1:], recorded["hidden"], strict=True):
        assert np.allclose(ours[real], theirs[real], atol=1e-6)


@torch.no_grad()
def test_transformers_computes_the_encoders_hidden_states(saved2, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    call(convert.main, "--ckpt", saved2, "--to", "hf", tmp_path / "hf")
    assert "| `clone_batch` | 3 |" in (tmp_path / "hf" / "README.md").read_text()
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.from_numpy(blocks_of(20, 13, 2).target)
    theirs = model(tokens, attention_mask=(tokens != PAD).long(), output_hidden_states=True)
    encoder = pretrained.load(saved2).encoder(dropout=0.0).eval()
    real = tokens != PAD
    ours = hidden_states(encoder, tokens)
    for a, b in zip(ours, theirs.hidden_states, strict=True):
        assert torch.allclose(a[real], b[real], atol=1e-5)


def test_it_is_evaluated_and_gives_features(saved2, corpus_dir, tmp_path):
    where = ["--ckpt", saved2, "--data_path", corpus_dir, "--device", "cpu", "--json"]
    result = json.loads(call(evaluation.main, *where, "--untrained", "--probe"))
    valid = rows_of(saved2.parent, "valid_loss")[-1]
    assert result["loss"] == pytest.approx(valid["valid_loss"], rel=1e-5)
    assert {"r2", "r2_block", "gain_position"} <= set(result)
    assert result["probe"]["valid_places"] > 100
    (tmp_path / "text").write_text("w1 w2\nw3\n")
    call(evaluation.main, *where, "--features", tmp_path / "text", "--out", tmp_path / "f.npy")
    assert np.load(tmp_path / "f.npy").shape == (2, 16)


@pytest.mark.parametrize(
    "flag",
    ["teacher_input masked", "mask_multiple_length 2", "fixed_masks yes", "mlm_weight 0.5"]
    + ["ema_transformer_layers_only no", "leave_unmasked_prob 0.1", "decoder_groups 5"],
)
def test_what_has_no_meaning_is_refused_in_one_line(flag):
    name, value = flag.split()
    with pytest.raises(InputError, match=f"--{name}") as error:
        settings(**{name: value})
    assert "\n" not in str(error.value)
