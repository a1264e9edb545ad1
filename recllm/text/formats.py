"""Format strings over the columns of a table, and what of a text an empty column leaves out.

Within braces stands a column's name letter by letter, with whatever dots, brackets or spaces it has; behind
it there may be a format of Python's, as in `{price:.2f}`. `{{` and `}}` are braces of the text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recllm.errors import ConfigError
from recllm.eventlog.ids import FIRST_ID

DESCRIPTION = "dataset.description"
PROFILE = "wording.profile"
TABLES = {DESCRIPTION: "items", PROFILE: "users"}
"""Key of a format string over a data set's columns -> the table that has them."""
GAP = "unknown"
"""What stands in a line for a column that is empty, where another one of the line is not."""


@dataclass(frozen=True)
class Field:
    """A column's place in a text: its name, and the format behind it, for example `:.2f`; empty: none."""

    column: str
    form: str = ""

    def text(self, value: Any) -> str:
        """The value as it reads here."""
        return ("{0" + self.form + "}").format(value)


Part = str | Field


def parse_format(template: str, columns: Sequence[str], key: str) -> list[Part]:
    """Literal texts and fields of a format string, in order; no two literal ones follow each other.

    Args:
        template: the format string.
        columns: names that may stand in it. Where several fit, the longest is meant.
        key: where it is configured, for errors.

    Raises:
        ConfigError: it names what is no column, or a brace has no other.
    """
    parts: list[Part] = []
    literal = ""
    place = 0
    while place < len(template):
        if template.startswith(("{{", "}}"), place):
            literal += template[place]
            place += 2
        elif template[place] == "{":
            field, place = _field(template, place + 1, columns, key)
            parts += [literal, field] if literal else [field]
            literal = ""
        elif template[place] == "}":
            raise ConfigError(f"{key} has a '}}' that nothing opens: {template!r}; wanted }}}} for a brace")
        else:
            literal += template[place]
            place += 1
    return [*parts, literal] if literal else parts


def _field(template: str, start: int, columns: Sequence[str], key: str) -> tuple[Field, int]:
    """The field that begins behind the brace before `start`, and the place behind its end."""
    named = [column for column in columns if template.startswith(f"{column}}}", start)]
    if named:
        column = max(named, key=len)
        return Field(column), start + len(column) + 1
    end = template.find("}", start)
    if end < 0:
        raise ConfigError(f"{key} has a '{{' that nothing closes: {template!r}; wanted {{{{ for a brace")
    inside = template[start:end]
    formed = [column for column in columns if inside.startswith((f"{column}:", f"{column}!"))]
    if not formed:
        raise ConfigError(f"{key} names {inside!r}; wanted of {', '.join(columns)}")
    column = max(formed, key=len)
    return Field(column, inside[len(column) :]), end + 1


@dataclass(frozen=True)
class Format:
    """A format string, line by line.

    A line whose columns are all empty is left out; where another one of the line is not, an empty one reads
    `GAP`. A line without columns always stands.
    """

    lines: list[list[Part]]

    @classmethod
    def of(cls, template: str, columns: Sequence[str], key: str) -> Format:
        """Read one; arguments and errors as of `parse_format`."""
        lines: list[list[Part]] = [[]]
        for part in parse_format(template, columns, key):
            if isinstance(part, Field):
                lines[-1].append(part)
                continue
            first, *others = part.split("\n")
            lines[-1].append(first)
            lines += [[text] for text in others]
        return cls(lines)

    @property
    def columns(self) -> list[str]:
        """Names of the columns that it needs, sorted."""
        return sorted({part.column for line in self.lines for part in line if isinstance(part, Field)})

    def text(self, values: Mapping[str, Any]) -> str:
        """The text of a row, of which `columns` are given."""
        kept = []
        for line in self.lines:
            empty = [is_gap(values[part.column]) for part in line if isinstance(part, Field)]
            if not empty or not all(empty):
                kept.append("".join(_written(part, values) for part in line))
        return "\n".join(kept)


def _written(part: Part, values: Mapping[str, Any]) -> str:
    if isinstance(part, str):
        return part
    value = values[part.column]
    return GAP if is_gap(value) else part.text(value)


def is_gap(value: Any) -> bool:
    """Whether a cell says nothing: it is null, NaN, or a text of spaces."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def check_formats(templates: Mapping[str, str], folder: Path) -> None:
    """Refuse format strings that name what is no column of the tables in a folder, canonical ones or a log's.

    Args:
        templates: key of `TABLES` -> format string.
        folder: with items.parquet and users.parquet.

    Raises:
        ConfigError: the first one, and which columns there are.
    """
    import polars as pl

    for key, table in TABLES.items():
        Format.of(templates[key], list(pl.read_parquet_schema(folder / f"{table}.parquet")), key)


def shortened(templates: Mapping[str, str], folder: Path) -> list[tuple[str, int, int]]:
    """Of each format string that lacks something: its key, the rows that lack it, and all rows of the table.

    Args:
        templates: key of `TABLES` -> format string.
        folder: of an event log.

    Raises:
        ConfigError: as of `check_formats`.
    """
    import polars as pl

    found = []
    for key, table in TABLES.items():
        frame = pl.read_parquet(folder / f"{table}.parquet")[FIRST_ID:]
        names = Format.of(templates[key], frame.columns, key).columns
        count = sum(any(map(is_gap, row)) for row in frame.select(names).rows())
        if count:
            found.append((key, count, frame.height))
    return found
