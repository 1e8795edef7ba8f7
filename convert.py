"""Checkpoints to and from other ecosystems: Hugging Face transformers and fairseq.

    python convert.py --ckpt CHECKPOINT --to hf DIR [--teacher] [--data_path DIR]     for transformers' AutoModel
    python convert.py --ckpt CHECKPOINT --to fairseq FILE                             for fairseq's data2vec_text
    python convert.py --ckpt FAIRSEQ.pt --to native FILE                              for our train.py and eval.py
    python convert.py --ckpt HF_DIR --from hf --to native FILE

CHECKPOINT is one of our files, one of fairseq's (of any age, also with lm_head), a bare state dict
under fairseq's names (give the model's shape by flags), or a folder of transformers
(`model.safetensors` or `pytorch_model.bin`). The kind is detected; --from only checks it. No code
in a file is run; weights are copied bit for bit (float16 to float32). Between this project and
fairseq the optimizer and the position in the data are kept, so either can resume the other's run.
Existing files are never overwritten.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from config import PARTS
from run import flags


def add_flags(parser):
    flag, kinds = parser.add_argument, ("hf", "fairseq", "native")
    flag(
        "--ckpt", metavar="CHECKPOINT", help="what to convert: a file, or a folder of transformers"
    )
    flag("--from", dest="source", choices=kinds, help="fail if it is not of this kind")
    flag("--to", nargs=2, metavar=("|".join(kinds), "PATH"), help="what to make, and where")
    flag("--teacher", action="store_true", help="with --to hf: the teacher instead of the student")
    flag("--dict", metavar="FILE", help="dict.txt of the training data [in --data_path]")
    flag("--encoder_json", metavar="FILE", help="the BPE's vocabulary [in --data_path]")
    flag("--vocab_bpe", metavar="FILE", help="the BPE's merges [in --data_path]")


if __name__ == "__main__":
    flags.answer_early(PARTS, __doc__, add_flags)  # torch takes seconds to import


from config import PARTS, InputError, ModelConfig, printable
from formats import card as model_card
from formats import convert_classifier, integrity
from formats import fairseq_state as convert_fairseq
from formats import hf as convert_hf
from model import Data2VecText
from run import checkpoint
from run.checkpoint import Loaded
from text.binarized import SPECIAL, Dictionary

import torch

HEADS = ("regression_head.", "lm_head.")
MOST_LEFT = 50  # of the entries that are not taken over, how many are named
KINDS = {
    "hf": ("hf",),
    "fairseq": ("fairseq", "state_dict"),
    "native": ("ours",),
}  # for --from -> Loaded.kind


@dataclass
class Source:
    """What is converted: a complete checkpoint, whatever it was read from, and this command's
    settings."""

    path: Path
    loaded: Loaded
    content: dict  # every entry of a checkpoint of ours except `format` and `config`
    flat: dict  # its `config`, including what this command's flags changed
    model: ModelConfig
    dictionary: Dictionary | None
    bpe: list  # encoder.json and vocab.bpe, or None twice
    teacher: bool  # --teacher
    untrained: str  # why the optimizer starts anew, or ""


def to_hf(source: Source, out: Path) -> list[str]:
    has_tokenizer = bool(
        source.dictionary and (source.bpe[0] or not source.dictionary.holds_bpe_ids())
    )
    weights = source.content["teacher"] if source.teacher else source.content["student"]
    encoder = {k.removeprefix("encoder."): v for k, v in weights.items() if not k.startswith(HEADS)}
    head = {
        k: v for k, v in weights.items() if k.startswith(convert_hf.WORD_HEAD)
    }  # the teacher has none
    with checkpoint.whole(out) as folder:
        folder.mkdir()
        unknown, longest = 0, source.flat["tokens_per_sample"]
        if has_tokenizer:
            unknown = convert_hf.write_tokenizer(
                folder, source.dictionary, source.bpe, longest, bool(head)
            )
        convert_hf.write(folder, encoder, source.model, unknown, head)
        task = "fill-mask" if head else "feature-extraction"
        if "classifier" in source.content:  # of finetune.py
            task = "text-classification"
            convert_classifier.add_head(folder, source.content["classifier"], source.path)
        card = model_card.text(out.resolve().name, source, task, has_tokenizer)
        (folder / "README.md").write_text(card, encoding="utf-8")
    notes = (
        []
        if has_tokenizer
        else ["no tokenizer: give --data_path, or --dict, --encoder_json and --vocab_bpe"]
    )
    return [
        *notes,
        f"{out}/README.md is its model card; the licence and the corpus are yours to fill in",
    ]


def to_fairseq(source: Source, out: Path) -> list[str]:
    if not any(k.startswith("regression_head.") for k in source.content["student"]):
        raise InputError(
            f"{source.path} has no regression head, which fairseq's data2vec_text needs"
        )
    if any(k.startswith("lm_head.") for k in source.content["student"]):
        raise InputError(f"{source.path} has a head for words, which fairseq's data2vec_text lacks")
    made = convert_fairseq.to_fairseq({"config": None, **source.content}, source.flat)
    checkpoint.write(made, out)
    return []


def to_native(source: Source, out: Path) -> list[str]:
    content, dictionary = {**source.content, "config": source.flat}, source.dictionary
    if dictionary:
        content["dictionary"] = dict(
            size=len(dictionary), digest=dictionary.digest(), mask_id=dictionary.mask_id
        )
    checkpoint.save(content, out)
    return (
        [f"optimizer and data position start anew ({source.untrained})"] if source.untrained else []
    )


# What --to makes: each writes `out` and returns lines to print. A further format is a function
# here.
TARGETS = {"hf": to_hf, "fairseq": to_fairseq, "native": to_native}


def left_out(loaded: Loaded) -> list[str]:
    """Weights in the file that our model has no place for, such as a fine-tuned head: their names'
    first two parts."""
    if loaded.kind == "ours":
        return []
    known = convert_hf.KNOWN if loaded.kind == "hf" else convert_fairseq.KNOWN
    names = [
        name for name in loaded.content.get("model", loaded.content) if not re.match(known, name)
    ]
    return sorted({".".join(name.split(".")[:2]) for name in names})


def beginning(seed: int) -> dict:
    """What a checkpoint of ours holds besides config and weights before the first update."""
    counts = dict.fromkeys(("num_updates", "teacher_updates", "skipped", "batches"), 0)
    return dict(
        dictionary={},
        optimizer={"state": {}, "param_groups": []},
        scaler={},
        rng={"cpu": torch.Generator().manual_seed(seed).get_state()},  # each update seeds anew
        # without a fingerprint in `data` a resume accepts the data it finds
        progress={**counts, "epoch": 1, "world_size": 1, "best_loss": None, "data": {}},
        log={"updates": [], "skipped": [], "seconds": 0.0},
    )


def complete(loaded: Loaded, cfg: ModelConfig, seed: int, untrained: str, path) -> tuple[dict, str]:
    """Everything in a checkpoint of ours except its config. untrained: why the optimizer must start
    anew, or "".

    Returns it and the reason why the optimizer starts anew, if it does. Raises InputError if the
    weights do not fit.
    """
    tokens = loaded.student.get("encoder.embed_tokens.weight")
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or len(tokens) < len(SPECIAL):
        raise InputError(
            f"{path}: the student has no embed_tokens.weight; is it a data2vec_text model?"
        )
    with torch.device("meta"):  # for names and shapes
        model = Data2VecText(cfg, len(tokens))
    student = {}
    for (
        name,
        module,
    ) in model.named_children():  # the encoder and the heads, of which the file may lack some
        state = {
            k.removeprefix(f"{name}."): v
            for k, v in loaded.student.items()
            if k.startswith(f"{name}.")
        }
        if state:
            state = checkpoint.own_state(state, module, f"the student's {name}", path)
            student.update((f"{name}.{k}", v) for k, v in state.items())
    teacher = loaded.teacher
    if not teacher:  # as at the start of training
        teacher = {
            k.removeprefix("encoder."): v for k, v in student.items() if k.startswith("encoder.")
        }
    teacher = checkpoint.own_state(teacher, model.encoder, "the teacher", path)
    weights, template = (
        dict(student=student, teacher=teacher),
        {k: v.to("meta") for k, v in student.items()},
    )
    if loaded.kind == "ours":
        optimizer = loaded.content["optimizer"]
        shapes = [tensor.shape for tensor in student.values()]
        optimizer = {
            **optimizer,
            "state": checkpoint.checked_moments(optimizer["state"], shapes, path),
        }
        return {**loaded.content, **weights, "optimizer": optimizer}, ""
    content = {**beginning(seed), **weights}
    if loaded.kind != "fairseq" or untrained:
        return content, untrained
    try:
        resumed = {**content, **convert_fairseq.from_fairseq(loaded.content, template, path)}
        integrity.check_entries({**resumed, "config": {}}, path)
        return resumed, ""
    except InputError as e:
        return content, str(e)
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError) as e:
        return (
            content,
            f"no state of fairseq's Adam in it: {type(e).__name__} {' '.join(str(e).split())[:200]}",
        )


def main(argv: list | None = None) -> int:
    _, args = flags.parse(PARTS, __doc__, argv, extra=add_flags)
    if not args.ckpt or not args.to or args.to[0] not in TARGETS:
        raise InputError(f"needed: --ckpt CHECKPOINT, and --to {'|'.join(TARGETS)} PATH")
    path, (kind, out) = Path(args.ckpt), (args.to[0], Path(args.to[1]))
    if args.teacher and kind != "hf":
        raise InputError(
            "--teacher goes with --to hf: the other files hold both student and teacher"
        )
    if out.is_file() or out.is_dir() and (kind != "hf" or any(out.iterdir())):
        raise InputError(f"{out} exists; remove it, or choose another name")

    loaded = convert_hf.load(path) if convert_hf.is_folder(path) else checkpoint.load(path)
    found = next(name for name, kinds in KINDS.items() if loaded.kind in kinds)
    if args.source not in (None, found):
        raise InputError(f"--from {args.source}: {path} is {found}")
    if args.teacher and not loaded.teacher:
        raise InputError(f"--teacher: {path} has none")
    settings, untrained = convert_fairseq.settings_of(loaded, path)
    parts, args = flags.parse(PARTS, __doc__, argv, extra=add_flags, base=settings)
    model, flat = (
        parts[PARTS.index(ModelConfig)],
        {k: v for part in parts for k, v in vars(part).items()},
    )
    content, untrained = complete(loaded, model, flat["seed"], untrained, path)
    dictionary, bpe = convert_hf.find_dictionary(args, flat["data_path"])
    if dictionary:
        size = len(content["student"]["encoder.embed_tokens.weight"])
        if (
            len(dictionary) != size
            or content["dictionary"].get("digest", dictionary.digest()) != dictionary.digest()
        ):
            raise InputError(
                f"the dictionary, of {len(dictionary)} symbols, is not the one of {path}, of {size}"
            )

    out.parent.mkdir(parents=True, exist_ok=True)
    source = Source(path, loaded, content, flat, model, dictionary, bpe, args.teacher, untrained)
    notes, left = TARGETS[kind](source, out), left_out(loaded)
    notes += [f"not taken over: {name[:100]}" for name in left[:MOST_LEFT]]
    notes += [f"nor {len(left) - MOST_LEFT:,} more"] if len(left) > MOST_LEFT else []
    for line in (f"{out}: {kind}, from {path}", *notes):
        print(printable(line))
    return 0


if __name__ == "__main__":
    flags.program(main)
