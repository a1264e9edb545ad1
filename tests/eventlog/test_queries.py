"""Queries: their rules by hand, and queries built from rows against those rows, to the bit."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from recllm.crm.inputs import CrmInputs
from recllm.eventlog.build import build_log
from recllm.eventlog.external import ExternalIds
from recllm.eventlog.ids import UNKNOWN
from recllm.eventlog.log import EventLog
from recllm.eventlog.queries import NO_SECOND, QueryMaker, build_queries, queries_of_rows
from recllm.eventlog.statistics import Statistics
from recllm.retrieval.category import SameCategory
from recllm.retrieval.neighbors import Neighbors
from recllm.text.prompts import Prompts


@pytest.fixture(scope="module")
def hand_log(tmp_path_factory):
    """Users `u`, `v`, `w` and films 10, 20, 30, 40; `w` comes in the test period only, as does film 40."""
    folder = tmp_path_factory.mktemp("hand")
    tables = folder / "tables"
    tables.mkdir()
    rows = [
        *[("u", 10, 5.0, 100), ("u", 20, 2.0, 200), ("u", 30, 4.0, 200), ("u", 10, 4.0, 300)],
        *[("v", 20, 4.0, 150), ("v", 30, 1.0, 250), ("v", 10, 3.0, 350), ("v", 20, 5.0, 360)],
        *[("w", 10, 1.0, 900), ("w", 40, 5.0, 1000)],
    ]
    events = pl.DataFrame(rows, schema=["user", "item", "rating", "timestamp"], orient="row")
    events = events.with_columns(
        label=(pl.col("rating") > 3).cast(pl.Int8), rating=pl.col("rating").cast(pl.Float32)
    )
    events.select("user", "item", "rating", "label", "timestamp").write_parquet(tables / "events.parquet")
    pl.DataFrame(
        {"item": [10, 20, 30, 40], "title": ["A", "B", "C", "D"], "genre": list("xyxx")}
    ).write_parquet(tables / "items.parquet")
    pl.DataFrame({"user": ["u", "v", "w"], "age": ["1", "2", "3"]}).write_parquet(tables / "users.parquet")

    def build(**prepare):
        from recllm.eventlog.config import PrepareConfig

        config = PrepareConfig(
            min_history=0,
            shares=[0.5, 0.3],
            user_fields=["age"],
            candidates=2,
            ranking_valid_rows=0,
            ranking_test_rows=0,
            **prepare,
        )
        name = "-".join(map(str, prepare.values())) or "log"
        build_log(tables, folder / name, config)
        return EventLog.open(folder / name)

    return build


def items_of(queries, place):
    start, end = queries.log.history(queries.rows[place : place + 1])
    return queries.log.item[int(start[0]) : int(end[0])].tolist()


def test_a_known_user_is_cut_before_the_second(hand_log):
    log = hand_log()
    u, v, w = 2, 3, 4
    queries = build_queries(log, [u, u, u, w, v], np.array([200, 201, NO_SECOND, 900, 100]))
    assert [items_of(queries, place) for place in range(5)] == [[2], [2, 3, 4], [2, 3, 4, 2], [], []]
    assert queries.log.timestamp[queries.rows].tolist() == [200, 201, 1001, 900, 100]
    assert queries.log.item[queries.rows].tolist() == [UNKNOWN] * 5
    assert queries.counts["without_history"] == 2
    assert queries.counts["known_users"] == 5
    assert queries.log.user_fields[0].tolist() == log.user_fields[u].tolist()


def test_a_user_of_the_request(hand_log):
    log = hand_log()
    maker = QueryMaker(log)
    histories = pl.DataFrame(
        {
            "query": [0, 0, 0, 1, 0],
            "item": ["30", "10", "99", "20", "40"],
            "rating": [4.4, None, 5.0, 1.0, 2.6],
            "timestamp": [500, 400, 450, None, 500],
        }
    )
    queries = maker.make(pl.Series(["nobody", None, "u"]), None, histories)
    assert queries.user.tolist() == [UNKNOWN, UNKNOWN, 2]
    assert [items_of(queries, place) for place in range(3)] == [[2, 4, 5], [3], [2, 3, 4, 2]]
    assert queries.counts["skipped_unknown_items"] == 1
    assert queries.counts["own_events"] == 5
    assert queries.counts["events_of_items_never_trained"] == 1  # film 40
    assert queries.counts["unknown_users"] == 2
    start = queries.rows[0] - 3
    # Of the levels 1 to 5, 4.4 and 2.6 are nearest to 4 and 3, liked and not; film 10 has none.
    assert queries.log.rating[start : start + 3].tolist() == [0, 4, 3]
    assert queries.log.label[start : start + 3].tolist() == [-1, 1, 0]
    assert (queries.log.user_fields[:2] == 1).all()
    # The second query's event has no time: it stands a second before the query.
    assert queries.log.timestamp[queries.rows[1] - 1] == queries.log.timestamp[queries.rows[1]] - 1


def test_own_events_stand_among_the_known_ones(hand_log):
    log = hand_log()
    histories = pl.DataFrame(
        {"query": [0] * 5, "item": [40, 20, 10, 30, 20], "timestamp": [250, 200, None, None, 310]}
    )
    queries = QueryMaker(log).make(pl.Series(["u"]), pl.Series([320]), histories)
    # Film 20 at 200 is known: it is there once. Those without a time come last, as they were given.
    assert items_of(queries, 0) == [2, 3, 4, 5, 2, 3, 2, 4]
    assert queries.counts["skipped_repeated_events"] == 1
    assert queries.log.timestamp[queries.rows[0] - 2 : queries.rows[0] + 1].tolist() == [319, 319, 320]


def test_events_from_the_future_refuse_their_query_alone(hand_log):
    log = hand_log()
    histories = pl.DataFrame({"query": [0, 1], "item": [40, 40], "timestamp": [250, 251]})
    queries = QueryMaker(log).make(pl.Series(["u", "u"]), pl.Series([250, 250]), histories)
    assert list(queries.problems) == [1]
    assert "251" in queries.problems[1]
    assert "250" in queries.problems[1]
    assert items_of(queries, 0) == [2, 3, 4, 5]
    assert items_of(queries, 1) == []


def test_strict_ties_leave_the_querys_own_second_out(hand_log):
    log = hand_log(ties="strict")
    histories = pl.DataFrame({"query": [0, 0], "item": [40, 40], "timestamp": [249, 250]})
    queries = QueryMaker(log).make(pl.Series(["v"]), pl.Series([250]), histories)
    assert items_of(queries, 0) == [3, 5]
    assert queries.counts["skipped_same_second"] == 1


def test_ids_keep_their_type(hand_log):
    log = hand_log()
    items = ExternalIds.open(log.folder, "item")
    assert items.dense(pl.Series([40, 7, None, 10])).tolist() == [5, 1, 1, 2]
    assert items.dense(["40", "x", "10"]).tolist() == [5, 1, 2]
    assert items.dense([40.0, 40.5]).tolist() == [5, 1]
    assert items.external(np.array([5, 1])).to_list() == [40, None]
    users = ExternalIds.open(log.folder, "user")
    assert users.dense(["w", "x"]).tolist() == [4, 1]
    assert users.dense([]).tolist() == []
    unsorted = ExternalIds("item", pl.Series([None, None, "b", "a"]))
    assert unsorted.dense(["a", "b", "c"]).tolist() == [3, 2, 1]


def test_a_window_shows_the_last_events(hand_log):
    log = hand_log(window=2)
    queries = build_queries(log, [2], np.array([NO_SECOND]))
    assert items_of(queries, 0) == [4, 2]
    start, end = queries.all_events()
    assert queries.log.item[start[0] : end[0]].tolist() == [2, 3, 4, 2]


def test_labels_are_shown_as_the_log_shows_them(hand_log):
    log = hand_log()
    shows = EventLog(log.folder, vars(log), {**log.meta, "shows_labels": True})
    histories = pl.DataFrame(
        {"query": [0] * 4, "item": [10] * 4, "label": [0, 1, None, 1], "rating": [None] * 3 + [4.0]}
    )
    events = QueryMaker(shows).events(histories)
    assert events.rating.tolist() == [6, 7, 0, 4]  # five levels, disliked, liked
    assert events.label.tolist() == [0, 1, -1, 1]


def test_a_log_without_times_keeps_the_given_order(hand_log):
    log = hand_log()
    untimed = EventLog(log.folder, vars(log), {**log.meta, "timed": False})
    untimed.timestamp = np.zeros_like(log.timestamp)
    histories = pl.DataFrame({"query": [0, 0], "item": [40, 10]})
    queries = QueryMaker(untimed).make(pl.Series(["v"]), None, histories)
    assert items_of(queries, 0) == [3, 4, 2, 3, 5, 2]
    assert queries.log.timestamp.tolist() == [0] * 7


@pytest.fixture(scope="module", params=["rows", "strict", "sampled", "window"])
def log(request, tmp_path_factory, demo_log, demo_config):
    """The demo's log, also with strict ties (times in days, so that there are some) and sampled negatives."""
    if request.param == "rows":
        return demo_log
    folder = tmp_path_factory.mktemp(request.param)
    tables = folder / "tables"
    tables.mkdir()
    for name in ("items", "users", "events"):
        table = pl.read_parquet(demo_log.folder.parent / "tables" / f"{name}.parquet")
        if name == "events" and request.param != "window":
            table = table.with_columns(pl.col("timestamp") // 86400 * 86400)
        table.write_parquet(tables / f"{name}.parquet")
    changed = {"strict": {"ties": "strict"}, "sampled": {"sampled_negatives": 1}, "window": {"window": 12}}
    changed = changed[request.param]
    build_log(tables, folder / "log", dataclasses.replace(demo_config.prepare, **changed))
    return EventLog.open(folder / "log")


def test_queries_of_rows_are_the_rows_to_the_bit(log, tiny_lm):
    """Features, statistics, neighbors and prompts of 400 rows, of their own items and of drawn ones."""
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(len(log.user), 400, replace=False))
    queries = queries_of_rows(log, rows)
    vectors = rng.normal(size=(3, log.n_items, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    neighbors = Neighbors(log, vectors, rng.integers(0, 3, log.n_users))
    drawn = rng.integers(2, log.n_items, 400).astype(np.int32)
    pieces = dataclasses.replace(
        tiny_lm.pieces,
        statistics_sentence=((0, np.arange(1, 49, dtype=np.int32)), (3, np.arange(1, 49, dtype=np.int32))),
    )
    prompts = Prompts(log, pieces, 4000)
    asked = prompts.for_queries(queries)
    start, end = log.history(rows)
    asked_start, asked_end = queries.log.history(queries.rows)
    assert (end - start == asked_end - asked_start).all()
    for targets in (log.item[rows], drawn):
        for searcher in (neighbors, SameCategory(log)):
            inputs = CrmInputs(log, 20, 10, searcher=searcher, statistics=Statistics(log))
            wanted = inputs(rows, targets)
            got = inputs.for_queries(queries)(queries.rows, targets)
            assert wanted.keys() == got.keys()
            for name in wanted:
                assert wanted[name].dtype == got[name].dtype
                if name.endswith("_elapsed"):  # means nothing where there is no event
                    mask = wanted[name.replace("elapsed", "mask")]
                    assert (wanted[name] == got[name])[mask].all(), name
                elif name != "label":  # the row's own item's, which no query has
                    assert (wanted[name] == got[name]).all(), name
            found = searcher.search(rows, targets, k=7)
            found_by_query = searcher.for_queries(queries).search(queries.rows, targets, k=7)
            is_there = found >= 0
            assert (is_there == (found_by_query >= 0)).all()
            assert is_there.any()
            assert ((found - start[:, None]) == (found_by_query - asked_start[:, None]))[is_there].all()
            wanted = prompts.ctr(rows, np.sort(found), targets)
            got = asked.ctr(queries.rows, np.sort(found_by_query), targets)
            assert (wanted.tokens == got.tokens).all()
            assert (wanted.offsets == got.offsets).all()
    lists = rng.integers(2, log.n_items, (400, 5))
    wanted = prompts.ranking(rows, log.recent(rows, 9), lists, prompts.room(lists))
    got = asked.ranking(queries.rows, queries.log.recent(queries.rows, 9), lists, asked.room(lists))
    assert (wanted.tokens == got.tokens).all()


def test_a_query_at_a_rows_second_has_the_rows_history(log):
    """Where no event of the user has the row's own second, the cut by time finds the same history."""
    rng = np.random.default_rng(1)
    rows = rng.choice(log.n_events, 300, replace=False)
    above = np.maximum(rows - 1, 0)
    shares = (log.user[above] == log.user[rows]) & (log.timestamp[above] == log.timestamp[rows])
    rows = rows[~shares]
    by_row = queries_of_rows(log, rows)
    by_time = build_queries(log, log.user[rows], log.timestamp[rows])
    most = int(by_row.lengths.max())
    places = by_row.log.recent(by_row.rows, most)
    other_places = by_time.log.recent(by_time.rows, most)
    assert ((places >= 0) == (other_places >= 0)).all()
    for name in ("item", "rating", "label", "timestamp"):
        values = getattr(by_row.log, name)[places[places >= 0]]
        assert (values == getattr(by_time.log, name)[other_places[places >= 0]]).all(), name


def test_histories_of_requests_are_those_of_rows(demo_log):
    """A row's history given as a request of a stranger has the same events in the same order."""
    rng = np.random.default_rng(2)
    rows = rng.choice(demo_log.n_events, 50, replace=False)
    by_row = queries_of_rows(demo_log, rows)
    maker = QueryMaker(demo_log)
    events = np.flatnonzero(by_row.log.item != UNKNOWN)
    shuffled = rng.permutation(events)
    levels = np.array([np.nan, *map(float, demo_log.meta["rating_levels"])])
    histories = pl.DataFrame(
        {
            "query": by_row.log.user[shuffled],
            "item": maker.items.external(by_row.log.item[shuffled]),
            "rating": levels[by_row.log.rating[shuffled]],
            "label": by_row.log.label[shuffled],
            "timestamp": by_row.log.timestamp[shuffled],
        }
    )
    strangers = maker.make(
        pl.Series([None] * len(rows), dtype=pl.Int64), pl.Series(demo_log.timestamp[rows]), histories
    )
    assert not strangers.problems
    for name in ("item", "rating", "label", "timestamp", "offsets"):
        assert (getattr(by_row.log, name) == getattr(strangers.log, name)).all(), name
