"""Events sorted by what they have in common: those of a group before a place are one range."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog.log import EventLog, Rows

_MOST = int(np.iinfo(np.int64).max)
"""The largest key."""

Range = tuple[NDArray[np.int64], NDArray[np.int64]]
"""First event of each query, and the one past its last."""


class Groups:
    """Events sorted by group, then by place.

    An event is the int64 key `group * span + place`; the keys are sorted once, and a query is two bounds.
    There may be many more groups than events, such as all pairs of a user and a category: nothing is held for
    each. Where keys would be too large for 64 bits, the groups that have events are numbered anew.

    Args:
        group: of each event, from 0, `[N]`.
        place: of each event within its group, from 0 to below `span`, int64 `[N]`.
        span: how many places there are.
        values: what is wanted of each event, `[N]`; `self.values` has it in the sorted order.
    """

    def __init__(
        self,
        group: NDArray[np.integer],
        place: NDArray[np.int64],
        span: int,
        values: NDArray[Any],
    ) -> None:
        """Sorts the events: seconds for 25 million; 12 bytes an event stay, and the values."""
        group = np.asarray(group, np.int64)
        self._span = span
        self._present: NDArray[np.int64] | None = None
        self._behind = int(group.max()) + 1  # a group behind all others
        if (self._behind + 1) * span > _MOST:
            self._present, group = np.unique(group, return_inverse=True)
            self._behind = len(self._present)
        keys = group * span + place
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._order = order.astype(np.int32)
        self.values = values[order]

    def before_each(self) -> Range:
        """Of each event, as they were given, its group's events before its own place: bounds `[N]`."""
        first = _run_starts(self._keys // self._span)
        end = _run_starts(self._keys)
        bounds = np.empty((2, len(end)), np.int64)
        bounds[0, self._order] = first
        bounds[1, self._order] = end
        return bounds[0], bounds[1]

    def before(self, group: NDArray[np.integer], place: NDArray[np.int64]) -> Range:
        """Each group's events before each place, 0 <= place <= span; none where no event has the group."""
        group = np.asarray(group, np.int64)
        if self._present is not None:
            number = np.searchsorted(self._present, group)
            is_there = self._present[np.minimum(number, len(self._present) - 1)] == group
            group = np.where(is_there, number, self._behind)
        first = np.minimum(group, self._behind) * self._span
        return np.searchsorted(self._keys, first), np.searchsorted(self._keys, first + place)


def _run_starts(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each of the sorted values the first place that has the same."""
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return np.repeat(starts, np.diff(starts, append=len(values)))


class CategoryHistories(Groups):
    """Events by user and category of the item (the log's `category_field`), in the order of the log.

    Args:
        log: the event log.
        values: what is wanted of each event, `[n_events]`.
    """

    def __init__(self, log: EventLog, values: NDArray[Any]) -> None:
        """Sorts the events, which takes a fraction of any other sort: the log is in order of users."""
        self.log = log
        self.category = np.asarray(log.item_fields[:, log.meta["category_field"]], np.int64)
        self._categories = int(self.category.max()) + 1
        count = log.n_events
        group = self._group(log.user[:count], log.item[:count])
        super().__init__(group, np.arange(count), count, values)

    def _group(self, user: NDArray[np.int32], item: NDArray[np.integer]) -> NDArray[np.int64]:
        return np.asarray(user, np.int64) * self._categories + self.category[item]

    def ranges(self, rows: Rows, targets: NDArray[np.integer]) -> Range:
        """The events of each row's history whose item has its target's category; `[B]` each."""
        start, end = self.log.history(rows)
        group = self._group(self.log.user.take(rows), targets)
        events = self.before(group, end)
        if not self.log.meta.get("window"):
            return events
        return self.before(group, start)[1], events[1]
