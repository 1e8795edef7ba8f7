"""Conversions to and from fairseq, and what convert.py refuses."""

import argparse
import contextlib
import dataclasses
import json
import pickle
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import config
import convert
import train
from config import DataConfig, InputError
from data import Corpus
from formats import fairseq_config, fairseq_names, fairseq_state
from formats.load import load
from run import checkpoint
from test.converting import *  # noqa: F403
from test.converting import both_norms, pretend, run, same, save_of_npu
from test.helpers import (
    GOLDEN,
    SMALL,
    Payload,
    call,
    compare_checkpoints,
    few,
    flags_of,
    golden,
    make_dataset,
)

import pytest
import torch

FAIRSEQ = GOLDEN / "checkpoint" / "fairseq_doc128.pt"


@contextlib.contextmanager
def fairseq_file(source, path):
    """The content of fairseq's form of a checkpoint, which is changed before it is written."""
    run(source, "fairseq", path)
    content = torch.load(path, weights_only=True)
    yield content
    torch.save(content, path)


def test_the_way_to_fairseq_and_back_is_exact(tmp_path, saved):
    source = saved / "checkpoint_last.pt"
    run(source, "fairseq", tmp_path / "theirs.pt")
    run(tmp_path / "theirs.pt", "native", tmp_path / "back.pt", "--from", "fairseq")
    a, b = checkpoint.load(source).content, checkpoint.load(tmp_path / "back.pt").content
    assert load(tmp_path / "theirs.pt").dictionary == a["dictionary"]
    assert set(a) == set(b) and all(same(dict(a[k]), dict(b[k])) for k in a if k != "format")


@golden
def test_the_way_from_fairseq_and_back_is_exact(tmp_path):
    run(FAIRSEQ, "native", tmp_path / "ours.pt")
    run(tmp_path / "ours.pt", "fairseq", tmp_path / "back.pt")
    a, b = (torch.load(path, weights_only=True) for path in (FAIRSEQ, tmp_path / "back.pt"))
    for content in (a, b):  # in a state dict order means nothing
        weights = content["model"]
        weights |= {f"_ema.{name}": v for name, v in weights.pop("encoder._ema").items()}
        content["model"] = dict(sorted(weights.items()))
    assert set(a) == set(b)
    for part in a:
        assert same(a[part], b[part]), part
    # a setting that was changed on the way
    run(FAIRSEQ, "native", tmp_path / "other.pt", "--lr", 0.5)
    run(tmp_path / "other.pt", "fairseq", tmp_path / "changed.pt")
    changed = torch.load(tmp_path / "changed.pt", weights_only=True)
    assert changed["cfg"]["optimization"]["lr"] == [0.5]


def names_of(tree, prefix="") -> set:
    """The names of all entries of a tree, with those above them."""
    names = {f"{prefix}{key}" for key in tree}
    parts = [(key, below) for key, below in tree.items() if isinstance(below, dict)]
    return names.union(*(names_of(below, f"{prefix}{key}.") for key, below in parts))


@golden
def test_what_we_write_for_fairseq_has_the_layout_of_its_own_file(tmp_path, saved):
    run(saved / "checkpoint_last.pt", "fairseq", tmp_path / "made.pt")
    made, own = (torch.load(path, weights_only=True) for path in (tmp_path / "made.pt", FAIRSEQ))
    assert set(made) == set(own) and names_of(made["cfg"]) <= names_of(own["cfg"])
    # what its loader reads has the same types, too
    a, b = made["cfg"]["model"], own["cfg"]["model"]
    for ours, theirs in ((a, b), (a["transformer"], b["transformer"])):
        assert all(type(ours[k]) is type(theirs[k]) for k in ours if k != "loss_scale")
    names = [k for k in own["model"] if ".layers.2." not in k and ".layers.3." not in k]
    assert set(made["model"]) == set(names) and type(made["model"]) is type(own["model"])
    assert made["optimizer_history"][0].keys() == own["optimizer_history"][0].keys()
    assert set(own["extra_state"]) | {"data2vec_text"} == set(made["extra_state"])
    a, b = made["last_optimizer_state"], own["last_optimizer_state"]
    assert a.keys() == b.keys() and a["param_groups"][0].keys() == b["param_groups"][0].keys()
    # in the order of its modules
    assert a["param_groups"][0]["params"] == list(range(len(a["state"]))) == list(a["state"])
    parameters = [k for k in names if not k.endswith(("version", "_ema"))]
    for name, state in zip(parameters, a["state"].values(), strict=True):
        assert state["exp_avg"].shape == made["model"][name].shape
        assert state["step"] == 4 and type(state["step"]) is int


def test_a_run_resumes_exactly_through_fairseqs_file(tmp_path, saved, corpus_dir):
    """Our own entries are removed, and the moments are one vector, as of fairseq's fp16 runs."""
    with fairseq_file(saved / "checkpoint_1_2.pt", tmp_path / "theirs.pt") as content:
        del content["extra_state"]["data2vec_text"]
        content["cfg"]["distributed_training"] = {"distributed_world_size": 1}
        last = content["last_optimizer_state"]
        states = last["state"].values()
        flat = {m: torch.cat([s[m].flatten() for s in states]) for m in checkpoint.MOMENTS}
        last["state"], last["loss_scale"] = {0: {"step": 2, **flat}}, 64.0
    (tmp_path / "run").mkdir()
    last = tmp_path / "run" / "checkpoint_last.pt"
    run(tmp_path / "theirs.pt", "native", last)
    assert checkpoint.load(last).content["scaler"] == {"scale": 64.0}
    argv = few(corpus_dir, last.parent, "--fairseq_exact", "--disable_validation")
    said = call(train.main, *argv, "--max_update", 4, "--save_interval_updates", 0)
    assert "at update 2" in said
    compare_checkpoints(saved / "checkpoint_last.pt", last)


@pytest.mark.parametrize(
    "spoilt, message",
    [
        (dict(exp_avg=torch.zeros(3)), "exp_avg of parameter 0 is"),
        (dict(exp_avg_sq=torch.zeros(3).long()), "not an ordinary tensor"),
        (dict(exp_avg=Payload("ran")), "but a system"),
        (dict(step=float("inf")), "infinity"),
        ({}, "Adam"),
    ],
)
def test_moments_that_do_not_fit_are_left_out_with_the_reason(tmp_path, saved, spoilt, message):
    with fairseq_file(saved / "checkpoint_last.pt", tmp_path / "theirs.pt") as content:
        states = content["last_optimizer_state"]["state"]
        states[0] = {**states[0], **spoilt} if spoilt else {}
    said = run(tmp_path / "theirs.pt", "native", tmp_path / "ours.pt")
    assert "start anew" in said and message in said
    content = checkpoint.load(tmp_path / "ours.pt").content
    assert content["optimizer"]["state"] == {} and content["progress"]["num_updates"] == 0


def test_settings_come_back_from_fairseqs_config_tree(saved):
    flat = checkpoint.load(saved / "checkpoint_last.pt").config
    fields = {field.name: field for part in config.PARTS for field in dataclasses.fields(part)}
    values, _ = fairseq_config.from_reference(fairseq_state.reference_config(flat), fields, "")
    differing = {k for k, v in values.items() if flat[k] != v}
    assert not differing and len(values) > 45


def as_omegaconf(value, monkeypatch):
    """The value as OmegaConf's nodes hold it in files of 2020 and 2021."""
    name, entry = "AnyNode", "_val"
    if isinstance(value, dict):
        name, entry = "DictConfig", "_content"
        value = {key: as_omegaconf(part, monkeypatch) for key, part in value.items()}
    if isinstance(value, list):
        name, entry = "ListConfig", "_content"
        value = [as_omegaconf(part, monkeypatch) for part in value]
    place = f"omegaconf.{name.lower()}"
    if place not in sys.modules:
        pretend(type(name, (types.SimpleNamespace,), {}), place, monkeypatch)
    return getattr(sys.modules[place], name)(_metadata=None, _parent=None, **{entry: value})


@pytest.mark.parametrize("age", ["args", "omegaconf", "fine-tuned"])
def test_older_files_of_fairseq_are_read_with_their_settings(tmp_path, saved, age, monkeypatch):
    mark = tmp_path / "ran"
    with fairseq_file(saved / "checkpoint_last.pt", tmp_path / "old.pt") as content:
        model = {k.replace("regression_head", "lm_head"): v for k, v in content["model"].items()}
        content["model"] = {**model, "encoder.lm_head.dense.weight": torch.ones(2, 2)}
        content["extra_state"] = {"best": Payload(mark)}
        cfg = content.pop("cfg")
        names = ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")
        flat = {f"encoder_{name}": SMALL[name] for name in names} | dict(encoder_layerdrop=0)
        flat |= dict(lr=[1.0], dropout=0.25, attention_dropout=0.0, activation_fn="gelu")
        if age == "args":
            content["args"] = argparse.Namespace(arch="roberta", **flat)
        elif age == "omegaconf":
            cfg["model"]["transformer"]["dropout"] = 0.25
            content["cfg"] = as_omegaconf(cfg, monkeypatch)
        else:  # its cfg is as flat
            task = dict(_name="sentence_prediction")
            content["cfg"] = dict(model=dict(_name="roberta_base", **flat), task=task)
    monkeypatch.undo()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "old.pt", weights_only=True)
    more = [] if age == "omegaconf" else ["--average_top_k_layers", 2]
    said = run(tmp_path / "old.pt", "native", tmp_path / "ours.pt", *more)
    assert "start anew" in said and "not taken over: encoder.lm_head" in said and not mark.exists()
    loaded = checkpoint.load(tmp_path / "ours.pt")
    source = checkpoint.load(saved / "checkpoint_last.pt")
    assert same(loaded.student, dict(source.student)) and same(loaded.teacher, dict(source.teacher))
    assert {k: loaded.config[k] for k in SMALL} == {**SMALL, "dropout": 0.25}


@pytest.mark.parametrize("kind", ["native", "fairseq", "old", "hf"])
def test_files_with_tensors_of_an_npu_are_what_they_are_on_the_host(
    tmp_path, saved, kind, monkeypatch
):
    source = tmp_path / "source"
    run(saved / "checkpoint_last.pt", "fairseq" if kind == "old" else kind, source)
    expected = load(source)
    content, path = expected.content, tmp_path / "x.pt"
    if kind == "hf":
        (source / "model.safetensors").unlink()
        path = source / "pytorch_model.bin"
    if kind == "old":
        content["args"] = argparse.Namespace()
    save_of_npu(content, path, monkeypatch)
    source = source if kind == "hf" else path
    for _ in ("with torch_npu", "without it"):
        assert same(load(source).student, expected.student)
        if kind == "native":
            assert same(checkpoint.load(path).content["optimizer"], content["optimizer"])
        monkeypatch.undo()


WEIGHT = "encoder.sentence_encoder.layers.0.{}.weight"


@pytest.mark.parametrize(
    "place", ["", "model", "cfg", WEIGHT.format("fc1"), WEIGHT.format("self_attn.k_proj")]
)
def test_an_object_that_a_file_cannot_do_without_is_named_by_its_class(tmp_path, saved, place):
    with fairseq_file(saved / "checkpoint_last.pt", tmp_path / "x.pt") as content:
        (content["model"] if "." in place else content)[place] = Payload(tmp_path / "ran")
    if not place:  # the file is the object
        torch.save(Payload(tmp_path / "ran"), tmp_path / "x.pt")
    for read in (load, checkpoint.load):  # os.system is called
        with pytest.raises(InputError, match=r"x\.pt: .*system\b"):
            read(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


@both_norms
def test_bare_state_dicts_take_their_shape_from_flags(tmp_path, random_file, capsys):
    _, (student, teacher) = random_file
    theirs = fairseq_names.to_reference(student.state_dict(), teacher.encoder.state_dict())
    torch.save(theirs, tmp_path / "bare.pt")
    # parameters instead of tensors
    state = {k: torch.nn.Parameter(v) for k, v in theirs.items() if k != fairseq_names.TEACHER}
    torch.save(state, tmp_path / "parameters.pt")
    shape = flags_of(dict(SMALL, normalize_before=student.encoder.layer_norm is not None))
    run(tmp_path / "bare.pt", "fairseq", tmp_path / "theirs.pt", *shape)
    for name, argv in (("bare", shape), ("parameters", shape), ("theirs", [])):
        run(tmp_path / f"{name}.pt", "native", tmp_path / f"from_{name}.pt", *argv)
        loaded = checkpoint.load(tmp_path / f"from_{name}.pt")
        assert same(loaded.student, dict(student.state_dict()))
        assert loaded.config["layers"] == SMALL["layers"]
        is_told = "does not say its --attention_heads; taking 2" in capsys.readouterr().err
        assert is_told == (name != "theirs")
        encoder = (student if name == "parameters" else teacher).encoder
        assert same(loaded.teacher, dict(encoder.state_dict()))
    with pytest.raises(InputError, match="the student's encoder has no layers.2"):
        run(tmp_path / "bare.pt", "native", tmp_path / "other.pt", *shape, "--layers", 3)


@pytest.mark.parametrize(
    "line, message",
    [
        ("--to hf OUT --activation_dropout 0.1", "activation_dropout 0.1: .* has only 0.0"),
        ("--to hf OUT --normalize_before", "has no layer_norm.weight"),
        ("--to native OUT --teacher", "--teacher goes with --to hf"),
        ("--to native DICT", "exists; remove it"),
        ("--to tf OUT", "needed: --ckpt"),
        ("", "needed: --ckpt"),
        ("--to hf OUT --from fairseq", "--from fairseq: .* is native"),
        ("--to hf OUT --dict DICT", "is not the one of"),
        ("--to hf OUT --dict OUT", "no such file"),
        ("--to hf OUT --encoder_json DICT", "no vocab.bpe"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_nothing_is_written(tmp_path, saved, line, message):
    (tmp_path / "dict.txt").write_text("a 1\n")
    names = dict(OUT=tmp_path / "out", DICT=tmp_path / "dict.txt")
    argv = [names.get(word, word) for word in line.split()]
    with pytest.raises(InputError, match=message):
        call(convert.main, "--ckpt", saved / "checkpoint_last.pt", *argv)
    assert [p.name for p in tmp_path.iterdir()] == ["dict.txt"]


@pytest.mark.parametrize("kind", ["hf", "fairseq", "native"])
def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, saved, kind, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(*dict(hf=(Path, "write_bytes")).get(kind, (torch, "save")), full)
    with pytest.raises(OSError, match="No space left"):
        run(saved / "checkpoint_last.pt", kind, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [("a", "b"), (None, 1), ([1], [2]), torch.zeros(2)])
def test_settings_of_a_wrong_type_in_what_fairseq_keeps_for_us_are_refused(tmp_path, saved, value):
    with fairseq_file(saved / "checkpoint_last.pt", tmp_path / "x.pt") as content:
        content["extra_state"][fairseq_names.OUR_ENTRY]["config"]["adam_betas"] = value
    with pytest.raises(InputError, match=r"x.pt: damaged: its config|--adam_betas"):
        run(tmp_path / "x.pt", "native", tmp_path / "out.pt")


HF = ("config.json", "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("name", [*HF, "x.pt", "dict.txt", "train.bin", "train.idx"])
def test_a_pointer_of_git_lfs_in_place_of_a_file_is_named(tmp_path, name):
    folder, _ = make_dataset(tmp_path)
    config = dict(model_type="data2vec-text", layer_norm_eps=1e-5)
    (folder / "config.json").write_text(json.dumps(config))
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 130\n"
    (folder / name).write_text(pointer)
    with pytest.raises(InputError, match=f"{name}: a pointer of Git LFS.* git lfs pull"):
        Corpus(DataConfig(data_path=str(folder))).split("train")
        load(folder if name in HF else folder / name)
