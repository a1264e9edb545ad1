"""Checkpoints of a stage: the best ones, their scores, and the one to resume from."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recllm import paths
from recllm.console import is_first_process, say
from recllm.errors import StageError
from recllm.files import load_weights, write_json
from recllm.pipeline.finished import Finished
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role

if TYPE_CHECKING:
    from torch import nn

MADE_FOR = "made-for.json"
"""Beside checkpoints: configuration and parents that they are of."""


@dataclass(frozen=True)
class Selected:
    """Which checkpoints validation chose in a finished training.

    Attributes:
        steps: training steps that were planned.
        best: monitor -> the step at which it was best; 0: before the first one.
    """

    steps: int
    best: dict[str, int]

    @classmethod
    def of(cls, stage: Finished, monitors: list[str]) -> Selected:
        """Read what a stage says of its training.

        Args:
            stage: it is finished.
            monitors: scores by which its checkpoints were selected; the first one's figures stand first.

        Raises:
            StageError: it does not say.
        """
        metrics = stage.manifest.metrics
        figures = [metrics, *([metrics.get("ranking", {})] * (len(monitors) - 1))]
        try:
            best = {name: int(of["step"]) for name, of in zip(monitors, figures, strict=True)}
            return cls(int(metrics["steps"]), best)
        except KeyError as error:
            raise StageError(
                f"{stage.name} says nothing of its {error.args[0]}, so that nothing can repeat it; remove "
                f"{stage.folder / paths.MANIFEST} and run make again"
            ) from error

    def repeated(self, steps: int) -> dict[str, int]:
        """Monitor -> step that is as far in a training of `steps` planned steps, at least the first one."""
        return {
            name: max(1, round(step / self.steps * steps)) if step else 0 for name, step in self.best.items()
        }


def repeats(run: Run) -> bool:
    """Whether a stage trains as far as validation chose in its like, and validates nothing itself."""
    return Role.CHOSEN in run.parents


def best(run: Run, monitor: str) -> Path:
    """The checkpoint with the best score of a monitor: `best-auc.ckpt` for `valid/auc`.

    Of a stage that repeats another one, the checkpoint of the step that is as far.
    """
    return run.folder / paths.CHECKPOINTS / f"best-{monitor.rpartition('/')[2].replace('@', '')}.ckpt"


def load_best(run: Run, monitor: str, model: nn.Module) -> None:
    """Give a model the weights that `model` of what was trained had at the best score of a monitor."""
    state = load_weights(best(run, monitor))["state_dict"]
    prefix = "model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def best_scores(run: Run, monitor: str, untrained: bool = False) -> dict[str, float]:
    """The row of the curve at which `monitor` was best: step and all validation scores there.

    Args:
        run: the stage.
        monitor: name of the score.
        untrained: whether step 0, of which there is no checkpoint, may be the best.

    Returns:
        `step` and the scores; of a stage that repeats another one its step alone, 0 where none was trained.
    """
    if repeats(run):
        path = best(run, monitor)
        return {"step": float(load_weights(path, mapped=True)["global_step"]) if path.exists() else 0.0}
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
    """`last.ckpt` of an interrupted run of the same configuration and parents.

    Checkpoints of another one are put aside, and it is said why: the configuration that they are of takes
    them up again. `forget_others` removes them when the training is done; so does putting others aside.
    """
    last = folder / paths.LAST
    mine = {"fingerprint": run.fingerprint, "config": run.file.config, "parents": run.identities}
    if is_first_process():
        _mend_swap(folder)
        if folder.exists() and _made_for(folder).get("fingerprint") != run.fingerprint:
            _put_aside(folder, mine)
        if _made_for(folder) != json.loads(json.dumps(mine)):  # tuples are read as lists
            write_json(folder / MADE_FOR, mine)
    if not last.exists() or _made_for(folder).get("fingerprint") != run.fingerprint:
        return None
    step = load_weights(last, mapped=True)["global_step"]
    say(f"resumes at step {step}")
    return last


def forget_others(folder: Path) -> None:
    """Remove what `resumable` has put aside."""
    if is_first_process():
        shutil.rmtree(_aside(folder), ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-before")


def _made_for(folder: Path) -> dict[str, Any]:
    """What the checkpoints of a folder were made for; empty: it does not say."""
    mark = folder / MADE_FOR
    content: dict[str, Any] = json.loads(mark.read_text()) if mark.exists() else {}
    return content


def _swap(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-swap")


def _mend_swap(folder: Path) -> None:
    """Finish what `_put_aside` was killed in: what it holds goes where it came from, or was going to."""
    swap = _swap(folder)
    if swap.exists():
        target = _aside(folder) if folder.exists() else folder
        shutil.rmtree(target, ignore_errors=True)
        swap.rename(target)


def _put_aside(folder: Path, mine: dict[str, Any]) -> None:
    """Put checkpoints of another configuration aside, and those of this one, if they lie there, back."""
    aside = _aside(folder)
    back = _made_for(aside).get("fingerprint") == mine["fingerprint"]
    before = _made_for(folder)
    last = folder / paths.LAST
    if not last.exists():  # nothing is lost: what lies aside stays
        shutil.rmtree(folder)
        if back:
            aside.rename(folder)
        return
    step = load_weights(last, mapped=True)["global_step"]
    changed = changes(before, mine)
    swap = _swap(folder)
    folder.rename(swap)
    if back:
        aside.rename(folder)
    elif (lost := aside / paths.LAST).exists():
        old = load_weights(lost, mapped=True)["global_step"]
        why = changes(_made_for(aside), mine)
        say(f"removes the checkpoint at step {old} that was put aside earlier ({why})")
    shutil.rmtree(aside, ignore_errors=True)
    swap.rename(aside)
    less_memory = (
        " (trainer.accumulate needs less memory for the same steps)" if smaller(before, mine) else ""
    )
    say(
        f"cannot go on from the checkpoint at step {step}: {changed}; it is put aside until this training is "
        f"done, and goes on where all is configured as before{less_memory}"
    )


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words what differs between what checkpoints were made for and what is asked for."""
    if "config" not in before:
        return "it was made by another configuration"
    old, new = _flat(before["config"]), _flat(now["config"])
    words = [
        f"{key} was {old.get(key)}, is {new.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
    for parent, identity in now["parents"].items():
        if before["parents"].get(parent) != identity:
            words.append(f"{parent} was made anew")
    return "; ".join(words) or "what it is made from differs"


def smaller(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a step has fewer rows or tokens than it had."""
    old, new = _flat(before.get("config", {})), _flat(now["config"])
    names = [name for name in new if name.endswith((".batch_size", ".batch_tokens")) and name in old]
    return any(new[name] < old[name] for name in names)


def _flat(nested: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested sections."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat
