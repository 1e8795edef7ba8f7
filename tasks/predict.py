"""What a fine-tuned classifier says of raw text: `finetune.py --predict`."""

import os
import sys
from pathlib import Path

from config import InputError, printable
from hardware.device import Device
from run import checkpoint
from tasks import classifier, labelled, pretrained, tables
from tasks.classifier import outputs_of

import torch


def predict(cfg, device: Device) -> int:
    """Write a line for each example: the class's name and all probabilities, or the score.

    The first row names the columns. cfg: finetune.py's settings. Raises InputError.
    """
    inputs = {os.path.realpath(path) for path in (cfg.predict, cfg.ckpt)}
    if cfg.out and os.path.realpath(cfg.out) in inputs:
        raise InputError(f"--out {cfg.out} is a file that this reads; choose another name")
    source = pretrained.load(cfg.ckpt, cfg.attention_heads)
    entry = source.entry
    if entry is None:
        what = "not fine-tuned; give the checkpoint_best.pt of a fine-tuning"
        raise InputError(f"{cfg.ckpt}: {what}")
    # the classifier and its tokenizer, as at the end of the fine-tuning
    tokenize = pretrained.prepare_text(cfg, source).tokenize
    model = classifier.rebuild(entry, source.encoder(untrained=False, dropout=0.0), cfg.ckpt)
    model = model.to(device.torch_device).eval()
    longest = source.shape.max_source_positions
    split = labelled.encode(tokenize, read_texts(cfg, entry), None, longest)
    labelled.tell_cuts(split, cfg.predict, longest)
    # in the order of the lines
    outputs = outputs_of(model, device, split, cfg, sort=True)
    text = "".join("\t".join(row) + "\n" for row in table_of(outputs, entry))
    if cfg.out:
        checkpoint.write_text(cfg.out, text)
    else:
        sys.stdout.write(text)
    return 0


def read_texts(cfg, entry: dict) -> list[list[str]]:
    """A list for each of the texts (1 or 2) that belong to an example.

    They are columns of a table where --text names them, else the lines of a file, of a pair with a
    tab between the two. entry: the checkpoint's `classifier`. Raises InputError.
    """
    path, count = cfg.predict, entry["texts"]
    if cfg.text:
        # a first row with the names that training saw is left out
        files = dict(predict=(path, labelled.own_columns(cfg)))
        texts = tables.read_tables(files, known=entry.get("header"))["predict"].texts
        if len(texts) != count:
            raise InputError(f"--text {cfg.text}: the classifier reads {count}")
        return texts
    if Path(path).suffix.lower() in (".csv", *tables.JSON):
        raise InputError(f"--predict {path}: --text says which of its columns to read")
    # as many rows in the answer as in the file
    lines = tables.lines_in(path)
    if lines in ([], [""]):
        raise InputError(f"{path}: no lines in it")
    if tables.plain(lines[0].split("\t")) == tables.plain(entry.get("header") or []):
        note = f"note: the first line of {path} is the header of training, and read as a text"
        print(printable(f"{note}; --text names the columns of a table"), file=sys.stderr)
    if count == 1:
        tabs = sum("\t" in line for line in lines)
        if tabs:
            note = f"note: {tabs:,} lines hold a tab, read as a space; --text names the columns of"
            print(f"{note} a table", file=sys.stderr)
        return [lines]
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, 1):
        if len(row) != count:
            what = f"{len(row)} texts; expected {count} with a tab between"
            raise InputError(f"{path}, line {number}: {what}; --text names a table's columns")
    return [list(column) for column in zip(*rows)]


def table_of(outputs: torch.Tensor, entry: dict) -> list[list[str]]:
    """Rows of cells from the model's outputs (N, K); the first one names the columns."""
    # a score, in the units of its labels
    if entry["labels"] is None:
        scale = entry["label_scale"]
        return [["score"], *([f"{score * scale:.6f}"] for score in outputs.view(-1).tolist())]
    # a name may hold anything: the table must stay one, and a terminal unharmed
    names = [printable(" ".join(name.split())) for name in entry["labels"]]
    rows = [["label", *names]]
    for row in torch.softmax(outputs, 1).tolist():
        rows.append([names[row.index(max(row))], *(f"{p:.6f}" for p in row)])
    return rows
