"""Checkpoints to and from other ecosystems: Hugging Face transformers and fairseq.

    python convert.py --ckpt CHECKPOINT --to hf DIR          for transformers' AutoModel
    python convert.py --ckpt CHECKPOINT --to fairseq FILE    for fairseq's data2vec_text
    python convert.py --ckpt FAIRSEQ.pt --to native FILE     for our train.py and eval.py
    python convert.py --ckpt HF_DIR --from hf --to native FILE

CHECKPOINT is one of our files, one of fairseq's of any age, a bare state dict under fairseq's names
(give the model's shape by flags), or a folder of transformers. The kind is detected; --from only
checks it. Weights are copied bit for bit (float16 to float32). Between this project and fairseq the
optimizer and the position in the data are kept, so either can resume the other's run. Existing
files are never overwritten.
"""

from pathlib import Path

from config import PARTS
from run import flags

TARGETS = ("hf", "fairseq", "native")


def add_flags(parser):
    flag = parser.add_argument
    flag("--ckpt", metavar="CHECKPOINT", help="what to convert: a file or transformers' folder")
    flag("--from", dest="source", choices=TARGETS, help="fail if it is not of this kind")
    flag("--to", nargs=2, metavar=("|".join(TARGETS), "PATH"), help="what to make, and where")
    flag("--teacher", action="store_true", help="with --to hf: the teacher instead of the student")
    flag("--dict", metavar="FILE", help="dict.txt of the training data [in --data_path]")
    flag("--encoder_json", metavar="FILE", help="the BPE's vocabulary [in --data_path]")
    flag("--vocab_bpe", metavar="FILE", help="the BPE's merges [in --data_path]")


if __name__ == "__main__":
    flags.answer_early(PARTS, __doc__, add_flags)  # torch takes seconds to import


from config import PARTS, InputError, ModelConfig, TrainConfig, printable, reading
from data2vec2 import make_student
from formats import card, fairseq_files, fairseq_names, fairseq_state, hf, hf_tokenizer
from formats.load import load
from run import checkpoint
from run.checkpoint import Loaded
from text.binarized import SPECIAL, UNK, Dictionary
from text.tokens import BPE_FILES, find_text_files
from train import lr_at

import torch

KINDS = dict(ours="native", fairseq="fairseq", state_dict="fairseq", hf="hf")  # of --from


# ------------------------------------------------------------------------------- what --to makes


def to_hf(content: dict, cfg: ModelConfig, text: tuple, teacher: bool, path: Path, out: Path):
    """content: of a checkpoint of ours; text: the dictionary and the BPE's files (`find_text`)."""
    dictionary, bpe = text
    encoder, head = content["teacher"], {}
    # transformers has no regression head, but one for words
    if not teacher:
        encoder = checkpoint.stripped(content["student"], "encoder.")
        head = {k: v for k, v in content["student"].items() if k.startswith("lm_head.")}
    with checkpoint.whole(out) as folder:
        folder.mkdir()
        unknown = 0  # tokens of the BPE that the dictionary lacks
        if dictionary and (bpe[0] or not dictionary.holds_bpe_ids()):
            longest = min(content["config"]["tokens_per_sample"], cfg.max_source_positions)
            unknown = hf_tokenizer.write(folder, dictionary, bpe, longest, bool(head))
        else:
            print("no tokenizer: give --data_path, or --dict, --encoder_json and --vocab_bpe")
        task = hf.Task()
        if "classifier" in content:  # of finetune.py
            with reading(f"{path}: damaged: its classifier"):
                task = hf.classification(content["classifier"], cfg.embed_dim, path)
        elif head:
            task = hf.fill_mask(head, unknown)
        # of a fine-tuning it may be that of a folder's own tokenizer, with other symbols
        entry = {} if "classifier" in content else content["dictionary"]
        hf.write(folder, encoder, cfg, unknown, task, entry)
        page = card.text(out.resolve().name, task.pipeline, content)
        (folder / "README.md").write_text(page, encoding="utf-8")
    what = "is its model card; the licence and the corpus are yours to fill in"
    print(printable(f"{out}/README.md {what}"))


def to_fairseq(content: dict, cfg: TrainConfig, path: Path, out: Path):
    heads = {name.split(".")[0] for name in content["student"]} - {"encoder"}
    if heads not in ({"regression_head"}, {"decoder"}):
        what = "a regression head and no head for words"
        raise InputError(f"{path}: fairseq's data2vec_text needs {what}")
    # fairseq keeps the rate of the next update
    lr = lr_at(content["progress"]["num_updates"], cfg)
    checkpoint.write(fairseq_state.to_fairseq(content, lr), out)


# ----------------------------------------------------------------------------- what is converted


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


def own_weights(loaded: Loaded, cfg: ModelConfig, path) -> dict:
    """Student and teacher in float32. Raises InputError if they do not fit the model's shape."""
    tokens = loaded.student.get("encoder.embed_tokens.weight")
    if not checkpoint.is_ordinary(tokens) or tokens.dim() != 2 or len(tokens) < len(SPECIAL):
        why = "the student has no embed_tokens.weight; is it a data2vec_text model?"
        raise InputError(f"{path}: {why}")
    with torch.device("meta"):  # for names and shapes
        model = make_student(cfg, len(tokens))
    student = {}
    # the encoder and the heads, of which the file may lack some
    for name, module in model.named_children():
        state = checkpoint.stripped(loaded.student, f"{name}.")
        if state:
            state = checkpoint.own(state, module.state_dict(), f"the student's {name}", path)
            student |= {f"{name}.{k}": v for k, v in state.items()}
    teacher = loaded.teacher or checkpoint.stripped(student, "encoder.")  # as at the start
    teacher = checkpoint.own(teacher, model.encoder.state_dict(), "the teacher", path)
    return dict(student=student, teacher=teacher)


def complete(loaded: Loaded, weights: dict, seed: int, path) -> tuple[dict, str]:
    """Everything in a checkpoint of ours except its config, and why the optimizer starts anew.

    The reason is empty where it does not. Raises InputError for a damaged file of ours.
    """
    if loaded.kind == "ours":
        student = list(weights["student"].values())
        with reading(f"{path}: damaged: its optimizer"):
            optimizer = dict(loaded.content["optimizer"])
            optimizer["state"] = checkpoint.checked_moments(optimizer["state"], student, path)
        return {**loaded.content, **weights, "optimizer": optimizer}, ""
    content = {**beginning(seed), **weights, "dictionary": loaded.dictionary}
    if loaded.kind != "fairseq":
        return content, ""
    try:
        with reading("no state of fairseq's Adam in it"):
            entries = fairseq_state.from_fairseq(loaded.content, weights["student"], path)
            checkpoint.ours({"format": checkpoint.FORMAT, "config": {}, **content, **entries}, path)
    except InputError as e:
        return content, str(e)
    return {**content, **entries}, ""


def find_text(args, content: dict, path) -> tuple[Dictionary | None, list]:
    """The dictionary, and the BPE's two files or None twice: those named, else in the data.

    The dictionary becomes the content's. Raises InputError if that has had another.
    """
    folder = content["config"]["data_path"].split(":")[0]
    named = {"dict.txt": args.dict, "encoder.json": args.encoder_json, "vocab.bpe": args.vocab_bpe}
    paths = find_text_files(folder, named)
    bpe = [paths.get(name) for name in BPE_FILES]
    if "dict.txt" not in paths:
        if args.encoder_json:
            raise InputError("--encoder_json needs the dictionary: --dict or --data_path")
        return None, bpe
    # of a dictionary of another order the size tells nothing, but its digest does
    dictionary = Dictionary(paths["dict.txt"])
    size = len(content["student"]["encoder.embed_tokens.weight"])
    if len(dictionary) != size:
        what = f"the dictionary, of {len(dictionary)} symbols,"
        raise InputError(f"{what} is not the one of {path}, of {size}")
    dictionary.check_checkpoint(content["dictionary"], path)
    content["dictionary"] = dictionary.entry()
    return dictionary, bpe


def left_out(loaded: Loaded) -> list[str]:
    """Names, to their second part, of weights that our model has no place for, such as a head."""
    if loaded.kind == "ours":
        return []
    is_known = hf.is_known if loaded.kind == "hf" else fairseq_names.is_known
    state = loaded.content.get("model", loaded.content)
    others = [name for name in map(str, state) if not is_known(name)]
    names = sorted({".".join(name.split(".")[:2]) for name in others})
    if loaded.kind == "hf":
        # our own rows after the dictionary's are copies of that of <unk>
        rows = state[hf.TOKENS]
        size = len(loaded.student["encoder.embed_tokens.weight"])
        more = int((rows[size:] != rows[UNK]).any(1).sum())
        names += [f"{more} tokens that were added in transformers"] if more else []
    return names


def main(argv: list | None = None) -> int:
    _, args = flags.parse(PARTS, __doc__, argv, extra=add_flags)
    if not args.ckpt or not args.to or args.to[0] not in TARGETS:
        raise InputError(f"needed: --ckpt CHECKPOINT, and --to {'|'.join(TARGETS)} PATH")
    path, kind, out = Path(args.ckpt), args.to[0], Path(args.to[1])
    if args.teacher and kind != "hf":
        raise InputError("--teacher goes with --to hf: the other files hold both")
    is_empty = kind == "hf" and out.is_dir() and not any(out.iterdir())
    if (out.is_file() or out.is_dir()) and not is_empty:
        raise InputError(f"{out} exists; remove it, or choose another name")

    # what can be wrong with the file shows before anything is made
    loaded = load(path)
    if args.source not in (None, KINDS[loaded.kind]):
        raise InputError(f"--from {args.source}: {path} is {KINDS[loaded.kind]}")
    if args.teacher and not loaded.teacher:
        raise InputError(f"--teacher: {path} has none")
    settings, untrained = fairseq_state.settings_of(loaded, path)
    # flags go before the file's settings, which were not known above
    with reading(f"{path}: damaged: its config"):
        parts, args = flags.parse(PARTS, __doc__, argv, extra=add_flags, base=settings)
    config = {k: v for part in parts for k, v in vars(part).items()}
    parts = dict(zip(PARTS, parts))
    loaded.check_settings(config, path)
    weights = own_weights(loaded, parts[ModelConfig], path)
    content, why = complete(loaded, weights, config["seed"], path)
    content = fairseq_files.without_objects({**content, "config": config}, {})
    text = find_text(args, content, path)
    # fairseq's own entries hold the settings of before
    if any(config[name] != value for name, value in settings.items() if name in config):
        content.pop(fairseq_state.THEIRS, None)

    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "hf":
        to_hf(content, parts[ModelConfig], text, args.teacher, path, out)
    elif kind == "fairseq":
        to_fairseq(content, parts[TrainConfig], path, out)
    else:
        checkpoint.save(content, out)
    notes = [f"{out}: {kind}, from {path}"]
    if not loaded.teacher and loaded.kind != "hf":
        notes.append("it has no teacher; its student's encoder is taken for it")
    if (untrained or why) and kind != "hf":
        notes.append(f"optimizer and data position start anew ({untrained or why})")
    notes += [f"not taken over: {name[:100]}" for name in left_out(loaded)]
    print(*map(printable, notes), sep="\n")
    return 0


if __name__ == "__main__":
    flags.program(main)
