"""The benchmark counts and compares what it says."""

import json

# must be first: device.py sets TORCH_DEVICE_BACKEND_AUTOLOAD, which torch reads on import
import numpy as np
import pytest
import torch

import bench
import train
from tests.helpers import FEW, call, make_run


@pytest.mark.parametrize("teacher_input", ["full", "masked"])
def test_the_plain_step_that_the_bench_compares_with_does_the_same(corpus_dir, teacher_input):
    run, dataset = make_run(corpus_dir, teacher_input=teacher_input, warmup_updates=1, lr=1e-2, ema_decay=0.9)
    plain = bench.Plain(run, len(dataset.dictionary))
    for ids in dataset.epoch_batches(1)[:4]:
        batch = dataset.batch(ids, 1)
        assert float(plain.update([batch])) == pytest.approx(float(train.update(run, [batch]).loss), rel=1e-4)
    for ours, theirs in ((run.student, plain.student), (run.teacher, plain.teacher)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_bench_prints_a_table_and_one_json_line_and_counts_flops_as_torch_does(corpus_dir, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    small = [*FEW, "--updates", "2", "--warmup", "1"]
    for argv in (["--vocabulary", "100"], ["--data_path", corpus_dir]):
        result = json.loads(call(bench.main, *small, *argv).splitlines()[-1])
        assert all(
            result[k] > 0 for k in ("fps", "wps", "ups", "model_tflops", "matmul_peak_tflops", "peak_memory_bytes")
        )
        assert set(result["ms_parts"]) == {"data", "teacher", "student", "backward", "optimizer", "ema"}
    run, dataset = make_run(corpus_dir)
    index = int(dataset.lengths.argmax())
    batch = dataset.batch(np.array([index]), 1)
    # attention and linear layers as plain matmuls, since torch does not count its fused kernels on the CPU
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train.update(run, [batch])
    assert bench.update_flops([batch], run) == counter.get_total_flops()
