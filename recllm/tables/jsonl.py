"""JSON lines, gzipped or not: read lazily, and what is wrong with a file said in one line.

polars reads them as a stream: it maps the file, inflates and parses it block by block, and what it holds
itself stays the same however long the file is (60 MB measured at 0.1 and at 1.2 GB of gzip).
"""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import polars as pl

Schema = Mapping[str, pl.DataType]

BLOCK = 1 << 24
"""Bytes of text that are looked through at a time for the line at fault."""
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)


def scan(path: Path, schema: Schema, number: str | None = None) -> pl.LazyFrame:
    """The lines of a file, lazily; collect them within `faults`.

    Args:
        path: JSON lines, plain or gzipped.
        schema: the keys to read and their types; what else a line has is passed over, what it lacks reads
            null.
        number: name of a column with the line's number, from 1; None: no such column.

    Raises:
        ValueError: the file is empty, or its first line lacks a key.
    """
    with faults(path, schema), _open(path) as file:
        first = file.readline(BLOCK)
    try:
        record = json.loads(first)
    except ValueError:  # no JSON, or no text at all
        record = None
    if not isinstance(record, dict):
        raise ValueError(
            f"{path} line 1 has {_excerpt(first)}, wanted a JSON object; get the file again, or another RAW="
        )
    if lacking := [key for key in schema if key not in record]:
        raise ValueError(
            f"{path} line 1 has {', '.join(record)}, wanted also {', '.join(lacking)}; "
            "point RAW at the right files"
        )
    frame = pl.scan_ndjson(glob.escape(str(path)), schema=dict(schema), row_index_name=number)
    return frame.with_columns(pl.col(number) + 1) if number else frame


@contextmanager
def faults(path: Path, schema: Schema) -> Iterator[None]:
    """Turn a reader's error into one that names the file and the line.

    Raises:
        ValueError: the gzip stream is truncated or corrupt, a line is no JSON object, or a value has another
            type.
    """
    try:
        yield
    except (pl.exceptions.PolarsError, OSError, *BROKEN) as error:
        fault = _fault(path, schema)
        if not fault:
            raise  # of something else: a full disk, say
        raise ValueError(f"{path} {fault}; get the file again, or give another RAW=<folder>") from error


def _fault(path: Path, schema: Schema) -> str:
    """What is wrong with the file, and where; empty if nothing is."""
    number = 0
    rest = b""
    try:
        with _open(path) as file:
            while block := file.read(BLOCK):
                whole, _, rest = (rest + block).rpartition(b"\n")
                fault = _bad_line(whole, schema, number)
                if fault:
                    return fault
                number += whole.count(b"\n") + 1 if whole else 0
    except (OSError, *BROKEN) as error:
        return (
            f"line {number + 1} or after has a truncated or corrupt gzip stream ({error}), wanted a whole one"
        )
    return _bad_line(rest, schema, number)


def _bad_line(text: bytes, schema: Schema, before: int) -> str:
    if not _error(text, schema):
        return ""
    lines = text.split(b"\n")
    first = 0
    end = len(lines)
    while end - first > 1:  # halved, as a call a line takes minutes
        middle = (first + end) // 2
        part = b"\n".join(lines[first:middle])
        if part.strip() and _error(part, schema):
            end = middle
        else:
            first = middle
    reason = _error(lines[first], schema)
    return f"line {before + first + 1} has {_excerpt(lines[first])} ({reason}), wanted a JSON object"


def _error(text: bytes, schema: Schema) -> str:
    try:
        pl.read_ndjson(text, schema=dict(schema))
    except pl.exceptions.PolarsError as error:
        return str(error).splitlines()[0][:160]
    return ""


def _excerpt(line: bytes) -> str:
    return repr(line[:80].decode(errors="replace")) if line.strip() else "nothing"


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if zipped else path.open("rb")  # type: ignore[return-value]
