"""How gradients become a step: summed over the workers, divided by the masked tokens, clipped, and
given to Adam, which leaves the weights alone where something is not finite.

Source: fairseq's trainer and Adam (fairseq/optim/adam.py), which differs from torch's AdamW in
where epsilon is added.
"""

import math
from dataclasses import dataclass

from config import OptimConfig
from hardware.device import Device

import torch
from torch import Tensor
from torch.profiler import record_function


@dataclass
class Step:
    """What one step did. Tensors stay on the device until a log row asks for them."""

    loss: Tensor  # (), the sum over the masked tokens of all workers
    gnorm: Tensor  # (), before clipping
    skipped: Tensor  # () bool: loss or gradient was not finite, so the weights did not change
    counts: Tensor  # (3,) int64: sample_size, nsentences, ntokens of all workers
    loss_scale: float


class Optimizer:
    """Adam on the summed gradients of one or more batches: `begin`, `backward` each, `step`."""

    def __init__(self, weights, cfg: OptimConfig, device: Device, update_freq: int):
        """weights: of hardware.vectors."""
        self.weights, self.cfg, self.device = weights, cfg, device
        self.is_fused = device.has_fused_adam
        groups = [dict(params=weights.parameters[: weights.decayed])]
        if weights.decayed < len(weights.parameters):
            groups.append(dict(params=weights.parameters[weights.decayed :], weight_decay=0.0))
        rules = dict(betas=cfg.adam_betas, weight_decay=cfg.weight_decay)
        form = dict(fused=True)
        if not self.is_fused:
            # a CPU has no foreach, and torch_npu, where it finds no card, cannot say so
            form = dict(foreach=False if device.asking_is_free else None)
        self.adam = torch.optim.AdamW(groups, **rules, **form)
        if device.world_size > 1:
            # what the workers sum: all gradients, each a view of this vector, and the loss
            self.sizes = [*(p.numel() for p in weights.parameters), 1]
            self.vector = torch.zeros(sum(self.sizes), device=device.torch_device)
        self.scaler = device.scaler(update_freq)
        self.loss_scale = self.scaler.get_scale()  # on the host: asking waits for the device
        self.skipped = 0  # steps known to have left the weights alone

    def begin(self) -> Tensor:
        """The loss of no batch yet, (). Call it before the first forward."""
        if self.device.world_size > 1:  # a worker without a batch takes part all the same
            parts = self.vector.zero_().split(self.sizes)
            for p, part in zip(self.weights.parameters, parts):
                p.grad = part.view_as(p)
        loss = torch.zeros((), device=self.device.torch_device)
        # A scaler that has scaled nothing refuses to step, as for a worker without a batch. And
        # torch_npu's clears the chip's overflow flag at its first scale(): here, so that an
        # overflow in a forward counts too.
        self.scaler.scale(loss)
        return loss

    @record_function("backward")
    def backward(self, loss: Tensor):
        """Add the gradients of a loss ()."""
        with self.device.autocast(enabled=False):
            self.scaler.scale(loss).backward()

    @record_function("optimizer")
    def step(self, lr: float, updates: int, loss: Tensor, counts: Tensor) -> Step | None:
        """Move the weights by the gradients so far.

        updates: those done before; loss () and counts (3,) are this worker's. Returns None if
        float16 gradients overflowed: then nothing moved, and it was no update.
        """
        for p in self.weights.parameters:  # a lone worker may have no batch, too
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        loss, counts, sample_size = self.sum_over_workers(loss, counts)
        if self.scaler.is_enabled():  # it sees gradients alone, which may be finite all the same
            self.weights.parameters[-1].grad += loss * 0
        self.scaler.unscale_(self.adam)  # after the sum, so that all workers see the same overflow
        grads = [p.grad for p in self.weights.parameters]
        gnorm, factor = norm_and_factor(grads, sample_size, self.cfg.clip_norm)
        skipped = ~torch.isfinite(gnorm + loss)
        self.set_rates(lr, updates)
        self.move(grads, factor, skipped)
        self.adam.zero_grad()

        before = self.loss_scale
        self.loss_scale = self.scaler.get_scale()
        if self.loss_scale < before:
            return None
        return Step(loss, gnorm, skipped, counts, before)

    def sum_over_workers(self, loss: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
        """Make loss, counts and the gradients those of all workers.

        Also returns sample_size, at least 1.
        """
        if self.device.world_size == 1:
            return loss, counts, max(1, int(counts[0]))
        counts = self.device.all_reduce(self.device.tensor(counts.numpy()))
        self.vector[-1] = loss
        self.device.all_reduce(self.vector)
        return self.vector[-1].clone(), counts, counts[0].clamp(min=1)

    def set_rates(self, lr: float, updates: int):
        """The learning rate, and the epsilon that makes torch's AdamW fairseq's, which adds it to
        the root of the uncorrected second moment, and torch to that of the corrected one.
        """
        steps = updates + 1  # that Adam has counted, with this one
        if self.is_fused:
            steps -= self.skipped
        for group in self.adam.param_groups:
            group["lr"] = lr
            group["eps"] = self.cfg.adam_eps / math.sqrt(1 - self.cfg.adam_betas[1] ** steps)

    def move(self, grads: list, factor: Tensor, skipped: Tensor):
        """Adam's step with gradients times `factor`, none where `skipped`; waits for no device."""
        if self.is_fused and not self.scaler.is_enabled():
            # the kernel multiplies and skips on its way, through its arguments for a loss scaler
            self.adam.grad_scale = 1 / factor
            self.adam.found_inf = skipped.float()
        else:
            torch._foreach_mul_(grads, factor)
            if not self.scaler.is_enabled():  # a scaler skips by itself
                # a kernel that cannot skip sees gradients of 0: only its momentum moves the weights
                for g in grads:
                    g.masked_fill_(skipped, 0.0)
        self.scaler.step(self.adam)
        self.scaler.update()

    def state(self) -> dict:
        """The state of torch's AdamW over the student's parameters, however the weights lie."""
        content = self.adam.state_dict()
        content["state"] = self.weights.split_state(content["state"])
        for group, numbers in zip(content["param_groups"], self.weights.groups):
            group["params"] = numbers
        return content

    def load(self, state: dict, scaler: dict):
        """Take the moments of a `state()["state"]` and the loss scale; settings stay."""
        groups = self.adam.state_dict()["param_groups"]
        state = self.weights.join_state(state)
        self.adam.load_state_dict({"state": state, "param_groups": groups})
        if self.scaler.is_enabled() and scaler:
            self.scaler.load_state_dict({**self.scaler.state_dict(), **scaler})
            self.loss_scale = self.scaler.get_scale()


def norm_and_factor(grads: list, sample_size: int | Tensor, clip_norm: float):
    """For gradients summed over sample_size masked tokens: the global norm () of their mean, and
    the factor () that makes them that mean, clipped to clip_norm (0: not clipped).

    Does not wait for the device.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    factor = torch.ones_like(norm) / sample_size
    norm = norm * factor
    if clip_norm > 0:
        factor = factor * (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm, factor
