"""Devices, precision, memory, kernels, a batch's upload, and the check of a device's numbers."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import bench
import preprocess
import train
from config import DeviceConfig, InputError, ModelConfig
from hardware import device, kernels, opening
from hardware.device import Device
from hardware.opening import is_bf16_fast_on_cpu, open_device
from run import checkpoint
from run.guard import check_memory
from run.resume import with_amp_of_the_start
from test.helpers import CPU, FEW, HERE, call, config_of, few, rows_of
from text.workers import prefetch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------- kernels


def test_dropout_on_a_cpu_keeps_the_expected_share_and_mean():
    for p, n in ((0.1, 400_001), (0.5, 100_000), (0.9999999, 3)):
        x = torch.full((n,), 3.0, requires_grad=True)
        torch.manual_seed(5)
        y = kernels.dropout(x, p)
        y.sum().backward()
        torch.manual_seed(5)
        assert torch.equal(y, kernels.dropout(x, p)) and torch.equal(y, x * x.grad)
        kept = y != 0
        assert torch.allclose(y[kept], torch.tensor(3 / (1 - min(p, 1 - 2**-16))), rtol=1e-4)
        assert abs(float(kept.float().mean()) - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / n)
    assert kernels.dropout(torch.ones(2, 3, 5, dtype=torch.bfloat16), 0.25).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 12), (0, 12)])
def test_the_linear_layer_on_a_cpu_matches_torch_with_its_gradients(shape):
    results = []
    for linear in (F.linear, kernels.linear):
        torch.manual_seed(3)
        x, w, b = (torch.randn(s, requires_grad=True) for s in (shape, (20, 12), (20,)))
        y = linear(x, w[4:], b[4:])  # rows of a matrix
        y.sin().sum().backward()
        results.append((y, x.grad, w.grad, b.grad))
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.linear(torch.randn(2, 12), w, b).dtype == torch.bfloat16


@pytest.mark.parametrize("length", [7, 8])
def test_a_mask_of_numbers_attends_as_a_mask_of_bools_to_the_bit(length):
    q, k, v = (torch.randn(3, 2, length, 4, requires_grad=True) for _ in range(3))
    real = torch.arange(length) < torch.tensor([[length], [2], [1]])
    attend = kernels.mask(real)
    numbers = kernels.as_numbers(attend, torch.float32)
    assert numbers.shape == attend.shape
    assert all(stride % 8 == 0 for stride in numbers.stride()[:3])
    results = []
    for mask in (attend, numbers):
        out = F.scaled_dot_product_attention(q, k, v, mask)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert numbers[1, 0, 0].tolist() == [0, 0] + [-torch.inf] * (length - 2)


# ------------------------------------------------------------------------------------- devices


def test_programs_import_without_torch_npu_and_keep_it_from_loading_itself():
    caches = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    names = ("TORCH_DEVICE_BACKEND_AUTOLOAD", "OMP_WAIT_POLICY", *caches)
    code = f"""
import sys, os
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print(*(os.environ.get(name) for name in {names}))
sys.meta_path.insert(0, Finder())
import {{0}}
assert "torch_npu" not in sys.modules"""
    unset = {name: value for name, value in os.environ.items() if name not in names}
    for module, chosen in (("train", {}), ("test.soak", {"OMP_WAIT_POLICY": "ACTIVE"})):
        command = [sys.executable, "-c", code.format(module)]
        env = {**unset, **chosen}
        policy = chosen.get("OMP_WAIT_POLICY", "PASSIVE")
        run = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
        assert run.stdout.strip() == f"0 {policy} 64 64", run.stderr


def test_the_loss_scaler_has_the_references_rules():
    scaler = dataclasses.replace(CPU, amp=torch.float16, world_size=4).scaler(update_freq=2)
    assert scaler.get_scale() == 128 and scaler.get_growth_interval() == 2**14 // 8
    assert not dataclasses.replace(CPU, amp=torch.bfloat16).scaler(1).is_enabled()


@pytest.mark.parametrize(("amp", "scale"), [("bf16", 1), ("fp16", 128)])
def test_mixed_precision_trains_and_the_teacher_stays_in_float32(tmp_path, corpus_dir, amp, scale):
    for name in ("off", amp):
        call(train.main, *few(corpus_dir, tmp_path / name, "--max_update", 8, "--amp", name))
    plain, mixed = rows_of(tmp_path / "off"), rows_of(tmp_path / amp)
    assert [r["loss"] for r in mixed] == pytest.approx([r["loss"] for r in plain], rel=0.02)
    assert mixed[0]["loss"] != plain[0]["loss"] and mixed[0]["loss_scale"] == scale
    saved = checkpoint.load(tmp_path / amp / "checkpoint_last.pt")
    assert all(t.dtype == torch.float32 for t in [*saved.teacher.values(), *saved.student.values()])


def test_auto_is_bf16_on_a_fast_cpu_and_a_resume_keeps_it(monkeypatch, corpus_dir, tmp_path):
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    for has in ((False, False), (True, False), (False, True), ()):  # the last: an older torch
        answers = {name: lambda answer=answer: answer for name, answer in zip(names, has)}
        with monkeypatch.context() as patch:
            patch.setattr(torch, "cpu", SimpleNamespace(**answers))
            assert is_bf16_fast_on_cpu() == any(has)

    words = (corpus_dir, tmp_path, "--amp", "auto", "--max_update")
    for updates, is_fast in ((1, True), (2, False)):
        monkeypatch.setattr(opening, "is_bf16_fast_on_cpu", lambda: is_fast)
        said = call(train.main, *few(*words, updates))
        assert "--amp bf16" in said and "amp bf16 |" in said and "amp bf16 ->" not in said


@pytest.mark.parametrize(
    ("began", "on", "asked", "expected"),
    [
        ("bf16", "cpu", "auto", "bf16"),
        ("bf16", "cpu", "off", "off"),
        ("auto", "cpu", "auto", "off"),  # of an earlier version
        ("off", "npu", "auto", "off"),
        ("fp16", "cpu", "auto", "bf16"),  # here without float16
    ],
)
def test_a_checkpoint_decides_what_auto_leaves_open(monkeypatch, began, on, asked, expected):
    monkeypatch.setattr(opening, "VERSION", (2, 3))
    monkeypatch.setattr(opening, "is_bf16_fast_on_cpu", lambda: True)
    cfg = config_of("--data_path", "x", "--device", "cpu", "--amp", asked)
    state = SimpleNamespace(config=dict(amp=began), content=dict(rng={"cpu": 0, on: 0}))
    settled, here = with_amp_of_the_start(cfg, open_device(cfg.device), ("x.pt", state))
    assert settled.device.amp == here.amp_name == expected


def test_a_thread_of_ours_runs_on_the_cores_that_the_process_began_with():
    if len(device.CORES) < 2:
        pytest.skip("needs two cores")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(device.CORES)})  # as torch_npu binds the thread that launches
        source = prefetch(iter(lambda: os.sched_getaffinity(0), None), 1, device.use_all_cores)
        assert next(source) == device.CORES and os.sched_getaffinity(0) == {min(device.CORES)}
        source.close()
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.filterwarnings("ignore:.*GradScaler")
@pytest.mark.parametrize(("version", "is_new"), [((2, 3), False), ((2, 4), True)])
def test_an_older_torch_gets_another_form_or_one_line(monkeypatch, version, is_new):
    for module in (device, opening):
        monkeypatch.setattr(module, "VERSION", version)
    assert CPU.has_fused_adam == is_new
    monkeypatch.delattr(torch.amp, "GradScaler")
    assert CPU.scaler(1).get_scale() == 1
    for ask in (CPU.check_compile, lambda: opening._amp_type("fp16", "cpu", "x")):
        with nullcontext() if is_new else pytest.raises(InputError, match="needs torch 2.4"):
            ask()


@pytest.mark.parametrize("teacher_input", ["full", "masked"])
def test_a_batch_in_one_piece_arrives_as_its_arrays(monkeypatch, block_dataset, teacher_input):
    dataset, moves = block_dataset(teacher_input=teacher_input, random_token_prob=0.2), []
    hosts = [dataset.batch(ids, 1) for ids in dataset.epoch_batches(1)[:6]]
    expected = [CPU.upload(host) for host in hosts]
    assert CPU.pin(hosts[0]) is hosts[0]
    monkeypatch.setattr(Device, "type", "card")  # of CPU, too
    module = SimpleNamespace(set_device=lambda device: None)
    monkeypatch.setattr(torch, "card", module, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: moves.append(self) or self)
    for host, plain in zip(hosts, expected):
        staged = CPU.pin(host)
        # the host still counts with it
        assert isinstance(staged.source, np.ndarray)
        for batch in (CPU.upload(staged), CPU.upload(host)):
            for name, value in vars(plain).items():
                mine = getattr(batch, name)
                assert type(mine) is type(value) and np.array_equal(mine, value), name
                assert getattr(mine, "dtype", None) == getattr(value, "dtype", None), name
        assert len(moves) == 2  # what is pinned is not pinned again
        moves.clear()


def test_deterministic_changes_nothing_on_a_cpu():
    open_device(DeviceConfig(device="cpu", deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


# -------------------------------------------------------------------------------------- memory


def test_a_model_too_large_for_the_memory_is_refused_at_once(tmp_path, corpus_dir):
    run = few(corpus_dir, tmp_path, "--max_update", 1)
    small = ModelConfig(layers=1, ffn_embed_dim=1, embed_dim=12_000, head_layers=100)
    bpe = f"--bpe train --vocab_size 1000000000 --train {tmp_path} --dest {tmp_path}".split()
    for ask, message in (
        (lambda: train.main([*run, "--layers", "1000", "--embed_dim", "100000"]), "too large"),
        (lambda: train.main([*run, "--layers", "20000"]), "--layers 20000: must be at most 1000"),
        (lambda: check_memory(small, 9, CPU), "too large for this cpu: .* weights need .* GiB"),
        (lambda: bench.main("--device cpu --vocabulary 1000000000".split()), "too large"),
        (lambda: preprocess.main(bpe), "--vocab_size 1000000000: must be"),
    ):
        with pytest.raises(InputError, match=message):
            ask()


@pytest.mark.parametrize("limit", ["memory.max", "memory/memory.limit_in_bytes"])
def test_the_memory_is_what_a_container_may_have(limit, tmp_path, monkeypatch):
    folder = tmp_path / "sys/fs/cgroup"
    (folder / "memory").mkdir(parents=True)
    (folder / "memory.max").write_text("max\n")
    (folder / limit).write_text("1000000\n")
    assert device._host_memory(str(tmp_path)) == 1_000_000
    monkeypatch.setattr(device.resource, "getrlimit", lambda which: (123_456, 123_456))  # ulimit -v
    assert device._host_memory(str(tmp_path)) == 123_456 and CPU.memory() == 123_456


# --------------------------------------------------------------------------------- bench --check


def checked(capsys, *argv) -> tuple[int, dict]:
    code = bench.main([*map(str, (*FEW, "--check", "--updates", 4, "--vocabulary", 100, *argv))])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])["check"]


@pytest.mark.parametrize("flags", [[], ["--amp", "bf16"], ["--mlm_weight", 1, "--update_freq", 2]])
def test_the_check_finds_the_same_numbers_as_in_torchs_own_kernels(capsys, flags):
    code, result = checked(capsys, *flags)
    assert (code, result["first"], result["beyond"]) == (0, None, 0)
    assert set(result["largest"]) == {"forward", "loss", "norm", "gradient", "weights"}
    assert all(difference < bound for _, difference, bound in result["largest"].values())
    if "bf16" in flags:
        assert result["largest"]["forward"][1] > 1e-4  # two forms of computing were compared


def tanh(exact, x):
    return F.gelu(x, approximate="tanh")


def leaky(exact, *args):
    """Right forward, wrong backward."""
    x = exact(*args)
    return x + 0.01 * (x - x.detach())


@pytest.mark.parametrize(
    ("kernel", "wrong", "first"),
    [
        ("gelu", tanh, "teacher's layer 0"),
        ("attention", leaky, "gradient of encoder.layers.1.self_attn.qkv"),
    ],
)
def test_the_check_names_the_first_wrong_tensor(capsys, monkeypatch, kernel, wrong, first):
    exact = getattr(kernels, kernel)

    def here(*args):
        return exact(*args) if kernels._plain else wrong(exact, *args)

    monkeypatch.setattr(kernels, kernel, here)
    code, result = checked(capsys)
    assert code == 1 and result["first"].startswith(first)
    assert (result["largest"]["forward"][1] < 1e-5) == first.startswith("gradient")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_gpu_computes_what_the_cpu_does(amp, capsys):
    assert checked(capsys, "--device", "cuda", "--amp", amp)[0] == 0
