import itertools

import numpy as np
import polars as pl
import pytest

from recllm.eventlog.build import build_log
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.log import EventLog
from recllm.tables import canonical


def build(folder, ties="rows"):
    """User a: x0..x9 at seconds 0..9; user b: y0..y5 at seconds 1, 1, 2, 8, 8, 20. Rows 0-9 and 10-15."""
    rows = [("a", f"x{i}", 4.0, i % 2, i) for i in range(10)]
    rows += [("b", f"y{i}", 2.0, 1, second) for i, second in enumerate([1, 1, 2, 8, 8, 20])]
    schema = {
        "user": pl.String,
        "item": pl.String,
        "rating": pl.Float32,
        "label": pl.Int8,
        "timestamp": pl.Int64,
    }
    events = pl.DataFrame(rows, schema=schema, orient="row")
    items = pl.DataFrame({"item": [row[1] for row in rows], "title": [row[1] for row in rows]})
    items = items.with_columns(genre=pl.col("item").str.slice(0, 1))
    canonical.write(folder / "tables", events.lazy(), items, pl.DataFrame({"user": ["a", "b"]}))
    config = PrepareConfig(min_history=2, candidates=2, ranking_valid_rows=1, ranking_test_rows=1, ties=ties)
    build_log(folder / "tables", folder / "log", config)
    return EventLog.open(folder / "log")


def test_histories_by_hand(tmp_path):
    log = build(tmp_path)
    rows = np.array([0, 1, 9, 10, 11, 14])
    start, end = log.history(rows)
    assert start.tolist() == [0, 0, 0, 10, 10, 10]
    assert end.tolist() == [0, 1, 9, 10, 11, 14]
    recent = [[-1, -1, -1], [-1, -1, 0], [6, 7, 8], [-1, -1, -1], [-1, -1, 10], [11, 12, 13]]
    assert log.recent(rows, 3).tolist() == recent


def test_strict_histories_end_before_the_second(tmp_path):
    log = build(tmp_path, "strict")
    rows = np.array([11, 12, 13, 14, 15])  # 11 shares its second with 10, and 14 with 13
    assert log.history(rows)[1].tolist() == [10, 12, 13, 13, 15]
    assert log.recent(rows, 2).tolist() == [[-1, -1], [10, 11], [11, 12], [11, 12], [13, 14]]


def test_training_events_are_early_ones_and_the_training_split(tmp_path):
    log = build(tmp_path)
    # 12 samples (rows 2-9 and 12-15); by time: 2 12 3 4 5 6 7 8 13 14 9 15: nine train, one validates, two
    # test. The last training second is 8, so that all four early rows count.
    assert log.rows("train", "all").tolist() == [2, 12, 3, 4, 5, 6, 7, 8, 13]
    assert log.rows("valid", "all").tolist() == [14]
    assert log.rows("test", "all").tolist() == [9, 15]
    assert np.flatnonzero(~log.train_events()).tolist() == [9, 14, 15]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_row_sets_nest_and_stay_within_their_split(demo_log, split):
    whole = demo_log.rows(split, "all")
    assert sorted(whole) == sorted(demo_log.rows(split, "1.0"))
    assert set(demo_log.split[whole]) == {{"train": 0, "valid": 1, "test": 2}[split]}
    assert (np.diff(demo_log.timestamp[whole]) >= 0).all()
    np.testing.assert_array_equal(demo_log.rows(split, "first20"), whole[:20])
    np.testing.assert_array_equal(demo_log.rows(split, "last20"), whole[-20:])
    assert len(demo_log.rows(split, "last0")) == 0
    np.testing.assert_array_equal(demo_log.rows(split, "last1000000"), whole)
    sizes = ["uniform1", "uniform10", "0.1", "0.25", ".5", "uniform1000000"]
    sets = sorted((demo_log.rows(split, name).tolist() for name in sizes), key=len)
    for small, large in itertools.pairwise(sets):
        assert large[: len(small)] == small
    assert len(demo_log.rows(split, "0.25")) == round(0.25 * len(whole))
    assert len(sets[-1]) == len(whole)
    assert demo_log.rows(split, "uniform10").tolist() != whole[:10].tolist()


@pytest.mark.parametrize("name", ["", "some", "uniform", "first-3", "1.5", "0", "all2", "10%", "1"])
def test_unknown_row_sets_are_refused(demo_log, name):
    from recllm.config.merge import merge
    from recllm.errors import ConfigError

    with pytest.raises(ValueError, match=r"row set .*wanted"):
        demo_log.rows("train", name)
    with pytest.raises(ConfigError):  # already when the plan is made
        merge([], {"subsample": name})


@pytest.mark.parametrize("name", ["all", "first3", "last3", "uniform3", "0.1", ".1", "1.0"])
def test_what_the_configuration_lets_through_is_known_here(demo_log, name):
    from recllm.config.merge import merge

    assert len(demo_log.rows("train", merge([], {"subsample": name}).subsample))


def test_an_unknown_split_is_refused(demo_log):
    with pytest.raises(ValueError, match="'dev' is not one of train, valid, test"):
        demo_log.rows("dev", "all")


def test_no_log_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="make prepare"):
        EventLog.open(tmp_path)


def test_stored_candidates_hold_the_target_once_and_no_history(demo_log):
    for split in ("valid", "test"):
        for kind in ("uniform20", "popular20"):
            rows, candidates = demo_log.ranking(split, kind)
            assert candidates.shape == (len(rows), 20)
            assert (demo_log.label[rows] == 1).all()
            assert ((candidates == demo_log.item[rows][:, None]).sum(1) == 1).all()
            for row, items in zip(rows, candidates, strict=True):
                start, _ = demo_log.history(np.array([row]))
                assert not set(items) & set(demo_log.item[start[0] : row])


def test_lists_that_are_not_there_are_one_line(demo_log):
    with pytest.raises(ValueError, match=r"no candidates of kind hard20 .*are popular20, uniform20"):
        demo_log.ranking("test", "hard20")


def test_the_arrays_cannot_be_written_to(demo_log):
    with pytest.raises(ValueError, match="read-only"):
        demo_log.item[0] = 1
