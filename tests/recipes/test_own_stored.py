"""The event store of the service read back as a log: beside files, and alone; SQLite and PostgreSQL alike."""

import re
from datetime import UTC, datetime

import polars as pl
import pytest

from recllm.config.request import parse
from recllm.errors import ConfigError
from recllm.eventlog.build import build_log
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.external import ExternalIds
from recllm.eventlog.log import EventLog
from recllm.pipeline.graph import Plan
from recllm.serving.server.events import EventStore, UserEvent
from tests.recipes.own_recipe import SOURCE, config_of, recipe

ITEMS = "sku,name,kind\nA,Apple,fruit\nB,Bread,food\nC,Cake,food\n"
EVENTS = "who,sku,stars,at\n1,A,5,100\n1,B,2,200\n2,A,3,300\n"
ROWS = [("1", "A", 5.0, 1, 100), ("1", "B", 2.0, 0, 200), ("2", "A", 3.0, 0, 300)]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/events.db"
    return request.getfixturevalue("postgres").new_schema()


def store_events(url, *events):
    store = EventStore(url, clock=lambda: 1_000)
    store.append(events)
    store.close()


def make(folder, url, events=None, **sections):
    """Counts, and the rows of the events."""
    (folder / "items.csv").write_text(ITEMS)
    (folder / "events.csv").write_text(EVENTS)
    merged = {name: {**keys, **sections.get(name, {})} for name, keys in SOURCE.items()}
    merged["events"] |= {"store": url, **(events or {})}
    merged |= {name: value for name, value in sections.items() if name not in SOURCE}
    counts = recipe.make(folder / "tables", folder, config_of(merged))
    return counts, pl.read_parquet(folder / "tables" / "events.parquet").rows()


def build(folder):
    """The event log of a few events: the first half trains."""
    few = {"min_history": 0, "shares": [0.5, 0.25], "ranking_valid_rows": 0, "ranking_test_rows": 0}
    fields = {"category": "kind", "user_fields": [], "item_fields": ["title", "kind"]}
    build_log(folder / "tables", folder / "log", PrepareConfig(**few, **fields))


def test_stored_events_join_those_of_the_file(tmp_path, url):
    store_events(
        url,
        UserEvent("2", "C", rating=4.0, timestamp=500),
        UserEvent("3", "B", rating=1.5, timestamp=400),
        UserEvent("3", "C", timestamp=450),  # no rating: history only
        UserEvent("3", "A", rating=1.0, label=1, timestamp=460),  # a label stands above the rating
    )
    counts, rows = make(tmp_path, url)
    assert rows == [
        *ROWS,
        ("3", "B", 1.5, 0, 400),
        ("3", "C", None, None, 450),
        ("3", "A", 1.0, 1, 460),
        ("2", "C", 4.0, 1, 500),
    ]
    assert {name: counts[name] for name in ("read_events", "stored_events", "events", "users")} == {
        "read_events": 7, "stored_events": 4, "events": 7, "users": 3,
    }  # fmt: skip


def test_a_store_is_a_whole_log(tmp_path, url):
    """Without a file; the log that is built of it has every event once, in the order of time."""
    met = (("B", 5, 200), ("A", 2, 100), ("C", 4, 300))
    stored = [
        UserEvent(str(user), item, rating=rating, timestamp=second + user, key=f"{user}{item}")
        for user in (1, 2)
        for item, rating, second in met
    ]
    store_events(url, *stored)
    store_events(url, *stored)  # sent again
    counts, rows = make(tmp_path, url, {"path": ""})
    assert counts["events"] == counts["stored_events"] == 6
    assert rows[:3] == [("1", "A", 2.0, 0, 101), ("2", "A", 2.0, 0, 102), ("1", "B", 5.0, 1, 201)]
    build(tmp_path)
    log = EventLog.open(tmp_path / "log")
    items = ExternalIds.open(tmp_path / "log", "item")
    assert items.external(log.item[: log.n_events]).to_list() == ["A", "B", "C"] * 2
    assert log.timestamp[: log.n_events].tolist() == [101, 201, 301, 102, 202, 302]


def test_an_event_of_file_and_store_is_one(tmp_path):
    """The log merges rows of one user, item and second, wherever they come from."""
    url = f"sqlite:///{tmp_path}/events.db"
    store_events(
        url, UserEvent("1", "A", rating=5.0, timestamp=100), UserEvent("2", "B", rating=1, timestamp=9)
    )
    _, rows = make(tmp_path, url)
    assert len(rows) == 5
    build(tmp_path)
    assert EventLog.open(tmp_path / "log").n_events == 4


def test_a_file_may_write_times_and_ratings_in_its_own_way(tmp_path):
    url = f"sqlite:///{tmp_path}/events.db"
    moment = int(datetime(2024, 3, 1, 9, tzinfo=UTC).timestamp())
    store_events(url, UserEvent("1", "A", rating=4.5, timestamp=900))
    (tmp_path / "own.csv").write_text('who,sku,stars,at\n2,B,"2,5",2024-03-01T09:00:00Z\n')
    _, rows = make(tmp_path, url, {"path": "own.csv", "decimal_comma": True, "time_unit": "iso"})
    assert rows == [("2", "B", 2.5, 0, moment), ("1", "A", 4.5, 1, 900)]


def test_labels_in_words_and_clicks(tmp_path):
    url = f"sqlite:///{tmp_path}/events.db"
    told = [UserEvent("1", item, label=label, timestamp=second)
            for item, label, second in (("A", 1, 400), ("B", 0, 401), ("C", None, 402))]  # fmt: skip
    store_events(url, *told)
    (tmp_path / "own.csv").write_text("who,sku,did,at\n2,A,buy,100\n2,B,skip,200\n")
    words = {"rule": "column", "column": "did", "liked": ["buy"], "disliked": ["skip"]}
    _, rows = make(tmp_path, url, {"path": "own.csv", "rating": ""}, label=words)
    assert [row[3] for row in rows] == [1, 0, 1, 0, None]
    _, rows = make(tmp_path, url, {"rating": ""}, label={"rule": "clicks"})
    assert [row[3] for row in rows] == [1, 1, 1, 1, None, 1]


def test_without_times_stored_events_come_last(tmp_path):
    url = f"sqlite:///{tmp_path}/events.db"
    store_events(
        url, UserEvent("1", "C", rating=4, timestamp=50), UserEvent("1", "B", rating=1, timestamp=40)
    )
    _, rows = make(tmp_path, url, {"timestamp": ""})
    assert [(row[1], row[4]) for row in rows if row[0] == "1"] == [
        ("A", None), ("B", None), ("B", None), ("C", None),
    ]  # fmt: skip


def test_a_faulty_event_is_named_or_left_out(tmp_path):
    url = f"sqlite:///{tmp_path}/events.db"
    store_events(url, UserEvent("1", "A", rating=4, timestamp=1), UserEvent("1", "Z", rating=4, timestamp=2),
                 UserEvent("1", "B", rating=9, timestamp=3))  # fmt: skip
    line = "events.db event 2, column 'item': found 'Z', wanted an item of items.csv"
    with pytest.raises(ValueError, match=re.escape(line)):
        make(tmp_path, url)
    counts, rows = make(tmp_path, url, faulty="drop")
    assert (counts["dropped_events_unknown_item"], counts["dropped_events_rating_out_of_scale"]) == (1, 1)
    assert len(rows) == 4


def test_a_store_that_is_not_there(tmp_path):
    url = f"sqlite:///{tmp_path}/none.db"
    with pytest.raises(
        ValueError, match=r"^source\.events\.store: .*none\.db does not exist; wanted the event"
    ):
        make(tmp_path, url)
    assert not (tmp_path / "none.db").exists()
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize(
    ("events", "line"),
    [
        (
            {"path": "sqlite:///events.db"},
            "source.events.path='sqlite:///events.db' is not usable; wanted a file",
        ),
        (
            {"store": "mysql://u@h/d"},
            "source.events.store='mysql' is not usable; wanted sqlite:///events.db or",
        ),
        ({"store": "events.db"}, "source.events.store='events.db' is not usable"),
        (
            {"store": "postgresql://u:secret@h/d"},
            "'a URL with a password' is not usable; wanted a URL without",
        ),
        ({"store": "postgresql://h/d?password=secret"}, "'a URL with a password' is not usable"),
        (
            {"store": "sqlite:///events.db", "split": "part"},
            "wanted '', as no split and no window of a stored",
        ),
    ],
)
def test_what_cannot_be_a_store(events, line):
    with pytest.raises(ConfigError) as error:
        config_of({**SOURCE, "events": {**SOURCE["events"], **events}})
    assert line in str(error.value)
    assert "secret" not in str(error.value)


def test_a_data_set_without_a_store_says_nothing_of_it():
    """So that folders which were made before there was the key are those of the same words."""
    plan = Plan(parse(["prepare", "DATASET=amazon14-beauty"]))
    (tables,) = [node for node in plan.needed() if node.folder == "tables"]
    assert tables.config["source"]["events"]["path"]
    assert "store" not in tables.config["source"]["events"]
    said = Plan(parse(["prepare", "DATASET=amazon14-beauty", "source.events.store=sqlite:///events.db"]))
    (tables,) = [node for node in said.needed() if node.folder.startswith("tables")]
    assert tables.config["source"]["events"]["store"] == "sqlite:///events.db"
