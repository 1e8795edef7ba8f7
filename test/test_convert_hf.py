"""Conversions to and from transformers.

The tests against transformers itself skip where it is not installed: pip install transformers.
"""

import json
import random
import sys

import eval as evaluation
import train
from config import InputError
from formats import fairseq_names, hf_tokenizer
from run import checkpoint
from test.converting import WORDS, both_norms, random_file, run, same, saved, shape_flags, write_bpe  # noqa
from test.helpers import (
    GOLDEN,
    SMALL,
    Payload,
    call,
    few,
    golden,
    hidden_states,
    random_encoder,
    run_preprocess,
    small_content,
)
from text.binarized import BOS, EOS, PAD, UNK, Dictionary, TokenStream
from text.tokens import load_tokenizer

import numpy as np
import pytest
import torch

why = "safetensors is not installed: pip install safetensors"
safetensors = pytest.importorskip("safetensors.torch", reason=why)


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    why = "transformers is not installed: pip install transformers"
    return pytest.importorskip("transformers", reason=why)


@both_norms
@pytest.mark.parametrize("teacher", [False, True])
def test_transformers_computes_the_same_hidden_states_in_every_layer(
    tmp_path, random_file, teacher, transformers
):
    path, (student, other) = random_file
    run(path, "hf", tmp_path / "hf", *(["--teacher"] if teacher else []))
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    encoder = (other if teacher else student).encoder
    tokens = torch.randint(4, WORDS, (5, 24), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((24, 17, 3, 24, 9)):
        tokens[row, 0], tokens[row, length - 1], tokens[row, length:] = BOS, EOS, PAD
    tokens[3, 5] = PAD  # inside, too
    real = tokens != PAD
    with torch.no_grad():
        ours = hidden_states(encoder, tokens)
        answer = theirs(tokens, attention_mask=real.long(), output_hidden_states=True)
    assert len(ours) == SMALL["layers"] + 1
    for a, b in zip(ours, answer.hidden_states, strict=True):
        assert (a - b)[real].abs().max() < 1e-5 and a[real].std() > 0.1


@golden
@pytest.mark.parametrize("fills_masks", [False, True])
def test_transformers_tokenizer_gives_fairseqs_ids_for_byte_level_bpe(
    tmp_path, transformers, fills_masks
):
    folder, bpe = GOLDEN / "corpora" / "bpe-bin", GOLDEN / "corpora" / "gpt2_bpe"
    dictionary = Dictionary(folder / "dict.txt")
    (tmp_path / "config.json").write_text('{"model_type": "data2vec-text"}')
    lines = (GOLDEN / "corpora" / "raw" / "wiki.valid.raw").read_text("utf-8").split("\n")
    rows = TokenStream(folder, "valid")
    bpe_files = [bpe / "encoder.json", bpe / "vocab.bpe"]
    hf_tokenizer.write(tmp_path, dictionary, bpe_files, 512, fills_masks)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    checked = 0
    for i in range(900):
        if not fills_masks or "<unk>" not in lines[i]:  # which is the special token there
            row = rows.read(rows.starts[i], rows.starts[i + 1])
            assert tokenizer(lines[i])["input_ids"] == [BOS, *row.tolist()]
            checked += rows.sizes[i] > 1
    assert checked > (100 if fills_masks else 300)
    if fills_masks:
        masked = tokenizer("Hello <mask> world")["input_ids"]
        assert masked.count(dictionary.mask_id) == 1 and len(masked) == 5
        assert masked[-2:] == tokenizer("a world")["input_ids"][-2:]  # with the blank before it
    names = ("bos", "pad", "eos", "unk")
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == [0, 1, 2, 3]
    assert tokenizer.mask_token_id == dictionary.mask_id and len(tokenizer) == len(dictionary)
    assert len(tokenizer("word " * 900, truncation=True)["input_ids"]) == 512


ODD = "a The é 中文 12 's ... a<mask> <mask>. <s> </s> <pad> <unk> <mask>".split()
ODD += ["\u0301", "👩‍👩", "\0", "\ufeff", "\u200b", "\t", "\v", "\x1c", "\x85", "\xa0"]
ODD += ["\u2003", "\u3000", "  "]


@pytest.mark.parametrize("how", ["words", "bpe"])
def test_transformers_gives_the_vectors_of_features_for_every_line(tmp_path, how, transformers):
    rng = random.Random(0)
    lines = [*ODD, "", " ", "  a  ", "\ta b\t", "a " * 40]
    lines += [" " * i + "a The" + " " * (i % 3) for i in range(9)]
    for _ in range(300):
        parts = [rng.choice([*ODD, " ", " ", " "]) for _ in range(rng.randrange(12))]
        lines.append("".join(parts))
    (tmp_path / "text").write_text("\n".join(lines) + "\n", "utf-8", newline="")
    argv = ["--bpe", "none"] if how == "words" else ["--bpe", "train", "--vocab_size", 280]
    run_preprocess(tmp_path / "data", *argv, "--workers", 1, train=[tmp_path / "text"])
    save_bare(tmp_path, len(Dictionary(tmp_path / "data" / "dict.txt")))
    shape = shape_flags(data_path=tmp_path / "data", tokens_per_sample=32)
    run(tmp_path / "bare.pt", "native", tmp_path / "model.pt", *shape)
    run(tmp_path / "model.pt", "hf", tmp_path / "hf")
    argv = ["--features", tmp_path / "text", "--out", tmp_path / "f.npy", "--device", "cpu"]
    call(evaluation.main, "--ckpt", tmp_path / "model.pt", *argv, "--max_tokens", 40)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    options = dict(add_pooling_layer=False, output_loading_info=True)
    model, loading = transformers.AutoModel.from_pretrained(tmp_path / "hf", **options)
    assert not any(loading.values())  # the README's call, which would print them
    for line, row in zip(lines, np.load(tmp_path / "f.npy"), strict=True):
        ids = tokenizer(line, return_tensors="pt", truncation=True)["input_ids"]
        real = ids != PAD  # the word <pad> is padding to the model
        with torch.no_grad():
            states = model.eval()(ids, attention_mask=real.long()).last_hidden_state
        assert np.abs(states[real].mean(0).numpy() - row).max() < 1e-5, repr(line)


def save_bare(folder, size: int):
    """Write bare.pt, the weights of a student alone, which is returned."""
    student, _ = random_encoder(0, size)
    encoder = dict(student.encoder.state_dict())
    torch.save(fairseq_names.to_reference(student.state_dict(), encoder), folder / "bare.pt")
    return student


def test_transformers_tokenizer_gives_the_dictionarys_ids_for_words(
    tmp_path, saved, corpus_dir, transformers
):
    run(saved / "checkpoint_last.pt", "hf", tmp_path / "hf")  # the checkpoint knows its data
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    symbols = Dictionary(corpus_dir / "dict.txt").symbols
    text = f" {symbols[9]}\t{symbols[4]} nowhere  {symbols[20]} <mask>\n"
    assert tokenizer(text)["input_ids"] == [BOS, 9, 4, UNK, 20, UNK, EOS]
    assert tokenizer.mask_token_id == len(symbols) - 1
    pair = [symbols[5], symbols[5] + " " + symbols[6]]
    assert tokenizer(pair, padding=True)["input_ids"][0][-1] == PAD


def test_tokens_of_the_bpe_that_the_dictionary_lacks_are_unk_to_the_model(tmp_path, transformers):
    dictionary = write_bpe(tmp_path)
    student = save_bare(tmp_path, len(dictionary))
    shape = shape_flags(data_path=tmp_path)
    run(tmp_path / "bare.pt", "hf", tmp_path / "hf", *shape)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    assert len(tokenizer) == model.config.vocab_size == len(dictionary) + 3
    text = "the quiz: the thick thin zoo"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    (ours,) = load_tokenizer(tmp_path, dictionary)([text])
    known = np.where(ids[0] < len(dictionary), ids[0], UNK)
    assert known.tolist() == [BOS, *ours] and UNK in ours
    with torch.no_grad():
        expected, _ = student.encoder(torch.tensor([[BOS, *ours]]))
        assert torch.allclose(model(ids).last_hidden_state, expected, atol=1e-5)
    assert "not taken" not in run(tmp_path / "hf", "native", tmp_path / "back.pt")
    back = checkpoint.load(tmp_path / "back.pt").student
    model.resize_token_embeddings(len(tokenizer) + 2)
    model.save_pretrained(tmp_path / "hf")
    said = run(tmp_path / "hf", "native", tmp_path / "again.pt")
    assert "not taken over: 2 tokens that were added in transformers" in said
    assert torch.equal(back["encoder.embed_tokens.weight"], student.encoder.embed_tokens.weight)


def test_the_model_card_says_what_the_checkpoint_tells_and_what_is_to_be_filled_in(tmp_path, saved):
    said = run(saved / "checkpoint_last.pt", "hf", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "after 4 updates" in card and "| `embed_dim` | 16 |" in card and "licence" in said
    assert card.count("TO FILL IN") == 3
    yaml = pytest.importorskip("yaml").safe_load(card.split("---")[1])
    assert yaml["pipeline_tag"] == "feature-extraction" and yaml["license"] == "unknown"


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

    # the same model and logits, and what is <unk> to the model is never proposed
    kind_of_model = transformers.AutoModelForMaskedLM
    model, loading = kind_of_model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    family = "RobertaPreLayerNorm" if "normalize_before" in options else "Data2VecText"
    assert type(model).__name__ == f"{family}ForMaskedLM" and not any(loading.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "w3 w7 <mask> w5 w1" if kind == "words" else "the quiz<mask> thick"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states, _ = student.encoder(ids.where(ids < size, UNK))
        expected = student.lm_head(states.flatten(0, 1), student.encoder.embed_tokens.weight)
        logits = model.eval()(ids).logits[0]
    assert logits.shape[1] == size + lacking and expected.std() > 0.1
    assert torch.allclose(logits[:, :size], expected, atol=1e-4)
    assert not logits.softmax(1)[:, size:].any()
    options = dict(tokenizer=tokenizer, device="cpu", top_k=3)
    pipeline = transformers.pipeline("fill-mask", model=str(tmp_path / "hf"), **options)
    at = int((ids[0] == dictionary.mask_id).nonzero())
    probability, best = expected[at].softmax(0).topk(3)
    answers = pipeline(text)
    assert [answer["token"] for answer in answers] == best.tolist()
    assert np.allclose([answer["score"] for answer in answers], probability, atol=1e-5)

    # and back, also as transformers saves it
    assert "not taken over" not in run(tmp_path / "hf", "native", tmp_path / "back.pt")
    back = checkpoint.load(tmp_path / "back.pt")
    assert back.config["objective"] == "mlm"
    others = {k: v for k, v in student.state_dict().items() if not k.startswith("regression_head.")}
    assert same(back.student, others)
    model.save_pretrained(tmp_path / "again", safe_serialization=True)
    run(tmp_path / "again", "native", tmp_path / "again.pt")
    assert same(checkpoint.load(tmp_path / "again.pt").student, back.student)
    assert "pipeline_tag: fill-mask" in (tmp_path / "hf" / "README.md").read_text()


@both_norms
def test_the_way_to_transformers_and_back_is_exact(tmp_path, random_file):
    path, (student, _) = random_file
    run(path, "hf", tmp_path / "hf")
    said = run(tmp_path / "hf", "native", tmp_path / "back.pt", "--from", "hf")
    assert "not taken over" not in said
    back = checkpoint.load(tmp_path / "back.pt")
    assert same(back.student, {f"encoder.{k}": v for k, v in student.encoder.state_dict().items()})
    assert same(back.teacher, dict(student.encoder.state_dict()))  # which training begins with
    assert {k: back.config[k] for k in SMALL} == SMALL
    assert back.config["normalize_before"] == (student.encoder.layer_norm is not None)
    run(tmp_path / "back.pt", "hf", tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_without_the_safetensors_package_one_line_says_what_to_install(
    tmp_path, random_file, monkeypatch
):
    run(random_file[0], "hf", tmp_path / "hf")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        run(random_file[0], "hf", tmp_path / "again")
    with pytest.raises(InputError, match="pip install safetensors"):
        run(tmp_path / "hf", "native", tmp_path / "back.pt")
    assert [p.name for p in tmp_path.iterdir() if p.name != "random.pt"] == ["hf"]


def test_what_came_from_transformers_evaluates_and_trains(
    tmp_path, random_file, corpus_dir, capsys
):
    run(random_file[0], "hf", tmp_path / "hf")
    run(tmp_path / "hf", "native", tmp_path / "back.pt")
    argv = ["--ckpt", tmp_path / "back.pt", "--data_path", corpus_dir, "--device", "cpu", "--json"]
    assert np.isfinite(json.loads(call(evaluation.main, *argv))["loss"])
    assert "no regression head" in capsys.readouterr().err
    argv = few(corpus_dir, tmp_path / "run", "--max_update", 1, "--lr", 0, "--weight_decay", 0)
    call(train.main, *argv, "--init_from", tmp_path / "hf")
    trained = checkpoint.load(tmp_path / "run" / "checkpoint_last.pt")
    start = checkpoint.load(tmp_path / "back.pt")
    assert all(torch.equal(trained.student[k], v) for k, v in start.student.items())


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


def test_the_folder_of_a_run_is_not_taken_for_one_of_transformers(tmp_path, saved):
    with pytest.raises(InputError, match="it holds checkpoint_last.pt"):
        run(saved, "hf", tmp_path / "hf")


def config(**changes):
    """Edits config.json; None leaves an entry out."""

    def edit(folder):
        path = folder / "config.json"
        theirs = {**json.loads(path.read_text()), **changes}
        left = {k: v for k, v in theirs.items() if k not in changes or v is not None}
        path.write_text(json.dumps(left))

    return edit


def weights(old, new=b""):
    """Replaces bytes of model.safetensors; old may be a slice to keep."""

    def edit(folder):
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        path.write_bytes(raw[old] if isinstance(old, slice) else raw.replace(old, new))

    return edit


SAFE = "model.safetensors: not a complete"


@pytest.mark.parametrize(
    "edit, message",
    [
        (config(layer_norm_eps=1e-12), "layer_norm_eps is 1e-12; our model has only 1e-05"),
        (config(layer_norm_eps=None), "layer_norm_eps is 1e-12; our model has only 1e-05"),
        (config(model_type="bert"), "model_type is bert"),
        (config(hidden_act="gelu_new"), "gelu_new: choose from gelu, relu"),
        (config(hidden_size="wide"), "config.json: model.embed_dim=wide"),
        (config(num_hidden_layers=3), "has no layers.2"),
        (config(max_position_embeddings=float("inf")), "cannot be read as a config"),
        (lambda hf: (hf / "config.json").write_text("[" * 100_000), "cannot be read as a config"),
        (lambda hf: (hf / "config.json").write_text("[]"), "cannot be read as a config"),
        (lambda hf: (hf / "config.json").unlink(), "hf: has no config.json"),
        (lambda hf: (hf / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (weights(slice(-4)), SAFE),
        (weights(slice(100)), SAFE),
        (weights(slice(0)), SAFE),
        (weights(b'"shape":[16', b'"shape":[61'), SAFE),
        (weights(b'"F32"', b'"F99"'), SAFE),
        (weights(b"layer.1.attention.self.key", b"layer.1.attention.self.kez"), "no k_proj"),
        (weights(b"intermediate", b"intermediatf"), "has no"),
        (weights(b"word_embeddings", b"word_embeddingz"), "hf: not the weights of a Data2VecText"),
    ],
)
def test_folders_of_transformers_that_are_damaged_or_other_models_get_one_line(
    tmp_path, random_file, edit, message
):
    run(random_file[0], "hf", tmp_path / "hf")
    edit(tmp_path / "hf")
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path / "hf", "native", tmp_path / "back.pt")
    assert "\n" not in str(error.value) and not (tmp_path / "back.pt").exists()
