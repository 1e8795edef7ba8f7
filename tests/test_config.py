"""Flags, presets, fairseq's spellings, one line for what is wrong."""

import dataclasses
import re
import subprocess
import sys

# must be first: device.py sets TORCH_DEVICE_BACKEND_AUTOLOAD, which torch reads on import
from device import DeviceConfig, open_device  # isort: split

import pytest

import config
import train
from config import InputError
from data import (
    DataConfig,
)
from model import ModelConfig
from tests.helpers import FEW, HERE, call


def test_every_config_field_has_a_flag_and_is_read():
    sources = "".join(path.read_text() for path in [*HERE.glob("*.py"), *HERE.glob("[!t]*/*.py")])
    for part in train.PARTS:
        for field in dataclasses.fields(part):
            value = {bool: "true", int: "3", float: "0.5", str: "x", tuple: "0.5,0.5"}[field.type]
            value = (field.metadata["choices"] or [value])[-1]
            parts, _ = config.parse(train.PARTS, "", [f"--{field.name}", str(value)])
            got = next(getattr(p, field.name) for p in parts if hasattr(p, field.name))
            assert str(got).lower().strip("()").replace(" ", "") == str(value).lower(), field.name
            # a read from a configuration: cfg.X, cfg.model.X, self.cfg.X, or t.X where train.py calls its own part t
            read = rf"\b(?:cfg(?:\.(?:data|model|ema|device|guard|train))?|t)\.{field.name}\b"
            assert re.search(read, sources), f"{field.name} is never read"


def test_presets_hold_only_fields_and_pass_the_checks():
    for name in config.PRESETS:
        parts, _ = config.parse(train.PARTS, "", ["--config_name", name, "--data_path", "x"])
        train.Config(*parts)
        assert not set(config.PRESETS[name]) - set(train.Config(*parts).flat())


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
        config.parse(train.PARTS, "", [flag, value])


def test_the_reference_s_dotted_names_are_spellings_of_ours():
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
    parts, args = config.parse(train.PARTS, "", argv, extra=extra)
    flat = {k: v for part in parts for k, v in vars(part).items()}
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
    assert {k: flat[k] for k in expected} == expected
    assert args.distributed_world_size == 1


@pytest.mark.parametrize(
    "word",
    [
        "common.log_format=json",
        "model.foo=3",
        "common.fp16=true",
        "common.amp=false",
        "criterion=cross_entropy",
        "model.transformer.encoder.layerdrop=0.1",
        "model.transformer.decoder.layers=3",
        "task._name=translation",
        "--task.shorten_method=truncate",
    ],
)
def test_a_dotted_name_that_is_none_of_ours_is_an_error_naming_it(word):
    with pytest.raises(InputError, match=re.escape(word.lstrip("-").split("=")[0])):
        config.parse(train.PARTS, "", [word])


def test_world_size_in_an_old_command_line_is_checked_against_torchrun(corpus_dir):
    with pytest.raises(InputError, match="torchrun --nproc_per_node 16"):
        train.main(["--task.data", str(corpus_dir), "--distributed_training.distributed_world_size", "16"])


def test_a_fairseq_yaml_is_mapped_and_what_has_no_meaning_is_printed(tmp_path, capsys):
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
    parts, _ = config.parse(train.PARTS, "", argv)
    flat = {k: v for part in parts for k, v in vars(part).items()}
    expected = dict(
        mask_prob=0.3, log_interval=7, ema_decay=0.5, layers=3, lr=3e-3, update_freq=2, adam_betas=(0.9, 0.9)
    )
    assert {k: flat[k] for k in expected} == expected
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 3 and all(
        any(name in line for line in printed) for name in ("common.fp16", "max_positions", "distributed_world_size")
    )
    with pytest.raises(InputError, match="no such file"):
        config.parse(train.PARTS, "", ["--config-dir", str(tmp_path), "--config-name", "other"])
    (tmp_path / "mine.yaml").write_text(
        "task: {tokens_per_sample: 99}\nmodel: {max_source_positions: '${task.tokens_per_sample}'}\ncriterion: model\n"
    )
    parts, _ = config.parse(train.PARTS, "", argv[:4])
    assert {k: v for part in parts for k, v in vars(part).items()}["max_source_positions"] == 99
    for text, message in (
        ("criterion: cross_entropy\n", "criterion"),
        ("model: {layers: '${other.layers}'}\n", "resolved"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            config.parse(train.PARTS, "", argv[:4])


def test_fairseq_exact_stands_between_preset_and_flags():
    exact = config.parse([DataConfig], "", ["--fairseq_exact"])[0][0]
    assert (exact.teacher_input, exact.long_sentences, exact.drop_remainder) == ("masked", "skip", True)
    assert not exact.fixed_masks
    assert config.parse([DataConfig], "", ["--teacher_input", "full", "--fairseq_exact"])[0][0].teacher_input == "full"


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
        call(train.main, *FEW, "--max_update", "1", "--data_path", corpus_dir, "--save_dir", tmp_path / "run", *argv)


def test_a_negative_number_after_a_flag_is_its_value():
    parts, _ = config.parse([ModelConfig], "", ["--loss_scale", "-1e-3"])
    assert parts[0].loss_scale == -1e-3


@pytest.mark.parametrize(
    "variables", [dict(WORLD_SIZE="x"), dict(WORLD_SIZE="0"), dict(RANK="1"), dict(WORLD_SIZE="2", RANK="0")]
)
def test_a_broken_worker_environment_is_one_line(monkeypatch, corpus_dir, variables):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="environment|torchrun|WORLD_SIZE"):
        open_device(DeviceConfig(device="cpu"))


def test_programs_end_with_one_line_and_code_2(tmp_path):
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
