"""Delimited files of a known layout: read at polars' speed, and looked through only where something is wrong.

Polars reads what it cannot parse, and what a short line lacks, as null, and names no line. So the pass that
reads the rows counts those that cannot be; where there are any, `delimited` and `faults` find the first and
name it.
"""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from recllm.tables import faults
from recllm.tables.delimited import Dialect, names
from recllm.tables.faults import Fault
from recllm.tables.readers import AT, File, find, open_text

MEND = "mend the file, or give another RAW=<folder or zip>"
Allowed = Mapping[str, tuple[str, pl.Series]]
"""Of some columns what they can be, in words, and the values."""
_EMPTY = pl.all_horizontal(pl.all().is_null())
_IN_WORDS = {pl.Int64(): "a whole number", pl.Float32(): "a number", pl.String(): "text"}


@dataclass(frozen=True)
class Column:
    """What a column holds in every row.

    Attributes:
        kind: Int64, Float32 or String.
        low: the least number that can be; None: any.
        high: the greatest one; None: any.
        unique: whether no two rows have the same.
    """

    kind: pl.DataType
    low: float | None = None
    high: float | None = None
    unique: bool = False

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

    def read(
        self,
        path: Path,
        text: bytes | None = None,
        allowed: Allowed | None = None,
        distinct: Sequence[str] = (),
        then: Callable[[pl.LazyFrame], pl.LazyFrame] = lambda rows: rows,
    ) -> tuple[pl.DataFrame, dict[str, pl.Series]]:
        """Reads a file, and refuses it where a row cannot be.

        A line ends with LF, CR LF or CR, whichever stands there. A file in which a CR ends one without an LF
        is held in memory as text, as polars knows no such line; others are streamed.

        Args:
            path: of the file.
            text: its content in UTF-8, if the file itself cannot be read as it is.
            allowed: of some columns what they can be; None: anything that their kind can be.
            distinct: other columns whose values are wanted.
            then: what is done with the rows in the same pass, e.g. to write them; what it has written counts
                only once this has returned.

        Returns:
            What `then` gives, the rows themselves where there is none; of each column of `allowed` and
            `distinct` its values, ascending.

        Raises:
            ValueError: one line: the file is empty or lacks a column, or the file, the first row that cannot
                be, its column, what it has and what was wanted.
        """
        frame = self._typed(path, text)
        allowed = allowed or {}
        at_fault = [
            pl.col(name).is_null() | column.out_of_range(pl.col(name))
            for name, column in self.columns.items()
        ]
        faulty = pl.any_horizontal(at_fault).fill_null(True).sum()
        columns = [*allowed, *(name for name in distinct if name not in allowed)]
        queries = [then(frame.filter(~_EMPTY)), frame.select((~_EMPTY).sum(), faulty=faulty)]
        queries += [frame.select(pl.col(name).drop_nulls().unique().sort()) for name in columns]
        try:
            with warnings.catch_warnings():  # of what is looked into below
                warnings.filterwarnings("ignore", "CSV malformed", UserWarning)
                read, count, *values = pl.collect_all(queries, engine="streaming")
        except pl.exceptions.PolarsError as error:
            _, text = self._look_through(path, text, allowed)
            if text is None:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"{path} cannot be read ({reason[:100]}); {MEND}") from error
            return self.read(path, text, allowed, distinct, then)
        rows, faulty_rows = count.row(0)
        distinct_values = {name: frame.to_series() for name, frame in zip(columns, values, strict=True)}
        has_others = any(
            not distinct_values[name].is_in(possible.implode()).all()
            for name, (_, possible) in allowed.items()
        )
        # A quote that is never closed makes one text of many lines, and no number of any.
        needs_a_look = any(column.kind == pl.String() or column.unique for column in self.columns.values())
        if needs_a_look or has_others or faulty_rows or not rows:
            whole, text = self._look_through(path, text, allowed)
            if text is not None:
                return self.read(path, text, allowed, distinct, then)
            if whole != rows:
                raise ValueError(f"{path} was read as {rows} rows, wanted its {whole}; {MEND}")
        return read, distinct_values

    def _look_through(self, path: Path, text: bytes | None, allowed: Allowed) -> tuple[int, bytes | None]:
        """Raises the error of the first row at fault, if there is one.

        Returns:
            The number of rows; the text with line feeds where it has other line ends than polars knows.
        """
        with tempfile.TemporaryDirectory() as scratch:
            readable = path
            if text is not None:
                readable = Path(scratch) / path.name
                readable.write_bytes(text)
            copy = Path(scratch) / "copy"
            file = open_text(readable, str(path), self.dialect, copy, list(self.columns))
            causes = [cause for name in self.columns for cause in self._causes(name, allowed.get(name), file)]
            empty = pl.all_horizontal(pl.col(f"@{name}").is_null() for name in self.columns)
            summary = faults.summarize(faults.flag(file.frame, causes, empty)).collect(engine="streaming")
            rows = faults.settle("rows", [file], causes, summary, drop=False, mend=MEND)["read_rows"]
            return rows, copy.read_bytes() if copy.exists() else None

    def _causes(self, name: str, allowed: tuple[str, pl.Series] | None, file: File) -> list[Fault]:
        column = self.columns[name]
        text = pl.col(f"@{name}")
        value = text.cast(column.kind, strict=False)
        causes = [
            Fault("missing", name, text.is_null(), column.wanted),
            Fault("unreadable", name, value.is_null(), column.wanted),
            Fault("out_of_range", name, column.out_of_range(value), column.wanted),
        ]
        if allowed is not None:
            words, values = allowed
            causes.append(Fault("unknown", name, ~value.is_in(values.implode()), words))
        if column.unique:

            def wanted(repeated: object) -> str:
                same = file.frame.filter(value == pl.lit(repeated).cast(column.kind))
                place = file.place(same.select(pl.col(AT).min()).collect().item())
                return (
                    f"one that no earlier line has ({place.removeprefix(file.display_name).strip()} has it)"
                )

            causes.append(Fault("repeated", name, ~value.is_first_distinct(), wanted))
        return causes
