"""How a run continues: what a checkpoint must hold, which one is taken, and what may not have
changed since."""

import dataclasses
import hashlib
import os
import sys
from pathlib import Path

from config import InputError, ModelConfig, RunError, printable, reading
from data import Corpus
from run import checkpoint
from text.binarized import TokenStream

# What a changed digest of a fingerprint means.
DIGESTS = dict(
    dataset="the first folder of --data_path has changed",
    other_folders="a further folder of --data_path has changed",
)


def fingerprint_of(corpus: Corpus) -> dict:
    """What tells the training data apart from other data. Raises InputError for a folder that
    cannot be read."""
    dataset, others = corpus.split("train", 1), hashlib.sha256()
    for folder in corpus.folders[
        1:
    ]:  # they are read epochs later; what is wrong with them shows now
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
        dictionary=dict(
            size=len(corpus.dictionary),
            digest=corpus.dictionary.digest(),
            mask_id=corpus.dictionary.mask_id,
        ),
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


def check_dictionary(loaded: checkpoint.Loaded, corpus: Corpus, path):
    """Raise InputError if a checkpoint was trained with another dictionary."""
    saved = loaded.content.get("dictionary")
    if saved and saved["digest"] != corpus.dictionary.digest():
        name, size = corpus.folders[0] / "dict.txt", len(corpus.dictionary)
        order = " in another order" if saved["size"] == size else ""
        sizes = f"{saved['size']} symbols; {name} has {size}"
        raise InputError(f"{path}: trained with another dictionary ({sizes}){order}")


# What a resumed run may not change: the model, and, without --reset_data_position, what decides
# which batch is next.
ARCHITECTURE = [f.name for f in dataclasses.fields(ModelConfig) if "dropout" not in f.name]
POSITION = [
    "sample_break_mode",
    "tokens_per_sample",
    "long_sentences",
    "max_tokens",
    "batch_size",
    "seed",
    "required_batch_size_multiple",
    "drop_remainder",
]


def find_checkpoint(folder: Path, say) -> tuple[Path, checkpoint.Loaded] | None:
    """The newest checkpoint of a save directory that can be read, if it holds any.

    Raises InputError if none can.
    """
    paths = checkpoint.candidates(folder)
    if not paths:
        return None
    if paths[0].name != "checkpoint_last.pt":
        say(f"warning: {folder} has no checkpoint_last.pt; trying {paths[0].name}")
    for path in paths:
        try:
            return path, checkpoint.load(path)
        except InputError as e:
            say(f"warning: {e}; trying the next older checkpoint")
            failure = e
    what = f"none of the {len(paths)} checkpoints in {folder} can be read"
    raise InputError(f"{what}; the last error: {failure}")


RESET = "--reset_data_position to continue from the next epoch"
# settings whose change between two starts need not be told
UNTOLD = tuple("data_path init_from device npu_ log_ tensor validate_ save_ keep_ disable_".split())


class Changes:
    """The settings and data of a checkpoint beside those of this command."""

    def __init__(self, saved: dict, now: dict):
        self.saved, self.now = saved, now

    def among(self, names) -> list:
        """Those of these names that both have, with different values."""
        both = [name for name in names if name in self.saved and name in self.now]
        return [name for name in both if self.saved[name] != self.now[name]]

    def before(self, name: str) -> str:
        return str(self.saved[name])[:100]  # some value of a damaged file may be long

    def refuse(self, names, path, advice: str):
        words = [f"{name} was {self.before(name)}, is {self.now[name]}" for name in names]
        words = [DIGESTS.get(name, text) for name, text in zip(names, words)]
        raise InputError(f"{path} belongs to another run: {', '.join(words)}; {advice}")


def resume(run, corpus: Corpus, fingerprint: dict, found: tuple, reset_position: bool, log):
    """Continue from what `find_checkpoint` found.

    log: a run.log.Log. Raises InputError if it belongs to another run or is damaged.
    """
    path, loaded = found
    with reading(f"{path}: damaged"):
        check_dictionary(loaded, corpus, path)
        progress = loaded.content["progress"]
        batches = progress["batches"] * progress["world_size"]  # of all workers
        changes = Changes({**loaded.config, **progress["data"]}, {**run.cfg.flat(), **fingerprint})
        architecture = changes.among(ARCHITECTURE)
        if architecture:
            advice = "use the old settings, or --init_from with another --save_dir"
            changes.refuse(architecture, path, advice)
        moved = what_has_moved(changes, fingerprint, progress, run.device.world_size)
        if not reset_position:
            if moved:
                changes.refuse(moved, path, f"use the old settings, or {RESET}")
            check_position(run, corpus, path, batches, progress["epoch"])
        others = changes.among(sorted(set(loaded.config) - set(moved)))
        others = [name for name in others if not name.startswith(UNTOLD)]
        if others:
            words = [f"{k[:100]} {changes.before(k)} -> {changes.now[k]}" for k in others[:20]]
            log.say(f"note: changed since the checkpoint: {', '.join(words)}")
        take(run, loaded, path)
        log.restore(loaded.content["log"])

    # where in the data
    run.epoch, run.batches_done = progress["epoch"], batches // run.device.world_size
    if reset_position and run.batches_done:
        run.epoch, run.batches_done = run.epoch + 1, 0


def what_has_moved(changes: Changes, fingerprint: dict, progress: dict, world_size: int) -> list:
    """What differs of that which decides which batch is next."""
    moved = changes.among([*POSITION, *fingerprint])
    batches = progress["batches"] * progress["world_size"]
    if batches % world_size:  # this many workers are never at that batch
        changes.saved["world_size"] = progress["world_size"]
        changes.now["world_size"] = world_size
        moved.append("world_size")
    return moved


def check_position(run, corpus: Corpus, path: Path, batches: int, epoch: int):
    """Raise InputError if the data do not have this position."""
    count = len(corpus.split("train", epoch).batch_ends)
    workers = run.device.world_size
    if batches and batches >= -(-count // workers) * workers:
        where = f"{path} is at batch {batches} of epoch {epoch}"
        raise InputError(f"{where}, which has {count}; use {RESET}")


def take(run, loaded: checkpoint.Loaded, path: Path):
    """Give a run the weights, the optimizer's state and the counts of a checkpoint."""
    run.load(loaded.student, loaded.teacher, path)
    shapes = [p.shape for p in run.student.parameters()]
    moments = checkpoint.checked_moments(loaded.content["optimizer"]["state"], shapes, path)
    run.optimizer.load(moments, loaded.content["scaler"])
    run.device.set_rng_state(loaded.content["rng"])

    progress = loaded.content["progress"]
    run.num_updates = progress["num_updates"]
    run.teacher_updates = progress["teacher_updates"]
    run.optimizer.skipped = progress["skipped"]
    run.best_loss = progress["best_loss"]
    # 0.1.0 had neither of these two, 0.2.0 no hours
    run.best_gain = progress.get("best_gain")
    run.first_target_var = progress.get("first_target_var")
    run.clock.restore(progress.get("hours", 0.0))
    if loaded.config.get("best_by") != run.cfg.train.best_by:
        run.best_gain = None  # it may be of another measure


def check_agreement(run, corpus: Corpus, fingerprint: dict):
    """Raise RunError in every worker, with the field's name, unless all of them have the same
    settings (paths apart), data, dictionary and position."""
    paths = ("data_path", "save_dir", "tensorboard_logdir", "init_from")
    fields = {k: v for k, v in run.cfg.flat().items() if k not in paths}
    fields |= dict(fingerprint, dictionary=corpus.dictionary.digest(), num_updates=run.num_updates)
    fields |= dict(epoch=run.epoch, batches_done=run.batches_done)
    digests = [int(hashlib.sha256(repr(v).encode()).hexdigest()[:15], 16) for v in fields.values()]
    largest = run.device.agree([*digests, *(-d for d in digests)])
    for name, most, least in zip(fields, largest, largest[len(digests) :]):
        if most != -least:
            raise RunError(
                f"worker {run.device.rank}: the workers differ in {name}, here {fields[name]}; all"
                " need the same command, the same data, and one --save_dir that they share"
            )


def init_from(run, corpus: Corpus, loaded: checkpoint.Loaded, path):
    """Take the weights and the teacher of any readable checkpoint; optimizer and schedule start
    fresh."""
    check_dictionary(loaded, corpus, path)
    weights, shown = dict(loaded.student), printable(str(path))
    for prefix, head in (("regression_head.", "regression head"), ("lm_head.", "head for words")):
        ours = {k: v for k, v in run.student.state_dict().items() if k.startswith(prefix)}
        found = [k for k in weights if k.startswith(prefix)]
        if ours and not found:
            print(f"warning: {shown} has no {head}; it starts from random weights", file=sys.stderr)
            weights.update(ours)
        if found and not ours:
            print(f"warning: the {head} in {shown} is not used by this objective", file=sys.stderr)
            weights = {k: v for k, v in weights.items() if k not in found}
    run.load(weights, loaded.teacher, path)


def prepare_save_dir(folder: Path, args):
    """Make the directory and check that a fresh start in it loses nothing. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--save_dir {folder}: {e.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"--save_dir {folder}: not writable")
    if args.overwrite and not args.no_resume:
        raise InputError("--overwrite goes with --no_resume: it removes the old run in --save_dir")
    held = sorted(p.name for p in folder.iterdir() if p.name != ".lock")
    if args.no_resume and held and not args.overwrite:
        advice = "add --overwrite to start over there, or choose another --save_dir"
        raise InputError(f"--no_resume: {folder} holds {held[0]}; {advice}")


def remove(folder: Path, *patterns: str):
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
