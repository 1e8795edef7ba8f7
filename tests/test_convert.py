"""How do we know: conversions to and from transformers and fairseq.

The tests against transformers itself skip where it is not installed: pip install transformers.
"""

import argparse
import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch

import convert
import eval as evaluation
import train
from config import InputError
from dataset.binarized import BOS, EOS, PAD, UNK, Dictionary, TokenStream
from dataset.text import load_tokenizer
from runtime import checkpoint
from tests.helpers import (
    FEW,
    GOLDEN,
    SMALL,
    Payload,
    call,
    compare_checkpoints,
    golden,
    make_dataset,
    random_encoder,
)

FAIRSEQ = GOLDEN / "checkpoint" / "fairseq_doc128.pt"
WORDS = 60


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("corpus"), words=WORDS)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, corpus_dir):
    """A run of four updates, as released, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("saved")
    few = [*FEW, "--fairseq_exact", "--data_path", corpus_dir, "--save_dir", folder, "--max_update", 4]
    call(train.main, *few, "--save_interval_updates", 2, "--keep_interval_updates", -1, "--disable_validation")
    return folder


@pytest.fixture
def random_file(tmp_path, saved):
    """A checkpoint whose every weight is random, student and teacher apart."""
    content = checkpoint.load(saved / "checkpoint_last.pt").content
    size = content["dictionary"]["size"]
    models = [random_encoder(seed, size)[0] for seed in (1, 2)]
    content.update(student=models[0].state_dict(), teacher=models[1].encoder.state_dict())
    checkpoint.save({k: v for k, v in content.items() if k != "format"}, tmp_path / "random.pt")
    return tmp_path / "random.pt", models


def run(source, kind, out, *argv):
    return call(convert.main, "--ckpt", source, "--to", kind, out, *argv)


def same(a, b):
    """Whether two trees are equal to the bit, types and order included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# ---------------------------------------------------------------------------------------------- transformers


def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")


@pytest.mark.parametrize("teacher", [False, True])
def test_transformers_computes_the_same_hidden_states_in_every_layer(tmp_path, random_file, teacher, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path, (student, other) = random_file
    run(path, "hf", tmp_path / "hf", *(["--teacher"] if teacher else []))
    theirs = transformers().AutoModel.from_pretrained(tmp_path / "hf").eval()
    encoder = (other if teacher else student).encoder
    tokens = torch.randint(4, WORDS, (5, 24), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((24, 17, 3, 24, 9)):
        tokens[row, 0], tokens[row, length - 1], tokens[row, length:] = BOS, EOS, PAD
    tokens[3, 5] = PAD  # inside, too
    real = tokens != PAD
    with torch.no_grad():
        ours = encoder.hidden_states(tokens)
        found = theirs(input_ids=tokens, attention_mask=real.long(), output_hidden_states=True).hidden_states
    assert len(ours) == len(found) == SMALL["layers"] + 1
    for a, b in zip(ours, found):
        assert (a - b)[real].abs().max() < 1e-5 and a[real].std() > 0.1


@golden
def test_transformers_tokenizer_gives_fairseq_s_ids_for_byte_level_bpe(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, bpe = GOLDEN / "corpora" / "bpe-bin", GOLDEN / "corpora" / "gpt2_bpe"
    dictionary = Dictionary(folder / "dict.txt")
    convert.write_tokenizer(tmp_path, dictionary, bpe / "encoder.json", bpe / "vocab.bpe", 512)
    (tmp_path / "config.json").write_text('{"model_type": "data2vec-text"}')
    tokenizer = transformers().AutoTokenizer.from_pretrained(tmp_path)
    lines = (GOLDEN / "corpora" / "raw" / "wiki.valid.raw").read_text("utf-8").split("\n")
    rows = TokenStream(folder, "valid")
    checked = 0
    for i in range(900):
        if "<unk>" not in lines[i]:  # transformers takes that text for the special token
            row = rows.read(rows.starts[i], rows.starts[i + 1])
            assert tokenizer(lines[i].strip())["input_ids"] == [BOS, *row.tolist()]
            checked += rows.sizes[i] > 1
    assert checked > 100
    masked = tokenizer("Hello <mask> world")["input_ids"]
    assert masked.count(dictionary.mask_id) == 1 and len(masked) == 5
    ids = [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert ids == [0, 1, 2, 3] and tokenizer.mask_token_id == dictionary.mask_id and len(tokenizer) == len(dictionary)
    assert len(tokenizer("word " * 900, truncation=True)["input_ids"]) == 512


def test_transformers_tokenizer_gives_the_dictionary_s_ids_for_words(tmp_path, saved, corpus_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run(saved / "checkpoint_last.pt", "hf", tmp_path / "hf")  # the checkpoint knows its data
    tokenizer = transformers().AutoTokenizer.from_pretrained(tmp_path / "hf")
    symbols = Dictionary(corpus_dir / "dict.txt").symbols
    text = f" {symbols[9]}\t{symbols[4]} nowhere  {symbols[20]} <mask>\n"
    assert tokenizer(text)["input_ids"] == [BOS, 9, 4, 3, 20, len(symbols) - 1, EOS]
    assert tokenizer([symbols[5], symbols[5] + " " + symbols[6]], padding=True)["input_ids"][0][-1] == PAD


def test_tokens_of_the_bpe_that_the_dictionary_lacks_are_unk_to_the_model(tmp_path, saved, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hf = transformers()
    alphabet = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "th", "the", "\u0120the"]
    (tmp_path / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\n\u0120 the\n")
    known = [i for i, token in enumerate(tokens) if token not in ("th", "q", "z")]
    (tmp_path / "dict.txt").write_text("".join(f"{i} 1\n" for i in reversed(known)))
    dictionary = Dictionary(tmp_path / "dict.txt")
    student, cfg = random_encoder(0, len(dictionary))
    bare = checkpoint.to_reference(student.state_dict(), dict(student.encoder.state_dict()))
    torch.save(bare, tmp_path / "bare.pt")
    shape = [part for k, v in SMALL.items() for part in (f"--{k}", v)]
    run(tmp_path / "bare.pt", "hf", tmp_path / "hf", "--data_path", tmp_path, *shape)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = hf.AutoModel.from_pretrained(tmp_path / "hf").eval()
    assert len(tokenizer) == model.config.vocab_size == len(dictionary) + 3
    text = "the quiz: the thick thin zoo"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    (ours,) = load_tokenizer(tmp_path, dictionary)([text])
    assert np.array_equal(np.where(ids[0] < len(dictionary), ids[0], UNK), [BOS, *ours]) and UNK in ours
    with torch.no_grad():
        found, expected = model(ids).last_hidden_state, student.encoder(torch.tensor([[BOS, *ours]]))[0]
    assert torch.allclose(found, expected, atol=1e-5)
    run(tmp_path / "hf", "native", tmp_path / "back.pt")
    back = checkpoint.load(tmp_path / "back.pt").student
    assert torch.equal(back["encoder.embed_tokens.weight"], student.encoder.embed_tokens.weight)


def test_the_way_to_transformers_and_back_is_exact(tmp_path, random_file):
    path, (student, _) = random_file
    run(path, "hf", tmp_path / "hf")
    assert "not taken over" not in run(tmp_path / "hf", "native", tmp_path / "back.pt", "--from", "hf")
    back = checkpoint.load(tmp_path / "back.pt")
    assert same(back.student, {f"encoder.{k}": v for k, v in student.encoder.state_dict().items()})
    assert same(back.teacher, dict(student.encoder.state_dict()))  # which training begins with
    assert {k: back.config[k] for k in SMALL} == SMALL
    run(tmp_path / "back.pt", "hf", tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_came_from_transformers_evaluates_and_trains(tmp_path, random_file, corpus_dir, capsys):
    path, _ = random_file
    run(path, "hf", tmp_path / "hf")
    run(tmp_path / "hf", "native", tmp_path / "back.pt")
    few = ["--data_path", corpus_dir, "--device", "cpu"]
    result = json.loads(call(evaluation.main, "--ckpt", tmp_path / "back.pt", *few, "--json"))
    assert np.isfinite(result["loss"]) and "no regression head" in capsys.readouterr().err
    argv = [*FEW, "--data_path", corpus_dir, "--save_dir", tmp_path / "run", "--max_update", 1, "--lr", 0]
    call(train.main, *argv, "--init_from", tmp_path / "back.pt", "--weight_decay", 0)
    trained = checkpoint.load(tmp_path / "run" / "checkpoint_last.pt")
    given = checkpoint.load(tmp_path / "back.pt")
    assert all(torch.equal(trained.student[k], v) for k, v in given.student.items())


def hf_state(folder) -> dict:
    return convert.read_safetensors(folder / "model.safetensors")


def test_a_pickled_float16_model_with_a_head_and_token_types_is_read(tmp_path, random_file):
    path, (student, _) = random_file
    run(path, "hf", tmp_path / "hf")
    state = {f"data2vec_text.{k}": v.half() for k, v in hf_state(tmp_path / "hf").items()}
    state |= {"classifier.dense.weight": torch.ones(2, 2), "data2vec_text.embeddings.position_ids": torch.arange(66)}
    row = torch.linspace(-1, 1, SMALL["embed_dim"]).half()
    state["data2vec_text.embeddings.token_type_embeddings.weight"] = row[None].repeat(2, 1)
    (tmp_path / "hf" / "model.safetensors").unlink()
    mark = tmp_path / "ran"
    torch.save({**state, "lm_head.bias": Payload(mark)}, tmp_path / "hf" / "pytorch_model.bin")
    said = run(tmp_path / "hf", "native", tmp_path / "back.pt")
    assert "not taken over: classifier.dense" in said and "not taken over: lm_head.bias" in said and not mark.exists()
    back = checkpoint.load(tmp_path / "back.pt").student
    for name, tensor in student.encoder.state_dict().items():
        expected = tensor.half().float()
        if name == "embed_positions.weight":
            expected[2:] += row.float()
        assert torch.equal(back[f"encoder.{name}"], expected), name


def edited(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def without_eps(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "layer_norm_eps"}))


def weights(change):
    def edit(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (edited(layer_norm_eps=1e-12), "layer_norm_eps is 1e-12; only 1e-05"),
        (without_eps, "layer_norm_eps is 1e-12; only 1e-05"),
        (edited(model_type="bert"), "model_type is bert"),
        (edited(hidden_act="gelu_new"), "gelu_new: choose from gelu, relu"),
        (edited(hidden_size="wide"), "config.json: model.embed_dim=wide"),
        (edited(num_hidden_layers=3), "has no layers.2"),
        (edited(max_position_embeddings=None), "cannot be read as a config"),
        (lambda folder: (folder / "config.json").write_text("[]"), "cannot be read as a config"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (weights(lambda raw: raw[:-4]), "lies outside of the file"),
        (weights(lambda raw: raw[:100]), "the file is cut"),
        (weights(lambda raw: b""), "not a whole safetensors file"),
        (weights(lambda raw: b"\xff" * 8 + raw[8:]), "the file is cut"),
        (weights(lambda raw: raw.replace(b'"shape": [16', b'"shape": [61')), "not a whole safetensors file"),
        (weights(lambda raw: raw.replace(b'"F32"', b'"F99"')), "is of type F99"),
        (weights(lambda raw: raw.replace(b"layer.1.attention.self.key", b"layer.1.attention.self.kez")), "no k_proj"),
        (weights(lambda raw: raw.replace(b"intermediate", b"intermediatf")), "has no"),
    ],
)
def test_folders_of_transformers_that_are_damaged_or_other_models_get_one_line(tmp_path, random_file, edit, message):
    run(random_file[0], "hf", tmp_path / "hf")
    edit(tmp_path / "hf")
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path / "hf", "native", tmp_path / "back.pt")
    assert "\n" not in str(error.value) and not (tmp_path / "back.pt").exists()


# ---------------------------------------------------------------------------------------------- fairseq


def fairseq_file(source, path, change=lambda content: None):
    run(source, "fairseq", path)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_the_way_to_fairseq_and_back_is_exact(tmp_path, saved):
    source = saved / "checkpoint_last.pt"
    run(source, "fairseq", tmp_path / "theirs.pt")
    run(tmp_path / "theirs.pt", "native", tmp_path / "back.pt", "--from", "fairseq")
    a, b = checkpoint.load(source).content, checkpoint.load(tmp_path / "back.pt").content
    assert set(a) == set(b) and all(same(dict(a[k]), dict(b[k])) for k in a if k != "format")


@golden
def test_the_way_from_fairseq_and_back_is_exact(tmp_path):
    run(FAIRSEQ, "native", tmp_path / "ours.pt")
    run(tmp_path / "ours.pt", "fairseq", tmp_path / "back.pt")
    a, b = (torch.load(path, weights_only=True) for path in (FAIRSEQ, tmp_path / "back.pt"))
    assert set(a) == set(b)
    for part in a:
        if part == "model":  # there, order means nothing
            a[part]["encoder._ema"], b[part]["encoder._ema"] = ({**x[part]["encoder._ema"]} for x in (a, b))
            assert set(a[part]) == set(b[part]) and set(a[part]["encoder._ema"]) == set(b[part]["encoder._ema"])
            ema = b[part].pop("encoder._ema")
            assert all(torch.equal(v, ema[k]) for k, v in a[part].pop("encoder._ema").items())
            assert all(torch.equal(v, b[part][k]) for k, v in a[part].items())
        else:
            assert same(a[part], b[part]), part


@golden
def test_what_we_write_for_fairseq_has_the_layout_of_its_own_file(tmp_path, saved):
    run(saved / "checkpoint_last.pt", "fairseq", tmp_path / "made.pt")
    made, own = (torch.load(path, weights_only=True) for path in (tmp_path / "made.pt", FAIRSEQ))

    def keys(tree):
        return {k: keys(v) if isinstance(v, dict) else None for k, v in tree.items()}

    def within(part, whole, where):
        for key, below in part.items():
            assert key in whole, (where, key)
            if below is not None and whole[key] is not None:
                within(below, whole[key], f"{where}.{key}")

    assert set(made) == set(own)
    within(keys(made["cfg"]), keys(own["cfg"]), "cfg")
    for part in ("model", "transformer"):  # what its loader reads has the same types, too
        a, b = (c["cfg"]["model"] if part == "model" else c["cfg"]["model"]["transformer"] for c in (made, own))
        assert all(type(a[k]) is type(b[k]) for k in a if k != "loss_scale"), part
    few = [k for k in own["model"] if ".layers.2." not in k and ".layers.3." not in k]
    assert set(made["model"]) == set(few) and type(made["model"]) is type(own["model"])
    assert made["optimizer_history"][0].keys() == own["optimizer_history"][0].keys()
    assert set(own["extra_state"]) | {"data2vec_text"} == set(made["extra_state"])
    a, b = made["last_optimizer_state"], own["last_optimizer_state"]
    assert a.keys() == b.keys() and a["param_groups"][0].keys() == b["param_groups"][0].keys()
    assert a["param_groups"][0]["params"] == list(range(len(a["state"]))) == list(a["state"])
    parameters = [k for k in few if not k.endswith(("version", "_ema"))]  # in the order of its modules
    parameters = dict(zip(parameters, a["state"].values(), strict=True))
    assert all(s["exp_avg"].shape == made["model"][k].shape for k, s in parameters.items())
    assert all(s["step"] == 4 and type(s["step"]) is int for s in a["state"].values())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_goes_on_exactly_through_fairseq_s_file(tmp_path, saved, corpus_dir, precision):
    """Without what only we put there, so that all is read from fairseq's own entries."""

    def change(content):
        del content["extra_state"]["data2vec_text"]
        content["cfg"]["distributed_training"] = {"distributed_world_size": 1}
        if precision == "fp16":  # one vector for all parameters, in their order
            last = content["last_optimizer_state"]
            flat = {m: torch.cat([s[m].flatten() for s in last["state"].values()]) for m in convert.MOMENTS}
            last["state"], last["loss_scale"] = {0: {"step": 2, **flat}}, 64.0

    fairseq_file(saved / "checkpoint_1_2.pt", tmp_path / "theirs.pt", change)
    (tmp_path / "run").mkdir()
    run(tmp_path / "theirs.pt", "native", tmp_path / "run" / "checkpoint_last.pt")
    few = [*FEW, "--fairseq_exact", "--data_path", corpus_dir, "--save_dir", tmp_path / "run", "--max_update", 4]
    assert "behind update 2" in call(train.main, *few, "--disable_validation", "--save_interval_updates", 0)
    compare_checkpoints(saved / "checkpoint_last.pt", tmp_path / "run" / "checkpoint_last.pt")


def test_settings_come_back_from_fairseq_s_config_tree(saved):
    flat = checkpoint.load(saved / "checkpoint_last.pt").config
    values, _ = convert.fairseq_config.from_reference(convert.reference_config(flat), convert.FIELDS, "")
    differing = {k for k, v in values.items() if flat[k] != v}
    assert not differing and len(values) > 45


def inert_class(module, name):
    """A class that pickles as MODULE.NAME and exists only while the test runs."""
    for part in ("omegaconf", module):
        sys.modules.setdefault(part, types.ModuleType(part))
    if not hasattr(sys.modules[module], name):
        update = lambda self, **state: self.__dict__.update(state)  # noqa: E731
        setattr(sys.modules[module], name, type(name, (), {"__module__": module, "__init__": update}))
    return getattr(sys.modules[module], name)


def as_omegaconf(value):
    """The value as OmegaConf's nodes hold it in files of 2020 and 2021."""
    if isinstance(value, dict):
        kind = inert_class("omegaconf.dictconfig", "DictConfig")
        return kind(_metadata=None, _parent=None, _content={k: as_omegaconf(v) for k, v in value.items()})
    if isinstance(value, list):
        kind = inert_class("omegaconf.listconfig", "ListConfig")
        return kind(_metadata=None, _parent=None, _content=[as_omegaconf(v) for v in value])
    return inert_class("omegaconf.nodes", "AnyNode")(_metadata=None, _parent=None, _val=value)


@pytest.mark.parametrize("age", ["args", "omegaconf"])
def test_files_of_older_fairseq_releases_are_read_with_their_settings(tmp_path, saved, age, monkeypatch):
    mark = tmp_path / "ran"
    before = set(sys.modules)

    def change(content):
        content["model"] = {k.replace("regression_head", "lm_head"): v for k, v in content["model"].items()}
        content["model"]["encoder.lm_head.dense.weight"] = torch.ones(2, 2)
        content["extra_state"] = {"best": Payload(mark)}
        shape = {f"encoder_{k}": SMALL[k] for k in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")}
        if age == "args":
            args = dict(
                arch="roberta",
                lr=[1.0],
                dropout=0.25,
                attention_dropout=0.0,
                activation_fn="gelu",
                encoder_layerdrop=0,
                **shape,
            )
            del content["cfg"]
            content["args"] = argparse.Namespace(**args)
        else:
            content["cfg"]["model"]["transformer"]["dropout"] = 0.25
            content["cfg"] = as_omegaconf(content["cfg"])

    fairseq_file(saved / "checkpoint_last.pt", tmp_path / "old.pt", change)
    for name in set(sys.modules) - before:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "old.pt", weights_only=True)
    more = ["--average_top_k_layers", 2] if age == "args" else []
    said = run(tmp_path / "old.pt", "native", tmp_path / "ours.pt", *more)
    assert "begin anew" in said and "not taken over: encoder.lm_head" in said and not mark.exists()
    loaded, source = checkpoint.load(tmp_path / "ours.pt"), checkpoint.load(saved / "checkpoint_last.pt")
    assert same(loaded.student, dict(source.student)) and same(loaded.teacher, dict(source.teacher))
    assert {k: loaded.config[k] for k in SMALL} == {**SMALL, "dropout": 0.25}


# ---------------------------------------------------------------------------------------------- files


def test_bare_state_dicts_take_their_shape_from_flags(tmp_path, random_file):
    path, (student, teacher) = random_file
    torch.save(checkpoint.to_reference(student.state_dict(), teacher.encoder.state_dict()), tmp_path / "bare.pt")
    shape = [part for k, v in SMALL.items() for part in (f"--{k}", v)]
    run(tmp_path / "bare.pt", "native", tmp_path / "ours.pt", *shape)
    loaded = checkpoint.load(tmp_path / "ours.pt")
    assert same(loaded.student, dict(student.state_dict())) and same(loaded.teacher, dict(teacher.encoder.state_dict()))
    with pytest.raises(InputError, match="the student's encoder has no layers.2"):
        run(tmp_path / "bare.pt", "native", tmp_path / "other.pt", *shape, "--layers", 3)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--to", "hf", "{out}", "--activation_dropout", 0.1], "activation_dropout 0.1: .* has only 0.0"),
        (["--to", "hf", "{out}", "--normalize_before"], "has no layer_norm.weight"),
        (["--to", "native", "{out}", "--teacher"], "--teacher goes with --to hf"),
        (["--to", "native", "{there}"], "exists; remove it"),
        (["--to", "tf", "{out}"], "needed: --ckpt"),
        ([], "needed: --ckpt"),
        (["--to", "hf", "{out}", "--from", "fairseq"], "--from fairseq: .* is native"),
        (["--to", "hf", "{out}", "--dict", "{dict}"], "is not the one of"),
        (["--to", "hf", "{out}", "--dict", "{out}"], "no such file"),
        (["--to", "hf", "{out}", "--encoder_json", "{dict}"], "go together"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name_and_nothing_is_written(tmp_path, saved, argv, message):
    (tmp_path / "dict.txt").write_text("a 1\n")
    names = dict(out=tmp_path / "out", there=tmp_path / "dict.txt", dict=tmp_path / "dict.txt")
    argv = [str(a).format(**names) for a in argv]
    with pytest.raises(InputError, match=message):
        call(convert.main, "--ckpt", saved / "checkpoint_last.pt", *argv)
    assert [p.name for p in tmp_path.iterdir()] == ["dict.txt"]


def test_a_pre_norm_model_is_refused_for_transformers_by_name(tmp_path, saved, random_file):
    content = {k: v for k, v in checkpoint.load(random_file[0]).content.items() if k != "format"}
    model, _ = random_encoder(1, content["dictionary"]["size"], normalize_before=True)
    content.update(student=model.state_dict(), teacher=model.encoder.state_dict())
    content["config"]["normalize_before"], content["optimizer"]["state"] = True, {}
    checkpoint.save(content, tmp_path / "pre.pt")
    with pytest.raises(InputError, match="--normalize_before True: transformers' Data2VecText has only False"):
        run(tmp_path / "pre.pt", "hf", tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))
    run(tmp_path / "pre.pt", "fairseq", tmp_path / "theirs.pt")
    run(tmp_path / "theirs.pt", "native", tmp_path / "back.pt")
    assert same(checkpoint.load(tmp_path / "back.pt").student, dict(model.state_dict()))


@pytest.mark.parametrize("kind", ["hf", "fairseq", "native"])
def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, saved, kind, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*dict(hf=(convert, "write_safetensors")).get(kind, (torch, "save")), full)
    with pytest.raises(OSError, match="No space left"):
        run(saved / "checkpoint_last.pt", kind, tmp_path / "out")
    assert not list(tmp_path.iterdir())
