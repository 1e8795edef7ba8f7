"""Flags, presets, fairseq's spellings; one line for each mistake."""

import dataclasses
import re
import subprocess
import sys

import config
import train
from config import DataConfig, DeviceConfig, InputError, ModelConfig
from formats import fairseq_config
from hardware.device import open_device
from run import flags
from test.helpers import FEW, HERE, call

import pytest


def settings(*argv) -> dict:
    """All settings of train.py that this command line gives, by name."""
    parts, _ = flags.parse(config.PARTS, "", list(argv))
    return {name: value for part in parts for name, value in vars(part).items()}


def test_every_field_has_a_flag_and_is_read_somewhere():
    sources = "".join(path.read_text() for path in [*HERE.glob("*.py"), *HERE.glob("[!t]*/*.py")])
    for part in config.PARTS:
        for field in dataclasses.fields(part):
            value = {bool: "true", int: "3", float: "0.5", str: "x", tuple: "0.5,0.5"}[field.type]
            value = (field.metadata["choices"] or [value])[-1]
            parts, _ = flags.parse(config.PARTS, "", [f"--{field.name}", str(value)])
            got = next(getattr(p, field.name) for p in parts if hasattr(p, field.name))
            assert str(got).lower().strip("()").replace(" ", "") == str(value).lower(), field.name
            # how settings are read: cfg.X, cfg.model.X, self.cfg.X, or t.X, since train.py calls its own part t
            read = rf"\b(?:cfg(?:\.(?:data|model|ema|device|guard|train))?|t)\.{field.name}\b"
            assert re.search(read, sources), f"{field.name} is never read"


def test_presets_hold_only_fields_and_pass_the_checks():
    for name in config.PRESETS:
        parts, _ = flags.parse(config.PARTS, "", ["--config_name", name, "--data_path", "x"])
        config.Config(*parts)
        assert not set(config.PRESETS[name]) - set(config.Config(*parts).flat())


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--mask_prob", "1.5"),
        ("--mask_prob", "nan"),
        ("--dropout", "-0.1"),
        ("--layers", "0"),
        ("--lr", "inf"),
        ("--lr", "x"),
        ("--update_freq", "1.5"),
        ("--sample_break_mode", "words"),
        ("--fixed_masks", "maybe"),
        ("--no_such_flag", "1"),
        ("--max_toke", "5"),
        ("--config_name", "huge"),
        ("--seed", "-1"),
    ],
)
def test_a_wrong_flag_or_value_is_named(flag, value):
    with pytest.raises(InputError, match=flag.lstrip("-")):
        flags.parse(config.PARTS, "", [flag, value])


def test_fairseqs_names_with_groups_are_spellings_of_ours():
    argv = [
        "--task.data",
        "DIR",
        "task.tokens_per_sample=64",
        "--optimization.max_update=7",
        "optimization.lr=[0.0005]",
        "--model.transformer.encoder.embed_dim",
        "48",
        "optimizer.adam_betas=(0.9,0.95)",
        "optimization.update_freq=[4]",
        "model.transformer.encoder.layerdrop=0",
        "--max-tokens",
        "640",
        "--dataset.batch_size",
        "3",
        "--distributed_training.distributed_world_size",
        "1",
        "task._name=masked_lm",
    ]
    extra = lambda parser: parser.add_argument("--distributed_world_size", type=int)  # noqa: E731
    parts, args = flags.parse(config.PARTS, "", argv, extra=extra)
    given = {name: value for part in parts for name, value in vars(part).items()}
    expected = dict(
        data_path="DIR",
        tokens_per_sample=64,
        max_update=7,
        lr=5e-4,
        embed_dim=48,
        adam_betas=(0.9, 0.95),
        update_freq=4,
        max_tokens=640,
        batch_size=3,
    )
    assert {name: given[name] for name in expected} == expected
    assert args.distributed_world_size == 1


@pytest.mark.parametrize(
    "word",
    [
        "model.foo=3",
        "common.fp16=true",
        "criterion=cross_entropy",
        "model.transformer.encoder.layerdrop=0.1",
        "model.transformer.decoder.layers=3",
        "task._name=translation",
        "--task.shorten_method=truncate",
    ],
)
def test_a_name_with_a_group_that_we_do_not_have_is_refused_by_name(word):
    with pytest.raises(InputError, match=re.escape(word.lstrip("-").split("=")[0])):
        flags.parse(config.PARTS, "", [word])


def test_every_spelling_in_the_table_sets_the_field_that_it_names():
    fields = {field.name: field for part in config.PARTS for field in dataclasses.fields(part)}
    for spelling, name in fairseq_config.OURS.items():
        if name == "distributed_world_size":  # a flag of train.py, not a field
            continue
        choices = fields[name].metadata["choices"]
        value = str(
            (
                choices
                or [{bool: True, int: 3, float: 0.5, str: "x", tuple: "0.5,0.5"}[fields[name].type]]
            )[-1]
        )
        dashes = spelling.replace("_", "-")
        for argv in (
            [f"{spelling}={value}"],
            [f"+{spelling}='{value}'"],
            [f"--{spelling}", value],
            [f"--{dashes}", value],
        ):
            assert str(settings(*argv)[name]).strip("()").replace(" ", "") == value, argv


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "-m task.data=D common.user_dir=examples/data2vec optimization.max_update=7",
            dict(data_path="D", max_update=7),
        ),
        ("--multirun ++model.ema_decay=0.5 +optimization.lr=[0.5]", dict(ema_decay=0.5, lr=0.5)),
        (
            "--config_name tiny common.tensorboard_logdir=null",
            dict(tensorboard_logdir="", layers=4),
        ),
        ("--batch_size 8 dataset.batch_size=null", dict(batch_size=0)),
        ("model.loss_scale=null", dict(loss_scale=0)),
        ("optimizer.adam_betas='(0.9,0.95)'", dict(adam_betas=(0.9, 0.95))),
        (
            "model=data2vec_text task=masked_lm criterion=model optimizer=adam lr_scheduler=cosine",
            {},
        ),
        (
            "--arch data2vec_text --task masked_lm --optimizer adam --lr-scheduler cosine --layerdrop 0 --min-lr 0.0",
            {},
        ),
        (
            "--num-workers 4 --no-epoch-checkpoints --data D --clip-norm 0",
            dict(data_path="D", clip_norm=0),
        ),
        (
            "--save_dir run.1=a/b task.data=run.1=a/b --fixed_masks task.seed=3",
            dict(save_dir="run.1=a/b", seed=3),
        ),
        ("--save_dir optimization.lr=0.5", dict(save_dir="optimization.lr=0.5", lr=2e-4)),
    ],
)
def test_old_command_lines_work_as_they_are(line, expected):
    given = settings(*line.split())
    assert {name: given[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("--fp16", "--fp16: .*--amp"),
        ("--fp16 --max-update 5", "--fp16: .*--amp"),
        ("common.fp16=true", "common.fp16: .*--amp"),
        ("--cpu", "--device cpu"),
        ("--restore-file x.pt", "--restore-file: .*--init_from"),
        ("checkpoint.reset_optimizer=true", "reset_optimizer: .*--init_from"),
        ("checkpoint.reset_dataloader=true", "--reset_data_position"),
        ("checkpoint.keep_last_epochs=3", "--keep_interval_updates"),
        ("--arch roberta_base", "only --arch=data2vec_text is built in"),
        ("optimizer=sgd", "only --optimizer=adam is built in"),
        ("--layerdrop 0.1", "--layerdrop=0.1 is not supported"),
        ("model.layerdrop=x", "model.layerdrop=x is not supported"),
        ("dataset.max_tokens=null", "max_tokens=null: give a value"),
        ("--max-updates 5", "did you mean --max_update[?]"),
        ("--optimization.max_updates=5", "did you mean --max_update[?]"),
        ("ema.ema_decay=0.5", "ema.ema_decay: no option .*did you mean --ema_decay"),
        ("--optimization.lr x", "argument --lr: 'x' is not a number"),
        ("--seed abc", "argument --seed: 'abc' is not a number"),
        ("generation.beam=5", "generation.beam: no option of that name here .see"),
        (".", r"\.: no option .*--data_path"),
    ],
)
def test_what_cannot_be_taken_is_answered_in_one_line(line, answer):
    with pytest.raises(InputError, match=answer):
        settings(*line.split())


def test_ignored_options_are_named_and_the_help_shows_only_our_spellings(capsys):
    settings("common.user_dir=x", "--ddp-backend", "c10d")
    printed = capsys.readouterr().err.splitlines()
    assert [line.split("=")[0] for line in printed] == ["--common.user_dir", "--ddp-backend"]
    with pytest.raises(SystemExit):
        settings("--help")
    text = capsys.readouterr().out
    assert "--max_update N" in text
    assert not re.search(r"--max-update|--optimization|--layerdrop|--fp16|--common", text)


def test_the_world_size_of_an_old_command_line_must_be_torchruns(corpus_dir):
    with pytest.raises(
        InputError, match="torchrun --nproc_per_node 16 .* --update_freq 16 keeps the batch"
    ):
        train.main(
            ["--task.data", str(corpus_dir), "--distributed_training.distributed_world_size", "16"]
        )


def test_a_fairseq_yaml_is_read_and_ignored_entries_are_printed(tmp_path, capsys):
    pytest.importorskip("yaml", reason="PyYAML is optional")
    (tmp_path / "mine.yaml").write_text(
        "# @package _group_\ncommon:\n  fp16: true\n  log_interval: 7\ntask:\n  _name: masked_lm\n  data: ???\n"
        "  mask_prob: 0.2\nmodel:\n  _name: data2vec_text\n"
        "  ema_decay: 0.5\n  max_positions: ${task.tokens_per_sample}\n"
        "  transformer:\n    encoder: {layers: 3, learned_pos: true}\n"
        "optimization:\n  lr: [0.003]\n  update_freq: [2]\n"
        "optimizer:\n  adam_betas: (0.9,0.9)\ndistributed_training:\n  distributed_world_size: 16\n"
    )
    argv = ["--config-dir", str(tmp_path), "--config-name", "mine", "--mask_prob", "0.3"]
    given = settings(*argv)
    expected = dict(
        mask_prob=0.3,
        log_interval=7,
        ema_decay=0.5,
        layers=3,
        lr=3e-3,
        update_freq=2,
        adam_betas=(0.9, 0.9),
    )
    assert {name: given[name] for name in expected} == expected
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 4 and all(
        any(name in line for line in printed)
        for name in ("common.fp16", "max_positions", "distributed_world_size")
    )
    # update_freq 2 on 16 workers is 32 on one
    assert "16 times smaller" in printed[-1] and "--update_freq 32 keeps it" in printed[-1]
    with pytest.raises(InputError, match="no such file"):
        settings("--config-dir", str(tmp_path), "--config-name", "other")
    (tmp_path / "mine.yaml").write_text(
        "task: {tokens_per_sample: 99}\nmodel: {max_source_positions: '${task.tokens_per_sample}'}\ncriterion: model\n"
    )
    assert settings(*argv[:4])["max_source_positions"] == 99
    for text, message in (
        ("criterion: cross_entropy\n", "criterion"),
        ("model: {layers: '${other.layers}'}\n", "resolved"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            settings(*argv[:4])


LAUGHS = "a0: &a0 [ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "line [123]: an alias"),
        (MERGED, "line [123]: an alias"),
        ("a: &a {b: *a}\n", "line [123]: an alias"),
        ("a: " + "[" * 100_000, "line 1: .* a 51st level"),
        ("{a: " * 200 + "1" + "}" * 200 + "\n", "a 51st level"),
        ("a: " + "9" * 5000 + "\n", "not YAML"),
        ("a: 0x" + "f" * 5000 + "\n", "not a fairseq config"),
        ("a: [0x" + "f" * 5000 + "]\n", "not a fairseq config"),
        ("a: 2026-13-45\n", "not YAML"),
        ("a: !!bool foo\n", "not YAML"),
        ("a: !!int ''\n", "not YAML"),
        ("a: !!timestamp foo\n", "not YAML"),
        ("distributed_training: {distributed_world_size: '" + "9" * 5000 + "'}\n", "ignored"),
        ("optimization: {lr: 1e999}\n", "lr inf: must be a finite number"),
        ("checkpoint: {save_dir: 'a\ud800'}\n".encode("utf-8", "surrogatepass"), "not UTF-8"),
        ('checkpoint: {save_dir: "a\\0"}\n', "save_dir a\0: holds a character that no path"),
        (
            'checkpoint: {save_dir: "a\\ud800"}\n',
            "save_dir a\ud800: holds a character that no path",
        ),
        ("model: {layers: [" + "1, " * 500 + "1]}\n", r"model.layers=\[1, 1"),
        ('"\\e[2Jkey": "\\e[31mvalue"\n', r"\\x1b\[2Jkey=\\x1b\[31mvalue ignored"),
        ("other: [" + "1, " * 500 + "1]\n", "ignored"),
        (
            "other: [" + "1, " * 100_000 + "1]\n",
            "over 200,000 characters, which no fairseq config has",
        ),
    ],
)
def test_a_hostile_yaml_is_refused_or_ignored_in_one_short_line(tmp_path, capsys, text, message):
    pytest.importorskip("yaml", reason="PyYAML is optional")
    (tmp_path / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        settings("--config-dir", str(tmp_path), "--config-name", "mine")
        shown = capsys.readouterr().err
    except InputError as e:
        shown = str(e)
    assert re.search(message, shown) and "\x1b" not in shown
    shown = shown.removeprefix(
        "mine.yaml: without --fairseq_exact this trains the paper's way, not the released code's\n"
    )
    assert len(shown.splitlines()) == 1 and len(shown) < len(str(tmp_path)) + 400


def test_fairseq_exact_overrides_defaults_and_flags_override_it():
    exact = flags.parse([DataConfig], "", ["--fairseq_exact"])[0][0]
    assert (exact.teacher_input, exact.long_sentences, exact.drop_remainder) == (
        "masked",
        "skip",
        True,
    )
    assert not exact.fixed_masks
    assert (
        flags.parse([DataConfig], "", ["--teacher_input", "full", "--fairseq_exact"])[0][
            0
        ].teacher_input
        == "full"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--attention_heads", "3"], "attention_heads 3 does not divide"),
        (["--tokens_per_sample", "100"], "position"),
        (["--average_top_k_layers", "5"], "only 2 layers"),
        (["--random_token_prob", "0.6", "--leave_unmasked_prob", "0.6"], "sum"),
        (["--init_from", "nowhere.pt"], "nowhere.pt: no such"),
        (["--adam_betas", "0.9"], "two numbers"),
        (["--mask_prob", "1e-9"], "nothing masked"),
        (["--save_dir", ""], "save_dir is empty"),
        (["--overwrite"], "goes with --no_resume"),
        (["--data_path", ":"], "names no folder"),
        (["--mask_multiple_length", "1000000000"], "mask_multiple_length"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_train(tmp_path, corpus_dir, argv, message):
    with pytest.raises(InputError, match=message):
        call(
            train.main,
            *FEW,
            "--max_update",
            "1",
            "--data_path",
            corpus_dir,
            "--save_dir",
            tmp_path / "run",
            *argv,
        )


def test_a_negative_number_after_a_flag_is_its_value():
    parts, _ = flags.parse([ModelConfig], "", ["--loss_scale", "-1e-3"])
    assert parts[0].loss_scale == -1e-3


@pytest.mark.parametrize(
    "variables",
    [dict(WORLD_SIZE="x"), dict(WORLD_SIZE="0"), dict(RANK="1"), dict(WORLD_SIZE="2", RANK="0")],
)
def test_a_broken_worker_environment_is_one_line(monkeypatch, corpus_dir, variables):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="environment|torchrun|WORLD_SIZE"):
        open_device(DeviceConfig(device="cpu"))


def test_a_mistake_ends_every_program_with_one_line_and_code_2(tmp_path):
    for program in ("train.py", "data.py", "eval.py", "bench.py"):
        result = subprocess.run(
            [
                sys.executable,
                HERE / program,
                "--data_path",
                tmp_path / "none",
                "--lr" if program != "data.py" else "--seed",
                "x",
            ],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith(f"{program}: error: ")
