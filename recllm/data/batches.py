"""What every CRM reads: fields and histories gathered from the event log by index arithmetic."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recllm.data.log import EventLog, Rows

INTERVAL_BUCKETS = 32


class Searcher(Protocol):
    """Finds, in the own history of each row, the events nearest to a target (`recllm.retrieval`)."""

    def search(self, rows: Rows, targets: NDArray[np.int32] | None, k: int) -> NDArray[np.integer]:
        """Positions `[B, k]` of the nearest history rows, best first, padded with -1 at the end."""
        ...


def chronological(positions: NDArray[np.integer]) -> Rows:
    """Sort found positions `[B, k]` into time order; padding (-1) comes to stand on the left."""
    return np.sort(np.asarray(positions, np.int64), axis=1)


class CrmInputs:
    """Builds batches for any (row, target item), not only for the row's own item.

    Args:
        log: the event log.
        recent: how many of the latest history events a batch carries (long history), in events.
        retrieved: how many retrieved events it carries besides, in events; 0 for none.
        stored: int32 `[N, >= retrieved]` neighbours of each row's own item, best first, or None.
        searcher: finds neighbours of other targets; needed only when such are asked for.
    """

    def __init__(
        self,
        log: EventLog,
        recent: int,
        retrieved: int = 0,
        stored: NDArray[np.int32] | None = None,
        searcher: Searcher | None = None,
    ) -> None:
        """See the class."""
        if retrieved and stored is None and searcher is None:
            raise ValueError(
                f"retrieved={retrieved} events wanted, but no neighbours are given; run `make stage1`"
            )
        if stored is not None and stored.shape[1] < retrieved:
            raise ValueError(
                f"{stored.shape[1]} neighbours are stored, {retrieved} wanted; "
                f"set retrieval.k={retrieved} and run make again"
            )
        self.log, self.recent, self.retrieved = log, recent, retrieved
        self.stored, self.searcher = stored, searcher

    def neighbours(self, rows: Rows, targets: NDArray[np.int32] | None) -> Rows:
        """Retrieved positions `[B, retrieved]`, best first, padded with -1 at the end."""
        if targets is None and self.stored is not None:
            return np.asarray(self.stored[rows, : self.retrieved], np.int64)
        if self.searcher is None:
            raise ValueError("neighbours of other targets are wanted, but CrmInputs was given no searcher")
        return np.asarray(self.searcher.search(rows, targets, self.retrieved), np.int64)

    def __call__(self, rows: Rows, targets: NDArray[np.int32] | None = None) -> dict[str, Tensor]:
        """Gather a batch.

        Args:
            rows: int64 `[B]` rows of the log.
            targets: int32 `[B]` dense items to score instead of the rows' own, or None.

        Returns:
            `user` int64 `[B, F_u]`, `item` int64 `[B, F_i]`, `label` float32 `[B]` (of the rows' own item),
            and per history `recent` (and `retrieved`): `_item` int64 `[B, T, F_i]`, `_rating` int64 `[B, T]`,
            `_interval` int64 `[B, T]` (1 + floor(log2(1 + seconds before the sample)), 0 at padding),
            `_mask` bool `[B, T]` (true where there is an event). `retrieved_rank` int64 `[B, K]`: 1 for the
            event nearest to the target, 2 for the next ..., 0 at padding.
        """
        log = self.log
        items = log.item[rows] if targets is None else targets
        batch = {
            "user": torch.from_numpy(log.user_fields[log.user[rows]].astype(np.int64)),
            "item": torch.from_numpy(log.item_fields[items].astype(np.int64)),
            "label": torch.from_numpy(log.label[rows].astype(np.float32)),
        }
        self._history(batch, "recent", rows, log.recent(rows, self.recent))
        if self.retrieved:
            found = self.neighbours(rows, targets)
            in_time = np.argsort(found, axis=1, kind="stable")
            positions = np.take_along_axis(found, in_time, 1)
            self._history(batch, "retrieved", rows, positions)
            batch["retrieved_rank"] = torch.from_numpy(np.where(positions >= 0, 1 + in_time, 0))
        return batch

    def _history(self, batch: dict[str, Tensor], name: str, rows: Rows, positions: Rows) -> None:
        log = self.log
        mask = positions >= 0
        safe = np.where(mask, positions, 0)
        items = np.where(mask, log.item[safe], 0)
        seconds = np.maximum(log.timestamp[rows][:, None] - log.timestamp[safe], 0)
        interval = np.where(mask, 1 + np.log2(1.0 + seconds).astype(np.int64), 0)
        batch[f"{name}_item"] = torch.from_numpy(log.item_fields[items].astype(np.int64))
        batch[f"{name}_rating"] = torch.from_numpy(np.where(mask, log.rating[safe], 0).astype(np.int64))
        batch[f"{name}_interval"] = torch.from_numpy(np.minimum(interval, INTERVAL_BUCKETS - 1))
        batch[f"{name}_mask"] = torch.from_numpy(mask)
