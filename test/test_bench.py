"""The benchmark counts FLOPs as torch does, times the named parts, and compares steps that do the
same."""

import json
import time

import bench
import train
from config import InputError
from data import Corpus
from hardware.flops import PARTS_OF_AN_UPDATE, update_flops
from test.helpers import COPIES, CPU, FEW, call, config_of, make_run

import numpy as np
import pytest
import torch
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

FIGURES = ("fps", "wps", "ups", "model_tflops", "matmul_peak_tflops", "peak_memory_bytes")
SMALL = (*FEW, "--updates", "2", "--warmup", "1", "--vocabulary", "100")


def json_of(*argv) -> dict:
    return json.loads(call(bench.main, *SMALL, *argv).splitlines()[-1])


@pytest.mark.parametrize("teacher_input", ["full", "masked"])
def test_the_plain_step_trains_as_train_update_does(corpus_dir, teacher_input):
    fast = dict(warmup_updates=1, lr=1e-2, ema_decay=0.9)
    run, dataset = make_run(corpus_dir, teacher_input=teacher_input, **fast)
    plain = bench.Plain(run, len(dataset.dictionary))
    for ids in dataset.epoch_batches(1)[:4]:
        batch = dataset.batch(ids, 1)
        loss = float(train.update(run, [batch]).step.loss)
        assert float(plain.update([batch])) == pytest.approx(loss, rel=1e-4)
    for ours, theirs in ((run.student, plain.student), (run.teacher, plain.teacher)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_bench_prints_a_table_and_one_line_of_json(corpus_dir):
    for result in (json_of(), json_of("--data_path", corpus_dir)):
        assert all(result[name] > 0 for name in FIGURES)
        assert tuple(result["ms_parts"]) == PARTS_OF_AN_UPDATE
        assert result["ms_parts"]["data"] > 0
    for flag in (["--mlm_weight", "1"], ["--instance_norm_targets", "yes"], ["--objective", "mlm"]):
        with pytest.raises(InputError, match="--compare: .* --mlm_weight 0.0"):
            json_of("--compare", *flag)
    result = json_of("--compare")
    for name in ("ms", "other_ms", "ratio"):
        low, high = result[f"{name}_range"]
        assert 0 < low <= result[name] <= high


def test_each_worker_has_full_batches_of_random_data(tmp_path):
    cfg = bench.synthetic(config_of("--data_path", tmp_path, *FEW), 100, workers=3)
    dataset = Corpus(cfg.data).split("train")
    counts = [[len(ids) for ids in dataset.epoch_batches(1, rank, 3)] for rank in range(3)]
    assert counts[0] == counts[1] == counts[2] and min(counts[0]) == max(counts[0]) > 0


def test_parts_are_timed_by_their_names_and_a_part_without_a_name_is_0():
    def work():
        for _ in range(2):  # batches
            with record_function("teacher"):
                time.sleep(0.01)
        with record_function("student"), record_function("a part of the student"):
            time.sleep(0.01)

    parts = bench.time_parts(CPU, work, 3)
    assert parts["teacher"] >= 20 and 10 <= parts["student"] < parts["teacher"]
    assert parts["data"] == parts["backward"] == parts["optimizer"] == parts["ema"] == 0


NORMS = dict(instance_norm_targets=True)  # over all places of a block
DEEP = COPIES | dict(decoder_layers=3, head_layers=3)
ONE, FOUR = DEEP | dict(decoder_groups=1), DEEP | dict(clone_batch=2, decoder_groups=4)


@pytest.mark.parametrize(
    "options", [{}, dict(mlm_weight=1), dict(objective="mlm"), NORMS, ONE, FOUR]
)
def test_the_flop_formula_gives_what_torch_counts(corpus_dir, monkeypatch, options):
    run, dataset = make_run(corpus_dir, **options)
    batch = dataset.batch(np.array([int(dataset.lengths.argmax())]), 1)
    # as plain matmuls, because torch does not count its fused CPU kernels
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        train.update(run, [batch])
    # torch counts the gradient of a convolution's weight as if it had one group
    forward = counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0)
    more = (run.cfg.model.decoder_groups - 1) * forward
    assert update_flops([batch], run) == counter.get_total_flops() - more
