"""Whether probabilities can be taken at their word: calibration of the systems that answer Yes or No."""

from __future__ import annotations

from collections.abc import Iterable

from recllm.evaluation.results import ResultRow, by_table
from recllm.evaluation.tables import ResultTable, number, table_title


def calibration_tables(rows: Iterable[ResultRow]) -> list[ResultTable]:
    """One table for each table of CTR results, the best calibrated system first.

    Args:
        rows: any rows; those with an ECE are shown.
    """
    measured = (row for row in rows if row.task == "ctr" and row.metrics.get("ece") is not None)
    return [_table(group) for group in by_table(measured)]


def _table(rows: list[ResultRow]) -> ResultTable:
    ordered = sorted(rows, key=lambda row: row.metrics["ece"] or 0.0)
    cells = [[row.label, *(number(row.metrics.get(name)) for name in ("ece", "logloss"))] for row in ordered]
    return ResultTable(table_title(rows[0]), ["system", "ECE", "log loss"], cells, set())
