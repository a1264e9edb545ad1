import json
import re

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.errors import ConfigError, StageError
from recllm.eventlog.build import build_log
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.log import EventLog
from recllm.eventlog.rowsets import aligned_rows, with_new_items
from recllm.tables import canonical

SCHEMA = {"user": pl.String, "item": pl.String, "rating": pl.Float32, "label": pl.Int8, "timestamp": pl.Int64}


def write(folder, rows, items=None, users=None):
    """Rows are (user, item, rating, label, timestamp)."""
    events = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    names = sorted(set(events["item"]))
    if items is None:
        items = pl.DataFrame({"item": names, "title": names, "genre": [name[0] for name in names]})
    users = pl.DataFrame({"user": sorted(set(events["user"]))}) if users is None else users
    canonical.write(folder / "tables", events.lazy(), items, users)
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
    rows = [("a", f"x{second}", 4.0 if second == 2 else 3.5, 1, second) for second in range(20)]
    rows += [("a", "x0", 3.5, 1, 0), ("a", "x1", 3.5, 1, None), ("a", "q", None, None, 30)]
    rows += [("b", "q", 3.5, 1, 40)]
    config = PrepareConfig(
        min_history=1, label_threshold=3.5, candidates=2, ranking_valid_rows=0, ranking_test_rows=0
    )
    metrics = build_log(write(tmp_path, rows), tmp_path / "log", config)
    assert metrics["dropped_duplicates"] == 1
    assert metrics["dropped_no_time"] == 1
    assert metrics["not_sample_no_label"] == 1
    assert metrics["events"] == 22
    assert metrics["samples"] == 19  # not the first of a user, not the one without a label
    log = EventLog.open(tmp_path / "log")
    assert log.label.tolist() == [0, 0, 1] + [0] * 17 + [-1, 0]  # 3.5 is not above 3.5
    assert log.rating.tolist() == [1, 1, 2] + [1] * 17 + [0, 1]


def test_at_one_moment_a_label_is_not_merged_away(tmp_path):
    """Views, purchases and skips of days: of the two rows of a view and a purchase the purchase stays."""
    log = [("P", None, 1), ("P", 1, 1), ("Q", None, 2), ("R", None, 3), ("R", 1, 3), ("S", None, 4)]
    log += [("S", 0, 5), ("Q", 1, 6), ("Q", 1, 6), ("T", 0, 7), ("T", 1, 7)]
    rows = [(user, item, None, label, day) for user in "abc" for item, label, day in log]
    config = PrepareConfig(
        min_history=0, split="random", shares=[0.5, 0.25], candidates=2, ranking_valid_rows=0,
        ranking_test_rows=0,
    )  # fmt: skip
    metrics = build_log(write(tmp_path, rows), tmp_path / "log", config)
    log = EventLog.open(tmp_path / "log")
    assert log.label.tolist() == [1, -1, 1, -1, 0, 1, 0, 1] * 3  # P, Q, R, S, S, Q, and T twice
    assert metrics["samples"] == 18
    assert metrics["dropped_duplicates"] == 9
    assert metrics["dropped_duplicates_labeled"] == 3  # the second purchase of Q
    assert metrics["dropped_duplicates_saying_less"] == 6  # the views of P and R
    assert metrics["differing_at_one_moment"] == 3
    assert metrics["notes"][-2:] == [
        "9 rows were merged into another of their user, item and second: 3 are like it (3 with a label), "
        "6 have neither rating nor label",
        "3 rows differ from another of their user, item and second in rating or label only; all of them are "
        "events",
    ]


EVENTS = st.lists(
    st.tuples(
        st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from([None, 2.0, 5.0]),
        st.sampled_from([None, 0, 1]), st.integers(1, 3),
    ),
    max_size=25,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(rows=EVENTS, order=st.randoms(use_true_random=False))
def test_what_is_said_at_a_moment_is_kept_whatever_the_order_of_the_file(tmp_path_factory, rows, order):
    rows = [*rows, *(("c", f"w{second}", None, second % 2, second) for second in range(10, 30))]
    rows += [("d", "x", 2.0, 1, 12)]
    config = PrepareConfig(min_history=0, candidates=2, ranking_valid_rows=0, ranking_test_rows=0)
    arrays = []
    for number in range(2):
        folder = tmp_path_factory.mktemp(f"log{number}")
        metrics = build_log(write(folder, rows), folder / "log", config)
        arrays.append({path.name: np.load(path) for path in (folder / "log").glob("*.npy")})
        order.shuffle(rows)
    assert arrays[0].keys() == arrays[1].keys()
    for name, values in arrays[0].items():
        assert np.array_equal(values, arrays[1][name]), name
    saying = {row for row in rows if row[2] is not None or row[3] is not None}
    others = {(user, item, at) for user, item, _, _, at in rows} - {
        (user, item, at) for user, item, _, _, at in saying
    }
    assert metrics["events"] == len(saying) + len(others)
    assert metrics["dropped_duplicates"] == len(rows) - metrics["events"]
    assert metrics["not_sample_no_label"] == len(others) + sum(row[3] is None for row in saying)


def test_the_span_of_each_split_and_times_that_no_log_can_have(tmp_path):
    day = 86_400
    start = 1_600_000_000
    future = 4_000_000_000  # in 2096
    seconds = [0, *(start + number * day for number in range(18)), future]
    rows = [(user, f"x{n}", float(n % 2), n % 2, at) for user in "ab" for n, at in enumerate(seconds)]
    config = PrepareConfig(min_history=0, candidates=2, ranking_valid_rows=0, ranking_test_rows=0)
    metrics = build_log(write(tmp_path, rows), tmp_path / "log", config)
    # 40 samples by time, two at each: 32 train, 4 validate, 4 test
    assert (metrics["first_second_train"], metrics["last_second_train"]) == (0, start + 14 * day)
    assert (metrics["first_second_valid"], metrics["last_second_valid"]) == (
        start + 15 * day,
        start + 16 * day,
    )
    assert (metrics["first_second_test"], metrics["last_second_test"]) == (start + 17 * day, future)
    assert (metrics["events_before_1973"], metrics["events_of_the_future"]) == (2, 2)
    assert metrics["notes"][-1].startswith("2 events are of before 1973 and 2 of the future")
    usual = [row for row in rows if row[4] not in (0, future)]
    assert not build_log(write(tmp_path, usual), tmp_path / "log", config)["notes"]


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


def test_errors_of_the_log_are_one_line(tmp_path):
    folder = write(tmp_path, two_users())
    with pytest.raises(ValueError, match="user_fields names 'age', wanted columns"):
        build_log(folder, tmp_path / "log", PrepareConfig(min_history=2, user_fields=["age"]))
    with pytest.raises(ValueError, match=r"0 of 14 events are samples.*50 earlier.*wanted some of each"):
        build_log(folder, tmp_path / "log", PrepareConfig(min_history=50))
    liked = write(tmp_path / "liked", [(*row[:3], 1, row[4]) for row in two_users()])
    with pytest.raises(ValueError, match=r"all 8 training samples have label 1.*prepare.sampled_negatives=1"):
        build_log(liked, tmp_path / "log", CONFIG)
    pl.DataFrame({"user": ["a"]}).write_parquet(folder / "users.parquet")
    with pytest.raises(ValueError, match=r"1 users of events.parquet \(first: b\) are not in users.parquet"):
        build_log(folder, tmp_path / "log", CONFIG)


@pytest.mark.parametrize(
    ("count", "config", "change"),
    [
        (9, {"min_history": 0}, {"shares": [0.5, 0.25]}),
        (30, {"min_history": 50}, {"min_history": 0}),
        (9, {"min_history": 50}, {"min_history": 0, "shares": [0.5, 0.25]}),
        (18, {"min_history": 0, "split": "last", "last_n": 5}, {"last_n": 1}),
        (9, {"min_history": 0, "split": "user"}, {"split": "random", "shares": [0.5, 0.25]}),
        (2, {"min_history": 0}, None),
    ],
)
def test_the_remedy_for_an_empty_split_helps(tmp_path, count, config, change):
    rows = [("ab"[n % 2], f"x{n}", None, n // 2 % 2, n) for n in range(count)]
    folder = write(tmp_path, rows)
    rest = {"candidates": 2, "ranking_valid_rows": 0, "ranking_test_rows": 0}
    with pytest.raises(ValueError, match="wanted some of each; ") as error:
        build_log(folder, tmp_path / "log", PrepareConfig(**config, **rest))
    remedy = str(error.value).partition("some of each; ")[2]
    if change is None:
        assert remedy == "give more events with a label: no key helps"
        return
    for key, value in change.items():
        assert f"prepare.{key}={'<fewer>' if 'fewer' in remedy else str(value).replace(' ', '')}" in remedy
    assert build_log(folder, tmp_path / "log", PrepareConfig(**{**config, **change, **rest}))["test"]


def clicks():
    """Clicks of users a and b in the order of the file, which is not that of the ids; b met y1 twice."""
    rows = [("b", "y3"), ("a", "x9"), ("b", "y1"), ("b", "y2"), ("a", "x1"), ("a", "x5"), ("b", "y1")]
    rows += [("a", f"x{n}") for n in (8, 2, 7, 3, 6)]
    return [(*row, None, 1, None) for row in rows]


CLICKS = {"min_history": 2, "candidates": 2, "ranking_valid_rows": 0, "ranking_test_rows": 0}


def test_without_times_the_order_is_the_files(tmp_path):
    config = PrepareConfig(split="last", sampled_negatives=1, **CLICKS)
    metrics = build_log(write(tmp_path, clicks()), tmp_path / "log", config)
    log = EventLog.open(tmp_path / "log")
    names = pl.read_parquet(tmp_path / "log" / "items.parquet")["external"]
    events = [names[int(item)] for item in log.item[: log.n_events]]
    assert events == ["x9", "x1", "x5", "x8", "x2", "x7", "x3", "x6", "y3", "y1", "y2", "y1"]
    assert not log.timed
    assert not log.timestamp.any()
    assert log.meta["rating_levels"] == []
    assert metrics["dropped_no_time"] == metrics["dropped_duplicates"] == 0
    # a's samples are rows 2 .. 7, b's 10 and 11; the last of each tests, the one before validates
    assert log.split[: log.n_events].tolist() == [-1, -1, 0, 0, 0, 0, 1, 2, -1, -1, 1, 2]
    assert "shared_second_share" not in metrics
    assert [note.partition(":")[0] for note in metrics["notes"]][:2] == [
        "no event has a timestamp",
        "split=last",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "prepare.split=time, but none of the 12 events has a timestamp.*prepare.split=last.*random"),
        ({"split": "last", "ties": "strict"}, "prepare.ties=strict, but none of the 12.*prepare.ties=rows"),
    ],
)
def test_what_needs_times_is_refused_before_anything_is_written(tmp_path, change, message):
    folder = write(tmp_path, clicks())
    with pytest.raises(ValueError, match=message) as error:
        build_log(folder, tmp_path / "log", PrepareConfig(**CLICKS, **change))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "log").exists()


def random_log(tmp_path, **config):
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user:02d}", f"i{item:02d}", None, int(rng.random() < 0.7), int(rng.integers(300)))
        for user in range(30)
        for item in rng.permutation(60)[: rng.integers(4, 30)]
    ]
    config = PrepareConfig(candidates=5, ranking_valid_rows=20, ranking_test_rows=20, **config)
    metrics = build_log(write(tmp_path, rows), tmp_path / "log", config)
    return EventLog.open(tmp_path / "log"), metrics


@pytest.mark.parametrize("split", ["time", "last", "user", "random"])
@pytest.mark.parametrize("ties", ["rows", "strict"])
def test_sampled_negatives_stand_at_their_positive(tmp_path, split, ties):
    plain, _ = random_log(tmp_path / "plain", split=split, ties=ties)
    log, metrics = random_log(tmp_path, split=split, ties=ties, sampled_negatives=3, sampled_by="popular")
    n = log.n_events
    liked = np.flatnonzero((plain.split >= 0) & (plain.label == 1))
    assert metrics["sampled_negatives"] == len(log.user) - n == 3 * len(liked)
    # the events, what is counted of them, and who is known are what they were
    for name in ("user", "item", "rating", "label", "timestamp", "split", "training"):
        np.testing.assert_array_equal(getattr(log, name)[:n], getattr(plain, name), name)
    for name in ("offsets", "user_fields", "item_fields", "item_count", "item_likes"):
        np.testing.assert_array_equal(getattr(log, name), getattr(plain, name), name)
    drawn = np.arange(n, len(log.user))
    anchors = log.anchors(drawn)
    assert anchors.tolist() == np.repeat(liked, 3).tolist()
    assert not log.train_events()[drawn].any()
    assert not log.label[drawn].any()
    assert not log.rating[drawn].any()
    for name in ("user", "split", "timestamp"):
        np.testing.assert_array_equal(getattr(log, name)[drawn], getattr(log, name)[anchors])
    for ours, theirs in zip(log.history(drawn), plain.history(anchors), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(log.recent(drawn, 7), plain.recent(anchors, 7))
    items = log.item[drawn].reshape(-1, 3)
    for row, three in zip(liked, items, strict=True):
        met = set(log.item[log.offsets[log.user[row]] : row + 1])
        assert len(set(three)) == 3
        assert not met & set(three)
        assert (log.item_count[three] > 0).all()
    for name in ("train", "valid", "test"):
        rows = log.rows(name, "all")
        assert rows[rows < n].tolist() == plain.rows(name, "all").tolist()
        assert sorted(rows) == sorted(log.rows(name, "1.0"))
        # each positive is followed by its three, whatever the order of the events
        expected = []
        for event in plain.rows(name, "all"):
            first = n + 3 * np.searchsorted(liked, event)
            expected += [event, *(range(first, first + 3) if plain.label[event] == 1 else ())]
        assert rows.tolist() == expected
        if name != "train":
            assert (log.label[log.ranking(name, "uniform5")[0]] == 1).all()


def everybody_sees_everything(items, users):
    """Users of the longest names see most; half of what they see is liked."""
    return [
        (f"u{user:02d}", f"i{(item * 7 + user) % items:02d}", None, item // 2 % 2, 100 * item + user)
        for user in range(users)
        for item in range(items - (users - 1 - user))
    ]


def test_users_who_have_seen_too_much_are_not_ranked(tmp_path):
    folder = write(tmp_path, everybody_sees_everything(40, 12))
    config = PrepareConfig(min_history=2, candidates=20, split="random")
    metrics = build_log(folder, tmp_path / "log", config)
    log = EventLog.open(tmp_path / "log")
    for name in ("valid", "test"):
        rows, lists = log.ranking(name, "uniform20")
        all_rows = log.rows(name, "1.0")
        liked = all_rows[log.label[all_rows] == 1]
        # Everything is in the training catalog, and nobody meets anything twice.
        place = liked - log.offsets[log.user[liked]]
        assert rows.tolist() == liked[40 - place - 1 >= 19].tolist()
        assert metrics[f"not_ranking_{name}_seen_much"] == len(liked) - len(rows) > 0
        assert lists.shape == (len(rows), 20)
    assert any("no ranking rows, as fewer than 19 items are new" in note for note in metrics["notes"])


def plays():
    """Thirty users who play one of forty songs at a time, every second time one of their last three again."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(30):
        songs = []
        for play in range(40):
            again = play > 5 and rng.random() < 0.5
            songs.append(songs[-rng.integers(1, 4)] if again else int(rng.integers(40)))
            rows.append((f"u{user:02d}", f"i{songs[-1]:02d}", None, 1, 60 * play + user))
    return rows


@pytest.mark.parametrize(
    ("repeats", "draw_met"), [("leave_out", None), ("keep", None), ("keep", False), ("keep", True)]
)
def test_repeats_do_not_give_the_target_away_or_are_told(tmp_path, repeats, draw_met):
    config = PrepareConfig(candidates=4, sampled_negatives=1, repeats=repeats, draw_met=draw_met)
    metrics = build_log(write(tmp_path, plays()), tmp_path / "log", config)
    log = EventLog.open(tmp_path / "log")
    draws_met = repeats == "keep" and draw_met is not False
    assert log.draws_met == draws_met
    pairs = np.stack([log.user, log.item], 1)[: log.n_events]
    assert log.repeats == len(pairs) - len(np.unique(pairs, axis=0))

    def is_met(row, item=None):
        at = int(log.anchors(np.array([row]))[0])
        return (log.item[row] if item is None else item) in log.item[log.offsets[log.user[row]] : at]

    for name in ("valid", "test"):
        rows, lists = log.ranking(name, "uniform4")
        permuted = log.rows(name, "1.0")
        liked = permuted[log.label[permuted] == 1]
        met = np.array([is_met(row) for row in liked])
        assert rows.tolist() == liked[~met if repeats == "leave_out" else slice(None)].tolist()
        assert lists.shape == (len(rows), 4)
        assert (lists == log.item[rows, None]).sum(1).tolist() == [1] * len(rows)
        assert metrics[f"ranking_{name}_met_before"] == (0 if repeats == "leave_out" else met.sum())
        others = [
            is_met(row, item)
            for row, line in zip(rows, lists, strict=True)
            for item in line
            if item != log.item[row]
        ]
        assert any(others) == draws_met
        assert metrics[f"ranking_{name}_candidates_met_before_share"] == pytest.approx(np.mean(others))
        told = f"repeats=leave_out: .*{met.mean():.1%} of {len(liked)} {name}"
        if repeats == "keep":
            told = f"repeats=keep: the target of {met.mean():.1%} of {len(rows)} {name}"
            told = f"{told}.* {np.mean(others):.1%} of"
        assert any(re.match(told, note) for note in metrics["notes"])
    samples = np.flatnonzero((log.split >= 0) & (log.label == 1))
    share = np.mean([is_met(row) for row in samples])
    drawn = np.mean([is_met(row) for row in range(log.n_events, len(log.user))])
    assert (drawn > 0) == draws_met
    assert metrics["liked_met_before_share"] == pytest.approx(share)
    assert metrics["drawn_met_before_share"] == pytest.approx(drawn)
    which = "met or not" if draws_met else "that the user had not met"
    assert any(f"samples are drawn items {which} (uniform)" in note for note in metrics["notes"])
    told = f"{share:.1%} of the liked samples are of an item that the user had met before, {drawn:.1%} of"
    assert any(note.startswith(told) for note in metrics["notes"])
    train = log.rows("train", "all")
    train = train[log.label[train] == 1]
    wanted = [row for row in train if repeats == "keep" or not is_met(row)]
    assert with_new_items(log, train, 3, "stage1.negatives").tolist() == wanted


def test_candidates_that_were_met_are_no_use_where_no_target_was():
    with pytest.raises(ConfigError, match=r"prepare\.draw_met=True.*wanted false or null with .*leave_out"):
        PrepareConfig(draw_met=True)


def test_only_repeats_are_an_error_whose_remedy_helps(tmp_path):
    rows = [(user, f"x{n % 6}", None, int(n % 4 > 0), n) for user in "abc" for n in range(40)]
    folder = write(tmp_path, rows)
    with pytest.raises(
        ValueError, match=r"all .* liked valid samples are of items.*ARGS='prepare.repeats=keep'"
    ):
        build_log(folder, tmp_path / "log", PrepareConfig(candidates=6))
    kept = build_log(folder, tmp_path / "log", PrepareConfig(candidates=6, repeats="keep"))
    assert kept["ranking_test_rows"]
    off = "ranking_valid_rows=0 prepare.ranking_test_rows=0"
    with pytest.raises(ValueError, match=rf"all .* liked valid samples are of items.*ARGS='prepare.{off}'"):
        build_log(folder, tmp_path / "log", PrepareConfig(candidates=7))
    unranked = PrepareConfig(candidates=7, ranking_valid_rows=0, ranking_test_rows=0)
    assert build_log(folder, tmp_path / "log", unranked)["samples"]


def test_training_rows_whose_users_have_seen_too_much_are_left_out(tmp_path, capsys):
    config = PrepareConfig(min_history=2, candidates=20, split="random")
    build_log(write(tmp_path, everybody_sees_everything(40, 12)), tmp_path / "log", config)
    log = EventLog.open(tmp_path / "log")
    rows = log.rows("train", "1.0")
    liked = rows[log.label[rows] == 1]
    kept = liked[40 - (liked - log.offsets[log.user[liked]]) - 1 >= 19]
    assert aligned_rows(log, np.array([], int), 1000).tolist() == kept.tolist()
    assert capsys.readouterr().out == (
        f"{len(liked) - len(kept)} of {len(liked)} liked training rows are left out, as fewer than 19 items "
        "are new to their users (prepare.candidates)\n"
    )
    with pytest.raises(
        StageError, match=r"has 40 items .* the most, 37, has user 'u..'; lower stage1.negatives"
    ):
        with_new_items(log, liked, 40, "stage1.negatives")


def test_where_nobody_can_be_ranked_the_remedy_helps(tmp_path):
    folder = write(tmp_path, everybody_sees_everything(40, 12))
    wanted = (
        r"none of the .. liked (valid|test) samples has 37 .* has user 'u..'; ARGS='prepare.candidates=(\d+)'"
    )
    with pytest.raises(ValueError, match=wanted) as error:
        build_log(folder, tmp_path / "log", PrepareConfig(min_history=2, candidates=38))
    assert "\n" not in str(error.value)
    candidates = int(re.search(wanted, str(error.value))[2])
    metrics = build_log(folder, tmp_path / "log", PrepareConfig(min_history=2, candidates=candidates))
    assert metrics["ranking_valid_rows"]
    assert metrics["ranking_test_rows"]
    twice = [(f"v{user}", f"i{n}", None, n % 2, n) for user in range(3) for n in [*range(9), *range(9, 30)]]
    twice = [(user, f"i{n % 9}", rating, label, n) for n, (user, _, rating, label, _) in enumerate(twice)]
    folder = write(tmp_path / "twice", twice)
    off = "ARGS='prepare.ranking_valid_rows=0 prepare.ranking_test_rows=0'"
    with pytest.raises(ValueError, match=f"the most, 0, has user 'v.'; {off}"):
        build_log(
            folder,
            tmp_path / "log",
            PrepareConfig(
                split="last", min_history=9, candidates=2, last_n=4, repeats="keep", draw_met=False
            ),
        )


def test_a_liked_sample_whose_user_knows_everything_has_no_negatives(tmp_path):
    rows = [(user, item, None, 1, at) for user, item, _, _, at in everybody_sees_everything(12, 4)]
    folder = write(tmp_path, rows)
    config = PrepareConfig(
        min_history=2, split="random", candidates=2, ranking_valid_rows=0, ranking_test_rows=0,
        sampled_negatives=3,
    )  # fmt: skip
    metrics = build_log(folder, tmp_path / "log", config)
    log = EventLog.open(tmp_path / "log")
    events = np.flatnonzero(log.split[: log.n_events] >= 0)
    without = events[12 - (events - log.offsets[log.user[events]]) - 1 < 3]
    assert metrics["liked_without_negatives"] == len(without) > 0
    anchors = log.anchors(np.arange(log.n_events, len(log.user)))
    assert sorted(anchors.tolist()) == np.repeat(np.setdiff1d(events, without), 3).tolist()
    everything = np.sort(np.concatenate([log.rows(name, "all") for name in ("train", "valid", "test")]))
    assert everything.tolist() == [*events, *range(log.n_events, len(log.user))]
    config = PrepareConfig(**{**vars(config), "sampled_negatives": 11})
    with pytest.raises(
        ValueError, match=r"the most, 9, has user 'u0.'; ARGS='prepare.sampled_negatives=9' or"
    ):
        build_log(folder, tmp_path / "log", config)


def test_sampled_negatives_do_not_depend_on_how_many_are_drawn_at_once(tmp_path, monkeypatch):
    whole, _ = random_log(tmp_path / "whole", sampled_negatives=2)
    monkeypatch.setattr("recllm.eventlog.candidates._BYTES", 7 * 2 * 2 * (2 + 64))
    parts, _ = random_log(tmp_path / "parts", sampled_negatives=2)
    np.testing.assert_array_equal(whole.item, parts.item)
    other, _ = random_log(tmp_path / "other", sampled_negatives=2, seed=1)
    assert (other.item != whole.item).any()


def test_strict_ties_say_what_they_cost(tmp_path):
    log, metrics = random_log(tmp_path, ties="strict")
    times = np.asarray(log.timestamp)
    tied = np.r_[False, (log.user[1:] == log.user[:-1]) & (times[1:] == times[:-1])]
    assert metrics["tied_sample_share"] == pytest.approx(tied[log.split >= 0].mean())
    above = np.arange(log.n_events) - log.offsets[log.user]
    before = np.array([
        (times[log.offsets[u] : row] < times[row]).sum() for row, u in enumerate(log.user)
    ])  # fmt: skip
    assert metrics["not_sample_same_second"] == ((above >= 5) & (before < 5)).sum() > 0
    assert metrics["notes"][0].startswith("ties=strict")


def impressions(*kinds):
    """Of four users forty events each, one a second; their (rating, label) are `kinds` in turns."""
    return [(user, f"i{n:02d}", *kinds[n % len(kinds)], n) for user in "abcd" for n in range(40)]


SHOWN, SKIPPED, CLICKED, SEEN = (3.0, 1), (None, 0), (None, 1), (None, None)


@pytest.mark.parametrize(
    ("kinds", "levels", "codes"),
    [
        ([SKIPPED, SKIPPED, SKIPPED, CLICKED], 0, [1, 1, 1, 2]),
        ([SKIPPED, CLICKED, SEEN], 0, [1, 2, 0]),
        ([CLICKED, SEEN, CLICKED], 0, [2, 0, 2]),  # with drawn dislikes: views and purchases
        ([(2.0, 0), (4.0, 1), SKIPPED, CLICKED, SEEN], 2, [1, 2, 3, 4, 0]),
        ([SHOWN, SKIPPED], 1, [1, 2]),
    ],
)
def test_histories_mark_labels_of_events_without_a_rating(tmp_path, kinds, levels, codes):
    folder = write(tmp_path, impressions(*kinds))
    settings = {"min_history": 2, "candidates": 2, "ranking_valid_rows": 0, "ranking_test_rows": 0}
    settings["sampled_negatives"] = int(kinds == [CLICKED, SEEN, CLICKED])
    disliked, unlabeled = kinds.count(SKIPPED) / len(kinds), kinds.count(SEEN) / len(kinds)
    metrics = build_log(folder, tmp_path / "log", PrepareConfig(**settings))
    log = EventLog.open(tmp_path / "log")
    assert (log.shows_labels, log.codes) == (True, levels + 2)
    assert log.rating[: log.n_events].tolist() == [codes[n % len(codes)] for _ in "abcd" for n in range(40)]
    assert not log.rating[log.n_events :].any()
    assert metrics["unrated_disliked_share"] == pytest.approx(disliked, abs=0.02)
    told = f"{metrics['unrated_disliked_share']:.1%} of the events that stand in histories are disliked"
    assert any(note.startswith(told) and "mark" in note for note in metrics["notes"]) == bool(disliked)
    told = f"{metrics['unrated_unlabeled_share']:.1%} of the events that stand in histories have neither"
    assert any(note.startswith(told) for note in metrics["notes"]) == bool(unlabeled)

    metrics = build_log(folder, tmp_path / "hidden", PrepareConfig(history_labels="hide", **settings))
    hidden = EventLog.open(tmp_path / "hidden")
    assert (hidden.shows_labels, hidden.codes) == (False, levels)
    assert (hidden.rating == np.where(log.rating > levels, 0, log.rating)).all()
    told = "nothing shows it (history_labels=hide)"
    assert any(told in note for note in metrics["notes"]) == bool(disliked)
    for name in ("label", "split", "item_count", "item_likes", "training"):
        assert (getattr(hidden, name) == getattr(log, name)).all()


@pytest.mark.parametrize("kinds", [[(2.0, 0), (4.0, 1)], [(2.0, 0), (4.0, 1), SEEN], [CLICKED]])
def test_where_ratings_or_nothing_tells_labels_no_code_is_added(tmp_path, kinds):
    settings = {"min_history": 2, "candidates": 2, "ranking_valid_rows": 0, "ranking_test_rows": 0}
    settings["sampled_negatives"] = int(kinds == [CLICKED])
    metrics = build_log(write(tmp_path, impressions(*kinds)), tmp_path / "log", PrepareConfig(**settings))
    log = EventLog.open(tmp_path / "log")
    assert not log.shows_labels
    assert log.codes == len(log.meta["rating_levels"])
    assert not any("disliked" in note and "histories" in note for note in metrics["notes"])


def test_a_rating_that_does_not_tell_the_label_is_told(tmp_path):
    """Ratings of 2 and 4, and a label of its own; a third of the events has a rating of one label."""
    kinds = [(2.0, 0), (4.0, 1), (4.0, 0)]
    metrics = build_log(write(tmp_path, impressions(*kinds)), tmp_path / "log", CONFIG)
    share = np.mean([n % 3 > 0 for n in range(40)])
    told = f"{share:.1%} of the events have a rating that others have too whose label is the other one"
    assert any(note.startswith(told) for note in metrics["notes"])
