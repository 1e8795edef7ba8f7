"""fairseq's own YAML and old command lines: what is ignored with a message, and what names our
option."""

import importlib.util

import config
from config import InputError
from formats.fairseq_config import ANY, THEIRS
from run import flags

import pytest


def settings(*argv) -> dict:
    parts, _ = flags.parse(config.PARTS, "", list(argv))
    return {name: value for part in parts for name, value in vars(part).items()}


@pytest.mark.parametrize("name", THEIRS)
def test_an_option_of_fairseqs_is_taken_at_its_harmless_value_and_refused_at_others(name, capsys):
    harmless, why = THEIRS[name]
    assert settings(f"{name}={'x' if harmless is ANY else harmless}") == settings()
    printed = capsys.readouterr().err
    assert printed.startswith(f"--{name}=") and printed.endswith(f"{why}\n") if why else not printed
    if harmless is not ANY:
        with pytest.raises(InputError, match=f"^--{name}[:=]") as error:
            settings(f"{name}=7")
        assert why in str(error.value)


@pytest.mark.parametrize("line", ["hydra.run.dir=x", "hydra/launcher=a --lr 1", "run_config=local"])
def test_settings_of_hydra_itself_are_ignored_in_one_line(line, capsys):
    settings(*line.split())
    printed = capsys.readouterr().err
    assert printed.startswith(f"{line.split()[0]} ignored: ") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--encoder-layers 6 --max-sentences 8", dict(layers=6, batch_size=8)),
        ("--encoder-embed-dim 48 --encoder-ffn-embed-dim 96", dict(embed_dim=48, ffn_embed_dim=96)),
        ("--encoder-attention-heads 4 --encoder-layerdrop 0", dict(attention_heads=4)),
        ("--max-positions 256", dict(max_source_positions=256)),
        ("--save_dir hydra/run=a", dict(save_dir="hydra/run=a")),
        ("--save_dir ~runs", dict(save_dir="~runs")),
    ],
)
def test_names_of_the_older_command_line_are_spellings_of_ours(line, expected):
    given = settings(*line.split())
    assert {name: given[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("~common.tensorboard_logdir", "^~common.tensorboard_logdir: .* the value that you want"),
        ("criterion=masked_lm", "--objective mlm"),
        ("task.required_seq_len_multiple=8", "only --task.required_seq_len_multiple=1 is built in"),
    ],
)
def test_a_refused_word_says_what_to_give_instead(word, answer):
    with pytest.raises(InputError, match=answer):
        settings(word)


def test_fairseqs_base_yaml_runs_without_tensorboard(tmp_path, capsys, monkeypatch):
    pytest.importorskip("yaml", reason="PyYAML is optional")
    (tmp_path / "base.yaml").write_text("common: {tensorboard_logdir: tb, fp16: true}\n")
    argv = ["--config-dir", str(tmp_path), "--config-name", "base"]
    for is_there, folder, lines in ((True, "tb", 2), (False, "", 3)):
        package = object() if is_there else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=package: package)
        assert settings(*argv)["tensorboard_logdir"] == folder
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == lines and "--fairseq_exact" in printed[0]
    assert "common.tensorboard_logdir=tb ignored: the tensorboard package is missing" in printed[-1]
    # who asks for it gets an error
    assert settings(*argv, "--tensorboard_logdir", "x")["tensorboard_logdir"] == "x"
