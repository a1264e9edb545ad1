"""Sweeps: one key at several values, AUC and cost beside one another, of whatever was evaluated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from recllm.config.sweep import ROWS, short, tag
from recllm.evaluation.results import ResultRow, merge, read
from recllm.evaluation.tables import ResultTable, interval, number
from recllm.paths import MANIFEST
from recllm.paths import ROWS as ROWS_FILE
from recllm.pipeline.finished import Finished
from recllm.report.sheet import GRAY, sheet
from recllm.report.stages import UNREADABLE

Lines = dict[str, dict[str, ResultRow]]
"""System -> value of the key -> its row."""


@dataclass(frozen=True)
class Sweep:
    """Evaluations that differ in one key only.

    Attributes:
        title: the key, variant, LM and rows.
        image: AUC and seconds against the key, a `data:` URI.
        table: the table; its last column holds words.
    """

    title: str
    image: str
    table: ResultTable


def sweeps(folder: Path, missing: list[str]) -> list[Sweep]:
    """All sweeps among a data set's finished evaluations.

    Values belong together if they are of one variant (the gate's CRM, vectors, experiment), on the same rows
    with the same LM; seeds are averaged as in every table.

    Args:
        folder: `artifacts/<dataset>`.
        missing: a line is added of each evaluation that cannot be read.
    """
    groups: dict[tuple[str, str, str, int, str], Lines] = {}
    for path in sorted(folder.glob(f"evaluate/*/{MANIFEST}")):
        try:
            sweep = Finished.open(path.parent).file.sweep
        except UNREADABLE as error:
            place = path.parent.relative_to(folder).as_posix()
            missing.append(f"{place} cannot be read: {' '.join(str(error).split())}")
            continue
        if not sweep:
            continue
        key, value = sweep["key"], sweep["value"]
        for row in read(path.parent / ROWS_FILE):
            if "tuning_rows" not in row.metrics:
                continue
            group = groups.setdefault((key, row.variant or "", row.row_set, row.rows, row.lm or ""), {})
            values = group.setdefault(row.system.removesuffix(f"+{tag(key, value)}"), {})
            before = [values[value]] if value in values else []
            values[value] = merge(before, [row])[-1]
    return [_sweep(*group, lines) for group, lines in sorted(groups.items(), key=lambda item: item[0])]


def _sweep(key: str, variant: str, row_set: str, count: int, lm: str, lines: Lines) -> Sweep:
    details = [variant, f"LM {lm}", f"{count:,} rows {row_set}"]
    title = f"{key} ({', '.join(filter(None, details))})"
    places = _places(key, lines)
    ordered = {
        system: {value: lines[system][value] for value in places if value in lines[system]}
        for system in sorted(lines)
    }
    label = "tuning rows" if key == ROWS else short(key)
    ticks = None if key == ROWS else places
    panels = {
        panel: partial(_plot, ordered, places, metric, label, ticks)
        for panel, metric in (("AUC", "auc"), ("seconds", "tuning_seconds"))
    }
    return Sweep(title, sheet(panels), _table(key, ordered))


def _places(key: str, lines: Lines) -> dict[str, float]:
    """Value -> where it stands, ascending; where one is a word, they stand side by side."""
    x = {value: _x(key, value, row) for points in lines.values() for value, row in points.items()}
    numbers = {value: place for value, place in x.items() if place is not None}
    if len(numbers) < len(x):
        return {value: float(place) for place, value in enumerate(sorted(x))}
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


def _x(key: str, value: str, row: ResultRow) -> float | None:
    """Where a point stands: its value, a subsample by its rows; None of what is no number."""
    if key == ROWS:
        return row.metrics["tuning_rows"]
    try:
        return float(value)
    except ValueError:
        return None


def _plot(
    lines: Lines,
    places: dict[str, float],
    metric: str,
    label: str,
    ticks: dict[str, float] | None,
    axis: Axes,
) -> None:
    for system, points in lines.items():
        values = [row.metrics.get(metric) for row in points.values()]
        drawn = [math.nan if value is None else value for value in values]
        axis.plot([places[value] for value in points], drawn, marker="o", markersize=3, label=system)
    if metric == "auc":
        crm = {value: row.crm_auc_same_rows for points in lines.values() for value, row in points.items()}
        known = sorted((places[value], auc) for value, auc in crm.items() if auc is not None)
        axis.plot([x for x, _ in known], [auc for _, auc in known], "--", color=GRAY, label="the gate's CRM")
    axis.legend(frameon=False)
    axis.set_xlabel(label)
    if min(places.values()) > 0 and max(places.values()) >= 4 * min(places.values()):
        axis.set_xscale("log")
    if ticks is not None:
        axis.set_xticks(list(ticks.values()), list(ticks))
        axis.xaxis.set_minor_locator(NullLocator())


def _table(key: str, lines: Lines) -> ResultTable:
    heading = ["system", short(key), "tuning rows", "AUC", "log loss", "CRM AUC", "seconds"]
    heading += ["weights that train", "prompt tokens", "difference", "against"]
    cells = []
    for system, points in lines.items():
        for value, row in points.items():
            seeds = f", {len(row.seeds)} seeds" if len(row.seeds) > 1 else ""
            cells.append([
                system + seeds,
                value,
                _cost(row, "rows"),
                number(row.metrics.get("auc")),
                number(row.metrics.get("logloss")),
                number(row.crm_auc_same_rows),
                _cost(row, "seconds"),
                _cost(row, "trainable"),
                _cost(row, "tokens"),
                interval(row.delta, row.interval95),
                (row.paired_with or "").partition("+")[0],
            ])  # fmt: skip
    return ResultTable("", heading, cells, set())


def _cost(row: ResultRow, name: str) -> str:
    """What tuning took, in words; empty where it is not known."""
    figure = row.metrics.get(f"tuning_{name}")
    return "" if figure is None else f"{figure:,.0f}"
