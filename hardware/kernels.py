"""GELU, attention, dropout and linear layers, in the form that is right and fast where a tensor is.

Each equals torch's own function up to rounding (dropout: in distribution); test/test_device.py
compares them. Under torch.compile, and inside `plain()`, torch's own forms run.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])  # of torch

# torch.npu.get_device_name() of the first Ascend 910, whose last name is easily taken for the
# second's (Ascend910B1 to B4, the Atlas A2): no bfloat16, no fused attention, and it saturates
# where the others overflow to infinity
FIRST_GENERATION = {f"Ascend910{name}" for name in ("A", "ProA", "PremiumA", "ProB", "B")}

# torch.compiler.is_compiling is from 2.3 on (--compile is refused before), the others from 2.4 on
_is_compiling = getattr(torch.compiler, "is_compiling", lambda: False)
_autocast_type = getattr(torch, "get_autocast_dtype", lambda _: torch.get_autocast_gpu_dtype())
_autocasts_on_cpu = torch.is_autocast_cpu_enabled
if VERSION >= (2, 4):
    _autocasts_on_cpu = functools.partial(torch.is_autocast_enabled, "cpu")

_plain = False


@contextlib.contextmanager
def plain():
    """Run torch's own forms, for a comparison."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def _place(x: Tensor) -> str:
    """Whose form to take: 'cpu', 'npu', or '' for torch's own."""
    return "" if _plain or _is_compiling() else x.device.type


def gelu(x: Tensor) -> Tensor:
    """The exact (erf) GELU."""
    return _npu_gelu()(x) if _place(x) == "npu" else F.gelu(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear; on a CPU in float32 by oneDNN, which torch uses for bfloat16 alone."""
    # a third faster than MKL on an AMD EPYC
    if _place(x) == "cpu" and x.dtype == torch.float32 and not _autocasts_on_cpu():
        if torch.backends.mkldnn.is_available():
            return _OneDnnLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout; on a CPU from 16 random bits a value: torch draws 64, in five times the time."""
    if _place(x) != "cpu":
        return F.dropout(x, p, True)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    dropped = min(round(p * 2**16), 2**16 - 1)  # p in steps of 1 / 65536
    # 1 or 0; compared in place: a bool result is ten times slower
    kept = bits.view(torch.int16)[: x.numel()].ge_(dropped - 2**15)
    return x * kept.view(x.shape).to(x.dtype).mul_(2**16 / (2**16 - dropped))


def mask(real: Tensor) -> Tensor:
    """Where `attention` may look, (B, 1, T, T), for real (B, T) bool, True at text."""
    B, T = real.shape
    # the shape that every device's fused kernel takes
    attend = real[:, None, None, :].expand(B, 1, T, T)
    if real.device.type != "cuda":
        return attend  # bool
    # without the name of a device, as before torch 2.4, this asks about a GPU
    is_mixed = torch.is_autocast_enabled()
    return as_numbers(attend, _autocast_type("cuda") if is_mixed else torch.float32)


def as_numbers(attend: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (B, 1, T, T) as what is added to the scores: 0, and -inf where it is False.

    torch would make these numbers in every layer, keep each for the backward pass, and copy rows
    that do not begin at a multiple of 8.
    """
    B, _, T, _ = attend.shape
    rows = torch.zeros(B, 1, T, -(-T // 8) * 8, dtype=dtype, device=attend.device)[..., :T]
    return rows.masked_fill_(~attend, -torch.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, p: float) -> Tensor:
    """softmax(q k / sqrt(D)) v with dropout p on the weights.

    q, k, v, and the result: (B, H, T, D). attend: (B, 1, T, T), of `mask`, or None: everywhere.
    """
    place = _place(q)
    # torch's fused kernel for a CPU takes no dropout, and in 16 bits it is slower than matmuls
    on_cpu = place == "cpu" and (p > 0 or q.dtype != torch.float32)
    # a first-generation NPU's kernel upcasts everything to float32
    if on_cpu or (place == "npu" and _is_first_generation(q.device.index)):
        return explicit_attention(q, k, v, attend, p)
    return F.scaled_dot_product_attention(q, k, v, attend, p)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, p: float) -> Tensor:
    """`attention` in plain matmuls; attend is bool."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, T)
    if attend is not None:
        hidden = ~attend
        # a chip that saturates has no -inf
        scores = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, -1)
    if attend is not None:  # a token that may look nowhere gets 0, not NaN
        weights = weights.masked_fill(hidden, 0)
    if p > 0:
        weights = dropout(weights, p)
    return weights @ v


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return grad @ weight, rows.T @ x.flatten(0, -2), rows.sum(0)


@functools.cache
def _npu_gelu():
    import torch_npu

    # F.gelu on an NPU is the tanh approximation, whatever it is asked for
    if hasattr(torch_npu, "npu_gelu"):
        return functools.partial(torch_npu.npu_gelu, approximate="none")
    return lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5))


@functools.cache
def _is_first_generation(index: int) -> bool:
    return torch.npu.get_device_name(index) in FIRST_GENERATION
