"""Baselines that score a whole catalog: popularity, transitions, item-kNN, EASE, ALS.

All are fitted on the training events of a log, liked or not, and score from what lies above a row. An item
without a training event is never recommended: they know nothing of it.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from recllm.errors import StageError
from recllm.eventlog.log import EventLog, Rows
from recllm.systems.catalog import (
    NO_ITEM,
    CatalogScorer,
    CatalogScores,
    Excluded,
    Items,
    block_size,
    hide_reserved,
    top,
    without_excluded,
)
from recllm.systems.system import Kind

DAY = 86_400
"""Seconds."""

MOST_EASE_ITEMS = 20_000
"""Items of the largest catalog whose inverse is taken: two matrices of 3.2 GB, and half an hour of a core."""

_PAIRS_AT_ONCE = 20_000_000
"""Pairs of items that are counted at once: some 500 MB."""


class CatalogBaseline(CatalogScorer):
    """What all these baselines have in common: which items they know.

    Args:
        name: of the system.
        log: the log that it is fitted on.
    """

    kind = Kind.COUNTING

    def __init__(self, name: str, log: EventLog) -> None:
        """See the class."""
        super().__init__(name)
        self._unknown = np.flatnonzero(log.item_count == 0)

    def scores(self, log: EventLog, rows: Rows) -> CatalogScores:
        """See `CatalogScorer`."""
        scores = np.ascontiguousarray(self._scores(log, np.asarray(rows, np.int64)), np.float32)
        scores[:, self._unknown] = -np.inf
        return hide_reserved(scores)

    def _scores(self, log: EventLog, rows: Rows) -> NDArray[np.floating]:
        """Scores `[B, n_items]` without regard to which items are known."""
        raise NotImplementedError


class CatalogPopularity(CatalogBaseline):
    """The number of training events of each item, the same for everybody.

    Args:
        log: the event log.
        days: only events of so many days before the last training event are counted, and of items with
            equally many the one with more events in all comes first; None: all events.

    Raises:
        StageError: days are wanted of a log without times.
    """

    def __init__(self, log: EventLog, days: int | None = None) -> None:
        """Count."""
        super().__init__("popularity" if days is None else f"popularity-{days}-days", log)
        counts = log.item_count.astype(np.float64)
        if days is not None:
            if not log.timed:
                raise StageError(
                    f"{self.name}: the log has no times, so no events are the latest; wanted a time column"
                )
            rows = np.flatnonzero(log.train_events())
            second = log.timestamp[rows]
            latest = rows[second > second.max() - days * DAY]
            in_days = np.bincount(log.item[latest], minlength=log.n_items)
            counts = in_days + counts / (1.0 + counts.max())
        self._counts = counts.astype(np.float32)
        self._counts[self._unknown] = -np.inf
        order = np.argsort(-self._counts, kind="stable")
        self._order = order[: log.n_items - len(self._unknown)].astype(np.int32)

    def best(
        self, log: EventLog, rows: Rows, k: int, exclude: Excluded | None = None
    ) -> tuple[Items, CatalogScores]:
        """See `CatalogScorer`: everybody has the same list, without what is excluded."""
        exclude = Excluded.of([]) if exclude is None else exclude
        most = int(np.bincount(exclude.place, minlength=1).max())
        head = self._order[: k + most]
        items = np.full((len(rows), max(k, len(head))), NO_ITEM, np.int32)
        items[:, : len(head)] = head
        scores = np.where(items == NO_ITEM, -np.inf, self._counts[items]).astype(np.float32)
        return without_excluded(items, scores, exclude, k)

    def _scores(self, log: EventLog, rows: Rows) -> NDArray[np.floating]:
        return np.tile(self._counts, (len(rows), 1))


class Transitions(CatalogBaseline):
    """How often an item came soon after those at the end of the history.

        T[i, j] = sum_{d=1..window} decay^(d-1) #(j is d events after i in training) / #(training events of i)
        score(j) = sum_{d=1..window} decay^(d-1) T[h_d, j]

    where h_1 is the history's last item, h_2 the one before it.

    Args:
        log: the event log.
        window: events that are looked back.
        decay: weight of each step back.
        neighbors: of each item, entries of T that are kept, the largest: what bounds the memory.
    """

    def __init__(self, log: EventLog, window: int = 10, decay: float = 0.8, neighbors: int = 2000) -> None:
        """Count."""
        super().__init__("transitions", log)
        self._window = window
        self._decay = decay
        self._table = _stacked(
            _largest(_per_event(part, log.item_count, first), neighbors)
            for first, part in _successors(log, window, decay)
        )

    def _scores(self, log: EventLog, rows: Rows) -> NDArray[np.floating]:
        last = histories(log, rows, self._window, self._decay)
        return cast(NDArray[np.floating], (last @ self._table).toarray())


class ItemKnn(CatalogBaseline):
    """The items that the same users have: the sum of cosines to the items of the history.

        S[i, j] = |U_i & U_j| / sqrt(|U_i| |U_j|),    U_i: users with i in training
        score(j) = sum_{i in history} S[i, j]

    Args:
        log: the event log.
        neighbors: of each item, how many others are kept, the nearest.
    """

    def __init__(self, log: EventLog, neighbors: int = 20) -> None:
        """Count."""
        super().__init__("item-knn", log)
        users = training_matrix(log)
        length = np.sqrt(np.maximum(np.asarray(users.sum(axis=0)).ravel(), 1.0)).astype(np.float32)
        unit = sparse.csr_matrix(users @ sparse.diags(1.0 / length))
        by_item = unit.T.tocsr()
        size = block_size(log.n_items)
        self._table = _stacked(
            _nearest((by_item[first : first + size] @ unit).toarray(), first, neighbors)
            for first in range(0, log.n_items, size)
        )

    def _scores(self, log: EventLog, rows: Rows) -> NDArray[np.floating]:
        return cast(NDArray[np.floating], (histories(log, rows) @ self._table).toarray())


class Ease(CatalogBaseline):
    """EASE^R: the linear autoencoder without a diagonal, in closed form.

    Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019, eq. 8, with X the users' training
    items:

        P = (X^T X + l2 I)^-1,    B[i, j] = -P[i, j] / P[j, j],    B[j, j] = 0,    score = x B

    Args:
        log: the event log.
        l2: penalty of squared weights.

    Raises:
        StageError: the catalog has more than `MOST_EASE_ITEMS` items with a training event.
    """

    def __init__(self, log: EventLog, l2: float = 300.0) -> None:
        """Take the inverse: n_items^3 operations, seconds for thousands of items."""
        super().__init__("ease", log)
        self._known = np.flatnonzero(log.item_count)
        if len(self._known) > MOST_EASE_ITEMS:
            raise StageError(
                f"ease: {len(self._known):,} items have a training event, and their inverse is too large; "
                f"wanted {MOST_EASE_ITEMS:,} or fewer"
            )
        users = training_matrix(log)[:, self._known]
        gram = (users.T @ users).toarray().astype(np.float64)
        gram[np.diag_indices_from(gram)] += l2
        factor, _ = linalg.lapack.dpotrf(gram.T, lower=1, overwrite_a=1)
        inverse, _ = linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)
        inverse = np.tril(inverse) + np.tril(inverse, -1).T
        weights = (inverse / -np.diag(inverse)).astype(np.float32)
        np.fill_diagonal(weights, 0.0)
        self._weights = weights

    def _scores(self, log: EventLog, rows: Rows) -> NDArray[np.floating]:
        scores = np.zeros((len(rows), log.n_items), np.float32)
        scores[:, self._known] = histories(log, rows)[:, self._known] @ self._weights
        return scores


class Als(CatalogBaseline):
    """Matrix factorization by alternating least squares, of the library `implicit`.

    Hu, Koren and Volinsky, "Collaborative Filtering for Implicit Feedback Datasets", ICDM 2008. A row's user
    vector is solved for from its history, by the same least squares that trained.

    Args:
        log: the event log.
        seed: of the first vectors.
        factors: length of the vectors.
        regularization: penalty of squared vectors.
        alpha: how much more an event weighs than its absence.
        iterations: over users and items.

    Raises:
        StageError: `implicit` is not installed.
    """

    def __init__(
        self,
        log: EventLog,
        seed: int = 0,
        factors: int = 128,
        regularization: float = 0.01,
        alpha: float = 1.0,
        iterations: int = 15,
    ) -> None:
        """Train: some seconds for a million events."""
        super().__init__("als", log)
        if not has_implicit():
            raise StageError("als: the library implicit is not installed; pip install 'recllm[als]'")
        from implicit.cpu.als import AlternatingLeastSquares
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):  # the library has threads of its own, and warns of others
            self._model: Any = AlternatingLeastSquares(
                factors=factors,
                regularization=regularization,
                alpha=alpha,
                iterations=iterations,
                random_state=seed,
            )
            self._model.fit(training_matrix(log), show_progress=False)

    def _scores(self, log: EventLog, rows: Rows) -> NDArray[np.floating]:
        vectors = self._model.recalculate_user(np.arange(len(rows)), histories(log, rows))
        return cast(NDArray[np.floating], vectors @ self._model.item_factors.T)


def has_implicit() -> bool:
    """Whether the library that `Als` needs is installed."""
    return importlib.util.find_spec("implicit") is not None


def training_matrix(log: EventLog) -> sparse.csr_matrix:
    """Which items each user has in training: float32 `[n_users, n_items]` of ones."""
    rows = np.flatnonzero(log.train_events())
    return _ones(log.user[rows], log.item[rows], (log.n_users, log.n_items))


def histories(
    log: EventLog, rows: Rows, recent: int | None = None, decay: float | None = None
) -> sparse.csr_matrix:
    """Which items lie above each row, float32 `[B, n_items]`.

    Args:
        log: the event log.
        rows: int64 `[B]`.
        recent: only so many last events; None: all.
        decay: weight of each step back from the last event; of an item that is there more than once weights
            add up. None: every item weighs 1, however often it is there.
    """
    start, end = log.history(rows)
    if recent is not None:
        start = np.maximum(start, end - recent)
    length = end - start
    place = np.repeat(np.arange(len(rows)), length)
    back = np.repeat(np.cumsum(length), length) - 1 - np.arange(len(place))
    item = log.item[end[place] - 1 - back]
    shape = (len(rows), log.n_items)
    if decay is None:
        return _ones(place, item, shape)
    weight = np.float32(decay) ** back.astype(np.float32)
    return sparse.csr_matrix((weight, (place, item)), shape=shape)


def _ones(row: NDArray[Any], column: NDArray[Any], shape: tuple[int, int]) -> sparse.csr_matrix:
    """A matrix of ones in these cells, each of which may be named more than once."""
    matrix = sparse.csr_matrix((np.ones(len(row), np.float32), (row, column)), shape=shape)
    matrix.data[:] = 1.0
    return matrix


def _successors(log: EventLog, window: int, decay: float) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Blocks of the matrix of decayed counts of j after i: the first i of each, and its rows."""
    events = np.flatnonzero(log.train_events())
    user = log.user[events]
    item = log.item[events]
    ends = np.cumsum(np.bincount(item, minlength=log.n_items)) * window // _PAIRS_AT_ONCE
    bounds = np.flatnonzero(np.diff(ends, prepend=-1, append=ends[-1] + 1))
    for first, last in itertools.pairwise(bounds):
        shape = (last - first, log.n_items)
        total = sparse.csr_matrix(shape, dtype=np.float32)
        before = np.flatnonzero((item >= first) & (item < last))
        for step in range(1, window + 1):
            before = before[before + step < len(item)]
            before = before[user[before] == user[before + step]]
            weight = np.full(len(before), decay ** (step - 1), np.float32)
            cells = (item[before] - first, item[before + step])
            total = total + sparse.csr_matrix((weight, cells), shape=shape)
        yield int(first), total


def _per_event(counts: sparse.csr_matrix, events: NDArray[np.int32], first: int) -> sparse.csr_matrix:
    """Counts divided by the training events of their row's item; row 0 is the item `first`."""
    of_rows = np.maximum(events[first : first + counts.shape[0]], 1).astype(np.float32)
    return sparse.csr_matrix(sparse.diags(1.0 / of_rows) @ counts)


def _nearest(similarities: NDArray[np.float32], first: int, k: int) -> sparse.csr_matrix:
    """The k largest entries above 0 of each row `[n, n_items]`, but for that of an item to itself.

    Args:
        similarities: written into.
        first: the item of row 0.
        k: entries of a row.
    """
    rows = np.arange(len(similarities))
    similarities[rows, first + rows] = 0.0
    items, values = top(similarities, k)
    there = values > 0
    cells = (np.repeat(rows, k)[there.ravel()], items[there])
    return sparse.csr_matrix((values[there], cells), shape=similarities.shape)


def _largest(matrix: sparse.csr_matrix, k: int) -> sparse.csr_matrix:
    """The k largest entries of each row; of equal ones those of smaller columns."""
    length = np.diff(matrix.indptr)
    if length.max(initial=0) <= k:
        return matrix
    row = np.repeat(np.arange(len(length)), length)
    cut = np.flatnonzero(length[row] > k)
    order = cut[np.lexsort((matrix.indices[cut], -matrix.data[cut], row[cut]))]
    long = length[length > k]
    rank = np.arange(len(order)) - np.repeat(np.cumsum(long) - long, long)
    stays = length[row] <= k
    stays[order[rank < k]] = True
    values = (matrix.data[stays], (row[stays], matrix.indices[stays]))
    return sparse.csr_matrix(values, shape=matrix.shape)


def _stacked(parts: Iterator[sparse.csr_matrix]) -> sparse.csr_matrix:
    """Blocks of rows one below the other."""
    return sparse.vstack(list(parts), format="csr")
