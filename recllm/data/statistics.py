"""What was known before a sample: how often its user, item and category were met, and how well liked."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recllm.data.log import EventLog, Rows

STATISTICS = ("user_count", "user_likes", "item_count", "item_likes", "category_count", "category_likes")
"""The columns of `Statistics`, in this order."""

LEVELS = 48
"""Codes of a column: 0 is never used, as row 0 of every table is padding."""

PRIOR = 5.0
"""How many events the wider share counts as that a share is shrunk to."""

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
        """Sorts the events twice; 40 bytes an event in all, seconds for 25 million events."""
        self.log = log
        events = slice(log.n_events)
        user, item, second = log.user[events], log.item[events], log.timestamp[events]
        liked = log.label[events] == 1
        row = np.arange(log.n_events)
        self._category = np.asarray(log.item_fields[:, log.meta["category_field"]], np.int64)
        self._categories = int(self._category.max()) + 1
        self._first = int(second.min())
        self._liked = _running(liked)  # the log is sorted by user: a history is a range of it
        self._of_item = _Groups(item, second - self._first, int(second.max()) - self._first + 1, liked)
        self._of_category = _Groups(self._taste(user, item), row, log.n_events, liked)
        self._share = float(log.item_likes.sum()) / max(1, int(log.item_count.sum()))

    def _taste(self, user: NDArray[np.int32], item: NDArray[np.int32]) -> Counts:
        """One number for a user and the category of an item."""
        return np.asarray(user, np.int64) * self._categories + self._category[item]

    def __call__(self, rows: Rows, targets: NDArray[np.int32] | None = None) -> NDArray[np.int32]:
        """Codes of (row, target) pairs.

        Args:
            rows: rows of the log, int64 `[B]`.
            targets: dense item ids `[B]`; the rows' own items by default.

        Returns:
            int32 `[B, len(STATISTICS)]`, from 1 to LEVELS - 1.
        """
        log = self.log
        user = log.user.take(rows)
        item = log.item.take(rows) if targets is None else targets
        start, end = log.history(rows)
        seen, liked = end - start, self._liked[end] - self._liked[start]
        of_user = _share(liked, seen, self._share)
        codes = [_magnitude(seen), _level(of_user)]
        seen, liked = self._of_item.before(item, log.timestamp.take(rows) - self._first)
        codes += [_magnitude(seen), _level(_share(liked, seen, self._share))]
        seen, liked = self._of_category.before(self._taste(user, item), end)
        codes += [_magnitude(seen), _level(_share(liked, seen, of_user))]
        return np.stack(codes, 1)


class _Groups:
    """Events sorted by group and place: how many of a group stand before a place, and how many were liked.

    An event is the int64 key `group * span + place`, 0 <= place < span; a query is a range of the keys.
    """

    def __init__(
        self, group: NDArray[np.integer], place: Counts, span: int, liked: NDArray[np.bool_]
    ) -> None:
        keys = np.asarray(group, np.int64) * span + place
        order = np.argsort(keys, kind="stable")
        self._keys, self._span = keys[order], span
        self._liked = _running(liked[order])
        self._starts = np.searchsorted(self._keys, np.arange(int(group.max()) + 2) * span)

    def before(self, group: NDArray[np.integer], place: Counts) -> tuple[Counts, Counts]:
        """Events and liked events of each group before each place, 0 <= place <= span; `[B]` each."""
        group = np.minimum(np.asarray(group, np.int64), len(self._starts) - 1)  # beyond the last: no events
        low, high = self._starts[group], np.searchsorted(self._keys, group * self._span + place)
        return high - low, self._liked[high] - self._liked[low]


def _running(liked: NDArray[np.bool_]) -> Counts:
    """How many of the first n are liked, for each n: `[N + 1]`."""
    return np.concatenate([[0], np.cumsum(liked)])


def _share(liked: Counts, seen: Counts, prior: float | NDArray[np.float64]) -> NDArray[np.float64]:
    return (liked + PRIOR * prior) / (seen + PRIOR)


def _magnitude(count: Counts) -> NDArray[np.int32]:
    return np.minimum(1 + np.floor(2 * np.log2(1 + count)), LEVELS - 1).astype(np.int32)


def _level(share: NDArray[np.float64]) -> NDArray[np.int32]:
    return (1 + np.floor((LEVELS - 2) * share)).astype(np.int32)
