"""How rows of results look: tables for a terminal and for the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recllm.evaluation.results import HEADLINE, ResultRow, by_system, by_table
from recllm.evaluation.slices import SLICES

COLUMNS = {
    "ctr": {"auc": "AUC", "logloss": "log loss", "per_user_auc": "user AUC", "ece": "ECE"},
    "ranking": {"hr@1": "HR@1", "hr@5": "HR@5", "ndcg@10": "NDCG@10", "mrr": "MRR", "valid_ratio": "valid"},
    "next": {
        "hr@1": "HR@1",
        "hr@10": "HR@10",
        "ndcg@10": "NDCG@10",
        "mrr": "MRR",
        "hr@100": "HR@100",
        "recall@500": "recall@500",
        "ndcg@10/found": "NDCG@10, if found",
        "ndcg@10/cold": "NDCG@10, cold",
        "coverage@10": "coverage@10",
        "popularity_bias@10": "popularity@10",
        "milliseconds": "ms a user",
    },
}
"""Task -> metrics that the report shows, with their headings; every other metric is in the file only."""

NARROW = {
    "ctr": ("auc", "logloss"),
    "ranking": ("hr@1", "ndcg@10", "valid_ratio"),
    "next": ("hr@10", "ndcg@10", "recall@500"),
}
"""Those of them that fit a terminal of 100 columns."""
LOWER_IS_BETTER = ("logloss", "ece", "milliseconds")
NEITHER_IS_BETTER = ("popularity_bias@10",)
SAID_IF_ABSENT = ("ctr", "ranking")
"""Tasks of which it is said where nothing was measured, unless the whole catalog was."""
LEAST_P = 0.001999
"""The least p-value of the tracked figures, rounded up: 2 / 1,001, where none of 1,000 draws is beyond 0."""


@dataclass(frozen=True)
class ResultTable:
    """One table ready to be shown: systems that are comparable, i.e. the same task, rows and candidates.

    Attributes:
        title: task, row set, candidates, variant.
        heading: column headings; the first column is the system.
        cells: `[lines][columns]` text.
        best: `(line, column)` of the best value of each metric.
    """

    title: str
    heading: list[str]
    cells: list[list[str]]
    best: set[tuple[int, int]]


def result_tables(rows: Iterable[ResultRow], task: str, narrow: bool = False) -> list[ResultTable]:
    """The tables of a task, one for each (variant, row set, candidates).

    Args:
        rows: any rows.
        task: `ctr`, `ranking` or `next`.
        narrow: only the metrics that fit a terminal.

    Returns:
        Tables in order of variant, row set and candidates.
    """
    names = [name for name in COLUMNS[task] if not narrow or name in NARROW[task]]
    return [_result_table(group, names) for group in by_table(row for row in rows if row.task == task)]


def slice_tables(rows: Iterable[ResultRow]) -> list[ResultTable]:
    """AUC by how much training has seen of the rows' users and items, one table for each variant and row set.

    Args:
        rows: any rows; those of the CTR task that hold metrics of slices are shown.

    Returns:
        Tables in order of variant and row set; a heading names the slice, its rows and their largest count.
    """
    sliced = (row for row in rows if any(name.startswith("auc/") for name in row.metrics))
    return [_slice_table(group) for group in by_table(sliced)]


def difference_tables(rows: Iterable[ResultRow]) -> list[ResultTable]:
    """Differences to further systems, one table for each table of results; a column a system."""
    tables = []
    for group in by_table(row for row in rows if row.against):
        others = sorted({other for row in group for other in row.against}, key=by_system)
        cells = [[row.label, *(_against(row, other) for other in others)] for row in group]
        tables.append(ResultTable(table_title(group[0]), ["system", *others], cells, set()))
    return tables


def _against(row: ResultRow, other: str) -> str:
    """The difference to another system with its interval; empty where the two are not compared."""
    if other not in row.against:
        return ""
    return interval(row.against[other]["delta"], row.against[other]["interval95"])


def _slice_table(rows: list[ResultRow]) -> ResultTable:
    names = [name for name in SLICES if any(row.metrics.get(f"auc/{name}") is not None for row in rows)]
    heading = ["system", "rows", *(_slice_heading(rows[0], name) for name in names)]
    cells = []
    for row in rows:
        figures = [number(row.metrics.get(f"auc/{name}")) for name in names]
        cells.append([row.label, f"{row.rows:,}", *figures])
    best = set()
    if len(rows) > 1:
        for place, name in enumerate(names):
            values = [row.metrics.get(f"auc/{name}") for row in rows]
            top = max(value for value in values if value is not None)
            best |= {(line, 2 + place) for line, value in enumerate(values) if value == top}
    return ResultTable(f"AUC by slice, rows {rows[0].row_label}", heading, cells, best)


def _slice_heading(row: ResultRow, name: str) -> str:
    """A slice with its largest count of training events, if it has one, and its rows."""
    count = row.metrics.get(f"rows/{name}") or 0
    upto = row.metrics.get(f"upto/{name}")
    edge = "" if upto is None else f" (<= {upto:,.0f})"
    return f"{SLICES[name]}{edge}, {count:,.0f} rows"


def print_table(rows: Sequence[ResultRow], console: Console | None = None) -> None:
    """Print the tables of all tasks: 100 columns, plain text when piped (best marked by `*`).

    Args:
        rows: any rows.
        console: where to; a new one on standard output by default.
    """
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=100)
    over_catalog = any(row.task == "next" for row in rows)
    for task in HEADLINE:
        tables = result_tables(rows, task, narrow=True)
        if not tables and task in SAID_IF_ABSENT and not over_catalog:
            console.print(f"No {task} results.")
        for result_table in tables:
            console.print(_printed(result_table, console))
    console.print(
        "Differences: headline metric (AUC, HR@1, NDCG@10), 95 % interval by users (bootstrap), not by seeds."
    )


def _printed(table: ResultTable, console: Console) -> Table:
    """A table as rich prints it. Only the system may wrap: its label has spaces, others would lose digits."""
    printed = Table(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    printed.padding = (0, 1, 0, 0)
    for place, heading in enumerate(table.heading):
        right = 0 < place < len(table.heading) - 2
        printed.add_column(heading, justify="right" if right else "left", no_wrap=place > 0, overflow="fold")
    for line, cells in enumerate(table.cells):
        marked = [_marked(text, (line, place) in table.best, console) for place, text in enumerate(cells)]
        printed.add_row(*marked)
    return printed


def _marked(text: str, best: bool, console: Console) -> Text:
    if not best:
        return Text(text)
    return Text(text, style="bold") if console.is_terminal else Text(f"{text}*")


def _result_table(rows: list[ResultRow], wanted: list[str]) -> ResultTable:
    task = rows[0].task
    names = [name for name in wanted if any(row.metrics.get(name) is not None for row in rows)]
    beside_crm = any(row.crm_auc_same_rows is not None for row in rows)
    heading = ["system", "rows", *(COLUMNS[task][name] for name in names)]
    if beside_crm:
        heading.append("CRM AUC")
    heading += ["difference", "against"]
    cells = []
    for row in rows:
        line = [row.label, f"{row.rows:,}", *(number(row.metrics.get(name)) for name in names)]
        if beside_crm:
            line.append(number(row.crm_auc_same_rows))
        line += [interval(row.delta, row.interval95), row.paired_with or ""]
        cells.append(line)
    best = set()
    for place, name in enumerate(names):
        values = [row.metrics.get(name) for row in rows]
        measured = [value for value in values if value is not None and not math.isnan(value)]
        if len(measured) > 1 and name not in NEITHER_IS_BETTER:
            top = min(measured) if name in LOWER_IS_BETTER else max(measured)
            best |= {(line, 2 + place) for line, value in enumerate(values) if value == top}
    return ResultTable(table_title(rows[0]), heading, cells, best)


def table_title(row: ResultRow) -> str:
    """Title of the table that a row stands in: task, candidates, row set, variant."""
    kind = "CTR"
    if row.task == "ranking":
        kind = f"Ranking, {row.candidates or 'unnamed'} candidates"
    if row.task == "next":
        offered = "items new to the user" if row.candidates == "unseen" else "all items"
        kind = f"Next item of the whole catalog, {offered}, split {row.split}"
    return f"{kind}, rows {row.row_label}"


def number(value: float | None, sign: str = "") -> str:
    """`.8123`: four places, no zero before the point."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:{sign}.4f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:{sign}.4f}"


def interval(delta: float | None, interval95: Sequence[float] | None) -> str:
    """`+.0123 [+.0010, +.0220]`: a difference and its interval, as far as they are known."""
    if delta is None and interval95 is None:
        return ""
    bounds = "" if interval95 is None else f"[{', '.join(number(b, '+') for b in interval95)}]"
    return f"{number(delta, '+')} {bounds}".strip()


def p_values(values: Sequence[float | None]) -> str:
    """`p = .004`, or over seeds `p .004 to .046`, the least and the largest; see `p_value`."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    least, largest = p_value(min(known)), p_value(max(known))
    if least != largest:
        return f"p {least} to {largest}"
    return f"p {largest}" if largest.startswith("<=") else f"p = {largest}"


def p_value(value: float) -> str:
    """Two places, three below a tenth; `<= .002` where the bootstrap's draws can tell no smaller one."""
    if value <= LEAST_P:
        return f"<= {LEAST_P:.3f}".replace("0.", ".")
    text = f"{value:.3f}" if value < 0.0995 else f"{value:.2f}"
    return text.removeprefix("0")
