"""How the teacher moves: an exponential moving average of the student's encoder, in float32 (paper, section 3.2)."""

import copy

from config import EmaConfig
from model import Encoder

import torch


def decay_at(update: float, cfg: EmaConfig) -> float:
    """Decay of the teacher's step after update number `update` (from 1)."""
    if update >= cfg.ema_anneal_end_step:
        return cfg.ema_end_decay
    return cfg.ema_decay + (cfg.ema_end_decay - cfg.ema_decay) * update / cfg.ema_anneal_end_step


def make_teacher(student: Encoder) -> Encoder:
    """A float32 copy of the student's encoder, without gradients and without dropout."""
    return copy.deepcopy(student).float().requires_grad_(False).eval()


@torch.no_grad()
def step(teacher: Encoder, student: Encoder, decay: float, cfg: EmaConfig):
    """teacher = decay * teacher + (1 - decay) * student; a decay of 1 changes nothing, as in the reference."""
    if decay == 1:
        return
    averaged, copied = ([], []), ([], [])
    for (name, old), new in zip(teacher.named_parameters(), student.parameters(), strict=True):
        copy_it = cfg.ema_transformer_layers_only and name.startswith(
            ("embed_", "layernorm_embedding")
        )
        pair = copied if copy_it else averaged
        pair[0].append(old)
        pair[1].append(new)
    if averaged[0]:
        torch._foreach_lerp_(*averaged, 1 - decay)
    if copied[0]:
        torch._foreach_copy_(*copied)
