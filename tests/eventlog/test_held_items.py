"""prepare.split=items: nothing of a held-out item is known but what the catalog says of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl
import pytest

from recllm.errors import StageError
from recllm.eventlog.all_data import write_all_data
from recllm.eventlog.build import build_log
from recllm.eventlog.candidates import Catalog, candidate_lists, count_new_items, hard_lists, met_before
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.log import EventLog
from recllm.eventlog.splits import held_items
from recllm.eventlog.statistics import Statistics
from recllm.retrieval.vectors import normalize
from tests.eventlog.test_build import random_log, write

CONFIG = PrepareConfig(split="items", held_items=[0.25, 0.25], min_history=1, candidates=5)


def of(tmp_path, **settings):
    return random_log(tmp_path, split="items", held_items=[0.25, 0.25], **{"min_history": 1, **settings})


def test_shares_of_the_items_are_drawn_by_the_seed():
    codes = held_items(dataclasses.replace(CONFIG, held_items=[0.1, 0.2]), 50)
    assert np.bincount(codes, minlength=3).tolist() == [35, 5, 10]
    np.testing.assert_array_equal(codes, held_items(dataclasses.replace(CONFIG, held_items=[0.1, 0.2]), 50))
    other = held_items(dataclasses.replace(CONFIG, held_items=[0.1, 0.2], seed=1), 50)
    assert (codes != other).any()


@pytest.mark.parametrize("ties", ["rows", "strict"])
def test_the_log_is_that_of_the_other_items_and_the_held_rows_lie_behind_it(tmp_path, ties):
    """Two ways: the whole log's rows of the other items, one by one."""
    whole, _ = random_log(tmp_path / "whole", split="time", ties=ties, min_history=1)
    log, metrics = of(tmp_path / "held", ties=ties)
    code = log.item_split[whole.item]
    known = np.flatnonzero(code == 0)
    n = log.n_events
    assert n == len(known)
    for name in ("user", "item", "rating", "label", "timestamp"):
        np.testing.assert_array_equal(getattr(log, name)[:n], getattr(whole, name)[known], name)
        held = np.concatenate([whole.item[:0], getattr(whole, name)[code > 0]])
        np.testing.assert_array_equal(getattr(log, name)[n:], held, name)
    assert not (log.item_split[log.item[:n]] > 0).any()
    assert log.held_rows.tolist() == list(range(n, n + (code > 0).sum()))
    assert metrics["held_events"] == (code > 0).sum()
    # the history of a held row: the events of its history in the whole log that are of other items
    start, end = log.history(log.held_rows)
    first, last = whole.history(np.flatnonzero(code > 0))
    for row in range(len(start)):
        wanted = [at for at in range(first[row], last[row]) if code[at] == 0]
        assert known[start[row] : end[row]].tolist() == wanted
    # samples: of other items those that train by time; of held ones those of their own span
    for name, number in (("valid", 1), ("test", 2)):
        rows = log.rows(name, "all")
        assert len(rows)
        assert (rows >= n).all()
        assert (log.item_split[log.item[rows]] == number).all()
        assert (np.diff(log.timestamp[rows]) >= 0).all()
        in_whole = np.flatnonzero(code > 0)[rows - n]
        assert (whole.split[in_whole] == number).all()
        asked = (code == number) & (whole.split == number)
        assert len(rows) == sum(
            asked[at] and end[place] > start[place] for place, at in enumerate(np.flatnonzero(code > 0))
        )
    train = log.rows("train", "all")
    assert (whole.split[known[train]] == 0).all()
    assert log.timestamp[train].max() <= log.timestamp[log.rows("valid", "all")].min()
    assert not log.item_count[log.item_split > 0].any()
    assert not log.train_events()[n:].any()
    assert (log.item_fields[log.item_split > 0, 0] == 1).all()
    assert metrics["unknown_item_share_test"] == metrics["unknown_item_share_valid"] == 1.0


def test_statistics_know_of_no_event_of_a_held_item(tmp_path):
    log, _ = of(tmp_path)
    codes = Statistics(log)(log.held_rows)
    assert (codes[:, 2] == 1).all()  # item_count: code of no event


@pytest.mark.parametrize("kind", ["uniform", "popular", "hard"])
def test_candidates_of_a_held_item_are_held_items_that_the_user_had_not_met(tmp_path, kind):
    log, _ = of(tmp_path)
    rows = log.rows("test", "all")
    rows = rows[count_new_items(log, rows) >= 4]
    assert len(rows) > 5
    if kind == "hard":
        vectors = normalize(np.random.default_rng(0).normal(size=(1, log.n_items, 4)))
        lists = hard_lists(log, rows, vectors, np.zeros(log.n_users, np.int64), nearest=50, n=5)
    else:
        lists = candidate_lists(log, rows, kind, 5, seed=3)
    assert (log.item_split[lists] == 2).all()
    assert ((lists == log.item[rows, None]).sum(axis=1) == 1).all()
    others = lists != log.item[rows, None]
    met = met_before(log, rows, lists)
    assert not (met & others).any()
    if kind != "hard":
        train = log.rows("train", "all")[:20]
        assert (log.item_split[candidate_lists(log, train, kind, 5, seed=3)] == 0).all()


def test_new_items_are_counted_within_the_catalog_of_a_row(tmp_path):
    log, _ = of(tmp_path)
    rows = np.concatenate([log.rows(name, "all") for name in ("train", "test")])
    counted = count_new_items(log, rows)
    catalogs = {
        int(place): set(part.items.tolist()) for part in Catalog.of(log, rows) for place in part.places
    }
    for place, row in enumerate(rows[:: len(rows) // 40]):
        place *= len(rows) // 40
        at = log.anchors(rows)[place]
        user = log.user[row]
        met = {int(log.item[event]) for event in range(log.offsets[user], at)}
        held = log.held_rows
        met |= {
            int(log.item[event])
            for event in held
            if log.user[event] == user and log.anchors(held)[event - held[0]] < at
        }
        assert counted[place] == len(catalogs[place] - met - {int(log.item[row])})


def test_sampled_negatives_of_a_held_item_are_held_too(tmp_path):
    log, metrics = of(tmp_path, sampled_negatives=2)
    drawn = np.flatnonzero(log.is_drawn(np.arange(len(log.user))))
    assert metrics["sampled_negatives"] == len(drawn) > 0
    for name, code in (("train", 0), ("valid", 1), ("test", 2)):
        rows = log.rows(name, "all")
        ours = rows[log.is_drawn(rows)]
        assert len(ours)
        assert (log.item_split[log.item[ours]] == code).all()
        assert not log.label[ours].any()
        assert (log.history(ours)[1] - log.history(ours)[0] >= 1).all()


def test_it_says_what_it_is_and_refuses_what_it_cannot_do(tmp_path):
    log, metrics = of(tmp_path)
    (note,) = [note for note in metrics["notes"] if note.startswith("split=items")]
    assert f"{metrics['held_events']:,} events of theirs are in no history" in note
    with pytest.raises(StageError, match=r"ALL_DATA=1, e.g. ARGS=prepare.split=time"):
        write_all_data(log, tmp_path / "all", CONFIG)
    rows = [("ab"[second % 2], f"x{second}", 4.0, second % 3 // 2, second) for second in range(12)]
    with pytest.raises(ValueError, match=r"prepare.held_items=.* of 12 items leave .* wanted some of each"):
        build_log(
            write(tmp_path / "few", rows),
            tmp_path / "few" / "log",
            dataclasses.replace(CONFIG, held_items=[0.01, 0.01]),
        )
    untimed = pl.read_parquet(tmp_path / "few" / "tables" / "events.parquet").with_columns(
        timestamp=pl.lit(None, pl.Int64)
    )
    untimed.write_parquet(tmp_path / "few" / "tables" / "events.parquet")
    with pytest.raises(ValueError, match=r"prepare.split=items, but none of the 12 events has a timestamp"):
        build_log(tmp_path / "few" / "tables", tmp_path / "few" / "log", CONFIG)
    assert isinstance(EventLog.open(log.folder).item_split, np.ndarray)
