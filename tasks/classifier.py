"""The classifier of fine-tuning: encoder and head, their loss, and what they say of a split."""

from config import InputError
from hardware.device import Device
from model import PAD, Encoder
from run import checkpoint
from run.checkpoint import Loaded
from tasks import labelled, metrics
from tasks.labelled import Split

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SentenceHead(nn.Module):
    """The reference's head: the hidden state at <s> -> Linear -> tanh -> Linear."""

    def __init__(self, width: int, outputs: int, dropout: float = 0.0):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        """hidden (B, T, C), real (B, T) bool, True at text -> (B, outputs)."""
        x = self.dropout(hidden[:, 0])  # (B, C)
        x = self.dropout(torch.tanh(self.dense(x)))
        return self.out_proj(x)


class LinearProbe(nn.Module):
    """The head of --freeze: the mean hidden state of an example -> Linear."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.out_proj = nn.Linear(width, outputs)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        """hidden (B, T, C), real (B, T) bool, True at text -> (B, outputs)."""
        return self.out_proj(mean_state(hidden, real))


def mean_state(hidden: Tensor, real: Tensor) -> Tensor:
    """(B, T, C) -> (B, C) float32, the mean over the text."""
    return (hidden.float() * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)


class Classifier(nn.Module):
    def __init__(self, encoder: Encoder, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, tokens: Tensor, padded: bool) -> Tensor:
        """tokens (B, T) int64; padded: whether PAD may occur in them -> (B, outputs)."""
        hidden, _ = self.encoder(tokens, padded)
        return self.head(hidden, tokens != PAD)


def loss_sum(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (nats), or squared error where the labels are scores, summed over the examples; float32."""
    if labels.is_floating_point():
        return F.mse_loss(outputs.float().view(-1), labels, reduction="sum")
    return F.cross_entropy(outputs.float(), labels, reduction="sum")


@torch.no_grad()
def outputs_of(function, device: Device, split: Split, cfg, sort: bool = False) -> Tensor:
    """function(tokens, padded) of all examples, a row each in their order, float32 on the CPU.

    cfg: its batch_size and max_tokens; sort: put examples of like length into one batch.
    """
    order = np.argsort(-split.lengths, kind="stable") if sort else np.arange(len(split.rows))
    found = [None] * len(split.rows)
    for ids in labelled.cut_batches(split.lengths, order, cfg.batch_size, cfg.max_tokens):
        tokens, padded = labelled.pad([split.rows[i] for i in ids])
        with device.autocast():
            outputs = function(device.tensor(tokens), padded).float().cpu()
        for i, row in zip(ids, outputs):
            found[i] = row
    return torch.stack(found)


def figures_of(outputs: Tensor, split: Split, names: list | None) -> dict:
    """Loss (mean, nats) and all measures of a split, from the model's outputs (N, outputs)."""
    loss = loss_sum(outputs, torch.from_numpy(split.labels)).item() / len(outputs)
    if names is None:
        return dict(
            loss=loss, accuracy=None, **metrics.of_scores(outputs.view(-1).numpy(), split.labels)
        )
    positive = names.index("1") if len(names) == 2 and "1" in names else None
    return dict(loss=loss, **metrics.of_classes(outputs.argmax(1).numpy(), split.labels, positive))


# ---------------------------------------------------------------------------------------------- in a checkpoint


def entry_of(loaded: Loaded, path) -> dict:
    """The entry `classifier` of a fine-tuned checkpoint: head (a state dict), labels (the names of the classes, or None
    for scores), texts (1, or 2 for pairs), label_scale. Raises InputError."""
    if loaded.kind != "ours" or "classifier" not in loaded.content:
        raise InputError(
            f"{path}: not fine-tuned; this needs the checkpoint_best.pt of a fine-tuning"
        )
    return loaded.content["classifier"]


def rebuild(made: dict, encoder: Encoder, path) -> Classifier:
    """The classifier of such an entry around an encoder. Raises InputError if the head does not fit."""
    kind = SentenceHead if "dense.weight" in made["head"] else LinearProbe
    with torch.device(
        "meta"
    ):  # names and shapes alone, so that many labels cannot ask for much memory
        head = kind(encoder.embed_tokens.embedding_dim, len(made["labels"] or ["score"]))
    checkpoint.check_fits(made["head"], head, "the classification head", path)
    model = Classifier(encoder, head.to_empty(device="cpu"))
    checkpoint.put(made["head"], model.head, "the classification head", path)
    return model


def state_of(loaded: Loaded) -> dict:
    """A Classifier's state dict from its checkpoint."""
    head = loaded.content["classifier"]["head"]
    return {**loaded.student, **{f"head.{name}": tensor for name, tensor in head.items()}}
