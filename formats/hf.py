"""Hugging Face transformers: an encoder as a folder for AutoModel and AutoTokenizer, and back.

    python convert.py --ckpt CHECKPOINT --to hf DIR

Names and settings are those of transformers' Data2VecTextModel, or of a pre-norm model's
RobertaPreLayerNormModel; a student with a head for words (mlm.py) becomes a ...ForMaskedLM, for the
fill-mask pipeline. Weights are copied exactly (float16 becomes float32).
"""

import dataclasses
import json
import shutil
from pathlib import Path

from config import DataConfig, InputError, ModelConfig, read_text
from formats import fairseq_config
from formats.fairseq_names import merge_qkv, split_qkv
from model import LAYER_NORM_EPS, PAD, WordHead
from run import checkpoint
from run.checkpoint import Loaded
from text.binarized import BOS, EOS, SPECIAL, UNK, Dictionary
from text.tokens import find_text_files, read_bpe_files

import torch
import torch.nn.functional as F

# Parts of names: on the left fairseq's, after `encoder.sentence_encoder.`, on the right those of
# transformers, in the order in which they are looked for.
NAMES = {
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
POST_NORM = {
    ".self_attn_layer_norm.": ".attention.output.LayerNorm.",
    ".final_layer_norm.": ".output.LayerNorm.",
}
PRE_NORM = {
    ".self_attn_layer_norm.": ".attention.LayerNorm.",
    ".final_layer_norm.": ".intermediate.LayerNorm.",
    "layer_norm.": "LayerNorm.",
}
TOKENS = "embeddings.word_embeddings.weight"
# BERT's sentences A and B, which only transformers has
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
ENCODER, NOT_OURS = (
    ("embeddings.", "encoder.layer.", "LayerNorm."),
    (TOKEN_TYPES, "embeddings.position_ids"),
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# our own entry in config.json: how many of the token embeddings the dictionary has
SYMBOLS = "dictionary_size"
KNOWN = r"embeddings\.|encoder\.layer\.|LayerNorm\."  # names that a conversion takes over
# By normalize_before: model_type, the beginning of the models' names, and of all weights' in one
# with a task's head
FAMILIES = {
    False: ("data2vec-text", "Data2VecText", "data2vec_text."),
    True: ("roberta-prelayernorm", "RobertaPreLayerNorm", "roberta_prelayernorm."),
}
WORD_HEAD = "lm_head."  # of its own names, which are ours
SPACES = "".join(
    filter(str.isspace, map(chr, range(0x3001)))
)  # str.strip's; the tokenizers package knows four fewer
NEVER = -1e4  # a bias that makes a token's probability 0, also in float16

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
BUILT_IN = dict(
    layer_norm_eps=LAYER_NORM_EPS,
    pad_token_id=PAD,
    bos_token_id=0,
    eos_token_id=2,
    is_decoder=False,
)
DEFAULT_EPS = 1e-12  # transformers' own; its other defaults equal BUILT_IN

FILES = dict(
    dict="dict.txt", encoder_json="encoder.json", vocab_bpe="vocab.bpe"
)  # flag: name in a data folder


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise InputError(
            "model.safetensors needs the safetensors package: pip install safetensors"
        ) from None
    return safetensors


def is_folder(path: Path) -> bool:
    """Whether it is a folder of transformers, if only in part."""
    return any((path / name).is_file() for name in ("config.json", *WEIGHTS))


def load(folder: Path) -> Loaded:
    """Read a folder that save_pretrained wrote for a model of FAMILIES, with or without a task's
    head. Raises InputError."""
    where = folder / "config.json"
    if not where.is_file():
        raise InputError(f"{folder}: has no config.json, which belongs to a folder of transformers")
    try:
        theirs = json.loads(read_text(where))
        kind, rows = theirs.get("model_type"), int(theirs.get("max_position_embeddings", 512))
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise InputError(f"{where}: cannot be read as a config of transformers: {e}") from None
    pre_norm = {name: key for key, (name, _, _) in FAMILIES.items()}.get(str(kind))
    if pre_norm is None:
        known = " and ".join(name for name, _, _ in FAMILIES.values())
        raise InputError(f"{where}: model_type is {str(kind)[:100]}; only {known} can be converted")
    for name, value in BUILT_IN.items():
        found = theirs.get(name, DEFAULT_EPS if name == "layer_norm_eps" else value)
        if found != value:
            raise InputError(f"{where}: {name} is {str(found)[:100]}; our model has only {value}")
    shape = {
        ours: theirs[name] for ours, name in CONFIG.items() if name in theirs
    }  # the other defaults equal ours
    shape |= dict(max_source_positions=rows - PAD - 1, normalize_before=pre_norm)
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    settings, _ = fairseq_config.from_reference({"model": shape}, fields, str(where))
    layers = settings.get("layers", ModelConfig.layers)
    settings["average_top_k_layers"] = min(layers, ModelConfig.average_top_k_layers)
    settings["tokens_per_sample"] = min(
        settings["max_source_positions"], DataConfig.tokens_per_sample
    )

    path = folder / WEIGHTS[0]
    if path.is_file():
        package = _safetensors()
        try:
            state = package.torch.load_file(path)
        except (package.SafetensorError, OSError, ValueError, KeyError) as e:
            raise InputError(
                f"{path}: not a complete safetensors file: {' '.join(str(e).split())[:200]}"
            ) from None
    elif (folder / WEIGHTS[1]).is_file():
        path = folder / WEIGHTS[1]
        state = checkpoint.read(path)
    else:
        raise InputError(
            f"{folder}: has neither model.safetensors nor pytorch_model.bin, in one piece each"
        )
    state = {
        str(name).removeprefix(FAMILIES[pre_norm][2]): tensor for name, tensor in state.items()
    }
    try:
        head = _word_head(state, theirs.get(SYMBOLS))
        encoder = merge_qkv(_encoder(state, theirs.get(SYMBOLS), pre_norm), path)
    except (TypeError, AttributeError, RuntimeError, IndexError) as e:
        raise InputError(
            f"{path}: not the weights of a {FAMILIES[pre_norm][1]} model: {' '.join(str(e).split())[:200]}"
        ) from None
    if head:
        settings["objective"] = "mlm"
    return Loaded(
        "hf", settings, {**{f"encoder.{k}": v for k, v in encoder.items()}, **head}, None, state
    )


def names_of(pre_norm: bool) -> dict:
    return NAMES | (PRE_NORM if pre_norm else POST_NORM)


def _encoder(state: dict, symbols: int | None, pre_norm: bool) -> dict:
    """Their state dict -> an encoder's under fairseq's names. symbols: how many embeddings the
    dictionary has."""
    encoder = {}
    for name, tensor in state.items():
        if name.startswith(ENCODER) and name not in NOT_OURS:
            for ours, part in names_of(pre_norm).items():
                name = name.replace(part, ours)
            encoder[name] = tensor
    if symbols is not None and "embed_tokens.weight" in encoder:
        encoder["embed_tokens.weight"] = encoder["embed_tokens.weight"][:symbols]
    types = state.get(TOKEN_TYPES)
    if types is not None and types[:1].any() and "embed_positions.weight" in encoder:
        # every token is of the first type and has a position, so the position's row can carry both
        positions = encoder["embed_positions.weight"].float()
        encoder["embed_positions.weight"] = torch.cat(
            [positions[: PAD + 1], positions[PAD + 1 :] + types[:1].float()]
        )
    return encoder


def _word_head(state: dict, symbols: int | None) -> dict:
    """A WordHead's entries in their state dict, from which they are taken; {} if it has no complete
    one or if its last matrix is not the token embeddings, which ours always is."""
    names = [
        WORD_HEAD + name
        for name in WordHead(ModelConfig(embed_dim=1, attention_heads=1), 1).state_dict()
    ]
    tied = {WORD_HEAD + "decoder.weight": TOKENS, WORD_HEAD + "decoder.bias": WORD_HEAD + "bias"}
    if any(name not in state for name in names):
        return {}
    if any(
        name in state and not torch.equal(state[name], state[source])
        for name, source in tied.items()
    ):
        return {}
    head = {name: state.pop(name) for name in names}
    for name in tied:
        state.pop(name, None)
    return {**head, WORD_HEAD + "bias": head[WORD_HEAD + "bias"][:symbols]}


def write(
    folder: Path, encoder: dict, cfg: ModelConfig, unknown: int = 0, head: dict | None = None
):
    """Write config.json and model.safetensors of a model of FAMILIES, with a head of its
    ...ForMaskedLM.

    encoder: state dict of an Encoder; unknown: how many ids after its own get the embedding of
    <unk>; head: the entries of a WordHead. Raises InputError for a model that transformers cannot
    express.
    """
    kind, model, prefix = FAMILIES[cfg.normalize_before]
    if cfg.activation_dropout:
        raise InputError(
            f"--activation_dropout {cfg.activation_dropout}: transformers' {model} has only 0.0"
        )
    tokens, tensors = encoder["embed_tokens.weight"], {}
    encoder = {
        **encoder,
        "embed_tokens.weight": torch.cat([tokens, tokens[UNK].repeat(unknown, 1)]),
    }
    for name, tensor in split_qkv(encoder).items():
        for ours, part in names_of(cfg.normalize_before).items():
            name = name.replace(ours, part)
        tensors[name] = tensor
    tensors[TOKEN_TYPES] = torch.zeros(1, cfg.embed_dim)
    if head:
        # a token that the dictionary lacks is never the answer: <unk>, which it is to the model,
        # would count twice
        bias = F.pad(head[WORD_HEAD + "bias"], (0, unknown), value=NEVER)
        tensors = {
            **{prefix + name: v for name, v in tensors.items()},
            **head,
            WORD_HEAD + "bias": bias,
        }
    theirs = dict(
        architectures=[model + ("ForMaskedLM" if head else "Model")],
        model_type=kind,
        vocab_size=len(tokens) + unknown,
        # transformers counts the rows of the table, which has rows below the first position
        max_position_embeddings=len(encoder["embed_positions.weight"]),
        type_vocab_size=1,
        initializer_range=0.02,
        **{theirs: getattr(cfg, ours) for ours, theirs in CONFIG.items()},
        **BUILT_IN,
        **{SYMBOLS: len(tokens)},
    )
    (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")
    # transformers refuses a file whose metadata do not say 'pt'
    (folder / "model.safetensors").write_bytes(_safetensors().torch.save(tensors, {"format": "pt"}))


def find_dictionary(args, data_path: str) -> tuple[Dictionary | None, list]:
    """The dictionary, and the BPE's two files or None twice.

    They are those named by flags, else those in the data folder.
    """
    folder = Path(data_path.split(":")[0]) if data_path else None
    named = {name: getattr(args, flag) for flag, name in FILES.items()}
    paths = find_text_files(folder, named)
    bpe = [paths.get("encoder.json"), paths.get("vocab.bpe")]
    if "dict.txt" in paths:
        return Dictionary(paths["dict.txt"]), bpe
    if bpe[0]:
        needed = "the dictionary that gives its tokens their ids: --dict or --data_path"
        raise InputError(f"--encoder_json needs {needed}")
    return None, bpe


def write_tokenizer(
    folder: Path, dictionary: Dictionary, bpe: list, longest: int, fills_masks: bool
) -> int:
    """Write the files from which AutoTokenizer makes `<s> ... </s>` in this dictionary's ids, at
    most `longest` tokens. As in training, outer white space is removed first.

    bpe: encoder.json and vocab.bpe, or None twice for words. fills_masks: `<mask>` and the other
    special tokens may be typed, for the fill-mask pipeline; otherwise they are text like any other,
    as in training. Returns how many ids the tokenizer has after the dictionary's: those of tokens
    that are <unk> to the model.
    """
    outer = _replace(f"\\A[{SPACES}]+|[{SPACES}]+\\z", "")
    byte_level = dict(add_prefix_space=False, trim_offsets=True)
    if bpe[0]:
        model, lacking = _bpe(dictionary, *bpe)
        # what slow tokenizers and finetune.py read
        (folder / "vocab.json").write_text(
            json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8"
        )
        shutil.copyfile(bpe[1], folder / "merges.txt")
        cut, normalizers = dict(type="ByteLevel", use_regex=True, **byte_level), [outer]
    else:
        model, lacking = {"type": "WordLevel", "vocab": dictionary.ids, "unk_token": "<unk>"}, 0
        cut = dict(
            type="Split", pattern={"Regex": f"[{SPACES}]+"}, behavior="Removed", invert=False
        )
        mask = _replace(
            f"(?<![^{SPACES}])<mask>(?![^{SPACES}])", "<unk>"
        )  # which it is in training
        normalizers = [outer] if fills_masks else [outer, mask]
    # normalized: they are looked for in the normalized text; else each piece between two of them
    # would be stripped
    flags = dict(single_word=False, rstrip=False, normalized=True, special=True)
    added = [
        dict(id=dictionary.ids[s], content=s, lstrip=s == "<mask>", **flags)
        for s in (*SPECIAL, "<mask>")
    ]
    made = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=sorted(added, key=lambda token: token["id"]),
        normalizer=dict(type="Sequence", normalizers=normalizers),
        pre_tokenizer=cut,
        post_processor=dict(
            type="RobertaProcessing", sep=("</s>", EOS), cls=("<s>", BOS), **byte_level
        ),
        decoder=dict(type="ByteLevel", use_regex=True, **byte_level) if bpe[0] else None,
        model=model,
    )
    (folder / "tokenizer.json").write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    special = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIAL))
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        **special,
        cls_token=special["bos_token"],
        sep_token=special["eos_token"],
        # lstrip: without it transformers 5 makes a token of the blank before <mask>
        mask_token={"__type": "AddedToken", "content": "<mask>", **flags, "lstrip": True},
        split_special_tokens=not fills_masks,
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
    return lacking


def _replace(regex: str, content: str) -> dict:
    return dict(type="Replace", pattern={"Regex": regex}, content=content)


def _bpe(dictionary: Dictionary, encoder_json: Path, vocab_bpe: Path) -> tuple[dict, int]:
    """The BPE for tokenizer.json, and how many of its tokens the dictionary lacks."""
    vocab, merges = read_bpe_files(encoder_json, vocab_bpe)
    tokens = {str(number): token for token, number in vocab.items()}
    vocabulary = {tokens.get(symbol, symbol): i for symbol, i in dictionary.ids.items()}
    # fairseq turns a token that its dictionary lacks into <unk>; here each gets an id of its own
    lacking = [token for token in tokens.values() if token not in vocabulary]
    vocabulary.update((token, i) for i, token in enumerate(lacking, len(dictionary)))
    rows = [" ".join(merge) for merge in merges]
    return dict(type="BPE", vocab=vocabulary, merges=rows), len(lacking)
