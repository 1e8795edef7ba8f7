"""The report after a run of run_1p.sh: the Ascend ModelZoo's lines and files. run_1p.sh starts it.

    python -m tools.report SAVE_DIR OUTPUT DEVICE_ID

SAVE_DIR holds train.jsonl and the seconds that each part of the run took (run_1p_seconds.txt, a line a part); OUTPUT
holds train_DEVICE_ID.log, and receives data2vec_for_PyTorch_1p.log and train_data2vec_for_PyTorch_1p_loss.txt.
"""

import contextlib
import json
import re
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

import config
from config import InputError

NAME = "data2vec_for_PyTorch_1p"


def report(save_dir: Path, output: Path, device_id: str) -> str:
    """Write the files; returns the lines to print. Raises InputError if the run has logged no update."""
    rows = []
    for line in (save_dir / "train.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # a row that a full disk cut short
            rows.append(json.loads(line))
    train = [row for row in rows if row.get("loss") is not None]
    if not train:
        raise InputError(f"{save_dir / 'train.jsonl'}: no update was logged, so there is nothing to report")
    best = [f"{row['valid_best_loss']:.4f}" for row in rows if row.get("valid_best_loss") is not None][-1:] or ["-"]
    timed = train[1:] or train  # the first interval includes the start-up
    ups, fps = (statistics.median(row[key] for row in timed) for key in ("ups", "fps"))
    seconds = sum(map(int, (save_dir / "run_1p_seconds.txt").read_text().split()))
    log = (output / f"train_{device_id}.log").read_text(errors="replace")
    kind, amp = re.findall(r"^\d+ x (\w+) .*, amp (\w+) \|", log, re.M)[-1]  # the last part's

    (output / f"train_{NAME}_loss.txt").write_text("".join(f"{row['loss']}\n" for row in train))
    (output / f"{NAME}.log").write_text(
        f"Network = data2vec_for_PyTorch\nRankSize = 1\nDeviceType = {kind}\nCaseName = {NAME}\n"
        f"ActualUPS = {ups}\nActualFPS = {fps}\nE2ETrainingTime = {seconds}\n"
    )
    return "\n".join(
        [
            # the first three lines are the ModelZoo's own; its images/sec are updates per second
            f"Final Performance images/sec : {ups:.4f}",
            f"Final Valid Best Loss: {best[0]}",
            f"E2E Training Duration sec : {seconds}",
            f"UPS (updates/s) : {ups:.4f}",
            f"FPS (blocks/s) : {fps:.2f}",
            f"Loss, first and last logged : {train[0]['loss']:.4f} -> {train[-1]['loss']:.4f}",
            "",
            "| Name | wer | FPS | Epochs | AMP_Type | Torch_Version | Valid_Loss |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            f"| 1p-{kind} | - | {fps:.2f} | {train[-1]['epoch']} | {amp} | {version('torch')} | {best[0]} |",
        ]
    )


def main(argv: list | None = None) -> int:
    save_dir, output, device_id = argv or sys.argv[1:]
    print(report(Path(save_dir), Path(output), device_id))
    return 0


if __name__ == "__main__":
    config.program(main)
