"""Rows of the results table: how a system is named in them, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping

from recllm.config.sweep import tag
from recllm.evaluation.stacking import CONTROLS
from recllm.pipeline.manifest import Manifest


def named(system: str, point: Mapping[str, str] | None, folders: Mapping[str, str]) -> str:
    """A system of an evaluation as tables name it: with the point, where the point changes it.

    Args:
        system: its name.
        point: `key` and `value` of the evaluation's point; None: it is none of a sweep.
        folders: role of each parent (`tuned:lora`) -> its folder, whose name says the point.
    """
    if point is None:
        return system
    at = f"+{tag(point['key'], point['value'])}"
    own = [folder for role, folder in folders.items() if role.partition(":")[2] == system]
    return system + at if system in CONTROLS or any(at in folder for folder in own) else system


def cost(manifest: Manifest) -> dict[str, float]:
    """What tuning took: rows, weights that train, tokens of Yes/No prompts, seconds over all attempts."""
    figures = {f"tuning_{name}": manifest.metrics.get(name) for name in ("rows", "trainable", "tokens")}
    known = {name: float(value) for name, value in figures.items() if value is not None}
    return known | {"tuning_seconds": float(manifest.seconds)}
