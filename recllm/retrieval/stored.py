"""Nearest earlier events as a finished stage left them on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog.log import EventLog, Rows, chronological
from recllm.eventlog.queries import Queries
from recllm.files import load_array
from recllm.paths import FOLDS, NEIGHBORS, VECTORS
from recllm.retrieval.neighbors import Neighbors


@dataclass(frozen=True)
class Retrieval:
    """Nearest earlier events: stored for the rows' own items, searched for other targets."""

    stored: NDArray[np.int32] | None
    """Of every row of the log, best first; None: they are searched when they are asked for."""
    searcher: Neighbors

    @classmethod
    def open(cls, folder: Path, log: EventLog) -> Retrieval:
        """Map what stages/retrieve.py wrote to a folder: vectors, and neighbors but for a bundle."""
        searcher = Neighbors(log, load_array(folder / VECTORS), load_array(folder / FOLDS, mapped=False))
        stored = load_array(folder / NEIGHBORS) if (folder / NEIGHBORS).exists() else None
        return cls(stored, searcher)

    def for_queries(self, queries: Queries) -> Retrieval:
        """The same of queries, of which nothing is stored."""
        return Retrieval(None, self.searcher.for_queries(queries))

    def nearest(self, rows: Rows, k: int) -> Rows:
        """The k earlier events nearest to each row's own item, `[B, k]`, in time order, -1 on the left."""
        if self.stored is None:
            return self.searcher.search(rows, None, k, "time")
        if self.stored.shape[1] < k:
            raise ValueError(
                f"{self.stored.shape[1]} neighbors are stored, {k} wanted; add ARGS=retrieval.k={k}"
            )
        return chronological(self.stored[rows, :k])
