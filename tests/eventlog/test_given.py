"""What the data set says itself, splits and candidate lists; windows, and logs of liked events only."""

import numpy as np
import polars as pl
import pytest

from recllm.eventlog.build import build_log
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.groups import CategoryHistories
from recllm.eventlog.log import EventLog
from recllm.eventlog.rowsets import has_ranking_rows
from recllm.eventlog.splits import training_events
from recllm.tables import canonical

LETTERS = "abcdefghijkl"
ITEMS = pl.DataFrame({"item": list(LETTERS), "title": list(LETTERS), "genre": list("xyxyxyxyxyxy")})
SCHEMA = {"user": pl.String, "item": pl.String, "label": pl.Int8, "split": pl.Int8}
ROWS = [
    ("u", "a", None, 0), ("u", "b", 1, 0), ("u", "c", 1, 0), ("u", "d", 1, 1), ("u", "e", 1, 2),
    ("v", "b", None, 1), ("v", "a", 1, 1), ("v", "f", 1, 2),
    ("w", "c", 1, None), ("w", "a", 1, 0),
    ("z", "i", None, 0), ("z", "j", None, 0), ("z", "k", None, 0), ("z", "l", 1, 0),
]  # fmt: skip
"""u goes through all splits; v is in no training row; what w met first is in no split; z fills the rest."""
CONFIG = PrepareConfig(
    split="given", min_history=1, candidates=3, labels="liked", ranking_valid_rows=9, ranking_test_rows=9
)


def write(folder, rows=ROWS, lists=None):
    events = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    events = events.with_columns(rating=pl.lit(None, pl.Float32), timestamp=pl.lit(None, pl.Int64))
    if lists is not None:
        events = events.with_columns(candidates=pl.Series(lists, dtype=pl.List(pl.String)))
    users = pl.DataFrame({"user": sorted(set(events["user"]))})
    canonical.write(folder / "tables", events.lazy(), ITEMS, users)
    return folder / "tables"


def build(folder, config=CONFIG, **tables):
    metrics = build_log(write(folder, **tables), folder / "log", config)
    return metrics, EventLog.open(folder / "log")


def test_the_splits_are_those_of_the_tables(tmp_path):
    metrics, log = build(tmp_path)
    assert log.split.tolist() == [-1, 0, 0, 1, 2, -1, 1, 2, -1, 0, -1, -1, -1, 0]
    assert [log.rows(name, "all").tolist() for name in ("train", "valid", "test")] == [
        [1, 2, 9, 13],
        [3, 6],
        [4, 7],
    ]
    # Of v, whom no training row has, nothing is counted; c of w stands above no held-out event.
    assert log.training.tolist() == [True] * 3 + [False] * 5 + [True] * 6
    assert metrics["train_after_held_out"] == 0
    assert "split=given: 0 of 4 training samples have held-out events in their histories" in metrics["notes"]
    assert any(note.startswith("labels=liked: all samples are liked") for note in metrics["notes"])


def test_training_samples_behind_held_out_ones_are_told(tmp_path):
    rows = [row if row[:2] != ("u", "c") else ("u", "c", 1, 2) for row in ROWS]
    rows[3] = ("u", "d", 1, 0)
    metrics, log = build(tmp_path, rows=rows)
    assert metrics["train_after_held_out"] == 1
    assert log.training.tolist() == [True, True, False, True] + [False] * 4 + [True] * 6


def test_events_of_no_split_train_above_the_first_held_out_event():
    given = np.array([-1, 2, -1, 0, -1])
    user = np.array([2, 2, 2, 3, 3])
    got = training_events(CONFIG, user, given, {}, None, given)
    assert got.tolist() == [True, False, False, True, True]


def test_splits_that_nothing_says_are_refused(tmp_path):
    folder = write(tmp_path)
    events = pl.read_parquet(folder / "events.parquet").drop("split")
    events.write_parquet(folder / "events.parquet")
    with pytest.raises(ValueError, match=r"^prepare\.split=given, but events\.parquet has no column split"):
        build_log(folder, tmp_path / "log", CONFIG)


def test_a_window_cuts_every_history(tmp_path):
    _, log = build(tmp_path)
    _, cut = build(tmp_path / "cut", PrepareConfig(**{**vars(CONFIG), "window": 2}))
    rows = np.arange(len(log.user))
    start, end = log.history(rows)
    cut_start, cut_end = cut.history(rows)
    assert cut_end.tolist() == end.tolist()
    assert cut_start.tolist() == np.maximum(start, end - 2).tolist()
    assert cut.recent(np.array([4]), 4).tolist() == [[-1, -1, 2, 3]]
    # Row 4 of u: before it a b c d, of genres x y x y; two of the genre of e, one of them in the window.
    targets = log.item[[4]]
    for of_log, expected in ((log, 2), (cut, 1)):
        low, high = CategoryHistories(of_log, of_log.item).ranges(np.array([4]), targets)
        assert (high - low).tolist() == [expected]


LISTS = [None, None, None, ["a", "d", "h"], ["e", "b", "g"], None, ["a", "c", "d"], *[None] * 7]


def test_lists_of_the_data_set_are_stored_beside_the_drawn_ones(tmp_path):
    lists = [*LISTS[:7], ["b", "c", "f"], *LISTS[8:]]
    metrics, log = build(tmp_path, lists=lists)
    assert log.candidate_kinds == ("uniform3", "popular3", "given3")
    assert has_ranking_rows(log)
    names = pl.read_parquet(log.folder / "items.parquet")["external"].to_list()
    for split, wanted in (("valid", {3: "adh", 6: "acd"}), ("test", {4: "ebg", 7: "bcf"})):
        rows, given = log.ranking(split, "given3")
        found = {row: "".join(names[item] for item in line) for row, line in zip(rows, given, strict=True)}
        assert found == wanted
        assert log.ranking(split, "uniform3")[0].tolist() == rows.tolist()
        assert metrics[f"ranking_{split}_rows"] == 2
    # g and h have no event; as candidates they have an id.
    assert log.n_items == 2 + len(LETTERS)
    assert log.item_count[[names.index("g"), names.index("h")]].tolist() == [0, 0]


def test_only_samples_with_a_list_are_ranked_where_a_split_has_lists(tmp_path):
    _, log = build(tmp_path, lists=LISTS)
    assert log.ranking("test", "given3")[0].tolist() == [4]
    no_valid = [*LISTS[:3], None, *LISTS[4:6], None, *LISTS[7:]]
    _, log = build(tmp_path / "test", lists=no_valid)
    assert log.candidate_kinds == ("uniform3", "popular3")
    assert log.ranking("test", "given3")[1].shape == (1, 3)
    assert sorted(log.ranking("valid", "uniform3")[0].tolist()) == [3, 6]


def test_a_column_without_any_list_gives_none(tmp_path):
    _, log = build(tmp_path, lists=[None] * len(ROWS))
    assert log.candidate_kinds == ("uniform3", "popular3")
    assert sorted(log.ranking("test", "uniform3")[0].tolist()) == [4, 7]


def test_lists_of_another_length_than_drawn_ones_are_refused(tmp_path):
    config = PrepareConfig(**{**vars(CONFIG), "candidates": 4})
    with pytest.raises(
        ValueError, match=r"have 3 candidates, wanted prepare\.candidates=4; ARGS='prepare\.c"
    ):
        build(tmp_path, config, lists=LISTS)


def test_liked_events_alone_are_an_error_unless_it_is_said(tmp_path):
    config = PrepareConfig(**{**vars(CONFIG), "labels": "both"})
    with pytest.raises(ValueError, match="all 4 training samples have label 1, wanted both 0 and 1"):
        build(tmp_path, config)


def test_a_window_shorter_than_the_least_history_is_refused():
    with pytest.raises(ValueError, match=r"prepare\.window=2 .*prepare\.min_history=5 or more"):
        PrepareConfig(window=2)
    with pytest.raises(ValueError, match=r"prepare\.window=-1"):
        PrepareConfig(window=-1, min_history=0)


def test_alike_events_of_two_splits_are_two(tmp_path):
    """With times, events that are alike are one; not where they are of two splits."""
    folder = write(tmp_path, rows=[*ROWS, ("u", "e", 1, 2), ("u", "d", 1, 2)])
    events = pl.read_parquet(folder / "events.parquet").with_columns(timestamp=pl.lit(7, pl.Int64))
    events.write_parquet(folder / "events.parquet")
    metrics = build_log(folder, tmp_path / "log", CONFIG)
    assert metrics["dropped_duplicates"] == 1
    assert metrics["events"] == len(ROWS) + 1
