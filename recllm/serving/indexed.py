"""A retriever whose item vectors lie in an index: what it recommends costs no pass over the catalog."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog.log import EventLog, Rows
from recllm.retrieval.index import IndexKind, ItemIndex
from recllm.systems.catalog import NO_ITEM, CatalogScorer, Excluded, without_excluded
from recllm.systems.retriever import Retriever
from recllm.systems.system import Kind

Items = NDArray[np.int32]
Scores = NDArray[np.float32]

BLOCK = 256
"""Users that are searched for at once."""


class IndexedRetriever(CatalogScorer):
    """The same scores as the retriever's, the best of them found by an index.

    Args:
        retriever: has the vectors.
        index: of its items.
    """

    kind = Kind.CRM

    def __init__(self, retriever: Retriever, index: ItemIndex) -> None:
        """See the class."""
        super().__init__(retriever.name, made_by=retriever.made_by)
        self.retriever = retriever
        self.index = index

    def scores(self, log: EventLog, rows: Rows) -> Scores:
        """See `CatalogScorer`: of the whole catalog, exactly."""
        return self.retriever.scores(log, rows)

    def best(
        self, log: EventLog, rows: Rows, k: int, exclude: Excluded | None = None
    ) -> tuple[Items, Scores]:
        """See `CatalogScorer`; as exact as the index."""
        rows = np.asarray(rows, np.int64)
        items = np.full((len(rows), k), NO_ITEM, np.int32)
        scores = np.full((len(rows), k), -np.inf, np.float32)
        for first in range(0, len(rows), BLOCK):
            last = min(first + BLOCK, len(rows))
            part = Excluded.of([]) if exclude is None else exclude.part(first, last)
            users = self.retriever.users(log, rows[first:last])
            found = self._search(users, k, part)
            items[first:last], scores[first:last] = found
        return items, scores

    def _search(self, users: Scores, k: int, exclude: Excluded) -> tuple[Items, Scores]:
        """The best k items of each user that are not excluded."""
        if self.index.facts.kind == "exact":
            ends = np.searchsorted(exclude.place, np.arange(len(users) + 1))
            return self.index.best(users, k, ends, exclude.item)
        count = np.bincount(exclude.place, minlength=len(users))
        items, scores = self.index.search(users, k, count)
        return without_excluded(items, scores, exclude, k)


def build_index(
    retriever: Retriever, log: EventLog, rows: Rows, kind: IndexKind, k: int, exact_items: int
) -> ItemIndex:
    """The index of a retriever's items; its recall is measured with the users of some rows.

    Args:
        retriever: has the vectors.
        log: the event log.
        rows: int64 `[n]`, whose users are searched for.
        kind: as of `ItemIndex.build`.
        k: recall is measured at so many items.
        exact_items: as of `ItemIndex.build`.
    """
    vectors = retriever.item_vectors
    known = np.flatnonzero(retriever.is_known).astype(np.int32)
    return ItemIndex.build(vectors[known], known, kind, retriever.users(log, rows[:500]), k, exact_items)
