"""Delimited files of a known layout: read at polars' speed, and looked through only where something is wrong.

Polars reads what it cannot parse, and what a short line lacks, as null, and says no line. So one pass counts
the rows that cannot be; where there are any, `delimited` and `faults` find the first and name it.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from recllm.data import faults
from recllm.data.delimited import Dialect, names
from recllm.data.faults import Fault
from recllm.data.files import find, open_text

MEND = "mend the file, or give another RAW=<folder or zip>"
Known = Mapping[str, tuple[str, pl.Series]]
_EMPTY = pl.all_horizontal(pl.all().is_null())
_IN_WORDS = {pl.Int64(): "a whole number", pl.Float32(): "a number", pl.String(): "text"}


@dataclass(frozen=True)
class Column:
    """What a column holds in every row.

    Attributes:
        kind: Int64, Float32 or String.
        low: the least number that can be; None: any.
        high: the greatest one; None: any.
    """

    kind: pl.DataType
    low: float | None = None
    high: float | None = None

    @property
    def wanted(self) -> str:
        """In words."""
        limits = (
            f" from {self.low:g} to {self.high:g}" if self.low is not None and self.high is not None else ""
        )
        return _IN_WORDS[self.kind] + limits

    def out_of_range(self, value: pl.Expr) -> pl.Expr:
        """Whether a number, NaN and infinite ones among them, lies outside."""
        if self.low is None or self.high is None:
            return pl.lit(False)
        return ~value.is_between(self.low, self.high)


@dataclass(frozen=True)
class Layout:
    """The columns of a file; others may be there where a first line names them.

    Attributes:
        columns: by their names.
        dialect: how it is written; its `columns` where no line names them.
    """

    columns: Mapping[str, Column]
    dialect: Dialect = field(default_factory=lambda: Dialect(section=""))

    def scan(self, path: Path, text: bytes | None = None) -> pl.LazyFrame:
        """The rows of a file that was checked, lazily.

        Args:
            path: of the file.
            text: its content in UTF-8, if the file itself cannot be read as it is.

        Raises:
            ValueError: the file is empty or lacks a column.
        """
        return self._typed(path, text).filter(~_EMPTY)

    def _typed(self, path: Path, text: bytes | None) -> pl.LazyFrame:
        """Every line as a row, with null for what is no value."""
        present = list(self.dialect.columns) or names(path, self.dialect, str(path))
        for name in self.columns:
            find(name, present, "", str(path))
        kinds = {name: self.columns[name].kind if name in self.columns else pl.String() for name in present}
        frame = pl.scan_csv(
            path if text is None else io.BytesIO(text),
            separator=self.dialect.separator,
            quote_char=self.dialect.quote or None,
            has_header=not self.dialect.columns,
            schema=kinds,
            ignore_errors=True,
            glob=False,
        )
        return frame.select(*self.columns)

    def check(
        self,
        path: Path,
        text: bytes | None = None,
        distinct: Sequence[str] = (),
        known: Known | None = None,
    ) -> dict[str, pl.Series]:
        """Refuses a file with a row that cannot be, in a pass that finds columns' distinct values too.

        Args:
            path: see `scan`.
            text: see `scan`.
            distinct: columns whose values are wanted.
            known: of some of these, what they can be, in words, and the values.

        Returns:
            The values of each column of `distinct`, ascending.

        Raises:
            ValueError: one line with the file, the first such line, its column, what it has and what was
                wanted.
        """
        frame, known = self._typed(path, text), known or {}
        at_fault = [
            pl.col(name).is_null() | column.out_of_range(pl.col(name))
            for name, column in self.columns.items()
        ]
        faulty = pl.any_horizontal(at_fault).fill_null(True).sum()
        queries = [frame.select((~_EMPTY).sum(), faulty=faulty)]
        queries += [frame.select(pl.col(name).drop_nulls().unique().sort()) for name in distinct]
        try:
            count, *values = pl.collect_all(queries, engine="streaming")
        except pl.exceptions.PolarsError as error:
            whole = self._look_through(path, text, known)
            reason = str(error).strip().splitlines()[0]
            raise self._as_it_is(path, whole, reason[:100]) from error
        rows, faulty_rows = count.row(0)
        found = {name: frame.to_series() for name, frame in zip(distinct, values, strict=True)}
        is_strange = any(not found[name].is_in(those.implode()).all() for name, (_, those) in known.items())
        has_text = any(column.kind == pl.String() for column in self.columns.values())
        # A quote that is never closed makes one text of many lines, and no number of any.
        if has_text or is_strange or faulty_rows or not rows:
            whole = self._look_through(path, text, known)
            if whole != rows:
                raise self._as_it_is(path, whole, f"{rows} are found")
        return found

    def _look_through(self, path: Path, text: bytes | None, known: Known) -> int:
        """Raises the error of the first row at fault, if there is one; counts the rows."""
        with tempfile.TemporaryDirectory() as scratch:
            readable = path
            if text is not None:
                readable = Path(scratch) / path.name
                readable.write_bytes(text)
            file = open_text(readable, str(path), self.dialect, Path(scratch) / "copy", list(self.columns))
            causes = [cause for name in self.columns for cause in self._causes(name, known.get(name))]
            empty = pl.all_horizontal(pl.col(f"@{name}").is_null() for name in self.columns)
            found = faults.summary(faults.flagged(file.frame, causes, empty)).collect(engine="streaming")
            return faults.settle("rows", [file], causes, found, drop=False, mend=MEND)["read_rows"]

    def _as_it_is(self, path: Path, rows: int, reason: str) -> ValueError:
        return ValueError(f"{path} has {rows} rows, but {reason}; wanted line feeds as line ends; {MEND}")

    def _causes(self, name: str, known: tuple[str, pl.Series] | None) -> list[Fault]:
        column, text = self.columns[name], pl.col(f"@{name}")
        value = text.cast(column.kind, strict=False)
        causes = [
            Fault("missing", name, text.is_null(), column.wanted),
            Fault("unreadable", name, value.is_null(), column.wanted),
            Fault("out_of_range", name, column.out_of_range(value), column.wanted),
        ]
        if known is not None:
            words, values = known
            causes.append(Fault("unknown", name, ~value.is_in(values.implode()), words))
        return causes
