"""The benchmark prints its figures, and counts FLOPs as torch does."""

import json

import bench
import train
from hardware.flops import update_flops
from test.helpers import FEW, call, make_run

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

FIGURES = ("fps", "wps", "ups", "model_tflops", "matmul_peak_tflops", "peak_memory_bytes")
SMALL = (*FEW, "--updates", "2", "--warmup", "1", "--vocabulary", "100")


def test_bench_prints_a_table_and_one_line_of_json(corpus_dir):
    for data in ((), ("--data_path", corpus_dir)):
        *table, line = call(bench.main, *SMALL, *data).splitlines()
        figures = json.loads(line)
        assert [row.split()[0] for row in table] == list(figures)
        assert all(figures[name] > 0 for name in FIGURES)
        assert figures["ms_fastest"] <= figures["ms"] <= figures["ms_slowest"]


@pytest.mark.parametrize("options", [{}, dict(mlm_weight=1), dict(objective="mlm")])
def test_the_flop_formula_gives_what_torch_counts(corpus_dir, monkeypatch, options):
    run, dataset = make_run(corpus_dir, **options)
    batch = dataset.batch(np.array([int(dataset.lengths.argmax())]), 1)
    # as plain matmuls, because torch does not count its fused CPU kernels
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        train.update(run, [batch])
    assert update_flops([batch], run) == counter.get_total_flops()
