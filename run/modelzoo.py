"""The report after a run of run_1p.sh: the Ascend ModelZoo's lines and files. run_1p.sh starts it.

    python -m run.modelzoo SAVE_DIR OUTPUT DEVICE_ID MODE

SAVE_DIR holds train.jsonl and the seconds that each part of the run took (run_1p_seconds.txt, a
line a part); OUTPUT holds train_DEVICE_ID.log, and receives data2vec_for_PyTorch_1p.log and
train_data2vec_for_PyTorch_1p_loss.txt. In the mode performance these two names end in 1p_pref, as
the ModelZoo's do.
"""

import platform
import re
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

from config import InputError, read_text
from run import flags
from text.files import json_rows


def report(save_dir: Path, output: Path, device_id: str, mode: str) -> str:
    """Write the files; returns the lines to print.

    Raises InputError if the run has logged no update.
    """
    # a full disk may have cut rows, and someone may have edited them
    rows = json_rows(save_dir / "train.jsonl")
    train = [row for row in rows if has_numbers(row, "loss", "ups", "fps")]
    if not train:
        path = save_dir / "train.jsonl"
        raise InputError(f"{path}: no update was logged, so there is nothing to report")

    # what is reported
    losses = [row["loss"] for row in train]
    timed = train[1:] or train  # the first interval includes the start-up
    ups = statistics.median(row["ups"] for row in timed)
    fps = statistics.median(row["fps"] for row in timed)
    valid = [row["valid_best_loss"] for row in rows if has_numbers(row, "valid_best_loss")]
    best = f"{valid[-1]:.4f}" if valid else "-"
    # a number for each start of the run
    text = read_text(save_dir / "run_1p_seconds.txt", "replace")
    seconds = sum(int(part) for part in re.findall(r"^\d{1,9}$", text, re.M))

    case = "data2vec_for_PyTorch_1p"
    if mode == "performance":
        case += "_pref"
    (output / f"train_{case}_loss.txt").write_text("".join(f"{loss}\n" for loss in losses))
    facts = dict(Network="data2vec_for_PyTorch", RankSize=1, DeviceType=platform.machine())
    facts |= dict(CaseName=case, ActualUPS=ups, ActualFPS=fps, E2ETrainingTime=seconds)
    lines = [f"{name} = {value}\n" for name, value in facts.items()]
    (output / f"{case}.log").write_text("".join(lines))

    # the row for its table of results
    log = read_text(output / f"train_{device_id}.log", "replace")
    starts = re.findall(r"^\d+ x (\w+) .*, amp (\w+) \|", log, re.M)
    kind, amp = starts[-1] if starts else ("-", "-")
    cells = [f"1p-{kind}", "-", f"{fps:.2f}", train[-1].get("epoch"), amp, version("torch"), best]
    # the first three lines are the ModelZoo's own; its images/sec are updates per second
    return f"""Final Performance images/sec : {ups:.4f}
Final Valid Best Loss: {best}
E2E Training Duration sec : {seconds}
UPS (updates/s) : {ups:.4f}
FPS (blocks/s) : {fps:.2f}
Loss, first and last logged : {losses[0]:.4f} -> {losses[-1]:.4f}

| Name | wer | FPS | Epochs | AMP_Type | Torch_Version | Valid_Loss |
| --- | --- | --- | --- | --- | --- | --- |
| {" | ".join(map(str, cells))} |"""


def has_numbers(row: dict, *names: str) -> bool:
    return all(isinstance(row.get(name), float) for name in names)


def main() -> int:
    if len(sys.argv) != 5:
        raise InputError("needed: SAVE_DIR OUTPUT DEVICE_ID MODE")
    _, save_dir, output, device_id, mode = sys.argv
    print(report(Path(save_dir), Path(output), device_id, mode))
    return 0


if __name__ == "__main__":
    flags.program(main)
