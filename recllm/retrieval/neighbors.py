"""Search of a row's own history: the k earlier events whose items are most similar to a target item.

Exact and causal: the candidates of a row are the rows of its history in the log, and nothing else is read.

The queries of a user are sorted by the end of their history and cut into blocks. Blocks of like size, of
whatever users, are searched together: their history is gathered once, in pieces of `SPAN` events, and each
piece is multiplied with `TILE` targets at a time, as only those that have it in their history need it. A
score goes onto a grid of 2^-20, ten times coarser than the noise of a float32 product, and is packed with the
event's place in its piece into one int32. That makes the stated rule (score, then recency) exact, and leaves
the selection to NumPy's vectorized partition of integers.

What was measured against it is in `bench/retrieval.py`, figures in results/data/retrieval.json: a product and
`torch.topk` for each user; `faiss.knn` over the rows before a block, merged with the masked product inside of
it; `faiss.IndexFlatIP` with `IDSelectorRange` for each query; NumPy, one query at a time. FAISS has no causal
search: it needs a call for every block, or query, of some hundred rows, which is not what it is made for;
only for the few histories above ten thousand events it draws level. So FAISS does what it is good at, the PCA
of the LM's vectors (`recllm.retrieval.vectors`).
"""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recllm.eventlog.ids import UNKNOWN
from recllm.eventlog.log import EventLog
from recllm.eventlog.queries import Queries
from recllm.files import write_json
from recllm.retrieval.vectors import Vectors

Rows = NDArray[np.int64]

BLOCK = 1 << 12  # queries in a block: fewer gather the history of a user again
TILE = 256  # queries in one product: more waste work above the diagonal, fewer multiply small matrices
CELLS = 1 << 16  # scores of a product, about: what fits the cache
# History events in one product, a power of two: their places are the low bits of a key. Beyond 512 numbers
# NumPy's partition takes five times as long for each.
SPAN = 1 << 9
GRID = 2.0**20  # scores closer than 2^-20 tie
# Added to a float32 within 2^20, it rounds to a whole number that the low 22 bits hold, as a positive one.
ROUND = 1.25 * 2.0**23
NONE = np.iinfo(np.int32).min  # the key of no event; below every other
NOWHERE = np.iinfo(np.int64).min  # the same for keys that name a place in the whole history
LONGEST = 1.001  # of a vector: a score must not leave [-1, 1] by more than the key's top bits can hold


class Neighbors:
    """Nearest earlier events by inner product of item vectors: their cosine where these have length 1."""

    def __init__(self, log: EventLog, vectors: Vectors, fold: NDArray[np.integer] | None = None) -> None:
        """Keep the log and its items' vectors; neither is copied.

        Args:
            log: the event log.
            vectors: `[n_items, D]` for everybody, or `[folds, n_items, D]`, float32, no longer than 1, as
                `item_vectors` gives them. A zero row is similar to nothing (score 0): a target without a
                vector gets its most recent events.
            fold: which of the vectors a user's histories are searched with, `[n_users]`; only with folds.

        Raises:
            ValueError: where the vectors are not finite, too long, or not one for each item of the log.
        """
        if vectors.shape[-2] != log.n_items:
            raise ValueError(
                f"{vectors.shape[-2]} item vectors; wanted {log.n_items}, the log's; run `make stage1`"
            )
        folds = 1 if vectors.ndim == 2 else len(vectors)
        if fold is None:
            fold = np.zeros(log.n_users, np.int64)
        if len(fold) != log.n_users or not 0 <= fold.min() <= fold.max() < folds:
            raise ValueError(
                f"folds of {len(fold)} users, up to {fold.max()}; wanted {log.n_users} users, below {folds}; "
                "run `make stage1`"
            )
        self.log = log
        self.fold = fold
        # Item i of fold f in line f * n_items + i.
        self.vectors = np.asarray(vectors).reshape(folds * log.n_items, -1)
        for low in range(0, len(self.vectors), 1 << 16):
            length = np.linalg.norm(self.vectors[low : low + (1 << 16)], axis=1)
            if not (length <= LONGEST).all():  # NaN is not either
                raise ValueError(
                    f"item vectors of length {length.max()}; wanted finite numbers and lengths up to 1; "
                    "run `make stage1`"
                )

    def for_queries(self, queries: Queries) -> Neighbors:
        """The same search of queries' histories: a known user keeps his fold, all others have fold 0."""
        other = copy.copy(self)
        other.log = queries.log
        other.fold = np.where(queries.user == UNKNOWN, 0, queries.of_users(self.fold))
        return other

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
        targets_a_row = targets.size // max(len(rows), 1)
        start, end = self.log.history(rows)
        start = np.repeat(start, targets_a_row)
        end = np.repeat(end, targets_a_row)
        nearest = np.full((targets.size, k), -1, np.int64)
        order = np.lexsort((end, start))
        order = order[end[order] > start[order]]
        for query, real in _batches(start[order], end[order]):
            which = order[query]
            begin = start[which[:, 0]]
            ends = np.where(real, end[which] - begin[:, None], 0)
            best = self._best(targets.ravel()[which], begin, ends, int(k))
            best = np.where(best >= 0, best + begin[:, None, None], -1)
            nearest[which[real]] = best[real]
        if positions == "time":
            nearest.sort(axis=1)  # -1 lies before every row: padding on the left
        return nearest.reshape(*targets.shape, k)

    def _best(self, targets: NDArray[np.integer], begin: Rows, ends: Rows, k: int) -> Rows:
        """Places in the history, best first, -1 where there is none, `[U, Q, k]`.

        Args:
            targets: `[U, Q]`, the queries of U blocks.
            begin: the first row of each block's user `[U]`.
            ends: how many events of that user are history to a query `[U, Q]`; 0 for no query at all.
            k: places wanted.
        """
        line = self.fold.take(self.log.user.take(begin)) * self.log.n_items
        query = torch.from_numpy(self.vectors.take(line[:, None] + targets, axis=0)).mul_(GRID)
        best = np.full((*ends.shape, k), NOWHERE)
        last = ends.max(axis=0)
        for low in range(0, int(last.max()), SPAN):
            row = np.arange(low, min(low + SPAN, int(last.max())))
            row = np.minimum(begin[:, None] + row, len(self.log.item) - 1)  # blocks differ in length
            history = torch.from_numpy(self.vectors.take(line[:, None] + self.log.item.take(row), axis=0))
            for first in range(0, ends.shape[1], TILE):
                tile = slice(first, first + TILE)
                length = min(int(last[tile].max()) - low, SPAN)
                if length > 0:
                    keys = _keys(query[:, tile], history[:, :length], ends[:, tile] - low)
                    best[:, tile] = _merged(best[:, tile], keys, low)
        return np.where(best == NOWHERE, -1, best & 0xFFFFFFFF)[..., ::-1]


def _keys(query: torch.Tensor, history: torch.Tensor, ends: Rows) -> NDArray[np.int32]:
    """Of each query and event the score on the grid, and below it the event's place, in one number.

    Args:
        query: `[U, Q, D]`, already multiplied by `GRID`.
        history: `[U, L, D]`, at most `SPAN` events of each block.
        ends: how many of these events are history to a query `[U, Q]`; all others get `NONE`.

    Returns:
        int32 `[U, Q, L]`.
    """
    bits = torch.bmm(query, history.transpose(1, 2)).add_(ROUND).view(torch.int32)
    length = history.shape[1]
    torch.add(torch.arange(length, dtype=torch.int32), bits, alpha=SPAN, out=bits)
    keys = bits.numpy()
    shared = min(max(int(ends.min()), 0), length)
    later = np.arange(shared, length) >= ends[..., None]
    np.copyto(keys[..., shared:], NONE, where=later)
    return keys


def _merged(best: Rows, keys: NDArray[np.int32], low: int) -> Rows:
    """The largest keys of those so far and of one more piece of history, ascending.

    Args:
        best: `[U, Q, k]`: the grid score in the high half, below it the place in the whole history.
        keys: of the piece `[U, Q, L]`; their order is lost.
        low: place of its first event.
    """
    k = best.shape[2]
    length = keys.shape[2]
    if length > k:
        keys.partition(length - k, axis=2)
        keys = keys[..., -k:]
    wide = keys.astype(np.int64)
    wide = ((wide >> (SPAN.bit_length() - 1)) << 32) + (wide & (SPAN - 1)) + low
    wide[keys == NONE] = NOWHERE
    if low or length < k:
        wide = np.concatenate([best, wide], axis=2)
    wide.sort(axis=2)
    return wide[..., -k:]


def _batches(start: Rows, end: Rows) -> Iterator[tuple[Rows, NDArray[np.bool_]]]:
    """Queries to search together, as indices `[U, Q]`, a block a line, and which of them are no filling.

    Args:
        start: first row of each query's history `[n]`, ascending.
        end: row behind it `[n]`, ascending where `start` is equal.
    """
    fresh = np.flatnonzero(np.diff(start, prepend=-1))
    place = np.arange(len(start)) - np.repeat(fresh, np.diff(np.append(fresh, len(start))))
    first = np.flatnonzero(place % BLOCK == 0)
    count = np.diff(np.append(first, len(start)))
    length = end[first + count - 1] - start[first]
    tiles = -(-count // TILE)  # a block with few queries beside one with many would be mostly filling
    by_size = np.lexsort((length, tiles))
    cells = np.cumsum((np.minimum(length, SPAN) * np.minimum(count, TILE))[by_size]) // CELLS
    cuts = np.flatnonzero((np.diff(cells) > 0) | (np.diff(tiles[by_size]) > 0)) + 1
    for blocks in np.split(by_size, cuts):
        if len(blocks):
            column = np.arange(count[blocks].max())
            real = column < count[blocks, None]
            yield first[blocks, None] + np.where(real, column, 0), real


def write_neighbors(
    neighbors: Neighbors,
    wanted: NDArray[np.bool_],
    k: int,
    path: str | Path,
    identity: str = "",
    block: int = 1 << 16,
    on_progress: Callable[[int], None] = lambda row: None,
) -> None:
    """Store the neighbors of many rows with their own items as targets.

    The file is int32 `[N, k]` `.npy`: line i belongs to row i of the log, best first (the first k' of a line
    are the k' nearest), -1 padded, all -1 where the row was not wanted. Blocks of rows are searched by as
    many threads as torch has (`torch.get_num_threads()`); memory is bounded by the blocks. The file appears
    under its name only when complete: until then `<path>.partial` holds it and `<path>.progress` says how
    far it is, and a call with the same identity and k goes on from there.

    Args:
        neighbors: the search.
        wanted: rows of the log to search for, bool `[N]`.
        k: events per row.
        path: the file to write; its folder must exist.
        identity: of everything that shapes the result; an unfinished file of another one is begun anew.
        block: rows of the log that a thread searches and writes at once.
        on_progress: called with the row that is next, at the start and after each block that is safe on disk.

    Raises:
        ValueError: where the log has too many rows for int32.
    """
    path = Path(path)
    size = len(neighbors.log.user)
    if size > np.iinfo(np.int32).max:
        raise ValueError(f"the log has {size} rows; wanted at most 2^31 - 1, which int32 can name")
    partial = path.with_name(f"{path.name}.partial")
    progress = path.with_name(f"{path.name}.progress")
    state: dict[str, Any] = {"identity": identity, "k": k, "rows": size, "done": 0}
    if partial.exists() and progress.exists():
        earlier = json.loads(progress.read_text())
        if earlier | {"done": 0} == state:
            state = earlier
    mode = "r+" if state["done"] else "w+"
    out = np.lib.format.open_memmap(partial, mode=mode, dtype=np.int32, shape=(size, k))
    if not state["done"]:
        write_json(progress, state)

    def lines(low: int) -> NDArray[np.int32]:
        part = np.full((min(block, size - low), k), -1, np.int32)
        rows = np.flatnonzero(wanted[low : low + block])
        part[rows] = neighbors.search(low + rows, k=k)
        return part

    lows = range(state["done"], size, block)
    on_progress(lows.start)
    threads = torch.get_num_threads()
    try:
        # Threads of Python, as NumPy does half of the work and has none; torch must not split its half again.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for low, part in zip(lows, _ahead(pool, lines, lows, threads + 1), strict=True):
                out[low : low + len(part)] = part
                out.flush()
                write_json(progress, state | {"done": low + len(part)})
                on_progress(low + len(part))
    finally:
        torch.set_num_threads(threads)
    del out
    partial.replace(path)
    progress.unlink()


def _ahead(
    pool: ThreadPoolExecutor, make: Callable[[int], NDArray[np.int32]], lows: Iterable[int], most: int
) -> Iterator[NDArray[np.int32]]:
    """Results of `make` in order, at most so many of them under way or waiting."""
    waiting: deque[Future[NDArray[np.int32]]] = deque()
    for low in lows:
        waiting.append(pool.submit(make, low))
        if len(waiting) == most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
