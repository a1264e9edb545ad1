"""Events through HTTP: stored once, read by the next request, and the same list as from the log itself."""

import dataclasses
import json
import time
from contextlib import contextmanager

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from recllm.errors import ConfigError
from recllm.eventlog.log import ARRAYS, EventLog
from recllm.eventlog.queries import last_second
from recllm.serving.bundle import write_bundle
from recllm.serving.recommender import Recommender
from recllm.serving.server.app import create_app
from recllm.serving.server.events import EventStore
from recllm.serving.server.flags import events_url, parse
from recllm.serving.server.served import Served
from recllm.serving.server.service import Service
from recllm.serving.server.settings import Settings
from recllm.tables.event_store import IMPRESSIONS, open_store

USER = 1
K = 8


@contextmanager
def serving(recommender, url, **settings):
    """A client of a service that is ready; without `url` it stores nothing."""
    service = Service(
        Settings(**settings),
        lambda: Served(recommender, "digest", None, "2026-01-01"),
        events=EventStore(url) if url else None,
    )
    with TestClient(create_app(service)) as client:
        while client.get("/health").status_code != 200:
            time.sleep(0.01)
        yield client


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/events.db"


@pytest.fixture
def client(recommender, url):
    with serving(recommender, url) as client:
        yield client


def items_of(answer):
    assert answer.status_code == 200, answer.text
    (line,) = answer.json()["answers"]
    assert line["error"] is None
    return [(item["item"], item["score"], item["steps"]) for item in line["items"]]


def ask(client, user=USER, **others):
    return items_of(client.post("/recommend", json={"users": [{"user": user, **others}], "k": K}))


def lists_of(table):
    steps = [name for name in table.columns if name not in ("user", "item", "score", "rank", "title")]
    return [
        (line["item"], line["score"], {name: line[name] for name in steps})
        for line in table.sort("rank").to_dicts()
    ]


def send(client, *events, **headers):
    return client.post("/events", json={"events": list(events)}, headers=headers)


def test_an_event_changes_the_next_recommendation(client, recommender):
    """By HTTP; and the recommender gives the same list where the events come as `histories`."""
    before = ask(client)
    assert before == lists_of(recommender.recommend([USER], k=K))
    second = last_second(recommender.log) + 60
    events = [
        {"user": USER, "item": before[place][0], "rating": rating, "timestamp": second + place}
        for place, rating in ((0, 5.0), (2, 1.0), (3, 4.0))
    ]
    answer = send(client, *events)
    assert (answer.status_code, answer.json()) == (200, {"stored": 3, "repeated": 0})
    after = ask(client)
    assert not {item for item, *_ in after} & {event["item"] for event in events}
    assert [score for _, score, _ in after] != [score for _, score, _ in before]
    assert after == lists_of(recommender.recommend([USER], k=K, histories=pl.DataFrame(events)))
    # As of before them nothing has changed, and nothing has for another user.
    assert ask(client, time=second) == lists_of(recommender.recommend([USER], k=K, time=second))
    assert ask(client, user=2) == lists_of(recommender.recommend([2], k=K))
    # The score of a pair reads them too.
    pair = {"users": [{"user": USER, "items": [after[0][0]]}]}
    scored = client.post("/score", json=pair).json()["answers"][0]["items"][0]["score"]
    pairs = pl.DataFrame({"user": [USER], "item": [after[0][0]]})
    assert scored == recommender.score(pairs, histories=pl.DataFrame(events))["score"][0]


def test_stored_events_join_those_of_the_request(client, recommender):
    second = last_second(recommender.log) + 60
    items = [item for item, *_ in ask(client)][:2]
    send(client, {"user": USER, "item": items[0], "rating": 5, "timestamp": second})
    own = {"item": items[1], "rating": 1, "timestamp": second + 1}
    both = pl.DataFrame(
        {"user": [USER] * 2, "item": items, "rating": [5.0, 1.0], "timestamp": [second, second + 1]}
    )
    wanted = lists_of(recommender.recommend([USER], k=K, histories=both))
    assert ask(client, history=[own]) == wanted
    # An event that is stored and in the request is one.
    again = {"item": items[0], "rating": 5, "timestamp": second}
    assert ask(client, history=[again, own]) == wanted


def test_a_stranger_whose_events_are_stored(client, recommender):
    popular = ask(client, user="stranger")
    send(client, {"user": "stranger", "item": 5, "rating": 5, "timestamp": 100}, {"user": "x", "item": 7})
    after = ask(client, user="stranger")
    assert after != popular
    histories = pl.DataFrame({"user": ["stranger"], "item": [5], "rating": [5.0], "timestamp": [100]})
    assert after == lists_of(recommender.recommend(["stranger"], k=K, histories=histories))


def without_last_event(recommender, user):
    """A recommender whose log ends before the user's last event; and that event, as a client sends it."""
    log = recommender.log
    dense = int(recommender.maker.users.dense([user])[0])
    row = int(log.offsets[dense + 1]) - 1
    arrays = {name: getattr(log, name) for name in ARRAYS}
    for name in ("user", "item", "rating", "label", "timestamp", "split", "training"):
        arrays[name] = np.delete(arrays[name], row)
    arrays["offsets"] = log.offsets - (np.arange(len(log.offsets)) > dense)
    shortened = EventLog(log.folder, arrays, log.meta)
    event = {
        "user": user,
        "item": recommender.maker.items.external(log.item[[row]])[0],
        "rating": float(log.meta["rating_levels"][int(log.rating[row]) - 1]),
        "label": int(log.label[row]),
        "timestamp": int(log.timestamp[row]),
    }
    parts = dataclasses.replace(recommender.parts, log=shortened)
    return Recommender(parts, recommender.name, recommender.dataset), event


def test_the_same_event_in_the_log_gives_the_same_list(recommender, url):
    """A service whose log lacks a user's last event, and is told of it, answers as the log that has it."""
    wanted = lists_of(recommender.recommend([USER], k=K))
    shortened, event = without_last_event(recommender, USER)
    with serving(shortened, url) as client:
        assert ask(client) != wanted
        send(client, event)
        assert ask(client) == wanted
        sources = [event["source"] for event in client.get(f"/users/{USER}/history").json()["events"]]
        assert sources[-2:] == ["log", "store"]
    # The next bundle's log holds it: it counts once.
    with serving(recommender, url) as client:
        assert ask(client) == wanted
        events = client.get(f"/users/{USER}/history").json()["events"]
        assert {event["source"] for event in events} == {"log"}


def test_of_a_log_without_times_a_stored_event_counts_once(retrieving, url):
    """As many events of an item as the log has of it are taken for those; more of them are new."""
    log = retrieving.log
    timeless = EventLog(
        log.folder,
        {
            **{name: getattr(log, name) for name in ARRAYS},
            "timestamp": np.zeros_like(log.timestamp),
        },
        {**log.meta, "timed": False},
    )
    parts = dataclasses.replace(retrieving.parts, log=timeless)
    recommender = Recommender(parts, retrieving.name, retrieving.dataset)
    dense = int(recommender.maker.users.dense([USER])[0])
    rows = slice(int(log.offsets[dense]), int(log.offsets[dense + 1]))
    logged = recommender.maker.items.external(log.item[rows]).to_list()
    with serving(recommender, url) as client:
        before = ask(client)
        events = [{"user": USER, "item": item, "timestamp": place} for place, item in enumerate(logged)]
        assert send(client, *events).json()["stored"] == len(logged)
        assert ask(client) == before
        new = before[0][0]
        send(client, {"user": USER, "item": new, "rating": 5, "timestamp": 10**6})
        assert ask(client) != before
        history = client.get(f"/users/{USER}/history?limit=2").json()["events"]
    assert [(event["item"], event["source"]) for event in history] == [(logged[-1], "log"), (new, "store")]
    assert history[0]["timestamp"] is None


def test_history(client, recommender):
    log = recommender.log
    dense = int(recommender.maker.users.dense([USER])[0])
    low, high = int(log.offsets[dense]), int(log.offsets[dense + 1])
    # One between the two last logged events, one of an item that nobody knows, one that the log holds.
    between = int(log.timestamp[high - 1])
    last = recommender.maker.items.external(log.item[high - 1 : high])[0]
    send(
        client,
        {"user": USER, "item": 5, "rating": 4.5, "timestamp": between - 1},
        {"user": USER, "item": "new item", "label": 1, "timestamp": between + 1},
        {"user": USER, "item": last, "timestamp": between},
    )
    answer = client.get(f"/users/{USER}/history", params={"limit": 3}).json()
    titles = recommender.titles([5, last])
    assert answer["bundle"] == "digest"
    assert answer["is_known"]
    assert [(event["item"], event["title"], event["source"]) for event in answer["events"]] == [
        (5, titles[0], "store"),
        (last, titles[1], "log"),
        ("new item", None, "store"),
    ]
    assert [event["timestamp"] for event in answer["events"]] == [between - 1, between, between + 1]
    assert [event["label"] for event in answer["events"]] == [None, int(log.label[high - 1]), 1]
    rating = log.meta["rating_levels"][int(log.rating[high - 1]) - 1]
    assert [event["rating"] for event in answer["events"]] == [4.5, float(rating), None]
    everything = client.get(f"/users/{USER}/history", params={"limit": 500}).json()["events"]
    assert len(everything) == min(500, high - low + 2)
    # A user of whom nothing is known, with a slash in the name.
    assert client.get("/users/a%2Fb/history").json() == {
        "bundle": "digest",
        "user": "a/b",
        "is_known": False,
        "events": [],
    }


def test_a_request_that_is_sent_again(client):
    events = [{"user": 5, "item": 7}, {"user": 5, "item": 7, "key": "own"}]
    assert send(client, *events, **{"Idempotency-Key": "once"}).json() == {"stored": 2, "repeated": 0}
    assert send(client, *events, **{"Idempotency-Key": "once"}).json() == {"stored": 0, "repeated": 2}
    assert send(client, *events, **{"Idempotency-Key": "twice"}).json() == {"stored": 1, "repeated": 1}
    other = send(client, {"user": 5, "item": 8}, **{"Idempotency-Key": "once"})
    assert other.status_code == 422
    assert other.json()["error"].startswith("key 'once#0' is that of another event; wanted")
    counts = client.get("/metrics").text
    assert 'recllm_events_total{result="stored"} 3.0' in counts
    assert 'recllm_events_total{result="repeated"} 3.0' in counts
    assert 'recllm_events_total{result="refused"} 1.0' in counts


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"item": 5}, "events.1.user: Field required"),
        ({"user": 1, "item": 5, "label": 2}, "events.1.label: "),
        ({"user": 1, "item": 5, "timestamp": -1}, "timestamp is -1; wanted Unix seconds from 1970 on"),
        ({"user": 1, "item": 5, "timestamp": "9999-01-01"}, "wanted at most a day after now"),
        ({"user": 1, "item": "\0"}, "item holds a NUL or half a character; wanted text"),
        ({"user": "\ud800", "item": 5}, "user"),
        ({"user": 1, "item": 5, "more": 1}, "events.1.more: "),
    ],
)
def test_events_that_are_refused(client, event, line):
    """In a sentence, and nothing of the request is stored."""
    answer = client.post(
        "/events",
        content=json.dumps({"events": [{"user": "nobody", "item": 9}, event]}),  # in ASCII
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code in (400, 422)
    assert answer.status_code == 400 or line in answer.json()["error"]
    assert client.get("/users/nobody/history").json()["events"] == []


def test_limits(recommender, url):
    with serving(recommender, url, max_events=2) as client:
        answer = send(client, *[{"user": 1, "item": 5}] * 3)
        assert (answer.status_code, answer.json()["error"]) == (
            422,
            "events: 3 are sent; wanted at most 2",
        )
        answer = client.get("/users/1/history?limit=501")
        assert answer.json()["error"] == "limit: 501 are asked for; wanted at most 500"
        assert client.get("/users/1/history?limit=0").status_code == 422


def test_without_a_store(recommender):
    with serving(recommender, None) as client:
        assert ask(client) == lists_of(recommender.recommend([USER], k=K))
        answer = send(client, {"user": 1, "item": 5})
        assert answer.status_code == 404
        assert answer.json()["error"].startswith("this service stores no events; EVENTS_URL says")
        assert client.get("/users/1/history").json()["events"]


def test_impressions(recommender, url):
    with serving(recommender, url, impressions=True) as client:
        body = {"users": [{"user": USER}, {"user": "stranger"}], "k": 3}
        answer = client.post("/recommend", json=body)
        assert client.post("/score", json={"users": [{"user": USER, "items": [5]}]}).status_code == 200
        request = answer.headers["X-Request-Id"]
    engine = open_store(url)
    columns = (IMPRESSIONS.c[name] for name in ("request", "user", "item", "rank", "score", "bundle"))
    with engine.connect() as connection:
        rows = connection.execute(sa.select(*columns).order_by(IMPRESSIONS.c.id)).all()
    engine.dispose()
    assert [tuple(row) for row in rows] == [
        (request, str(line["user"]), str(item["item"]), item["rank"], item["score"], "digest")
        for line in answer.json()["answers"]
        for item in line["items"]
    ]
    assert len(rows) == 6


def test_a_store_that_fails_is_told_and_asked_again(recommender, url):
    """The table is gone; the service says when to send the same again, and does once it is back."""
    with serving(recommender, url, retry_after=7) as client:
        engine = open_store(url)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE recllm_events RENAME TO away")
        for answer in (
            send(client, {"user": 1, "item": 5, "key": "k"}),
            client.post("/recommend", json={"users": [{"user": 1}]}),
            client.get("/users/1/history"),
        ):
            assert answer.status_code == 503
            assert answer.headers["Retry-After"] == "7"
            assert answer.json() == {"error": "the event store does not answer; send the same again soon"}
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE away RENAME TO recllm_events")
        engine.dispose()
        assert send(client, {"user": 1, "item": 5, "key": "k"}).json() == {"stored": 1, "repeated": 0}


def test_by_default_a_store_has_its_data_set_s_name(cascades, tmp_path, monkeypatch):
    """Users of two data sets may have the same ids."""
    bundle = tmp_path / "bundle"
    write_bundle(cascades["reclora"], bundle)
    monkeypatch.delenv("EVENTS_URL", raising=False)
    assert events_url(bundle) == events_url(cascades["reclora"].folder) == "sqlite:///events-demo.db"
    monkeypatch.setenv("EVENTS_URL", "")
    assert events_url(bundle) == ""
    (bundle / "bundle.json").write_text("{}")
    monkeypatch.delenv("EVENTS_URL")
    with pytest.raises(ConfigError, match=r"bundle\.json cannot be read"):
        events_url(bundle)


def test_impressions_are_a_flag(cascades):
    folder = str(cascades["reclora"].folder)
    assert [parse([folder, *flags])[1].impressions for flags in ([], ["--impressions"])] == [False, True]
