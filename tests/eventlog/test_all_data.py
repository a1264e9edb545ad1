"""A log that holds nothing out: what of it differs from the one that it was made from, and what does not."""

import numpy as np
import pytest

from recllm.errors import StageError
from recllm.eventlog.all_data import all_samples, check_holds_out, write_all_data
from recllm.eventlog.build import build_log
from recllm.eventlog.log import EventLog
from tests.eventlog.test_build import CONFIG, random_log, two_users, write


@pytest.fixture
def logs(tmp_path):
    """The log of `test_log_of_two_users_by_hand`, the same with nothing held out, and what was counted."""
    build_log(write(tmp_path, two_users()), tmp_path / "log", CONFIG)
    log = EventLog.open(tmp_path / "log")
    metrics = write_all_data(log, tmp_path / "whole", CONFIG)
    return log, EventLog.open(tmp_path / "whole"), metrics


def test_every_sample_trains_and_every_event_counts(logs):
    log, whole, metrics = logs
    assert metrics["events"] == 14
    assert metrics["train"] == metrics["samples"] == 10
    assert (metrics["valid"], metrics["test"]) == (0, 0)
    assert whole.train_events().all()
    assert whole.split.tolist() == [-1, -1, 0, 0, 0, 0, 0, 0, -1, -1, 0, 0, 0, 0]
    # x1 to x8 are 2 to 9, met once by a, x1, x2 and x3 by b, too; y1, y2, y3 are 10, 11, 12, met by b.
    assert whole.item_count.tolist() == [0, 0, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert whole.item_likes.tolist() == [0, 0] + [1] * 8 + [0] * 3
    # y3 was met in the test split alone.
    assert log.item_fields[12, 0] == 1
    assert whole.item_fields[:, 0].tolist() == list(range(13))


def test_rows_are_the_same_rows_in_the_order_of_time(logs):
    log, whole, _ = logs
    for name in ("user", "item", "rating", "label", "timestamp", "offsets"):
        assert (getattr(whole, name) == getattr(log, name)).all()
    assert whole.rows("train", "all").tolist() == [2, 3, 4, 10, 5, 6, 7, 11, 12, 13]
    assert sorted(whole.rows("train", "1.0")) == sorted(whole.rows("train", "all"))
    # Who sets a training up finds the rows that were held out.
    assert whole.rows("valid", "all").tolist() == [12]


@pytest.mark.parametrize("split", ["time", "last", "user", "random"])
def test_drawn_negatives_stand_behind_their_events(tmp_path, split):
    log, _ = random_log(tmp_path, split=split, ties="strict", sampled_negatives=2)
    order = all_samples(log)
    assert sorted(order) == np.flatnonzero(log.split >= 0).tolist()
    events = order[order < log.n_events]
    assert events.tolist() == sorted(events, key=lambda row: (log.timestamp[row], row))
    first = np.flatnonzero((order >= log.n_events) & (np.roll(order, 1) < log.n_events))
    assert (log.anchors(order[first]) == order[first - 1]).all()
    assert (log.anchors(order[first + 1]) == order[first - 1]).all()
    config = CONFIG.__class__(candidates=5, split=split, ties="strict", sampled_negatives=2)
    write_all_data(log, tmp_path / "whole", config)
    whole = EventLog.open(tmp_path / "whole")
    assert whole.train_events().tolist() == [True] * log.n_events + [False] * (len(log.user) - log.n_events)
    assert whole.strict_ties
    for ours, theirs in zip(whole.history(order), log.history(order), strict=True):
        assert (ours == theirs).all()


def test_it_measures_nothing(logs):
    log, whole, _ = logs
    check_holds_out(log)
    with pytest.raises(StageError, match=r"whole trains on its test split, too \(ALL_DATA=1\)"):
        check_holds_out(whole)
