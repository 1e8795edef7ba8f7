"""Several workers: equal to one, resumed, stopped together; the data position when their number
changes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import train
from config import InputError
from run import checkpoint
from test.helpers import (
    HERE,
    call,
    compare_checkpoints,
    few,
    make_dataset,
    make_run,
    progress_of,
    rows_of,
    speed_aside,
    terminate_after,
    torchrun,
    torchrun_command,
)

import numpy as np
import pytest

LAST = "checkpoint_last.pt"


def test_three_workers_with_uneven_shards_equal_one_worker(corpus_dir, tmp_path):
    # of 16 batches: two shards end with no batch
    assert len(make_run(corpus_dir, max_tokens=224)[1].batch_ends) == 16
    argv = "--max_epoch 1 --max_update 100 --max_tokens 224".split()
    size = ["--distributed_training.distributed_world_size", 3]  # as fairseq's command has it
    result = torchrun(3, *few(corpus_dir, tmp_path / "three", *argv, *size))
    assert result.returncode == 0, result.stderr
    call(train.main, *few(corpus_dir, tmp_path / "one", *argv, "--update_freq", 3))
    one, three = rows_of(tmp_path / "one"), rows_of(tmp_path / "three")
    assert len(one) == 6
    for a, b in zip(one, three, strict=True):
        assert all(a[k] == b[k] for k in ("sample_size", "nsentences", "ntokens", "num_updates"))
        assert all(a[k] == b[k] for k in ("lr", "ema_decay"))
        assert all(a[k] == pytest.approx(b[k], rel=2e-5) for k in ("loss", "gnorm"))
    valid = [rows_of(tmp_path / name, "valid_loss")[0] for name in ("one", "three")]
    assert valid[0] == pytest.approx(valid[1], rel=1e-4)
    compare_checkpoints(tmp_path / "one" / LAST, tmp_path / "three" / LAST, exactly=False)


def test_two_workers_resume_bit_for_bit(corpus_dir, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = "--max_update 12 --save_interval_updates 3 --keep_interval_updates -1 --dropout 0.1"
    result = torchrun(2, *few(corpus_dir, whole, *argv.split()))  # about eight updates an epoch
    assert result.returncode == 0, result.stderr
    parts.mkdir()
    for name in ("train.jsonl", "checkpoint_1_3.pt", "checkpoint_1_6.pt"):
        shutil.copy(whole / name, parts)
    result = torchrun(2, *few(corpus_dir, parts, *argv.split()))
    assert result.returncode == 0 and "at update 6, epoch 1" in result.stdout, result.stdout
    compare_checkpoints(whole / LAST, parts / LAST)
    assert speed_aside(rows_of(whole)) == speed_aside(rows_of(parts))


def test_an_error_in_one_worker_ends_all_within_seconds(corpus_dir, tmp_path):
    folder = shutil.copytree(corpus_dir, tmp_path / "set")
    items = np.memmap(folder / "train.bin", np.uint16, "r+")
    items[len(items) // 2] = 999  # in a block that only one of the workers reads
    result = torchrun(2, *few(folder, tmp_path / "run", "--max_update", 1000))  # has a time limit
    assert result.returncode != 0
    assert re.search(r"^train\.py: error: .*token id 999", result.stderr, re.M)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_to_torchrun_stops_all_workers_at_the_same_update_with_a_checkpoint(
    corpus_dir, tmp_path, number
):
    command = torchrun_command(2, *few(corpus_dir, tmp_path, "--max_update", 100000))
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process = subprocess.Popen(command, **streams)
    terminate_after(process, "update 3 ", number)
    assert progress_of(tmp_path)["num_updates"] == rows_of(tmp_path)[-1]["num_updates"] >= 3


def test_one_worker_continues_where_two_were_in_the_epoch(corpus_dir, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    result = torchrun(2, *few(corpus_dir, two, "--max_update", 3))
    assert result.returncode == 0, result.stderr
    for folder in (two, one):
        call(train.main, *few(corpus_dir, folder, "--max_update", 6, "--update_freq", 2))
    for a, b in zip(rows_of(two), rows_of(one), strict=True):
        assert a["sample_size"] == b["sample_size"] and a["num_updates"] == b["num_updates"]
        # the first part's schedule ended at its own max_update: the losses agree until there
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4 if a["num_updates"] <= 3 else 0.1)

    # more workers than batches are done: the next epoch all the same
    call(train.main, *few(corpus_dir, tmp_path / "more", "--max_update", 1))
    more = few(corpus_dir, tmp_path / "more", "--max_update", 2, "--reset_data_position")
    assert torchrun(2, *more).returncode == 0 and rows_of(tmp_path / "more")[-1]["epoch"] == 2

    # 12 batches are done, so three workers can continue; five cannot
    assert progress_of(one)["batches"] == 12
    argv = few(corpus_dir, one, "--max_update", 7)
    result = torchrun(5, *argv)
    assert result.returncode != 0 and "world_size was 1, is 5" in result.stderr
    result = torchrun(3, *argv)
    assert result.returncode == 0, result.stderr
    last = rows_of(one)[-1]
    assert (last["num_updates"], last["epoch"]) == (7, 1)


def test_settings_that_move_the_data_position_are_refused_by_name_or_reset_it(
    saved, corpus_dir, tmp_path
):
    folder = shutil.copytree(saved, tmp_path / "run")
    other, _ = make_dataset(tmp_path / "other", seed=5)
    reset = "--reset_data_position"
    for argv, fact in (
        (["--max_tokens", 128], f"max_tokens was 256, is 128.*{reset}"),
        (["--seed", 7], f"seed was 1, is 7.*{reset}"),
        (["--tokens_per_sample", 16], f"tokens_per_sample was 32, is 16.*{reset}"),
        (["--data_path", other], f"sentences was.*{reset}"),
        (["--embed_dim", 32, reset], "embed_dim was 16, is 32"),
    ):
        with pytest.raises(InputError, match=fact):
            train.main(few(corpus_dir, folder, "--max_update", 6, *argv))
    argv = ["--max_update", 6, "--max_tokens", 128, "--lr", 0.01, reset]
    printed = call(train.main, *few(corpus_dir, folder, *argv))
    assert re.search("^note: changed since the checkpoint: .*lr was .*, is 0.01", printed, re.M)
    places = [(row["num_updates"], row["epoch"]) for row in rows_of(folder)]
    assert places[-3:] == [(4, 1), (5, 2), (6, 2)]


def test_a_changed_second_folder_and_a_position_beyond_the_epoch_are_refused(corpus_dir, tmp_path):
    folder = tmp_path / "run"
    second, sentences = make_dataset(tmp_path / "second", seed=5)
    first = len(make_run(corpus_dir)[1].batch_ends)
    argv = few(f"{corpus_dir}:{second}", folder, "--disable_validation", "--max_update")
    call(train.main, *argv, first + 8)
    content = checkpoint.load(folder / LAST).content
    assert (content["progress"]["epoch"], content["progress"]["batches"]) == (2, 8)
    make_dataset(second, sentences[: len(sentences) // 3])
    with pytest.raises(InputError, match="a further folder .* changed.*--reset_data_position"):
        train.main([*argv, str(first + 9)])
    # 0.1.0 kept no digest of the others, only the position tells
    del content["progress"]["data"]["other_folders"], content["format"]
    checkpoint.save(content, folder / LAST)
    with pytest.raises(InputError, match=r"batch 8 of epoch 2, .* \d; .*--reset_data_position"):
        train.main([*argv, str(first + 9)])
    assert "epoch 3" in call(train.main, *argv, first + 9, "--reset_data_position")


def run_workers(argvs: list, setup: str = "") -> list:
    """train.py to its end in a process for each list of arguments, without torchrun.

    setup: code to run before it. Returns (standard error, exit code) of each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    imports = "import datetime, os, time, train\nfrom hardware import device, opening\n"
    code = f"{imports}from run import flags, guard\n{setup}\nflags.program(train.main)"
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(len(argvs)))
    shared |= dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    started = []
    for rank, argv in enumerate(argvs):
        env = {**os.environ, **shared, "RANK": str(rank)}
        options = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], **options))
    return [(process.communicate(timeout=300)[1], process.returncode) for process in started]


def test_workers_that_disagree_end_all_at_once_with_the_fields_name(saved, corpus_dir, tmp_path):
    other = make_dataset(tmp_path / "other", seed=5)[0]
    shutil.copytree(saved, tmp_path / "run")
    same = few(corpus_dir, tmp_path / "run", "--max_update", 6)
    for changed, name in (
        (["--lr", 0.1], "lr, here 0.1"),
        (["--data_path", other], "sentences"),
        (["--save_dir", tmp_path / "none"], "num_updates, here 0"),
    ):
        ends = run_workers([same, [*same, *changed, "--reset_data_position"]])
        assert [code for _, code in ends] == [1, 1], ends
        for text, _ in ends:
            assert re.search("^-c: stopped: worker .: the workers differ in ", text, re.M)
        assert f"worker 1: the workers differ in {name}" in ends[1][0]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {".lock", *(path.name for path in saved.iterdir())}


def test_a_worker_that_does_not_answer_ends_the_others_in_one_line(corpus_dir, tmp_path):
    setup = (
        "opening.WORKER_TIMEOUT = device.WORKER_TIMEOUT = datetime.timedelta(seconds=8)\n"
        "update = train.update\n"
        "def late(run, batches):\n"
        "    time.sleep(14 * (os.environ['RANK'] == '1' and run.num_updates == 2))\n"
        "    return update(run, batches)\n"
        "train.update = late"
    )
    ends = run_workers([few(corpus_dir, tmp_path, "--max_update", 4)] * 2, setup)
    text, code = ends[0]
    assert code == 1 and text.count("\n") == 1
    assert text.startswith("-c: stopped: worker 0: no answer from another worker for 0:00:08")
    text, code = ends[1]
    assert code == 1 and re.search("^-c: stopped: worker 1: another worker ended", text, re.M)
    assert progress_of(tmp_path)["num_updates"] == 2


def test_workers_whose_clocks_differ_stop_after_the_same_update_with_the_same_rates(
    corpus_dir, tmp_path
):
    setup = (
        # hours of an update
        "hours = [0.01, 0.125][int(os.environ['RANK'])]\n"
        "guard.Clock.now = lambda clock: clock.hours + hours\n"
        "update = train.update\n"
        "def tell(run, batches):\n"
        "    done = update(run, batches)\n"
        "    os.write(2, f'rate {done.lr!r}\\n'.encode())\n"
        "    return done\n"
        "train.update = tell"
    )
    ends = run_workers([few(corpus_dir, tmp_path, "--max_hours", 1)] * 2, setup)
    assert [code for _, code in ends] == [0, 0], ends
    rows = rows_of(tmp_path)
    assert [row["hours"] for row in rows] == [i / 8 for i in range(1, 9)]
    for text, _ in ends:
        assert re.findall("^rate (.*)$", text, re.M) == [repr(row["lr"]) for row in rows]


@pytest.mark.parametrize("ending, code", [("pass", 0), ("raise config.RunError('no')", 1)])
def test_a_worker_leaves_before_python_ends_since_torchs_threads_may_abort_it_there(ending, code):
    program = (
        "import atexit, os, config\nfrom run import flags\n"
        "atexit.register(os.write, 2, b'AT EXIT')\n"
        f"def main():\n    print('the last line')\n    {ending}\n    return 0\n"
        "flags.program(main)"
    )
    alone = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}
    for env in (alone, {**alone, "MASTER_ADDR": "127.0.0.1"}):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, "the last line\n")
        assert ("AT EXIT" in done.stderr) == ("MASTER_ADDR" not in env)
