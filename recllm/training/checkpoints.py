"""Checkpoints of a stage: the best ones, their scores, and the one to resume from."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

from recllm import paths
from recllm.console import is_first_process, say
from recllm.files import load_weights
from recllm.pipeline.run import Run


def best(run: Run, monitor: str) -> Path:
    """The checkpoint with the best score of a monitor: `best-auc.ckpt` for `valid/auc`."""
    return run.folder / paths.CHECKPOINTS / f"best-{monitor.rpartition('/')[2].replace('@', '')}.ckpt"


def best_scores(run: Run, monitor: str, untrained: bool = False) -> dict[str, float]:
    """The row of the curve at which `monitor` was best: step and all validation scores there.

    Args:
        run: the stage.
        monitor: name of the score.
        untrained: whether step 0, of which there is no checkpoint, may be the best.
    """
    with (run.folder / paths.LOGS / "metrics.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get(monitor)]
    rows = [row for row in rows if untrained or int(row["step"])]
    row = max(rows, key=lambda row: float(row[monitor]))
    return {
        name: float(value)
        for name, value in row.items()
        if value and (name == "step" or name.startswith("valid/"))
    }


def resumable(run: Run, folder: Path) -> Path | None:
    """`last.ckpt` of an interrupted run of the same configuration and parents; others are removed."""
    mark, last = folder / "made-for.json", folder / paths.LAST
    mine = {"fingerprint": run.fingerprint}
    same = mark.exists() and json.loads(mark.read_text()) == mine
    if is_first_process():
        if folder.exists() and not same:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(mine))
    if not (same and last.exists()):
        return None
    step = load_weights(last, mapped=True)["global_step"]
    say(f"resumes at step {step}")
    return last
