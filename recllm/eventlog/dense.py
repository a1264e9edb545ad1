"""Events, users and items of canonical tables with the dense ids that the log counts by."""

from __future__ import annotations

import numpy as np
import polars as pl

from recllm.eventlog.ids import FIRST_ID, UNUSED
from recllm.tables import canonical

MERGED = (
    "dropped_duplicates",
    "dropped_duplicates_labeled",
    "dropped_duplicates_saying_less",
    "differing_at_one_moment",
)
"""Counts of events that share user, item and second with another: those that do not stay, the ones with a
label and the ones without rating and label among them; those that do, as they say something else."""


def dense_events(
    events: pl.LazyFrame, users: pl.DataFrame, items: pl.DataFrame, total: int, timed: bool
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """Events with dense ids in the log's order; users and items that have events, in order of their ids."""
    place = ["timestamp", "item", "rating", "label"]
    if timed:
        events = events.filter(pl.col("timestamp").is_not_null())
    else:
        events = events.with_columns(timestamp=pl.lit(0, pl.Int64)).with_row_index("place")
        place = ["place"]
    users = _with_events(users, "user", events)
    items = _with_events(items, "item", events)
    given = [column for column in canonical.GIVEN if column in events.collect_schema()]
    frame = (
        events.join(users.lazy().select("external", dense_user="user"), left_on="user", right_on="external")
        .join(items.lazy().select("external", dense_item="item"), left_on="item", right_on="external")
        .select(
            *([] if timed else ["place"]),
            user="dense_user",
            item="dense_item",
            rating=pl.col("rating").fill_null(float("nan")),
            label="label",
            timestamp="timestamp",
            **{column: pl.col(column) for column in given},
        )
        .collect(engine="streaming")
    )
    dropped = {"dropped_no_time": total - frame.height}
    # Dense ids ascend with external ids. Rating and label as last keys make the order, and all that follows
    # from it, independent of the order of the files, and of the one that the join hands rows on in.
    frame = frame.sort("user", *place, *(["split"] if timed and "split" in given else []))
    dropped |= dict.fromkeys(MERGED, 0)
    if timed:
        frame, merged = _merge(frame)
        dropped |= merged
    if "candidates" in given:
        frame = frame.with_columns(_dense_lists(frame["candidates"], items))
    return frame, users, items, dropped


def _dense_lists(lists: pl.Series, items: pl.DataFrame) -> pl.Series:
    """Lists of external item ids as lists of dense ones."""
    places = pl.DataFrame({"place": range(len(lists)), "external": lists}).drop_nulls()
    long = places.explode("external").join(
        items.select("external", "item"), on="external", how="left", maintain_order="left"
    )
    dense = long.group_by("place", maintain_order=True).agg("item")
    every = pl.DataFrame({"place": range(len(lists))})
    joined = every.join(dense, on="place", how="left", maintain_order="left")
    return joined["item"].alias(lists.name)


def _merge(frame: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """Merges events of one user, item and second that say the same, and those that say nothing into others.

    Rows that are alike in rating and label are one event. A row that has neither, such as a view, is no event
    of its own where another row of its user, item and second has one, such as a purchase. All others stay.

    Args:
        frame: events, sorted by user, timestamp, item, rating (NaN: none) and label.

    Returns:
        The events that stay, in the same order, and the counts `MERGED`.
    """
    same_moment = np.zeros(frame.height, dtype=bool)
    same_moment[1:] = True
    for column in ("user", "timestamp", "item"):
        values = frame[column].to_numpy()
        same_moment[1:] &= values[1:] == values[:-1]
    if not same_moment.any():
        return frame, dict.fromkeys(MERGED, 0)
    rating = frame["rating"].to_numpy()
    label = frame["label"].fill_null(-1).to_numpy()
    is_unrated = np.isnan(rating)
    alike = same_moment.copy()
    alike[1:] &= (rating[1:] == rating[:-1]) | (is_unrated[1:] & is_unrated[:-1])
    alike[1:] &= label[1:] == label[:-1]
    if "split" in frame.columns:
        split = frame["split"].fill_null(UNUSED).to_numpy()
        alike[1:] &= split[1:] == split[:-1]
    says_nothing = is_unrated & (label < 0)
    moment = np.cumsum(~same_moment) - 1
    says_something = np.bincount(moment, ~says_nothing) > 0
    gives_way = says_nothing & says_something[moment]
    stays = ~alike & ~gives_way
    counts = {
        "dropped_duplicates": np.count_nonzero(~stays),
        "dropped_duplicates_labeled": np.count_nonzero(alike & (label >= 0)),
        "dropped_duplicates_saying_less": np.count_nonzero(gives_way),
        "differing_at_one_moment": np.count_nonzero(stays) - len(np.unique(moment[stays])),
    }
    return frame.filter(pl.Series(stays)), {name: int(counts[name]) for name in MERGED}


def _with_events(table: pl.DataFrame, name: str, events: pl.LazyFrame) -> pl.DataFrame:
    """The users or items that have events, by ascending external id, with their dense ids in column `name`.

    Items that stand in given lists of candidates are there too.

    Raises:
        ValueError: an event's user or item is not in the table.
    """
    ids = events.select(pl.col(name).unique()).collect(engine="streaming")
    if name == "item" and "candidates" in events.collect_schema():
        listed = events.select(pl.col("candidates").drop_nulls().explode().unique().alias(name)).collect()
        ids = pl.concat([ids, listed]).unique()
    missing = ids.join(table, on=name, how="anti")
    if missing.height:
        raise ValueError(
            f"{missing.height} {name}s of events.parquet (first: {missing[name][0]}) are not in "
            f"{name}s.parquet, wanted all; mend the dataset's recipe.py"
        )
    present = table.join(ids, on=name, how="semi").sort(name).rename({name: "external"})
    return present.with_row_index(name, FIRST_ID).cast({name: pl.Int32})


def with_placeholders(table: pl.DataFrame, name: str) -> pl.DataFrame:
    """The table with null rows for padding and unknown in front, so that row i describes dense id i."""
    empty = pl.DataFrame({name: pl.Series([0, 1], dtype=pl.Int32)})
    return pl.concat([empty, table], how="diagonal")
