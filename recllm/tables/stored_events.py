"""The event store of the HTTP service as a file of a data set's events."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from recllm.errors import ConfigError, StageError
from recllm.tables.config import EventsSource, SourceConfig
from recllm.tables.readers import AT, SHIFT, File

STORED_LABEL = "@stored_label"
"""Column of the label that the service was told, int8; it stands above what `source.label` says."""


@dataclass(frozen=True)
class StoredEvents(File):
    """A file whose rows lie in a database, in the order of time."""

    def place(self, at: int) -> str:
        """`sqlite:///events.db event 7` of the row at this place."""
        return f"{self.display_name} event {(at & ((1 << SHIFT) - 1)) + 1}"


def open_stored(config: SourceConfig, scratch: Path, number: int) -> StoredEvents:
    """Copy what a store holds, and open it as a file of the events.

    Args:
        config: names the store; whether ratings and times are read is said by the keys of the events' own
            columns.
        scratch: a folder for the copy.
        number: of the file, among those of the events.

    Returns:
        A file with the columns `@user`, `@item`, `STORED_LABEL` and, where they are read, `@rating` and
        `@timestamp`.

    Raises:
        ValueError: the store cannot be opened or read.
    """
    # A data set without a store needs no database's packages.
    try:
        from recllm.tables.event_store import SCHEMA, open_store, parse_url, read_events, shown
    except ModuleNotFoundError as error:
        raise ValueError(
            f"source.events.store needs the package {error.name}; pip install 'recllm[serve]'"
        ) from error
    url = config.events.store
    folder = scratch / "stored-events"
    folder.mkdir()
    rows = 0
    pl.DataFrame(schema=SCHEMA).write_parquet(folder / "0.parquet")
    try:
        display_name = shown(parse_url(url))
        engine = open_store(url)
    except (ConfigError, StageError) as error:
        raise ValueError(f"source.events.store: {error}") from error
    try:
        for part, table in enumerate(read_events(engine), start=1):
            table.write_parquet(folder / f"{part}.parquet")
            rows += table.height
    finally:
        engine.dispose()
    paths = sorted(folder.iterdir(), key=lambda path: int(path.stem))
    wanted = {"user": "user", "item": "item"}
    if config.events.rating:
        wanted["rating"] = "rating"
    if config.events.timestamp:
        wanted["timestamp"] = "timestamp"
    frame = pl.scan_parquet(paths).select(
        *(pl.col(column).alias(f"@{role}") for role, column in wanted.items()),
        pl.col("label").alias(STORED_LABEL),
    )
    frame = frame.with_row_index(AT).with_columns(pl.col(AT).cast(pl.Int64) + (number << SHIFT))
    return StoredEvents(display_name, rows, wanted, frame, None)


def as_stored(source: EventsSource) -> EventsSource:
    """How a store writes what a data set's files write in ways of their own: numbers, and seconds."""
    return replace(source, time_unit="seconds", decimal_comma=False)
