"""Events that the service is told of: once each, on disk before the answer.

An event has a key. The first one of a key is stored; one that comes again with the same content is that
event, and one with other content is refused, so a client that heard no answer sends the same request again.
All events of a call are stored, or none.

| store | a call to `append` has returned: its events are |
| --- | --- |
| SQLite, write-ahead log, `synchronous = FULL` | on the disk of this machine (the log is synced) |
| PostgreSQL, `synchronous_commit` at least `local` | on the disk of its server |
"""

from __future__ import annotations

import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from recllm.tables.event_store import (
    EVENT_COLUMNS,
    EVENTS,
    IMPRESSIONS,
    SCHEMA,
    WRITES,
    open_store,
    read_events,
    reason_of,
    shown,
)

LONGEST_ID = 200
"""Characters of a user's or an item's id, at most."""
LONGEST_KEY = 256
"""Characters of a key, at most."""
AHEAD = 24 * 60 * 60
"""Seconds that an event may lie in the future: clocks of clients are not always right."""
_ROWS = 500
"""Rows of a statement; databases bound the number of values."""
_GROUP = 256
"""Calls that are written in one transaction, at most."""


class KeyConflict(ValueError):
    """A key that is another event's; its text is one line for the client."""


class StoreUnavailable(RuntimeError):
    """The store does not answer, or cannot write; nothing of the call is stored. A line for the operator."""


def _new_key() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True)
class UserEvent:
    """What a user did with an item.

    Attributes:
        user: external id.
        item: external id; one that no bundle knows is stored all the same, for the next training.
        rating: on the scale of the log; None: none.
        label: 1 liked, 0 not; None: unknown.
        timestamp: Unix second; None: that of its receipt.
        key: of idempotency, at most 256 characters, unique in the store. Unless it is given a new one is
            drawn, and the event is stored as often as it is sent.

    Raises:
        ValueError: a value that cannot be stored, in a line.
    """

    user: str
    item: str
    rating: float | None = None
    label: int | None = None
    timestamp: int | None = None
    key: str = field(default_factory=_new_key)

    def __post_init__(self) -> None:
        """Check what needs no clock."""
        for name, value, longest in (
            ("user", self.user, LONGEST_ID),
            ("item", self.item, LONGEST_ID),
            ("key", self.key, LONGEST_KEY),
        ):
            check_text(name, value, longest)
        if self.rating is not None and not math.isfinite(self.rating):
            raise ValueError(f"rating is {self.rating}; wanted a finite number, or none")
        if self.label not in (0, 1, None):
            raise ValueError(f"label is {self.label}; wanted 1 (liked), 0 (not), or none")
        if self.timestamp is not None and self.timestamp < 0:
            raise ValueError(f"timestamp is {self.timestamp}; wanted Unix seconds from 1970 on")


def check_text(name: str, value: str, longest: int) -> None:
    """Refuse an id or a key that not every store can hold.

    Raises:
        ValueError: it is empty, too long, or has signs that are no text.
    """
    if not 1 <= len(value) <= longest:
        raise ValueError(f"{name} has {len(value)} characters; wanted 1 to {longest}")
    is_text = "\0" not in value
    try:
        value.encode()
    except UnicodeEncodeError:
        is_text = False
    if not is_text:
        raise ValueError(f"{name} holds a NUL or half a character; wanted text")


class Place(NamedTuple):
    """An item at its place in a user's list."""

    user: str
    item: str
    rank: int
    score: float


@dataclass(frozen=True)
class Appended:
    """What became of the events of a call.

    Attributes:
        stored: how many are new.
        repeated: how many were there already, or came twice in the call.
    """

    stored: int
    repeated: int


@dataclass(frozen=True)
class _Write:
    """Something that waits to be written, and who is told about it."""

    work: Callable[[Connection], Any]
    future: Future[Any]


class EventStore:
    """Events and impressions in a database; for any number of threads.

    What is to be written is queued for a thread of the store's own, which writes all that waits in one
    transaction: one sync of the disk serves many requests.

    Args:
        url: `sqlite:///events.db` or `postgresql+psycopg://...`; its tables are made where they are missing.
        most_of_a_user: events of a user that are read, at most: the latest ones.
        clock: gives Unix seconds.

    Raises:
        ConfigError: the URL cannot be used.
        StageError: the database cannot be opened, or its tables are others.
    """

    def __init__(self, url: str, most_of_a_user: int = 1_000, clock: Callable[[], float] = time.time) -> None:
        """Opens the database."""
        self._most_of_a_user = most_of_a_user
        self._engine = open_store(url, new=True)
        self._writer = self._engine.execution_options(**{WRITES: True})
        self._insert = sqlite.insert if self._engine.dialect.name == "sqlite" else postgresql.insert
        self._clock = clock
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="event store", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """The URL, without its password."""
        return shown(self._engine.url)

    def append(self, events: Sequence[UserEvent]) -> Appended:
        """Store events, each key once, durably: when this returns they are on disk.

        Args:
            events: of any users; all of them are stored, or none.

        Raises:
            ValueError: an event lies too far in the future.
            KeyConflict: a key is there already, or twice in the call, with other content.
            StoreUnavailable: the database failed.
        """
        return self.submit(events).result()

    def submit(self, events: Sequence[UserEvent]) -> Future[Appended]:
        """`append` for who does not want to wait: what it returns, or raises, comes with the future.

        Raises:
            ValueError: an event lies too far in the future.
        """
        received = int(self._clock())
        for event in events:
            if event.timestamp is not None and event.timestamp > received + AHEAD:
                raise ValueError(
                    f"timestamp is {event.timestamp}; wanted at most a day after now, {received} (seconds)"
                )

        def write(connection: Connection) -> Appended:
            stored = 0
            for part in _parts(events):
                new = self._insert_new(connection, part, received)
                stored += new
                if new < len(part):
                    _check_repeated(connection, part)
            return Appended(stored, len(events) - stored)

        return self._put(write)

    def submit_impressions(self, places: Sequence[Place], request: str, bundle: str) -> Future[None]:
        """Note what was recommended; it is written when the future says so.

        Args:
            places: of the lists of one request.
            request: drawn by the service for each request.
            bundle: digest of the bundle that answered.
        """
        second = int(self._clock())
        common = {"request": request, "timestamp": second, "bundle": bundle}
        values = [{**place._asdict(), **common} for place in places]

        def write(connection: Connection) -> None:
            if values:
                connection.execute(sa.insert(IMPRESSIONS), values)

        return self._put(write)

    def history(self, user: str) -> pl.DataFrame:
        """A user's stored events: `user`, `item`, `rating`, `label`, `timestamp`, in the order of time."""
        return self.histories([user])

    def histories(self, users: Iterable[str]) -> pl.DataFrame:
        """The stored events of some users, user after user; of each the latest `most_of_a_user`.

        Raises:
            StoreUnavailable: the database failed.
        """
        tables = [pl.DataFrame(schema=SCHEMA)]
        place = sa.func.row_number().over(
            partition_by=EVENTS.c.user, order_by=(EVENTS.c.timestamp.desc(), EVENTS.c.id.desc())
        )
        for part in _parts(sorted(set(users))):
            of_users = sa.select(*EVENT_COLUMNS, EVENTS.c.id, place.label("place"))
            ranked = of_users.where(EVENTS.c.user.in_(part)).subquery()
            latest = sa.select(*(ranked.c[name] for name in SCHEMA))
            latest = latest.where(ranked.c.place <= self._most_of_a_user)
            latest = latest.order_by(ranked.c.user, ranked.c.timestamp, ranked.c.id)
            with self._failures(), self._engine.connect() as connection:
                rows = [tuple(row) for row in connection.execute(latest)]
            tables.append(pl.DataFrame(rows, schema=SCHEMA, orient="row"))
        return pl.concat(tables)

    def events_since(self, received: int = 0) -> Iterator[pl.DataFrame]:
        """Events that the service received at a second or later, in parts, in the order of time.

        Who goes on reading begins a minute before the last reading, since events of several processes appear
        in no order of their receipt.
        """
        with self._failures():
            yield from read_events(self._engine, received)

    def close(self) -> None:
        """Write what waits, and close all connections."""
        self._queue.put(None)
        self._thread.join()
        self._engine.dispose()

    def _put(self, write: Callable[[Connection], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.put(_Write(write, future))
        return future

    def _insert_new(self, connection: Connection, events: Sequence[UserEvent], received: int) -> int:
        """Insert those events whose keys are not there yet; how many that were."""
        statement = self._insert(EVENTS).values([_values(event, received) for event in events])
        statement = statement.on_conflict_do_nothing(index_elements=["key"])
        return len(connection.execute(statement.returning(EVENTS.c.key)).all())

    # ---- in the store's thread

    def _work(self) -> None:
        is_open = True
        while is_open:
            group: list[_Write] = []
            write = self._queue.get()
            while write is not None:
                if write.future.set_running_or_notify_cancel():
                    group.append(write)
                if len(group) == _GROUP or self._queue.empty():
                    break
                write = self._queue.get()
            is_open = write is not None
            if group:
                self._write(group)

    def _write(self, group: list[_Write]) -> None:
        """Write a group in one transaction; who meets a conflict is undone alone."""
        results: list[Any] = []
        try:
            with self._failures(), self._writer.begin() as connection:
                for write in group:
                    try:
                        with connection.begin_nested():
                            results.append(write.work(connection))
                    except KeyConflict as error:
                        results.append(error)
        except Exception as error:  # whatever it is: nothing is stored, and who waits is told
            results = [error] * len(group)
        for write, result in zip(group, results, strict=True):
            if isinstance(result, Exception):
                write.future.set_exception(result)
            else:
                write.future.set_result(result)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what a database raises into a line."""
        try:
            yield
        except SQLAlchemyError as error:
            raise StoreUnavailable(f"the event store {self.address} failed: {reason_of(error)}") from error


def _parts(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Values for one statement after the other."""
    for low in range(0, len(values), _ROWS):
        yield values[low : low + _ROWS]


def _values(event: UserEvent, received: int) -> dict[str, Any]:
    """A row of the table."""
    return {
        "key": event.key,
        "user": event.user,
        "item": event.item,
        "rating": event.rating,
        "label": event.label,
        "timestamp": received if event.timestamp is None else event.timestamp,
        "received": received,
    }


def _check_repeated(connection: Connection, events: Sequence[UserEvent]) -> None:
    """Refuse events whose key is stored with other content; a time that an event does not give fits any.

    Raises:
        KeyConflict: there is one.
    """
    there = sa.select(EVENTS.c.key, *EVENT_COLUMNS).where(EVENTS.c.key.in_([event.key for event in events]))
    stored = {row.key: row for row in connection.execute(there)}
    for event in events:
        row = stored[event.key]
        same_time = event.timestamp is None or event.timestamp == row.timestamp
        is_same = (event.user, event.item, event.rating, event.label) == (
            row.user,
            row.item,
            row.rating,
            row.label,
        )
        if not (is_same and same_time):
            raise KeyConflict(
                f"key {event.key!r} is that of another event; wanted the same event again, or another key"
            )
