"""Conversions to and from transformers.

The tests against transformers itself skip where it is not installed: pip install transformers.
"""

import os
import shutil
import sys

import convert
import eval as evaluation
import train
from config import InputError
from run import checkpoint
from test.converting import *  # noqa: F403
from test.converting import WORDS, both_norms, edit, replace, run, same, write_bpe
from test.helpers import SMALL, Payload, call, few, hidden_states, random_encoder, small_content
from text.binarized import BOS, EOS, PAD, UNK, Dictionary

import pytest
import torch

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


@both_norms
@pytest.mark.parametrize("teacher", [False, True])
def test_transformers_computes_the_same_hidden_states_in_every_layer(
    tmp_path, random_file, teacher, transformers
):
    path, (student, other) = random_file
    run(path, "hf", tmp_path / "hf", *(["--teacher"] if teacher else []))
    options = dict(add_pooling_layer=False, output_loading_info=True)
    theirs, loading = transformers.AutoModel.from_pretrained(tmp_path / "hf", **options)
    assert not any(loading.values())
    encoder = (other if teacher else student).encoder
    tokens = torch.randint(4, WORDS, (5, 24), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((24, 17, 3, 24, 9)):
        tokens[row, 0], tokens[row, length - 1], tokens[row, length:] = BOS, EOS, PAD
    tokens[3, 5] = PAD  # inside, too
    real = tokens != PAD
    with torch.no_grad():
        ours = hidden_states(encoder, tokens)
        answer = theirs.eval()(tokens, attention_mask=real.long(), output_hidden_states=True)
    assert len(ours) == SMALL["layers"] + 1
    for a, b in zip(ours, answer.hidden_states, strict=True):
        assert (a - b)[real].abs().max() < 1e-5 and a[real].std() > 0.1


@pytest.mark.parametrize("kind", ["words", "bpe"])
@pytest.mark.parametrize(
    "options", [dict(objective="mlm"), dict(mlm_weight=1.0, normalize_before=True)]
)
def test_a_head_for_words_fills_masks_in_transformers_with_the_same_logits(
    tmp_path, corpus_dir, kind, options, transformers
):
    data, lacking = (corpus_dir, 0) if kind == "words" else (tmp_path, 3)
    if kind == "bpe":
        write_bpe(tmp_path)
    dictionary = Dictionary(data / "dict.txt")
    size = len(dictionary)
    student, _ = random_encoder(0, size, **options)
    weights = dict(student=student.state_dict(), teacher=student.encoder.state_dict())
    checkpoint.save(small_content(config={**SMALL, **options}, **weights), tmp_path / "words.pt")
    run(tmp_path / "words.pt", "hf", tmp_path / "hf", "--data_path", data)
    with pytest.raises(InputError, match="no head for words"):
        run(tmp_path / "words.pt", "fairseq", tmp_path / "theirs.pt")

    # the same model and logits, and what is <unk> to the model is never proposed
    kind_of_model = transformers.AutoModelForMaskedLM
    model, loading = kind_of_model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    family = "RobertaPreLayerNorm" if "normalize_before" in options else "Data2VecText"
    assert type(model).__name__ == f"{family}ForMaskedLM" and not any(loading.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "w3 w7 <mask> w5 w1" if kind == "words" else "the quiz<mask> thick"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert kind == "words" or (ids >= size).any()
    with torch.no_grad():
        states, _ = student.encoder(ids.where(ids < size, UNK))
        expected = student.lm_head(states.flatten(0, 1), student.encoder.embed_tokens.weight)
        logits = model.eval()(ids).logits[0]
    assert logits.shape[1] == len(tokenizer) == size + lacking and expected.std() > 0.1
    assert tokenizer.model_max_length == SMALL["max_source_positions"]
    assert torch.allclose(logits[:, :size], expected, atol=1e-4)
    assert not logits.softmax(1)[:, size:].any()
    options = dict(tokenizer=tokenizer, device="cpu", top_k=1)
    pipeline = transformers.pipeline("fill-mask", model=str(tmp_path / "hf"), **options)
    at = ids[0].tolist().index(dictionary.mask_id)
    assert pipeline(text)[0]["token"] == int(expected[at].argmax())

    # and back, also as transformers saves it
    assert "not taken over" not in run(tmp_path / "hf", "native", tmp_path / "back.pt")
    back = checkpoint.load(tmp_path / "back.pt")
    assert back.config["objective"] == "mlm"
    others = {k: v for k, v in student.state_dict().items() if "regression_head" not in k}
    assert same(back.student, others)
    model.resize_token_embeddings(len(tokenizer) + 2)
    model.save_pretrained(tmp_path / "again")
    said = run(tmp_path / "again", "native", tmp_path / "again.pt")
    assert "not taken over: 2 tokens that were added in transformers" in said
    assert same(checkpoint.load(tmp_path / "again.pt").student, back.student)
    assert "pipeline_tag: fill-mask" in (tmp_path / "hf" / "README.md").read_text()


@both_norms
def test_the_way_to_transformers_and_back_is_exact(tmp_path, random_file):
    path, (student, _) = random_file
    assert "licence" in run(path, "hf", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "after 4 updates" in card and "| `embed_dim` | 16 |" in card
    assert card.count("TO FILL IN") == 3 and "pipeline_tag: feature-extraction" in card
    said = run(tmp_path / "hf", "native", tmp_path / "back.pt", "--from", "hf")
    assert "not taken over" not in said
    back = checkpoint.load(tmp_path / "back.pt")
    assert same(back.student, {f"encoder.{k}": v for k, v in student.encoder.state_dict().items()})
    assert same(back.teacher, dict(student.encoder.state_dict()))  # which training begins with
    assert {k: back.config[k] for k in SMALL} == SMALL
    assert back.config["normalize_before"] == (student.encoder.layer_norm is not None)
    run(tmp_path / "back.pt", "hf", tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()  # of a file that tells no training
    assert "| `embed_dim` | 16 |" in card and "updates" not in card and "`lr`" not in card
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_folder_knows_the_dictionary_of_its_training(tmp_path, random_file, corpus_dir):
    run(random_file[0], "hf", tmp_path / "hf")
    shutil.copytree(corpus_dir, tmp_path / "other")
    rows = (corpus_dir / "dict.txt").read_text().splitlines()
    (tmp_path / "other" / "dict.txt").write_text("\n".join([*rows[::-1], ""]))
    where = ["--ckpt", tmp_path / "hf", "--data_path"]
    native = ["--to", "native", tmp_path / "native.pt"]
    for main, *argv in (
        (evaluation.main, *where, tmp_path / "other", "--device", "cpu"),
        (convert.main, *where, tmp_path / "other", *native),
        (train.main, *few(tmp_path / "other", tmp_path / "run"), "--init_from", tmp_path / "hf"),
    ):
        with pytest.raises(InputError, match="hf: trained with another dictionary"):
            call(main, *argv)
    call(convert.main, *where, corpus_dir, *native)
    argv = ["--ckpt", tmp_path / "native.pt", "--data_path", tmp_path / "other"]
    with pytest.raises(InputError, match="native.pt: trained with another dictionary"):
        call(evaluation.main, *argv, "--device", "cpu")


def test_training_begins_with_transformers_weights(tmp_path, random_file, corpus_dir, monkeypatch):
    run(random_file[0], "hf", tmp_path / "hf")
    argv = few(corpus_dir, tmp_path / "run", "--max_update", 1, "--lr", 0, "--weight_decay", 0)
    call(train.main, *argv, "--init_from", tmp_path / "hf")
    trained = checkpoint.load(tmp_path / "run" / "checkpoint_last.pt").student
    for name, tensor in random_file[1][0].encoder.state_dict().items():
        assert torch.equal(trained[f"encoder.{name}"], tensor), name
    # without the package one line says what to install
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for source, kind in ((random_file[0], "hf"), (tmp_path / "hf", "native")):
        with pytest.raises(InputError, match="pip install safetensors"):
            run(source, kind, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_pickled_float16_model_with_a_head_and_token_types_is_read(tmp_path, random_file):
    path, (student, _) = random_file
    run(path, "hf", tmp_path / "hf")
    safe, mark = tmp_path / "hf" / "model.safetensors", tmp_path / "ran"
    state = {f"data2vec_text.{k}": v.half() for k, v in safetensors.load_file(safe).items()}
    row = torch.linspace(-1, 1, SMALL["embed_dim"]).half()
    state["data2vec_text.embeddings.token_type_embeddings.weight"] = row[None].repeat(2, 1)
    state["data2vec_text.embeddings.position_ids"] = torch.arange(66)
    state["classifier.dense.weight"] = torch.ones(2, 2)
    safe.unlink()
    torch.save({**state, "lm_head.bias": Payload(mark)}, tmp_path / "hf" / "pytorch_model.bin")
    said = run(tmp_path / "hf", "native", tmp_path / "back.pt")
    assert not mark.exists()
    assert all(f"not taken over: {name}" in said for name in ("classifier.dense", "lm_head.bias"))
    back = checkpoint.load(tmp_path / "back.pt").student
    for name, tensor in student.encoder.state_dict().items():
        expected = tensor.half().float()
        if name == "embed_positions.weight":
            expected[2:] += row.float()
        assert torch.equal(back[f"encoder.{name}"], expected), name


CONFIG, SAFE = "config.json", "model.safetensors: not a complete"


@pytest.mark.parametrize(
    "change, message",
    [
        (edit(CONFIG, layer_norm_eps=1e-12), "layer_norm_eps is 1e-12; our model has only 1e-05"),
        (edit(CONFIG, layer_norm_eps=...), "layer_norm_eps is 1e-12; our model has only 1e-05"),
        (edit(CONFIG, model_type="bert"), "model_type is bert"),
        (edit(CONFIG, dictionary=dict(digest="x")), "cannot be read as a config"),
        (edit(CONFIG, hidden_act="gelu_new"), "gelu_new: choose from gelu, relu"),
        (edit(CONFIG, hidden_size="wide"), "config.json: model.embed_dim=wide"),
        (edit(CONFIG, num_hidden_layers=3), "has no layers.2"),
        (lambda hf: (hf / "config.json").write_text("[" * 100_000), "cannot be read as a config"),
        (lambda hf: (hf / "config.json").unlink(), "hf: has no config.json"),
        (lambda hf: (hf / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda hf: os.truncate(hf / "model.safetensors", 5000), SAFE),
        (replace(b'"shape":[16', b'"shape":[61'), SAFE),
        (replace(b"layer.1.attention.self.key", b"layer.1.attention.self.kez"), "no k_proj"),
        (replace(b"intermediate", b"intermediatf"), "has no"),
        (replace(b"word_embeddings", b"word_embeddingz"), "hf: not the weights of a Data2VecText"),
    ],
)
def test_damaged_folders_and_other_models_get_one_line(tmp_path, random_file, change, message):
    run(random_file[0], "hf", tmp_path / "hf")
    change(tmp_path / "hf")
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path / "hf", "native", tmp_path / "back.pt")
    assert "\n" not in str(error.value) and not (tmp_path / "back.pt").exists()
