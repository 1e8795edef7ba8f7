"""Several workers: equal to one, resumed, stopped together; and the data position when their number
changes."""

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import config
import data
import train
from config import InputError
from run import checkpoint, flags, resume
from test.helpers import (
    CPU,
    HERE,
    call,
    compare_checkpoints,
    few,
    make_dataset,
    make_run,
    rows_of,
    speed_aside,
    terminate_after,
    torchrun,
    torchrun_command,
)

import numpy as np
import pytest


def test_three_workers_with_uneven_shards_equal_one_worker(corpus_dir, tmp_path):
    counts = {n: len(make_run(corpus_dir, max_tokens=n)[1].batch_ends) for n in range(200, 300, 4)}
    max_tokens, batches = next(
        (n, count) for n, count in counts.items() if count % 3 == 1
    )  # two shards end with no batch
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
        tmp_path / "one" / "checkpoint_last.pt",
        tmp_path / "three" / "checkpoint_last.pt",
        exactly=False,
    )


def test_two_workers_resume_bit_for_bit(corpus_dir, tmp_path):
    argv = [
        "--max_update",
        12,
        "--save_interval_updates",
        3,
        "--keep_interval_updates",
        -1,
        "--dropout",
        0.1,
    ]
    for name in ("whole", "parts"):  # about eight updates an epoch
        result = torchrun(2, *few(corpus_dir, tmp_path / name, *argv))
        assert result.returncode == 0, result.stderr
    folder = tmp_path / "parts"
    for path in [
        *folder.glob("checkpoint_[bl]*"),
        folder / "checkpoint_2_9.pt",
        folder / "checkpoint_2_12.pt",
    ]:
        path.unlink()
    result = torchrun(2, *few(corpus_dir, folder, *argv))
    assert result.returncode == 0 and "at update 6, epoch 1" in result.stdout, result.stdout
    compare_checkpoints(tmp_path / "whole" / "checkpoint_last.pt", folder / "checkpoint_last.pt")
    assert speed_aside(rows_of(tmp_path / "whole")) == speed_aside(rows_of(folder))


def test_an_error_in_one_worker_ends_all_within_seconds(corpus_dir, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(corpus_dir, folder)
    items = np.fromfile(folder / "train.bin", np.uint16)
    items[len(items) // 2] = 999  # in a block that only one of the workers reads
    items.tofile(folder / "train.bin")
    began = time.monotonic()
    result = torchrun(2, *few(folder, tmp_path / "run", "--max_update", 1000))
    assert result.returncode != 0 and time.monotonic() - began < 60
    assert re.search(r"^train\.py: error: .*holds token id 999", result.stderr, re.M)


def test_sigterm_to_torchrun_stops_all_workers_at_the_same_update_with_a_checkpoint(
    corpus_dir, tmp_path
):
    process = subprocess.Popen(
        torchrun_command(2, *few(corpus_dir, tmp_path, "--max_update", 100000)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    terminate_after(process, "update 3 ")
    saved = checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"]
    assert saved == rows_of(tmp_path)[-1]["num_updates"] >= 3


def test_one_worker_continues_where_two_were_in_the_epoch(corpus_dir, tmp_path):
    argv = few(corpus_dir, tmp_path / "two", "--save_interval_updates", 3)
    result = torchrun(2, *argv, "--max_update", 3)
    assert result.returncode == 0, result.stderr
    call(train.main, *argv, "--max_update", 6, "--update_freq", 2)
    call(train.main, *few(corpus_dir, tmp_path / "one", "--max_update", 6, "--update_freq", 2))
    for a, b in zip(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"), strict=True):
        assert a["sample_size"] == b["sample_size"] and a["num_updates"] == b["num_updates"]
        # the first part's schedule ended at its own max_update, so the losses agree only until
        # there
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4 if a["num_updates"] <= 3 else 0.1)
    shutil.copytree(
        tmp_path / "one", tmp_path / "odd"
    )  # 12 batches are done: three workers can continue, five cannot
    device = dataclasses.replace(CPU, world_size=5)
    run, _ = make_run(corpus_dir, **{"layers": 2})
    run.device = device
    loaded = checkpoint.load(tmp_path / "odd" / "checkpoint_last.pt")
    run.cfg = config.Config(*flags.parse(config.PARTS, "", few(corpus_dir, tmp_path / "odd"))[0])
    corpus = data.Corpus(run.cfg.data)
    assert loaded.content["progress"]["batches"] == 12
    of_run = run, corpus, loaded.content["progress"]["data"]
    log = SimpleNamespace(say=print, restore=lambda state: None)
    with pytest.raises(InputError, match="world_size was 1, is 5"):
        resume.resume(*of_run, (tmp_path, loaded), False, log)
    run.device = dataclasses.replace(CPU, world_size=3)
    resume.resume(*of_run, (tmp_path, loaded), False, log)
    assert run.batches_done == 4


def test_settings_that_move_the_data_position_are_refused_by_name_or_reset_it(
    saved, corpus_dir, tmp_path
):
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
        call(
            train.main,
            *few(corpus_dir, folder, "--max_update", 6, "--embed_dim", 32, "--reset_data_position"),
        )
    printed = call(
        train.main,
        *few(
            corpus_dir,
            folder,
            "--max_update",
            6,
            "--max_tokens",
            128,
            "--lr",
            0.01,
            "--reset_data_position",
        ),
    )
    assert "note: changed since the checkpoint: lr" in printed
    assert [(row["num_updates"], row["epoch"]) for row in rows_of(folder)][-3:] == [
        (4, 1),
        (5, 2),
        (6, 2),
    ]


def test_a_changed_second_folder_and_a_position_beyond_the_epoch_are_refused(corpus_dir, tmp_path):
    second, sentences = make_dataset(tmp_path / "second", seed=5)
    argv = few(
        f"{corpus_dir}:{second}", tmp_path / "run", "--save_interval", 0, "--disable_validation"
    )
    first = len(make_run(corpus_dir)[1].batch_ends)
    call(train.main, *argv, "--max_update", first + 8)
    loaded = checkpoint.load(tmp_path / "run" / "checkpoint_last.pt")
    assert (loaded.content["progress"]["epoch"], loaded.content["progress"]["batches"]) == (2, 8)
    make_dataset(second, sentences[: len(sentences) // 3])
    with pytest.raises(
        InputError, match="a further folder of --data_path has changed; .*--reset_data_position"
    ):
        call(train.main, *argv, "--max_update", first + 9)
    del (
        loaded.content["progress"]["data"]["other_folders"],
        loaded.content["format"],
    )  # as 0.1.0 wrote it
    checkpoint.save(loaded.content, tmp_path / "run" / "checkpoint_last.pt")
    with pytest.raises(
        InputError, match=r"at batch 8 of epoch 2, which has \d; use --reset_data_position"
    ):
        call(train.main, *argv, "--max_update", first + 9)
    printed = call(train.main, *argv, "--max_update", first + 9, "--reset_data_position")
    assert "epoch 3" in printed


def run_workers(argvs: list, setup: str = "") -> list:
    """Runs train.py to its end in one process for each list of arguments, without torchrun; `setup`
    is code to run before it. Returns (standard error, exit code) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import os, time, datetime, config, train\nfrom hardware import device\n"
        f"from run import flags\n{setup}\nflags.program(train.main)"
    )
    shared = dict(
        WORLD_SIZE=len(argvs),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        OMP_NUM_THREADS=1,
        PYTHONPATH=HERE,
    )
    started = []
    for rank, argv in enumerate(argvs):
        env = {**os.environ, **{k: str(v) for k, v in shared.items()}, "RANK": str(rank)}
        options = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], **options))
    return [(process.communicate(timeout=100)[1], process.returncode) for process in started]


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
        assert all(
            re.search("^-c: stopped: worker .: the workers differ in ", text, re.M)
            for text, _ in ends
        )
        assert f"stopped: worker 1: the workers differ in {name}" in ends[1][0]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(
        {".lock", *(p.name for p in saved.iterdir())}
    )


def test_a_worker_that_does_not_answer_ends_the_others_in_one_line(corpus_dir, tmp_path):
    setup = (
        "from hardware import opening\n"
        "opening.WORKER_TIMEOUT = device.WORKER_TIMEOUT = datetime.timedelta(seconds=8)\n"
        "update = train.update\n"
        "def late(run, batches):\n"
        "    time.sleep(14 * (os.environ['RANK'] == '1' and run.num_updates == 2))\n"
        "    return update(run, batches)\n"
        "train.update = late"
    )
    ends = run_workers([few(corpus_dir, tmp_path, "--max_update", 4)] * 2, setup)
    said = "-c: stopped: worker 0: no answer from another worker for 0:00:08; it hangs or is unreachable\n"
    assert ends[0] == (said, 1)
    assert (
        re.search("^-c: stopped: worker 1: another worker ended", ends[1][0], re.M)
        and ends[1][1] == 1
    )
    assert checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"] == 2


def test_workers_whose_clocks_differ_stop_after_the_same_update_with_the_same_rates(
    corpus_dir, tmp_path
):
    setup = (
        "from run.guard import Clock\n"
        # of an update
        "Clock.now = lambda clock: clock.hours + [0.01, 0.125][int(os.environ['RANK'])]\n"
        "update = train.update\n"
        "def tell(run, batches):\n"
        "    done = update(run, batches)\n"
        "    os.write(2, f'rate {done.lr!r}\\n'.encode())\n"
        "    return done\n"
        "train.update = tell"
    )
    ends = run_workers([few(corpus_dir, tmp_path, "--max_hours", 1)] * 2, setup)
    assert [code for _, code in ends] == [0, 0], ends
    rows, rates = rows_of(tmp_path), [re.findall("^rate (.*)$", text, re.M) for text, _ in ends]
    assert [row["hours"] for row in rows] == [i / 8 for i in range(1, 9)]
    assert rates[0] == rates[1] == [repr(row["lr"]) for row in rows]


@pytest.mark.parametrize("ending, code", [("pass", 0), ("raise config.RunError('no')", 1)])
def test_a_worker_leaves_before_python_ends_since_torchs_threads_may_abort_it_there(ending, code):
    program = (
        "import atexit, os, config\nfrom run import flags\n"
        "atexit.register(os.write, 2, b'AT EXIT')\n"
        "def main():\n"
        "    print('the last line')\n"
        f"    {ending}\n"
        "    return 0\n"
        "flags.program(main)"
    )
    for address, written in (("127.0.0.1", False), (None, True)):
        env = {k: v for k, v in os.environ.items() if k != "MASTER_ADDR"} | (
            address and {"MASTER_ADDR": address} or {}
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=HERE, env=env, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (code, "the last line\n")
        assert ("AT EXIT" in done.stderr) is written
