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
    """Write the files; returns the lines to print. Raises InputError if the run has logged no
    update."""
    rows = json_rows(save_dir / "train.jsonl")
    train = [
        row
        for row in rows
        if all(isinstance(row.get(key), float) for key in ("loss", "ups", "fps"))
    ]
    if not train:
        raise InputError(
            f"{save_dir / 'train.jsonl'}: no update was logged, so there is nothing to report"
        )
    best = [row["valid_best_loss"] for row in rows if isinstance(row.get("valid_best_loss"), float)]
    best = f"{best[-1]:.4f}" if best else "-"
    timed = train[1:] or train  # the first interval includes the start-up
    ups, fps = (statistics.median(row[key] for row in timed) for key in ("ups", "fps"))
    seconds = sum(
        map(
            int,
            re.findall(r"^\d{1,9}$", read_text(save_dir / "run_1p_seconds.txt", "replace"), re.M),
        )
    )
    log = read_text(output / f"train_{device_id}.log", "replace")
    kind, amp = (re.findall(r"^\d+ x (\w+) .*, amp (\w+) \|", log, re.M) or [("-", "-")])[
        -1
    ]  # the last part's

    case = "data2vec_for_PyTorch_1p" + "_pref" * (mode == "performance")
    (output / f"train_{case}_loss.txt").write_text("".join(f"{row['loss']}\n" for row in train))
    (output / f"{case}.log").write_text(
        f"Network = data2vec_for_PyTorch\nRankSize = 1\nDeviceType = {platform.machine()}\nCaseName = {case}\n"
        f"ActualUPS = {ups}\nActualFPS = {fps}\nE2ETrainingTime = {seconds}\n"
    )
    return "\n".join(
        [
            # the first three lines are the ModelZoo's own; its images/sec are updates per second
            f"Final Performance images/sec : {ups:.4f}",
            f"Final Valid Best Loss: {best}",
            f"E2E Training Duration sec : {seconds}",
            f"UPS (updates/s) : {ups:.4f}",
            f"FPS (blocks/s) : {fps:.2f}",
            f"Loss, first and last logged : {train[0]['loss']:.4f} -> {train[-1]['loss']:.4f}",
            "",
            "| Name | wer | FPS | Epochs | AMP_Type | Torch_Version | Valid_Loss |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            f"| 1p-{kind} | - | {fps:.2f} | {train[-1].get('epoch')} | {amp} | {version('torch')} | {best} |",
        ]
    )


def main(argv: list | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 4:
        raise InputError("needed: SAVE_DIR OUTPUT DEVICE_ID MODE")
    save_dir, output, device_id, mode = words
    print(report(Path(save_dir), Path(output), device_id, mode))
    return 0


if __name__ == "__main__":
    flags.program(main)
