"""Drawn dislikes: of each liked sample some items that its user had not met, as samples behind the events."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.eventlog import candidates, draws
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.ids import UNUSED
from recllm.eventlog.log import EventLog

Array = npt.NDArray[Any]


def with_sampled_negatives(
    log: EventLog,
    arrays: dict[str, Array],
    order: dict[str, Array],
    config: PrepareConfig,
    external: pl.Series,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The arrays with sampled negatives behind the events, and the orders with them behind their positives.

    A negative is a function of (seed, row of its positive, which one of it), and lies in no user's range of
    rows, so that it is in no history. `anchor` says at which event each one stands. A positive whose user has
    met so much that too few items are left has none.

    Raises:
        ValueError: all of them are such.
    """
    count = config.sampled_negatives
    every_liked = np.flatnonzero((log.split != UNUSED) & (log.label == 1))
    liked = every_liked[candidates.have_new_items(log, every_liked, count)]
    if len(every_liked) and not len(liked):
        most, user = candidates.most_new_items(log, every_liked, external)
        mend = f"ARGS='prepare.sampled_negatives={most}' or fewer" if most else "give samples with label 0"
        raise ValueError(
            f"prepare.sampled_negatives={count}, but none of the {len(every_liked):,} liked samples has as "
            f"many items of the training catalog that are new to its user; the most, {most}, has user "
            f"{user!r}; {mend}"
        )
    has_negatives = np.zeros(len(log.user), dtype=bool)
    has_negatives[liked] = True
    seed = draws.derive(config.seed, "sampled")
    seen = candidates.Seen(log)
    items = candidates.negatives(log, liked, config.sampled_by, count, seed, seen=seen)
    anchor = np.repeat(liked, count)
    columns = {
        "user": log.user[anchor],
        "item": items.ravel(),
        "rating": np.zeros(len(anchor), log.rating.dtype),
        "label": np.zeros(len(anchor), log.label.dtype),
        "timestamp": log.timestamp[anchor],
        "split": log.split[anchor],
        "training": np.zeros(len(anchor), bool),
    }
    longer = {name: np.concatenate([arrays[name], values]) for name, values in columns.items()}

    def with_negatives(rows: Array) -> Array:
        """The rows, and behind each liked one those of its negatives."""
        times = np.where(has_negatives[rows], 1 + count, 1)
        place = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        repeated = np.repeat(rows, times)
        first_negative = len(log.user) + np.searchsorted(liked, repeated) * count
        return np.where(place, first_negative + place - 1, repeated)

    longer_order = {name: with_negatives(rows) for name, rows in order.items()}
    anchors = np.concatenate([arrays.get("anchor", np.zeros(0, np.int64)), log.anchors(anchor)])
    return {**arrays, **longer, "anchor": anchors}, longer_order
