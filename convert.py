"""Checkpoints to and from other ecosystems: Hugging Face transformers and fairseq.

    python convert.py --ckpt CHECKPOINT --to hf DIR [--teacher] [--data_path DIR]     for AutoModel.from_pretrained(DIR)
    python convert.py --ckpt CHECKPOINT --to fairseq FILE                             for fairseq's data2vec_text
    python convert.py --ckpt FAIRSEQ.pt --to native FILE                              for our train.py and eval.py
    python convert.py --ckpt HF_DIR --from hf --to native FILE

CHECKPOINT is a file of this project, one of fairseq's (of any age, with lm_head too), a bare state dict under fairseq's
names (whose shape comes from flags), or a folder of transformers (`model.safetensors` or `pytorch_model.bin`); which it
is shows, and --from only insists. Code in a file is never run; weights are copied bit for bit (float16 to float32).
Between this project and fairseq the optimizer and the position in the data go along, so that either can go on with the
other's run. Nothing that exists is overwritten.
"""

import dataclasses
import json
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

import config

# first: device has a word with torch before torch is imported
import device  # noqa: F401  # isort: split
import eval as evaluation
from compat import fairseq_config
from config import InputError, printable
from data import DataConfig
from dataset.binarized import SPECIAL, UNK, Dictionary
from model import LAYER_NORM_EPS, PAD, Data2VecText, ModelConfig
from runtime import checkpoint
from runtime.checkpoint import Loaded
from train import PARTS, TrainConfig, lr_at

KINDS = {"hf": ("hf",), "fairseq": ("fairseq", "state_dict"), "native": ("ours",)}  # as said, as Loaded says
FIELDS = {field.name: field for part in PARTS for field in dataclasses.fields(part)}

# ---------------------------------------------------------------------------------------------- transformers

# Parts of names, fairseq's on the left (behind `encoder.sentence_encoder.`), those of Data2VecTextModel on the right.
HF_NAMES = {
    "embed_tokens.": "embeddings.word_embeddings.",
    "embed_positions.": "embeddings.position_embeddings.",
    "layernorm_embedding.": "embeddings.LayerNorm.",
    "layers.": "encoder.layer.",
    ".self_attn.q_proj.": ".attention.self.query.",
    ".self_attn.k_proj.": ".attention.self.key.",
    ".self_attn.v_proj.": ".attention.self.value.",
    ".self_attn.out_proj.": ".attention.output.dense.",
    ".self_attn_layer_norm.": ".attention.output.LayerNorm.",
    ".fc1.": ".intermediate.dense.",
    ".fc2.": ".output.dense.",
    ".final_layer_norm.": ".output.LayerNorm.",
}
HF_TOKEN_TYPES = "embeddings.token_type_embeddings.weight"  # theirs alone: BERT's sentences A and B
HF_ENCODER, HF_NOT_OURS = ("embeddings.", "encoder.layer."), (HF_TOKEN_TYPES, "embeddings.position_ids")
HF_SYMBOLS = "dictionary_size"  # in config.json, ours alone: how many of the token embeddings are the dictionary's
HF_PREFIX = "data2vec_text."  # of all these in a model with a task's head

# ModelConfig's field -> theirs
HF_CONFIG = dict(
    layers="num_hidden_layers",
    embed_dim="hidden_size",
    ffn_embed_dim="intermediate_size",
    attention_heads="num_attention_heads",
    activation_fn="hidden_act",
    dropout="hidden_dropout_prob",
    attention_dropout="attention_probs_dropout_prob",
)
# What is built in here: written into every config.json, demanded of one that is read.
HF_BUILT_IN = dict(layer_norm_eps=LAYER_NORM_EPS, pad_token_id=PAD, bos_token_id=0, eos_token_id=2, is_decoder=False)
HF_DEFAULT_EPS = 1e-12  # the one of these whose default is another there

SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


def write_safetensors(tensors: dict, path):
    """float32 tensors as a .safetensors file: u64 length of the header, JSON header, the bytes of one after another."""
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses a file that doesn't say 'pt'
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            f.write(tensor.contiguous().numpy())


def read_safetensors(path: Path) -> dict:
    """The tensors of a .safetensors file. Raises InputError for a damaged one."""
    raw = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    tensors = {}
    try:
        begin = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        if len(raw) < begin:
            raise ValueError("the file is cut")
        header = json.loads(raw[8:begin].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in SAFETENSORS_TYPES:
                raise ValueError(f"{name} is of type {entry['dtype']}")
            first, last = (begin + int(at) for at in entry["data_offsets"])
            dtype = SAFETENSORS_TYPES[entry["dtype"]]
            if not begin <= first <= last <= len(raw):
                raise ValueError(f"{name} lies outside of the file")
            tensors[name] = torch.from_numpy(raw[first:last].copy()).view(dtype).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as e:
        raise InputError(f"{path}: not a whole safetensors file: {' '.join(str(e).split())[:200]}") from None
    return tensors


def load_hf(folder: Path) -> Loaded:
    """Read a folder that save_pretrained wrote for a Data2VecText model, with a task's head or without. Raises
    InputError."""
    where = folder / "config.json"
    try:
        theirs = json.loads(where.read_text(encoding="utf-8"))
        kind, rows = theirs.get("model_type"), int(theirs.get("max_position_embeddings", 512))
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise InputError(f"{where}: cannot be read as a config of transformers: {e}") from None
    if kind != "data2vec-text":
        raise InputError(f"{where}: model_type is {kind}; only data2vec-text can be converted")
    for name, value in HF_BUILT_IN.items():
        found = theirs.get(name, HF_DEFAULT_EPS if name == "layer_norm_eps" else value)
        if found != value:
            raise InputError(f"{where}: {name} is {found}; only {value} is built in here")
    shape = {ours: theirs[name] for ours, name in HF_CONFIG.items() if name in theirs}  # else their default, as ours
    shape["max_source_positions"] = rows - PAD - 1
    settings, _ = fairseq_config.from_reference({"model": shape}, FIELDS, str(where))
    layers = settings.get("layers", ModelConfig.layers)
    settings["average_top_k_layers"] = min(layers, ModelConfig.average_top_k_layers)
    settings["tokens_per_sample"] = min(settings["max_source_positions"], DataConfig.tokens_per_sample)

    if (folder / "model.safetensors").is_file():
        path = folder / "model.safetensors"
        state = read_safetensors(path)
    elif (folder / "pytorch_model.bin").is_file():
        path = folder / "pytorch_model.bin"
        state, _ = checkpoint.read(path)
    else:
        raise InputError(f"{folder}: neither model.safetensors nor pytorch_model.bin in it, in one piece each")
    state = {str(name).removeprefix(HF_PREFIX): tensor for name, tensor in state.items()}
    try:
        encoder = hf_encoder(state, theirs.get(HF_SYMBOLS))
        student = {f"encoder.{name}": tensor for name, tensor in checkpoint.merge_qkv(encoder, path).items()}
    except (TypeError, AttributeError, RuntimeError) as e:
        raise InputError(f"{path}: not a Data2VecText model's weights: {' '.join(str(e).split())[:200]}") from None
    return Loaded("hf", settings, student, None, state)


def hf_encoder(state: dict, symbols: int | None) -> dict:
    """Their state dict -> an encoder's under fairseq's names. symbols: how many embeddings are the dictionary's."""
    encoder = {}
    for name, tensor in state.items():
        if name.startswith(HF_ENCODER) and name not in HF_NOT_OURS:
            for ours, part in HF_NAMES.items():
                name = name.replace(part, ours)
            encoder[name] = tensor
    if symbols is not None and "embed_tokens.weight" in encoder:
        encoder["embed_tokens.weight"] = encoder["embed_tokens.weight"][:symbols]
    kinds = state.get(HF_TOKEN_TYPES)
    if kinds is not None and kinds[:1].any() and "embed_positions.weight" in encoder:
        positions = encoder["embed_positions.weight"].float()  # of which every token has one, too
        encoder["embed_positions.weight"] = torch.cat([positions[: PAD + 1], positions[PAD + 1 :] + kinds[:1].float()])
    return encoder


def write_hf(folder: Path, encoder: dict, cfg: ModelConfig, unknown: int = 0):
    """config.json and model.safetensors of a Data2VecTextModel.

    encoder: state dict of an Encoder; unknown: how many ids behind its own shall have the embedding of <unk>.
    """
    for name, value in (("normalize_before", False), ("activation_dropout", 0.0)):
        if getattr(cfg, name) != value:
            raise InputError(f"--{name} {getattr(cfg, name)}: transformers' Data2VecText has only {value}")
    tokens, tensors = encoder["embed_tokens.weight"], {}
    encoder = {**encoder, "embed_tokens.weight": torch.cat([tokens, tokens[UNK].repeat(unknown, 1)])}
    for name, tensor in checkpoint.split_qkv(encoder).items():
        for ours, part in HF_NAMES.items():
            name = name.replace(ours, part)
        tensors[name] = tensor
    tensors[HF_TOKEN_TYPES] = torch.zeros(1, cfg.embed_dim)
    theirs = dict(
        architectures=["Data2VecTextModel"],
        model_type="data2vec-text",
        vocab_size=len(tokens) + unknown,
        # theirs counts the table's rows, with those below the first position
        max_position_embeddings=len(encoder["embed_positions.weight"]),
        type_vocab_size=1,
        initializer_range=0.02,
        **{theirs: getattr(cfg, ours) for ours, theirs in HF_CONFIG.items()},
        **HF_BUILT_IN,
        **{HF_SYMBOLS: len(tokens)},
    )
    checkpoint.write_text(folder / "config.json", json.dumps(theirs, indent=2) + "\n")
    write_safetensors(tensors, folder / "model.safetensors")


def write_tokenizer(
    folder: Path, dictionary: Dictionary, encoder_json: Path | None, vocab_bpe: Path | None, longest: int
) -> int:
    """Files from which AutoTokenizer makes `<s> ... </s>` in this dictionary's ids: byte-level BPE, or words.

    Returns how many ids come behind the dictionary's, of tokens that are <unk> to the model.
    """
    ids, lacking = dictionary.ids, []
    special = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIAL))
    settings = dict(
        **special,
        cls_token=special["bos_token"],
        sep_token=special["eos_token"],
        # lstrip: transformers 5 does not assume it, and would leave the blank before <mask> as a token
        mask_token={"__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": False, "special": True},
        model_max_length=longest,
    )
    if encoder_json:
        try:
            tokens = {str(number): token for token, number in json.loads(encoder_json.read_text("utf-8")).items()}
        except (ValueError, AttributeError) as e:
            raise InputError(f"{encoder_json}: not a BPE vocabulary in JSON: {e}") from None
        vocabulary = {tokens.get(symbol, symbol): i for symbol, i in ids.items()}
        # fairseq turns what its dictionary lacks into <unk>; here each gets an id of its own
        lacking = [token for token in tokens.values() if token not in vocabulary]
        vocabulary.update((token, i) for i, token in enumerate(lacking, len(dictionary)))
        checkpoint.write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
        shutil.copyfile(vocab_bpe, folder / "merges.txt")
        settings.update(tokenizer_class="RobertaTokenizer", add_prefix_space=False)
    else:
        flags = dict(single_word=False, rstrip=False, normalized=False, special=True)
        added = [dict(id=ids[s], content=s, lstrip=s == "<mask>", **flags) for s in (*SPECIAL, "<mask>")]
        made = dict(
            version="1.0",
            truncation=None,
            padding=None,
            added_tokens=sorted(added, key=lambda token: token["id"]),
            normalizer=None,
            pre_tokenizer={"type": "WhitespaceSplit"},
            post_processor=dict(
                type="RobertaProcessing",
                sep=["</s>", ids["</s>"]],
                cls=["<s>", ids["<s>"]],
                trim_offsets=True,
                add_prefix_space=False,
            ),
            decoder=None,
            model={"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"},
        )
        checkpoint.write_text(folder / "tokenizer.json", json.dumps(made, ensure_ascii=False))
        settings.update(tokenizer_class="PreTrainedTokenizerFast")
    checkpoint.write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    return len(lacking)


# ---------------------------------------------------------------------------------------------- fairseq

# The groups of its config and our settings in them, under its names. Other groups are left out: its loader fills them
# in, but trips over one that is there and empty.
GROUPS = {
    "common": "seed log_interval",
    "dataset": "max_tokens batch_size required_batch_size_multiple validate_interval validate_interval_updates"
    " disable_validation",
    "optimization": "max_epoch max_update clip_norm update_freq lr",
    "checkpoint": "save_dir save_interval save_interval_updates keep_interval_updates",
    "model": "head_layers average_top_k_layers batch_norm_target_layer instance_norm_target_layer"
    " layer_norm_target_layer layer_norm_targets instance_norm_targets loss_beta loss_scale ema_decay ema_end_decay"
    " ema_anneal_end_step ema_transformer_layers_only",
    "model.transformer": "activation_fn dropout attention_dropout activation_dropout max_source_positions",
    "model.transformer.encoder": "embed_dim ffn_embed_dim layers attention_heads normalize_before",
    "task": "data sample_break_mode tokens_per_sample mask_prob mask_multiple_length mask_stdev random_token_prob"
    " leave_unmasked_prob seed",
    "criterion": "",
    "optimizer": "adam_betas adam_eps weight_decay lr",
    "lr_scheduler": "warmup_updates lr max_update",
}
TRAINING_GROUPS = ("optimization", "optimizer", "lr_scheduler")
MOMENTS = ("exp_avg", "exp_avg_sq")
OURS = "data2vec_text"  # in extra_state of a file of theirs that we wrote: what they have no place for
THEIRS = "fairseq"  # in a file of ours that came from theirs: what we have no place for


def reference_config(flat: dict) -> dict:
    """Our settings as fairseq's config tree."""
    tree = {"_name": None, "scoring": None, "bpe": None, "tokenizer": None}
    spelled = dict(
        data=flat["data_path"],
        lr=[flat["lr"]],
        update_freq=[flat["update_freq"]],
        adam_betas=str(tuple(flat["adam_betas"])),
        batch_size=flat["batch_size"] or None,
    )
    for group, names in GROUPS.items():
        node = tree
        for part in group.split("."):
            node = node.setdefault(part, {"_name": fairseq_config.BUILT_IN_NAMES.get(part)})
        node.update((name, spelled[name] if name in spelled else flat[name]) for name in names.split())
    tree["common"]["user_dir"] = "examples/data2vec"
    tree["model"]["max_positions"] = flat["tokens_per_sample"]
    tree["model"]["transformer"].update(layernorm_embedding=True, no_scale_embedding=True)
    tree["model"]["transformer"]["encoder"]["learned_pos"] = True
    # of a decoder that the model has not, but whose defaults its loader would look for in the wrong place
    tree["model"]["transformer"]["decoder"] = {"input_dim": flat["embed_dim"], "output_dim": flat["embed_dim"]}
    return tree


def reference_names(student: dict) -> list[str]:
    """fairseq's names of the student's parameters, in the order in which its optimizer counts them."""
    names = [k for k in checkpoint.to_reference(student, {}) if k != checkpoint.TEACHER and not k.endswith(".version")]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    return sorted(names, key=lambda name: modules.index(name.rpartition(".")[0]))  # a module's weight, then its bias


def to_fairseq(content: dict, flat: dict) -> dict:
    """One of our checkpoints as fairseq's trainer would have saved it. flat: its config, with this command's flags."""
    student, progress, states = content["student"], content["progress"], content["optimizer"]["state"]
    names, moments = reference_names(student), {}
    for moment in MOMENTS if states else ():
        moments[moment] = checkpoint.to_reference({k: states[i][moment] for i, k in enumerate(student)}, {})
    train = TrainConfig(**{field.name: flat[field.name] for field in dataclasses.fields(TrainConfig)})
    group = dict(
        lr=lr_at(progress["num_updates"], train),
        betas=train.adam_betas,
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        amsgrad=False,
        params=list(range(len(names))),
    )
    made = dict(
        args=None,
        cfg=reference_config(flat),
        criterion=None,
        optimizer_history=[
            dict(
                criterion_name="ModelCriterion",
                optimizer_name="FairseqAdam",
                lr_scheduler_state={"best": None},
                num_updates=progress["num_updates"],
            )
        ],
        task_state={},
        extra_state=dict(
            metrics=OrderedDict(),
            previous_training_time=0.0,
            train_iterator=dict(
                version=2, epoch=progress["epoch"], iterations_in_epoch=progress["batches"], shuffle=True
            ),
            val_loss=progress["best_loss"],
            best=progress["best_loss"],
        ),
    )
    if THEIRS in content and flat == content["config"]:
        made = dict(content[THEIRS])
        group = made.pop("param_group")
    else:
        kept = {k: v for k, v in content.items() if k not in ("format", "student", "teacher", "optimizer", THEIRS)}
        made["extra_state"][OURS] = {**kept, "param_groups": content["optimizer"]["param_groups"]}
    step = int(states[0]["step"]) if states else 0
    made["model"] = OrderedDict(checkpoint.to_reference(student, content["teacher"]))
    made["last_optimizer_state"] = dict(
        state={i: {"step": step, **{m: moments[m][k] for m in MOMENTS}} for i, k in enumerate(names) if states},
        param_groups=[group],
    )
    if content["scaler"]:
        made["last_optimizer_state"]["loss_scale"] = content["scaler"]["scale"]
    return made


def from_fairseq(content: dict, template: dict) -> dict:
    """Optimizer, position and the like of a fairseq checkpoint, for one of ours. template: a student's state dict, of
    which only names and shapes count. Raises KeyError, TypeError and the like where another optimizer made the file."""
    extra, last = content["extra_state"], content["last_optimizer_state"]
    states, updates = last["state"], content["optimizer_history"][-1]["num_updates"]
    theirs, names, moments = checkpoint.to_reference(template, {}), reference_names(template), {}
    for moment in MOMENTS if states else ():
        parts = [states[i][moment] for i in range(len(states))]
        if len(parts) == 1:  # its fp16 optimizer keeps all parameters in one vector
            sizes = [theirs[name].numel() for name in names]
            parts = [part.view(theirs[name].shape) for name, part in zip(names, parts[0].split(sizes))]
        moments[moment], _ = checkpoint.from_reference(dict(zip(names, parts, strict=True)))
        for name, tensor in template.items():
            if moments[moment][name].shape != tensor.shape:
                raise ValueError(f"{moment} of {name} is {tuple(moments[moment][name].shape)}")
    step = int(states[0]["step"]) if states else 0
    state = {
        i: {"step": torch.tensor(float(step)), **{m: moments[m][name] for m in MOMENTS}}
        for i, name in enumerate(template)
        if states
    }
    if OURS in extra and extra[OURS]["progress"]["num_updates"] == updates:
        kept = dict(extra[OURS])
        return {"optimizer": {"state": state, "param_groups": kept.pop("param_groups")}, **kept}
    place = extra["train_iterator"]
    rest = {k: v for k, v in content.items() if k not in ("model", "last_optimizer_state")}
    rest["param_group"] = last["param_groups"][0]
    return dict(
        optimizer={"state": state, "param_groups": []},
        scaler={"scale": float(last["loss_scale"])} if "loss_scale" in last else {},
        progress=dict(
            num_updates=updates,
            teacher_updates=max(0, updates - 1),  # its teacher has not taken in the last one
            skipped=updates - step,
            epoch=place["epoch"],
            batches=place["iterations_in_epoch"],
            world_size=content["cfg"]["distributed_training"]["distributed_world_size"],
            best_loss=extra.get("best"),
            data={},  # a resume compares what stands here with the data it finds
        ),
        **({THEIRS: rest} if len(states) == len(names) else {}),
    )


# ---------------------------------------------------------------------------------------------- the way through


def settings_of(loaded: Loaded, path) -> tuple[dict, str]:
    """The config a checkpoint brings along, and why its training settings are not in it, if they are not."""
    if loaded.kind != "fairseq":
        return loaded.config, ""
    try:
        return {**loaded.content["extra_state"][OURS]["config"]}, ""
    except (KeyError, TypeError):  # not one that we wrote
        pass
    values, tree = evaluation.saved_settings(loaded, path), loaded.content.get("cfg") or {}
    try:
        training, _ = fairseq_config.from_reference(
            {k: tree[k] for k in TRAINING_GROUPS if k in tree}, FIELDS, str(path)
        )
    except InputError as e:
        return values, str(e)
    return {**values, **training}, ""


def left_out(loaded: Loaded) -> list[str]:
    """Weights in the file that have no place here, such as a fine-tuned head: the first two parts of their names."""
    if loaded.kind == "hf":
        names = [k for k in loaded.content if not k.startswith(HF_ENCODER)]
    else:
        known = r"encoder\.(sentence_encoder|regression_head|lm_head\.\d+|_ema$)"
        names = [k for k in loaded.content.get("model", loaded.content) if not re.match(known, k)]
    return sorted({".".join(name.split(".")[:2]) for name in names}) if loaded.kind != "ours" else []


def complete(loaded: Loaded, cfg: ModelConfig, seed: int, untrained: str, path) -> tuple[dict, str]:
    """Everything that one of our checkpoints holds but its config. untrained: why the optimizer must begin anew.

    Returns it and the reason why the optimizer does, if so. Raises InputError if the weights are not such a model's.
    """
    tokens = loaded.student.get("encoder.embed_tokens.weight")
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
        raise InputError(f"{path}: the student has no embed_tokens.weight; is it a data2vec_text model?")
    with torch.device("meta"):  # shapes alone
        model = Data2VecText(cfg, len(tokens))
    student = {}
    for part in ("encoder", "regression_head"):
        state = {k.removeprefix(f"{part}."): v for k, v in loaded.student.items() if k.startswith(f"{part}.")}
        if state or part == "encoder":
            checkpoint.check_fits(state, getattr(model, part), f"the student's {part}", path)
            student.update((f"{part}.{k}", state[k].float()) for k in getattr(model, part).state_dict())
    teacher = loaded.teacher
    if teacher is None:  # what training would begin with
        teacher = {k.removeprefix("encoder."): v for k, v in student.items() if k.startswith("encoder.")}
    checkpoint.check_fits(teacher, model.encoder, "the teacher", path)
    weights = dict(student=student, teacher={k: teacher[k].float() for k in model.encoder.state_dict()})
    if loaded.kind == "ours":
        return {**loaded.content, **weights}, ""
    content = dict(
        dictionary={},
        optimizer={"state": {}, "param_groups": []},
        scaler={},
        rng={"cpu": torch.Generator().manual_seed(seed).get_state()},  # each update seeds anew
        progress=dict(
            num_updates=0,
            teacher_updates=0,
            skipped=0,
            epoch=1,
            batches=0,
            world_size=1,
            best_loss=None,
            data={},  # a resume compares what stands here with the data it finds
        ),
        log={"updates": [], "skipped": [], "seconds": 0.0},
    )
    if loaded.kind == "fairseq" and not untrained:
        try:
            content.update(from_fairseq(loaded.content, model.state_dict()))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as e:
            untrained = f"no state of its Adam in it: {type(e).__name__} {' '.join(str(e).split())[:200]}"
    return {**content, **weights}, untrained


def find_dictionary(args, data_path: str) -> tuple[Dictionary | None, Path | None, Path | None]:
    """The dictionary and the BPE's two files: those named, else what the data folder has of them."""
    folder = Path(data_path.split(":")[0]) if data_path else None
    found = []
    for flag, name in (("dict", "dict.txt"), ("encoder_json", "encoder.json"), ("vocab_bpe", "vocab.bpe")):
        given = getattr(args, flag)
        if given and not Path(given).is_file():
            raise InputError(f"--{flag} {given}: no such file")
        path = Path(given) if given else folder / name if folder else None
        found.append(path if path and path.is_file() else None)
    dictionary, encoder_json, vocab_bpe = found
    if (encoder_json is None) != (vocab_bpe is None):
        raise InputError("--encoder_json and --vocab_bpe go together: the BPE's vocabulary and its merges")
    if encoder_json and not dictionary:
        raise InputError("--encoder_json needs the dictionary that gives its tokens their ids: --dict or --data_path")
    return dictionary and Dictionary(dictionary), encoder_json, vocab_bpe


def main(argv: list | None = None) -> int:
    def extra(parser):
        parser.add_argument("--ckpt", metavar="CHECKPOINT", help="what to convert: a file, or a folder of transformers")
        parser.add_argument("--from", dest="source", choices=KINDS, help="insist that it is of this kind")
        parser.add_argument("--to", nargs=2, metavar=("hf|fairseq|native", "PATH"), help="what to make, and where")
        parser.add_argument("--teacher", action="store_true", help="with --to hf: the teacher instead of the student")
        parser.add_argument("--dict", metavar="FILE", help="dict.txt of the training data [in --data_path]")
        parser.add_argument("--encoder_json", metavar="FILE", help="the BPE's vocabulary [in --data_path]")
        parser.add_argument("--vocab_bpe", metavar="FILE", help="the BPE's merges [in --data_path]")

    _, args = config.parse(PARTS, __doc__, argv, extra=extra)
    if not args.ckpt or not args.to or args.to[0] not in KINDS:
        raise InputError(f"needed: --ckpt CHECKPOINT, and --to {'|'.join(KINDS)} PATH")
    path, (kind, out) = Path(args.ckpt), (args.to[0], Path(args.to[1]))
    if args.teacher and kind != "hf":
        raise InputError("--teacher goes with --to hf: the other files hold both student and teacher")
    if out.is_file() or out.is_dir() and (kind != "hf" or any(out.iterdir())):
        raise InputError(f"{out} exists; remove it, or choose another name")

    loaded = load_hf(path) if path.is_dir() else checkpoint.load(path)
    found = next(name for name, kinds in KINDS.items() if loaded.kind in kinds)
    if args.source not in (None, found):
        raise InputError(f"--from {args.source}: {path} is {found}")
    settings, untrained = settings_of(loaded, path)
    parts, args = config.parse(PARTS, __doc__, argv, extra=extra, base=settings)
    cfg = parts[PARTS.index(ModelConfig)]
    flat = {k: v for part in parts for k, v in vars(part).items()}
    content, untrained = complete(loaded, cfg, flat["seed"], untrained, path)
    dictionary, *bpe = find_dictionary(args, flat["data_path"])
    if dictionary:
        size = len(content["student"]["encoder.embed_tokens.weight"])
        if len(dictionary) != size or content["dictionary"].get("digest", dictionary.digest()) != dictionary.digest():
            raise InputError(f"the dictionary, of {len(dictionary)} symbols, is not the one of {path}, of {size}")

    if args.teacher and loaded.teacher is None:
        raise InputError(f"--teacher: {path} has none")
    if kind == "fairseq" and not any(k.startswith("regression_head.") for k in content["student"]):
        raise InputError(f"{path} has no regression head, without which fairseq's data2vec_text does not load")

    out.parent.mkdir(parents=True, exist_ok=True)
    told = []
    if kind == "hf":
        has_tokenizer = dictionary and (bpe[0] or not dictionary.holds_bpe_ids())
        encoder = content["teacher"] if args.teacher else content["student"]
        encoder = {k.removeprefix("encoder."): v for k, v in encoder.items() if not k.startswith("regression_head.")}
        with checkpoint.whole(out) as folder:
            folder.mkdir()
            unknown = write_tokenizer(folder, dictionary, *bpe, flat["tokens_per_sample"]) if has_tokenizer else 0
            write_hf(folder, encoder, cfg, unknown)
        if not has_tokenizer:
            told.append("without a tokenizer: that takes --data_path, or --dict, --encoder_json and --vocab_bpe")
    elif kind == "fairseq":
        with checkpoint.whole(out) as part, open(part, "wb") as file:
            torch.save(to_fairseq({"config": None, **content}, flat), file)
    else:
        if dictionary:
            content["dictionary"] = dict(size=len(dictionary), digest=dictionary.digest(), mask_id=dictionary.mask_id)
        checkpoint.save({**content, "config": flat}, out)
        if untrained:
            told.append(f"optimizer and data position begin anew ({untrained})")
    told += [f"not taken over: {name}" for name in left_out(loaded)]
    for line in (f"{out}: {kind}, from {path}", *told):
        print(printable(line))
    return 0


if __name__ == "__main__":
    config.program(main)
