"""The command line: flags, presets, help, fairseq's spellings; one line for each mistake."""

import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys

import config
import finetune
import preprocess
import train
from config import DataConfig, DeviceConfig, InputError
from formats.fairseq_config import BUILT_IN, IGNORED, OURS
from hardware.opening import open_device
from run import flags
from test.helpers import HERE, few, program

import pytest
import torch

VALUES = {bool: "True", int: "3", float: "0.5", str: "x", tuple: "0.5,0.5"}


def settings(*argv) -> dict:
    """All settings of train.py that this command line gives, by name."""
    parts, _ = flags.parse(config.PARTS, "", list(argv))
    return {name: value for part in parts for name, value in vars(part).items()}


def fields() -> dict:
    return {field.name: field for part in config.PARTS for field in dataclasses.fields(part)}


def value_for(field) -> str:
    return str((field.metadata["choices"] or [VALUES[field.type]])[-1])


# ------------------------------------------------------------------------------------- our flags


def test_every_setting_has_a_flag_and_is_read_somewhere():
    sources = "".join(path.read_text() for path in [*HERE.glob("*.py"), *HERE.glob("[!t]*/*.py")])
    for name, field in fields().items():
        got = str(settings(f"--{name}", value_for(field))[name])
        assert got.lower().strip("()").replace(" ", "") == value_for(field).lower(), name
        # settings are read as cfg.X, cfg.model.X, self.cfg.X, or t.X in train.py
        read = rf"\b(?:cfg(?:\.(?:data|model|ema|device|guard|train))?|t)\.{name}\b"
        assert re.search(read, sources), f"{name} is never read"


@pytest.mark.parametrize("name", config.PRESETS)
def test_a_preset_holds_only_settings_and_passes_the_checks(name):
    parts, _ = flags.parse(config.PARTS, "", ["--config_name", name, "--data_path", "x"])
    assert not set(config.PRESETS[name]) - set(config.Config(*parts).flat())


def test_fairseq_exact_overrides_defaults_and_flags_override_it():
    (exact,), _ = flags.parse([DataConfig], "", ["--fairseq_exact"])
    assert exact.teacher_input == "masked" and exact.drop_remainder and not exact.fixed_masks
    (mixed,), _ = flags.parse([DataConfig], "", ["--teacher_input", "full", "--fairseq_exact"])
    assert mixed.teacher_input == "full" and mixed.drop_remainder


@pytest.mark.parametrize(
    "line",
    [
        "--data_path 'a b'",
        "--data_path x --config_name tiny --lr 0.5 --adam_betas 0.5,0.75 --compile yes",
        "--data_path x --config_name npu_1p --fairseq_exact --drop_remainder no",
        "--data_path x --config_name base --fixed_masks",
        "--data_path x --config_name base --objective data2vec2 --mask_multiple_length 1",
        "--data_path x --config_name base_v2 --fairseq_exact --min_pred_var 1e-4",
    ],
)
def test_the_shortest_command_line_gives_the_same_settings(line):
    parts, _ = flags.parse(config.PARTS, "", shlex.split(line))
    short = flags.flags_of(parts)
    assert flags.parse(config.PARTS, "", shlex.split(short))[0] == parts
    assert len(short.split("--")) <= len(line.split("--"))


@pytest.mark.parametrize(
    "variables",
    [dict(WORLD_SIZE="x"), dict(WORLD_SIZE="0"), dict(RANK="1"), dict(WORLD_SIZE="2", RANK="0")],
)
def test_a_broken_worker_environment_is_one_line(monkeypatch, variables):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="environment|torchrun|WORLD_SIZE"):
        open_device(DeviceConfig(device="cpu"))


# ---------------------------------------------------------------------- before torch is imported


@pytest.fixture
def without_torch(tmp_path):
    """Runs a program where importing torch ends it with code 99."""
    (tmp_path / "torch.py").write_text("raise SystemExit(99)")
    return lambda name, *argv: program(name, *argv, PYTHONPATH=tmp_path, COLUMNS="80")


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("train.py --max_updates 5", "did you mean --max_update?"),
        ("train.py --fp16", "--amp auto|off|fp16|bf16"),
        ("train.py", "--data_path is missing"),
        ("train.py --data_path x --layers 2", "there are only 2 layers"),
        ("eval.py --amp bf-16", "choose from auto, off"),
        ("eval.py --layer 3", "since 0.4.0; --features gives the last layer's"),
        ("finetune.py --num_classes 3", "since 0.4.0"),
        ("convert.py --dicct x", "did you mean --dict?"),
        ("preprocess.py --destdir x --dest x --bpe none", "did you mean --dest?"),
        ("data.py --data_path x --seed x", "argument --seed: "),
        ("data.py --data_path FILE", "test_flags.py: a file, not a dataset's folder"),
        ("data.py --data_path nowhere", "nowhere: no such folder"),
        ("data.py", "--data_path is missing"),
        ("data.py --data_path :", "names no folder"),
        ("data.py --data_path x --epoch 0", "--epoch must be"),
        ("data.py --data_path x --rank 1", "--rank from 0"),
    ],
)
def test_a_mistake_is_answered_in_one_line_before_torch_is_imported(without_torch, line, answer):
    result = without_torch(*(__file__ if word == "FILE" else word for word in line.split()))
    assert result.returncode == 2 and answer in result.stderr, result.stderr
    assert result.stderr.startswith(f"{line.split()[0]}: error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["train", "eval", "bench", "finetune", "convert", "preprocess"])
def test_help_is_answered_before_torch_is_imported(without_torch, name):
    result = without_torch(f"{name}.py", "--help")
    assert result.returncode == 0 and not result.stderr
    assert result.stdout.startswith(f"usage: {name}.py")
    # an indented line may be a command, which is not broken
    assert max(len(line) for line in result.stdout.splitlines() if line[:4] != "    ") < 80


def test_help_shows_the_programs_flags_then_groups_then_presets(without_torch):
    text = without_torch("train.py", "--help").stdout
    at = 0
    for part in (
        "options: --no_resume --fairseq_exact data: --data_path model: --layers teacher: device:"
        " --amp training: --lr presets tiny:"
    ).split():
        at = text.index(part, at)
    everything = without_torch("train.py", "--help_all").stdout
    assert all(f"--{name}" in everything for name in fields())
    assert "--adam_betas X,Y" in everything and "[0.9,0.98]" in everything
    assert not re.search(r"--max-update|--optimization|--layerdrop|--fp16|--common", everything)


def test_notes_on_ignored_options_are_printed_once(without_torch):
    result = without_torch("train.py", "common.user_dir=x", "--data_path", "x")
    assert result.returncode == 99 and not result.stderr


@pytest.mark.parametrize(
    ("words", "code", "needed"),
    [
        (["-c", "import sys; sys.version_info = (3, 9, 18); import config"], 1, "Python 3.10"),
        (["-c", "import sys; sys.modules['fcntl'] = None; import config"], 1, "Linux or macOS"),
        ("-S train.py --data_path x".split(), 2, "has no numpy: pip install -r requirements.txt"),
        ("-S preprocess.py --help".split(), 2, "has no numpy"),
        ("-S data.py --help".split(), 2, "has no numpy"),
        ("-S -m judge.plot".split(), 2, "has no numpy"),
    ],
)
def test_another_python_or_system_or_a_missing_package_is_one_line(words, code, needed):
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=HERE)
    assert result.returncode == code and needed in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("parts", [train.PARTS, finetune.PARTS])
@pytest.mark.parametrize(
    ("flag", "given", "rank"),
    [("--local-rank=1", "3", "3"), ("--local_rank=1", "", "1"), ("--local-rank=-1", "", "0")],
)
def test_the_rank_of_torchs_older_launcher_counts(monkeypatch, parts, flag, given, rank):
    monkeypatch.setenv("LOCAL_RANK", given)  # restored after the test
    if not given:
        del os.environ["LOCAL_RANK"]
    _, args = flags.parse(parts, "", [flag])
    assert os.environ["LOCAL_RANK"] == rank and not vars(args)


def test_every_path_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = settings("--save_dir=~/run", "--data_path", "~/a:~/b:c~", "checkpoint.save_dir=x~")
    assert (given["save_dir"], given["data_path"]) == ("x~", "/home/me/a:/home/me/b:c~")
    assert settings("--save_dir=~/run")["save_dir"] == "/home/me/run"
    args = preprocess.parse(["--dest=~/d", "--bpe=none", "--train", "~/t", "u", "--dict=~"])
    assert (args.dest, args.dict, args.train) == ("/home/me/d", "/home/me", ["/home/me/t", "u"])


# --------------------------------------------------------------------------- fairseq's spellings


def test_every_spelling_in_the_table_sets_the_field_that_it_names():
    for spelling, name in OURS.items():
        if name == "distributed_world_size":  # a flag of train.py, not a field
            continue
        value = value_for(fields()[name])
        dashes = spelling.replace("_", "-")
        for argv in ([f"+{spelling}='{value}'"], [f"--{spelling}={value}"], [f"--{dashes}", value]):
            assert str(settings(*argv)[name]).strip("()").replace(" ", "") == value, argv


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--loss_scale -1e-3", dict(loss_scale=-1e-3)),
        ("--multirun ++model.ema_decay=0.5 +optimization.lr=[0.5]", dict(ema_decay=0.5, lr=0.5)),
        ("--config_name tiny common.tensorboard_logdir=null", dict(tensorboard_logdir="")),
        ("model.loss_scale=null", dict(loss_scale=0)),
        ("optimizer.adam_betas='(0.9,0.95)'", dict(adam_betas=(0.9, 0.95))),
        ("-m optimization.update_freq=[4] --max-tokens 64", dict(update_freq=4, max_tokens=64)),
        ("model=data2vec_text task=masked_lm criterion=model optimizer=adam", {}),
        ("--arch data2vec_text --lr-scheduler cosine --layerdrop 0 --min-lr 0.0", {}),
        ("--num-workers 4 --no-epoch-checkpoints --data D", dict(data_path="D")),
        ("--save_dir run.1=a/b --fixed_masks task.seed=3", dict(save_dir="run.1=a/b", seed=3)),
        ("--save_dir optimization.lr=0.5", dict(save_dir="optimization.lr=0.5", lr=2e-4)),
        ("--save_dir hydra/run=a", dict(save_dir="hydra/run=a")),
        ("--save_dir ~runs", dict(save_dir="~runs")),
        ("--encoder-layers 6 --max-sentences 8", dict(layers=6, batch_size=8)),
        ("--encoder-embed-dim 48 --encoder-ffn-embed-dim 96", dict(embed_dim=48, ffn_embed_dim=96)),
        ("--encoder-attention-heads 4 --encoder-layerdrop 0", dict(attention_heads=4)),
        ("--max-positions 256", dict(max_source_positions=256)),
    ],
)
def test_old_command_lines_work_as_they_are(line, expected):
    given = settings(*line.split())
    assert {name: given[name] for name in expected} == expected


@pytest.mark.parametrize("name", [*BUILT_IN, *(f"common.{name}" for name in IGNORED)])
def test_an_option_of_fairseqs_is_taken_at_its_harmless_value_and_refused_at_others(name, capsys):
    harmless, why = IGNORED.get(name.removeprefix("common.")) or (BUILT_IN[name], "")
    assert settings(f"{name}={harmless}") == settings()
    printed = capsys.readouterr().err
    assert printed.startswith(f"--{name}=") and printed.endswith(f"{why}\n") if why else not printed
    with pytest.raises(InputError, match=f"^--{name}[:=]") as error:
        settings(f"{name}=7")
    assert why in str(error.value)


@pytest.mark.parametrize(
    "line",
    "common.user_dir=x|--ddp-backend c10d --lr 1|--min-loss-scale 1|--num-workers optimization.lr=1"
    "|hydra.run.dir=x|hydra/launcher=a --lr 1|run_config=local".split("|"),
)
def test_an_option_that_is_ignored_is_named_in_one_line(line, capsys):
    settings(*line.split())
    printed = capsys.readouterr().err
    assert line.split()[0].split("=")[0] in printed and printed.count(" ignored: ") == 1
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("--mask_prob 1.5", "mask_prob 1.5: must be below 1"),
        ("--mask_prob nan", "mask_prob nan"),
        ("--update_freq 1.5", "argument --update_freq: .*'1.5'"),
        ("--sample_break_mode words", "choose from none, eos"),
        ("--fixed_masks maybe", "fixed_masks"),
        ("--config_name huge", "huge: .*npu_1p"),
        ("--seed -1", "seed -1"),
        ("--fp16 --max-update 5", "--fp16: .*--amp"),
        ("common.fp16=true", "common.fp16: .*--amp"),
        ("--restore-file x.pt", "--restore-file: .*--init_from"),
        ("--arch roberta_base", "only --arch=data2vec_text is built in"),
        ("criterion=masked_lm", "--objective mlm"),
        ("--layerdrop 0.1", "--layerdrop=0.1 is not supported"),
        ("model.transformer.decoder.layers=3", "model.transformer.decoder.layers"),
        ("--task.shorten_method=truncate", "shorten_method"),
        ("dataset.max_tokens=null", "max_tokens=null: give a value"),
        ("~common.tensorboard_logdir", "^~common.tensorboard_logdir: .* the value that you want"),
        ("--optimization.max_updates=5", "did you mean --max_update[?]"),
        ("ema.ema_decay=0.5", "ema.ema_decay: no option .*did you mean --ema_decay"),
        ("--optimization.lr x", "argument --lr: .*'x'"),
        ("generation.beam=5", "generation.beam: no option of that name here"),
        ("--max_steps 5", "did you mean --max_update"),
        ("--schedule_by hours", "--schedule_by: no option of that name here"),
        ("--resume", r"here \("),  # not --no_resume
        ("--pretrained x", r"here \("),  # not --untrained
        (".", r"\.: no option .*--data_path"),
        ("--attention_heads 3", "attention_heads 3 does not divide"),
        ("--tokens_per_sample 100", "position"),
        ("--average_top_k_layers 5", "only 2 layers"),
        ("--random_token_prob 0.6 --leave_unmasked_prob 0.6", "at most 1"),
        ("--adam_betas 0.9", "two numbers"),
        ("--mask_prob 1e-9", "nothing masked"),
        ("--save_dir=", "save_dir is empty"),
        ("--overwrite", "goes with --no_resume"),
        ("--data_path :", "names no folder"),
        ("--distributed-world-size 16", "--nproc_per_node 16 .* --update_freq 16 keeps"),
        ("--npu_profile 2 --max_update 20", "--npu_profile"),
        ("--device cuda", "--device"),
    ],
)
def test_what_cannot_be_done_is_one_line(monkeypatch, corpus_dir, tmp_path, line, answer):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=answer):
        train.main(few(corpus_dir, tmp_path, "--max_update", 1, *line.split()))


@pytest.fixture
def yaml(tmp_path):
    """Reads a text as fairseq's YAML, by --config_dir."""
    pytest.importorskip("yaml", reason="PyYAML is optional")

    def read(text, *argv):
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "mine.yaml").write_bytes(content)
        return settings("--config-dir", str(tmp_path), "--config-name", "mine", *argv)

    return read


def test_a_fairseq_yaml_is_read_and_ignored_entries_are_printed(yaml, capsys):
    text = (
        "# @package _group_\ncommon:\n  fp16: true\n  log_interval: 7\n"
        "task:\n  _name: masked_lm\n  data: ???\n  mask_prob: 0.2\n"
        "model:\n  _name: data2vec_text\n  ema_decay: 0.5\n"
        "  max_positions: ${task.tokens_per_sample}\n"
        "  transformer:\n    encoder: {layers: 3, learned_pos: true}\n"
        "optimization:\n  lr: [0.003]\n  update_freq: [2]\n"
        "optimizer:\n  adam_betas: (0.9,0.9)\n"
        "distributed_training:\n  distributed_world_size: 16\n"
    )
    given = yaml(text, "--mask_prob", "0.3")
    expected = dict(mask_prob=0.3, log_interval=7, ema_decay=0.5, layers=3, lr=3e-3, update_freq=2)
    assert {name: given[name] for name in expected} == expected
    _, silent, *printed = capsys.readouterr().err.splitlines()
    assert "nothing of sample_break_mode" in silent and "mask_prob" not in silent
    for name, line in zip(("fp16", "max_positions", "world_size"), printed, strict=True):
        assert name in line
    assert "--update_freq 32 keeps" in printed[-1]  # 2 on 16 workers is 32 on one
    link = "model: {max_source_positions: '${task.tokens_per_sample}'}"
    assert yaml("task: {tokens_per_sample: 99}\n" + link)["max_source_positions"] == 99
    assert yaml("layers: 3\nlr: 1e-2")["layers"] == 3  # our own names, in no group
    assert yaml("checkpoint: {save_dir: ~/run}")["save_dir"] == os.path.expanduser("~/run")
    # without a limit of tokens batches are of so many blocks, and PyYAML reads 2e-4 as text
    given = yaml("dataset: {batch_size: 64, max_tokens: null}\noptimization: {lr: [2e-4]}\n")
    assert (given["max_tokens"], given["lr"]) == (64 * 512, 2e-4)


def test_fairseqs_base_yaml_runs_without_tensorboard(yaml, capsys, monkeypatch):
    text = "common: {tensorboard_logdir: tb, fp16: true}\n"
    for package, folder, lines in ((object(), "tb", 3), (None, "", 4)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=package: package)
        assert yaml(text)["tensorboard_logdir"] == folder
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == lines and "--fairseq_exact" in printed[0]
    assert "common.tensorboard_logdir=tb ignored: the tensorboard package" in "".join(printed)
    # who asks for it gets an error
    assert yaml(text, "--tensorboard_logdir", "x")["tensorboard_logdir"] == "x"


LAUGHS = "a0: &a0 [ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("criterion: cross_entropy\n", "criterion"),
        ("model: {layers: '${other.layers}'}\n", "resolved"),
        (LAUGHS, "line [123]: an alias"),
        ("a: &a {b: *a}\n", "line [123]: an alias"),
        ("a: " + "[" * 1_000, "not YAML"),
        ("a: " + "9" * 5000 + "\n", "not YAML"),
        ("optimization: {lr: 1e999}\n", "lr inf: must be a finite number"),
        ("checkpoint: {save_dir: 'a\ud800'}\n".encode("utf-8", "surrogatepass"), "not UTF-8"),
        ('checkpoint: {save_dir: "a\\0"}\n', "holds a character that no path"),
        ('"\\e[2Jkey": "\\e[31mvalue"\n', r"\\x1b\[2Jkey=\\x1b\[31mvalue ignored"),
    ],
)
def test_a_hostile_yaml_is_refused_or_ignored_in_one_short_line(yaml, capsys, text, message):
    try:
        yaml(text)
        shown = capsys.readouterr().err.splitlines()[-1]
    except InputError as e:
        shown = str(e)
    assert re.search(message, shown) and "\x1b" not in shown
    assert "\n" not in shown and len(shown) < 600
