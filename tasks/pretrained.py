"""What fine-tuning starts from: encoder, tokenizer and classification head of any checkpoint."""

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from config import InputError, ModelConfig, check_ranges, printable, read_text, reading
from formats import hf_tokenizer
from formats.load import load as load_any
from model import PAD, Encoder, init_weights
from run import checkpoint
from run.checkpoint import Loaded
from tasks import labelled
from tasks.classifier import entry_of
from tasks.labelled import shown
from tasks.tables import score_of
from text.binarized import SPECIAL, Dictionary
from text.tokens import BPE_FILES, Tokenizer, find_text_files, load_tokenizer

import torch
from torch import nn

FAIRSEQ = "classification_heads."
SENTENCE_HEAD = {f"{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")}
# the other weights of a folder of transformers; what is left belongs to a head
NO_HEADS = ("embeddings.", "encoder.", "LayerNorm.", "lm_head.", "pooler.")
SCORE = "a score"  # the only row of a head for scores, whatever the file calls it


@dataclass
class Head:
    """The classification head of a file."""

    weights: dict  # its state dict
    classes: list | None = None  # the names of its rows, where the file has them
    scale: float = 0.0  # scores are its outputs times this (0: the file does not say)
    is_sorted: bool = False  # rows without names are in the order of the names
    is_numbered: bool = False  # or in the order in which the data number the classes


@dataclass
class Pretrained:
    """An encoder to start from."""

    path: Path
    shape: ModelConfig
    vocabulary: int  # symbols
    weights: dict  # its state dict
    entry: dict | None  # what our fine-tuning added to it (classifier.entry_of)
    head: Head | None  # its classification head, if it has one
    dictionary: dict  # size, digest and mask_id, as our checkpoints have them; else empty
    folder: str  # of the pretraining data, on the machine that trained it; or empty
    longest: int  # tokens of the pretraining's blocks; 0 if unknown

    def encoder(self, untrained: bool, dropout: float) -> Encoder:
        """A new encoder with these weights, or with the random ones that pretraining begins with.

        dropout: after embedding, attention and feed-forward, and of attention.
        """
        rates = dict(dropout=dropout, attention_dropout=dropout, activation_dropout=0.0)
        encoder = Encoder(dataclasses.replace(self.shape, **rates), self.vocabulary)
        if untrained:
            encoder.apply(init_weights)
        else:
            encoder.load_state_dict(self.weights)
        return encoder


@torch.no_grad()
def scale_embeddings(encoder: Encoder, rms: float):
    """Multiply both tables of embeddings by what makes the tokens' root mean square `rms`.

    The layer norm that follows takes the factor out again, but for its epsilon, so the outputs
    hardly change. Training does: Adam moves every weight by about the learning rate, which is a
    larger share of a smaller weight.
    """
    factor = rms / encoder.embed_tokens.weight.square().mean().sqrt()
    encoder.embed_tokens.weight.mul_(factor)
    encoder.embed_positions.weight.mul_(factor)


# ------------------------------------------------------------------------------------ the encoder


def load(path, attention_heads: int = 0) -> Pretrained:
    """The student's encoder of any file that holds one.

    That is a checkpoint of this project or of fairseq, a bare state dict, or a Hugging Face folder.
    attention_heads: 0 takes the file's. Raises InputError.
    """
    path = Path(path)
    loaded = load_any(path)
    weights = checkpoint.stripped(loaded.student, "encoder.")
    shape, vocabulary = shape_of(weights, loaded.config, attention_heads, path)
    loaded.check_settings(vars(shape), path)
    # without memory: what these weights must fit
    with torch.device("meta"):
        expected = Encoder(shape, vocabulary)
    ours = loaded.content if loaded.kind == "ours" else {}
    entry = entry_of(loaded, path) if "classifier" in ours else None
    with reading(f"{path}: damaged: its tokens_per_sample"):
        longest = int(loaded.config.get("tokens_per_sample") or 0)
    return Pretrained(
        path=path,
        shape=shape,
        vocabulary=vocabulary,
        weights=checkpoint.own(weights, expected.state_dict(), "the encoder", path),
        entry=entry,
        head=find_head(loaded, entry, path),
        dictionary=loaded.dictionary,
        folder=str(loaded.config.get("data_path") or ""),
        longest=longest,
    )


def shape_of(weights: dict, settings: dict, attention_heads: int, path) -> tuple[ModelConfig, int]:
    """The encoder's shape, as far as the weights show it by them, else by the file's settings.

    Returns also the size of its vocabulary. Raises InputError.
    """
    with reading(f"{path}: not the weights of an encoder"):
        vocabulary, width = weights["embed_tokens.weight"].shape
        positions, _ = weights["embed_positions.weight"].shape
        ffn_width, _ = weights["layers.0.fc1.weight"].shape
        if vocabulary < len(SPECIAL) or positions < PAD + 2 or not ffn_width:
            sizes = f"{vocabulary} tokens, {positions} positions, inner width {ffn_width}"
            raise ValueError(sizes)
    layers = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    # a guess: 64 channels each, as in all published sizes, or a small model's four
    heads = attention_heads or settings.get("attention_heads") or max(4, width // 64)
    shape = ModelConfig(
        layers=layers,
        embed_dim=width,
        ffn_embed_dim=ffn_width,
        attention_heads=heads,
        max_source_positions=positions - PAD - 1,
        normalize_before="layer_norm.weight" in weights,
        activation_fn=settings.get("activation_fn", "gelu"),
        average_top_k_layers=min(layers, ModelConfig.average_top_k_layers),
    )
    check_ranges(shape)
    shape.check()
    return shape, vocabulary


# --------------------------------------------------------------------------------------- its head


def find_head(loaded: Loaded, entry: dict | None, path: Path) -> Head | None:
    """The head of a fine-tuned model: of ours, of fairseq's or of transformers.

    entry: that of our fine-tuning. A head that is found and not taken is told.
    """
    if entry:
        return Head(entry["head"], entry["labels"], entry["label_scale"])
    if loaded.kind == "hf":
        return of_transformers(loaded.content, path)
    state = loaded.content.get("model", loaded.content)
    names = {str(name).split(".")[1] for name in state if str(name).startswith(FAIRSEQ)}
    if len(names) > 1:
        tell_left_out(path, f"one of several: {', '.join(sorted(names))}")
    return Head(checkpoint.stripped(state, f"{FAIRSEQ}{names.pop()}.")) if len(names) == 1 else None


def of_transformers(state: dict, folder: Path) -> Head | None:
    """The head of a ...ForSequenceClassification, with the names in config.json."""
    weights = checkpoint.stripped(state, "classifier.")
    if set(weights) != SENTENCE_HEAD:
        names = {name.split(".")[0] for name in state if not name.startswith(NO_HEADS)}
        if names:
            tell_left_out(folder, f"not for sequences: {', '.join(sorted(names))}")
        return None
    with reading(f"{folder / 'config.json'}: id2label"):
        config = json.loads(read_text(folder / "config.json"))
        names = config.get("id2label") or {}
        names = [str(names[str(i)]) for i in range(len(names))]
    if config.get("problem_type") == "multi_label_classification":
        tell_left_out(folder, "for several classes at once")
        return None
    # what transformers calls classes that nobody named
    if names == [f"LABEL_{i}" for i in range(len(names))]:
        names = None
    return Head(weights, names, scale=1.0, is_sorted=True)


def fit_head(head: Head, new: nn.Module, names: list | None, scale: float, path: Path) -> dict:
    """The head as a state dict of `new`, its rows in the order of `names`; {} if it cannot be one.

    names: of the classes of the labelled text; None: scores, which are learned divided by `scale`.
    Raises InputError, in words of classes, if it is a head for others.
    """
    if set(head.weights) != set(new.state_dict()):
        tell_left_out(path, "of the other --pool")
        return {}
    # a row for each of its own classes, in its own order
    ours = names or [SCORE]
    theirs = classes_of(head, ours, path)
    expected = type(new)(new.out_proj.in_features, len(theirs))
    state = checkpoint.own(head.weights, expected.state_dict(), "the classification head", path)
    order = [theirs.index(name) for name in ours]
    for name in ("out_proj.weight", "out_proj.bias"):
        state[name] = state[name][order]
        if names is None and head.scale:
            state[name] *= head.scale / scale
    print(printable(f"note: the head of {path} is taken; --new_head draws another"))
    return state


def classes_of(head: Head, ours: list, path: Path) -> list:
    """The names of the head's rows. Raises InputError unless they are those of `ours`."""
    advice = "--new_head draws another head"
    bias = head.weights["out_proj.bias"]
    rows = len(bias) if isinstance(bias, torch.Tensor) and bias.ndim else 0
    theirs = [SCORE] if rows == 1 else head.classes
    if theirs is None and (head.is_numbered or head.is_sorted) and rows == len(ours):
        theirs = list(ours)
        if not head.is_numbered:
            theirs.sort(key=lambda name: (score_of(name) or 0.0, name))
        note = f"note: {path} does not name the classes of its head, taken for"
        print(printable(f"{note} {shown(theirs)} in this order"))
    if theirs is None:
        raise InputError(f"{path}: the {rows} classes of its head have no names; {advice}")
    if set(theirs) != set(ours):
        new = shown([name for name in ours if name not in theirs])
        missing = shown([name for name in theirs if name not in ours])
        what = f"its head is for other classes: new are {new}; missing are {missing}"
        raise InputError(f"{path}: {what}; {advice}")
    return theirs


def tell_left_out(path: Path, why: str):
    print(printable(f"note: the head of {path} is not taken, as it is {why}"))


# ---------------------------------------------------------------------------------- the tokenizer


@dataclass
class Text:
    """How the encoder's text becomes tokens."""

    dictionary: Dictionary
    tokenize: Tokenizer | None  # None: only binarized text is to be read
    files: dict[str, bytes]  # dict.txt, and of a BPE encoder.json and vocab.bpe


def prepare_text(cfg, source: Pretrained) -> Text:
    """Find the tokenizer's files. cfg: finetune.py's settings. Raises InputError.

    They are named by flags, or lie beside a named dict.txt, else beside the checkpoint, or in the
    folder of the pretraining data.
    """
    named = {"dict.txt": cfg.dict, "encoder.json": cfg.encoder_json, "vocab.bpe": cfg.vocab_bpe}
    is_binarized = not cfg.predict and labelled.is_binarized(cfg)
    if is_binarized and not cfg.dict:
        named["dict.txt"] = str(Path(cfg.data_path) / "input0" / "dict.txt")
    with tempfile.TemporaryDirectory() as temporary:
        if named["dict.txt"]:
            folder = Path(named["dict.txt"]).parent
        elif source.path.is_dir():
            folder = Path(temporary)
            for name, content in hf_tokenizer.read(source.path, source.vocabulary).items():
                (folder / name).write_bytes(content)
        else:
            folder = folder_of_text(source)
        # read them while they are there
        paths = find_text_files(folder, named)
        dictionary = Dictionary(paths["dict.txt"])
        if len(dictionary) != source.vocabulary:
            sizes = f"{len(dictionary)} symbols, but {source.path} has {source.vocabulary}"
            raise InputError(f"{dictionary.path}: {sizes} embeddings")
        # that of a folder's own tokenizer has other symbols
        if named["dict.txt"] or not source.path.is_dir():
            dictionary.check_checkpoint(source.dictionary, source.path)
        tokenize = None
        if is_binarized:
            for part in ("input0", "input1"):  # each was binarized with the one in it
                dictionary.check_same(Path(cfg.data_path) / part / "dict.txt")
        else:
            tokenize = load_tokenizer(folder, dictionary, *map(paths.get, BPE_FILES))
        return Text(dictionary, tokenize, {name: p.read_bytes() for name, p in paths.items()})


def folder_of_text(source: Pretrained) -> Path:
    """The folder with the dict.txt of a checkpoint. Raises InputError."""
    folders = [source.path.parent]
    if source.folder:
        folders.append(Path(source.folder.split(":")[0]))
    for folder in folders:
        if (folder / "dict.txt").is_file():
            return folder
    places = " or ".join(map(str, folders))
    flags = "with --dict F, and for a BPE --encoder_json F --vocab_bpe F"
    raise InputError(f"no dict.txt in {places}: name that of {source.path} {flags}")
