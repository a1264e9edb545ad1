"""Counts and shares of likes before a sample: of its user, of its item, of its user in its category."""

from __future__ import annotations

import copy
import functools

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog.groups import CategoryHistories, Groups, Range
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.queries import Queries

STATISTICS = ("user_count", "user_likes", "item_count", "item_likes", "category_count", "category_likes")
"""The columns of `Statistics`, in this order."""

LEVELS = 48
"""Codes of a column: 0 is never used, as row 0 of every table is padding."""

PRIOR = 5.0
"""How many events the wider share counts as that a share is shrunk to."""

OWN_ROWS = 8
"""After one in so many of the log's rows was asked for, all are computed and kept: in order, a row takes
about so much less time than alone."""

CHUNK = 2**16
"""Rows that are computed at once."""

Counts = NDArray[np.int64]


class Statistics:
    """Running counts and shares of likes, as codes that an embedding table reads.

    Of a sample's user: the events of its history. Of its item: the events of all users in earlier seconds; a
    log without times has none. Of its user and its target's category: the history's events of that category.
    Of each, how many there are, n, and which share s was liked:

        code of n: 1 + floor(2 log2(1 + n)), at most LEVELS - 1
        code of s: 1 + floor((LEVELS - 2) s),  s = (likes + PRIOR s') / (n + PRIOR)

    where s' is the share of likes among training events for users and items, and the user's own s for its
    categories. An event without a label counts as not liked. Held-out events count for what comes after
    them, as they do in histories: what is read is what a running system would know at that second.

    Args:
        log: the event log.
    """

    def __init__(self, log: EventLog) -> None:
        """Sorts the events; 54 bytes an event in all, seconds for 25 million events."""
        self.log = log
        self._asked = 0
        events = slice(log.n_events)
        liked = log.label[events] == 1
        second = log.timestamp[events]
        self._first = int(second.min())
        self._span = int(second.max()) - self._first + 1
        self._items = Groups(log.item[events], second - self._first, self._span, liked)
        self._categories = CategoryHistories(log, liked)
        # The log itself is sorted by user: a history is a range of it.
        self._liked = {
            "user": _running(liked),
            "item": _running(self._items.values),
            "category": _running(self._categories.values),
        }
        self._liked_share = float(log.item_likes.sum()) / max(1, int(log.item_count.sum()))

    def for_queries(self, queries: Queries) -> Statistics:
        """The same of queries: of an item the trained log's events, of a user the query's own history."""
        other = copy.copy(self)
        other.__dict__.pop("_own", None)
        other.log = queries.log
        liked = queries.log.label == 1
        other._categories = CategoryHistories(queries.log, liked)
        other._liked = {
            "user": _running(liked),
            "item": self._liked["item"],
            "category": _running(other._categories.values),
        }
        return other

    def __call__(self, rows: Rows, targets: NDArray[np.int32] | None = None) -> NDArray[np.int32]:
        """Codes of (row, target) pairs.

        Args:
            rows: rows of the log, int64 `[B]`.
            targets: dense item ids `[B]`; the rows' own items by default.

        Returns:
            int32 `[B, len(STATISTICS)]`, from 1 to LEVELS - 1.
        """
        if targets is None and len(rows) and rows.max() < self.log.n_events:
            self._asked += len(rows)
            if self._asked * OWN_ROWS >= self.log.n_events:
                return self._own.take(rows, 0).astype(np.int32)
        item = self.log.item.take(rows) if targets is None else targets
        # A query may stand before the log's first second, or behind its last.
        second = np.clip(self.log.timestamp.take(rows) - self._first, 0, self._span)
        return self._codes(rows, item, self._items.before(item, second))

    @functools.cached_property
    def _own(self) -> NDArray[np.uint8]:
        """Codes of every event with its own item `[n_events, len(STATISTICS)]`: no search for the item's."""
        first, end = self._items.before_each()
        codes = np.empty((self.log.n_events, len(STATISTICS)), np.uint8)
        for start in range(0, len(codes), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(codes)))
            codes[rows] = self._codes(rows, self.log.item[rows], (first[rows], end[rows]))
        return codes

    def _codes(self, rows: Rows, item: NDArray[np.integer], of_items: Range) -> NDArray[np.int32]:
        """Codes `[B, len(STATISTICS)]` of rows and items, whose earlier events are known."""
        events, liked = self._count("user", self.log.history(rows))
        user_share = _liked_share(liked, events, self._liked_share)
        codes = [_magnitude(events), _level(user_share)]
        events, liked = self._count("item", of_items)
        codes += [_magnitude(events), _level(_liked_share(liked, events, self._liked_share))]
        events, liked = self._count("category", self._categories.ranges(rows, item))
        codes += [_magnitude(events), _level(_liked_share(liked, events, user_share))]
        return np.stack(codes, 1)

    def _count(self, order: str, events: Range) -> tuple[Counts, Counts]:
        """How many events ranges of a sorted order hold, and how many of them are liked."""
        low, high = events
        return high - low, self._liked[order][high] - self._liked[order][low]


def words(column: str) -> list[str]:
    """What a prompt says of each code of a column of `STATISTICS`, with the space before it.

    Of a count the least of its code, to two digits; of a share the middle of its level, in steps of 5 %.
    """
    if column.endswith("_count"):
        least = np.ceil(2 ** ((np.arange(LEVELS) - 1) / 2)) - 1
        return [f" {float(f'{count:.2g}'):.0f}" for count in least]
    middle = (np.arange(LEVELS) - 0.5) / (LEVELS - 2)
    return [f" {5 * round(20 * level)}%" for level in middle]


def _running(liked: NDArray[np.bool_]) -> Counts:
    """How many of the first n are liked, for each n: `[N + 1]`."""
    return np.concatenate([[0], np.cumsum(liked)])


def _liked_share(liked: Counts, events: Counts, prior: float | NDArray[np.float64]) -> NDArray[np.float64]:
    return (liked + PRIOR * prior) / (events + PRIOR)


def _magnitude(count: Counts) -> NDArray[np.int32]:
    return np.minimum(1 + np.floor(2 * np.log2(1 + count)), LEVELS - 1).astype(np.int32)


def _level(liked_share: NDArray[np.float64]) -> NDArray[np.int32]:
    return (1 + np.floor((LEVELS - 2) * liked_share)).astype(np.int32)
