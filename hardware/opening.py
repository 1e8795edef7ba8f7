"""How a device is chosen and opened, and what is said where it cannot be.

config.py sets what torch reads when it is imported, so that torch_npu does not hook itself in:
where its driver is missing that would fail. It is imported by name below.
"""

import contextlib
import glob
import importlib.util
import os
import platform
import sys
from dataclasses import replace

from config import DeviceConfig, InputError, RunError, reading
from hardware.device import AMP_TYPES, WORKER_TIMEOUT, Device
from hardware.kernels import FIRST_GENERATION, VERSION

import torch

BACKENDS = {"npu": "hccl", "cuda": "nccl"}
HCCL_CONNECT_TIMEOUT = "1800"  # seconds; its default of 120 ends workers that start at other times


def open_device(cfg: DeviceConfig) -> Device:
    """Choose device and precision; under torchrun, join the other workers. Raises InputError."""
    kind = _choose(cfg.device)
    rank, world_size, local_rank = worker()
    if cfg.deterministic and kind != "cpu":  # a CPU is so by itself
        # read when CUDA starts; without it, an error
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # it would also fill all new memory, for code that reads it unset
        if hasattr(torch.utils, "deterministic"):
            torch.utils.deterministic.fill_uninitialized_memory = False
    if kind == "cpu":
        device, name = torch.device("cpu"), platform.processor() or platform.machine()
    else:
        device, name = _take_card(kind, local_rank)
    # float32 convolutions, of data2vec2's decoder, as exact as the matmuls
    if kind == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    if kind == "npu":
        _check_npu(cfg.amp, name, rank)
        if hasattr(torch.npu, "conv"):  # an emulated device has none
            torch.npu.conv.allow_hf32 = False
    if world_size > 1:
        _join_workers(kind, rank, world_size)
    return Device(device, name, _amp_type(cfg.amp, kind, name), rank, world_size)


def with_amp(device: Device, amp: str) -> Device:
    """The device at the precision that a checkpoint names, or as it is if it cannot have that."""
    if amp == "auto" and device.type == "cpu":  # once said so in checkpoints, and meant float32
        amp = "off"
    with contextlib.suppress(InputError):
        return replace(device, amp=_amp_type(amp, device.type, device.name))
    return device


def _choose(kind: str) -> str:
    """npu, cuda or cpu for --device `kind`, with what it needs imported."""
    if kind == "auto":
        if _npu_is_there():
            return "npu"
        return "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "npu":
        _import_npu()
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU, no driver, or a torch built for the CPU only")
    return kind


def _take_card(kind: str, local_rank: int) -> tuple[torch.device, str]:
    """The worker's own card, and its name."""
    module = getattr(torch, kind)
    count = module.device_count()
    if local_rank >= count:
        why = f"this machine shows {count}"
        raise InputError(f"worker {local_rank} has no {kind} of its own: {why}")
    # it may be in use by another, or the driver does not fit
    try:
        module.set_device(local_rank)
        return torch.device(kind, local_rank), module.get_device_name(local_rank)
    except RuntimeError as e:
        raise InputError(f"{kind} {local_rank} cannot be opened: {_first_line(e)}") from None


def _join_workers(kind: str, rank: int, world_size: int):
    os.environ.setdefault("HCCL_CONNECT_TIMEOUT", HCCL_CONNECT_TIMEOUT)
    # what is agreed on the host goes by gloo
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{BACKENDS[kind]}"
    try:
        torch.distributed.init_process_group(backend, timeout=WORKER_TIMEOUT)
    except RuntimeError as e:
        others = f"the {world_size - 1} others"
        raise RunError(f"worker {rank} cannot join {others}: {_first_line(e)}") from None


def worker() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine), as torchrun sets them in the environment."""
    with reading("RANK, WORLD_SIZE or LOCAL_RANK in the environment"):
        rank = int(os.environ.get("RANK", 0))
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
    is_whole = world_size == 1 or {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    if not (is_whole and 0 <= rank < world_size and local_rank >= 0):
        named = f"RANK={rank} and WORLD_SIZE={world_size} in the environment"
        raise InputError(f"{named}: they, or MASTER_ADDR and MASTER_PORT, do not fit; use torchrun")
    return rank, world_size, local_rank


def check_world_size(asked: int | None, update_freq: int):
    """fairseq's --distributed_world_size must be the number of workers that torchrun started."""
    _, world_size, _ = worker()
    if asked not in (None, world_size):
        freq = -(-asked * update_freq // world_size)
        how = f"torchrun --nproc_per_node {asked} train.py ..., or leave it out: --update_freq"
        why = f"but there is {world_size} worker; start with: {how} {freq} keeps the batch"
        raise InputError(f"distributed_world_size {asked}, {why}")


def _amp_type(amp: str, kind: str, name: str) -> torch.dtype | None:
    has_bf16 = True
    if kind == "npu":
        has_bf16 = torch.npu.is_bf16_supported()
    if kind == "cuda":
        # is_bf16_supported() counts emulation, unless asked not to, which torch can from 2.5 on
        has_bf16 = torch.version.hip is not None or torch.cuda.get_device_capability()[0] >= 8
    if amp == "auto":
        amp = "bf16" if has_bf16 else "fp16"
        if kind == "cpu":
            amp = "bf16" if is_bf16_fast_on_cpu() else "off"
    if amp == "bf16" and not has_bf16:
        # autocast would only warn there, and an NPU train in float32
        raise InputError(f"--amp bf16: {name} has no bfloat16; use --amp fp16")
    # there autocast warns, and does nothing
    if amp == "fp16" and kind == "cpu" and VERSION < (2, 4):
        raise InputError(f"--amp fp16 on a CPU needs torch 2.4; this is {torch.__version__}")
    return AMP_TYPES[amp]


def is_bf16_fast_on_cpu() -> bool:
    """Whether this CPU multiplies bfloat16 by itself: with AMX, or AVX-512's dot products."""
    # with the latter an update takes 0.6 of float32's time (docs/benchmarks.md)
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    # an older torch cannot tell, and stays at float32
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _check_npu(amp: str, name: str, rank: int):
    if name not in FIRST_GENERATION and os.environ.get("INF_NAN_MODE_FORCE_DISABLE") == "1":
        why = f"{name} then saturates, and no overflow would be seen; unset it"
        raise InputError(f"INF_NAN_MODE_FORCE_DISABLE=1: {why}")
    if name in FIRST_GENERATION and amp == "off" and rank == 0:
        print(
            f"warning: --amp off: {name} may multiply in float16 all the same (ACL_PRECISION_MODE),"
            " here without loss scaling, and no check sees an overflow; --amp fp16 is its mode",
            file=sys.stderr,
        )


def _npu_is_there() -> bool:
    """Whether --device auto should take an NPU; imports nothing where the driver has no files."""
    why = "there is no Ascend card (no /dev/davinci*)"
    if glob.glob("/dev/davinci[0-9]*"):
        try:
            _import_npu()
            return True
        except InputError as e:
            why = str(e)
    elif importlib.util.find_spec("torch_npu") is None:  # nobody expects one
        return False
    if os.environ.get("RANK", "0") == "0":
        print(f"note: running without an NPU: {why}", file=sys.stderr)
    return False


def _import_npu():
    try:
        # it prints a warning if set_env.sh was not sourced, where a program may print JSON
        with contextlib.redirect_stdout(sys.stderr):
            import torch_npu  # noqa: F401
    except Exception as e:  # a missing CANN library is an ImportError, OSError or RuntimeError
        raise InputError(f"--device npu: {_why_no_torch_npu(e)}") from None
    with reading("--device npu: the driver does not answer, as npu-smi info may show"):
        is_available = torch.npu.is_available()
    if not is_available:
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "not set")
        raise InputError(
            "--device npu: torch_npu finds no card; npu-smi info shows what the driver sees. In a"
            " container, pass /dev/davinci0 and its managers in. ASCEND_RT_VISIBLE_DEVICES must"
            f" name cards in ascending order, or be unset: {visible!r}"
        )
    # else the first generation compiles its kernels for every new batch shape
    if hasattr(torch.npu, "set_compile_mode"):  # an emulated device has no compiler
        torch.npu.set_compile_mode(jit_compile=False)


def _why_no_torch_npu(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; pip install -r hardware/requirements.txt"
    if "Two accelerators" in str(error):
        return "torch_npu refuses to load beside a CUDA build of torch; install the CPU build"
    return (
        f"torch_npu cannot be loaded ({_first_line(error)}); install a CANN that docs/ascend.md"
        " names, and: source /usr/local/Ascend/ascend-toolkit/set_env.sh"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
