"""What a fine-tuned classifier says of raw text: `finetune.py --predict`."""

import contextlib
import os
import sys
from pathlib import Path

from config import InputError, printable, read_text
from hardware.device import Device
from run import checkpoint
from tasks import classifier, labelled, pretrained
from tasks.classifier import outputs_of
from tasks.data import columns_of, token_rows
from tasks.labelled import Columns
from text.tokens import load_tokenizer

import torch

HEADERS = {"auto": None, "true": True, "false": False}


def read_texts(path: str, text: str, header: str, texts: int) -> list[list[str]]:
    """A list for each of the `texts` that belong to an example: columns of a table where `text` names them, else the
    lines of a file, of a pair with a tab between the two. Raises InputError."""
    if text:
        found = labelled.read_table(path, Columns(columns_of(text), None, HEADERS[header])).texts
        if len(found) != texts:
            raise InputError(
                f"--text {text}: the classifier was trained on {texts} text column{'s' * (texts > 1)}"
            )
        return found
    lines = read_text(path, encoding="utf-8-sig").split("\n")
    lines = lines if lines[-1] else lines[:-1]
    if not lines:
        raise InputError(f"{path}: no lines in it")
    if texts == 1:
        return [lines]
    pairs = [line.split("\t") for line in lines]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise InputError(
                f"{path}, line {number}: expected two texts with one tab between them, for a pair"
            )
    return [list(column) for column in zip(*pairs)]


def predict(cfg, device: Device) -> int:
    """Write a line for each example: the class's name and all probabilities, or the score; the first row names the
    columns. cfg: finetune.py's settings. Raises InputError."""
    if cfg.out and any(
        os.path.realpath(cfg.out) == os.path.realpath(path) for path in (cfg.predict, cfg.ckpt)
    ):
        raise InputError(f"--out {cfg.out} is a file that this reads; choose another name")
    made = classifier.entry_of(checkpoint.load(cfg.ckpt), cfg.ckpt)
    source = pretrained.load(cfg.ckpt, attention_heads=cfg.attention_heads)
    model = classifier.rebuild(made, source.encoder(), cfg.ckpt).to(device.torch_device).eval()
    folder = Path(cfg.dict or source.path).parent
    dictionary = pretrained.read_dictionary(cfg.dict or folder / "dict.txt", source)
    tokenize = load_tokenizer(folder, dictionary, cfg.encoder_json, cfg.vocab_bpe)
    texts = read_texts(cfg.predict, cfg.text, cfg.header, made["texts"])
    split = labelled.make_split(
        [token_rows(tokenize, column, source.longest) for column in texts], None, source.longest
    )
    if split.cut:
        print(
            f"warning: {split.cut:,} texts are longer than {source.longest} tokens, and cut there",
            file=sys.stderr,
        )
    outputs = outputs_of(model, device, split, cfg, sort=True)
    if made["labels"] is None:
        rows = [["score"]] + [
            [f"{score * made['label_scale']:.6f}"] for score in outputs.view(-1).tolist()
        ]
    else:
        names = [printable(" ".join(name.split())) for name in made["labels"]]
        rows = [["label", *names]]
        for row in torch.softmax(outputs, 1).tolist():
            rows.append([names[row.index(max(row))], *(f"{p:.6f}" for p in row)])
    with contextlib.ExitStack() as stack:
        out = sys.stdout
        if cfg.out:
            out = stack.enter_context(
                open(stack.enter_context(checkpoint.whole(cfg.out)), "w", encoding="utf-8")
            )
        out.writelines("\t".join(row) + "\n" for row in rows)
    return 0
