"""A fine-tuned checkpoint as transformers' Data2VecTextForSequenceClassification, a pre-norm one as
its RobertaPreLayerNormForSequenceClassification.

    python convert.py --ckpt DIR/checkpoint_best.pt --to hf HF_DIR

transformers.pipeline("text-classification", model=HF_DIR) then gives the names of the classes, from
the same logits.
"""

import json
from pathlib import Path

from config import InputError
from formats.hf import FAMILIES
from run import checkpoint
from tasks.classifier import SentenceHead

import torch


def add_head(folder: Path, made: dict, path):
    """Turn an encoder's config.json and model.safetensors in `folder` into those of a classifier.

    made: the entry `classifier` of the fine-tuned checkpoint at `path`. The scores of a regression
    come out in the units of its labels. Raises InputError for a linear probe, which transformers
    cannot express, and for a head that does not fit.
    """
    from safetensors import torch as safetensors  # which convert_hf has just used

    if "dense.weight" not in made["head"]:
        raise InputError(
            f"{path}: a linear probe on mean features (--freeze, --pool mean); transformers has no model for it"
        )
    names, where, weights = made["labels"], folder / "config.json", folder / "model.safetensors"
    settings = json.loads(where.read_text(encoding="utf-8"))
    with torch.device("meta"):  # for names and shapes
        expected = SentenceHead(settings["hidden_size"], len(names or ["score"]))
    checkpoint.check_fits(made["head"], expected, "the classification head", path)
    head = {k: v.float() for k, v in made["head"].items()}
    for part in ("out_proj.weight", "out_proj.bias"):
        head[part] = head[part] * made["label_scale"]
    _, model, prefix = next(
        family for family in FAMILIES.values() if family[0] == settings["model_type"]
    )
    settings["architectures"] = [f"{model}ForSequenceClassification"]
    settings["problem_type"] = "single_label_classification" if names else "regression"
    settings["id2label"] = {str(i): name for i, name in enumerate(names or ["score"])}
    settings["label2id"] = {name: i for i, name in enumerate(names or ["score"])}
    settings["classifier_dropout"] = 0.0
    where.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tensors = {prefix + name: tensor for name, tensor in safetensors.load_file(weights).items()}
    tensors |= {f"classifier.{name}": tensor.contiguous() for name, tensor in head.items()}
    weights.write_bytes(safetensors.save(tensors, {"format": "pt"}))
