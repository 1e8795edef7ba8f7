"""What fine-tuning starts from: the encoder of any checkpoint, and the files that turn text into its tokens."""

import dataclasses
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from config import InputError, ModelConfig, check_ranges, printable, read_text
from formats import fairseq_names, integrity
from formats import hf as convert_hf
from model import PAD, Encoder, init_weights
from run import checkpoint
from tasks import labelled
from text.binarized import SPECIAL, Dictionary
from text.tokens import Tokenizer, load_tokenizer

import torch
from torch import Tensor

FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}
FAIRSEQ_HEAD = "classification_heads.sentence_classification_head."
FC1 = "layers.0.fc1.weight"
TEXT_FILES = ("dict.txt", "encoder.json", "vocab.bpe")


@dataclass
class Pretrained:
    """An encoder to start from. weights: its state dict; head: a sentence head's, empty if the file has none."""

    path: Path
    shape: ModelConfig
    weights: dict
    head: dict
    dictionary: dict  # size, digest and mask_id, as our checkpoints have them; else empty
    folder: str  # of the pretraining data, on the machine that trained it

    @property
    def vocabulary(self) -> int:
        return len(self.weights["embed_tokens.weight"])

    @property
    def longest(self) -> int:
        """The most tokens of an example: positions count from PAD + 1."""
        return len(self.weights["embed_positions.weight"]) - PAD - 1

    def encoder(self, untrained: bool = False, **dropouts) -> Encoder:
        """A new encoder with these weights, or with the random ones that pretraining begins with. Raises InputError."""
        with torch.device(
            "meta"
        ):  # names and shapes alone, so that a small file cannot ask for much memory
            checkpoint.check_fits(
                self.weights, Encoder(self.shape, self.vocabulary), "the encoder", self.path
            )
        encoder = Encoder(dataclasses.replace(self.shape, **dropouts), self.vocabulary)
        if untrained:
            encoder.apply(init_weights)
        else:
            checkpoint.put(self.weights, encoder, "the encoder", self.path)
        return encoder


@torch.no_grad()
def scale_embeddings(encoder: Encoder, rms: float):
    """Multiply token and position embeddings by one factor, until the tokens' have this root mean square.

    The layer norm that follows takes the factor out again, but for its epsilon, so the outputs hardly change. Training
    does: Adam moves every weight by about the learning rate, which is a larger share of a smaller weight.
    """
    factor = rms / encoder.embed_tokens.weight.square().mean().sqrt()
    encoder.embed_tokens.weight.mul_(factor)
    encoder.embed_positions.weight.mul_(factor)


def load(path, teacher: bool = False, attention_heads: int = 0) -> Pretrained:
    """The student's encoder, or the teacher's, of a checkpoint of this project or of fairseq, of a bare state dict, or
    of a Hugging Face folder. attention_heads: 0 takes the file's. Raises InputError."""
    path = Path(path)
    loaded = convert_hf.load(path) if path.is_dir() else checkpoint.load(path)
    if teacher and not loaded.teacher:
        raise InputError(f"--teacher: {path} has none")
    student = {
        k.removeprefix("encoder."): v for k, v in loaded.student.items() if k.startswith("encoder.")
    }
    weights = floats(loaded.teacher if teacher else student, path)
    settings, folder = loaded.config, loaded.config.get("data_path", "")
    if loaded.kind == "fairseq":
        settings = fairseq_names.reference_settings(loaded.config, FIELDS, path)
        folder = loaded.config.get("task", {}).get("data") or ""
    state = (
        loaded.content.get("model", loaded.content)
        if loaded.kind in ("fairseq", "state_dict")
        else {}
    )
    head = {k.removeprefix(FAIRSEQ_HEAD): v for k, v in state.items() if k.startswith(FAIRSEQ_HEAD)}
    ours = loaded.content if loaded.kind == "ours" else {}
    head = floats(head or ours.get("classifier", {}).get("head", {}), path)
    folder = folder if isinstance(folder, str) else ""
    shape = shape_of(weights, settings, attention_heads, path)
    return Pretrained(path, shape, weights, head, ours.get("dictionary", {}), folder)


def floats(state: dict, path) -> dict:
    """A state dict in float32 and memory of its own. Raises InputError for an entry that holds no floating-point
    numbers."""
    for name, tensor in state.items():
        if not (isinstance(tensor, Tensor) and tensor.dtype in integrity.FLOATS):
            raise InputError(f"{path}: {name} is not a tensor of floating-point numbers")
    return {
        name: torch.empty(tensor.shape).copy_(tensor.detach()) for name, tensor in state.items()
    }


def shape_of(weights: dict, settings: dict, attention_heads: int, path) -> ModelConfig:
    """The encoder's shape: as far as the weights show it by them, else by the settings beside them."""
    for name, least in (
        ("embed_tokens.weight", len(SPECIAL)),
        ("embed_positions.weight", PAD + 2),
        (FC1, 1),
    ):
        if name not in weights:
            raise InputError(f"{path}: has no encoder's weights in it: {name} is missing")
        if weights[name].dim() != 2 or len(weights[name]) < least:
            shown = tuple(weights[name].shape)
            raise InputError(f"{path}: {name} is {shown}, not a matrix of {least} rows or more")
    layers = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    seen = dict(
        layers=layers,
        embed_dim=weights["embed_tokens.weight"].shape[1],
        ffn_embed_dim=len(weights[FC1]),
        max_source_positions=len(weights["embed_positions.weight"]) - PAD - 1,
        normalize_before="layer_norm.weight" in weights,
        activation_fn=settings.get("activation_fn", "gelu"),
        average_top_k_layers=min(layers, ModelConfig.average_top_k_layers),
    )
    heads = attention_heads or settings.get("attention_heads")
    if not heads:
        heads = max(
            4, seen["embed_dim"] // 64
        )  # 64 channels each, as in all published sizes, or a small model's four
        note = f"note: {path} does not say how many attention heads it has; taking {heads} (--attention_heads)"
        print(printable(note), file=sys.stderr)
    shape = ModelConfig(**seen, attention_heads=heads)
    check_ranges(shape)
    shape.check()
    return shape


# ---------------------------------------------------------------------------------------------- text to tokens


def text_files(given: dict, source: Pretrained) -> dict[str, Path]:
    """Where dict.txt and, if the tokens are a BPE's, encoder.json and vocab.bpe are.

    given: {name: path or ""} from flags. What is not given is looked for beside a given dict.txt, else beside the
    checkpoint, or in the folder of the pretraining data. Raises InputError.
    """
    places = [Path(given["dict.txt"]).parent] if given["dict.txt"] else [source.path.parent]
    places += [Path(source.folder.split(":")[0])] if source.folder and not given["dict.txt"] else []
    place = next(
        (folder for folder in places if given["dict.txt"] or (folder / "dict.txt").is_file()), None
    )
    if not place:
        raise InputError(
            f"no dict.txt in {' or '.join(map(str, places))}: name the dictionary of {source.path} with --dict F, and"
            " for a BPE --encoder_json F --vocab_bpe F"
        )
    paths = {name: Path(given[name] or place / name) for name in TEXT_FILES}
    return {name: path for name, path in paths.items() if given[name] or path.is_file()}


def hf_text_files(folder: Path, vocabulary: int) -> dict[str, bytes]:
    """The tokenizer of a Hugging Face folder as our three files: RoBERTa's vocab.json and merges.txt, or the word list
    in a tokenizer.json. Raises InputError."""
    try:
        if (folder / "vocab.json").is_file():
            ids = json.loads(read_text(folder / "vocab.json"))
            merges = read_text(folder / "merges.txt")
            made = {
                "".join(row.split(" "))
                for row in merges.split("\n")
                if not row.startswith("#version")
            }
            encoder = {token: i for token, i in ids.items() if token in made or len(token) == 1}
            symbols = {i: str(i) for i in encoder.values()} | {ids["<mask>"]: "<mask>"}
            files = {"encoder.json": json.dumps(encoder).encode(), "vocab.bpe": merges.encode()}
        else:
            made = json.loads(read_text(folder / "tokenizer.json"))["model"]
            if made["type"] != "WordLevel":
                raise InputError(
                    f"{folder / 'tokenizer.json'}: a {str(made['type'])[:80]} tokenizer without vocab.json beside it"
                )
            symbols, files = {i: word for word, i in made["vocab"].items()}, {}
        rows = [symbols.get(i, f"unused{i}") for i in range(len(SPECIAL), vocabulary)]
        files["dict.txt"] = "".join(f"{symbol} 0\n" for symbol in rows).encode()
        return files
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(
            f"{folder}: no tokenizer that can be read ({getattr(e, 'strerror', None) or e}); give --dict F, and for a"
            " BPE --encoder_json F --vocab_bpe F"
        ) from None


def prepare_text(cfg, source: Pretrained) -> tuple[Dictionary, Tokenizer | None, dict[str, bytes]]:
    """The dictionary, the tokenizer where raw text is to be read, and the contents of their files by name. cfg:
    finetune.py's settings. Raises InputError."""
    given = {"dict.txt": cfg.dict, "encoder.json": cfg.encoder_json, "vocab.bpe": cfg.vocab_bpe}
    binarized = bool(cfg.data_path) and labelled.is_binarized(cfg.data_path)
    if binarized and not cfg.dict:
        given["dict.txt"] = str(Path(cfg.data_path) / "input0" / "dict.txt")
    with tempfile.TemporaryDirectory() as folder:
        if source.path.is_dir() and not given["dict.txt"]:
            paths = {}
            for name, content in hf_text_files(source.path, source.vocabulary).items():
                paths[name] = Path(folder) / name
                paths[name].write_bytes(content)
        else:
            paths = text_files(given, source)
        dictionary = read_dictionary(paths["dict.txt"], source)
        bpe = [paths.get(name) for name in TEXT_FILES[1:]]
        tokenize = None if binarized else load_tokenizer(paths["dict.txt"].parent, dictionary, *bpe)
        return dictionary, tokenize, {name: path.read_bytes() for name, path in paths.items()}


def write_text_files(folder: Path, contents: dict[str, bytes], replace: bool):
    """Put the tokenizer's files beside the fine-tuned checkpoint, which can then read raw text. replace: what is there
    is an older fine-tuning's. Raises InputError if it may be someone's."""
    for name in () if replace else TEXT_FILES:
        path = folder / name
        if os.path.lexists(path) and not (
            path.is_file() and path.read_bytes() == contents.get(name)
        ):
            raise InputError(f"--save_dir {folder} holds another {name}; choose another folder")
    for name in TEXT_FILES:
        (folder / name).unlink(missing_ok=True)
        if name in contents:
            (folder / name).write_bytes(contents[name])


def read_dictionary(path, source: Pretrained) -> Dictionary:
    """A dict.txt that must be the encoder's. Raises InputError."""
    dictionary = Dictionary(path)
    if len(dictionary) != source.vocabulary:
        raise InputError(
            f"{path}: {len(dictionary)} symbols, but {source.path} has {source.vocabulary} embeddings"
        )
    if source.dictionary and source.dictionary["digest"] != dictionary.digest():
        raise InputError(
            f"{path}: {source.path} was trained with another dictionary of the same size"
        )
    return dictionary
