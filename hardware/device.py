"""Where it runs: Ascend NPU, CUDA GPU or CPU; autocast, loss scaling, seeding, synchronizing, memory, and workers.

Decided once, above the loop, by `open_device`; nothing else in the project asks which device it is.
"""

import contextlib
import glob
import importlib.util
import os
import platform
import re
import resource
import sys
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

from config import DeviceConfig, InputError, RunError
from hardware.kernels import FIRST_GENERATION, VERSION

import numpy as np
import torch
from torch.profiler import record_function

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
# for one collective; while rank 0 finishes a save, the others wait in one. Longer than HCCL's own two, so that HCCL
# says what failed: HCCL_EXEC_TIMEOUT's default is 1,836 seconds.
WORKER_TIMEOUT = timedelta(minutes=35)
HCCL_CONNECT_TIMEOUT = (
    "1800"  # seconds; its default of 120 ends a run whose workers start at different times
)
FIRST_LOSS_SCALE, LOWEST_LOSS_SCALE, GROWTH_UPDATES = 128.0, 1e-4, 2**14  # fairseq's
CORES = (
    os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
)  # before torch_npu binds threads to some
PROFILE_FROM = (
    12  # the first update of a start that a profile shows; those before allocate and warm up
)


@dataclass(frozen=True)
class Device:
    """One worker's device. amp is autocast's type, or None for float32 throughout."""

    torch_device: torch.device
    name: str
    amp: torch.dtype | None
    rank: int = 0
    world_size: int = 1

    @property
    def type(self) -> str:
        return self.torch_device.type

    @property
    def amp_name(self) -> str:
        return {None: "off", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.amp]

    @property
    def _module(self):
        return getattr(torch, self.type)  # torch.npu, torch.cuda, torch.cpu

    @property
    def is_first_generation(self) -> bool:
        return self.type == "npu" and self.name in FIRST_GENERATION

    @property
    def asking_is_free(self) -> bool:
        """Whether a tensor can be read without waiting for a device."""
        return self.type == "cpu"

    @property
    def wants_long_vectors(self) -> bool:
        """Whether launching kernels is what costs here, so that weights belong in long vectors (hardware/vectors.py)."""
        return self.type == "npu"

    @property
    def has_fused_adam(self) -> bool:
        """Whether torch's AdamW is one kernel for all weights here, which can also skip a step. An NPU's ignores the
        loss scaler; the CPU's is from torch 2.4 on."""
        return self.type == "cuda" or (self.type == "cpu" and VERSION >= (2, 4))

    def autocast(self, enabled: bool = True):
        return (
            torch.autocast(self.type, self.amp, enabled) if self.amp else contextlib.nullcontext()
        )

    def scaler(self, update_freq: int):
        """The loss scaler: a real one under fp16, one that does nothing otherwise."""
        enabled = self.amp is torch.float16
        rules = dict(
            init_scale=FIRST_LOSS_SCALE,
            growth_interval=max(1, GROWTH_UPDATES // (self.world_size * update_freq)),
            enabled=enabled,
        )
        if (enabled and self.is_first_generation) or not hasattr(
            torch.amp, "GradScaler"
        ):  # which is from 2.3 on
            # A chip that saturates has finite gradients even after an overflow: only a sticky hardware flag tells.
            # torch_npu's own scaler clears it at an update's first scale(), and its workers agree on what it said.
            return (torch.npu if self.type == "npu" else torch.cuda).amp.GradScaler(**rules)
        return torch.amp.GradScaler(self.type, **rules)

    def check_compile(self):
        """Raise InputError if --compile cannot be used here."""
        if self.wants_long_vectors:
            raise InputError(f"--compile is not for an {self.type}, where layers run in eager mode")
        if VERSION < (2, 4):
            raise InputError(f"--compile needs torch 2.4; this is {torch.__version__}")

    def check_profile(self, updates: int, done: int, max_update: int):
        """Raise InputError if a profile of so many updates cannot be made after `done` ones."""
        last = done + PROFILE_FROM + updates - 1
        if updates and self.type != "npu":
            raise InputError(f"--npu_profile: the profiler is torch_npu's, and this is {self.type}")
        if updates and last > max_update:
            raise InputError(f"--npu_profile {updates} ends with update {last}, above --max_update")

    @contextlib.contextmanager
    def profile(self, updates: int, folder):
        """Yields a function to call after each update. With updates > 0, torch_npu's profiler writes a trace of that
        many updates into `folder`, from the PROFILE_FROMth on; on an NPU only."""
        if not updates:
            yield lambda: None
            return
        from torch_npu import profiler

        with profiler.profile(
            activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU],
            # the update before is the profiler's own warm-up
            schedule=profiler.schedule(
                wait=0, warmup=1, active=updates, repeat=1, skip_first=PROFILE_FROM - 2
            ),
            on_trace_ready=profiler.tensorboard_trace_handler(str(folder)),
            experimental_config=profiler._ExperimentalConfig(
                profiler_level=profiler.ProfilerLevel.Level1,
                aic_metrics=profiler.AiCMetrics.PipeUtilization,
            ),
        ) as running:
            yield running.step

    def seed(self, seed: int):
        torch.manual_seed(seed)  # seeds the accelerator's generator too

    def synchronize(self):
        if self.type != "cpu":
            self._module.synchronize()

    def memory(self) -> int:
        """Bytes that the device has in all, also those in use."""
        if hasattr(self._module, "mem_get_info"):
            return self._module.mem_get_info()[1]
        return _host_memory()

    def peak_memory(self) -> int:
        """Bytes: the allocator's peak on an accelerator, the process's peak resident size on a CPU."""
        if self.type != "cpu":
            return self._module.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def reset_peak_memory(self):
        if self.type != "cpu":
            self._module.reset_peak_memory_stats()

    def rng_state(self) -> dict:
        state = {"cpu": torch.get_rng_state()}
        if self.type != "cpu":
            state[self.type] = self._module.get_rng_state()
        return state

    def set_rng_state(self, state: dict):
        torch.set_rng_state(state["cpu"])
        if (
            self.type != "cpu" and self.type in state
        ):  # a checkpoint may have been written on another device
            self._module.set_rng_state(state[self.type])

    def pin(self, batch):
        """The batch with its arrays in one pinned tensor too, so that `upload` only starts one copy. For the loader's
        thread. torch keeps pinned memory that was used, and takes it again."""
        if self.type == "cpu":
            return batch
        self._module.set_device(self.torch_device)  # of this thread
        arrays = [torch.from_numpy(array).flatten() for array in self._arrays(batch).values()]
        return replace(batch, pinned=torch.cat(arrays).pin_memory())

    @record_function("data")
    def upload(self, batch):
        """The batch with its arrays as tensors on this device; block ids stay on the host."""
        arrays = self._arrays(batch)
        if self.type == "cpu":
            return replace(
                batch, **{name: torch.from_numpy(array) for name, array in arrays.items()}
            )
        pinned = (batch if batch.pinned is not None else self.pin(batch)).pinned
        parts = pinned.to(self.torch_device, non_blocking=True).split(
            [array.size for array in arrays.values()]
        )
        tensors = {
            name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts)
        }
        return replace(batch, pinned=None, **tensors)

    def _arrays(self, batch) -> dict[str, np.ndarray]:
        """What the device needs of a batch, all int64."""
        arrays = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "ids"}
        return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """The array as a tensor on this device, without waiting for what the device is doing."""
        host = torch.from_numpy(array)
        return (
            host
            if self.type == "cpu"
            else host.pin_memory().to(self.torch_device, non_blocking=True)
        )

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the workers, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def agree(self, values: list[int]) -> list[int]:
        """The largest of each over the workers; on the host, without waiting for the device."""
        if self.world_size == 1:
            return values
        values = torch.tensor(values)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return values.tolist()

    def is_out_of_memory(self, error: Exception) -> bool:
        return (
            isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
            or "out of memory" in str(error)
            or "can't allocate" in str(error)
        )

    def lost_worker(self, error: Exception) -> str:
        """What to say if a collective failed because another worker is gone or silent; empty for any other error."""
        words = (
            "closed by peer",
            "reset by peer",
            "Broken pipe",
            "NCCL",
            "HCCL",
            "gloo",
            "Timed out waiting",
        )
        if self.world_size == 1 or not any(word in str(error) for word in words):
            return ""
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            return f"worker {self.rank}: no answer from another worker for {WORKER_TIMEOUT}; it hangs or is unreachable"
        return f"worker {self.rank}: another worker ended; its own message says why"

    def barrier(self):
        if self.world_size > 1:
            torch.distributed.barrier()

    def close(self):
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _host_memory(root: str = "/") -> int:
    """Bytes that this process can have on the host: all of them, or what its container (cgroup) or ulimit -v allows."""
    limits = [
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        resource.getrlimit(resource.RLIMIT_AS)[0],
    ]
    with contextlib.suppress(OSError):
        mine = re.search("^0::(.*)$", Path(root, "proc/self/cgroup").read_text(), re.M)
        own = Path(root, "sys/fs/cgroup" + (mine[1] if mine else "/"))
        for folder in (own, *own.parents, Path(root, "sys/fs/cgroup/memory")):
            for name in ("memory.max", "memory.limit_in_bytes"):  # of versions 2 and 1
                with contextlib.suppress(OSError, ValueError):  # 'max' is no limit
                    limits.append(int((folder / name).read_text()))
    return min(limit for limit in limits if limit > 0)  # -1: no limit


def use_all_cores():
    """For a thread of our own, at its start: with CPU_AFFINITY_CONF torch_npu binds the thread that launches kernels to
    a core, which the threads that it starts inherit."""
    if CORES:
        with contextlib.suppress(OSError):  # a container may have taken some away
            os.sched_setaffinity(0, CORES)  # 0: the calling thread


def open_device(cfg: DeviceConfig) -> Device:
    """Choose the device and the precision; under torchrun, join the other workers. Raises InputError."""
    kind = cfg.device
    if kind == "auto":
        kind = "npu" if _npu_is_there() else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "npu":
        _import_npu()
    if kind == "cuda" and not torch.cuda.is_available():
        built = (
            "this torch is built for the CPU only"
            if torch.version.cuda is None
            else "no GPU or no driver is found"
        )
        raise InputError(f"--device cuda: {built}")
    rank, world_size, local_rank = worker()
    if cfg.deterministic and kind != "cpu":  # a CPU is so by itself
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # read when CUDA starts; without it, an error
        torch.use_deterministic_algorithms(True)
        if hasattr(
            torch.utils, "deterministic"
        ):  # it would also fill all new memory, for code that reads it unset
            torch.utils.deterministic.fill_uninitialized_memory = False
    if kind == "cpu":
        device, name = torch.device("cpu"), platform.processor() or platform.machine()
    else:
        module = getattr(torch, kind)
        if local_rank >= (count := module.device_count()):
            raise InputError(
                f"worker {local_rank} has no {kind} of its own: this machine shows {count}"
            )
        try:
            module.set_device(local_rank)
            device, name = torch.device(kind, local_rank), module.get_device_name(local_rank)
        except RuntimeError as e:  # in use by another, or a driver that does not fit
            raise InputError(f"{kind} {local_rank} cannot be opened: {_first_line(e)}") from None
    if kind == "npu":
        _check_npu(cfg.amp, name, rank)
    if world_size > 1:
        os.environ.setdefault("HCCL_CONNECT_TIMEOUT", HCCL_CONNECT_TIMEOUT)
        backend = BACKENDS[kind] if kind == "cpu" else f"cpu:gloo,{kind}:{BACKENDS[kind]}"
        try:
            torch.distributed.init_process_group(backend, timeout=WORKER_TIMEOUT)
        except RuntimeError as e:
            raise RunError(
                f"worker {rank} cannot join the {world_size - 1} others: {_first_line(e)}"
            ) from None
    return Device(device, name, _amp_type(cfg.amp, kind, name), rank, world_size)


def worker() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine), as torchrun sets them in the environment."""
    try:
        rank, world_size, local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
    except ValueError as e:
        raise InputError(f"RANK, WORLD_SIZE or LOCAL_RANK in the environment: {e}") from None
    if not (0 <= rank < world_size and local_rank >= 0):
        raise InputError(
            f"RANK={rank} and WORLD_SIZE={world_size} in the environment do not fit; start with torchrun"
        )
    if world_size > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise InputError(
            f"WORLD_SIZE={world_size} without RANK, MASTER_ADDR and MASTER_PORT; start with torchrun"
        )
    return rank, world_size, local_rank


def _amp_type(amp: str, kind: str, name: str) -> torch.dtype | None:
    has_bf16 = {
        "cpu": lambda: True,
        # is_bf16_supported() counts emulation, unless asked not to, which torch can from 2.5 on
        "cuda": lambda: torch.version.hip is not None or torch.cuda.get_device_capability()[0] >= 8,
        "npu": lambda: torch.npu.is_bf16_supported(),
    }[kind]()
    if amp == "auto":
        amp = "off" if kind == "cpu" else "bf16" if has_bf16 else "fp16"
    if amp == "bf16" and not has_bf16:
        # autocast would only warn there, and an NPU train in float32
        raise InputError(f"--amp bf16: {name} has no bfloat16; use --amp fp16")
    if (
        amp == "fp16" and kind == "cpu" and VERSION < (2, 4)
    ):  # there autocast warns, and does nothing
        raise InputError(f"--amp fp16 on a CPU needs torch 2.4; this is {torch.__version__}")
    return {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[amp]


def _check_npu(amp: str, name: str, rank: int):
    if name not in FIRST_GENERATION and os.environ.get("INF_NAN_MODE_FORCE_DISABLE") == "1":
        raise InputError(
            f"INF_NAN_MODE_FORCE_DISABLE=1: {name} then saturates, and no overflow would be seen; unset it"
        )
    if name in FIRST_GENERATION and amp == "off" and rank == 0:
        print(
            f"warning: --amp off: {name} may multiply float32 matrices in float16 all the same (ACL_PRECISION_MODE),"
            " here without loss scaling, and saturates where a gradient overflows, so that no check sees it; --amp fp16"
            " is its mode",
            file=sys.stderr,
        )


def _npu_is_there() -> bool:
    """Whether --device auto should take an NPU; looks for the driver's device files before it imports anything."""
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
    except (
        Exception
    ) as e:  # a missing CANN library surfaces as ImportError, OSError or RuntimeError
        if isinstance(e, ModuleNotFoundError):
            what = f"{e.name} is not installed; pip install -r hardware/requirements.txt"
        elif "Two accelerators" in str(e):
            what = "torch_npu refuses to load beside a CUDA build of torch; install the CPU build of the same version"
        else:
            what = (
                f"torch_npu cannot be loaded ({_first_line(e)}); install CANN in a version that docs/ascend.md names,"
                " and source its environment: source /usr/local/Ascend/ascend-toolkit/set_env.sh"
            )
        raise InputError(f"--device npu: {what}") from None
    try:
        there = torch.npu.is_available()
    except RuntimeError as e:
        raise InputError(
            f"--device npu: the driver does not answer ({_first_line(e)}); see npu-smi info"
        ) from None
    if not there:
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        chosen = (
            ""
            if visible is None
            else f"; ASCEND_RT_VISIBLE_DEVICES={visible!r} must name some in ascending order"
        )
        raise InputError(
            "--device npu: torch_npu finds no card; npu-smi info shows what the driver sees (in a container, pass"
            f" /dev/davinci0 and its managers in){chosen}"
        )
    # kernels compiled ahead of time: the first generation otherwise compiles for every new batch shape
    if hasattr(torch.npu, "set_compile_mode"):  # an emulated device has no compiler
        torch.npu.set_compile_mode(jit_compile=False)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
