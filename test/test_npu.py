"""Training on an Ascend NPU: the CPU's numbers, and checkpoints of either device.

    pytest test/test_npu.py                              on a machine with a card
    NPUSIM=path/of/npusim.py pytest test/test_npu.py     on an emulated device

The emulated device computes the CPU's numbers. Functions named check_ need a device. It changes
torch for the rest of the process, so the last test runs them in a process of their own. The tests
before them need no device. That nothing waits for a card between two log rows shows .ci/npu_dryrun.
"""

import dataclasses
import glob
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

INSIDE, NPUSIM = os.environ.get("NPU_CHECKS") == "1", os.environ.get("NPUSIM")
if INSIDE and NPUSIM:
    sys.path.insert(0, str(Path(NPUSIM).parent))
    import npusim  # noqa: F401

import bench
import eval as evaluation
import train
from config import DeviceConfig, InputError
from hardware import kernels, opening
from hardware.device import Device
from hardware.kernels import explicit_attention
from hardware.opening import open_device
from hardware.vectors import LongVectors
from run import checkpoint
from test.helpers import COPIES, CPU, FEW, HERE, call, few, make_run, rows_of

import pytest
import torch
import torch.nn.functional as F

NPU_OFF = DeviceConfig(device="npu", amp="off")
SAVE_TENTH = "--max_update 20 --save_interval_updates 10 --keep_interval_updates -1"


def difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def moments(optimizer: dict) -> dict:
    states = optimizer["state"].items()
    return {f"{i}.{name}": value for i, state in states for name, value in state.items()}


# ------------------------------------------------------------------------------ without a device


def test_attention_as_matmuls_matches_torch_and_does_not_overflow_float16():
    q, k, v = (torch.randn(3, 2, n, 8, requires_grad=True) for n in (4, 7, 7))
    attend = torch.rand(3, 1, 1, 7) < 0.7
    attend[1] = False  # a token that may look nowhere gets 0, not NaN
    for mask in (None, attend.expand(3, 1, 4, 7)):
        results = []
        for attention in (F.scaled_dot_product_attention, explicit_attention):
            out = attention(q, k, v, mask, 0.0)
            results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results))
    # 64 x 50 x 50 is above 65,504, float16's limit
    q, k = (torch.full((1, 1, 4, 64), 50.0, dtype=torch.float16) for _ in range(2))
    assert explicit_attention(q, k, k, None, 0.0).isfinite().all()


PRE_NORM = dict(normalize_before="true", activation_fn="relu")


@pytest.mark.parametrize(
    ("amp", "options"),
    [(None, {}), (torch.bfloat16, PRE_NORM), (torch.float16, {})]
    + [(None, COPIES), (torch.bfloat16, COPIES)],
)
def test_long_vectors_train_as_separate_weights_do(monkeypatch, corpus_dir, amp, options):
    runs, figures = [], []
    for is_long in (False, True):
        monkeypatch.setattr(Device, "wants_long_vectors", is_long)
        run, dataset = make_run(corpus_dir, device=dataclasses.replace(CPU, amp=amp), **options)
        batches = [dataset.batch(ids, 1) for ids in dataset.epoch_batches(1)[:9]]
        steps = [train.update(run, batches[i : i + 2]).step for i in range(0, 8, 2)]
        figures.append([float(x) for step in steps for x in (step.loss, step.gnorm)])
        runs.append(run)
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    plain, long = runs
    assert isinstance(long.weights, LongVectors)
    assert len(long.weights.parameters) == (4 if options is COPIES else 2)
    assert difference(plain.student.state_dict(), long.student.state_dict()) < 2e-6
    assert difference(plain.teacher.state_dict(), long.teacher.state_dict()) < 2e-6
    states = [run.optimizer.state() for run in runs]
    assert difference(*map(moments, states)) < 2e-6
    # and each continues from the other's state
    for run, other in zip(runs, reversed(states)):
        run.optimizer.load(other["state"], {})
    norms = [float(train.update(run, batches[8:]).step.gnorm) for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert difference(plain.student.state_dict(), long.student.state_dict()) < 5e-6


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ImportError('libhccl.so: cannot open')", "cannot be loaded.*libhccl.so.*source "),
        ("raise RuntimeError('Two accelerators cannot be used at the same time')", "CPU build"),
        ("import no_yaml", "no_yaml is not installed; pip install -r hardware/requirements.txt"),
        ("import torch; torch.npu = torch.cuda", "no card.*npu-smi.*'7,3'"),  # which has none below
    ],
)
def test_without_a_usable_npu_auto_takes_the_cpu(monkeypatch, tmp_path, capsys, source, message):
    (tmp_path / "torch_npu.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    monkeypatch.setattr(torch, "npu", None, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "7,3")
    with pytest.raises(InputError, match=f"^--device npu: .*{message}.*$"):
        open_device(DeviceConfig(device="npu"))
    for files, reason in ((["/dev/davinci0"], message), ([], "there is no Ascend card")):
        monkeypatch.setattr(opening.glob, "glob", lambda pattern, files=files: files)
        sys.modules.pop("torch_npu", None)
        assert open_device(DeviceConfig(device="auto")).type == "cpu"
        printed = capsys.readouterr().err
        assert re.fullmatch(f"note: running without an NPU: .*{reason}.*\n", printed), printed
    sys.modules.pop("torch_npu", None)


@pytest.mark.parametrize(
    ("name", "is_first"),
    [("Ascend910A", True), ("Ascend910ProB", True), ("Ascend910B", True)]
    + [("Ascend910B3", False), ("Ascend910_9392", False)],
)
def test_precision_and_attention_follow_from_a_cards_generation(monkeypatch, name, is_first):
    answers = dict(is_bf16_supported=lambda: not is_first, get_device_name=lambda index: name)
    monkeypatch.setattr(torch, "npu", SimpleNamespace(**answers), raising=False)
    assert kernels._is_first_generation.__wrapped__(0) == is_first
    best = torch.float16 if is_first else torch.bfloat16
    assert opening._amp_type("auto", "npu", name) is best
    assert opening._amp_type("fp16", "npu", name) is torch.float16
    monkeypatch.setenv("INF_NAN_MODE_FORCE_DISABLE", "1")
    for refuses, message, ask in (
        (is_first, f"{name} has no bfloat16", lambda: opening._amp_type("bf16", "npu", name)),
        (not is_first, "INF_NAN_MODE_FORCE_DISABLE=1", lambda: opening._check_npu("auto", name, 0)),
    ):
        with pytest.raises(InputError, match=message) if refuses else nullcontext():
            ask()


# ----------------------------------------------------------------------------------- on a device


def pretrain(corpus_dir, folder, device, flags) -> checkpoint.Loaded:
    where = ("--device", device, "--amp", "off", "--lr", 1e-3)
    call(train.main, *few(corpus_dir, folder, *where, *flags.split()))
    saved = checkpoint.load(folder / "checkpoint_last.pt")
    tensors = [*saved.student.values(), *saved.teacher.values()]
    # views of long vectors must not take these into the file
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
    return saved


def copy_of(folder, updates, to):
    """Make a save folder with the run of `folder` after so many updates; returns it."""
    to.mkdir()
    shutil.copy(next(folder.glob(f"checkpoint_*_{updates}.pt")), to / "checkpoint_last.pt")
    return to


def check_float32_training_is_the_cpus_and_either_resumes_the_other(tmp_path, corpus_dir):
    folders = {device: tmp_path / device for device in ("cpu", "npu")}
    cpu, npu = (pretrain(corpus_dir, folders[d], d, SAVE_TENTH) for d in folders)

    def same(saved):
        assert difference(cpu.student, saved.student) < 1e-5
        assert difference(cpu.teacher, saved.teacher) < 1e-5
        optimizers = (cpu.content["optimizer"], saved.content["optimizer"])
        assert difference(*map(moments, optimizers)) < 1e-5

    same(npu)
    for key in ("loss", "gnorm", "target_var", "pred_var", "valid_loss"):
        ours, theirs = ([row[key] for row in rows_of(f, key)] for f in folders.values())
        assert ours == pytest.approx(theirs, rel=1e-5), key
    last = folders["cpu"] / "checkpoint_last.pt"
    printed = call(evaluation.main, "--ckpt", last, "--device", "npu", "--amp", "off")
    assert f"{ours[-1]:.4f}" in printed  # the last validation's loss
    for first, second in (("npu", "cpu"), ("cpu", "npu")):
        folder = copy_of(folders[first], 10, tmp_path / f"on-{second}")
        begin = checkpoint.load(folder / "checkpoint_last.pt").content
        assert ("npu" in begin["rng"]) == (first == "npu")
        same(pretrain(corpus_dir, folder, second, "--max_update 20"))
        assert [row["num_updates"] for row in rows_of(folder)] == [*range(11, 21)]


def check_the_random_state_of_the_device_is_saved_and_restored(tmp_path, corpus_dir):
    here = open_device(NPU_OFF)
    state = here.rng_state()
    drawn = [torch.rand(5, device=where) for where in (here.torch_device, "cpu")]
    here.set_rng_state(state)
    assert all(torch.equal(a, torch.rand(5, device=a.device)) for a in drawn)
    flags = "--max_update 6 --dropout 0.1 --attention_dropout 0.1 --disable_validation"
    saves = f"{flags} --save_interval_updates 3 --keep_interval_updates -1"
    whole = pretrain(corpus_dir, tmp_path / "whole", "npu", saves)
    folder = copy_of(tmp_path / "whole", 3, tmp_path / "parts")
    parts = pretrain(corpus_dir, folder, "npu", flags)
    assert difference(whole.student, parts.student) < 1e-6


FLAGS2 = " ".join(f"--{name} {value}" for name, value in COPIES.items())
OTHER = "--update_freq 2 --fairseq_exact --normalize_before --instance_norm_targets"


@pytest.mark.parametrize(
    "flags", ["--amp off", "--amp auto", "--amp fp16", f"--amp off {OTHER}", f"--amp off {FLAGS2}"]
)
def check_the_check_finds_the_cpus_numbers(capsys, corpus_dir, flags):
    where = ["--data_path", str(corpus_dir), "--device", "npu", "--lr", "1e-3", *flags.split()]
    code = bench.main([*FEW, *where, "--check", "--updates", "4"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    _, difference, _ = json.loads(printed.splitlines()[-1])["check"]["largest"]["forward"]
    assert (difference > 2e-5) == ("off" not in flags)  # the precision does differ


def check_a_non_finite_gradient_counts_as_zero(monkeypatch, corpus_dir):
    run, dataset = make_run(corpus_dir, device=open_device(NPU_OFF))
    batch = dataset.batch(dataset.epoch_batches(1)[0], 1)
    with monkeypatch.context() as patch:
        patch.setattr(train, "data2vec_loss", lambda p, t, cfg: p.sum() * float("nan"))
        assert bool(train.update(run, [batch]).step.skipped)
    assert all(p.isfinite().all() for p in run.weights.parameters)
    assert not bool(train.update(run, [batch]).step.skipped)


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
    printed = run.stdout[-6000:] + run.stderr[-2000:]
    assert run.returncode == 0 and "8 passed" in run.stdout, printed
