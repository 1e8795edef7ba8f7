"""A GPU that is not there: torch's fake tensors on `cuda`, on a build of torch for the CPU alone, and a record of what
an update asks of the card.

    python -m test.fake_gpu --config_name base --amp bf16      operators of one update, by name

Everything above the kernels is torch's own: dispatch, autocast's rules for CUDA, autograd with its streams, the fused
optimizer. Kernels compute nothing, so there are shapes and types but no numbers and no times. Which attention kernel a
card takes is not asked but assumed: `attention` below. `install` changes torch for the rest of the process.
"""

import contextlib
import ctypes
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import config
import model
import train
from config import DeviceConfig
from hardware.bench_step import synthetic
from hardware.device import open_device
from run import flags

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten, CUDA = torch.ops.aten, torch.device("cuda", 0)
MATMULS = "mm addmm bmm baddbmm _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention".split()
MATMULS += [f"{name}_backward" for name in MATMULS[-2:]]
# these take memory, or describe it, and launch nothing
NO_KERNEL = "empty empty_like empty_strided new_empty new_empty_strided _unsafe_view is_pinned lift_fresh detach".split()
WAITS = "_local_scalar_dense item nonzero masked_select is_nonzero equal unique_dim _unique2 repeat_interleave".split()


class _Guard(torch._C._acc.DeviceGuard):
    """Streams and current devices that do nothing."""

    def type_(self):
        return torch._C._autograd.DeviceType.CUDA


def install():
    """Make torch believe that there is one CUDA device. Raises AttributeError or ValueError where torch's insides are
    others than in 2.13."""
    # Autograd asks a device's guard for its streams, and a CPU build has none for CUDA: put one into the list.
    library = Path(torch.__file__).parent / "lib"
    guards = (ctypes.c_void_p * 21).in_dll(
        ctypes.CDLL(str(library / "libc10.so")), "_ZN3c104impl26device_guard_impl_registryE"
    )
    _Guard.the_one = _Guard()
    torch._C._acc.register_python_privateuseone_device_guard(_Guard.the_one)
    guards[1] = guards[20]  # c10::DeviceType: CUDA is 1, PrivateUse1 is 20
    # And it asks whether CUDA was built in, which virtual functions answer.
    get_hooks = ctypes.CDLL(str(library / "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(get_hooks())
    install.kept = yes, own = (
        ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda hooks: True),
        (ctypes.c_void_p * 100)(*(ctypes.c_void_p * 100).from_address(table.value)),
    )
    own[2] = own[4] = ctypes.cast(yes, ctypes.c_void_p).value  # isBuilt, hasPrimaryContext
    table.value = ctypes.addressof(own)
    for name, answer in dict(
        is_available=True,
        is_bf16_supported=True,
        device_count=1,
        set_device=None,
        get_device_name="a GPU that is not there",
        get_device_capability=(9, 0),
        mem_get_info=(80 << 30, 80 << 30),
        synchronize=None,
    ).items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    F.scaled_dot_product_attention = attention


def attention(q, k, v, mask=None, p=0.0):
    """What F.scaled_dot_product_attention launches on a card from Ampere on with torch's default order: the flash
    kernel in 16 bits without a mask, else the memory-efficient one. For that it makes numbers of a bool mask, and
    copies rows that do not begin at a multiple of 8. Source: scaled_dot_product_attention in torch's attention.cpp."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v = (x.to(dtype) for x in (q, k, v))
    if mask is None and q.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(q, k, v, p)[0]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(
            mask, 0.0, torch.scalar_tensor(-torch.inf, dtype=q.dtype, device=q.device)
        )
    if mask is not None and any(stride % 8 for stride in mask.stride()[:3]):
        mask = F.pad(mask, (0, 8 - mask.shape[3] % 8))[..., : mask.shape[3]]
    mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, torch.is_grad_enabled(), p)[
        0
    ]


@dataclass
class Call:
    """One call of an operator that launches a kernel, or a few."""

    name: str
    part: str  # of the update: teacher, student, backward, optimizer, ema, or ''
    inputs: list  # (type, shape) of its tensors
    outputs: list


@dataclass(repr=False)
class Record(TorchDispatchMode):
    """While in use: the calls; the host's reads and other waits; the uploads, (bytes, waits for the device)."""

    calls: list = field(default_factory=list)
    waits: list = field(default_factory=list)
    uploads: list = field(default_factory=list)
    parts: list = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if name == "_record_function_enter_new":
            self.parts.append(args[0])
        elif name == "_record_function_exit":
            self.parts.pop()
        if func.namespace != "aten":
            return func(*args, **kwargs)
        before = tensors(args, kwargs)
        if name == "is_pinned":
            return getattr(args[0], "pinned", False)
        on_card = any(x.device.type == "cuda" for x in before)
        if on_card and name in WAITS:
            self.waits.append(name)
        if name == "_local_scalar_dense":
            return 1.0 if args[0].is_floating_point() else 1
        if name == "_pin_memory":
            return pinned(torch.empty_like(args[0]))
        pin = kwargs.pop("pin_memory", None)
        out = func(*args, **kwargs)
        after = tensors([out], {})
        if pin:
            pinned(out)
        if name in ("_to_copy", "copy_"):
            self.look_at_copy(
                name, *(before if name == "_to_copy" else before[1::-1]), out, args, kwargs
            )
        on_card = on_card or any(x.device.type == "cuda" for x in after)
        if on_card and not func.is_view and name not in NO_KERNEL:
            part = self.parts[-1] if self.parts else ""
            self.calls.append(
                Call(name, part, *([(x.dtype, tuple(x.shape)) for x in s] for s in (before, after)))
            )
        return out

    def look_at_copy(self, name, source, *rest):
        out, args, kwargs = rest[-3:]
        where = source.device.type, out.device.type
        asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if where == ("cuda", "cpu"):
            self.waits.append("a copy to the host")
        if where == ("cpu", "cuda"):
            self.uploads.append(
                (source.nbytes, not (asynchronous and getattr(source, "pinned", False)))
            )


def pinned(tensor):
    tensor.pinned = True
    return tensor


def tensors(args, kwargs) -> list:
    """All tensors in the arguments, also those in lists."""
    found = []
    for x in [*args, *kwargs.values()]:
        found += (
            [x]
            if isinstance(x, torch.Tensor)
            else tensors(x, {})
            if isinstance(x, (list, tuple))
            else []
        )
    return found


@contextlib.contextmanager
def fake_run(folder, *argv, vocabulary=50264):
    """Yields a train.Run on the fake card, over full random blocks, and its corpus."""
    cfg = config.Config(
        *flags.parse(config.PARTS, "", [str(a) for a in ("--data_path", folder, *argv)])[0]
    )
    cfg, corpus = synthetic(cfg, Path(folder), vocabulary)
    device = open_device(DeviceConfig(device="cuda", amp=cfg.device.amp))
    with FakeTensorMode(allow_non_fake_inputs=True):
        # fake parameters cannot be moved, so they are made where they belong; and they need no values
        with (
            patch.object(torch.nn.Module, "_apply", lambda self, fn: self),
            patch.object(model, "start"),
            CUDA,
        ):
            run = train.Run(cfg, device, len(corpus.dictionary))
        yield run, corpus


def record_update(run, batches) -> Record:
    """What one update asks of the card, after another that made Adam's moments."""
    for _ in range(2):
        with Record() as record:
            train.update(run, [run.device.pin(batch) for batch in batches])
    return record


def main(argv):
    install()
    with tempfile.TemporaryDirectory() as folder, fake_run(folder, *argv) as (run, corpus):
        dataset = corpus.split("train")
        record = record_update(run, [dataset.batch(dataset.epoch_batches(1)[0], 1)])
    by_part, by_name = Counter(c.part for c in record.calls), Counter(c.name for c in record.calls)
    print(
        f"{len(record.calls)} operators:",
        ", ".join(f"{part or 'other'} {n}" for part, n in by_part.items()),
    )
    print(", ".join(f"{name} {n}" for name, n in by_name.most_common()))
    matmuls = Counter((c.name, *c.inputs[:3]) for c in record.calls if c.name in MATMULS)
    for (name, *inputs), n in sorted(matmuls.items(), key=lambda row: -row[1]):
        print(
            f"{n:4} {name:44}",
            *(f"{str(t).removeprefix('torch.')}{list(shape)}" for t, shape in inputs),
        )
    print("waits:", record.waits, " uploads (bytes, waits):", record.uploads)


if __name__ == "__main__":
    main(sys.argv[1:])
