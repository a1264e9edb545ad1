"""Training curves from Lightning's CSV logs, as an image that an HTML page can carry inside."""

from __future__ import annotations

import base64
import csv
import io
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

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

_GRAY = "#7f7f7f"  # readable on white and on black


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
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    # Equal data must give an equal file: no random ids (and no date, below).
    style: Any = {"font.size": 8, "svg.hashsalt": "recllm", "svg.fonttype": "none"}
    style |= dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _GRAY
    )
    with mpl.rc_context(style):
        figure = Figure(figsize=(3.6 * columns, 2.3 * rows), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (metric, curves) in zip(axes, panels.items(), strict=False):
            axis.patch.set_alpha(0)
            axis.set_title(metric)
            for group, (steps, values) in curves.items():
                x, y = _thinned(steps), _thinned(values)
                axis.plot(x, y, linewidth=1.2, marker="o" if len(x) < 20 else None, markersize=3, label=group)
            axis.legend(frameon=False)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel("step")
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


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
