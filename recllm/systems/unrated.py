"""Baselines that know something of items that nobody has rated: by their category, or by their texts.

They stand in the tables of a log that holds whole items out (`prepare.split=items`), where all that counts
events knows nothing.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog.ids import UNKNOWN
from recllm.eventlog.log import EventLog, Rows
from recllm.systems.catalog import CatalogScorer, CatalogScores, hide_reserved
from recllm.systems.system import Kind, Scores, Task

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]


class CategoryPopularity(CatalogScorer):
    """How popular the item is, and where little is known of it, its category.

        rate(i)  = (likes_i + prior * rate(c)) / (events_i + prior)        the click's log-odds are of it
        count(i) = (events_i * events_i + prior * mean(c)) / (events_i + prior)     for ranking
        rate(c)  = (likes_c + prior * rate) / (events_c + prior)
        mean(c)  = (events_c + prior * mean) / (items_c + prior)

    of item i and its category c, over training events; items_c are the items of c that have one, and rate and
    mean those of all items. An item without an event has its category's rate and mean count.

    Args:
        log: the event log; its category is `prepare.category`.
        prior: how many events, or items, the wider share counts as.
    """

    kind = Kind.COUNTING
    tasks = (Task.CTR, Task.RANKING, Task.NEXT)

    def __init__(self, log: EventLog, prior: float = 20.0) -> None:
        """Count."""
        super().__init__("popularity-by-category")
        self.log = log
        category = np.asarray(log.item_fields[:, log.meta["category_field"]], np.int64)
        events = log.item_count.astype(np.float64)
        likes = log.item_likes.astype(np.float64)
        has_events = events > 0
        size = int(category.max()) + 1
        events_of = np.bincount(category, events, size)
        items_of = np.bincount(category, has_events, size)
        # Half an event of each kind keeps the log-odds finite where every label is the same.
        mean_rate = (likes.sum() + 0.5) / (events.sum() + 1.0)
        rate_of = (np.bincount(category, likes, size) + prior * mean_rate) / (events_of + prior)
        mean_count = events.sum() / max(1, has_events.sum())
        count_of = (events_of + prior * mean_count) / (items_of + prior)
        rate = (likes + prior * rate_of[category]) / (events + prior)
        self._log_odds: Floats = np.log(rate) - np.log1p(-rate)
        self._counts: Floats = (events**2 + prior * count_of[category]) / (events + prior)

    def ctr(self, rows: Rows) -> Scores:
        """See `System`."""
        return self._log_odds[self.log.item[rows]]

    def rank(self, rows: Rows, lists: NDArray[np.int32]) -> Scores:
        """See `System`."""
        return self._counts[lists]

    def scores(self, log: EventLog, rows: Rows) -> CatalogScores:
        """See `CatalogScorer`: the same for everybody."""
        return hide_reserved(np.tile(self._counts.astype(np.float32), (len(rows), 1)))


class TextKnn(CatalogScorer):
    """Item-kNN on vectors of the items' texts: what reads like what the user liked.

    For clicks a smoothed share of likes among the events of the history, each weighing the more the more it
    reads like the target; for ranking the sum of cosines with the last liked events, as `Cooccurrence` sums:

        P(like)  = (sum_t w_t like_t + prior * mean) / (sum_t w_t + prior),  w_t = exp(sharpness (cos_t - 1))
        score(i) = sum_{p=1..liked} p^-1 cos(i, p-th last liked event)

    where mean is the share of likes among all training events. Nothing is trained.

    Args:
        log: the event log.
        vectors: float32 `[n_items, d]`, rows of length 1, or zero of an item without a text.
        recent: how many of the last events of a history a click is told by.
        liked: how many of its last liked events a rank is told by.
        sharpness: how fast an event's weight falls with its cosine.
        prior: weight of the mean.
    """

    kind = Kind.COUNTING
    tasks = (Task.CTR, Task.RANKING, Task.NEXT)

    def __init__(
        self,
        log: EventLog,
        vectors: Vectors,
        recent: int = 200,
        liked: int = 10,
        sharpness: float = 5.0,
        prior: float = 0.1,
    ) -> None:
        """Keeps the vectors."""
        super().__init__("text-knn")
        self.log = log
        self._vectors = vectors
        self._has_text = vectors.any(axis=1)
        self._recent = recent
        self._liked = liked
        self._sharpness = sharpness
        self._prior = prior
        self._mean = (float(log.item_likes.sum()) + 0.5) / (float(log.item_count.sum()) + 1.0)

    def ctr(self, rows: Rows) -> Scores:
        """See `System`."""
        rows = np.asarray(rows, np.int64)
        logits = np.empty(len(rows))
        for first in range(0, len(rows), 1024):
            part = rows[first : first + 1024]
            events = self.log.recent(part, self._recent)
            there = events >= 0
            target = self._vectors[self.log.item[part]]
            cosine = np.einsum("btd,bd->bt", self._vectors[self.log.item[events]], target)
            weight = np.exp(self._sharpness * (cosine.astype(np.float64) - 1.0)) * there
            likes = (weight * (self.log.label[events] == 1)).sum(axis=1)
            share = (likes + self._prior * self._mean) / (weight.sum(axis=1) + self._prior)
            logits[first : first + 1024] = np.log(share) - np.log1p(-share)
        return logits

    def rank(self, rows: Rows, lists: NDArray[np.int32]) -> Scores:
        """See `System`."""
        return cast(Scores, np.einsum("bd,bcd->bc", self._users(self.log, rows), self._vectors[lists]))

    def scores(self, log: EventLog, rows: Rows) -> CatalogScores:
        """See `CatalogScorer`; an item without a text cannot be recommended."""
        scores = (self._users(log, rows) @ self._vectors.T).astype(np.float32)
        scores[:, ~self._has_text] = -np.inf
        return hide_reserved(scores)

    def _users(self, log: EventLog, rows: Rows) -> Vectors:
        """Sums `[B, d]` of the vectors of each row's last liked events, the p-th last one weighing 1 / p."""
        rows = np.asarray(rows, np.int64)
        events = log.recent(rows, self._recent)
        is_liked = (events >= 0) & (log.label[events] == 1) & (log.item[events] > UNKNOWN)
        from_last = np.cumsum(is_liked[:, ::-1], axis=1)[:, ::-1]
        counts = is_liked & (from_last <= self._liked)
        weight = np.where(counts, 1.0 / np.maximum(from_last, 1), 0.0).astype(np.float32)
        users = np.empty((len(rows), self._vectors.shape[1]), np.float32)
        for first in range(0, len(rows), 1024):
            part = slice(first, first + 1024)
            users[part] = np.einsum("bt,btd->bd", weight[part], self._vectors[log.item[events[part]]])
        return users
