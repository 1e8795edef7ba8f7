"""How the teacher moves: an exponential moving average of the student's encoder (paper, 3.2)."""

import copy

from config import EmaConfig
from model import Encoder

import torch

EMBEDDINGS = ("embed_", "layernorm_embedding")


def decay_at(update: int, cfg: EmaConfig) -> float:
    """Decay of the teacher's step after update number `update` (from 1)."""
    if update >= cfg.ema_anneal_end_step:  # the line has ended
        return cfg.ema_end_decay
    return cfg.ema_decay + (cfg.ema_end_decay - cfg.ema_decay) * update / cfg.ema_anneal_end_step


def make_teacher(student: Encoder) -> Encoder:
    """A float32 copy of the student's encoder, without gradients and without dropout."""
    return copy.deepcopy(student).float().requires_grad_(False).eval()


@torch.no_grad()
def step(teacher: Encoder, student: Encoder, decay: float, cfg: EmaConfig):
    """teacher = decay * teacher + (1 - decay) * student, in float32.

    A decay of 1 changes nothing, as in the reference.
    """
    if decay == 1:
        return
    averaged, averaged_from = [], []
    for (name, old), new in zip(teacher.named_parameters(), student.parameters(), strict=True):
        # the reference averages the layers and copies what embeds the tokens
        if cfg.ema_transformer_layers_only and name.startswith(EMBEDDINGS):
            old.copy_(new)
        else:
            averaged.append(old)
            averaged_from.append(new)
    # old + (1 - decay) * (new - old), in one launch for all weights
    torch._foreach_lerp_(averaged, averaged_from, 1 - decay)
