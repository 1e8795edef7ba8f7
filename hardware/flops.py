"""How many FLOPs an update needs, whatever code computes it, how many a second are possible, and
how long the parts of an update take."""

import time

from config import Config, ModelConfig
from hardware.device import Device
from text.binarized import PAD

import numpy as np
import torch
from torch.profiler import ProfilerActivity

# as train.update and what it calls name them
PARTS_OF_AN_UPDATE = ("data", "teacher", "student", "backward", "optimizer", "ema")
SIZES = (256, 512, 1024, 2048, 4096, 8192)  # of the square matrices of `Matmuls`


def encoder_flops(n: np.ndarray, m: np.ndarray, cfg: ModelConfig) -> float:
    """encoder(n, m) of `update_flops`, forward, summed over blocks: n and m are (B,)."""
    C, F = cfg.embed_dim, cfg.ffn_embed_dim

    def layer(q):
        return (n * 6 * C**2 + 4 * n**2 * C + q * (2 * C**2 + 4 * C * F)).sum()

    return float((cfg.layers - 1) * layer(n) + layer(m))


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
    if cfg.objective == "data2vec2":
        return sum(copies_flops(batch, run.cfg) for batch in batches)
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
        total += 3 * (encoder_flops(source, masked, cfg) + head * len(places))
        if cfg.objective == "data2vec":
            # a masked teacher predicts at all it reads, and norms over places need all of them
            is_whole = run.cfg.data.teacher_input == "masked" or cfg.norms_over_places
            wanted = target if is_whole else masked
            total += encoder_flops(target, wanted, cfg)
    return total


def copies_flops(batch, cfg: Config) -> float:
    """Model FLOPs of a batch with data2vec2, for K copies, decoder width D, kernel k, groups g.

    Of a block of n tokens, of which each copy shows v and hides m:

    copy   = encoder(v, v)
           + n * sum of 2 k / g * width * D    convolutions; the first one's width is C, then D
           + m * 2 * (weights of the projections)
    update = 3 * K * copy                      forward + backward
           + encoder(n, n)                     the teacher, once for all copies
    """
    model = cfg.model
    C, D = model.embed_dim, model.decoder_dim
    n = (batch.target != PAD).sum(1)  # (B,)
    v = np.maximum(1, (n * (1 - cfg.data.mask_prob)).astype(np.int64))
    m = n - v
    channels = C + (model.decoder_layers - 1) * D  # that the convolutions read
    convolutions = 2 * model.decoder_kernel / model.decoder_groups * channels * D
    widths = [D] + [2 * D] * (model.head_layers - 1) + [C]
    projections = 2 * sum(before * after for before, after in zip(widths, widths[1:]))
    copy = encoder_flops(v, v, model) + n.sum() * convolutions + m.sum() * projections
    return 3 * model.clone_batch * copy + encoder_flops(n, n, model)


class Matmuls:
    """Square matmuls in the type that training uses: the speed that the device can reach."""

    def __init__(self, device: Device):
        self.device, self.best = device, 0.0  # FLOP/s
        for n in SIZES:  # the first that takes long
            form = dict(device=device.torch_device, dtype=device.amp or torch.float32)
            self.a, self.b = torch.randn(2, n, n, **form)
            self.multiply()  # loads the kernel
            if self.multiply() > 0.05:
                break
        self.burst(0.2)

    def multiply(self) -> float:
        """Seconds for one matmul."""
        return timed(self.device, lambda: self.a @ self.b)

    def burst(self, seconds: float) -> float:
        """Run matmuls for about this long; returns the best FLOP/s of them."""
        fastest, end = self.multiply(), time.perf_counter() + seconds
        while time.perf_counter() < end:
            fastest = min(fastest, self.multiply())
        speed = 2 * len(self.a) ** 3 / fastest
        self.best = max(self.best, speed)
        return speed


def timed(device: Device, work) -> float:
    """Returns the seconds until the device has finished `work`."""
    device.synchronize()
    begin = time.perf_counter()
    work()
    device.synchronize()
    return time.perf_counter() - begin


def time_parts(device: Device, work, calls: int) -> dict[str, float]:
    """Milliseconds of each named part in one call of `work`, mean over `calls`; 0 where none is."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities[: 1 + is_cuda]) as profile:
        for _ in range(calls):
            work()
        device.synchronize()
    parts = dict.fromkeys(PARTS_OF_AN_UPDATE, 0.0)
    for event in profile.key_averages():
        if event.key in parts:  # CUDA has a second row for the same name: its span on the device
            on_device = is_cuda and event.key != "data"
            spent = event.device_time_total if on_device else event.cpu_time_total
            parts[event.key] = max(parts[event.key], spent / 1e3 / calls)
    return parts
