"""The GPU path without a GPU: what an update asks of the card, recorded from torch's fake tensors (test/fake_gpu.py),
and the forms that only a GPU takes, on the CPU.

Functions named check_ need the fake card. It changes torch for the rest of the process, so the last test runs them in a
process of their own.
"""

import dataclasses
import os
import re
import subprocess
import sys
from collections import Counter

from config import DeviceConfig
from data import Corpus
from hardware import kernels
from hardware.device import Device, open_device
from run.log import padding
from test.helpers import CPU, HERE, block_dataset, corpus_dir  # noqa: F401
from text.binarized import PAD

import numpy as np
import pytest
import torch
import torch.nn.functional as F

INSIDE = os.environ.get("GPU_CHECKS") == "1"
if INSIDE:
    from test import fake_gpu

    fake_gpu.install()

LAYERS, C, FFN, HEADS, T = (
    2,
    64,
    128,
    4,
    31,
)  # 31 tokens: rows of a mask must begin at a multiple of 8 all the same
MODEL = f"--layers {LAYERS} --average_top_k_layers {LAYERS} --embed_dim {C} --ffn_embed_dim {FFN} --tokens_per_sample {T}"
MODEL = f"{MODEL} --attention_heads {HEADS} --max_tokens 512".split()


# ---------------------------------------------------------------------------------------------- without the fake card


@pytest.mark.parametrize("length", [7, 8])
def test_a_mask_of_numbers_attends_as_a_mask_of_bools_to_the_bit(length):
    q, k, v = (torch.randn(3, 2, length, 4, requires_grad=True) for _ in range(3))
    real = torch.arange(length) < torch.tensor([[length], [2], [1]])
    attend = kernels.mask(real)
    numbers = kernels.as_numbers(attend, torch.float32)
    assert numbers.shape == attend.shape and all(stride % 8 == 0 for stride in numbers.stride()[:3])
    results = []
    for mask in (attend, numbers):
        out = F.scaled_dot_product_attention(q, k, v, mask)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert as_text(numbers[1, 0, 0]) == "0 0" + " -inf" * (length - 2)


def as_text(row) -> str:
    return " ".join(f"{x:g}" for x in row.tolist())


@pytest.mark.parametrize("teacher_input", ["full", "masked"])
def test_a_batch_in_one_piece_arrives_as_its_arrays(monkeypatch, block_dataset, teacher_input):  # noqa: F811
    dataset, moves = block_dataset(teacher_input=teacher_input, random_token_prob=0.2), []
    card, hosts = (
        Device(torch.device("cpu"), "test", None),
        [dataset.batch(i, 1) for i in dataset.epoch_batches(1)[:6]],
    )
    expected = [CPU.upload(host) for host in hosts]
    assert CPU.pin(hosts[0]) is hosts[0]
    with monkeypatch.context() as patch:
        patch.setattr(Device, "type", "card")
        patch.setattr(
            torch, "card", type("card", (), dict(set_device=lambda device: None)), raising=False
        )
        patch.setattr(torch.Tensor, "pin_memory", lambda self: moves.append(self) or self)
        for host, plain in zip(hosts, expected):
            staged = card.pin(host)
            assert len(moves) == 1 and isinstance(
                staged.source, np.ndarray
            )  # the host still counts with it
            same_batch(card.upload(staged), plain)
            assert len(moves) == 1  # not pinned again
            same_batch(card.upload(host), plain)
            assert all(torch.equal(a, b) for a, b in zip(*moves))
            moves.clear()


def same_batch(a, b):
    assert a.pinned is b.pinned is None
    for field in dataclasses.fields(a):
        mine, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(other, torch.Tensor):
            assert mine.dtype == torch.int64 and torch.equal(mine, other), field.name
        else:
            assert np.array_equal(mine, other), field.name


def test_the_share_of_padding_is_that_of_the_batches(block_dataset):  # noqa: F811
    for options in (
        {},
        dict(drop_remainder=True),
        dict(required_batch_size_multiple=1, sample_break_mode="none"),
    ):
        dataset = block_dataset(**options)
        batches = [dataset.batch(ids, 1) for ids in dataset.epoch_batches(1)]
        pads, places = (
            sum(int((b.target == PAD).sum()) for b in batches),
            sum(b.target.size for b in batches),
        )
        assert padding(dataset) == pytest.approx(pads / places, abs=1e-12)


def test_deterministic_changes_nothing_on_a_cpu():
    open_device(DeviceConfig(device="cpu", deterministic=True))
    assert (
        not torch.are_deterministic_algorithms_enabled()
        and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    )


# ---------------------------------------------------------------------------------------------- on the fake card


@pytest.fixture(scope="module", params=[("bf16", 0), ("bf16", 5), ("fp16", 5), ("off", 5)], ids=str)
def recorded(request, tmp_path_factory):
    """(amp, whether there was padding, the host batch, what an update asked of the card)."""
    amp, pads = request.param
    with fake_gpu.fake_run(
        tmp_path_factory.mktemp("fake"), *MODEL, "--amp", amp, vocabulary=100
    ) as (run, corpus):
        batch = padded(batch_of(corpus), pads) if pads else batch_of(corpus)
        return amp, pads, batch, fake_gpu.record_update(run, [batch])


def batch_of(corpus: Corpus):
    dataset = corpus.split("train")
    return dataset.batch(dataset.epoch_batches(1)[0], 1)


def padded(batch, pads: int):
    """The batch with its first block cut short, and none of the places in the loss where it was."""
    source, target = batch.source.copy(), batch.target.copy()
    source[0, -pads:] = target[0, -pads:] = PAD
    kept = source.ravel()[batch.masked] != PAD
    places = {name: getattr(batch, name)[kept] for name in ("masked", "target_places", "chosen")}
    return dataclasses.replace(
        batch, source=source, target=target, source_padded=True, target_padded=True, **places
    )


def check_nothing_waits_for_the_card_and_a_batch_is_one_upload(recorded):
    amp, _, batch, record = recorded
    assert record.waits == ["_local_scalar_dense"] * (amp == "fp16")  # whether gradients overflowed
    arrays = [batch.source, batch.target, batch.masked, batch.target_places, batch.chosen]
    assert record.uploads == [(sum(a.nbytes for a in arrays), False)]


def check_matmuls_have_the_shapes_of_the_formula_in_the_type_of_the_precision(recorded):
    amp, _, batch, record = recorded
    P, M, L = batch.source.size, len(batch.masked), LAYERS  # places of the batch, and masked ones
    forward = {
        (P, C, 3 * C): L,
        (P, C, C): L - 1,
        (P, C, FFN): L - 1,
        (P, FFN, C): L - 1,
    }  # (rows, from, to)
    forward |= {(M, C, C): 1, (M, C, FFN): 1, (M, FFN, C): 1}  # the last layer
    head = {(M, C, 2 * C): 1, (M, 2 * C, C): 1}
    student, expected = Counter(forward) + Counter(head), Counter(forward)
    for (n, a, b), count in student.items():  # forward, and the gradients of input and weight
        for shape in ((n, a, b), (n, b, a), (b, n, a)):
            expected[shape] += count
    linear = [call for call in record.calls if call.name in ("mm", "addmm")]
    got = Counter((*call.inputs[-2][1], call.inputs[-1][1][1]) for call in linear)
    assert got == expected
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
    for call in record.calls:
        if call.name in fake_gpu.MATMULS:
            floats = [x for x in call.inputs + call.outputs if x[0].is_floating_point and x[1]]
            # a flash or efficient kernel also returns, and takes back, the logarithms of its sums
            assert {
                t for t, shape in floats if len(shape) != 3 or call.name in ("mm", "addmm", "bmm")
            } == {wanted}, call
        assert all(t != torch.float64 for t, shape in call.inputs + call.outputs if shape), (
            call
        )  # but a loss scale


def check_autocast_casts_up_only_where_its_rules_say_so(recorded):
    amp, _, batch, record = recorded
    up, normed, M = [], [], len(batch.masked)
    for call in record.calls:
        if call.part != "backward" and call.name == "_to_copy" and call.inputs[0][0].itemsize == 2:
            up.append(call.inputs[0][1])
        if call.name in ("native_layer_norm", "smooth_l1_loss"):
            normed += [t for t, _ in call.inputs]
    assert set(normed) == {torch.float32}
    # what enters the loss: the teacher's layers, stacked, and the prediction; the hidden states are float32 anyway
    assert up == ([] if amp == "off" else [(LAYERS, M, C), (M, C)])


def check_attention_is_the_flash_kernel_without_padding_and_a_mask_is_made_once_for_all_layers(
    recorded,
):
    amp, pads, _, record = recorded
    flash = amp != "off" and not pads
    kind = "flash" if flash else "efficient"
    names = Counter(call.name for call in record.calls if "attention" in call.name)
    assert names == {f"_scaled_dot_product_{kind}_attention": 2 * LAYERS} | {
        f"_scaled_dot_product_{kind}_attention_backward": LAYERS
    }
    made = Counter(
        call.name
        for call in record.calls
        if call.name in ("masked_fill_", "where", "constant_pad_nd")
    )
    assert made == ({"masked_fill_": 2} if pads else {})  # the student's and the teacher's


def check_an_update_launches_no_more_than_it_did(recorded):
    """Of two layers; `python -m test.fake_gpu` shows them by name."""
    amp, pads, _, record = recorded
    most = {("bf16", 0): 235, ("bf16", 5): 249, ("fp16", 5): 259, ("off", 5): 172}
    assert len(record.calls) <= most[amp, pads], Counter(call.name for call in record.calls)


def check_the_table_of_operators_is_printed(capsys):
    fake_gpu.main([*MODEL, "--amp", "bf16", "--batch_size", "2"])
    printed = capsys.readouterr().out
    assert (
        re.match(r"2\d\d operators: .*teacher \d+, student \d+, backward \d+", printed)
        and "waits: []" in printed
    )
    assert (
        f"addmm                                        bfloat16[{3 * C}] bfloat16[{2 * T}, {C}]"
        in printed
    )


def check_deterministic_is_set_before_cuda_starts():
    assert not torch.cuda.is_initialized()
    open_device(DeviceConfig(device="cuda", deterministic=True))
    assert (
        torch.are_deterministic_algorithms_enabled()
        and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    )


# -------------------------------------------------------------------------------------------- a process for the checks


def test_the_checks_pass_on_a_fake_card():
    if not torch.__version__.startswith("2.13.") or torch.version.cuda is not None:
        pytest.skip("the fake GPU is made for a CPU build of torch 2.13")
    flags = "-q -p no:cacheprovider -p no:xdist -W ignore -o python_functions=check_".split()
    command = [sys.executable, "-m", "pytest", *flags, __file__]
    env = {**os.environ, "GPU_CHECKS": "1"}
    run = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and re.search("22 passed", run.stdout), (
        run.stdout[-6000:] + run.stderr[-2000:]
    )
