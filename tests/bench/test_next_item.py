"""What RecTools is handed of a leave-one-out log, and how its lists are measured."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest

from bench.next_item import LISTED, Split, measure
from recllm.errors import StageError
from recllm.eventlog.build import build_log
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.log import EventLog
from recllm.tables import canonical

EVENTS = {
    # A user of two events, and of four and five; the last of user b share their second: item 7 after item 5.
    "user": ["a", "a", "b", "b", "b", "b", "c", "c", "c", "c", "c"],
    "item": [1, 2, 2, 3, 7, 5, 1, 2, 3, 4, 6],
    "timestamp": [10, 20, 1, 2, 3, 3, 5, 6, 7, 8, 9],
}


def make(folder, **prepare):
    events = pl.DataFrame(EVENTS).with_columns(rating=pl.lit(4.0), label=pl.lit(1, pl.Int8))
    items = pl.DataFrame(
        {"item": range(1, 8), "title": [f"Film {n}" for n in range(1, 8)], "genre": ["g"] * 7}
    )
    users = pl.DataFrame({"user": ["a", "b", "c"]})
    canonical.write(folder / "tables", events.lazy(), items, users)
    settings = {"split": "last", "min_history": 0, "labels": "liked", "candidates": 2}
    config = PrepareConfig(**{**settings, "ranking_valid_rows": 0, "ranking_test_rows": 0, **prepare})
    build_log(folder / "tables", folder / "log", config)
    return EventLog.open(folder / "log")


def externals(log, items):
    return pl.read_parquet(log.folder / "items.parquet")["external"].to_numpy()[items].tolist()


def test_rectools_gets_training_events_and_validation_rows_in_the_logs_order(tmp_path):
    log = make(tmp_path)
    split = Split.of(log, "last")
    split.write(tmp_path / "peer" / "events.npz")
    events = np.load(tmp_path / "peer" / "events.npz")
    order = np.argsort(events["user"], kind="stable")
    np.testing.assert_array_equal(order, np.arange(len(order)))
    assert externals(log, events["item"]) == [1, 2, 3, 5, 1, 2, 3, 4]
    assert events["held"].tolist() == [True, False, False, True, False, False, False, True]
    assert events["second"].tolist() == [10, 1, 2, 3, 5, 6, 7, 8]
    assert events["test_second"].tolist() == [20, 3, 9]
    assert externals(log, log.item[split.test]) == [2, 7, 6]
    assert not set(events.files) & {"test_item", "label", "rating"}


def test_places_stand_for_seconds_where_a_log_has_no_times(tmp_path):
    log = make(tmp_path)
    log.meta["timed"] = False
    Split.of(log, "last").write(tmp_path / "events.npz")
    events = np.load(tmp_path / "events.npz")
    assert events["second"].tolist() == [0, 0, 1, 2, 0, 1, 2, 3]
    assert events["test_second"].tolist() == [1, 3, 4]


def test_lists_are_measured_as_all_others_are(tmp_path):
    log = make(tmp_path)
    split = Split.of(log, "last")
    own = log.item[split.test]
    items = np.zeros((3, LISTED), np.int32)
    items[0, 0] = own[0]  # the first place
    items[1, :3] = [own[0], own[2], own[1]]  # the third
    figures, values = measure(split, items)  # and a user without a list
    assert figures["hr@1"] == pytest.approx(1 / 3)
    assert figures["hr@10"] == figures["recall@500"] == pytest.approx(2 / 3)
    assert values.tolist() == pytest.approx([1, 1 / math.log2(4), 0])
    assert figures["ndcg@10"] == pytest.approx(values.mean())
    assert figures["tied_targets"] == 1


@pytest.mark.parametrize("prepare", [{"split": "random"}, {"last_n": 2, "split": "last"}])
def test_other_splits_are_refused_in_a_line(tmp_path, prepare):
    log = make(tmp_path, **prepare)
    with pytest.raises(StageError, match="wanted a log of one event of a user in each held-out split"):
        Split.of(log, prepare["split"])
