"""Conversions to and from transformers.

The tests against transformers itself skip where it is not installed: pip install transformers.
"""

import json
import random
import sys

import eval as evaluation
import train
from config import InputError
from formats import fairseq_names
from formats import hf as convert_hf
from run import checkpoint
from test.converting import WORDS, both_norms, random_file, run, same, saved  # noqa: F401
from test.helpers import (
    FEW,
    GOLDEN,
    SMALL,
    Payload,
    call,
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

safetensors = pytest.importorskip(
    "safetensors.torch", reason="safetensors is not installed: pip install safetensors"
)


def transformers():
    return pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install transformers"
    )


@both_norms
@pytest.mark.parametrize("teacher", [False, True])
def test_transformers_computes_the_same_hidden_states_in_every_layer(
    tmp_path, random_file, teacher, monkeypatch
):
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
        ours = hidden_states(encoder, tokens)
        found = theirs(
            input_ids=tokens, attention_mask=real.long(), output_hidden_states=True
        ).hidden_states
    assert len(ours) == len(found) == SMALL["layers"] + 1
    for a, b in zip(ours, found):
        assert (a - b)[real].abs().max() < 1e-5 and a[real].std() > 0.1


@golden
def test_transformers_tokenizer_gives_fairseqs_ids_for_byte_level_bpe(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, bpe = GOLDEN / "corpora" / "bpe-bin", GOLDEN / "corpora" / "gpt2_bpe"
    dictionary = Dictionary(folder / "dict.txt")
    (tmp_path / "config.json").write_text('{"model_type": "data2vec-text"}')
    lines = (GOLDEN / "corpora" / "raw" / "wiki.valid.raw").read_text("utf-8").split("\n")
    rows = TokenStream(folder, "valid")
    for fills_masks in (False, True):
        bpe_files = [bpe / "encoder.json", bpe / "vocab.bpe"]
        convert_hf.write_tokenizer(tmp_path, dictionary, bpe_files, 512, fills_masks)
        tokenizer = transformers().AutoTokenizer.from_pretrained(tmp_path)
        checked = 0
        for i in range(900):
            if not fills_masks or "<unk>" not in lines[i]:  # which is the special token there
                row = rows.read(rows.starts[i], rows.starts[i + 1])
                assert tokenizer(lines[i])["input_ids"] == [BOS, *row.tolist()]
                checked += rows.sizes[i] > 1
        assert checked > (100 if fills_masks else 300)
    masked = tokenizer("Hello <mask> world")["input_ids"]
    assert masked.count(dictionary.mask_id) == 1 and len(masked) == 5
    assert masked[-2:] == tokenizer("a world")["input_ids"][-2:]  # with the blank before it
    ids = [
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    ]
    assert (
        ids == [0, 1, 2, 3]
        and tokenizer.mask_token_id == dictionary.mask_id
        and len(tokenizer) == len(dictionary)
    )
    assert len(tokenizer("word " * 900, truncation=True)["input_ids"]) == 512


ODD = [
    "a",
    "The",
    "é",
    "中文",
    "12",
    "'s",
    "...",
    "a<mask>",
    "<mask>.",
    "\u0301",
    "👩‍👩",
    "\0",
    "\ufeff",
    "\u200b",
]
ODD += [
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<mask>",
    "\t",
    "\v",
    "\x1c",
    "\x85",
    "\xa0",
    "\u2003",
    "\u3000",
    "  ",
]


@pytest.mark.parametrize("how", ["words", "bpe"])
def test_transformers_gives_the_vectors_of_features_for_every_line(tmp_path, how, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hf, rng = transformers(), random.Random(0)
    lines = [
        *ODD,
        "",
        " ",
        "  a  ",
        "\ta b\t",
        *(" " * i + "a The" + " " * (i % 3) for i in range(9)),
        "a " * 40,
    ]
    lines += [
        "".join(rng.choice([*ODD, " ", " ", " "]) for _ in range(rng.randrange(12)))
        for _ in range(300)
    ]
    (tmp_path / "text").write_text("\n".join(lines) + "\n", "utf-8", newline="")
    argv = ["--bpe", "none"] if how == "words" else ["--bpe", "train", "--vocab_size", 280]
    run_preprocess(tmp_path / "data", *argv, "--workers", 1, train=[tmp_path / "text"])
    student, _ = random_encoder(0, len(Dictionary(tmp_path / "data" / "dict.txt")))
    bare = fairseq_names.to_reference(student.state_dict(), dict(student.encoder.state_dict()))
    torch.save(bare, tmp_path / "bare.pt")
    settings = {**SMALL, "data_path": tmp_path / "data", "tokens_per_sample": 32}
    flags = [part for k, v in settings.items() for part in (f"--{k}", v)]
    run(tmp_path / "bare.pt", "native", tmp_path / "model.pt", *flags)
    run(tmp_path / "model.pt", "hf", tmp_path / "hf")
    wanted = [
        "--features",
        tmp_path / "text",
        "--out",
        tmp_path / "f.npy",
        "--device",
        "cpu",
        "--max_tokens",
        40,
    ]
    call(evaluation.main, "--ckpt", tmp_path / "model.pt", *wanted)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model, loading = hf.AutoModel.from_pretrained(
        tmp_path / "hf", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(loading.values())  # the README's call, which would print them
    for line, row in zip(lines, np.load(tmp_path / "f.npy"), strict=True):
        ids = tokenizer(line, return_tensors="pt", truncation=True)["input_ids"]
        real = ids != PAD  # the word <pad> is padding to the model
        with torch.no_grad():
            states = model.eval()(ids, attention_mask=real.long()).last_hidden_state
        assert np.abs(states[real].mean(0).numpy() - row).max() < 1e-5, repr(line)


def test_transformers_tokenizer_gives_the_dictionarys_ids_for_words(
    tmp_path, saved, corpus_dir, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run(saved / "checkpoint_last.pt", "hf", tmp_path / "hf")  # the checkpoint knows its data
    tokenizer = transformers().AutoTokenizer.from_pretrained(tmp_path / "hf")
    symbols = Dictionary(corpus_dir / "dict.txt").symbols
    text = f" {symbols[9]}\t{symbols[4]} nowhere  {symbols[20]} <mask>\n"
    assert tokenizer(text)["input_ids"] == [BOS, 9, 4, UNK, 20, UNK, EOS]
    assert tokenizer.mask_token_id == len(symbols) - 1
    assert (
        tokenizer([symbols[5], symbols[5] + " " + symbols[6]], padding=True)["input_ids"][0][-1]
        == PAD
    )


def write_bpe(folder) -> Dictionary:
    """Write encoder.json, vocab.bpe, and a dict.txt that lacks three of the BPE's tokens."""
    alphabet = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "th", "the", "\u0120the"]
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\n\u0120 the\n")
    known = [i for i, token in enumerate(tokens) if token not in ("th", "q", "z")]
    (folder / "dict.txt").write_text("".join(f"{i} 1\n" for i in reversed(known)))
    return Dictionary(folder / "dict.txt")


def test_tokens_of_the_bpe_that_the_dictionary_lacks_are_unk_to_the_model(
    tmp_path, saved, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hf = transformers()
    dictionary = write_bpe(tmp_path)
    student, cfg = random_encoder(0, len(dictionary))
    bare = fairseq_names.to_reference(student.state_dict(), dict(student.encoder.state_dict()))
    torch.save(bare, tmp_path / "bare.pt")
    shape = [part for k, v in SMALL.items() for part in (f"--{k}", v)]
    run(tmp_path / "bare.pt", "hf", tmp_path / "hf", "--data_path", tmp_path, *shape)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = hf.AutoModel.from_pretrained(tmp_path / "hf").eval()
    assert len(tokenizer) == model.config.vocab_size == len(dictionary) + 3
    text = "the quiz: the thick thin zoo"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    (ours,) = load_tokenizer(tmp_path, dictionary)([text])
    assert (
        np.array_equal(np.where(ids[0] < len(dictionary), ids[0], UNK), [BOS, *ours])
        and UNK in ours
    )
    with torch.no_grad():
        found, expected = (
            model(ids).last_hidden_state,
            student.encoder(torch.tensor([[BOS, *ours]]))[0],
        )
    assert torch.allclose(found, expected, atol=1e-5)
    run(tmp_path / "hf", "native", tmp_path / "back.pt")
    back = checkpoint.load(tmp_path / "back.pt").student
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
    tmp_path, corpus_dir, kind, options, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hf, data = transformers(), corpus_dir if kind == "words" else tmp_path
    dictionary = Dictionary(corpus_dir / "dict.txt") if kind == "words" else write_bpe(tmp_path)
    size, lacking = len(dictionary), 0 if kind == "words" else 3
    student, _ = random_encoder(0, size, **options)
    weights = dict(student=student.state_dict(), teacher=student.encoder.state_dict())
    checkpoint.save(small_content(config={**SMALL, **options}, **weights), tmp_path / "words.pt")
    run(tmp_path / "words.pt", "hf", tmp_path / "hf", "--data_path", data)
    model, loading = hf.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    family = "RobertaPreLayerNorm" if "normalize_before" in options else "Data2VecText"
    assert type(model).__name__ == f"{family}ForMaskedLM" and not any(loading.values())
    encoder, loading = hf.AutoModel.from_pretrained(
        tmp_path / "hf", add_pooling_layer=False, output_loading_info=True
    )
    assert not loading["missing_keys"] and all(
        name.startswith("lm_head.") for name in loading["unexpected_keys"]
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "w3 w7 <mask> w5 w1" if kind == "words" else "the quiz<mask> thick"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ours = ids.where(ids < size, UNK)
    with torch.no_grad():
        states, _ = student.encoder(ours)
        assert torch.allclose(encoder(ids).last_hidden_state, states, atol=1e-5)
        expected = student.lm_head(states.flatten(0, 1), student.encoder.embed_tokens.weight)
        found = model.eval()(ids).logits[0]
    assert found.shape[1] == size + lacking and torch.allclose(found[:, :size], expected, atol=1e-4)
    assert (
        not found.softmax(1)[:, size:].any() and expected.std() > 0.1
    )  # what is <unk> to the model is never proposed
    answers = hf.pipeline(
        "fill-mask", model=str(tmp_path / "hf"), tokenizer=tokenizer, device="cpu", top_k=size
    )(text)
    at = int((ids[0] == dictionary.mask_id).nonzero())
    probability, best = expected[at].softmax(0).topk(size)
    assert [a["token"] for a in answers[:3]] == best.tolist()[:3] and max(
        a["token"] for a in answers
    ) < size
    assert np.allclose([a["score"] for a in answers], probability, atol=1e-5)

    assert "not taken over" not in run(tmp_path / "hf", "native", tmp_path / "back.pt")
    back = checkpoint.load(tmp_path / "back.pt")
    assert back.config["objective"] == "mlm"
    assert same(
        back.student,
        {k: v for k, v in student.state_dict().items() if not k.startswith("regression_head.")},
    )
    model.save_pretrained(tmp_path / "again", safe_serialization=True)
    run(tmp_path / "again", "native", tmp_path / "again.pt")
    assert same(checkpoint.load(tmp_path / "again.pt").student, back.student)
    run(tmp_path / "words.pt", "hf", tmp_path / "teacher", "--data_path", data, "--teacher")
    assert "pipeline_tag: fill-mask" in (tmp_path / "hf" / "README.md").read_text()
    assert json.loads((tmp_path / "teacher" / "config.json").read_text())["architectures"] == [
        f"{family}Model"
    ]


@both_norms
def test_the_way_to_transformers_and_back_is_exact(tmp_path, random_file):
    path, (student, _) = random_file
    run(path, "hf", tmp_path / "hf")
    assert "not taken over" not in run(
        tmp_path / "hf", "native", tmp_path / "back.pt", "--from", "hf"
    )
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
    path, _ = random_file
    run(path, "hf", tmp_path / "hf")
    run(tmp_path / "hf", "native", tmp_path / "back.pt")
    few = ["--data_path", corpus_dir, "--device", "cpu"]
    result = json.loads(call(evaluation.main, "--ckpt", tmp_path / "back.pt", *few, "--json"))
    assert np.isfinite(result["loss"]) and "no regression head" in capsys.readouterr().err
    argv = [
        *FEW,
        "--data_path",
        corpus_dir,
        "--save_dir",
        tmp_path / "run",
        "--max_update",
        1,
        "--lr",
        0,
    ]
    call(train.main, *argv, "--init_from", tmp_path / "back.pt", "--weight_decay", 0)
    trained = checkpoint.load(tmp_path / "run" / "checkpoint_last.pt")
    given = checkpoint.load(tmp_path / "back.pt")
    assert all(torch.equal(trained.student[k], v) for k, v in given.student.items())


def hf_state(folder) -> dict:
    return safetensors.load_file(folder / "model.safetensors")


def test_a_pickled_float16_model_with_a_head_and_token_types_is_read(tmp_path, random_file):
    path, (student, _) = random_file
    run(path, "hf", tmp_path / "hf")
    state = {f"data2vec_text.{k}": v.half() for k, v in hf_state(tmp_path / "hf").items()}
    state |= {
        "classifier.dense.weight": torch.ones(2, 2),
        "data2vec_text.embeddings.position_ids": torch.arange(66),
    }
    row = torch.linspace(-1, 1, SMALL["embed_dim"]).half()
    state["data2vec_text.embeddings.token_type_embeddings.weight"] = row[None].repeat(2, 1)
    (tmp_path / "hf" / "model.safetensors").unlink()
    mark = tmp_path / "ran"
    torch.save({**state, "lm_head.bias": Payload(mark)}, tmp_path / "hf" / "pytorch_model.bin")
    said = run(tmp_path / "hf", "native", tmp_path / "back.pt")
    assert (
        "not taken over: classifier.dense" in said
        and "not taken over: lm_head.bias" in said
        and not mark.exists()
    )
    back = checkpoint.load(tmp_path / "back.pt").student
    for name, tensor in student.encoder.state_dict().items():
        expected = tensor.half().float()
        if name == "embed_positions.weight":
            expected[2:] += row.float()
        assert torch.equal(back[f"encoder.{name}"], expected), name


def test_the_folder_of_a_run_is_not_taken_for_one_of_transformers(tmp_path, saved):
    with pytest.raises(InputError, match="it holds checkpoint_last.pt"):
        run(saved, "hf", tmp_path / "hf")


def edited(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def without_eps(folder):
    path = folder / "config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "layer_norm_eps"})
    )


def weights(change):
    def edit(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (edited(layer_norm_eps=1e-12), "layer_norm_eps is 1e-12; our model has only 1e-05"),
        (without_eps, "layer_norm_eps is 1e-12; our model has only 1e-05"),
        (edited(model_type="bert"), "model_type is bert"),
        (edited(hidden_act="gelu_new"), "gelu_new: choose from gelu, relu"),
        (edited(hidden_size="wide"), "config.json: model.embed_dim=wide"),
        (edited(num_hidden_layers=3), "has no layers.2"),
        (edited(max_position_embeddings=None), "cannot be read as a config"),
        (edited(max_position_embeddings=float("inf")), "cannot be read as a config"),
        (
            lambda folder: (folder / "config.json").write_text("[" * 100_000),
            "cannot be read as a config",
        ),
        (lambda folder: (folder / "config.json").write_text("[]"), "cannot be read as a config"),
        (
            lambda folder: (folder / "config.json").unlink(),
            "hf: has no config.json, which belongs to",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (weights(lambda raw: raw[:-4]), "not a complete safetensors file"),
        (weights(lambda raw: raw[:100]), "not a complete safetensors file"),
        (weights(lambda raw: b""), "not a complete safetensors file"),
        (weights(lambda raw: b"\xff" * 8 + raw[8:]), "not a complete safetensors file"),
        (
            weights(lambda raw: raw.replace(b'"shape":[16', b'"shape":[61')),
            "not a complete safetensors file",
        ),
        (weights(lambda raw: raw.replace(b'"F32"', b'"F99"')), "not a complete safetensors file"),
        (
            weights(
                lambda raw: raw.replace(
                    b"layer.1.attention.self.key", b"layer.1.attention.self.kez"
                )
            ),
            "no k_proj",
        ),
        (weights(lambda raw: raw.replace(b"intermediate", b"intermediatf")), "has no"),
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
