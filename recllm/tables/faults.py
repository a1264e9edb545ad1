"""Rows of raw files that cannot be used: an error that names the first, or all are left out and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import polars as pl

from recllm.tables.readers import AT, File, file_of

FAULT = "@fault"
EMPTY = 255  # a row in which every wanted column is empty, such as an empty line: no row at all
REPEATED = 254  # a row of items or users that is like an earlier one in everything: the earlier one stands
_LONGEST = 60  # characters of a value in a message
_MEND = "mend the row, or leave such rows out with source.faulty: drop"


class Fault(NamedTuple):
    """A reason why a row cannot be used.

    Attributes:
        reason: its name among the counts.
        role: the column that is at fault, as the files know it.
        condition: true where it is; null counts as false.
        wanted: what should stand there; from the value that does, if it depends on it.
    """

    reason: str
    role: str
    condition: pl.Expr
    wanted: str | Callable[[object], str]


def flag(
    frame: pl.LazyFrame, faults: Sequence[Fault], empty: pl.Expr, repeated: pl.Expr | None = None
) -> pl.LazyFrame:
    """The frame with a column FAULT: 0 for a good row, 1 + its first fault, EMPTY, or REPEATED."""
    code = pl.when(empty).then(pl.lit(EMPTY))
    if repeated is not None:
        code = code.when(repeated).then(pl.lit(REPEATED))  # type: ignore[assignment]
    for number, fault in enumerate(faults, start=1):
        code = code.when(fault.condition).then(pl.lit(number))  # type: ignore[assignment]
    return frame.with_columns(code.otherwise(pl.lit(0)).cast(pl.UInt8).alias(FAULT))


def summarize(frame: pl.LazyFrame) -> pl.LazyFrame:
    """How many rows have each code of FAULT, and the place of the first; one row a code."""
    return frame.group_by(FAULT).agg(rows=pl.len(), first=pl.col(AT).min())


def settle(
    table: str,
    files: list[File],
    faults: Sequence[Fault],
    summary: pl.DataFrame,
    drop: bool,
    mend: str = _MEND,
    explanation: str = "",
) -> dict[str, int]:
    """Turns a summary into counts, or into an error.

    Args:
        table: events, items or users.
        files: where the rows stand.
        faults: as given to `flag`.
        summary: what `summarize` gives, collected.
        drop: whether faulty rows are left out.
        mend: what can be done about a faulty row, for the message.
        explanation: why no row may be left, for the message.

    Returns:
        `read_<table>` without empty lines, and `dropped_<table>_<reason>` for each reason that occurs;
        `broken_line` counts lines, all others rows.

    Raises:
        ValueError: there are faulty rows and `drop` is not set, no row is left, or rows were lost in reading.
    """
    rows = dict(summary.select(FAULT, "rows").iter_rows())
    first = dict(summary.select(FAULT, "first").iter_rows())
    total = sum(file.rows for file in files)
    if sum(rows.values()) != total:
        raise ValueError(
            f"{files[0].display_name} was read as {sum(rows.values())} rows, wanted its {total}; "
            "mend its quotes"
        )
    broken = sum(file.broken for file in files)
    counts = {f"read_{table}": total + broken - rows.get(EMPTY, 0)}
    reasons = {code: fault.reason for code, fault in enumerate(faults, start=1) if code in rows}
    if reasons and not drop:
        code = min(reasons, key=lambda code: first[code])
        more = sum(rows[code] for code in reasons) - 1
        raise ValueError(
            describe(files, faults[code - 1], first[code], mend)
            + (f" ({more} more such rows)" if more else "")
        )
    if REPEATED in rows:
        reasons[REPEATED] = "repeated"
    dropped = {"broken_line": broken} if broken else {}
    dropped |= {reason: rows[code] for code, reason in reasons.items()}
    if not rows.get(0):
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "all are empty"
        reason = f"; {explanation}" if explanation else ""
        raise ValueError(
            f"{files[0].display_name} has no usable row of {total + broken} ({why}), "
            f"wanted the {table}{reason}"
        )
    return counts | {f"dropped_{table}_{reason}": count for reason, count in dropped.items()}


def describe(files: list[File], fault: Fault, at: int, mend: str) -> str:
    """One line on a faulty row: file, line, column, what was found and what was wanted."""
    file = file_of(files, at)
    value = file.value(at, fault.role)
    excerpt = "nothing" if value is None else repr(value)
    if len(excerpt) > _LONGEST:
        excerpt = excerpt[:_LONGEST] + " ..."
    wanted = fault.wanted if isinstance(fault.wanted, str) else fault.wanted(value)
    return f"{file.place(at)}, column {file.names[fault.role]!r}: found {excerpt}, wanted {wanted}; {mend}"
