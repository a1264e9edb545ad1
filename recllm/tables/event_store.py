"""The event store of the HTTP service, a database: its tables, how it is opened, how it is read back.

SQLite in a file, for one service process or a few on one machine, or PostgreSQL for many. What is written
there, and by which rules, is told by `recllm.serving.server.events`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from recllm.errors import ConfigError, StageError

WRITES = "recllm_writes"
"""Execution option of connections that write: of SQLite they take the one lock for writing at once."""
WAIT = 30
"""Seconds that a statement waits for a lock, or for an answer of the server."""
BATCH = 100_000
"""Events that are read at once; bounds memory."""

METADATA = sa.MetaData()
_ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
EVENTS = sa.Table(
    "recllm_events",
    METADATA,
    sa.Column("id", _ROW_ID, primary_key=True, autoincrement=True),
    sa.Column("key", sa.Text, nullable=False, unique=True),
    sa.Column("user", sa.Text, nullable=False),
    sa.Column("item", sa.Text, nullable=False),
    sa.Column("rating", sa.Double),
    sa.Column("label", sa.SmallInteger),
    sa.Column("timestamp", sa.BigInteger, nullable=False),
    sa.Column("received", sa.BigInteger, nullable=False),
    sa.Index("recllm_events_of_users", "user", "timestamp", "id"),
    sa.Index("recllm_events_received", "received"),
)
"""What users did, a row an event: `key` makes it one (idempotency), `label` is 1 liked, 0 not, null unknown,
`timestamp` and `received` are Unix seconds: when it happened, and when the service heard of it."""
IMPRESSIONS = sa.Table(
    "recllm_impressions",
    METADATA,
    sa.Column("id", _ROW_ID, primary_key=True, autoincrement=True),
    sa.Column("request", sa.Text, nullable=False, index=True),
    sa.Column("user", sa.Text, nullable=False),
    sa.Column("item", sa.Text, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("score", sa.Double),
    sa.Column("timestamp", sa.BigInteger, nullable=False),
    sa.Column("bundle", sa.Text, nullable=False),
)
"""What was recommended, a row an item of a list: `request` is drawn by the service, `bundle` the digest of
the bundle that answered, `timestamp` the Unix second of the answer."""

SCHEMA = {
    "user": pl.String(),
    "item": pl.String(),
    "rating": pl.Float64(),
    "label": pl.Int8(),
    "timestamp": pl.Int64(),
}
"""What is read of an event."""
EVENT_COLUMNS = [EVENTS.c[name] for name in SCHEMA]


def parse_url(url: str) -> URL:
    """A store's address.

    Args:
        url: `sqlite:///events.db` (relative to the working directory; four slashes: from the root), or
            `postgresql+psycopg://user@host/database`.

    Raises:
        ConfigError: it is neither; a password in it is not repeated.
    """
    wanted = "sqlite:///events.db or postgresql+psycopg://user@host/database"
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(f"the event store's URL cannot be read; wanted {wanted}") from None
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise ConfigError(f"the event store's URL begins with {parsed.drivername}; wanted {wanted}")
    is_file = parsed.database not in (None, "", ":memory:") and not parsed.query.get("uri")
    if parsed.get_backend_name() == "sqlite" and not is_file:
        raise ConfigError(f"the event store's URL {shown(parsed)} names no file; wanted {wanted}")
    return parsed


def shown(url: URL) -> str:
    """A URL as it may be printed: without its password."""
    return url.render_as_string(hide_password=True)


def open_store(url: str, new: bool = False) -> Engine:
    """Connect to a store.

    Args:
        url: as of `parse_url`.
        new: whether its tables are made where they are not there yet.

    Raises:
        ConfigError: the URL cannot be used.
        StageError: nobody answers there, there are no such tables, or they have other columns.
    """
    parsed = parse_url(url)
    is_file = parsed.get_backend_name() == "sqlite"
    if is_file:
        _see_to_file(Path(str(parsed.database)), new)
    try:
        engine = _engine_of_file(parsed) if is_file else _engine_of_server(parsed)
    except ModuleNotFoundError as error:
        raise StageError(
            f"{shown(parsed)} needs the package {error.name}; pip install 'recllm[serve]'"
        ) from error
    try:
        if new:
            _make_tables(engine)
        _check_tables(engine)
    except SQLAlchemyError as error:
        engine.dispose()
        raise StageError(
            f"the event store {shown(parsed)} cannot be opened: {reason_of(error)}; wanted a database that "
            "answers"
        ) from error
    except StageError:
        engine.dispose()
        raise
    return engine


def reason_of(error: SQLAlchemyError) -> str:
    """The first line of what a database said, without the statement and its values."""
    cause: object = error.orig if isinstance(error, DBAPIError) else error
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def read_events(engine: Engine, received: int = 0) -> Iterator[pl.DataFrame]:
    """All events of a store as of one moment, in parts, in the order of time, then as they came.

    Args:
        engine: the store.
        received: Unix second; events that the service received before are left out.

    Returns:
        Tables with the columns of `SCHEMA`.
    """
    wanted = sa.select(*EVENT_COLUMNS).where(EVENTS.c.received >= received)
    wanted = wanted.order_by(EVENTS.c.timestamp, EVENTS.c.id)
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            # Of many events the sort alone may take longer than a statement of the service may.
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        result = connection.execution_options(yield_per=BATCH).execute(wanted)
        for rows in result.partitions():
            yield pl.DataFrame([tuple(row) for row in rows], schema=SCHEMA, orient="row")


def _see_to_file(path: Path, new: bool) -> None:
    """Make an empty database file that its owner alone may read, if there is none.

    Raises:
        StageError: there is none and none is to be made, or it cannot be made.
    """
    if path.is_file():
        return
    if not new:
        raise StageError(f"{path} does not exist; wanted the event store that a service wrote")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise StageError(f"the event store {path} cannot be made: {error.strerror}") from error


def _engine_of_file(url: URL) -> Engine:
    """SQLite with a write-ahead log that is on disk before a transaction ends."""
    engine = sa.create_engine(url, connect_args={"timeout": WAIT})

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin where `begin` below says
        _use_write_ahead_log(connection)
        connection.execute("PRAGMA synchronous = FULL")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that turns from reading to writing fails where another one writes; one that begins
        # with the lock waits for it.
        writes = connection.get_execution_options().get(WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Turn the write-ahead log on; it stays on in the file. SQLite itself does not wait for the lock here."""
    last = time.monotonic() + WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > last:
                raise
            time.sleep(0.01)


def _engine_of_server(url: URL) -> Engine:
    """PostgreSQL whose commits are on disk before they are told, whatever its own default is."""
    engine = sa.create_engine(url, connect_args={"connect_timeout": WAIT}, pool_pre_ping=True)

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.execute(f"SET statement_timeout = '{WAIT}s'")
        setting = "synchronous_commit"
        connection.execute(
            f"SELECT set_config('{setting}', 'on', false) WHERE current_setting('{setting}') = 'off'"
        )
        connection.commit()

    return engine


def _make_tables(engine: Engine) -> None:
    """Make the tables that are not there; of processes that begin at once one makes them."""
    with engine.execution_options(**{WRITES: True}).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(EVENTS.name))))
        METADATA.create_all(connection)


def _check_tables(engine: Engine) -> None:
    """Refuse a database whose tables are others.

    Raises:
        StageError: a table is not there, or lacks a column.
    """
    inspector = sa.inspect(engine)
    for table in METADATA.sorted_tables:
        columns: set[str] = set()
        with contextlib.suppress(sa.exc.NoSuchTableError):
            columns = {column["name"] for column in inspector.get_columns(table.name)}
        missing = [column.name for column in table.columns if column.name not in columns]
        if missing:
            got = f"lacks {', '.join(missing)}" if columns else "is not there"
            raise StageError(
                f"the table {table.name} of {shown(engine.url)} {got}; wanted the event store of a service "
                "of this version of recllm"
            )
