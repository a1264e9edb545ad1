"""The largest inner products of users with items, exactly, without ordering a catalog.

The scores of a block of users are one matrix product. Of some hundred groups of items only the largest score
is looked at first: the k best items lie in the k groups with the largest ones, as each of these groups holds
an item that is at least as good as any item of another group. So k of some hundred numbers are chosen, and
then k of the few items of those groups, not k of the whole catalog. What ties with the last place is settled
among all items: of equal scores the smaller place comes first.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

GROUPS = 128
"""Groups of a small catalog; a large one has more, of some `WIDEST` items each."""
WIDEST = 64
_BLOCK_BYTES = 4 * 2**20
"""Scores of a block of users: few enough that they are read again from a cache."""


class Products:
    """Item vectors, laid out for blocks of users.

    Args:
        vectors: float32 `[n, d]`, finite.
    """

    def __init__(self, vectors: Vectors) -> None:
        """Copies the vectors."""
        self.n = len(vectors)
        self._groups = max(GROUPS, -(-self.n // WIDEST))
        # Place p is item p of the catalog: place in its group p // groups, group p % groups.
        self._width = -(-self.n // self._groups)
        rows = np.zeros((self._width * self._groups, vectors.shape[1]), np.float32)
        rows[: self.n] = vectors
        self._columns = torch.from_numpy(np.ascontiguousarray(rows.T))

    def best(
        self, users: Vectors, k: int, ends: NDArray[np.int64], met: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], Vectors]:
        """The k best items of each user, best first; of equal scores the smaller place comes first.

        Args:
            users: float32 `[B, d]`.
            k: items of a list, 1 or more.
            ends: int64 `[B + 1]`; user u is not given `met[ends[u]:ends[u + 1]]`.
            met: places of items.

        Returns:
            Places int64 `[B, k]` and scores float32 `[B, k]`; -1 with -inf where no more items are left.
        """
        places = np.full((len(users), k), -1, np.int64)
        scores = np.full((len(users), k), -np.inf, np.float32)
        total = self._width * self._groups
        size = max(1, min(len(users), _BLOCK_BYTES // (4 * total)))
        block = torch.empty(size, total)
        for first in range(0, len(users), size):
            last = min(first + size, len(users))
            own = block[: last - first]
            torch.mm(torch.from_numpy(users[first:last]), self._columns, out=own)
            own[:, self.n :] = -torch.inf
            out = met[ends[first] : ends[last]].astype(np.int64)
            out += np.repeat(np.arange(last - first) * total, np.diff(ends[first : last + 1]))
            own.view(-1)[torch.from_numpy(out)] = -torch.inf
            found = self._best_of(own, min(k, total))
            places[first:last, : found[0].shape[1]], scores[first:last, : found[1].shape[1]] = found
        places[np.isneginf(scores)] = -1
        return places, scores

    def _best_of(self, scores: torch.Tensor, k: int) -> tuple[NDArray[np.int64], Vectors]:
        """The k best of scores `[b, total]`, as `best` has them."""
        by_group = scores.view(len(scores), self._width, self._groups)
        # One more than wanted: whether it ties with the last place shows whether that is settled.
        count = min(k + 1, self._groups)
        groups = torch.topk(by_group.amax(1), count, dim=1, sorted=False).indices
        near = by_group.gather(2, groups[:, None, :].expand(-1, self._width, -1)).flatten(1)
        values, at = torch.topk(near, min(k + 1, near.shape[1]), dim=1)
        places = (groups.gather(1, at % count) + at // count * self._groups).numpy()
        best = values.numpy()
        unsettled = np.zeros(len(best), np.bool_)
        if best.shape[1] > k:
            unsettled = (best[:, k - 1] == best[:, k]) & ~np.isneginf(best[:, k])
        places = places[:, :k]
        best = best[:, :k]
        equal = np.flatnonzero((best[:, 1:] == best[:, :-1]).any(axis=1))
        order = np.lexsort((places[equal], -best[equal]), axis=1)
        places[equal] = np.take_along_axis(places[equal], order, axis=1)
        for row in np.flatnonzero(unsettled):
            whole = scores[row].numpy()
            # Stable: of equal scores the smaller place comes first.
            places[row] = np.argsort(-whole, kind="stable")[:k]
            best[row] = whole[places[row]]
        return places, best
