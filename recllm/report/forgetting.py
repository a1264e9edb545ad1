"""What tuning did to the LM, as a table: text that it forgot, and how far its weights moved."""

from __future__ import annotations

from collections.abc import Iterable

from recllm.evaluation.results import ResultRow, by_table
from recllm.evaluation.tables import ResultTable

COLUMNS = {"text_loss": "text, nats a token", "forgotten": "forgotten", "update": "||dW|| / ||W||"}


def forgetting_tables(rows: Iterable[ResultRow]) -> list[ResultTable]:
    """One table for each row set whose CTR rows hold `text_loss` (see `recllm.lm.forgetting`).

    Args:
        rows: any rows; metrics are means over seeds.

    Returns:
        The untuned LM, and every system that was tuned, with the size of its update by module.
    """
    measured = (row for row in rows if row.task == "ctr" and row.metrics.get("text_loss") is not None)
    return [_table(group) for group in by_table(measured)]


def _table(rows: list[ResultRow]) -> ResultTable:
    modules = sorted({name for row in rows for name in row.metrics if name.startswith("update/")})
    names = COLUMNS | {name: name.partition("/")[2] for name in modules}
    cells = [[row.label, *(_shown(row, name) for name in names)] for row in rows]
    return ResultTable(f"Systems of {rows[0].row_label}", ["system", *names.values()], cells, set())


def _shown(row: ResultRow, name: str) -> str:
    value = row.metrics.get(name)
    if value is None:
        return ""
    return f"{value:+.4f}" if name == "forgotten" else f"{value:.4f}"
