"""How many FLOPs an update needs, whatever code computes it, and how many a second are possible."""

import time

from hardware.device import Device
from text.binarized import PAD

import numpy as np
import torch

SIZES = (256, 512, 1024, 2048, 4096, 8192)  # of the square matrices of `Matmuls`


def update_flops(batches: list, run) -> float:
    """Model FLOPs of one update of a train.Run on this worker.

    Of a block of n tokens, m of them masked, for width C, feed-forward width F, L layers:

    layer(n, q)   = n * 6 C^2              queries, keys, values
                  + 4 n^2 C                attention
                  + q * (2 C^2 + 4 C F)    output, feed-forward
    encoder(n, m) = (L - 1) * layer(n, n) + layer(n, m)    the last layer at masked places only
    update        = 3 * (encoder(student's n, m) + head)   forward + backward
                  + encoder(teacher's n, m)                forward

    A multiply-add is 2 FLOPs; padding does not count. head = 2 * (its weights) * m, with those of
    the token embedding where words are predicted. Without data2vec's objective there is no teacher.
    """
    student, cfg = run.student, run.cfg.model
    L, C, F = cfg.layers, cfg.embed_dim, cfg.ffn_embed_dim

    def encoder(n: np.ndarray, m: np.ndarray) -> float:
        def layer(q):
            return (n * 6 * C**2 + 4 * n**2 * C + q * (2 * C**2 + 4 * C * F)).sum()

        return float((L - 1) * layer(n) + layer(m))

    heads = [head for head in (student.regression_head, student.lm_head) if head is not None]
    head = 2 * sum(p.numel() for part in heads for p in part.parameters() if p.ndim == 2)
    if cfg.predicts_words:
        head += 2 * student.encoder.embed_tokens.weight.numel()
    total = 0.0
    for batch in batches:
        source = (batch.source != PAD).sum(1)  # (B,) tokens that the student reads
        target = (batch.target != PAD).sum(1)  # and the teacher
        places = batch.chosen if cfg.objective == "mlm" else batch.masked
        masked = np.bincount(places // batch.source.shape[1], minlength=len(source))
        total += 3 * (encoder(source, masked) + head * len(places))
        if cfg.objective == "data2vec":
            # with teacher_input=masked, every position of the teacher's input is a target
            wanted = masked if run.cfg.data.teacher_input == "full" else target
            total += encoder(target, wanted)
    return total


class Matmuls:
    """Square matmuls in the type that training uses: the speed that the device can reach."""

    def __init__(self, device: Device):
        self.device, self.best = device, 0.0  # FLOP/s
        for n in SIZES:  # the first that takes long
            form = dict(device=device.torch_device, dtype=device.amp or torch.float32)
            self.a, self.b = torch.randn(2, n, n, **form)
            self.multiply(1)  # loads the kernel
            spent = self.multiply(1)
            if spent > 0.05:
                break
        self.repeat = max(1, min(20, int(0.02 / spent)))
        self.burst(0.2)

    def multiply(self, times: int) -> float:
        """Seconds for so many matmuls."""
        return timed(self.device, lambda: [self.a @ self.b for _ in range(times)])

    def burst(self, seconds: float = 0.5) -> float:
        """Run matmuls for about this long; returns the best FLOP/s of them."""
        fastest, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            fastest = min(fastest, self.multiply(self.repeat))
        speed = 2 * len(self.a) ** 3 * self.repeat / fastest
        self.best = max(self.best, speed)
        return speed


def timed(device: Device, work) -> float:
    """Returns the seconds until the device has finished `work`."""
    device.synchronize()
    begin = time.perf_counter()
    work()
    device.synchronize()
    return time.perf_counter() - begin
