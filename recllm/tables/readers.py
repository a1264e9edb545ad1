"""Opens the files of a table, text, parquet or JSON lines, so that a row can be named by file and line."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recllm.tables import jsonl
from recllm.tables.config import FileSource
from recllm.tables.delimited import Delimited, Dialect, inspect

PARQUET = (".parquet", ".pq")
TEXT = (".csv", ".tsv", ".txt", ".dat")
JSON = (".jsonl", ".ndjson")
AT = "@at"
"""Column with the place of a row: the file's number times 2^40, and the row in it."""
SHIFT = 40
"""Bits of a place that hold the row."""


@dataclass(frozen=True)
class File:
    """One file of a table.

    Attributes:
        display_name: its path as the user gave it.
        rows: its rows; empty lines of text are among them, broken ones are not.
        names: the name in the file of each column of the frame that was asked for by role.
        frame: `@at`, the roles (as `@role`), and the other columns under their own names; text as it stands.
        delimited: how its text lies in lines; None for parquet and JSON lines.
    """

    display_name: str
    rows: int
    names: dict[str, str]
    frame: pl.LazyFrame
    delimited: Delimited | None

    @property
    def broken(self) -> int:
        """Lines that cannot be read and were left out."""
        return 0 if self.delimited is None else len(self.delimited.broken)

    def place(self, at: int) -> str:
        """`clicks.csv line 7` or `clicks.parquet row 6` of the row at this place."""
        row = at & ((1 << SHIFT) - 1)
        if self.delimited is None:
            return f"{self.display_name} row {row + 1}"
        return f"{self.display_name} line {self.delimited.line(row)}"

    def value(self, at: int, role: str) -> object:
        """What the file holds in that row in the column of a role."""
        return self.frame.filter(pl.col(AT) == at).select(f"@{role}").collect().item()


def file_of(files: list[File], at: int) -> File:
    """The file in which a place lies."""
    return files[at >> SHIFT]


def open_files(
    table: str,
    source: FileSource,
    base: Path,
    roles: Mapping[str, tuple[str, str]],
    scratch: Path,
    rest: bool,
    drop: bool = False,
    first: int = 0,
) -> list[File]:
    """Opens a table's file, or all files of its folder in the order of their names.

    Args:
        table: events, valid, test, items or users: the section, for messages.
        source: path and form.
        base: where a relative path starts.
        roles: role -> its configuration key and the name of its column; where that is empty, there is none.
        scratch: a folder for copies.
        rest: whether the other columns are wanted too.
        drop: whether lines that cannot be read are left out.
        first: number of the first file, where others of the table were opened before.

    Raises:
        ValueError: nothing is there, a file cannot be read, is empty, or lacks a column.
    """
    names = {role: name for role, (_, name) in roles.items() if name}
    files = []
    for number, (path, display_name) in enumerate(_paths(table, source.path, base), start=first):
        delimited = None
        if _kind(path) in PARQUET:
            frame, columns, rows = _scan_parquet(path, display_name)
        elif _kind(path) in JSON:
            frame, columns, rows = _scan_json(path, display_name)
        else:
            separator = source.separator or ("\t" if _kind(path) == ".tsv" else ",")
            section = f"source.{table}"
            dialect = Dialect(
                separator, source.quote, source.encoding, tuple(source.columns), section, source.escape
            )
            delimited = inspect(path, dialect, scratch / f"{table}-{number}.csv", display_name, drop)
            frame, columns, rows = _scan_text(delimited, [text for text in source.nulls if text is not None])
        read_as = frame.collect_schema().names()
        chosen = [
            pl.col(read_as[find(name, columns, roles[role][0], display_name)]).alias(f"@{role}")
            for role, name in names.items()
        ]
        if rest:
            others = [place for place, name in enumerate(columns) if name and name not in names.values()]
            chosen += [pl.col(read_as[place]).alias(columns[place]) for place in others]
        frame = frame.select(chosen).with_row_index(AT)
        frame = frame.with_columns(pl.col(AT).cast(pl.Int64) + (number << SHIFT))
        files.append(File(display_name, rows, names, frame, delimited))
    if not sum(file.rows for file in files):
        wanted = f"events of {table}" if table in ("valid", "test") else table
        raise ValueError(f"{files[0].display_name} has no rows, wanted the {wanted}")
    return files


def open_text(path: Path, display_name: str, dialect: Dialect, copy: Path, columns: list[str]) -> File:
    """Opens one text file, of which these columns are wanted, each as a role of its own name.

    Raises:
        ValueError: the file cannot be read, is empty, or lacks a column.
    """
    delimited = inspect(path, dialect, copy, display_name)
    frame, present, rows = _scan_text(delimited, [])
    read_as = frame.collect_schema().names()
    chosen = [pl.col(read_as[find(name, present, "", display_name)]).alias(f"@{name}") for name in columns]
    numbered = frame.select(chosen).with_row_index(AT).with_columns(pl.col(AT).cast(pl.Int64))
    return File(display_name, rows, {name: name for name in columns}, numbered, delimited)


def _paths(table: str, path: str, base: Path) -> list[tuple[Path, str]]:
    """The files of a table, each with its path from `base`, as it is shown."""
    whole = base / Path(path).expanduser()
    key = f"source.{table}.path"
    if whole.is_file():
        files = [whole]
    elif whole.is_dir():
        files = sorted(
            file
            for file in whole.rglob("*")
            if file.is_file()
            and not any(part.startswith((".", "_")) for part in file.relative_to(whole).parts)
        )
        if not files:
            raise ValueError(f"{whole} ({key}) is an empty folder, wanted files of the {table}")
    else:
        raise ValueError(
            f"{whole} ({key}) does not exist, wanted a file or a folder; relative paths start at RAW=<folder>"
        )
    kinds = {_kind(file) for file in files}
    if unknown := [file for file in files if _kind(file) not in (*PARQUET, *TEXT, *JSON)]:
        raise ValueError(
            f"{unknown[0]} ({key}) is of no known kind, wanted one of {' '.join((*TEXT, *PARQUET, *JSON))}"
        )
    if len(kinds) > 1:
        raise ValueError(
            f"{whole} ({key}) holds files of several kinds, {', '.join(sorted(kinds))}; wanted one"
        )
    return [(file, str(Path(path) / file.relative_to(whole)) if file != whole else path) for file in files]


def _kind(file: Path) -> str:
    return (Path(file.stem) if file.suffix == ".gz" else file).suffix.lower()


def _scan_parquet(path: Path, display_name: str) -> tuple[pl.LazyFrame, list[str], int]:
    try:
        frame = pl.scan_parquet(path, glob=False, hive_partitioning=False)
        columns = frame.collect_schema().names()
        rows = frame.select(pl.len()).collect().item()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(
            f"{display_name} is no parquet file ({_first_line(error)}); get the file again"
        ) from error
    return frame, columns, rows


def _scan_json(path: Path, display_name: str) -> tuple[pl.LazyFrame, list[str], int]:
    """The lines of a file, each an object; a key that some lines lack is null there."""
    lines = glob.escape(str(path))
    try:
        with jsonl.faults(path, {"": pl.String()}):
            schema = pl.scan_ndjson(lines, infer_schema_length=None).collect_schema()
            frame = pl.scan_ndjson(lines, schema=schema)
            rows = frame.select(pl.len()).collect().item()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(
            f"{display_name} is no file of JSON lines ({_first_line(error)}); get the file again"
        ) from error
    return frame, schema.names(), rows


def _scan_text(file: Delimited, nulls: list[str]) -> tuple[pl.LazyFrame, list[str], int]:
    frame = pl.scan_csv(
        file.path,
        separator=file.dialect.separator,
        quote_char=file.dialect.quote or None,
        has_header=not file.dialect.columns,
        infer_schema=False,
        null_values=nulls or None,
        glob=False,
    )
    return frame, file.columns, file.rows


def find(name: str, columns: list[str], key: str, display_name: str) -> int:
    """Place of the column of that name.

    Args:
        name: of the column.
        columns: names of all.
        key: of the configuration that gives the name, for messages; empty: none does.
        display_name: the file's name in messages.

    Raises:
        ValueError: there is no such column, or there are several.
    """
    given_by = f" ({key})" if key else ""
    if columns.count(name) == 1:
        return columns.index(name)
    if columns.count(name):
        raise ValueError(
            f"{display_name} has {columns.count(name)} columns {name!r}{given_by}, wanted one; "
            "rename the others"
        )
    if key and len(columns) == 1 and (others := [sign for sign in ",;\t|" if sign in columns[0]]):
        section = ".".join(key.split(".")[:2])
        raise ValueError(
            f"{display_name} has one column, {columns[0]!r}, wanted {name!r} ({key}) and others; "
            f"it looks like {section}.separator: {others[0]!r}"
        )
    near = difflib.get_close_matches(name, columns, 1, 0.5)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise ValueError(f"{display_name} has columns {', '.join(columns)}, wanted also {name!r}{given_by}{hint}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
