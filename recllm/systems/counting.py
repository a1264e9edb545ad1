"""Baselines that only count: popularity, and which items are liked together or soon after one another.

They have no training beyond one pass over the training events, and are always in the table: on ML-1M the
directed counts ranked better than every language model of the first experiments.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from recllm.eventlog.candidates import met_before
from recllm.eventlog.ids import TRAIN
from recllm.eventlog.log import EventLog, Rows
from recllm.systems.system import Kind, Scores, System, Task

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def popularity_ctr(log: EventLog, prior: float = 20.0) -> Floats:
    """CTR score of each item: the log-odds of its smoothed rate of likes among training events.

    rate = (likes + prior * mean) / (events + prior), where mean is the rate over all training events; an item
    without a training event thus scores the mean. Sampled negatives of training samples count as events, as
    they are samples that no like answers.

    Args:
        log: the event log.
        prior: how many events of mean rate each item starts with.

    Returns:
        Logits `[n_items]`, to be indexed by dense item id.
    """
    likes = log.item_likes.astype(np.float64)
    events = log.item_count.astype(np.float64)
    behind = slice(log.n_events, None)  # where sampled negatives stand
    sampled = log.item[behind][log.split[behind] == TRAIN]
    events += np.bincount(sampled, minlength=len(events))
    # Half an event of each kind keeps the log-odds finite where every label is the same.
    mean = (likes.sum() + 0.5) / (events.sum() + 1.0)
    rate = (likes + prior * mean) / (events + prior)
    return cast(Floats, np.log(rate) - np.log1p(-rate))


def popularity_rank(log: EventLog) -> Floats:
    """Ranking score of each item: its number of training events, liked or not.

    Args:
        log: the event log.

    Returns:
        Counts `[n_items]`, to be indexed by dense item id.
    """
    return log.item_count.astype(np.float64)


class Popularity(System):
    """How popular the item itself is: the rate of its likes for CTR, the number of its events for ranking.

    Args:
        log: the event log.
    """

    kind = Kind.COUNTING

    def __init__(self, log: EventLog) -> None:
        """Count."""
        super().__init__("popularity")
        self.log = log
        self._log_odds = popularity_ctr(log)
        self._counts = popularity_rank(log)

    def ctr(self, rows: Rows) -> Scores:
        """See `System`."""
        return self._log_odds[self.log.item[rows]]

    def rank(self, rows: Rows, lists: NDArray[np.int32]) -> Scores:
        """See `System`."""
        return self._counts[lists]


class MetBefore(System):
    """Whether the user had met the item before: what one bit tells where users meet items again.

    For CTR the log-odds of a like among training samples of items that were met, and of ones that were not.

    Args:
        log: the event log.
    """

    kind = Kind.COUNTING

    def __init__(self, log: EventLog) -> None:
        """Count."""
        super().__init__("met-before")
        self.log = log
        rows = log.rows("train", "all")
        met = met_before(log, rows).astype(np.int64)
        samples = np.bincount(met, minlength=2)
        likes = np.bincount(met, log.label[rows] == 1, minlength=2)
        # Half a sample of each kind keeps the log-odds finite.
        self._log_odds = np.log(likes + 0.5) - np.log(samples - likes + 0.5)

    def ctr(self, rows: Rows) -> Scores:
        """See `System`."""
        return self._log_odds[met_before(self.log, rows).astype(np.int64)]

    def rank(self, rows: Rows, lists: NDArray[np.int32]) -> Scores:
        """See `System`."""
        return met_before(self.log, rows, lists).astype(np.float64)


class Cooccurrence(System):
    """Item-to-item scores counted on liked training events, summed over the last liked items of a history.

    *Undirected*: cosine of the sets of users who liked i and who liked j (in training).
    *Directed*: how often a like of j followed within the next `window` likes of the same user after a like of
    i, divided by (likes of i) * (likes of j)^`discount`: "liked soon after", a little less for popular j.

    Nothing of the validation or test period is counted; the history that a row is scored with is the row's
    own past. Candidates that tie (mostly at zero) are ordered by training count.
    """

    kind = Kind.COUNTING
    tasks = (Task.RANKING,)

    def __init__(
        self,
        log: EventLog,
        directed: bool,
        window: int = 10,
        discount: float = 0.3,
        recent: int = 10,
        fade: float = 1.0,
    ) -> None:
        """Count.

        Args:
            log: the event log.
            directed: which of the two scores.
            window: directed only: how many likes after i still count as soon after.
            discount: directed only: exponent of j's count; 0 is the plain conditional probability (better on
                uniform candidates), .5 is better on popular ones, the default is best on the sum of both on
                ML-1M's valid.
            recent: how many of the last liked events of a history are summed over.
            fade: the p-th last of them weighs p^-fade; 0 weighs all alike (worse on ML-1M's valid).
        """
        super().__init__("cooccurrence-directed" if directed else "cooccurrence")
        self.log = log
        self._weight = np.arange(1.0, recent + 1.0) ** -fade  # last one first
        liked = np.asarray(log.label) == 1
        # Number of likes above each row; together with the rows of likes this finds the last likes of any
        # history.
        self._likes_above = np.concatenate(([0], np.cumsum(liked)))
        self._liked_rows = np.flatnonzero(liked)

        rows = np.flatnonzero(liked & log.train_events())
        user = log.user[rows].astype(np.int64)
        item = log.item[rows].astype(np.int64)
        self._popularity = popularity_rank(log)
        self._popularity /= 1.0 + self._popularity.max(initial=0.0)
        likes = np.maximum(np.bincount(item, minlength=log.n_items), 1).astype(np.float64)
        if directed:
            self._left = _successors(user, item, log.n_items, window)
            self._right = None
            self._row_norm = likes
            self._column_norm = likes**discount
        else:
            ones = np.ones(len(rows), dtype=np.float32)
            liked_by = sparse.csr_matrix((ones, (user, item)), shape=(log.n_users, log.n_items))
            liked_by.data[:] = 1.0  # a second like of the same item by the same user adds nothing
            users = np.maximum(np.asarray(liked_by.sum(axis=0)).ravel(), 1.0).astype(np.float64)
            self._left = liked_by.T.tocsr()
            self._right = liked_by
            self._row_norm = np.sqrt(users)
            self._column_norm = self._row_norm

    def rank(self, rows: Rows, lists: NDArray[np.integer]) -> Floats:
        """See `System`; only what lies above each row is read."""
        rows = np.asarray(rows, dtype=np.int64)
        row_of, slot, items = self._last_likes(rows)
        unique, which = np.unique(items, return_inverse=True)
        total = np.zeros(lists.shape)
        # Item-to-item rows are made dense a few at a time: the whole matrix of a large catalog would not fit.
        order = np.argsort(which, kind="stable")
        size = max(1, 16_000_000 // self.log.n_items)
        for first in range(0, len(unique), size):
            table = self._rows(unique[first : first + size])
            span = order[slice(*np.searchsorted(which[order], (first, first + size)))]
            values = table[(which[span] - first)[:, None], lists[row_of[span]]]
            weight = self._weight[slot[span]] / self._row_norm[unique[which[span]]]
            np.add.at(total, row_of[span], values * weight[:, None])
        total /= self._column_norm[lists]
        return cast(Floats, total + 1e-9 * self._popularity[lists])

    def _last_likes(self, rows: Rows) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.int32]]:
        """The last liked events of each row's history, `[m]` in all.

        Returns:
            Of each the place of its row among `rows`, how many later ones there are, and its item.
        """
        start, end = self.log.history(rows)
        place = self._likes_above[end][:, None] - np.arange(1, len(self._weight) + 1)
        real = place >= self._likes_above[start][:, None]
        row_of, slot = np.nonzero(real)
        return row_of, slot, self.log.item[self._liked_rows[place[real]]]

    def _rows(self, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """Counts `[len(items), n_items]` of these items with every other one, 0 with themselves."""
        part = self._left[items]
        dense = (part if self._right is None else part @ self._right).toarray()
        dense[np.arange(len(items)), items] = 0.0
        return cast(NDArray[np.float32], dense)


def _successors(user: Ints, item: Ints, n_items: int, window: int) -> sparse.csr_matrix:
    """Entry (i, j): how often j is one of the `window` likes after i of a user; rows are in log order."""
    counts = sparse.csr_matrix((n_items, n_items), dtype=np.float32)
    for lag in range(1, window + 1):
        same = user[lag:] == user[:-lag]
        pairs = (item[:-lag][same], item[lag:][same])
        counts = counts + sparse.csr_matrix(
            (np.ones(len(pairs[0]), dtype=np.float32), pairs), shape=counts.shape
        )
    return counts
