"""Whether probabilities can be taken at their word: calibration of the systems that answer Yes or No."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from recllm.evaluation.results import ResultRow, by_table
from recllm.evaluation.tables import ResultTable, number, table_title
from recllm.report.sheet import GRAY, sheet

LARGEST = 120.0
"""Area of a mark that stands for all rows, in square points; others' areas are in proportion."""
SMALLEST = 4.0
"""Area of a mark at least."""


@dataclass(frozen=True)
class CalibrationSection:
    """What the page shows of one table of CTR results.

    Attributes:
        table: the systems, the best calibrated first.
        image: their reliability diagrams in that order, a `data:` URI; None: no bins were kept.
        words: what the image shows, for who does not see it.
    """

    table: ResultTable
    image: str | None
    words: str


def calibration_sections(rows: Iterable[ResultRow]) -> list[CalibrationSection]:
    """One section for each table of CTR results.

    Args:
        rows: any rows; those with an ECE are shown.
    """
    measured = (row for row in rows if row.task == "ctr" and row.metrics.get("ece") is not None)
    return [_section(group) for group in by_table(measured)]


def _section(rows: list[ResultRow]) -> CalibrationSection:
    ordered = sorted(rows, key=lambda row: row.metrics["ece"] or 0.0)
    cells = [[row.label, *(number(row.metrics.get(name)) for name in ("ece", "logloss"))] for row in ordered]
    table = ResultTable(table_title(rows[0]), ["system", "ECE", "log loss"], cells, set())
    panels: dict[str, Callable[[Axes], None]] = {}
    words = []
    for row in ordered:
        bins = [(count, predicted, liked) for count, predicted, liked in row.reliability if count]
        if bins:
            panels[row.label] = partial(_draw, bins)
            words.append(f"{row.label} {_direction(bins)}")
    if not panels:
        return CalibrationSection(table, None, "")
    return CalibrationSection(table, sheet(panels), f"Reliability: {'; '.join(words)}")


def _direction(bins: list[tuple[float, float, float]]) -> str:
    """On which side of what was observed the predictions lie on average, in words."""
    count, predicted, liked = np.array(bins).T
    mean = float(np.average(predicted, weights=count))
    share = float(np.average(liked, weights=count))
    return f"predicts {number(mean)} on average, liked were {number(share)}"


def _draw(bins: list[tuple[float, float, float]], axis: Axes) -> None:
    """The share that was liked over what was predicted; the diagonal is what is calibrated."""
    count, predicted, liked = np.array(bins).T
    axis.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8, linestyle="--")
    axis.vlines(predicted, predicted, liked, color="tab:orange", linewidth=1.2)
    axis.plot(predicted, liked, color="tab:blue", linewidth=0.8)
    area = np.maximum(LARGEST * count / count.sum(), SMALLEST)
    axis.scatter(predicted, liked, s=area, color="tab:blue", linewidths=0)
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="predicted", ylabel="liked")
