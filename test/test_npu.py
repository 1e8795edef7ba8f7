"""Training on an Ascend NPU: the CPU's numbers, checkpoints of either device, and no wait between
two log rows.

    pytest test/test_npu.py                              on a machine with a card
    NPUSIM=path/of/npusim.py pytest test/test_npu.py     on an emulated device

The emulated device computes the CPU's numbers. Functions named check_ need a device. It changes
torch for the rest of the process, so the last test runs them in a process of their own. The tests
before them need no device.
"""

import dataclasses
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager, nullcontext
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
from run import checkpoint
from run.log import Log
from test.helpers import CPU, FEW, HERE, call, few, make_run, rows_of

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


@pytest.mark.parametrize("queries", [7, 3])
def test_attention_as_matmuls_matches_torch_and_does_not_overflow_float16(queries):
    q, k, v = (torch.randn(2, 4, n, 8, requires_grad=True) for n in (queries, 7, 7))
    attend = torch.rand(2, 1, 1, 7) < 0.7
    attend[..., 0] = True
    direction = torch.randn(2, 4, queries, 8)
    for mask in (None, attend.expand(2, 1, queries, 7)):
        gradients = []
        for attention in (F.scaled_dot_product_attention, explicit_attention):
            score = (attention(q, k, v, mask, 0.0) * direction).sum()
            gradients.append(torch.autograd.grad(score, (q, k, v)))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))
    # 64 x 50 x 50 is above 65,504, float16's limit
    q, k = (torch.full((1, 1, 4, 64), 50.0, dtype=torch.float16) for _ in range(2))
    assert explicit_attention(q, k, k, None, 0.0).isfinite().all()


PRE_NORM = dict(normalize_before="true", activation_fn="relu")
COPIES = dict(objective="data2vec2", mask_multiple_length=1, clone_batch=3, decoder_dim=12)
COPIES |= dict(decoder_kernel=3, decoder_groups=2)


@pytest.mark.parametrize(
    ("amp", "options"),
    [(None, {}), (torch.bfloat16, PRE_NORM), (torch.float16, {})]
    + [(None, COPIES), (torch.bfloat16, COPIES)],
)
def test_weights_in_long_vectors_train_as_separate_weights_do(
    monkeypatch, corpus_dir, amp, options
):
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "7,3")
    with pytest.raises(InputError, match=f"^--device npu: .*{message}") as error:
        open_device(DeviceConfig(device="npu"))
    assert "\n" not in str(error.value)
    for files, reason in ((["/dev/davinci0"], message), ([], "there is no Ascend card")):
        monkeypatch.setattr(opening.glob, "glob", lambda pattern, files=files: files)
        sys.modules.pop("torch_npu", None)
        assert open_device(DeviceConfig(device="auto")).type == "cpu"
        printed = capsys.readouterr().err
        assert re.fullmatch(f"note: running without an NPU: .*{reason}.*\n", printed), printed
    sys.modules.pop("torch_npu", None)


def test_npu_options_are_refused_on_other_devices(tmp_path, corpus_dir):
    with pytest.raises(InputError, match="--npu_profile"):
        train.main(few(corpus_dir, tmp_path, "--max_update", 20, "--npu_profile", 2))


@pytest.mark.parametrize(
    ("name", "is_first"),
    [("Ascend910A", True), ("Ascend910ProB", True), ("Ascend910B", True)]
    + [("Ascend910B3", False), ("Ascend910_9392", False)],
)
def test_precision_and_attention_follow_from_the_generation_of_the_card(
    monkeypatch, name, is_first
):
    answers = dict(is_bf16_supported=lambda: not is_first, get_device_name=lambda index: name)
    npu = type("npu", (), {key: staticmethod(answer) for key, answer in answers.items()})
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    monkeypatch.setattr(Device, "type", "npu")
    assert Device(torch.device("meta"), name, None).is_first_generation == is_first
    kernels._is_first_generation.cache_clear()
    assert kernels._is_first_generation(0) == is_first
    kernels._is_first_generation.cache_clear()

    best = torch.float16 if is_first else torch.bfloat16
    assert opening._amp_type("auto", "npu", name) is best
    assert opening._amp_type("fp16", "npu", name) is torch.float16
    refused = pytest.raises(InputError, match=f"{name} has no bfloat16; use --amp fp16")
    with refused if is_first else nullcontext():
        opening._amp_type("bf16", "npu", name)
    monkeypatch.setenv("INF_NAN_MODE_FORCE_DISABLE", "1")
    refused = pytest.raises(InputError, match="INF_NAN_MODE_FORCE_DISABLE=1")
    with nullcontext() if is_first else refused:
        opening._check_npu("auto", name, 0)


# ----------------------------------------------------------------------------------- on a device


@contextmanager
def waits():
    """Collect the places where the host waited for the device."""
    if NPUSIM:
        with npusim.Trace() as trace:
            yield trace.syncs
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.npu.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.npu.set_sync_debug_mode(0)


def pretrain(corpus_dir, folder, device, amp, flags) -> checkpoint.Loaded:
    where = ("--device", device, "--amp", amp, "--lr", 1e-3)
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


def check_float32_training_matches_the_cpu_and_either_device_resumes_the_other(
    tmp_path, corpus_dir
):
    folders = {device: tmp_path / device for device in ("cpu", "npu")}
    cpu, npu = (pretrain(corpus_dir, folders[d], d, "off", SAVE_TENTH) for d in folders)

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
        same(pretrain(corpus_dir, folder, second, "off", "--max_update 20"))
        assert [row["num_updates"] for row in rows_of(folder)] == [*range(11, 21)]


def check_the_random_state_of_the_device_is_saved_and_restored(tmp_path, corpus_dir):
    here = open_device(NPU_OFF)
    state = here.rng_state()
    drawn = [torch.rand(5, device=where) for where in (here.torch_device, "cpu")]
    here.set_rng_state(state)
    assert all(torch.equal(a, torch.rand(5, device=a.device)) for a in drawn)
    flags = "--max_update 6 --dropout 0.1 --attention_dropout 0.1 --disable_validation"
    saves = f"{flags} --save_interval_updates 3 --keep_interval_updates -1"
    whole = pretrain(corpus_dir, tmp_path / "whole", "npu", "off", saves)
    folder = copy_of(tmp_path / "whole", 3, tmp_path / "parts")
    parts = pretrain(corpus_dir, folder, "npu", "off", flags)
    assert difference(whole.student, parts.student) < 1e-6


@pytest.mark.parametrize(
    ("amp", "reads", "options"),
    [("off", 0, {}), ("auto", 0, {}), ("fp16", 2, {}), ("auto", 0, COPIES)],
)
def check_nothing_waits_between_two_log_rows(
    monkeypatch, tmp_path, corpus_dir, amp, reads, options
):
    """reads: whether gradients overflowed, and then the loss scale."""
    quiet = []  # (updates, where the host waited) between two rows
    end_of_row = None  # how many waits there were by then
    first, last = Log.read_skipped, Log.write

    def begin(self):
        nonlocal end_of_row
        if end_of_row is not None and self.done:
            quiet.append((len(self.done), seen[end_of_row:]))
        end_of_row = None
        return first(self)

    def end(self):
        nonlocal end_of_row
        row = last(self)
        end_of_row = len(seen)
        return row

    monkeypatch.setattr(Log, "read_skipped", begin)
    monkeypatch.setattr(Log, "write", end)
    with waits() as seen:
        flags = "--max_update 9 --log_interval 3 --disable_validation"
        flags += "".join(f" --{name} {value}" for name, value in options.items())
        pretrain(corpus_dir, tmp_path, "npu", amp, flags)
    assert [updates for updates, _ in quiet] == [3, 3]
    assert all(len(where) <= reads * updates for updates, where in quiet), quiet
    assert len(seen) > 0  # a log row does wait


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


# ---------------------------------------------------------------------- a process for the checks


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
    assert run.returncode == 0 and "12 passed" in run.stdout, printed
