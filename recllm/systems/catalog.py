"""What scores every item of a catalog for a user, and the best of them in an order that never varies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.log import EventLog, Rows
from recllm.systems.system import System, Task

CatalogScores = NDArray[np.float32]
"""Scores `[B, n_items]` by dense item id, larger is better; -inf: cannot be recommended."""
Items = NDArray[np.int32]

NO_ITEM = 0
"""What stands in a list behind the last item that there is."""

_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Excluded:
    """Items that are left out of some rows' lists, as pairs of a place and an item.

    Attributes:
        place: int64 `[m]`, the row among those that are asked, ascending.
        item: int32 `[m]`, dense.
    """

    place: Rows
    item: Items

    @classmethod
    def of(cls, lists: Sequence[NDArray[np.integer] | Sequence[int]]) -> Excluded:
        """From a list of dense items for each row; lists may be empty."""
        sizes = [len(items) for items in lists]
        place = np.repeat(np.arange(len(lists)), sizes)
        if not len(place):
            return cls(place, np.empty(0, np.int32))
        return cls(place, np.concatenate([np.asarray(items, np.int32) for items in lists]))

    @classmethod
    def seen(cls, log: EventLog, rows: Rows) -> Excluded:
        """All items of each row's history, whatever their labels."""
        start, end = log.history(rows)
        length = end - start
        place = np.repeat(np.arange(len(rows)), length)
        first = np.cumsum(length) - length
        event = np.arange(len(place)) - first[place] + start[place]
        return cls(place, log.item[event].astype(np.int32))

    def part(self, first: int, last: int) -> Excluded:
        """Those of the rows from `first` to before `last`, counted from `first`."""
        low, high = np.searchsorted(self.place, (first, last))
        return Excluded(self.place[low:high] - first, self.item[low:high])


def without_excluded(
    items: Items, scores: CatalogScores, exclude: Excluded, k: int
) -> tuple[Items, CatalogScores]:
    """The first k items of each list that are not excluded.

    Args:
        items: int32 `[Q, C]`, best first, C at least k.
        scores: float32 `[Q, C]`, theirs.
        exclude: items that are left out.
        k: length of the lists.
    """
    # A number for each pair of a list and an item, to look the excluded ones up by.
    span = max(int(items.max(initial=0)), int(exclude.item.max(initial=0))) + 1
    pairs = np.arange(len(items))[:, None] * span + items
    is_out = np.isin(pairs, exclude.place * span + exclude.item)
    scores = np.where(is_out, -np.inf, scores).astype(np.float32)
    order = np.argsort(is_out, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, order, 1)
    items = np.take_along_axis(items, order, 1)
    items[np.isneginf(scores)] = NO_ITEM
    return items, scores


class CatalogScorer(System):
    """A system that scores every item of the catalog: fitted when it is built, on training events only.

    Of the log that it is asked about it reads what lies above each row, and the row's user and second: so
    that log may be the one that it was fitted on, or any other with the same items (a log of queries).
    """

    tasks: tuple[Task, ...] = (Task.NEXT,)

    def scores(self, log: EventLog, rows: Rows) -> CatalogScores:
        """Scores of every item for each row.

        Args:
            log: the log whose rows are asked about.
            rows: int64 `[B]`, few enough that `[B, n_items]` fits into memory; `block_size` says how many.

        Returns:
            float32 `[B, n_items]`, by dense item id. The reserved ids 0 and 1, and items that cannot be
            recommended, are -inf.
        """
        raise NotImplementedError(f"{self.name} scores no catalog")

    def best(
        self, log: EventLog, rows: Rows, k: int, exclude: Excluded | None = None
    ) -> tuple[Items, CatalogScores]:
        """The k best items of each row; what `top` makes of the scores, a block of rows at a time.

        Args:
            log: as of `scores`.
            rows: int64 `[B]`, any number.
            k: length of the lists.
            exclude: items that are left out.

        Returns:
            Items int32 `[B, k]` and their scores float32 `[B, k]`, as of `top`.
        """
        rows = np.asarray(rows, np.int64)
        items = np.full((len(rows), k), NO_ITEM, np.int32)
        scores = np.full((len(rows), k), -np.inf, np.float32)
        size = block_size(log.n_items)
        for first in range(0, len(rows), size):
            last = min(first + size, len(rows))
            part = None if exclude is None else exclude.part(first, last)
            items[first:last], scores[first:last] = top(self.scores(log, rows[first:last]), k, part)
        return items, scores


def block_size(n_items: int) -> int:
    """How many rows are scored at once, so that `[rows, n_items]` of float32 takes some 64 MB; 1 at least."""
    return max(1, _BLOCK_BYTES // (4 * n_items))


def hide_reserved(scores: CatalogScores) -> CatalogScores:
    """The same array, with the ids that are no items at -inf."""
    scores[:, :FIRST_ID] = -np.inf
    return scores


def top(scores: CatalogScores, k: int, exclude: Excluded | None = None) -> tuple[Items, CatalogScores]:
    """The k best items of each row, best first; of equal scores the smaller dense id comes first.

    Args:
        scores: float32 `[B, n_items]`; -inf is never recommended. What is excluded is set to -inf in place.
        k: length of the lists, 1 or more.
        exclude: items that are left out, e.g. those that a user has seen.

    Returns:
        Items int32 `[B, k]` and their scores float32 `[B, k]`. Where fewer than k items are left, item 0 with
        -inf stands at the end.

    Raises:
        ValueError: k is below 1, or a score is NaN.
    """
    if k < 1:
        raise ValueError(f"lists of {k} items; wanted 1 or more")
    if exclude is not None:
        scores[exclude.place, exclude.item] = -np.inf
    if np.isnan(scores).any():
        raise ValueError("a score of the catalog is not a number; wanted finite ones, or -inf")
    n_rows, n_items = scores.shape
    size = min(k, n_items)
    values, chosen = torch.topk(torch.from_numpy(scores), size, dim=1)
    best = cast(CatalogScores, values.numpy())
    items = chosen.numpy()
    _choose_smallest_of_ties(scores, best, items)
    order = np.lexsort((items, -best), axis=1)
    full_items = np.full((n_rows, k), NO_ITEM, np.int32)
    full_scores = np.full((n_rows, k), -np.inf, np.float32)
    full_items[:, :size] = np.take_along_axis(items, order, axis=1)
    full_scores[:, :size] = np.take_along_axis(best, order, axis=1)
    full_items[np.isneginf(full_scores)] = NO_ITEM
    return full_items, full_scores


def _choose_smallest_of_ties(scores: CatalogScores, best: CatalogScores, items: NDArray[np.int64]) -> None:
    """Among the items that tie with the last one of a list, those with the smallest ids, in place.

    Which of them `torch.topk` takes is not said; how good the last one is does not depend on it.
    """
    if not best.size:
        return
    last = best[:, -1]
    within = (best == last[:, None]).sum(axis=1)
    everywhere = (scores == last[:, None]).sum(axis=1)
    for row in np.flatnonzero((everywhere > within) & ~np.isneginf(last)):
        tied = np.flatnonzero(scores[row] == last[row])
        items[row, best[row] == last[row]] = tied[: within[row]]
