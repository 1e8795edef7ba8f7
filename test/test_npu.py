"""Training on an Ascend NPU: the CPU's numbers, checkpoints of either device, and no wait between
two log rows.

    pytest test/test_npu.py                              on a machine with a card
    NPUSIM=path/of/npusim.py pytest test/test_npu.py     on an emulated device that computes the CPU's numbers

Functions named check_ need the device. It changes torch for the rest of the process, so the last
test runs them in a process of their own. The tests before them need no device.
"""

import contextlib
import dataclasses
import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

INSIDE, NPUSIM = os.environ.get("NPU_CHECKS") == "1", os.environ.get("NPUSIM")
if INSIDE and NPUSIM:
    sys.path.insert(0, str(Path(NPUSIM).parent))
    import npusim

import bench
import eval as evaluation
import train
from config import DeviceConfig, InputError
from hardware import kernels, opening
from hardware.device import Device
from hardware.kernels import explicit_attention
from hardware.opening import open_device
from hardware.vectors import LongVectors
from run import checkpoint, log
from test.helpers import CPU, FEW, HERE, call, make_dataset, make_run, rows_of

import numpy as np
import pytest
import torch

TINY = [*FEW, "--lr", 1e-3]
TWENTY = ("--max_update", 20, "--save_interval_updates", 10, "--keep_interval_updates", -1)


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("corpus"))[0]


def difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


def moments(saved: dict) -> dict:
    return {
        f"{i}.{k}": v for i, state in saved["optimizer"]["state"].items() for k, v in state.items()
    }


# ---------------------------------------------------------------------------------------------- without a device


@pytest.mark.parametrize("queries", [7, 3])
def test_attention_as_matmuls_matches_torch_and_does_not_overflow_float16(queries):
    q, k, v = (torch.randn(2, 4, n, 8, requires_grad=True) for n in (queries, 7, 7))
    attend = (
        (torch.rand(2, 1, 1, 7) < 0.7)
        .index_fill_(3, torch.tensor([0]), True)
        .expand(2, 1, queries, 7)
    )
    direction = torch.randn(2, 4, queries, 8)
    for mask in (None, attend):
        gradients = [
            torch.autograd.grad((attention(q, k, v, mask, 0.0) * direction).sum(), (q, k, v))
            for attention in (torch.nn.functional.scaled_dot_product_attention, explicit_attention)
        ]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))
    q, k = (torch.full((1, 1, 4, 64), 50.0, dtype=torch.float16) for _ in range(2))
    assert (
        explicit_attention(q, k, k, None, 0.0).isfinite().all()
    )  # 64 x 50 x 50 is above 65,504, float16's limit


@pytest.mark.parametrize(
    ("amp", "options"),
    [
        (None, {}),
        (torch.bfloat16, dict(normalize_before="true", activation_fn="relu")),
        (torch.float16, {}),
    ],
)
def test_weights_in_long_vectors_train_as_separate_weights_do(
    monkeypatch, corpus_dir, amp, options
):
    runs, figures = [], []
    for long in (False, True):
        monkeypatch.setattr(Device, "wants_long_vectors", long)
        run, dataset = make_run(corpus_dir, device=dataclasses.replace(CPU, amp=amp), **options)
        batches = [dataset.batch(ids, 1) for ids in dataset.epoch_batches(1)[:8]]
        done = [train.update(run, batches[i : i + 2]) for i in range(0, 8, 2)]
        runs.append(run)
        figures.append([float(x) for d in done for x in (d.step.loss, d.step.gnorm)])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    plain, long = runs
    assert isinstance(long.weights, LongVectors) and len(long.weights.parameters) == 2 < len(
        plain.weights.parameters
    )
    assert difference(plain.student.state_dict(), long.student.state_dict()) < 2e-6
    assert difference(plain.teacher.state_dict(), long.teacher.state_dict()) < 2e-6
    states = [run.optimizer.state() for run in runs]
    assert difference(*(moments({"optimizer": state}) for state in states)) < 2e-6
    for here, other in (
        (plain, states[1]),
        (long, states[0]),
    ):  # and each continues from the other's state
        here.optimizer.load(other["state"], {})
    ids = dataset.epoch_batches(1)[8]
    losses = [float(train.update(run, [dataset.batch(ids, 1)]).step.gnorm) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert difference(plain.student.state_dict(), long.student.state_dict()) < 5e-6


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "raise ImportError('libhccl.so: cannot open')",
            "cannot be loaded.*libhccl.so.*install CANN.*source ",
        ),
        ("raise RuntimeError('Two accelerators cannot be used at the same time')", "CPU build"),
        (
            "import yaml_that_is_missing",
            "yaml_that_is_missing is not installed; pip install -r hardware/requirements.txt",
        ),
        (
            "import torch; torch.npu = type('npu', (), dict(is_available=lambda: False))",
            "no card.*npu-smi.*'7,3'",
        ),
    ],
)
def test_an_unusable_torch_npu_is_reported_in_one_line_and_auto_uses_the_cpu(
    monkeypatch, tmp_path, capsys, source, message
):
    (tmp_path / "torch_npu.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    monkeypatch.setattr(torch, "npu", None, raising=False)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "7,3")
    with pytest.raises(InputError, match=f"^--device npu: .*{message}") as error:
        open_device(DeviceConfig(device="npu"))
    assert "\n" not in str(error.value)
    for devices, reason in ((["/dev/davinci0"], message), ([], "there is no Ascend card")):
        monkeypatch.setattr(opening.glob, "glob", lambda pattern, devices=devices: devices)
        sys.modules.pop("torch_npu", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert open_device(DeviceConfig(device="auto")).type == "cpu"
        printed = capsys.readouterr().err
        assert re.fullmatch(f"note: running without an NPU: .*{reason}.*\n", printed), printed
    sys.modules.pop("torch_npu", None)


def test_npu_options_are_refused_on_other_devices(tmp_path, corpus_dir):
    where = [*TINY, "--data_path", corpus_dir, "--save_dir", tmp_path, "--max_update", 20]
    with pytest.raises(InputError, match="--npu_profile"):
        call(train.main, *where, "--npu_profile", 2)


@pytest.mark.parametrize(
    "name", ["Ascend910A", "Ascend910ProB", "Ascend910B", "Ascend910B3", "Ascend910_9392"]
)
def test_precision_and_attention_follow_from_the_generation_of_the_card(monkeypatch, name):
    first = name in ("Ascend910A", "Ascend910ProB", "Ascend910B")
    here = Device(torch.device("meta"), name, None)
    monkeypatch.setattr(Device, "type", "npu")
    monkeypatch.setattr(
        torch,
        "npu",
        type("npu", (), dict(is_bf16_supported=staticmethod(lambda: not first))),
        raising=False,
    )
    monkeypatch.setattr(torch.npu, "get_device_name", lambda index: name, raising=False)
    kernels._is_first_generation.cache_clear()
    assert kernels._is_first_generation(0) == first == here.is_first_generation
    kernels._is_first_generation.cache_clear()
    assert opening._amp_type("auto", "npu", name) == (torch.float16 if first else torch.bfloat16)
    assert opening._amp_type("fp16", "npu", name) is torch.float16
    if first:
        with pytest.raises(InputError, match=f"--amp bf16: {name} has no bfloat16; use --amp fp16"):
            opening._amp_type("bf16", "npu", name)
    monkeypatch.setenv("INF_NAN_MODE_FORCE_DISABLE", "1")
    with (
        contextlib.nullcontext()
        if first
        else pytest.raises(InputError, match="INF_NAN_MODE_FORCE_DISABLE=1")
    ):
        opening._check_npu("auto", name, 0)


# ---------------------------------------------------------------------------------------------- on a device


@contextlib.contextmanager
def waits():
    """Collect the places where the host waited for the device."""
    if NPUSIM:
        with npusim.Trace() as trace:
            yield trace.syncs
        return
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.npu.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.npu.set_sync_debug_mode(0)


def pretrain(folder, corpus_dir, device, amp, *flags) -> checkpoint.Loaded:
    where = ["--data_path", corpus_dir, "--save_dir", folder, "--device", device, "--amp", amp]
    call(train.main, *TINY, *where, *flags)
    saved = checkpoint.load(folder / "checkpoint_last.pt")
    assert all(
        t.untyped_storage().nbytes() == t.nbytes
        for t in [*saved.student.values(), *saved.teacher.values()]
    )
    return saved


def copy_of(folder, updates, to):
    """Make a save directory with the run of `folder` after so many updates; returns it."""
    to.mkdir()
    shutil.copy(next(folder.glob(f"checkpoint_*_{updates}.pt")), to / "checkpoint_last.pt")
    return to


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory, corpus_dir):
    """Train 20 updates on the CPU in float32, saving at the tenth too; returns the folder and the
    last checkpoint."""
    folder = tmp_path_factory.mktemp("cpu")
    return folder, pretrain(folder, corpus_dir, "cpu", "off", *TWENTY)


def check_float32_training_matches_the_cpu_and_either_device_resumes_the_other(
    tmp_path, corpus_dir, on_cpu
):
    cpu, whole = on_cpu
    npu = tmp_path / "npu"

    def same(saved):
        assert (
            difference(whole.student, saved.student) < 1e-5
            and difference(whole.teacher, saved.teacher) < 1e-5
        )
        assert difference(moments(whole.content), moments(saved.content)) < 1e-5

    same(pretrain(npu, corpus_dir, "npu", "off", *TWENTY))
    rows = [rows_of(folder) for folder in (cpu, npu)]
    for key in ("loss", "gnorm", "target_var", "pred_var"):
        assert [r[key] for r in rows[0]] == pytest.approx([r[key] for r in rows[1]], rel=1e-5), key
    valid = [rows_of(folder, "valid_loss")[-1]["valid_loss"] for folder in (cpu, npu)]
    assert valid[0] == pytest.approx(valid[1], rel=1e-5)
    result = call(
        evaluation.main, "--ckpt", cpu / "checkpoint_last.pt", "--device", "npu", "--amp", "off"
    )
    assert f"{valid[0]:.4f}" in result
    for first, second in ((npu, "cpu"), (cpu, "npu")):
        folder = copy_of(first, 10, tmp_path / f"on-{second}")
        begin = checkpoint.load(folder / "checkpoint_last.pt").content
        assert ("npu" in begin["rng"]) == (second == "cpu")
        same(pretrain(folder, corpus_dir, second, "off", "--max_update", 20))
        assert [r["num_updates"] for r in rows_of(folder)] == [*range(11, 21)]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def check_mixed_precision_stays_near_float32(tmp_path, corpus_dir, on_cpu, amp):
    if amp == "bf16" and not torch.npu.is_bf16_supported():
        pytest.skip("this card has no bfloat16")
    saved = pretrain(tmp_path, corpus_dir, "npu", amp, "--max_update", 20)
    plain, mixed = rows_of(on_cpu[0]), rows_of(tmp_path)
    assert [r["loss"] for r in mixed] == pytest.approx([r["loss"] for r in plain], rel=0.02)
    assert mixed[0]["loss"] != plain[0]["loss"]  # the precision does differ
    assert {r["loss_scale"] for r in mixed} == {128 if amp == "fp16" else 1}
    assert (
        difference(saved.student, on_cpu[1].student) < 0.01
    )  # Adam moves a weight by up to 1e-3 per update
    assert all(t.dtype == torch.float32 for t in [*saved.student.values(), *saved.teacher.values()])


def check_the_random_state_of_the_device_is_saved_and_restored(tmp_path, corpus_dir):
    here = open_device(DeviceConfig(device="npu", amp="off"))
    state = here.rng_state()
    drawn = [torch.rand(5, device=where) for where in (here.torch_device, "cpu")]
    here.set_rng_state(state)
    assert all(torch.equal(a, torch.rand(5, device=a.device)) for a in drawn)
    flags = (
        "--max_update",
        6,
        "--dropout",
        0.1,
        "--attention_dropout",
        0.1,
        "--disable_validation",
    )
    saves = ("--save_interval_updates", 3, "--keep_interval_updates", -1)
    whole = pretrain(tmp_path / "whole", corpus_dir, "npu", "off", *flags, *saves)
    parts = pretrain(
        copy_of(tmp_path / "whole", 3, tmp_path / "parts"), corpus_dir, "npu", "off", *flags
    )
    assert difference(whole.student, parts.student) < 1e-6


@pytest.mark.parametrize("amp", ["off", "auto", "fp16"])
def check_nothing_waits_between_two_log_rows(monkeypatch, tmp_path, corpus_dir, amp):
    spans, first, last = [], log.Log.read_skipped, log.Log.write

    def begin(self):
        spans.append((len(self.done), len(seen)))
        return first(self)

    def end(self):
        row = last(self)
        spans.append(len(seen))
        return row

    monkeypatch.setattr(log.Log, "read_skipped", begin)
    monkeypatch.setattr(log.Log, "write", end)
    with waits() as seen:
        pretrain(
            tmp_path,
            corpus_dir,
            "npu",
            amp,
            "--max_update",
            9,
            "--log_interval",
            3,
            "--disable_validation",
        )
    quiet = [
        (b[0], seen[a : b[1]])
        for a, b in zip(spans, spans[1:])
        if isinstance(a, int) and not isinstance(b, int)
    ]
    quiet = [(updates, where) for updates, where in quiet if updates]
    assert [updates for updates, _ in quiet] == [3, 3]
    allowed = 2 if amp == "fp16" else 0  # whether gradients overflowed, and then the loss scale
    assert all(len(where) <= allowed * updates for updates, where in quiet), quiet
    assert len(seen) > 0  # a log row does wait


def check_other_ways_of_training_and_the_benchmark(tmp_path, corpus_dir):
    flags = (
        "--max_update",
        4,
        "--update_freq",
        2,
        "--fairseq_exact",
        "--normalize_before",
        "--instance_norm_targets",
    )
    saved = [
        pretrain(tmp_path / kind, corpus_dir, kind, "off", "--disable_validation", *flags)
        for kind in ("cpu", "npu")
    ]
    assert difference(saved[0].student, saved[1].student) < 1e-5
    result = call(
        bench.main,
        *TINY,
        "--data_path",
        corpus_dir,
        "--device",
        "npu",
        "--updates",
        1,
        "--warmup",
        1,
    )
    assert "1 x npu" in result


@pytest.mark.parametrize("amp", ["off", "auto", "fp16"])
def check_the_check_finds_the_cpus_numbers(capsys, corpus_dir, amp):
    flags = ("--data_path", corpus_dir, "--device", "npu", "--amp", amp, "--check", "--updates", 4)
    code = bench.main([str(a) for a in (*TINY, *flags)])
    assert code == 0, capsys.readouterr().out
    assert "as the CPU computes" in capsys.readouterr().out


def check_a_non_finite_gradient_counts_as_zero(monkeypatch, corpus_dir):
    run, dataset = make_run(corpus_dir, device=open_device(DeviceConfig(device="npu", amp="off")))
    batch = dataset.batch(dataset.epoch_batches(1)[0], 1)
    with monkeypatch.context() as patch:
        patch.setattr(train, "data2vec_loss", lambda p, t, cfg: p.sum() * float("nan"))
        assert bool(train.update(run, [batch]).step.skipped)
    assert all(p.isfinite().all() for p in run.weights.parameters) and not bool(
        train.update(run, [batch]).step.skipped
    )


def check_weights_are_views_of_the_vectors_that_the_optimizer_moves(corpus_dir):
    run, dataset = make_run(corpus_dir, device=open_device(DeviceConfig(device="npu", amp="off")))
    before = {k: v.cpu() for k, v in run.student.state_dict().items()}
    train.update(run, [dataset.batch(dataset.epoch_batches(1)[0], 1)])
    vectors = torch.cat([v.detach().cpu() for v in run.weights.parameters])
    own = torch.cat([p.detach().cpu().flatten() for p in run.student.parameters()])
    assert difference(before, {k: v.cpu() for k, v in run.student.state_dict().items()}) > 1e-4
    assert np.array_equal(vectors.sort().values.numpy(), own.sort().values.numpy())


# -------------------------------------------------------------------------------------------- a process for the checks


def test_the_checks_pass_on_a_card_or_an_emulated_device():
    card = glob.glob("/dev/davinci[0-9]*")
    if not (card or NPUSIM):
        pytest.skip("no Ascend card, and NPUSIM does not name an emulator (npusim.py)")
    env = {**os.environ, "NPU_CHECKS": "1"}
    if card:
        env.pop("NPUSIM", None)
    flags = "-q -p no:cacheprovider -o python_functions=check_".split()
    command = [sys.executable, "-m", "pytest", *flags, __file__]
    run = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and re.search(r"[0-9]+ passed", run.stdout), (
        run.stdout[-6000:] + run.stderr[-2000:]
    )
