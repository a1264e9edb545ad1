"""What it cost: seconds and bytes of the stages, milliseconds and weights of the systems."""

from __future__ import annotations

from collections.abc import Iterable

from recllm.evaluation.results import ResultRow, by_table
from recllm.evaluation.tables import ResultTable, table_title
from recllm.pipeline.finished import Finished

COLUMNS = {
    "milliseconds": ("ms a user", "{:,.2f}"),
    "tuning_rows": ("tuning rows", "{:,.0f}"),
    "tuning_tokens": ("tuning tokens", "{:,.0f}"),
    "tuning_trainable": ("trainable weights", "{:,.0f}"),
    "tuning_seconds": ("tuning seconds", "{:,.0f}"),
}
"""Metric -> its heading and its form."""


def cost_tables(rows: Iterable[ResultRow], stages: Iterable[Finished]) -> list[ResultTable]:
    """Of the stages one table, and one for each table of results whose systems say what they cost."""
    tables = []
    made = list(stages)
    if made:
        tables.append(_stage_table(made))
    costing = (row for row in rows if any(row.metrics.get(name) is not None for name in COLUMNS))
    return tables + [_system_table(group) for group in by_table(costing)]


def _size(stage: Finished) -> str:
    """Of all outputs of a stage together."""
    return f"{sum(int(output['bytes']) for output in stage.manifest.outputs) / 1e6:,.1f} MB"


def _stage_table(stages: list[Finished]) -> ResultTable:
    cells = [[stage.name, f"{stage.manifest.seconds:,.0f}", _size(stage)] for stage in stages]
    cells.append(["all", f"{sum(stage.manifest.seconds for stage in stages):,.0f}", ""])
    return ResultTable("Stages", ["stage", "seconds", "size"], cells, set())


def _system_table(rows: list[ResultRow]) -> ResultTable:
    names = [name for name in COLUMNS if any(row.metrics.get(name) is not None for row in rows)]
    cells = [[row.label, *(_shown(row, name) for name in names)] for row in rows]
    heading = ["system", *(COLUMNS[name][0] for name in names)]
    return ResultTable(table_title(rows[0]), heading, cells, set())


def _shown(row: ResultRow, name: str) -> str:
    value = row.metrics.get(name)
    return "" if value is None else COLUMNS[name][1].format(value)
