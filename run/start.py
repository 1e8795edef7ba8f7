"""What a run says at its start: how it is set up, where it begins, and what it will see."""

import dataclasses
from pathlib import Path

from config import VERSION
from data import BlockDataset
from run.describe import notes
from run.flags import flags_of
from run.log import Log, duration


def describe_start(run, train: BlockDataset, log: Log, source: Path | None):
    """Open the log, and say how the run is set up, where it begins, and what it will see.

    run: a train.Run; train: its first training folder; source: the checkpoint that it continues
    from.
    """
    device, cfg, t = run.device, run.cfg, run.cfg.train
    batches = -(-len(train.batch_ends) // device.world_size)  # of each worker
    an_epoch = -(-batches // t.update_freq)  # updates
    done = an_epoch - -(-(batches - run.batches_done) // t.update_freq)  # updates of this epoch
    left = t.max_update - run.num_updates
    if t.max_epoch:
        left = min(left, (t.max_epoch - run.epoch + 1) * an_epoch - done)
    left = max(0, left)
    updates = run.num_updates + left
    log.open(updates)

    # how it is set up: with this line anyone can start it again
    line = flags_of([getattr(cfg, field.name) for field in dataclasses.fields(cfg)])
    log.say(f"data2vec-text {VERSION}: train.py {line}")
    where = f"{device.world_size} x {device.type} ({device.name}), amp {device.amp_name}"
    log.say(f"{where} | {sum(p.numel() for p in run.weights.parameters):,} parameters")
    # what it will see
    log.say(what_is_read(cfg, train, updates, run.epoch - 1 + (done + left) / an_epoch))
    log.say(what_is_lost(train))
    if source:
        log.say(where_it_is(run, source))
    # what may not be meant so
    if t.warmup_updates >= t.max_update:
        rest = f"the last of {t.max_update} updates"
        log.say(f"note: the learning rate is still warming up at {rest}")
    for text in notes(train):
        log.say(f"note: {text}")


def where_it_is(run, source: Path) -> str:
    """Where the run goes on, or which flag has ended it."""
    t = run.cfg.train
    if not run.is_finished():
        used = f", after {duration(3600 * run.clock.hours)}" if t.max_hours else ""
        return f"resuming from {source} at update {run.num_updates}, epoch {run.epoch}{used}"
    flag = "max_epoch"
    if run.num_updates >= t.max_update:
        flag = "max_update"
    if run.clock.left <= 0:
        flag = "max_hours"
    advice = f"to train on, raise --{flag} {getattr(t, flag)}"
    return f"finished: {source} is at update {run.num_updates}; {advice}"


def what_is_read(cfg, train: BlockDataset, updates: int, epochs: float) -> str:
    """Blocks and batches of an epoch, and how often the run reads the text."""
    # each epoch reads one of the folders
    passes = epochs / sum(map(bool, cfg.data.data_path.split(":")))
    read = f"the text {passes:,.1f} times"
    if passes < 0.995:
        read = f"{100 * passes:.2g}% of the text"
    blocks = f"{len(train.lengths):,} blocks in {len(train.batch_ends):,} batches an epoch"
    return f"{blocks}; {updates:,} updates read {read}"


def what_is_lost(train: BlockDataset) -> str:
    """The share of the text that training never sees, and what would keep it."""
    too_long, remainder = train.dropped_tokens()
    percent = 100 * (too_long + remainder) / max(1, train.stream.tokens)
    text = f"{percent:.2f}% of the training tokens are never seen"
    if percent:
        text += f" ({too_long:,} in too long blocks, {remainder:,} in the remainder)"
        text += "; --long_sentences split --drop_remainder false keep all"
    return f"warning: {text}" if percent > 1 else text
