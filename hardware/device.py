"""Where it runs: Ascend NPU, CUDA GPU or CPU; autocast, loss scaling, seeds, memory, and workers.

Decided once, above the loop, by opening.py; outside of this room nobody asks which device it is.
The two environment variables that torch reads when it is imported are set in config.py.
"""

import contextlib
import os
import re
import resource
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from config import InputError, TrainConfig
from hardware.kernels import FIRST_GENERATION, VERSION

import numpy as np
import torch
from torch.profiler import record_function

# For one collective; while rank 0 saves, the others wait in one. Longer than HCCL's own two, so
# that HCCL says what failed: HCCL_EXEC_TIMEOUT's default is 1,836 seconds.
WORKER_TIMEOUT = timedelta(minutes=35)
# of the loss scaler, as in fairseq; it grows after so many updates without an overflow
FIRST_LOSS_SCALE = 128.0
LOWEST_LOSS_SCALE = 1e-4
GROWTH_UPDATES = 2**14
PROFILE_FROM = 12  # the first update of a start that a profile shows; those before warm up
AMP_TYPES = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}
# before torch_npu binds threads to some of them
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
# in a collective's error when another worker is gone
LOST = "closed by peer|reset by peer|Broken pipe|NCCL|HCCL|gloo|Timed out waiting"


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
        return next(name for name, dtype in AMP_TYPES.items() if dtype is self.amp)

    @property
    def _module(self):
        return getattr(torch, self.type)  # torch.npu, torch.cuda, torch.cpu

    @property
    def asking_is_free(self) -> bool:
        """Whether a tensor can be read without waiting for a device."""
        return self.type == "cpu"

    @property
    def has_fused_adam(self) -> bool:
        """Whether torch's AdamW is one kernel for all weights here, which can also skip a step.

        An NPU's ignores the loss scaler; the CPU's is from torch 2.4 on.
        """
        return self.type == "cuda" or (self.type == "cpu" and VERSION >= (2, 4))

    @property
    def wants_long_vectors(self) -> bool:
        """Whether launching kernels is what costs, so that weights belong in two long vectors."""
        return self.type == "npu"

    def autocast(self, enabled: bool = True):
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.type, self.amp, enabled)

    def scaler(self, update_freq: int):
        """The loss scaler: a real one under fp16, one that does nothing otherwise."""
        enabled = self.amp is torch.float16
        interval = max(1, GROWTH_UPDATES // (self.world_size * update_freq))
        rules = dict(init_scale=FIRST_LOSS_SCALE, growth_interval=interval, enabled=enabled)
        # A chip that saturates has finite gradients even after an overflow: only a sticky hardware
        # flag tells. torch_npu's own scaler clears it at an update's first scale(), and its workers
        # agree on what it said.
        needs_flag = enabled and self.name in FIRST_GENERATION
        if needs_flag or not hasattr(torch.amp, "GradScaler"):  # which is from torch 2.3 on
            module = torch.npu if self.type == "npu" else torch.cuda
            return module.amp.GradScaler(**rules)
        return torch.amp.GradScaler(self.type, **rules)

    def check_compile(self):
        """Raise InputError if --compile cannot be used here."""
        if self.wants_long_vectors:
            raise InputError(f"--compile is not for an {self.type}, where layers run in eager mode")
        if VERSION < (2, 4):
            raise InputError(f"--compile needs torch 2.4; this is {torch.__version__}")

    @contextlib.contextmanager
    def profile(self, cfg: TrainConfig, done: int):
        """Yields a function to call after each update; `done` are done.

        With --npu_profile, torch_npu's profiler writes a trace of that many into --save_dir, from
        the PROFILE_FROMth on. Raises InputError if it cannot.
        """
        updates, left = cfg.npu_profile, cfg.max_update - done
        if not updates:
            yield lambda: None
            return
        needed = PROFILE_FROM + updates - 1
        if self.type != "npu" or needed > left:
            here = f"this is {self.type}, and {left} are left"
            raise InputError(f"--npu_profile {updates}: needs an npu and {needed} updates; {here}")
        from torch_npu import profiler

        # the update before is the profiler's own warm-up
        when = dict(wait=0, warmup=1, active=updates, repeat=1, skip_first=PROFILE_FROM - 2)
        metrics = profiler.AiCMetrics.PipeUtilization
        level = dict(profiler_level=profiler.ProfilerLevel.Level1, aic_metrics=metrics)
        with profiler.profile(
            activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU],
            schedule=profiler.schedule(**when),
            on_trace_ready=profiler.tensorboard_trace_handler(cfg.save_dir),
            experimental_config=profiler._ExperimentalConfig(**level),
        ) as running:
            yield running.step

    def seed(self, seed: int):
        torch.manual_seed(seed)  # seeds the accelerator's generator too

    def synchronize(self):
        self._module.synchronize()

    def memory(self) -> int:
        """Bytes that the device has in all, also those in use."""
        if hasattr(self._module, "mem_get_info"):
            return self._module.mem_get_info()[1]
        return _host_memory()

    def peak_memory(self) -> int:
        """Bytes: the allocator's peak; on a CPU the process's peak resident size."""
        if self.type != "cpu":
            return self._module.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def rng_state(self) -> dict:
        state = {"cpu": torch.get_rng_state()}
        if self.type != "cpu":
            state[self.type] = self._module.get_rng_state()
        return state

    def set_rng_state(self, state: dict):
        torch.set_rng_state(state["cpu"])
        # a checkpoint may have been written on another device
        if self.type != "cpu" and self.type in state:
            self._module.set_rng_state(state[self.type])

    def pin(self, batch):
        """The batch with its arrays in one pinned tensor too, so that `upload` starts one copy.

        For the loader's thread. torch keeps pinned memory that was used, and takes it again.
        """
        if self.type == "cpu":
            return batch
        self._module.set_device(self.torch_device)  # of this thread
        parts = [torch.from_numpy(array).flatten() for array in arrays_of(batch).values()]
        return replace(batch, pinned=torch.cat(parts).pin_memory())

    @record_function("data")
    def upload(self, batch):
        """The batch with its arrays as tensors on this device; block ids stay on the host."""
        arrays = arrays_of(batch)
        if self.type == "cpu":
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            return replace(batch, **tensors)
        if batch.pinned is None:
            batch = self.pin(batch)
        sizes = [array.size for array in arrays.values()]
        parts = batch.pinned.to(self.torch_device, non_blocking=True).split(sizes)
        tensors = {name: part.view(arrays[name].shape) for name, part in zip(arrays, parts)}
        return replace(batch, pinned=None, **tensors)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """The array as a tensor on this device, without waiting for what the device is doing."""
        host = torch.from_numpy(array)
        if self.type == "cpu":
            return host
        return host.pin_memory().to(self.torch_device, non_blocking=True)

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

    def lost_worker(self, error: Exception) -> str:
        """What to say if a collective failed because another worker is gone or silent, or ""."""
        text = str(error)
        if self.world_size == 1 or not re.search(LOST, text):
            return ""
        why = "another worker ended; its own message says why"
        if re.search("timed ?out", text, re.I):
            why = f"no answer from another worker for {WORKER_TIMEOUT}; it hangs or is unreachable"
        return f"worker {self.rank}: {why}"

    def barrier(self):
        if self.world_size > 1:
            torch.distributed.barrier()

    def close(self):
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def arrays_of(batch) -> dict[str, np.ndarray]:
    """What a device needs of a batch, all int64: every array but the block ids."""
    arrays = {name: value for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
    del arrays["ids"]
    return arrays


def _host_memory(root: str = "/") -> int:
    """Bytes that this process can have on the host: all, or what a container or ulimit -v allow."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [pages, resource.getrlimit(resource.RLIMIT_AS)[0]]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroup's versions 2 and 1
        with contextlib.suppress(OSError, ValueError):  # 'max' is no limit
            limits.append(int(Path(root, "sys/fs/cgroup", name).read_text()))
    return min(limit for limit in limits if limit > 0)  # -1: no limit


def use_all_cores():
    """For a thread of our own, at its start."""
    # with CPU_AFFINITY_CONF torch_npu binds the thread that launches kernels, and so those that
    # it starts, to a core
    if CORES:
        with contextlib.suppress(OSError):  # a container may have taken some away
            os.sched_setaffinity(0, CORES)  # 0: the calling thread


CPU = Device(torch.device("cpu"), "CPU", None)
