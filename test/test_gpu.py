"""What only a GPU does: its form of the mask and its one upload, shown on the CPU, and on a GPU,
where there is one, the CPU's numbers."""

import os

import bench
from config import DeviceConfig
from hardware import kernels
from hardware.device import Device
from hardware.opening import open_device
from test.helpers import CPU, FEW

import numpy as np
import pytest
import torch
import torch.nn.functional as F


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


@pytest.mark.parametrize("teacher_input", ["full", "masked"])
def test_a_batch_in_one_piece_arrives_as_its_arrays(monkeypatch, block_dataset, teacher_input):
    dataset, moves = block_dataset(teacher_input=teacher_input, random_token_prob=0.2), []
    card = Device(torch.device("cpu"), "test", None)
    hosts = [dataset.batch(ids, 1) for ids in dataset.epoch_batches(1)[:6]]
    expected = [CPU.upload(host) for host in hosts]
    assert CPU.pin(hosts[0]) is hosts[0]
    with monkeypatch.context() as patch:
        patch.setattr(Device, "type", "card")
        module = type("card", (), dict(set_device=lambda device: None))
        patch.setattr(torch, "card", module, raising=False)
        patch.setattr(torch.Tensor, "pin_memory", lambda self: moves.append(self) or self)
        for host, plain in zip(hosts, expected):
            staged = card.pin(host)
            # the host still counts with it
            assert isinstance(staged.source, np.ndarray)
            same_batch(card.upload(staged), plain)
            assert len(moves) == 1  # not pinned again
            same_batch(card.upload(host), plain)
            assert torch.equal(*moves)
            moves.clear()


def same_batch(a, b):
    assert a.pinned is b.pinned is None
    for name, value in vars(b).items():
        mine = getattr(a, name)
        assert type(mine) is type(value) and np.array_equal(mine, value), name
        assert getattr(mine, "dtype", None) == getattr(value, "dtype", None), name


def test_deterministic_changes_nothing_on_a_cpu():
    open_device(DeviceConfig(device="cpu", deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_gpu_computes_what_the_cpu_does(amp, corpus_dir, capsys):
    flags = ("--data_path", corpus_dir, "--device", "cuda", "--amp", amp, "--check", "--updates", 4)
    code = bench.main([str(word) for word in (*FEW, *flags)])
    assert code == 0, capsys.readouterr().out
