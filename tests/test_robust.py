"""Nothing is ever lost: crashes, full disks, damaged and hostile files, signals, bad numbers, several workers.

The long versions are in tests/soak.py.
"""

import dataclasses
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import train
from config import InputError, RunError
from compat import fairseq_names
from runtime import checkpoint, guard
from tests import soak
from tests.helpers import (
    CPU,
    FEW,
    GOLDEN,
    HERE,
    call,
    compare_checkpoints,
    copy_of_the_project,
    golden,
    make_dataset,
    make_run,
    rows_of,
    torchrun,
    torchrun_command,
)


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("corpus"))[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, corpus_dir):
    """A finished run of four updates with its interval checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    call(
        train.main,
        *FEW,
        "--data_path",
        corpus_dir,
        "--save_dir",
        folder,
        "--max_update",
        4,
        "--save_interval_updates",
        1,
        "--keep_interval_updates",
        3,
    )
    return folder


def few(corpus_dir, folder, *argv):
    return [str(a) for a in (*FEW, "--data_path", corpus_dir, "--save_dir", folder, *argv)]


def speed_aside(rows):
    return [{k: v for k, v in row.items() if k not in ("fps", "ups", "wps", "wall")} for row in rows]


# ---------------------------------------------------------------------------------------------- files


def test_resume_falls_back_to_the_next_older_good_file_and_says_so(saved, corpus_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    (folder / "checkpoint_last.pt.tmp").write_text("a broken save")

    def spoil(name, part=2):
        raw = bytearray((folder / name).read_bytes())
        middle = len(raw) // part
        raw[middle : middle + 400] = bytes(400)  # a single byte could be padding between two records
        (folder / name).write_bytes(raw)

    spoil("checkpoint_last.pt")
    spoil("checkpoint_1_4.pt")
    (folder / "checkpoint_best.pt").unlink()
    printed = call(train.main, *few(corpus_dir, folder, "--max_update", 5))
    assert re.search(r"checkpoint_last\.pt: damaged.*trying the next older", printed)
    assert re.search(r"continuing .*checkpoint_1_3\.pt behind update 3", printed)
    assert [row["num_updates"] for row in rows_of(folder)] == [1, 2, 3, 4, 5]
    assert not list(folder.glob("*.tmp"))
    whole = tmp_path / "whole"
    shutil.copytree(saved, whole)
    call(train.main, *few(corpus_dir, whole, "--max_update", 5))
    assert [row["num_updates"] for row in rows_of(whole)] == [1, 2, 3, 4, 5]

    for path in folder.glob("*.pt"):
        spoil(path.name, 3)
    before = sorted(p.name for p in folder.glob("*.pt"))
    with pytest.raises(InputError, match=f"none of the {len(before)} checkpoints"):
        call(train.main, *few(corpus_dir, folder, "--max_update", 6))
    assert sorted(p.name for p in folder.glob("*.pt")) == before


def test_a_bad_block_in_the_middle_of_a_run_costs_no_update(corpus_dir, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(corpus_dir, folder)
    dataset = make_run(folder)[1]
    block = int(dataset.epoch_batches(1)[5][0])  # of the sixth batch
    items = np.fromfile(folder / "train.bin", np.uint16)
    items[dataset.starts[block]] = 999
    items.tofile(folder / "train.bin")
    with pytest.raises(InputError, match="holds token id 999"):
        call(train.main, *few(folder, tmp_path / "run", "--max_update", 100))
    assert checkpoint.load(tmp_path / "run" / "checkpoint_last.pt").content["progress"]["num_updates"] == 5


def test_a_killed_run_always_leaves_a_checkpoint_that_loads(corpus_dir, tmp_path):
    figures = soak.kills(3, tmp_path, corpus_dir)
    # of two updates: the one computed last, and the one whose save was under way meanwhile
    assert figures["kills"] == 3 and figures["lost"] == 0 and figures["most_updates_repeated"] <= 2


def test_mutated_datasets_and_checkpoints_load_or_give_our_error(tmp_path):
    figures = soak.fuzz(400, 40, tmp_path, seed=1)
    assert figures["datasets"] == 400 and figures["checkpoints"] == 40 and figures["other_errors"] == []
    assert figures["dataset_errors"] > 100 and figures["checkpoint_errors"] > 10


# ---------------------------------------------------------------------------------------------- hostile files


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_loading_never_runs_code_from_a_file(tmp_path):
    for name, options in (("zip", {}), ("old", {"_use_new_zipfile_serialization": False})):
        mark = tmp_path / f"ran_{name}"
        content = {"model": {"encoder.sentence_encoder.layernorm_embedding.bias": torch.ones(2)}, "args": Payload(mark)}
        torch.save(content, tmp_path / f"{name}.pt", **options)
        with pytest.raises(InputError, match="no config"):
            checkpoint.load(tmp_path / f"{name}.pt")
        with open(tmp_path / f"{name}.pkl", "wb") as f:
            pickle.dump(content, f)
        with pytest.raises(InputError):
            checkpoint.load(tmp_path / f"{name}.pkl")
        assert not mark.exists()
        torch.load(tmp_path / f"{name}.pt", weights_only=False)
        assert mark.exists()  # the payload is a working one


def test_a_pickle_cannot_ask_for_memory_that_its_size_does_not_justify(tmp_path):
    # LONG_BINPUT stores an object under a number of the file's choice; C's unpickler makes a table that long
    (tmp_path / "bomb.pt").write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError):
        checkpoint.load(tmp_path / "bomb.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@golden
@pytest.mark.parametrize("zipped", [True, False])
def test_older_fairseq_files_load_with_their_foreign_objects_left_out(tmp_path, corpus_dir, zipped):
    import argparse
    import collections

    content = torch.load(GOLDEN / "checkpoint" / "fairseq_doc128.pt", weights_only=True)
    weights = dict(content["model"])
    content["args"] = argparse.Namespace(arch="roberta", lr=[0.1])
    content["extra_state"]["best"] = np.float64(1.9)
    content["extra_state"]["meters"] = {"loss": np.arange(3.0), "other": collections.Counter("abc")}
    content["task_state"] = {
        "what": dataclasses.make_dataclass("DictConfig", ["x"], namespace={"__module__": "test_robust"})
    }
    globals()["DictConfig"] = content["task_state"]["what"]  # so that it can be pickled
    content["task_state"]["what"] = content["task_state"]["what"](1)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "old.pt", weights_only=True)
    loaded = checkpoint.load(tmp_path / "old.pt")
    theirs = fairseq_names.to_reference(loaded.student, loaded.teacher)
    assert all(torch.equal(theirs[k], v) for k, v in weights.items() if k != "encoder._ema")
    assert loaded.kind == "fairseq" and not isinstance(loaded.content["args"], argparse.Namespace)


def test_odd_characters_neither_break_a_line_nor_leave_the_save_directory(tmp_path, capsys):
    folder, _ = make_dataset(tmp_path / "a\nb \x1b[31mc")
    words = (folder / "dict.txt").read_text().splitlines()
    words[0] = "\x1b[2J\x07../../x 9"
    (folder / "dict.txt").write_text("\n".join(words) + "\n")
    printed = call(data.main, "--data_path", folder)
    assert "\x1b" not in printed and "\x07" not in printed
    where = tmp_path / "o\nut" / "run"
    printed = call(train.main, *few(folder, where, "--max_update", 1))
    assert "\x1b" not in printed and all(p.parent == where for p in tmp_path.rglob("*.pt"))
    result = subprocess.run(
        [sys.executable, HERE / "data.py", "--data_path", f"{folder}\nx"], capture_output=True, text=True
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "\x1b" not in result.stderr


# ---------------------------------------------------------------------------------------------- position


def test_a_changed_position_is_refused_by_name_or_reset(saved, corpus_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    other, _ = make_dataset(tmp_path / "other", seed=5)
    for argv, names in (
        (["--max_tokens", 128], "max_tokens was 256, is 128"),
        (["--seed", 7], "seed was 1, is 7"),
        (["--tokens_per_sample", 16], "tokens_per_sample was 32, is 16"),
        (["--data_path", other], "sentences was"),
    ):
        with pytest.raises(InputError, match=names + ".*--reset_data_position"):
            call(train.main, *few(corpus_dir, folder, "--max_update", 6, *argv))
    with pytest.raises(InputError, match="embed_dim was 16, is 32"):
        call(train.main, *few(corpus_dir, folder, "--max_update", 6, "--embed_dim", 32, "--reset_data_position"))
    printed = call(
        train.main,
        *few(corpus_dir, folder, "--max_update", 6, "--max_tokens", 128, "--lr", 0.01, "--reset_data_position"),
    )
    assert "note: changed since the checkpoint: lr" in printed
    assert [(row["num_updates"], row["epoch"]) for row in rows_of(folder)][-3:] == [(4, 1), (5, 2), (6, 2)]


def test_one_worker_continues_what_two_began_at_the_same_point_of_the_epoch(corpus_dir, tmp_path):
    argv = few(corpus_dir, tmp_path / "two", "--save_interval_updates", 3)
    result = torchrun(2, *argv, "--max_update", 3)
    assert result.returncode == 0, result.stderr
    call(train.main, *argv, "--max_update", 6, "--update_freq", 2)
    call(train.main, *few(corpus_dir, tmp_path / "one", "--max_update", 6, "--update_freq", 2))
    for a, b in zip(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"), strict=True):
        assert a["sample_size"] == b["sample_size"] and a["num_updates"] == b["num_updates"]
        # the schedule of the first part ended at its own max_update, so losses agree only up to there
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4 if a["num_updates"] <= 3 else 0.1)
    shutil.copytree(tmp_path / "one", tmp_path / "odd")  # 12 batches done: three workers fit, five do not
    device = dataclasses.replace(CPU, world_size=5)
    run, _ = make_run(corpus_dir, **{"layers": 2})
    run.device = device
    loaded = checkpoint.load(tmp_path / "odd" / "checkpoint_last.pt")
    run.cfg = train.Config(*train.config.parse(train.PARTS, "", few(corpus_dir, tmp_path / "odd"))[0])
    corpus = data.Corpus(run.cfg.data)
    assert loaded.content["progress"]["batches"] == 12
    with pytest.raises(InputError, match="world_size was 1, is 5"):
        train.resume(run, corpus, loaded.content["progress"]["data"], tmp_path, loaded, False, print)
    run.device = dataclasses.replace(CPU, world_size=3)
    train.resume(run, corpus, loaded.content["progress"]["data"], tmp_path, loaded, False, print)
    assert run.batches_done == 4


# ---------------------------------------------------------------------------------------------- signals


def signal_at(monkeypatch, moments: dict):
    """Send this process signals while it computes certain updates: {update number: [signals]}."""
    update = train.update

    def wrapped(run, *rest):
        for number in moments.pop(run.num_updates + 1, []):
            os.kill(os.getpid(), number)
        return update(run, *rest)

    monkeypatch.setattr(train, "update", wrapped)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_update_saves_and_the_run_goes_on_exactly(monkeypatch, corpus_dir, tmp_path, number):
    call(train.main, *few(corpus_dir, tmp_path / "whole", "--max_update", 30, "--dropout", 0.1))
    signal_at(monkeypatch, {3: [number], 21: [number]})
    before = signal.getsignal(number)
    for expected in (3, 21):
        assert train.main(few(corpus_dir, tmp_path / "parts", "--max_update", 30, "--dropout", 0.1)) == 128 + number
        progress = checkpoint.load(tmp_path / "parts" / "checkpoint_last.pt").content["progress"]
        assert progress["num_updates"] == expected and signal.getsignal(number) is before
    assert train.main(few(corpus_dir, tmp_path / "parts", "--max_update", 30, "--dropout", 0.1)) == 0
    compare_checkpoints(tmp_path / "whole" / "checkpoint_last.pt", tmp_path / "parts" / "checkpoint_last.pt")
    assert speed_aside(rows_of(tmp_path / "whole")) == speed_aside(rows_of(tmp_path / "parts"))


def test_sigusr1_saves_and_the_run_goes_on(monkeypatch, corpus_dir, tmp_path, capsys):
    signal_at(monkeypatch, {2: [signal.SIGUSR1]})
    seen = []
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint,
        "save",
        lambda content, *paths: (seen.append(content["progress"]["num_updates"]), save(content, *paths))[1],
    )
    assert train.main(few(corpus_dir, tmp_path, "--max_update", 4)) == 0
    assert seen == [2, 4]


def test_an_echo_of_a_signal_is_not_a_second_one():
    with guard.Signals(echo=30.0) as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop == signal.SIGTERM


def test_run_1p_passes_signals_on_and_the_run_saves(corpus_dir, tmp_path):
    env = copy_of_the_project(tmp_path)
    argv = few(corpus_dir, tmp_path / "run", "--max_update", 100000)
    process = subprocess.Popen(
        ["bash", tmp_path / "run_1p.sh", "full", *argv], stdout=subprocess.PIPE, text=True, env=env
    )
    terminate_behind(process, "update 3 ")
    assert process.returncode == 128 + signal.SIGTERM
    assert checkpoint.load(tmp_path / "run" / "checkpoint_last.pt").content["progress"]["num_updates"] >= 3


def test_output_that_nobody_reads_does_not_end_a_run(corpus_dir, tmp_path):
    process = start(*few(corpus_dir, tmp_path, "--max_update", 60))
    wait_for(process, "update 2 ")
    process.stdout.close()
    assert process.wait(60) == 0
    assert checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"] == 60


def start(*argv):
    return subprocess.Popen(
        [sys.executable, HERE / "train.py", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended before {text!r}")


def terminate_behind(process, text):
    try:
        wait_for(process, text)
        process.terminate()
        process.communicate(timeout=60)
    finally:
        process.kill()


def test_a_second_signal_ends_at_once_and_a_second_run_is_kept_out(corpus_dir, tmp_path):
    process = start(*few(corpus_dir, tmp_path, "--max_update", 100000, "--log_interval", 1))
    try:
        wait_for(process, "update 2 ")
        with pytest.raises(InputError, match=rf"in use by process {process.pid} on"):
            call(train.main, *few(corpus_dir, tmp_path, "--max_update", 1))
        os.kill(process.pid, signal.SIGSTOP)  # both signals arrive while it cannot act on the first
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(20) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    finally:
        process.kill()
        process.stdout.close()
    call(
        train.main, *few(corpus_dir, tmp_path, "--max_update", 1, "--no_resume", "--overwrite")
    )  # the lock went with it


# ---------------------------------------------------------------------------------------------- numbers


def poison(monkeypatch, numbers):
    """Make the loss of certain updates NaN, gradients included."""
    plain, current = train.data2vec_loss, []
    update = train.update
    monkeypatch.setattr(
        train, "update", lambda run, *rest: (current.append(run.num_updates + 1), update(run, *rest))[1]
    )
    monkeypatch.setattr(
        train, "data2vec_loss", lambda *a: plain(*a) * (float("nan") if current and current[-1] in numbers else 1.0)
    )


@pytest.mark.parametrize("fused", [True, False])
def test_a_non_finite_update_leaves_the_weights_alone_and_is_logged(monkeypatch, corpus_dir, tmp_path, fused):
    monkeypatch.setattr(type(CPU), "adamw_is_fused", lambda self: fused)
    poison(monkeypatch, {1, 3})
    call(
        train.main,
        *few(
            corpus_dir,
            tmp_path,
            "--max_update",
            5,
            "--disable_validation",
            "--warmup_updates",
            0,
            "--save_interval_updates",
            1,
            "--keep_interval_updates",
            -1,
        ),
    )
    assert [row["num_updates"] for row in rows_of(tmp_path, "skipped")] == [1, 3]
    assert all(len(row["blocks"]) > 0 for row in rows_of(tmp_path, "skipped"))
    assert [row["loss"] is None for row in rows_of(tmp_path)] == [True, False, True, False, False]
    states = [checkpoint.load(tmp_path / f"checkpoint_1_{u}.pt").content for u in (2, 3, 4)]
    same = [
        all(torch.equal(a["student"][k], b["student"][k]) for k in a["student"]) for a, b in zip(states, states[1:])
    ]
    assert same == [fused, False]  # without the fused kernel the moments still move the weights
    assert all(t.isfinite().all() for t in states[-1]["student"].values())
    assert states[-1]["progress"]["skipped"] == 2


def test_an_overflow_on_another_worker_skips_the_update_here_too(monkeypatch, corpus_dir):
    device = dataclasses.replace(CPU, amp=torch.float16, world_size=2)

    def all_reduce(self, tensor):  # the other worker's sums: an infinite gradient
        return tensor.index_fill_(0, torch.tensor([5]), float("inf")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(type(device), "all_reduce", all_reduce)
    run, dataset = make_run(corpus_dir, device=device)
    before = [p.detach().clone() for p in run.parameters]
    assert train.update(run, [dataset.batch(dataset.epoch_batches(1)[0], 1)]) is None
    assert run.num_updates == 0 and all(torch.equal(a, b) for a, b in zip(before, run.parameters))


def test_a_log_interval_keeps_no_predictions_but_the_last(corpus_dir, tmp_path):
    run, dataset = make_run(corpus_dir)
    log = train.Log(CPU, tmp_path / "train.jsonl")
    for ids in dataset.epoch_batches(1)[:3]:
        log.add(train.update(run, [dataset.batch(ids, 1)]))
    assert all(done.pair is None for done in log.done) and len(log.pair[0]) > 0
    assert log.write()["num_updates"] == 3


def test_too_many_skipped_updates_in_a_row_save_and_stop_with_advice(monkeypatch, corpus_dir, tmp_path):
    poison(monkeypatch, set(range(3, 100)))
    with pytest.raises(RunError, match=r"6 updates in a row.*--max_skipped 5.*lower --lr.*saved update 8"):
        call(train.main, *few(corpus_dir, tmp_path, "--max_update", 50, "--max_skipped", 5, "--log_interval", 20))
    assert checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"] == 8


def test_an_exploding_run_stops_and_keeps_the_last_good_checkpoint(corpus_dir, tmp_path):
    with pytest.raises(RunError, match="the last checkpoint stays|saved update"):
        call(
            train.main,
            *few(
                corpus_dir,
                tmp_path,
                "--max_update",
                300,
                "--lr",
                1e36,
                "--warmup_updates",
                0,
                "--max_skipped",
                3,
                "--save_interval_updates",
                1,
                "--clip_norm",
                0,
            ),
        )
    good = checkpoint.load(tmp_path / "checkpoint_last.pt")
    assert all(t.isfinite().all() for t in good.student.values())


def test_a_collapse_warns_and_after_ten_intervals_stops_with_a_checkpoint(corpus_dir, tmp_path, capsys):
    argv = few(corpus_dir, tmp_path, "--max_update", 40, "--min_target_var", 1e6, "--warmup_updates", 5)
    with pytest.raises(
        RunError, match="collapse: target_var .* under --min_target_var .* for 10 log intervals.*saved update 15"
    ):
        train.main(argv)
    assert capsys.readouterr().out.count("may be collapsing") == 9
    assert checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"] == 15
    health = guard.Health(guard.GuardConfig(min_target_var=0, min_pred_var=0), 0)
    assert health.collapsed(dict(num_updates=9, target_var=0.0, pred_var=0.0), print) is None


def test_out_of_memory_says_what_was_tried_and_what_helps(monkeypatch, corpus_dir, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(train, "teacher_targets", full)
    with pytest.raises(
        RunError, match=r"out of memory at update 1: batch of \d+ x \d+ tokens, peak [\d.]+ GiB; lower --max_tokens"
    ):
        call(train.main, *few(corpus_dir, tmp_path, "--max_update", 2))


# ---------------------------------------------------------------------------------------------- several workers


def test_three_workers_with_uneven_shards_equal_one_over_the_same_batches(corpus_dir, tmp_path):
    counts = {n: len(make_run(corpus_dir, max_tokens=n)[1].batch_ends) for n in range(200, 300, 4)}
    max_tokens, batches = next((n, count) for n, count in counts.items() if count % 3 == 1)  # two shards end empty
    argv = ["--max_epoch", 1, "--max_update", 100, "--max_tokens", max_tokens]
    result = torchrun(3, *few(corpus_dir, tmp_path / "three", *argv))
    assert result.returncode == 0, result.stderr
    call(train.main, *few(corpus_dir, tmp_path / "one", *argv, "--update_freq", 3))
    one, three = rows_of(tmp_path / "one"), rows_of(tmp_path / "three")
    assert len(one) == len(three) == -(-batches // 3)
    for a, b in zip(one, three):
        assert all(a[k] == b[k] for k in ("sample_size", "nsentences", "ntokens", "num_updates"))
        assert all(a[k] == pytest.approx(b[k], rel=2e-5) for k in ("loss", "gnorm"))
    compare_checkpoints(
        tmp_path / "one" / "checkpoint_last.pt", tmp_path / "three" / "checkpoint_last.pt", exactly=False
    )


def test_two_workers_resume_bit_for_bit(corpus_dir, tmp_path):
    argv = ["--max_update", 12, "--save_interval_updates", 3, "--keep_interval_updates", -1, "--dropout", 0.1]
    for name in ("whole", "parts"):  # about eight updates an epoch
        result = torchrun(2, *few(corpus_dir, tmp_path / name, *argv))
        assert result.returncode == 0, result.stderr
    folder = tmp_path / "parts"
    for path in [*folder.glob("checkpoint_[bl]*"), folder / "checkpoint_2_9.pt", folder / "checkpoint_2_12.pt"]:
        path.unlink()
    result = torchrun(2, *few(corpus_dir, folder, *argv))
    assert result.returncode == 0 and "behind update 6, epoch 1" in result.stdout, result.stdout
    compare_checkpoints(tmp_path / "whole" / "checkpoint_last.pt", folder / "checkpoint_last.pt")
    assert speed_aside(rows_of(tmp_path / "whole")) == speed_aside(rows_of(folder))


def test_one_worker_s_error_ends_all_within_seconds(corpus_dir, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(corpus_dir, folder)
    items = np.fromfile(folder / "train.bin", np.uint16)
    items[len(items) // 2] = 999  # one block that only one of the workers will read
    items.tofile(folder / "train.bin")
    began = time.monotonic()
    result = torchrun(2, *few(folder, tmp_path / "run", "--max_update", 1000))
    assert result.returncode != 0 and time.monotonic() - began < 60
    assert re.search(r"^train\.py: error: .*holds token id 999", result.stderr, re.M)


def test_sigterm_to_torchrun_stops_all_workers_at_one_update_with_a_checkpoint(corpus_dir, tmp_path):
    process = subprocess.Popen(
        torchrun_command(2, *few(corpus_dir, tmp_path, "--max_update", 100000)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    terminate_behind(process, "update 3 ")
    saved = checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"]
    assert saved == rows_of(tmp_path)[-1]["num_updates"] >= 3
