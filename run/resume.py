"""How a run continues: what a checkpoint must hold, which one is taken, and what may not have
changed since."""

import dataclasses
import hashlib
import os
import sys
from pathlib import Path

from config import InputError, ModelConfig, RunError, printable
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
    saved = loaded.content.get("dictionary")
    if saved and saved["digest"] != corpus.dictionary.digest():
        raise InputError(
            f"{path}: trained with another dictionary ({saved['size']} symbols; {corpus.folders[0] / 'dict.txt'} has"
            f" {len(corpus.dictionary)})"
            + (" in another order" if saved["size"] == len(corpus.dictionary) else "")
        )


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
    """The newest checkpoint of a save directory that can be read, if it holds any. Raises
    InputError if none can."""
    found = checkpoint.candidates(folder)
    if found and found[0].name != "checkpoint_last.pt":
        say(f"warning: {folder} has no checkpoint_last.pt; trying {found[0].name}")
    for path in found:
        try:
            return path, checkpoint.load(path)
        except InputError as e:
            say(f"warning: {e}; trying the next older checkpoint")
            failure = e
    if found:
        raise InputError(
            f"none of the {len(found)} checkpoints in {folder} can be read; the last error: {failure}"
        )
    return None


def resume(
    run,
    corpus: Corpus,
    fingerprint: dict,
    path: Path,
    loaded: checkpoint.Loaded,
    reset_position: bool,
    say,
):
    """Continue from a checkpoint of this project. Raises InputError if it belongs to another run."""
    if loaded.kind != "ours":
        raise InputError(
            f"{path}: a fairseq file; start from it with --init_from and another --save_dir"
        )
    check_dictionary(loaded, corpus, path)
    progress, world_size = loaded.content["progress"], run.device.world_size
    saved, now = {**loaded.config, **progress["data"]}, {**run.cfg.flat(), **fingerprint}

    def differing(names):
        return [k for k in names if k in saved and saved[k] != now.get(k)]

    def before(name):  # some value of a damaged file may be long
        return str(saved[name])[:100]

    def refuse(names, advice):
        shown = ", ".join(DIGESTS.get(k) or f"{k} was {before(k)}, is {now[k]}" for k in names)
        raise InputError(f"{path} belongs to another run: {shown}; {advice}")

    if differing(ARCHITECTURE):
        refuse(
            differing(ARCHITECTURE), "use the old settings, or --init_from with another --save_dir"
        )
    batches = progress["batches"] * progress["world_size"]  # of all workers
    moved = differing([*POSITION, *fingerprint])
    if batches % world_size:  # this many workers are never at that batch
        saved["world_size"], now["world_size"] = progress["world_size"], world_size
        moved.append("world_size")
    reset = "--reset_data_position to continue from the next epoch"
    if moved and not reset_position:
        refuse(moved, f"use the old settings, or {reset}")
    has = len(corpus.split("train", progress["epoch"]).batch_ends)
    if batches and batches >= has + -has % world_size and not reset_position:
        raise InputError(
            f"{path} is at batch {batches} of epoch {progress['epoch']}, which has {has}; use {reset}"
        )
    unimportant = tuple(
        "data_path init_from device npu_ log_ tensor validate_ save_ keep_ disable_".split()
    )
    other = [k for k in differing(set(loaded.config) - set(moved)) if not k.startswith(unimportant)]
    if other:
        shown = ", ".join(f"{k[:100]} {before(k)} -> {now.get(k)}" for k in sorted(other)[:20])
        say(f"note: changed since the checkpoint: {shown}")

    run.load(loaded.student, loaded.teacher, path)
    shapes = [p.shape for p in run.student.parameters()]
    moments = checkpoint.checked_moments(loaded.content["optimizer"]["state"], shapes, path)
    run.optimizer.load(moments, loaded.content["scaler"])
    run.device.set_rng_state(loaded.content["rng"])
    run.num_updates, run.teacher_updates = progress["num_updates"], progress["teacher_updates"]
    run.optimizer.skipped, run.best_loss = progress["skipped"], progress["best_loss"]
    run.best_gain, run.first_target_var = map(
        progress.get, ("best_gain", "first_target_var")
    )  # 0.1.0 had neither
    if loaded.config.get("best_by") != run.cfg.train.best_by:
        run.best_gain = None  # it may be of another measure
    run.clock.restore(progress.get("hours", 0.0))  # new in 0.3.0
    run.epoch, run.batches_done = progress["epoch"], batches // world_size
    if reset_position and run.batches_done:
        run.epoch, run.batches_done = run.epoch + 1, 0


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
                f"worker {run.device.rank}: the workers differ in {name}, here {fields[name]}; all need the same"
                " command, the same data, and one --save_dir that they share"
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
        raise InputError(
            f"--no_resume: {folder} holds {held[0]}; add --overwrite to start over there, or choose another --save_dir"
        )


def remove(folder: Path, *patterns: str):
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
