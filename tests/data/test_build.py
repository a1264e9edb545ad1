import json

import numpy as np
import polars as pl
import pytest

from recllm.data import tables
from recllm.data.build import build_log
from recllm.data.log import EventLog
from recllm.data.splits import PrepareConfig, split_by_time

SCHEMA = {"user": pl.String, "item": pl.String, "rating": pl.Float32, "label": pl.Int8, "timestamp": pl.Int64}


def write(folder, rows, items=None, users=None):
    """Rows are (user, item, rating, label, timestamp)."""
    events = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    names = sorted(set(events["item"]))
    if items is None:
        items = pl.DataFrame({"item": names, "title": names, "genre": [name[0] for name in names]})
    users = pl.DataFrame({"user": sorted(set(events["user"]))}) if users is None else users
    tables.write(folder / "tables", events.lazy(), items, users)
    return folder / "tables"


def two_users():
    """User a: items at seconds 1..8. User b: items at seconds 3, 3, 5, 9, 10, 11. Listed backwards."""
    rows = [("a", f"x{second}", 5.0, 1, second) for second in range(1, 9)]
    seconds = [3, 3, 5, 9, 10, 11]
    items = ["y2", "y1", "x1", "x2", "x3", "y3"]
    rows += [("b", item, 2.0, 0, at) for item, at in zip(items, seconds, strict=True)]
    return rows[::-1]


CONFIG = PrepareConfig(min_history=2, candidates=2, ranking_valid_rows=0, ranking_test_rows=0)


def test_log_of_two_users_by_hand(tmp_path):
    metrics = build_log(write(tmp_path, two_users()), tmp_path / "log", CONFIG)
    log = EventLog.open(tmp_path / "log")
    # ids from 2 on: users a 2, b 3; items x1..x8 are 2..9, y1 y2 y3 are 10 11 12
    assert log.user.tolist() == [2] * 8 + [3] * 6
    assert log.item.tolist() == [*range(2, 10), 10, 11, 2, 3, 4, 12]  # y1 before y2 in the same second
    assert log.offsets.tolist() == [0, 0, 0, 8, 14]
    assert log.rating.tolist() == [2] * 8 + [1] * 6  # codes of the levels 2, 5
    assert log.meta["rating_levels"] == ["2", "5"]
    # samples have 2 rows above them: a's rows 2..7 (seconds 3..8), b's rows 10..13 (seconds 5 9 10 11); by
    # (second, user): 2, 3, 4 10, 5, 6, 7, 11, 12, 13 - ten, so 8 train, 1 valid, 1 test
    assert log.rows("train", "all").tolist() == [2, 3, 4, 10, 5, 6, 7, 11]
    assert log.rows("valid", "all").tolist() == [12]
    assert log.rows("test", "all").tolist() == [13]
    assert log.split.tolist() == [-1, -1, 0, 0, 0, 0, 0, 0, -1, -1, 0, 0, 1, 2]
    # training events: train rows and the early ones; x3 of row 12 and y3 of row 13 are not
    expected = np.zeros(13, dtype=int)
    np.add.at(expected, [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3], 1)
    assert log.item_count.tolist() == expected.tolist()
    assert log.item_likes.tolist() == [0, 0] + [1] * 8 + [0] * 3
    assert metrics["samples"] == 10
    assert (metrics["train"], metrics["valid"], metrics["test"]) == (8, 1, 1)
    assert metrics["not_sample_short_history"] == 4
    assert metrics["shared_second_share"] == pytest.approx(1 / 14)
    assert metrics["positive_rate_train"] == 6 / 8
    assert metrics["unknown_item_share_test"] == 1.0
    assert metrics["cold_user_share_test"] == 0.0


def test_strict_ties_end_the_history_before_the_second(tmp_path):
    config = PrepareConfig(
        min_history=1, ties="strict", candidates=2, ranking_valid_rows=0, ranking_test_rows=0
    )
    build_log(write(tmp_path, two_users()), tmp_path / "log", config)
    log = EventLog.open(tmp_path / "log")
    start, end = log.history(np.array([8, 9, 10]))
    assert start.tolist() == [8, 8, 8]
    assert end.tolist() == [8, 8, 10]  # row 9 shares its second with row 8
    assert log.split[9] == -1  # without row 8 it has no history, so it is no sample
    assert log.split[10] == 0
    build_log(tmp_path / "tables", tmp_path / "log", CONFIG)  # back to rows: the strict bound is gone
    assert EventLog.open(tmp_path / "log").history(np.array([9]))[1].tolist() == [9]


def test_ids_without_a_training_event_read_unknown(tmp_path):
    items = pl.DataFrame(
        {
            "item": [f"x{n}" for n in range(1, 9)] + ["y1", "y2", "y3", "z"],
            "title": ["same", "same"] + [f"t{n}" for n in range(3, 9)] + ["u1", "u2", "u3", "never seen"],
            "genre": ["Drama"] * 10 + ["War", "Never"],
        }
    )
    users = pl.DataFrame({"user": ["a", "b"], "age": [30, None]})
    folder = write(tmp_path, two_users(), items, users)
    fields = PrepareConfig(
        min_history=2, candidates=2, ranking_valid_rows=0, ranking_test_rows=0, user_fields=["age"]
    )
    build_log(folder, tmp_path / "log", fields)
    log = EventLog.open(tmp_path / "log")
    assert log.user_fields.tolist() == [[0, 0], [1, 1], [2, 2], [3, 1]]  # b's age is null
    assert log.n_items == 13  # z has no event, so no id
    assert log.item_fields[:5].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 2, 2], [4, 3, 2]]
    assert log.item_fields[12].tolist() == [1, 1, 1]  # y3 is met in test only, and with it War
    sizes = [(entry["name"], entry["size"]) for entry in log.meta["item_fields"]]
    assert sizes == [("item", 13), ("title", 12), ("genre", 4)]  # 10 titles and 2 genres, + 2
    assert log.meta["category_field"] == 2
    texts = pl.read_parquet(tmp_path / "log" / "items.parquet")
    assert texts["title"].to_list()[:4] == [None, None, "same", "same"]
    assert texts["external"].to_list()[2:4] == ["x1", "x2"]


def test_labels_duplicates_and_missing_times(tmp_path):
    rows = [("a", f"x{second}", 3.5, 1, second) for second in range(20)]
    rows += [("a", "x0", 3.5, 1, 0), ("a", "x1", 3.5, 1, None), ("a", "q", None, None, 30)]
    config = PrepareConfig(
        min_history=1, label_threshold=3.5, candidates=2, ranking_valid_rows=0, ranking_test_rows=0
    )
    metrics = build_log(write(tmp_path, rows), tmp_path / "log", config)
    assert metrics["dropped_duplicates"] == 1
    assert metrics["dropped_no_time"] == 1
    assert metrics["not_sample_no_label"] == 1
    assert metrics["events"] == 21
    assert metrics["samples"] == 19  # not the first, not the one without a label
    log = EventLog.open(tmp_path / "log")
    assert log.label.tolist() == [0] * 20 + [-1]  # 3.5 is not above 3.5
    assert log.rating.tolist() == [1] * 20 + [0]


def test_split_by_time_breaks_ties_by_row():
    timestamp = np.array([5, 7, 7, 1, 7, 9, 7, 7, 7, 7, 7, 7])
    sample = np.ones(12, dtype=bool)
    sample[1] = False
    split, order = split_by_time(timestamp, sample)
    # 11 samples: 11 * 8 // 10 = 8, 11 // 10 = 1, rest 2
    assert order["train"].tolist() == [3, 0, 2, 4, 6, 7, 8, 9]
    assert order["valid"].tolist() == [10]
    assert order["test"].tolist() == [11, 5]
    assert split.tolist() == [0, -1, 0, 0, 0, 2, 0, 0, 0, 0, 1, 2]


def test_permutations_hold_the_split_and_ranking_rows_are_their_liked_prefix(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item:02d}", 4.0, int(rng.random() < 0.5), int(rng.integers(1000)))
        for user in range(20)
        for item in rng.permutation(40)[:20]
    ]
    config = PrepareConfig(candidates=5, ranking_valid_rows=7, ranking_test_rows=1000)
    metrics = build_log(write(tmp_path, rows), tmp_path / "log", config)
    log = EventLog.open(tmp_path / "log")
    for split in ("train", "valid", "test"):
        order = log.rows(split, "all")
        permuted = np.load(tmp_path / "log" / f"permutation_{split}.npy")
        assert sorted(permuted) == sorted(order)
        assert permuted.tolist() != order.tolist()
    for split, count in (("valid", 7), ("test", int((log.label[log.split == 2] == 1).sum()))):
        rows_of, lists = log.ranking(split, "popular5")
        permuted = np.load(tmp_path / "log" / f"permutation_{split}.npy")
        assert rows_of.tolist() == [row for row in permuted if log.label[row] == 1][:count]
        assert metrics[f"ranking_{split}_rows"] == count
        assert lists.shape == (count, 5)
        assert (lists == log.item[rows_of, None]).sum(axis=1).tolist() == [1] * count
    again = tmp_path / "again"
    build_log(tmp_path / "tables", again, config)
    for file in sorted((tmp_path / "log").iterdir()):
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    build_log(tmp_path / "tables", again, PrepareConfig(seed=1, candidates=5))
    assert (
        np.load(again / "permutation_train.npy") != np.load(tmp_path / "log" / "permutation_train.npy")
    ).any()
    assert json.loads((again / "meta.json").read_text())["n_events"] == 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ties": "none"}, "prepare.ties is 'none', wanted rows or strict"),
        ({"min_history": -1}, "wanted 0 or more events"),
        ({"candidates": 1}, "wanted 2 or more items"),
        ({"category": "mood"}, "wanted one of item_fields"),
    ],
)
def test_config_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**change)


def test_errors_of_the_log_are_one_line(tmp_path):
    folder = write(tmp_path, two_users())
    with pytest.raises(ValueError, match="user_fields names 'age', wanted columns"):
        build_log(folder, tmp_path / "log", PrepareConfig(min_history=2, user_fields=["age"]))
    with pytest.raises(ValueError, match="0 samples of 14 events, wanted at least 10"):
        build_log(folder, tmp_path / "log", PrepareConfig(min_history=50))
    pl.DataFrame({"user": ["a"]}).write_parquet(folder / "users.parquet")
    with pytest.raises(ValueError, match=r"1 users of events.parquet \(first: b\) are not in users.parquet"):
        build_log(folder, tmp_path / "log", CONFIG)
