"""Hostile input to fine-tuning: it is refused in one line, and nothing of a user's is lost."""

import json
import os
import resource
import shutil

import convert
import finetune
from config import InputError, RunError
from run import checkpoint
from tasks import labelled, linear_probe, pretrained
from test.helpers import call
from test.test_finetune import flags, place  # noqa: F401

import pytest
import torch

NAN = float("nan")


@pytest.fixture(scope="module")
def tuned(place, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("tuned")
    call(finetune.main, *flags(place, out, max_epoch=1))
    return out / "checkpoint_best.pt"


def changed(path, out, *keys_and_value):
    """A copy of the checkpoint in which one value of its tree is another."""
    content = torch.load(path, weights_only=True)
    *keys, last, value = keys_and_value
    part = content
    for key in keys:
        part = part[key]
    part[last] = value
    torch.save(content, out)
    return out


TOKENS, POSITIONS, FC1 = (
    f"encoder.{name}.weight" for name in ("embed_tokens", "embed_positions", "layers.0.fc1")
)


@pytest.mark.parametrize(
    "keys, value, message",
    [
        (("config", "attention_heads"), "two", "--attention_heads two: must be of type int"),
        (("config", "attention_heads"), -2, "--attention_heads -2: must be at least 1"),
        (("config", "attention_heads"), 2.0, "--attention_heads 2.0: must be of type int"),
        (("config", "attention_heads"), [2], "--attention_heads .2.: must be of type int"),
        (("config", "activation_fn"), 7, "--activation_fn 7: must be of type str"),
        (
            ("student", TOKENS),
            torch.zeros(0, 16),
            "embed_tokens.weight is .0, 16., not a matrix of 4 rows or more",
        ),
        (("student", TOKENS), torch.zeros(40, 0), "--embed_dim 0: must be at least 1"),
        (
            ("student", TOKENS),
            torch.zeros(40, 16, dtype=torch.complex64),
            "not a tensor of floating-point numbers",
        ),
        (("student", POSITIONS), torch.zeros(()), "embed_positions.weight is .., not a matrix"),
        (
            ("student", POSITIONS),
            torch.zeros(1, 16),
            "embed_positions.weight is .1, 16., not a matrix",
        ),
        (("student", FC1), torch.zeros(()), "fc1.weight is .., not a matrix"),
        (("classifier", "labels"), [], "damaged: its classifier"),
        (("classifier", "label_scale"), NAN, "damaged: its classifier"),
        (("classifier", "label_scale"), 0, "damaged: its classifier"),
        (("classifier", "head"), {}, "the classification head has no out_proj.weight"),
    ],
)
def test_a_checkpoint_with_one_wrong_value_is_refused_in_one_line(
    keys, value, message, place, tuned, tmp_path
):
    path = changed(tuned, tmp_path / "x.pt", *keys, value)
    (tmp_path / "lines").write_text("w1\n")
    with pytest.raises(InputError, match=message):
        finetune.main(
            [
                "--ckpt",
                str(path),
                "--predict",
                str(tmp_path / "lines"),
                "--dict",
                str(place / "data/dict.txt"),
            ]
        )
    if keys[0] != "classifier":
        with pytest.raises(InputError, match=message):
            finetune.main(flags(place, tmp_path / "out", ckpt=path))


def test_a_folder_of_data_that_is_no_text_is_not_looked_for(tuned, tmp_path, place):  # noqa: F811
    for value in (5, [1.0], None):
        path = changed(tuned, tmp_path / "x.pt", "config", "data_path", value)
        with pytest.raises(InputError, match="no dict.txt in"):
            finetune.main(flags(place, tmp_path / "out", ckpt=path))


def test_names_of_classes_print_no_escape_sequence(tuned, place, tmp_path, capsys):  # noqa: F811
    path = changed(tuned, tmp_path / "x.pt", "classifier", "labels", ["\x1b[2J\n", "\ud800"])
    (tmp_path / "lines").write_text("w1\n")
    argv = [
        "--ckpt",
        str(path),
        "--predict",
        str(tmp_path / "lines"),
        "--dict",
        str(place / "data/dict.txt"),
    ]
    assert call(finetune.main, *argv).splitlines()[0] == "label\t\\x1b[2J\t\\ud800"


def test_a_small_file_whose_layers_share_one_matrix_takes_little_memory(tuned, tmp_path):
    content, many = torch.load(tuned, weights_only=True), 400
    one = torch.zeros(1 << 20)
    content["student"] |= {
        f"encoder.layers.{i}.fc1.weight": one.view(1 << 10, 1 << 10) for i in range(many)
    }
    torch.save(content, tmp_path / "x.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="its tensors have 1,6.* bytes, but share 4,"):
        pretrained.load(tmp_path / "x.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_small_file_whose_names_ask_for_a_large_model_takes_little_memory(tuned, place, tmp_path):  # noqa: F811
    content, width = torch.load(tuned, weights_only=True), 2048
    content["student"] = {
        TOKENS: torch.zeros(40, width),
        POSITIONS: torch.zeros(66, width),
        FC1: torch.zeros(1, width),
    }
    content["student"] |= {f"encoder.layers.{i}.x": torch.zeros(1) for i in range(8)}  # 67 MB each
    torch.save(content, tmp_path / "x.pt")
    (tmp_path / "lines").write_text("w1\n")
    argv = [
        "--ckpt",
        tmp_path / "x.pt",
        "--predict",
        tmp_path / "lines",
        "--dict",
        place / "data/dict.txt",
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="the encoder has no layernorm_embedding.weight"):
        finetune.main(list(map(str, argv)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_model_too_large_for_the_memory_is_refused_before_it_is_made(
    place, tmp_path, monkeypatch
):  # noqa: F811
    monkeypatch.setattr("hardware.device.Device.memory", lambda self: 100_000)
    with pytest.raises(InputError, match="too large for this cpu"):
        finetune.main(flags(place, tmp_path / "out"))


@pytest.mark.parametrize(
    "name, text, options, message",
    [
        (
            "x.jsonl",
            '{"text": "\\ud800", "label": 1}\n',
            {},
            "line 1: not JSON: .* surrogates not allowed",
        ),
        (
            "x.tsv",
            "text\tlabel\n" + "".join(f"w1\t{i}\n" for i in range(1001)),
            {},
            "1,001 different labels",
        ),
        (
            "x.tsv",
            "text\tlabel\nw1\t1e300\nw2\t1\n",
            dict(regression=True),
            r"line 2: 1e\+300 / 1 is too large",
        ),
        (
            "x.tsv",
            "text\tlabel\nw1\t1\nw2\t1\n",
            dict(regression=True, label_scale=1e-320),
            "line 2: 1 / .* too large",
        ),
        (
            "x.tsv",
            "text\tlabel\nw1\t1\n",
            dict(regression=True, freeze=True),
            "one training example",
        ),
        ("x.tsv", "text\tlabel\nw1\tgood\nw2\tbad\n", dict(text="²"), "no column ²"),
        ("x.tsv", "text\tlabel\nw1\tgood\nw2\tbad\n", dict(text="9" * 5000), "no column 999"),
        ("x.tsv", "text\tlabel\nw1\tgood\n", dict(num_classes=2 * 10**9), "must be at most 1000"),
        ("x.tsv", "text\tlabel\nw1\tgood\n", dict(seeds=2 * 10**9), "must be at most 1000"),
    ],
)
def test_labelled_text_and_settings_that_ask_for_too_much(
    name, text, options, message, place, tmp_path
):  # noqa: F811
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        finetune.main(
            flags(
                place,
                tmp_path / "out",
                **dict(train=tmp_path / name, valid=tmp_path / name, **options),
            )
        )


def test_a_probe_that_does_not_converge_ends_in_one_line():
    with pytest.raises(RunError, match="the loss of the linear probe is"):
        linear_probe.fit(torch.rand(4, 2), torch.tensor([3e38, -3e38, 1, 2]).numpy(), 1, 0.1)


def test_a_long_label_makes_no_long_line(place, tmp_path):  # noqa: F811
    (tmp_path / "x.tsv").write_text("text\tlabel\nw1\t" + "a" * 100_000 + "\n")
    with pytest.raises(InputError) as error:
        finetune.main(flags(place, tmp_path / "out", valid=tmp_path / "x.tsv"))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("words", [" ".join(["w5"] * 2_000_000), "汉" * 2_000_000])
def test_an_endless_text_becomes_the_example_that_its_beginning_is(
    words, place, tmp_path, monkeypatch
):  # noqa: F811
    seen = []
    make = labelled.make_split
    monkeypatch.setattr(
        labelled,
        "make_split",
        lambda texts, *rest: (seen.append(texts[0][0]), make(texts, *rest))[1],
    )
    for name, text in (("long", words), ("short", words[:600])):
        (tmp_path / f"{name}.tsv").write_text(f"text\tlabel\n{text}\tgood\nw2\tbad\n")
        own = dict(train=tmp_path / f"{name}.tsv", valid=tmp_path / f"{name}.tsv", max_epoch=1)
        call(finetune.main, *flags(place, tmp_path / name, **own))
    assert max(map(len, seen)) < 1000
    rows = [
        json.loads((tmp_path / n / "finetune.jsonl").read_text().splitlines()[0])["loss"]
        for n in ("long", "short")
    ]
    assert rows[0] == rows[1]


# ---------------------------------------------------------------------------------------------- what is there stays


def test_a_dictionary_and_a_bpe_of_the_users_are_neither_removed_nor_replaced(place, tmp_path):  # noqa: F811
    for name in ("dict.txt", "encoder.json", "vocab.bpe"):
        (tmp_path / name).mkdir()
        out = tmp_path / name
        (out / name).write_text("mine")
        with pytest.raises(InputError, match=f"holds another {name}"):
            finetune.main(flags(place, out, max_epoch=1))
        assert (out / name).read_text() == "mine"
    shutil.copyfile(
        place / "data" / "dict.txt", tmp_path / "dict.txt" / "dict.txt"
    )  # the same one is no obstacle
    call(finetune.main, *flags(place, tmp_path / "dict.txt", max_epoch=1))
    call(finetune.main, *flags(place, tmp_path / "dict.txt", max_epoch=1, overwrite=True))


def test_overwrite_removes_no_other_fine_tuning_in_a_folder_below(place, tmp_path):  # noqa: F811
    call(finetune.main, *flags(place, tmp_path / "my_seed_1", max_epoch=1))
    call(finetune.main, *flags(place, tmp_path, max_epoch=1))
    call(finetune.main, *flags(place, tmp_path, max_epoch=1, overwrite=True))
    assert (tmp_path / "my_seed_1" / "checkpoint_best.pt").exists()


def test_predictions_replace_neither_what_they_read_nor_a_device(tuned, tmp_path):
    (tmp_path / "lines").write_text("w1\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "lines")
    shutil.copytree(tuned.parent, tmp_path / "tuned")
    argv = [
        "--ckpt",
        str(tmp_path / "tuned" / "checkpoint_best.pt"),
        "--predict",
        str(tmp_path / "lines"),
        "--out",
    ]
    for name in ("lines", "link", "tuned/checkpoint_best.pt"):
        with pytest.raises(InputError, match="is a file that this reads"):
            finetune.main([*argv, str(tmp_path / name)])
    with pytest.raises(OSError, match="neither a file nor a folder"):
        finetune.main([*argv, str(tmp_path / "pipe")])
    with pytest.raises(OSError, match="neither a file nor a folder"):
        convert.main(["--ckpt", argv[1], "--to", "native", str(tmp_path / "pipe")])
    assert (tmp_path / "lines").read_text() == "w1\n" and (tmp_path / "pipe").is_fifo()
    assert checkpoint.load(argv[1]) and not list(tmp_path.glob("*.tmp"))
