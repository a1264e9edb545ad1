"""Search of a row's own history: the k earlier events whose items are most similar to a target item.

Exact and causal: the candidates of a row are the rows of its history in the log, and nothing else is read.
Every user's queries are sorted by the end of their history and answered in blocks; a block takes one matrix
product of its targets with the history. Scores go onto a grid of 2^-20, ten times coarser than the noise of a
float32 product, and are packed with their position into one int64. That makes the stated rule (score, then
recency) exact in one pass, and leaves the selection to NumPy's vectorized partition of integers.

Where the history before a block is long (`FAISS_FROM` rows), FAISS searches it instead, and its result is
merged with the masked product inside the block. Microseconds a query on one thread of a shared machine,
blocks of 128 queries, 192 dimensions, k = 30 (the product alone | packed keys | torch.topk of the product |
FAISS and merge | faiss.knn as it comes, without BLAS):

    history    256:   0.7 |   2.0 |   3.3 |   4.7 |   9
    history  1,024:   2.4 |   5.3 |    10 |    10 |  18
    history  4,096:    10 |    21 |    24 |    24 | 100
    history  8,192:    20 |    41 |    44 |    40 | 219
    history 32,768:   112 |   225 |   173 |   144 | 865

So FAISS gains nothing for the histories of ML-1M (at most 2,313 events), and a third for the longest of
ML-25M.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from recllm.data.log import EventLog
from recllm.retrieval.vectors import Vectors, normalize

Rows = NDArray[np.int64]

FAISS_FROM = 8_192  # rows before a block from which FAISS is the faster search (table above)
BLOCK = 128  # queries in a block: more waste work above the diagonal, fewer pay the call's overhead
SPAN = 4_096  # rows between the first and the last end of a block's histories
CHUNK = 8_192  # history rows in one product: bounds the memory of a block
GRID = np.float32(2**20)  # scores closer than 2^-20 tie
EMPTY = np.iinfo(np.int64).min  # the key of no event; below every other


class Neighbours:
    """Nearest earlier events by cosine of item vectors."""

    def __init__(
        self,
        log: EventLog,
        vectors: Vectors,
        fold: NDArray[np.integer] | None = None,
        faiss_from: int = FAISS_FROM,
    ) -> None:
        """Keep the log and its items' vectors.

        Args:
            log: the event log.
            vectors: `[n_items, D]` for everybody, or `[folds, n_items, D]`; scaled to length 1 here. A zero
                row is similar to nothing (score 0): a target without a vector gets its most recent events.
            fold: which of the vectors a user's histories are searched with, `[n_users]`; only with folds.
            faiss_from: history length, in events before a block, from which FAISS searches; speed only.

        Raises:
            ValueError: where the vectors are not finite or not one for each item of the log.
        """
        if vectors.shape[-2] != log.n_items:
            raise ValueError(
                f"{vectors.shape[-2]} item vectors; wanted {log.n_items}, the log's; run `make retrieve`"
            )
        folds = 1 if vectors.ndim == 2 else len(vectors)
        if fold is None:
            fold = np.zeros(log.n_users, np.int64)
        if len(fold) != log.n_users or not 0 <= fold.min() <= fold.max() < folds:
            raise ValueError(
                f"folds of {len(fold)} users, up to {fold.max()}; wanted {log.n_users} users, below {folds}; "
                "run `make retrieve`"
            )
        if not np.isfinite(vectors).all():
            raise ValueError("item vectors hold NaN or infinity; wanted finite numbers; run `make retrieve`")
        self.log = log
        self.vectors = normalize(vectors.reshape(folds, *vectors.shape[-2:]))
        self.fold = fold
        self.faiss_from = faiss_from

    def search(
        self,
        rows: Rows,
        targets: NDArray[np.integer] | None = None,
        k: int = 30,
        positions: str = "similarity",
    ) -> Rows:
        """The k events of each row's history that are most similar to its target.

        Equal scores (within 2^-20) go to the later event. Rows need not be sorted or distinct; queries of one
        user are cheap together, whatever their targets.

        Args:
            rows: rows of the log, `[n]`.
            targets: dense item ids, `[n]`, or `[n, C]` for C targets of each row; the rows' own items by
                default.
            k: events wanted.
            positions: order of the result: `similarity` (best first, padding at the end) or `time`
                (chronological, padding on the left).

        Returns:
            Rows of the log, int64 `[n, k]` or `[n, C, k]`, padded with -1 where the history is shorter than
            k.

        Raises:
            ValueError: for k < 1, another order, rows outside the log, targets of another length or no item.
        """
        if k < 1:
            raise ValueError(f"k is {k}; wanted at least 1")
        if positions not in ("similarity", "time"):
            raise ValueError(f"positions is {positions!r}; wanted similarity or time")
        rows = np.asarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self.log.user):
            raise ValueError(f"rows {rows.min()}..{rows.max()}; wanted 0..{len(self.log.user) - 1}")
        targets = self.log.item[rows] if targets is None else np.asarray(targets)
        if len(targets) != len(rows):
            raise ValueError(f"targets of {len(targets)} rows; wanted {len(rows)}, one line for each row")
        if targets.size and not 0 <= targets.min() <= targets.max() < self.log.n_items:
            raise ValueError(f"targets up to {targets.max()}; wanted ids below {self.log.n_items}")
        shape = targets.shape
        start, end = (np.repeat(x, targets.size // max(len(rows), 1)) for x in self.log.history(rows))
        targets = targets.reshape(-1)
        found = np.full((len(targets), k), -1, np.int64)
        for users_rows in _groups(start, end):
            first = start[users_rows[0]]
            ends = end[users_rows] - first
            vectors = self.vectors[self.fold[self.log.user[first]]]
            history = vectors[self.log.item[first : first + ends[-1]]]
            for a, b in _blocks(ends):
                queries = users_rows[a:b]
                keys = self._search_block(vectors[targets[queries]], history, ends[a:b], int(k))
                # The low half of a key is the position in the user's history.
                found[queries, : keys.shape[1]] = np.where(keys == EMPTY, -1, first + (keys & 0xFFFFFFFF))
        if positions == "time":
            found.sort(axis=1)  # -1 lies before every row: padding on the left
        return found.reshape(*shape, k)

    def _search_block(self, queries: Vectors, history: Vectors, ends: Rows, k: int) -> Rows:
        """Keys of the best events of each query, best first, `[B, at most k]`; `ends` ascend."""
        past, last = int(ends[0]), int(ends[-1])
        if past < max(self.faiss_from, 1):
            return _descending(_top_keys(queries, history, 0, ends, k))
        # The rows before the block are allowed to all of its queries: FAISS. One more than k shows a tie at
        # the edge.
        fetched = min(k + 1, past)
        faiss.omp_set_num_threads(torch.get_num_threads())
        # With the threshold that faiss 1.15 comes with (128,000), no BLAS is used here: 2-6 times slower.
        faiss.cvar.distance_compute_blas_threshold = 20
        score, position = faiss.knn(queries, history[:past], fetched, metric=faiss.METRIC_INNER_PRODUCT)
        keys = _pack(score, position)
        edge = keys.min(axis=1) >> 32
        if last > past:
            keys = np.hstack([keys, _top_keys(queries, history, past, ends, k)])
        keys = _descending(keys)[:, :k]
        if fetched < past:
            # FAISS does not know our rule for ties: where its last score could still tie with the k-th, ask
            # again.
            redo = np.flatnonzero((keys[:, -1] >> 32) <= edge)
            if len(redo):
                keys[redo] = _descending(_top_keys(queries[redo], history, 0, ends[redo], k))
        return keys


def _groups(start: Rows, end: Rows) -> Iterator[Rows]:
    """Indices of one user's queries after another, ends ascending; without those that have no history."""
    order = np.lexsort((end, start))
    order = order[end[order] > start[order]]
    if len(order):
        yield from np.split(order, np.flatnonzero(np.diff(start[order])) + 1)


def _blocks(ends: Rows) -> Iterator[tuple[int, int]]:
    """Slices of ascending ends: at most `BLOCK` queries, whose ends lie at most `SPAN` apart."""
    a = 0
    while a < len(ends):
        b = min(a + BLOCK, int(np.searchsorted(ends, ends[a] + SPAN, "right")))
        yield a, b
        a = b


def _pack(score: NDArray[np.float32], position: Rows) -> Rows:
    """Grid score in the high half, position in the low half of an int64: larger is better. Alters `score`."""
    score *= GRID
    keys = np.rint(score, out=score).astype(np.int64)
    keys <<= 32
    keys += position
    return keys


def _top_keys(queries: Vectors, history: Vectors, begin: int, ends: Rows, k: int) -> Rows:
    """Keys of the best k of `history[begin:ends[i]]` for query i, `[B, at most k]`, unsorted; ends ascend."""
    best = np.empty((len(queries), 0), np.int64)
    for low in range(begin, int(ends[-1]), CHUNK):
        high = min(low + CHUNK, int(ends[-1]))
        # torch's product, so that torch.set_num_threads holds for it
        score = torch.mm(torch.from_numpy(queries), torch.from_numpy(history[low:high]).T).numpy()
        keys = _pack(score, np.arange(low, high))
        shared = min(max(int(ends[0]), low), high)  # columns up to here are history to all
        keys[:, shared - low :][np.arange(shared, high) >= ends[:, None]] = EMPTY
        keys = np.hstack([best, keys]) if best.size else keys
        if keys.shape[1] > k:
            keys.partition(keys.shape[1] - k, axis=1)
            keys = keys[:, -k:]
        best = keys
    return best


def _descending(keys: Rows) -> Rows:
    return np.sort(keys, axis=1)[:, ::-1]


def write_neighbours(
    neighbours: Neighbours, rows: Rows, k: int, path: str | Path, block: int = 1 << 17
) -> None:
    """Store the neighbors of many rows with their own items as targets.

    The file is int32 `[N, k]` `.npy`: line i belongs to row i of the log, best first (the first k' of a line
    are the k' nearest), -1 padded, all -1 where the row was not asked for. Memory is bounded by the block;
    the file appears under its name only when complete.

    Args:
        neighbours: the search.
        rows: rows of the log, any order.
        k: events per row.
        path: the file to write; its folder must exist.
        block: rows of the log written at once.

    Raises:
        ValueError: where the log has too many rows for int32.
    """
    path = Path(path)
    size = len(neighbours.log.user)
    if size > np.iinfo(np.int32).max:
        raise ValueError(f"the log has {size} rows; wanted at most 2^31 - 1, which int32 can name")
    rows = np.unique(rows)
    partial = path.with_name(path.name + ".partial")
    out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.int32, shape=(size, k))
    for low in range(0, size, block):
        lines = np.full((min(block, size - low), k), -1, np.int32)
        asked = rows[np.searchsorted(rows, low) : np.searchsorted(rows, low + block)]
        lines[asked - low] = neighbours.search(asked, k=k)
        out[low : low + block] = lines
    out.flush()
    del out
    os.replace(partial, path)
