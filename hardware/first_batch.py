"""How long does a fresh process take to its first batch, and in how much memory? One line of JSON; Linux only.

    python -m hardware.first_batch START --data_path DIR [train.py's flags]

It does what train.py does before its first update, without building the model. START is time.monotonic() when the
process was started. `python bench.py --startup` runs this several times.
"""

import json
import re
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

from run import flags

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # started by path, this would be tools/

import config  # noqa: E402


@dataclass
class Usage:
    """What the process has used so far."""

    seconds: float  # since START
    cpu_seconds: float
    resident: int  # bytes
    peak: int  # bytes, the most that were resident


def usage(start: float) -> Usage:
    status = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    resident, peak = (int(status[key]) * 1024 for key in ("VmRSS", "VmHWM"))
    return Usage(time.monotonic() - start, time.process_time(), resident, peak)


def main() -> int:
    try:
        start = float(sys.argv[1])
    except (IndexError, ValueError):
        raise config.InputError(
            "the first argument is the time of the start, as time.monotonic() gives it"
        ) from None
    began = usage(start)
    import torch  # noqa: F401  measured

    bare = usage(start)
    import train
    from hardware.device import open_device

    cfg = config.Config(*flags.parse(config.PARTS, __doc__, sys.argv[2:])[0])
    imported = usage(start)
    run = types.SimpleNamespace(cfg=cfg, device=open_device(cfg.device), epoch=1, batches_done=0)
    corpus = train.Corpus(cfg.data)
    dataset = corpus.split("train")
    dataset.stream.digest()
    updates = train.turns(run, corpus)
    next(updates)
    ready = usage(start)
    updates.close()
    torch_s = bare.seconds - began.seconds
    result = dict(
        torch_s=torch_s,
        modules_s=imported.seconds - bare.seconds,
        data_s=ready.seconds - imported.seconds,
        data_cpu_s=ready.cpu_seconds - imported.cpu_seconds,
        total_s=ready.seconds,
        beyond_torch_s=ready.seconds - torch_s,
        torch_bytes=bare.peak,
        beyond_torch_bytes=ready.resident - bare.resident,
        peak_beyond_torch_bytes=ready.peak - bare.peak,
        sentences=len(dataset.stream.sizes),
        blocks=len(dataset.lengths),
        batches=len(dataset.batch_ends),
        tokens=dataset.stream.tokens,
    )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    flags.program(main)
