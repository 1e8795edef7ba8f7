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

import json
from pathlib import Path

from config import PARTS
from run import flags


def add_flags(parser):
    flag = parser.add_argument
    flag("--ckpt", metavar="FILE", help="the checkpoint; --init_from is another name for it")
    flag("--split", default="valid", metavar="NAME", help="of the dataset [valid]")
    flag("--untrained", action="store_true", help="evaluate the same model before training, too")
    flag(
        "--probe", action="store_true", help="do its features name hidden words? see judge/probe.py"
    )
    flag(
        "--probe_places",
        type=int,
        default=50_000,
        metavar="N",
        help="masked places to fit it on [50000]",
    )
    flag("--json", action="store_true", help="print one JSON object")
    flag("--features", metavar="TEXT", help="a file of raw lines, or - for standard input")
    flag("--out", metavar="F.npy", help="where their features go")
    flag("--encoder_json", metavar="FILE", help="the BPE's vocabulary [in --data_path]")
    flag("--vocab_bpe", metavar="FILE", help="the BPE's merges [in --data_path]")


if __name__ == "__main__":
    flags.answer_early(PARTS, __doc__, add_flags)  # torch takes seconds to import


from config import PARTS, Config, DeviceConfig, InputError, printable
from data import Corpus
from formats.fairseq_names import reference_settings
from hardware.opening import open_device
from judge.probe import Probe
from judge.probe import table as probe_table
from judge.quality import GUESSES, evaluate, verdict
from run import checkpoint
from run.resume import init_from
from text.tokens import load_tokenizer
from train import Run


def saved_settings(loaded: checkpoint.Loaded, path) -> dict:
    """The settings a checkpoint brings along; where it runs is a matter of this command, not of its
    run."""
    values = loaded.config
    if loaded.kind == "fairseq":
        fields = {
            name: field for part in PARTS for name, field in part.__dataclass_fields__.items()
        }
        values = reference_settings(loaded.config, fields, path)
    where = DeviceConfig.__dataclass_fields__
    return {k: v for k, v in values.items() if k not in where and k != "init_from"}


def table(result: dict) -> str:
    """The figures for a person, and whether anything was learned."""
    names = ("loss", "target_var", "pred_var", "cosine", "r2")
    rows = {"trained": [result.get(name) for name in names]}
    if "untrained" in result:
        rows["untrained"] = [result["untrained"].get(name) for name in names]
    if "r2" in result:
        for guess in GUESSES:
            rows[guess] = [result.get(f"{name}_{guess}") for name in names]
        rows["constant"] = [None, None, None, result["cosine_constant"], 0.0]
    lines = [
        f"{printable(result['ckpt'])}, {result['split']}: {result['sample_size']:,} masked tokens",
        f"{'':10}" + "".join(f"{name:>12}" for name in names),
    ]
    for label, figures in rows.items():
        lines.append(
            f"{label:10}" + "".join(f"{'' if x is None else format(x, '.4f'):>12}" for x in figures)
        )
    lines += ["position, block, constant: guesses that read no word (judge/quality.py)"] * (
        "r2" in result
    )
    lines += [verdict(result)]
    return "\n".join(lines)


def write_features(
    cfg: Config, device, corpus: Corpus, loaded: checkpoint.Loaded, path, args
) -> int:
    from judge import features

    if not args.out:
        raise InputError("--out is missing: the .npy file for the features")
    if args.untrained or args.probe:
        raise InputError("--untrained and --probe go with an evaluation, not with --features")
    if device.world_size > 1:
        raise InputError("--features runs in one process; give each a part of the text")
    tokenize = load_tokenizer(
        corpus.folders[0], corpus.dictionary, args.encoder_json, args.vocab_bpe
    )
    run = Run(cfg, device, len(corpus.dictionary))
    init_from(run, corpus, loaded, path)
    encoder = run.student.encoder
    facts = features.write(encoder, device, tokenize, args.features, args.out, cfg.data)
    if args.json:
        print(json.dumps(dict(ckpt=str(path), amp=device.amp_name, **facts)))
    else:
        shown = "{out}: {lines:,} lines, {tokens:,} tokens, {unknown:.1%} <unk>, width {width}"
        print(printable(f"{shown}, {{seconds:.1f}} s".format(**facts)))
    return 0


def main(argv: list | None = None) -> int:
    parts, args = flags.parse(PARTS, __doc__, argv, extra=add_flags)
    path, given = args.ckpt or parts[-1].init_from, parts[0].data_path
    if not path:
        raise InputError("--ckpt is missing: the checkpoint to evaluate")
    loaded = checkpoint.load(path)
    parts, args = flags.parse(
        PARTS, __doc__, argv, extra=add_flags, base=saved_settings(loaded, path)
    )
    cfg = Config(*parts)
    missing = next(
        (folder for folder in cfg.data.data_path.split(":") if not Path(folder).is_dir()), None
    )
    if missing and not given:
        raise InputError(
            f"{missing}: no such folder; {path} was trained on it: name its place now with --data_path"
        )
    device = open_device(cfg.device)
    try:
        corpus = Corpus(cfg.data)
        if args.features:
            return write_features(cfg, device, corpus, loaded, path, args)
        dataset = corpus.split(args.split)
        run = Run(cfg, device, len(corpus.dictionary))
        has_train = (corpus.folders[0] / "train.idx").is_file()
        train = corpus.split("train") if has_train else None  # what the guesses are fitted on
        untrained = {"untrained": evaluate(run, dataset, train)} if args.untrained else {}
        probe = Probe(run, corpus, args.split, args.probe_places) if args.probe else None
        first_weights = probe.ask(run.student) if probe else None
        init_from(run, corpus, loaded, path)
        result = dict(
            ckpt=str(path),
            split=args.split,
            amp=device.amp_name,
            **evaluate(run, dataset, train),
            **untrained,
        )
        if probe:
            result["probe"] = probe.result(first_weights, probe.ask(run.student))
    finally:
        device.close()
    if device.rank == 0:
        print(json.dumps(result) if args.json else table(result))
        if probe and not args.json:
            print(probe_table(result["probe"], args.split))
    return 0


if __name__ == "__main__":
    flags.program(main)
