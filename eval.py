"""Is it any good: validation loss of a checkpoint, and what the loss alone cannot tell.

    python eval.py --ckpt FILE --data_path DIR [--untrained]   validation loss
    python eval.py --ckpt FILE --data_path DIR --probe         the hidden words
    python eval.py --ckpt FILE --features TEXT --out F.npy     vectors of lines

FILE may be a checkpoint of this project, one of fairseq's data2vec_text (which is then evaluated as
fairseq does), or a bare state dict under fairseq's names (its shape comes from flags). Settings
come from the checkpoint; flags override them. A low loss proves little, since a teacher that
answers the same everywhere is easy to predict, and a target may follow from its position alone. So
the figures of guesses that read no word are printed beside the student's (judge/quality.py). For
features DIR needs only dict.txt and, where it is not of words, the BPE's files.
"""

import contextlib
import json
from pathlib import Path

from config import PARTS
from run import flags


def add_flags(parser):
    flag = parser.add_argument
    flag("--ckpt", metavar="FILE", help="the checkpoint; --init_from is another name for it")
    flag("--split", default="valid", metavar="NAME", help="of the dataset [valid]")
    # an evaluation
    flag("--untrained", action="store_true", help="evaluate the same model before training, too")
    flag("--probe", action="store_true", help="do its features name hidden words? (judge/probe.py)")
    flag("--probe_places", type=int, default=50_000, metavar="N", help="to fit it on [50000]")
    flag("--json", action="store_true", help="print one JSON object")
    # vectors of a text, instead of figures
    flag("--features", metavar="TEXT", help="a file of raw lines, or - for standard input")
    flag("--out", default="", metavar="F.npy", help="where their features go")
    flag("--encoder_json", metavar="FILE", help="the BPE's vocabulary [in --data_path]")
    flag("--vocab_bpe", metavar="FILE", help="the BPE's merges [in --data_path]")


if __name__ == "__main__":
    # torch takes seconds to import
    flags.answer_early(PARTS, __doc__, add_flags)


from config import PARTS, Config, DeviceConfig, InputError, printable, reading
from data import Corpus
from formats.load import load
from hardware.opening import open_device
from judge import features, probe
from judge.quality import GUESSES, evaluate, verdict
from run.checkpoint import Loaded
from run.resume import init_from
from text.files import with_nulls
from text.tokens import load_tokenizer
from train import Run


def text_of(result: dict) -> str:
    """The figures for a person, and whether anything was learned."""
    if "out" in result:
        shown = "{out}: {lines:,} lines, {tokens:,} tokens, {unknown:.1%} <unk>, width {width}"
        return printable(f"{shown}, {{seconds:.1f}} s".format(**result))
    names = ("loss", "target_var", "pred_var", "cosine", "r2")
    rows = dict(trained=result)
    if "untrained" in result:
        rows["untrained"] = result["untrained"]
    if "r2" in result:
        for guess in GUESSES:
            rows[guess] = {name: result.get(f"{name}_{guess}") for name in names}
        rows["constant"] = dict(cosine=result["cosine_constant"], r2=0.0)
    lines = [
        f"{printable(result['ckpt'])}, {result['split']}: {result['sample_size']:,} masked tokens",
        f"{'':10}" + "".join(f"{name:>12}" for name in names),
    ]
    for label, figures in rows.items():  # a guess does not have every figure
        values = [figures.get(name) for name in names]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        lines.append(f"{label:10}" + "".join(f"{cell:>12}" for cell in cells))
    if "r2" in result:
        lines.append("position, block, constant: guesses that read no word (judge/quality.py)")
    lines.append(verdict(result))
    if "probe" in result:
        lines.append(probe.table(result["probe"], result["split"]))
    return "\n".join(lines)


def write_features(cfg: Config, device, corpus: Corpus, loaded: Loaded, path, args) -> dict:
    """Vectors of a text into a file; returns what was done."""
    if args.untrained or args.probe or device.world_size > 1:
        raise InputError("--features runs alone: without --untrained, --probe and other workers")
    bpe = args.encoder_json, args.vocab_bpe
    tokenize = load_tokenizer(corpus.folders[0], corpus.dictionary, *bpe)
    run = Run(cfg, device, len(corpus.dictionary))
    init_from(run, corpus, loaded, path)
    facts = features.write(run, tokenize, args.features, args.out)
    return dict(ckpt=str(path), amp=device.amp_name, **facts)


def evaluation(cfg: Config, device, corpus: Corpus, loaded: Loaded, path, args) -> dict:
    """The figures of a split; also those of the model before training, if asked for."""
    dataset = corpus.split(args.split)
    run = Run(cfg, device, len(corpus.dictionary))
    # what the guesses are fitted on
    train = corpus.split("train") if (corpus.folders[0] / "train.idx").is_file() else None
    result = dict(ckpt=str(path), split=args.split, amp=device.amp_name)

    # the model before training
    if args.untrained:
        untrained = evaluate(run, dataset, train)
    if args.probe:
        linear_probe = probe.Probe(run, corpus, args.split, args.probe_places)
        first_weights = linear_probe.ask(run.student)

    # and with the checkpoint's weights
    init_from(run, corpus, loaded, path)
    result |= evaluate(run, dataset, train)
    if args.untrained:
        result["untrained"] = untrained
    if args.probe:
        result["probe"] = linear_probe.result(first_weights, linear_probe.ask(run.student))
    return result


def main(argv: list | None = None) -> int:
    parts, args = flags.parse(PARTS, __doc__, argv, extra=add_flags)
    data, *_, train = parts
    path = args.ckpt or train.init_from
    if not path:
        raise InputError("--ckpt is missing: the checkpoint to evaluate")
    loaded = load(path)
    # where it runs is this command's matter
    left_out = {*DeviceConfig.__dataclass_fields__, "init_from"}
    base = {name: value for name, value in loaded.config.items() if name not in left_out}
    # once more, now that the defaults are known
    with reading(f"{path}: damaged: its config"):
        parts, args = flags.parse(PARTS, __doc__, argv, extra=add_flags, base=base)
    cfg = Config(*parts)
    # the folder of the checkpoint's run may be elsewhere by now, or on another machine
    for folder in cfg.data.data_path.split(":"):
        if not Path(folder).is_dir() and not data.data_path:
            why = f"{path} was trained on it: name its place now with --data_path"
            raise InputError(f"{folder}: no such folder; {why}")
    with contextlib.closing(open_device(cfg.device)) as device:
        work = write_features if args.features else evaluation
        result = work(cfg, device, Corpus(cfg.data), loaded, path, args)
    if device.rank == 0:
        print(json.dumps(with_nulls(result)) if args.json else text_of(result))
    return 0


if __name__ == "__main__":
    flags.program(main)
