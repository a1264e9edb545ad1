"""Training curves from Lightning's CSV logs."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from recllm.report.sheet import sheet

Series = tuple[NDArray[np.float64], NDArray[np.float64]]

POINTS = 300
"""A curve shows at most so many points; longer ones are averaged in equal stretches."""

TOGETHER = {
    "reward_chosen": ("reward", "chosen"),
    "reward_rejected": ("reward", "rejected"),
    "chosen_logp": ("log-probability", "chosen"),
    "rejected_logp": ("log-probability", "rejected"),
}
"""Metrics that say something beside one another only: (panel, what tells their curves apart)."""


def read_series(path: Path) -> dict[str, Series]:
    """Curves of one `metrics.csv`.

    Lightning writes one column a metric and leaves cells empty where nothing was logged. A resumed run may
    have written a step twice: the later line holds.

    Args:
        path: the file; it needs a `step` column.

    Returns:
        Metric -> (steps, values), ascending, finite values only; `step` and `epoch` are left out. Metrics
        that Lightning logs both by step and by epoch (`_step`, `_epoch`) keep those names.
    """
    points: dict[str, dict[int, float]] = {}
    with path.open(newline="") as stream:
        for line in csv.DictReader(stream):
            if not line.get("step"):
                continue
            for name, cell in line.items():
                if name not in ("step", "epoch") and (value := _number(cell)) is not None:
                    points.setdefault(name, {})[int(float(line["step"]))] = value
    return {
        name: (np.array(sorted(curve), dtype=np.float64), np.array([curve[step] for step in sorted(curve)]))
        for name, curve in points.items()
    }


def draw(series: dict[str, Series]) -> str:
    """One panel for each metric; train and valid curves of the same metric share theirs, as do `TOGETHER`.

    Args:
        series: as `read_series` returns it; names like `train/loss`, `valid/auc`.

    Returns:
        A `data:` URI of an SVG with a transparent ground.
    """
    panels: dict[str, dict[str, Series]] = {}
    for name, curve in sorted(series.items()):
        group, _, metric = name.rpartition("/")
        panel, kind = TOGETHER.get(metric, (metric, ""))
        panels.setdefault(panel, {})[f"{group or 'all'} {kind}".strip()] = curve
    return sheet({metric: partial(_plot, curves) for metric, curves in panels.items()})


def _plot(curves: dict[str, Series], axis: Axes) -> None:
    for group, (steps, values) in curves.items():
        x, y = _thinned(steps), _thinned(values)
        axis.plot(x, y, linewidth=1.2, marker="o" if len(x) < 20 else None, markersize=3, label=group)
    axis.legend(frameon=False)
    axis.set_xlabel("step")


def _number(cell: object) -> float | None:
    try:
        value = float(cell)  # type: ignore[arg-type]  # what is no number raises, and is skipped
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _thinned(values: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(values) <= POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, POINTS)])
