"""The README.md of an exported model, which Hugging Face calls its model card.

It holds what the files tell: settings and counts from the checkpoint, figures from train.jsonl
beside it, the corpus from the preprocess.log of its data folder. What no file tells, such as the
licence, is marked TO FILL IN.
"""

import contextlib
import math
from pathlib import Path

from config import VERSION, printable
from text.files import json_rows

SHAPE = (
    "layers",
    "embed_dim",
    "ffn_embed_dim",
    "attention_heads",
    "activation_fn",
    "max_source_positions",
)
TRAINING = (
    "objective mlm_weight tokens_per_sample sample_break_mode max_tokens batch_size update_freq lr warmup_updates"
    " max_update weight_decay dropout mask_prob mask_multiple_length average_top_k_layers ema_decay ema_end_decay"
    " ema_anneal_end_step seed fairseq_exact"
).split()
FIGURES = "loss target_var pred_var cosine cosine_constant".split()
VALID = "loss target_var pred_var cosine cosine_position cosine_block r2 r2_position r2_block probe_gain".split()
VALID += "probe_gain_error probe_gain_neighbours probe_accuracy mlm_loss mlm_loss_neighbours mlm_accuracy".split()

HEAD = """---
library_name: transformers
pipeline_tag: {task}
tags: [data2vec-text]
license: unknown  # TO FILL IN, and `language:` beside it
---

# {name}

{what}. Exported by data2vec-text {version}.

**Licence:** TO FILL IN. It depends on the text that the model was trained on, too.

## Use

```python
{use}
```

{reading} A text has at most {longest} tokens.

## Corpus

TO FILL IN: what the text is, where it comes from, its languages.

"""
METHOD = "[data2vec](https://arxiv.org/abs/2202.03555)"
USE = {
    "feature-extraction": """from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}", add_pooling_layer=False)
states = model(**tokenizer("A line of text.", return_tensors="pt", truncation=True)).last_hidden_state""",
    "fill-mask": """from transformers import pipeline

answers = pipeline("fill-mask", model="{name}")("A line of <mask>.")""",
    "text-classification": """from transformers import pipeline

answers = pipeline("text-classification", model="{name}")("A line of text.")""",
}


def table(head: tuple, rows: list[tuple]) -> str:
    """A table in Markdown, or nothing if it has no rows."""
    lines = [head, ("---",) * len(head), *rows] if rows else []
    lines = [
        "| " + " | ".join(printable(str(cell)).replace("|", "\\|") for cell in line) + " |"
        for line in lines
    ]
    return "".join(line + "\n" for line in lines)


def figures(path: Path, updates: int) -> list[tuple]:
    """(name, value) of the last rows in a train.jsonl up to this update."""
    found = {}
    for row in json_rows(path):
        number = row.get("num_updates")
        if not isinstance(number, int) or number > updates:
            continue
        for prefix, names in (("", FIGURES), ("valid_", VALID)):
            if prefix + "loss" in row:
                part = {prefix + name: row.get(prefix + name) for name in names}
                found |= {
                    k: (v, number)
                    for k, v in part.items()
                    if isinstance(v, float) and math.isfinite(v)
                }
    return [(name, f"{value:.4g}", number) for name, (value, number) in found.items()]


def corpus(folders: list[Path]) -> list[tuple]:
    """(split, files, sentences, tokens, share of <unk>) by the preprocess.log of each folder."""
    found = []
    for folder in folders:
        latest = {str(row.get("step")): row for row in json_rows(folder / "preprocess.log")}
        for split in ("train", "valid", "test"):
            with contextlib.suppress(KeyError, TypeError, ValueError, ArithmeticError):
                row = latest[split]
                names = ", ".join(text["file"] for text in row["made_from"]["text"])
                share = f"{100 * row['unk'] / row['tokens']:.1f}%"
                found.append((split, names, f"{row['sentences']:,}", f"{row['tokens']:,}", share))
    return found


def text(name: str, source, task: str, has_tokenizer: bool) -> str:
    """The card of the folder `name`. source: a convert.Source; task: a key of USE."""
    flat, progress = source.flat, source.content["progress"]
    updates, made, name = progress["num_updates"], source.content.get("classifier"), printable(name)
    what = "A text encoder"
    if made:
        classes = ", ".join(map(printable, made["labels"] or ["a score"]))
        what += f" with a classification head ({classes})"
    elif updates:
        method = "masked language modelling" if flat["objective"] == "mlm" else METHOD
        what += f" pretrained by {method}: the {'teacher' if source.teacher else 'student'} after {updates:,} updates"
    reading = "As in training, outer white space is removed"
    reading += "." if task == "fill-mask" else " and special tokens are plain text."
    reading = reading if has_tokenizer else "The folder has no tokenizer."
    head = dict(task=task, name=name, what=what, use=USE[task].format(name=name), reading=reading)
    parts = [HEAD.format(**head, version=VERSION, longest=flat["tokens_per_sample"])]

    folders = [Path(folder) for folder in flat["data_path"].split(":") if folder] if updates else []
    counts = [progress["data"].get(name) for name in ("sentences", "tokens")]
    rows = corpus(folders)
    if not rows and set(map(type, counts)) == {int}:
        rows = [("train", "-", *(f"{count:,}" for count in counts), "-")]
    parts.append(table(("split", "files", "sentences", "tokens", "`<unk>`"), rows))
    size = len(source.content["student"]["encoder.embed_tokens.weight"])
    parts.append(f"\nThe vocabulary has {size:,} {'tokens' if source.bpe[0] else 'symbols'}.\n")
    names = [*SHAPE, *(TRAINING if updates else ())]
    parts.append(
        "\n## Settings\n\n" + table(("setting", "value"), [(f"`{k}`", flat[k]) for k in names])
    )
    if rows := figures(source.path.parent / "train.jsonl", updates) if updates else []:
        parts.append("\n## Figures\n\n" + table(("figure", "value", "at update"), rows))
        parts.append(
            "\nA low loss proves little; data2vec-text's docs/health.md says what the figures mean.\n"
        )
    return "".join(parts)
