"""Hard search (SIM, Pi et al. 2020): the latest own events that have the target's category."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recllm.data.log import EventLog, Rows


class SameCategory:
    """Finds, in the own history of each row, the latest events with the target's category.

    Every event is one int64 key, (user, category, row) in this order, and the keys are sorted once. The
    events of a query are then a range of the keys that ends where the row's history ends: two binary
    searches, and nothing at or below the row is in reach.

    Args:
        log: the event log; its `category_field` is the item field that is compared.
    """

    def __init__(self, log: EventLog) -> None:
        """Sorts the keys: 8 bytes an event, seconds for 25 million events."""
        self.log = log
        self.category = np.asarray(log.item_fields[:, log.meta["category_field"]], np.int64)
        self.categories = int(self.category.max()) + 1
        positions = np.arange(len(log.user))
        self.keys = self._first(log.user, self.category[log.item]) + positions
        self.keys.sort()

    def _first(self, user: NDArray[np.int32], category: NDArray[np.int64]) -> NDArray[np.int64]:
        """The key that an event of row 0 would have."""
        return (np.asarray(user, np.int64) * self.categories + category) * len(self.log.user)

    def search(self, rows: Rows, targets: NDArray[np.integer] | None = None, k: int = 30) -> Rows:
        """The k latest events of each row's history whose item has its target's category.

        A target of unknown category (1: no training event has it) has no such events.

        Args:
            rows: rows of the log, int64 `[B]`.
            targets: dense item ids `[B]`; the rows' own items by default.
            k: events wanted.

        Returns:
            Rows of the log, int64 `[B, k]`, latest first, padded with -1 at the end.
        """
        category = self.category[self.log.item[rows] if targets is None else targets]
        first = self._first(self.log.user[rows], category)
        _, end = self.log.history(rows)
        low, high = np.searchsorted(self.keys, first), np.searchsorted(self.keys, first + end)
        places = high[:, None] - np.arange(1, k + 1)
        found = self.keys[np.maximum(places, 0)] - first[:, None]
        return np.where((places >= low[:, None]) & (category[:, None] > 1), found, -1)
