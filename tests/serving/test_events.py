"""The event store: exactly once, all or none, on disk; the same over SQLite and PostgreSQL."""

import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import pytest
import sqlalchemy as sa

from recllm.errors import ConfigError, StageError
from recllm.serving.server.events import (
    AHEAD,
    Appended,
    EventStore,
    KeyConflict,
    Place,
    StoreUnavailable,
    UserEvent,
)
from recllm.tables.event_store import (
    EVENTS,
    IMPRESSIONS,
    WAIT,
    open_store,
    parse_url,
    read_events,
    shown,
)

NOW = 1_700_000_000

APPENDS = """
import sys
from recllm.serving.server.events import EventStore, UserEvent
url, name, count, shared = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = EventStore(url)
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):
    key = f"shared-{number}" if number < shared else f"{name}-{number}"
    store.append([UserEvent("u", str(number), timestamp=number, key=key)])
    print(key, flush=True)
"""
"""A process that appends events one by one, and says the key of each one that is stored."""


def keys_of(url):
    """Key -> how often it is stored."""
    engine = open_store(url)
    with engine.connect() as connection:
        counts = Counter(connection.execute(sa.select(EVENTS.c.key)).scalars())
    engine.dispose()
    return counts


def start(url, name, count, shared=0):
    command = [sys.executable, "-c", APPENDS, url, name, str(count), str(shared)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class Contract:
    """What holds for every store; `url` is a new one's."""

    @pytest.fixture
    def store(self, url):
        store = EventStore(url, clock=lambda: NOW)
        yield store
        store.close()

    def test_events_are_read_as_they_were_written(self, store):
        assert store.append(
            [
                UserEvent("ann", "tea", rating=4.5, timestamp=20),
                UserEvent("ann", "חלה 🖤 '; --", label=0, timestamp=10),
                UserEvent("bob", "rye", rating=3, label=1),
            ]
        ) == Appended(3, 0)
        assert store.history("ann").rows() == [
            ("ann", "חלה 🖤 '; --", None, 0, 10),
            ("ann", "tea", 4.5, None, 20),
        ]
        # One without a time happened when it was received.
        assert store.history("bob").rows() == [("bob", "rye", 3.0, 1, NOW)]
        nobody = store.history("cem")
        assert nobody.is_empty()
        assert nobody.schema == store.history("ann").schema
        assert store.histories(["bob", "ann", "cem", "bob"])["user"].to_list() == ["ann", "ann", "bob"]

    def test_a_key_is_stored_once(self, store, url):
        event = UserEvent("ann", "tea", rating=4.5, key="k")
        assert store.append([event]) == Appended(1, 0)
        assert store.append([event, UserEvent("ann", "rye", key="l")]) == Appended(1, 1)
        again = EventStore(url, clock=lambda: NOW + 60)  # a service that began anew
        assert again.append([event, event]) == Appended(0, 2)
        again.close()
        assert store.history("ann")["item"].to_list() == ["tea", "rye"]
        assert store.append([UserEvent("bob", "tea", key="m"), UserEvent("bob", "tea", key="m")]) == Appended(
            1, 1
        )

    @pytest.mark.parametrize(
        "other",
        [
            {"user": "bob"},
            {"item": "rye"},
            {"rating": 4.0},
            {"rating": None},
            {"label": 1},
            {"timestamp": 6},
        ],
    )
    def test_a_key_with_other_content_is_refused_and_nothing_of_the_call_is_stored(self, store, other):
        event = {"user": "ann", "item": "tea", "rating": 4.5, "label": 0, "timestamp": 5, "key": "k"}
        store.append([UserEvent(**event)])
        with pytest.raises(KeyConflict, match=r"key 'k' is that of another event; wanted the same"):
            store.append([UserEvent("cem", "tea"), UserEvent(**{**event, **other}), UserEvent("cem", "rye")])
        assert store.history("cem").is_empty()
        assert store.history("ann").height == 1
        with pytest.raises(KeyConflict):
            store.append([UserEvent("cem", "tea", key="twice"), UserEvent("cem", "rye", key="twice")])
        assert store.history("cem").is_empty()

    def test_events_without_a_key_are_stored_as_often_as_they_are_sent(self, store):
        for _ in range(2):
            store.append([UserEvent("ann", "tea", timestamp=1)])
        assert store.history("ann").height == 2

    def test_a_call_of_many_events(self, store, url):
        events = [UserEvent("ann", str(number), timestamp=number, key=str(number)) for number in range(1_234)]
        assert store.append(events) == Appended(1_234, 0)
        assert store.append([*events[600:], UserEvent("ann", "x", key="x")]) == Appended(1, 634)
        assert keys_of(url) == Counter([*map(str, range(1_234)), "x"])

    def test_of_a_user_the_latest_events_are_read(self, url):
        store = EventStore(url, most_of_a_user=3)
        store.append([UserEvent("ann", str(number), timestamp=number) for number in (4, 1, 3, 5, 2)])
        store.append([UserEvent("bob", "tea")])
        assert store.histories(["ann", "bob"])["item"].to_list() == ["3", "4", "5", "tea"]
        store.close()

    def test_times_of_the_future_are_refused(self, store):
        store.append([UserEvent("ann", "tea", timestamp=NOW + AHEAD)])
        with pytest.raises(ValueError, match="wanted at most a day after now"):
            store.append([UserEvent("ann", "rye", timestamp=NOW + AHEAD + 1)])
        assert store.history("ann").height == 1

    def test_events_since(self, url):
        second = iter(range(100, 200, 10))
        store = EventStore(url, clock=lambda: next(second))
        for item, timestamp in (("a", 5), ("b", 3), ("c", 4)):  # received at 100, 110, 120
            store.append([UserEvent("ann", item, timestamp=timestamp)])
        assert pl.concat(store.events_since())["item"].to_list() == ["b", "c", "a"]
        assert pl.concat(store.events_since(110))["item"].to_list() == ["b", "c"]
        assert list(store.events_since(121)) == []
        store.close()

    def test_impressions(self, store, url):
        places = [Place("1", "7", 1, 0.5), Place("1", "5", 2, 0.25)]
        store.submit_impressions(places, "request", "digest").result()
        store.submit_impressions([], "nothing", "digest").result()
        engine = open_store(url)
        with engine.connect() as connection:
            rows = connection.execute(sa.select(IMPRESSIONS).order_by(IMPRESSIONS.c.rank)).mappings().all()
        engine.dispose()
        common = {"request": "request", "user": "1", "timestamp": NOW, "bundle": "digest"}
        assert [dict(row) for row in rows] == [
            {"id": 1, "item": "7", "rank": 1, "score": 0.5, **common},
            {"id": 2, "item": "5", "rank": 2, "score": 0.25, **common},
        ]

    def test_many_threads_at_once(self, store, url):
        """Eight threads send the same 60 events, each in another order, and one of its own in between."""

        def send(thread):
            for number in range(60):
                shared = (number * 7 + thread * 11) % 60
                own = UserEvent("ann", "own", key=f"own-{thread}-{number}")
                store.append([UserEvent("ann", "shared", key=f"shared-{shared}"), own])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(send, range(8)))
        counts = keys_of(url)
        assert set(counts.values()) == {1}
        assert len(counts) == 60 + 8 * 60

    def test_calls_that_wait_together_fail_alone(self, store, url):
        """A group's calls share a transaction; a conflict in the midst of it undoes its own call only."""
        calls = [[UserEvent("ann", str(number), key=f"{number}")] for number in range(20)]
        calls[10] = [UserEvent("ann", "before", key="before"), UserEvent("bob", "other", key="9")]
        futures = [store.submit(events) for events in calls]
        store.close()  # writes what waits
        errors = [type(future.exception()).__name__ for future in futures]
        assert errors == ["NoneType"] * 10 + ["KeyConflict"] + ["NoneType"] * 9
        assert keys_of(url) == Counter(str(number) for number in range(20) if number != 10)

    def test_a_call_that_is_canceled_before_its_turn_is_not_stored(self, store, url):
        begun, may_end = threading.Event(), threading.Event()

        def wait(connection):
            begun.set()
            assert may_end.wait(60)

        store._put(wait)
        assert begun.wait(60)
        future = store.submit([UserEvent("ann", "tea", key="canceled")])
        last = store.submit([UserEvent("ann", "tea", key="last")])
        assert future.cancel()
        may_end.set()
        assert last.result(60) == Appended(1, 0)
        assert keys_of(url) == Counter(["last"])

    def test_two_processes_at_once(self, url):
        """Both open a store that is not there yet; of 50 keys both send each, and 50 are their own."""
        processes = [start(url, name, count=100, shared=50) for name in "ab"]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        outputs = [""] * 2

        def finish(place):
            outputs[place] = processes[place].communicate("go\n", timeout=120)[0]

        threads = [threading.Thread(target=finish, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [process.returncode for process in processes] == [0, 0]
        assert [len(output.split()) for output in outputs] == [100, 100]
        assert keys_of(url) == Counter(set(outputs[0].split()) | set(outputs[1].split()))

    def test_a_killed_process_has_stored_what_it_said(self, url):
        """kill -9 in the middle: what was told is there, once; the same events again make it whole."""
        count = 400
        process = start(url, "a", count)
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        acknowledged = [process.stdout.readline().strip() for _ in range(100)]
        process.send_signal(signal.SIGKILL)
        acknowledged += process.stdout.read().split()
        assert process.wait(60) == -signal.SIGKILL
        process.stdin.close()
        process.stdout.close()
        counts = keys_of(url)
        assert 100 <= len(acknowledged) < count
        assert set(counts.values()) == {1}
        assert set(acknowledged) <= set(counts)
        assert len(counts) <= len(acknowledged) + 1  # the last one may be stored and not yet told
        again = start(url, "a", count)
        output, _ = again.communicate("go\n", timeout=120)
        assert len(output.split()) == 1 + count
        assert keys_of(url) == Counter(f"a-{number}" for number in range(count))

    def test_a_database_with_other_tables_is_refused(self, store, url):
        engine = open_store(url)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE recllm_events RENAME COLUMN received TO heard")
        with pytest.raises(StageError, match=r"the table recllm_events of .* lacks received; wanted"):
            open_store(url)
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE recllm_impressions")
            connection.exec_driver_sql("ALTER TABLE recllm_events RENAME COLUMN heard TO received")
        with pytest.raises(StageError, match=r"the table recllm_impressions of .* is not there; wanted"):
            open_store(url)
        engine.dispose()
        EventStore(url).close()
        open_store(url).dispose()


class TestSqlite(Contract):
    @pytest.fixture
    def url(self, tmp_path):
        return f"sqlite:///{tmp_path}/events.db"

    def test_a_commit_is_synced(self, store):
        """Write-ahead log, and a sync at each commit: 2 is FULL, which survives a loss of power."""
        with store._engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2

    def test_others_may_not_read_it(self, store, tmp_path):
        store.append([UserEvent("ann", "tea")])
        modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
        assert modes == dict.fromkeys(["events.db", "events.db-wal", "events.db-shm"], oct(0o600))

    def test_a_file_that_is_no_database(self, tmp_path):
        (tmp_path / "events.db").write_text("user,item\n" * 1000)
        with pytest.raises(StageError, match="cannot be opened: file is not a database"):
            EventStore(f"sqlite:///{tmp_path}/events.db")

    def test_nothing_is_made_by_who_reads(self, tmp_path):
        with pytest.raises(StageError, match=r"events\.db does not exist; wanted the event store"):
            open_store(f"sqlite:///{tmp_path}/events.db")
        assert not list(tmp_path.iterdir())

    def test_a_full_disk_stores_nothing_and_is_told(self, store):
        """SQLite's own limit of pages stands for the disk's end."""
        store.append([UserEvent("ann", "tea", key="before")])
        with store._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()

        @sa.event.listens_for(store._engine, "begin")
        def limit(connection):
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        with pytest.raises(StoreUnavailable, match="failed: database or disk is full"):
            store.append([UserEvent("ann", "i" * 200, key=str(number)) for number in range(400)])
        assert store.history("ann")["item"].to_list() == ["tea"]


class TestPostgres(Contract):
    @pytest.fixture
    def url(self, postgres):
        return postgres.new_schema()

    def test_a_commit_is_synced_whatever_the_server_says(self, store, postgres):
        url = postgres.new_database()
        engine = sa.create_engine(url)
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            for setting in ("off", "local"):
                name = sa.make_url(url).database
                connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET synchronous_commit = {setting}')
                strict = EventStore(url)
                with strict._engine.connect() as own:
                    got = own.exec_driver_sql("SHOW synchronous_commit").scalar()
                strict.close()
                assert got == {"off": "on", "local": "local"}[setting]
        engine.dispose()

    def test_reading_all_events_may_take_long_and_nothing_else_may(self, store, url):
        store.append([UserEvent("ann", "tea")])
        engine = open_store(url)
        limits = []

        @sa.event.listens_for(engine, "before_cursor_execute")
        def look(connection, cursor, statement, *_):
            if "ORDER BY" in statement:
                limits.append(connection.connection.execute("SHOW statement_timeout").fetchone()[0])

        assert sum(len(part) for part in read_events(engine)) == 1
        assert limits == ["0"]
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SHOW statement_timeout").scalar() == f"{WAIT}s"
        engine.dispose()

    def test_a_crash_of_the_server(self, store, postgres):
        """It ends at once, as by a crash: what was told is there when it is back, and so is the store."""
        store.append([UserEvent("ann", "tea", key="before")])
        postgres.stop(signal.SIGQUIT)
        try:
            with pytest.raises(StoreUnavailable, match=r"the event store postgresql.* failed: "):
                store.append([UserEvent("ann", "rye", key="during")])
            with pytest.raises(StoreUnavailable):
                store.history("ann")
        finally:
            postgres.start()
        store.append([UserEvent("ann", "rye", key="during"), UserEvent("ann", "tea", key="before")])
        assert store.history("ann")["item"].to_list() == ["tea", "rye"]


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("events.db", "the event store's URL cannot be read; wanted sqlite:///events.db or postgresql"),
        ("mysql://u@h/d", "the event store's URL begins with mysql; wanted sqlite"),
        ("sqlite://", "the event store's URL sqlite:// names no file; wanted"),
        ("sqlite:///:memory:", "names no file"),
    ],
)
def test_other_addresses_are_refused(url, line):
    with pytest.raises(ConfigError, match=line):
        parse_url(url)


def test_a_password_is_not_shown():
    url = parse_url("postgresql://ann:secret@host/events")
    assert url.drivername == "postgresql+psycopg"
    assert "secret" not in shown(url)


def test_a_server_that_is_not_there(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(StageError, match=r"the event store postgresql.* cannot be opened: ") as error:
        EventStore(f"postgresql+psycopg://ann:secret@/events?host={tmp_path}")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"user": ""}, "user has 0 characters; wanted 1 to 200"),
        ({"item": "i" * 201}, "item has 201 characters; wanted 1 to 200"),
        ({"key": "k" * 257}, "key has 257 characters"),
        ({"user": "a\0b"}, "user holds a NUL or half a character; wanted text"),
        ({"item": "\ud83d"}, "item holds a NUL or half a character"),
        ({"rating": float("nan")}, "rating is nan; wanted a finite number"),
        ({"rating": float("inf")}, "rating is inf"),
        ({"label": 2}, r"label is 2; wanted 1 \(liked\), 0 \(not\), or none"),
        ({"timestamp": -1}, "timestamp is -1; wanted Unix seconds"),
    ],
)
def test_events_that_cannot_be_stored(values, line):
    with pytest.raises(ValueError, match=line):
        UserEvent(**{"user": "ann", "item": "tea", **values})
    UserEvent("ann", "tea")
