"""How a run continues: what a checkpoint holds, which is taken, what may not have changed."""

import dataclasses
import hashlib
import sys
from pathlib import Path

from config import Config, InputError, ModelConfig, RunError, printable, read_text, reading
from data import Corpus
from hardware.device import Device
from hardware.opening import with_amp
from run import checkpoint
from text.binarized import TokenStream
from text.files import json_rows

# What a resumed run may not change: the model, and, without --reset_data_position, what decides
# which batch is next: these settings, the data, the number of workers.
ARCHITECTURE = [f.name for f in dataclasses.fields(ModelConfig) if "dropout" not in f.name]
POSITION = (
    "sample_break_mode tokens_per_sample long_sentences max_tokens batch_size seed"
    " required_batch_size_multiple drop_remainder"
).split()
# settings whose change between two starts need not be told
UNTOLD = tuple("data_path init_from device npu_ log_ tensor validate_ save_ disable_".split())
# what a changed digest of a fingerprint means
DIGESTS = dict(
    dataset="the first folder of --data_path has changed",
    other_folders="a further folder of --data_path has changed",
    valid="the valid split, so its best figures start anew",
)
# of a student, by the beginnings of their weights' names
HEADS = {"regression_head.": "regression head", "lm_head.": "head for words", "decoder.": "decoder"}
RESET = "--reset_data_position to continue from the next epoch"


# ------------------------------------------------------------------------- what a checkpoint holds


def fingerprint_of(corpus: Corpus) -> dict:
    """What tells the training data apart from other data.

    Raises InputError for a folder that cannot be read.
    """
    dataset, others = corpus.split("train", 1), hashlib.sha256()
    # the other folders are read epochs later; what is wrong with them shows now
    for folder in corpus.folders[1:]:
        others.update(TokenStream(folder, "train").digest().encode())
    return dict(
        folders=len(corpus.folders),
        sentences=len(dataset.stream.sizes),
        tokens=dataset.stream.tokens,
        batches=len(dataset.batch_ends),
        dataset=dataset.stream.digest(),
        other_folders=others.hexdigest(),
    )


def contents(run, corpus: Corpus, fingerprint: dict) -> dict:
    """Everything that a resume needs but the log. run: a train.Run."""
    return dict(
        config=run.cfg.flat(),
        dictionary=corpus.dictionary.entry(),
        student=run.student.state_dict(),
        teacher=run.teacher.state_dict(),
        optimizer=run.optimizer.state(),
        scaler=run.optimizer.scaler.state_dict(),
        rng=run.device.rng_state(),
        progress=dict(
            num_updates=run.num_updates,
            hours=run.clock.now(),
            teacher_updates=run.teacher_updates,
            skipped=run.optimizer.skipped,
            epoch=run.epoch,
            batches=run.batches_done,
            world_size=run.device.world_size,
            best_loss=run.best_loss,
            best_gain=run.best_gain,
            first_target_var=run.first_target_var,
            data=fingerprint,
        ),
    )


# ------------------------------------------------------------------------------ where a run begins


def find_checkpoint(folder: Path, device: Device) -> tuple[Path, checkpoint.Loaded] | None:
    """The newest checkpoint of a save directory that can be read, if it holds any.

    Raises InputError if none can.
    """
    paths = checkpoint.candidates(folder)
    if not paths:
        return None
    for path in paths:
        if path.is_file():  # one that may not be read is not damaged
            with reading(f"{path}"):
                path.open("rb").close()
        try:
            return path, checkpoint.load(path)
        except InputError as e:
            failure = e
            if device.rank == 0:
                print(f"warning: {printable(str(e))}; trying the next older checkpoint", flush=True)
    what = f"none of the {len(paths)} checkpoints in {folder} can be read"
    raise InputError(f"{what}; the last error: {failure}")


def with_amp_of_the_start(cfg: Config, device: Device, found: tuple | None):
    """(cfg, device) with --amp auto decided, which from then on is a setting like any other.

    found: of `find_checkpoint`. A run goes on at the precision at which it began.
    """
    if found and cfg.device.amp == "auto":
        path, loaded = found
        with reading(f"{path}: damaged"):
            # a run that comes from another kind of device takes what this one does best
            if device.type in loaded.content["rng"]:
                device = with_amp(device, loaded.config.get("amp", "auto"))
    where = dataclasses.replace(cfg.device, amp=device.amp_name)
    return dataclasses.replace(cfg, device=where), device


def resume(run, corpus: Corpus, fingerprint: dict, found: tuple, reset_position: bool, log):
    """Continue from what `find_checkpoint` found.

    log: a run.log.Log. Raises InputError if it belongs to another run or is damaged.
    """
    path, loaded = found
    workers = run.device.world_size
    with reading(f"{path}: damaged"):
        corpus.dictionary.check_checkpoint(loaded.dictionary, path)
        progress = loaded.content["progress"]
        batches = progress["batches"] * progress["world_size"]  # of all workers
        changed = changes({**loaded.config, **progress["data"]}, {**run.cfg.flat(), **fingerprint})
        if batches % workers:  # this many workers are never at that batch
            changed["world_size"] = progress["world_size"], workers
        refuse(path, changed, ARCHITECTURE, "--init_from with another --save_dir")
        if run.cfg.train.init_from and "init_from" in changed:
            log.say(f"note: --init_from is not read, since {path} is continued")
        # where in the data
        moving = [name for name in (*POSITION, *fingerprint, "world_size") if name != "valid"]
        if not reset_position:
            refuse(path, changed, moving, RESET)
            count = len(corpus.split("train", progress["epoch"]).batch_ends)
            if batches and batches >= -(-count // workers) * workers:
                where = f"{path} is at batch {batches} of epoch {progress['epoch']}"
                raise InputError(f"{where}, which has {count}; use {RESET}")
        others = sorted(set(changed) - set(moving))
        others = [name for name in others if not name.startswith(UNTOLD)]
        if others:
            log.say(f"note: changed since the checkpoint: {in_words(changed, others)}")

        take(run, loaded, path)
        if "valid" in changed:
            run.best_loss = run.best_gain = run.first_target_var = None
        run.epoch, run.batches_done = progress["epoch"], batches // workers
        log.restore(loaded.content["log"])
    if reset_position and batches:
        run.epoch += 1
        run.batches_done = 0


def changes(saved: dict, now: dict) -> dict:
    """{name: (value then, value now)} of what both have, with different values."""
    both = [name for name in saved if name in now]
    # some value of a damaged file may be long
    return {k: (str(saved[k])[:100], now[k]) for k in both if saved[k] != now[k]}


def in_words(changed: dict, names) -> str:
    """Those of these names that are among what changed, with both values."""
    both = {name: "{} was {}, is {}".format(name, *values) for name, values in changed.items()}
    return ", ".join(DIGESTS.get(name, both[name]) for name in names if name in changed)


def refuse(path: Path, changed: dict, names, advice: str):
    """Raise InputError if one of these names is among what changed."""
    if words := in_words(changed, names):
        advice = f"use the old settings, or {advice}"
        raise InputError(f"{path} belongs to another run: {words}; {advice}")


def take(run, loaded: checkpoint.Loaded, path: Path):
    """Give a run the weights, the optimizer's state and the counts of a checkpoint."""
    run.load(loaded.student, loaded.teacher, path)
    weights = list(run.student.parameters())
    moments = checkpoint.checked_moments(loaded.content["optimizer"]["state"], weights, path)
    run.optimizer.load(moments, loaded.content["scaler"])
    run.device.set_rng_state(loaded.content["rng"])

    progress = loaded.content["progress"]
    run.num_updates = progress["num_updates"]
    run.teacher_updates = progress["teacher_updates"]
    if run.cfg.train.fairseq_exact and run.cfg.model.objective == "data2vec2":
        # as fairseq, whose resumed run never makes the teacher's step that was due
        run.teacher_updates = run.num_updates
    run.optimizer.skipped = progress["skipped"]
    run.best_loss = progress["best_loss"]
    # 0.1.0 had neither of these two, 0.2.0 no hours
    run.best_gain = progress.get("best_gain")
    run.first_target_var = progress.get("first_target_var")
    run.clock.restore(progress.get("hours", 0.0))
    if loaded.config.get("best_by") != run.cfg.train.best_by:
        run.best_gain = None  # 0.3.0 had another measure, too


def check_agreement(run, corpus: Corpus, fingerprint: dict):
    """Raise RunError in every worker, with the field's name, where the workers differ.

    They need the same settings (paths apart), data, dictionary and position.
    """
    paths = ("data_path", "save_dir", "tensorboard_logdir", "init_from")
    fields = {name: value for name, value in run.cfg.flat().items() if name not in paths}
    fields |= dict(fingerprint, dictionary=corpus.dictionary.digest(), num_updates=run.num_updates)
    fields |= dict(epoch=run.epoch, batches_done=run.batches_done)
    digests = [hashlib.sha256(repr(value).encode()).hexdigest() for value in fields.values()]
    # as numbers, of which workers can take the largest, and the smallest by its negative
    numbers = [int(digest[:15], 16) for digest in digests]
    largest = run.device.agree([*numbers, *(-number for number in numbers)])
    for name, most, least in zip(fields, largest, largest[len(numbers) :]):
        if most != -least:
            raise RunError(
                f"worker {run.device.rank}: the workers differ in {name}, here {fields[name]}; all"
                " need the same command, the same data, and one --save_dir that they share"
            )


def init_from(run, corpus: Corpus, loaded: checkpoint.Loaded, path):
    """Take the weights and the teacher of any checkpoint; optimizer and schedule start fresh."""
    corpus.dictionary.check_checkpoint(loaded.dictionary, path)
    loaded.check_settings(run.cfg.flat(), path)
    weights, ours, warnings = dict(loaded.student), run.student.state_dict(), []
    # a head that is missing starts at random, and one that is not used is left out
    for prefix, head in HEADS.items():
        wanted = {name: value for name, value in ours.items() if name.startswith(prefix)}
        held = {name for name in weights if name.startswith(prefix)}
        if wanted and not held:
            warnings.append(f"{path} has no {head}; it starts from random weights")
            weights |= wanted
        elif held and not wanted:
            warnings.append(f"the {head} in {path} is not used by this objective")
            weights = {name: value for name, value in weights.items() if name not in held}
    if not loaded.teacher and run.cfg.model.objective != "mlm":
        warnings.append(f"{path} has no teacher; its student's encoder is taken for it")
    for warning in warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    run.load(weights, loaded.teacher, path)


# --------------------------------------------------------------------------------- the run's folder


def prepare_save_dir(folder: Path, args):
    """Make the folder and check that a fresh start in it loses nothing. Raises InputError."""
    with reading(f"--save_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    if args.overwrite and not args.no_resume:
        raise InputError("--overwrite goes with --no_resume: it removes the old run in --save_dir")
    log = folder / "train.jsonl"
    rows = json_rows(log)
    # it would be written over; a first row may have been cut by a crash
    is_other = not rows and log.is_file() and "\n" in read_text(log, "replace")
    if is_other or any("num_updates" not in row for row in rows):
        raise InputError(f"{log} is no log of a run; choose another --save_dir")
    names = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
    if args.no_resume and names and not args.overwrite:
        advice = "add --overwrite to start over there, or choose another --save_dir"
        raise InputError(f"--no_resume: {folder} holds {names[0]}; {advice}")


def remove(folder: Path, *patterns: str):
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
