"""The classifier of fine-tuning: encoder and head, their loss, and their entry in a checkpoint.

Source: fairseq at commit 3f6ba43f, RobertaClassificationHead and criterion sentence_prediction.
"""

import math

from config import reading
from model import PAD, Encoder
from run import checkpoint
from run.checkpoint import Loaded
from tasks import metrics
from tasks.labelled import Split

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SentenceHead(nn.Module):
    """The reference's head: the hidden state at <s> -> Linear -> tanh -> Linear."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, outputs)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        """hidden (B, T, C), real (B, T) bool, True at text -> (B, outputs)."""
        x = torch.tanh(self.dense(hidden[:, 0]))  # (B, C)
        return self.out_proj(x)


class LinearProbe(nn.Module):
    """The head of --freeze and --pool mean: the mean hidden state of an example -> Linear."""

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
    """An encoder and a head on it."""

    def __init__(self, encoder: Encoder, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, tokens: Tensor, padded: bool) -> Tensor:
        """tokens (B, T) int64; padded: whether PAD may occur in them -> (B, outputs)."""
        hidden, _ = self.encoder(tokens, padded)
        return self.head(hidden, tokens != PAD)

    def features(self, tokens: Tensor, padded: bool) -> Tensor:
        """What a linear probe reads, (B, C)."""
        hidden, _ = self.encoder(tokens, padded)
        return mean_state(hidden, tokens != PAD)


def loss_sum(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (nats), or squared error of scores, summed over the examples; float32."""
    if labels.is_floating_point():  # scores, (N,); outputs are (N, 1)
        return F.mse_loss(outputs.float().view(-1), labels, reduction="sum")
    return F.cross_entropy(outputs.float(), labels, reduction="sum")


def figures_of(outputs: Tensor, split: Split, names: list | None) -> dict:
    """Loss (mean, nats) and all measures of a split, from the model's outputs (N, outputs)."""
    loss = loss_sum(outputs, torch.from_numpy(split.labels)).item() / len(outputs)
    if names is None:
        measures = metrics.of_scores(outputs.view(-1).numpy(), split.labels)
        return dict(loss=loss, accuracy=None, **measures)
    # F1 is that of the class 1, where there are two
    positive = names.index("1") if len(names) == 2 and "1" in names else None
    return dict(loss=loss, **metrics.of_classes(outputs.argmax(1).numpy(), split.labels, positive))


# --------------------------------------------------------------------------------- in a checkpoint


def entry_of(loaded: Loaded, path) -> dict:
    """The entry `classifier` of a fine-tuned checkpoint.

    It holds head (a state dict), labels (the names of the classes, or None for scores), texts (1,
    or 2 for pairs), label_scale and, since 0.4.0, header (what the table's first row called the
    text columns, or None). Raises InputError.
    """
    with reading(f"{path}: damaged: its classifier"):
        entry = loaded.content["classifier"]
        # what is used later without another look
        names = entry["labels"]
        is_right = names is None or (names and all(isinstance(name, str) for name in names))
        is_right = is_right and isinstance(entry["head"], dict) and entry["texts"] in (1, 2)
        if not is_right or not 0 < entry["label_scale"] < math.inf:
            raise ValueError("not what a fine-tuning writes there")
    return entry


def rebuild(entry: dict, encoder: Encoder, path) -> Classifier:
    """The classifier of such an entry around an encoder. Raises InputError if it does not fit."""
    # the names of the weights tell which head it is
    kind = SentenceHead if "dense.weight" in entry["head"] else LinearProbe
    head = kind(encoder.embed_tokens.embedding_dim, len(entry["labels"] or ["score"]))
    checkpoint.put(entry["head"], head, "the classification head", path)
    return Classifier(encoder, head)


def state_of(loaded: Loaded) -> dict:
    """A Classifier's state dict from its checkpoint."""
    head = loaded.content["classifier"]["head"]
    return {**loaded.student, **{f"head.{name}": tensor for name, tensor in head.items()}}
