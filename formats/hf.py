"""Hugging Face transformers: an encoder as a folder for AutoModel and AutoTokenizer, and back.

    python convert.py --ckpt CHECKPOINT --to hf DIR

Names and settings are those of transformers' Data2VecTextModel, or of a pre-norm model's
RobertaPreLayerNormModel. A student with a head for words becomes a ...ForMaskedLM, a fine-tuned
checkpoint a ...ForSequenceClassification. Weights are copied exactly (float16 becomes float32).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from config import DataConfig, InputError, ModelConfig, check_file, read_text, reading
from formats import fairseq_config, fairseq_files
from formats.fairseq_names import FIELDS, merge_qkv, split_qkv
from model import LAYER_NORM_EPS, PAD
from run import checkpoint
from run.checkpoint import Loaded
from text.binarized import BOS, EOS, UNK

import torch
import torch.nn.functional as F
from torch import nn

# Parts of names: on the left fairseq's, after `encoder.sentence_encoder.`, on the right those of
# transformers, in the order in which they are looked for; by normalize_before.
COMMON = {
    "embed_tokens.": "embeddings.word_embeddings.",
    "embed_positions.": "embeddings.position_embeddings.",
    "layernorm_embedding.": "embeddings.LayerNorm.",
    "layers.": "encoder.layer.",
    ".self_attn.q_proj.": ".attention.self.query.",
    ".self_attn.k_proj.": ".attention.self.key.",
    ".self_attn.v_proj.": ".attention.self.value.",
    ".self_attn.out_proj.": ".attention.output.dense.",
    ".fc1.": ".intermediate.dense.",
    ".fc2.": ".output.dense.",
}
POST_NORM = COMMON | {
    ".self_attn_layer_norm.": ".attention.output.LayerNorm.",
    ".final_layer_norm.": ".output.LayerNorm.",
}
PRE_NORM = COMMON | {
    ".self_attn_layer_norm.": ".attention.LayerNorm.",
    ".final_layer_norm.": ".intermediate.LayerNorm.",
    "layer_norm.": "LayerNorm.",
}
# By normalize_before: model_type, the beginning of the models' names, and of all weights' in one
# with a task's head; the parts of names.
FAMILIES = {
    False: ("data2vec-text", "Data2VecText", "data2vec_text.", POST_NORM),
    True: ("roberta-prelayernorm", "RobertaPreLayerNorm", "roberta_prelayernorm.", PRE_NORM),
}
# ModelConfig's field -> name in config.json
CONFIG = dict(
    layers="num_hidden_layers",
    embed_dim="hidden_size",
    ffn_embed_dim="intermediate_size",
    attention_heads="num_attention_heads",
    activation_fn="hidden_act",
    dropout="hidden_dropout_prob",
    attention_dropout="attention_probs_dropout_prob",
)
# What our model cannot vary: written into every config.json, and required of each that is read.
BUILT_IN = dict(layer_norm_eps=LAYER_NORM_EPS, pad_token_id=PAD, bos_token_id=BOS)
BUILT_IN |= dict(eos_token_id=EOS, is_decoder=False)
# What transformers takes where config.json says nothing; its epsilon is another.
DEFAULTS = {**BUILT_IN, "layer_norm_eps": 1e-12}

TOKENS = "embeddings.word_embeddings.weight"
# BERT's sentences A and B, which only transformers has
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
NOT_OURS = (TOKEN_TYPES, "embeddings.position_ids")
WORD_HEAD = """lm_head.bias lm_head.dense.weight lm_head.dense.bias lm_head.layer_norm.weight
lm_head.layer_norm.bias""".split()
# our own entries in config.json: how many of the embeddings the dictionary has, and which it is
SYMBOLS, ENTRY = "dictionary_size", "dictionary"
OF_ENTRY = dict(size=int, digest=str, mask_id=int)
SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"


# ---------------------------------------------------------------------------------------- reading


def _safetensors():
    with reading(f"{SAFE} needs the safetensors package: pip install safetensors"):
        import safetensors.torch
    return safetensors.torch


def is_known(name: str) -> bool:
    """Whether a weight, named without the model's prefix, is taken over."""
    return name.startswith(("embeddings.", "encoder.layer.", "LayerNorm."))


def load(folder: Path) -> Loaded:
    """A folder that save_pretrained wrote for a model of FAMILIES, with or without a task's head.

    Raises InputError.
    """
    where = folder / "config.json"
    if not where.is_file():
        raise InputError(f"{folder}: has no config.json, which belongs to a folder of transformers")
    with reading(f"{where}: cannot be read as a config of transformers"):
        theirs = json.loads(read_text(where))
        settings = _settings(theirs, where)
        entry = theirs.get(ENTRY) or {}
        entry = {name: kind(entry[name]) for name, kind in OF_ENTRY.items()} if entry else {}
    _, name, prefix, parts = FAMILIES[settings["normalize_before"]]
    with reading(f"{folder}: not the weights of a {name} model"):
        state = {str(k).removeprefix(prefix): v for k, v in _weights(folder).items()}
        head = _take_word_head(state, theirs.get(SYMBOLS))
        encoder = merge_qkv(_encoder(state, theirs.get(SYMBOLS), parts), folder)
    if head:
        settings["objective"] = "mlm"
    student = {**{f"encoder.{k}": v for k, v in encoder.items()}, **head}
    return Loaded("hf", settings, student, None, state, entry)


def _settings(theirs: dict, where: Path) -> dict:
    """Our settings of a model by its config.json. Raises InputError for one that is not ours."""
    kinds = [family[0] for family in FAMILIES.values()]  # in the order False, True
    kind = theirs.get("model_type")
    if kind not in kinds:
        known = " and ".join(kinds)
        raise InputError(f"{where}: model_type is {str(kind)[:100]}, not {known}")
    for name, value in BUILT_IN.items():
        other = theirs.get(name, DEFAULTS[name])
        if other != value:
            raise InputError(f"{where}: {name} is {str(other)[:100]}; our model has only {value}")
    # the other defaults equal ours
    shape = {ours: theirs[name] for ours, name in CONFIG.items() if name in theirs}
    # transformers counts the rows of the table, which has rows below the first position
    shape["max_source_positions"] = int(theirs.get("max_position_embeddings", 512)) - PAD - 1
    shape["normalize_before"] = bool(kinds.index(kind))
    settings, _ = fairseq_config.from_reference({"model": shape}, FIELDS, str(where))
    layers = settings.get("layers", ModelConfig.layers)
    settings["average_top_k_layers"] = min(layers, ModelConfig.average_top_k_layers)
    longest = min(settings["max_source_positions"], DataConfig.tokens_per_sample)
    return {**settings, "tokens_per_sample": longest}


def _weights(folder: Path) -> dict:
    """The state dict of a folder."""
    if (folder / SAFE).is_file():
        package = _safetensors()
        with reading(f"{folder / SAFE}: not a complete safetensors file"):
            check_file(folder / SAFE)
            return package.load_file(folder / SAFE)
    if (folder / PICKLED).is_file():
        return checkpoint.read(folder / PICKLED, fairseq_files.load)
    raise InputError(f"{folder}: has neither {SAFE} nor {PICKLED}, in one piece each")


def _encoder(state: dict, symbols: int | None, parts: dict) -> dict:
    """Their state dict -> an encoder's under fairseq's names.

    symbols: how many embeddings the dictionary has; parts: of names.
    """
    encoder = {}
    for name, tensor in state.items():
        if is_known(name) and name not in NOT_OURS:
            for ours, part in parts.items():
                name = name.replace(part, ours)
            encoder[name] = tensor
    encoder["embed_tokens.weight"] = encoder["embed_tokens.weight"][:symbols]
    types = state.get(TOKEN_TYPES)
    if types is not None and types[:1].any():
        # every token is of the first type and has a position, so the position's row can carry both
        positions = encoder["embed_positions.weight"].float()
        shifted = positions[PAD + 1 :] + types[:1].float()
        encoder["embed_positions.weight"] = torch.cat([positions[: PAD + 1], shifted])
    return encoder


def _take_word_head(state: dict, symbols: int | None) -> dict:
    """Take the entries of a head for words out of their state dict; {} if there is none of ours.

    The last matrix of ours always is the token embeddings.
    """
    tied = {"lm_head.decoder.weight": TOKENS, "lm_head.decoder.bias": "lm_head.bias"}
    tied = {name: source for name, source in tied.items() if name in state}
    is_whole = state.keys() >= set(WORD_HEAD)
    if not is_whole or not all(torch.equal(state[a], state[b]) for a, b in tied.items()):
        return {}
    for name in tied:
        del state[name]
    head = {name: state.pop(name) for name in WORD_HEAD}
    return {**head, "lm_head.bias": head["lm_head.bias"][:symbols]}


# ---------------------------------------------------------------------------------------- writing


@dataclass
class Task:
    """What a model does in transformers: without a head it gives features."""

    pipeline: str = "feature-extraction"
    suffix: str = "Model"  # of the class's name
    head: dict = field(default_factory=dict)  # its weights
    settings: dict = field(default_factory=dict)  # its part of config.json


def fill_mask(head: dict, unknown: int) -> Task:
    """The task of a head for words. unknown: how many tokens are <unk> to the model."""
    # such a token is never the answer: <unk> would count twice. e^-10000 is 0, also in float16
    bias = F.pad(head["lm_head.bias"], (0, unknown), value=-1e4)
    return Task("fill-mask", "ForMaskedLM", {**head, "lm_head.bias": bias})


def classification(entry: dict, width: int, path) -> Task:
    """The task of a fine-tuned checkpoint, from its entry `classifier`.

    Scores of a regression come out in the units of its labels. Raises InputError for a linear
    probe, which transformers cannot express, and for a head that does not fit.
    """
    if "dense.weight" not in entry["head"]:
        what = "a linear probe on mean features (--freeze, --pool mean)"
        raise InputError(f"{path}: {what}; transformers has no model for it")
    names = entry["labels"] or ["score"]
    layers = dict(dense=nn.Linear(width, width), out_proj=nn.Linear(width, len(names)))
    expected = nn.ModuleDict(layers)  # for names and shapes
    head = checkpoint.own(entry["head"], expected.state_dict(), "the classification head", path)
    if not entry["labels"]:
        for name in ("out_proj.weight", "out_proj.bias"):
            head[name] *= entry["label_scale"]
    settings = dict(
        problem_type="single_label_classification" if entry["labels"] else "regression",
        id2label={str(i): name for i, name in enumerate(names)},
        label2id={name: i for i, name in enumerate(names)},
        classifier_dropout=0.0,
    )
    head = {f"classifier.{name}": tensor for name, tensor in head.items()}
    return Task("text-classification", "ForSequenceClassification", head, settings)


def write(folder: Path, encoder: dict, cfg: ModelConfig, unknown: int, task: Task, entry: dict):
    """Write config.json and model.safetensors of a model of FAMILIES.

    encoder: state dict of an Encoder; unknown: how many ids after its own get the embedding of
    <unk>; entry: of the dictionary. Raises InputError for a model that transformers cannot express.
    """
    kind, model, prefix, parts = FAMILIES[cfg.normalize_before]
    if cfg.activation_dropout:
        value = f"--activation_dropout {cfg.activation_dropout}"
        raise InputError(f"{value}: transformers' {model} has only 0.0")
    tokens = encoder["embed_tokens.weight"]
    more = torch.cat([tokens, tokens[UNK].repeat(unknown, 1)])
    tensors = {}
    for name, tensor in split_qkv({**encoder, "embed_tokens.weight": more}).items():
        for ours, part in parts.items():
            name = name.replace(ours, part)
        tensors[name] = tensor
    tensors[TOKEN_TYPES] = torch.zeros(1, cfg.embed_dim)
    if task.head:
        tensors = {**{prefix + name: v for name, v in tensors.items()}, **task.head}
    theirs = dict(
        architectures=[model + task.suffix],
        model_type=kind,
        vocab_size=len(more),
        max_position_embeddings=len(encoder["embed_positions.weight"]),
        type_vocab_size=1,
        initializer_range=0.02,
        **{name: getattr(cfg, ours) for ours, name in CONFIG.items()},
        **BUILT_IN,
        **{SYMBOLS: len(tokens), ENTRY: entry},
        **task.settings,
    )
    (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")
    # transformers refuses a file whose metadata do not say 'pt'
    (folder / SAFE).write_bytes(_safetensors().save(tensors, {"format": "pt"}))
