"""Sweeps: one key at several values, AUC and cost beside one another, of whatever points were evaluated."""

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
from recllm.pipeline.stage_file import StageFile
from recllm.report.sheet import GRAY, sheet

FILE = "rows.json"
Lines = dict[str, dict[str, ResultRow]]
"""System -> value of the key -> its row."""


@dataclass(frozen=True)
class Sweep:
    """Points that differ in one key only.

    Attributes:
        title: the key, variant, LM and rows.
        image: AUC and seconds against the key, a `data:` URI.
        view: the table; its last column holds words.
    """

    title: str
    image: str
    view: ResultTable


def sweeps(folder: Path) -> list[Sweep]:
    """All sweeps among a data set's finished evaluations.

    Points belong together if they are of one variant (the gate's CRM, vectors, experiment), on the same rows
    with the same LM; seeds are averaged as in every table.

    Args:
        folder: `artifacts/<dataset>`.
    """
    found: dict[tuple[str, str, str, int, str], Lines] = {}
    for path in sorted(folder.glob(f"evaluate/*/{MANIFEST}")):
        point = StageFile.read(path.parent).sweep
        if not point:
            continue
        at = tag(point["key"], point["value"])
        for row in read(path.parent / FILE):
            system = row.system.removesuffix(f"+{at}")
            if "tuning_rows" not in row.metrics:
                continue
            same = point["key"], row.variant or "", row.row_set, row.rows, row.lm or ""
            group = found.setdefault(same, {})
            values = group.setdefault(system, {})
            before = [values[point["value"]]] if point["value"] in values else []
            values[point["value"]] = merge(before, [row])[-1]
    return [_sweep(*group, lines) for group, lines in sorted(found.items(), key=lambda item: item[0])]


def _sweep(key: str, variant: str, row_set: str, count: int, lm: str, lines: Lines) -> Sweep:
    details = [variant, f"LM {lm}", f"{count:,} rows {row_set}"]
    title = f"{key} ({', '.join(filter(None, details))})"
    x = {value: _x(key, value, row) for points in lines.values() for value, row in points.items()}
    if None in x.values():  # a word among the values: they stand side by side
        places = {value: float(place) for place, value in enumerate(sorted(x))}
    else:
        places = {value: x[value] or 0.0 for value in sorted(x, key=lambda value: x[value] or 0.0)}
    named = None if key == ROWS else places
    ordered = {
        system: {value: lines[system][value] for value in places if value in lines[system]}
        for system in sorted(lines)
    }
    panels = {
        panel: partial(_plot, ordered, places, metric, "tuning rows" if key == ROWS else short(key), named)
        for panel, metric in (("AUC", "auc"), ("seconds", "tuning_seconds"))
    }
    return Sweep(title, sheet(panels), _view(key, ordered))


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
    named: dict[str, float] | None,
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
    if named is not None:
        axis.set_xticks(list(named.values()), list(named))
        axis.xaxis.set_minor_locator(NullLocator())


def _view(key: str, lines: Lines) -> ResultTable:
    heading = ["system", short(key), "tuning rows", "AUC", "log loss", "CRM AUC", "seconds"]
    heading += ["weights that train", "prompt tokens", "difference", "against"]
    cells = []
    for system, points in lines.items():
        for value, row in points.items():
            costs = [row.metrics.get(f"tuning_{name}") for name in ("rows", "seconds", "trainable", "tokens")]
            rows, *cost = ("" if figure is None else f"{figure:,.0f}" for figure in costs)
            seeds = f", {len(row.seeds)} seeds" if len(row.seeds) > 1 else ""
            scores = (row.metrics.get("auc"), row.metrics.get("logloss"), row.crm_auc_same_rows)
            against = (row.paired_with or "").partition("+")[0]
            line = [
                system + seeds,
                value,
                rows,
                *map(number, scores),
                *cost,
                interval(row.delta, row.interval95),
                against,
            ]
            cells.append(line)
    return ResultTable("", heading, cells, set())
