"""Opens what parent stages left on disk, in the way that every later stage needs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recllm import paths
from recllm.config.schema import Config
from recllm.errors import StageError
from recllm.eventlog.log import EventLog, Rows
from recllm.pipeline.finished import read_config
from recllm.pipeline.run import Run


def event_log(run: Run) -> EventLog:
    """The event log."""
    return EventLog.open(run.parent("log"))


def check_same_prompts(run: Run, role: str) -> None:
    """Refuse a parent that was tuned on other prompts than this run would ask with.

    Whether histories are retrieved is a system's own choice (`recllm.systems.compatibility.retrieves`).

    Raises:
        StageError: the first key that differs, with both values.
    """
    theirs, ours = read_config(run.parent(role))["config"], run.content["config"]
    for section in ("prompt", "wording"):
        for name, value in theirs[section].items():
            if name != "retrieved" and value != ours[section][name]:
                key, stage = f"{section}.{name}", run.parents[role].partition("/")[0]
                raise StageError(
                    f"{run.parents[role]} was tuned with {key}={value!r}, and this stage would ask with "
                    f"{ours[section][name]!r}; add ARGS={key}=..., or tune it anew with `make {stage}`"
                )


def retrieves(run: Run, folder: str) -> bool:
    """Whether Yes/No prompts of a system of stage 2, or of what stage 3 made of it, show nearest events."""
    content = read_config(run.root / folder)
    return bool(
        retrieves(run, content["parents"]["stage2"])
        if content["stage"] == "stage3"
        else content["config"]["prompt"]["retrieved"]
    )


def ranking(run: Run, log: EventLog, split: str, kind: str) -> tuple[Rows, NDArray[np.int32]]:
    """Rows of the ranking task and their candidates; hard ones lie where the vectors are."""
    return log.ranking(split, kind, run.parent("neighbors") if kind.startswith("hard") else None)


def subsample(config: Config, log: EventLog) -> Rows:
    """Training rows of stage 2, int64 `[n]`: of one kind, smaller sets lie in larger ones."""
    return log.rows("train", config.subsample)


def export_folder(run: Run) -> Path:
    """Where a stage puts what others load."""
    return run.folder / paths.EXPORT
