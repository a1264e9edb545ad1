"""What every CRM reads: fields and histories gathered from the event log by index arithmetic."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from recllm.crm.config import Fields
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.queries import Queries
from recllm.eventlog.statistics import Statistics

INTERVAL_BUCKETS = 32
# The log's columns that describe an event of a history, and what they are called in a gathered batch.
EVENT = {"item": "event", "rating": "code", "timestamp": "second"}

Batch = dict[str, Tensor]


class Searcher(Protocol):
    """Finds, in the own history of each row, the events nearest to a target (`recllm.retrieval`)."""

    def search(self, rows: Rows, targets: NDArray[np.int32] | None, k: int) -> NDArray[np.integer]:
        """Positions `[B, k]` of the nearest history rows, best first, padded with -1 at the end."""
        ...

    def for_queries(self, queries: Queries) -> Searcher:
        """The same of queries' histories."""
        ...


def table_sizes(log: EventLog) -> Fields:
    """Sizes of a CRM's tables, as `prepare` counted them."""
    sizes = {side: tuple(f["size"] for f in log.meta[f"{side}_fields"]) for side in ("user", "item")}
    return Fields(sizes["user"], sizes["item"], log.codes, log.meta["category_field"])


class CrmInputs:
    """Builds batches for any (row, target item), not only for the row's own item.

    In two steps, so that a GPU need not wait for the first: `gather` copies from the log (the recent events
    of a row are neighbors there, and are copied as one window), and `expand` makes of it what a model looks
    up, on whatever device the batch lies by then. Called, it does both.

    Args:
        log: the event log.
        recent: how many of the latest history events a batch carries (long history), in events.
        retrieved: how many retrieved events it carries besides, in events; 0 for none.
        stored: int32 `[N, >= retrieved]` neighbors of each row's own item, best first, or None.
        searcher: finds neighbors of other targets; needed only when such are asked for.
        statistics: counts and shares of likes before each sample; None for none.
    """

    def __init__(
        self,
        log: EventLog,
        recent: int,
        retrieved: int = 0,
        stored: NDArray[np.int32] | None = None,
        searcher: Searcher | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """See the class."""
        if retrieved and stored is None and searcher is None:
            raise ValueError(
                f"retrieved={retrieved} events wanted, but no neighbors are given; run `make stage1`"
            )
        if stored is not None and stored.shape[1] < retrieved:
            raise ValueError(
                f"{stored.shape[1]} neighbors are stored, {retrieved} wanted; "
                f"set retrieval.k={retrieved} and run make again"
            )
        self.log = log
        self.recent = recent
        self.retrieved = retrieved
        self.stored = stored
        self.searcher = searcher
        self.statistics = statistics
        self._columns = {name: getattr(log, name) for name in EVENT}
        self._windows = {name: _Lines(column, recent, 1) for name, column in self._columns.items()}
        self._users = _Lines(log.user_fields, log.user_fields.shape[1])
        self._items = _Lines(log.item_fields, log.item_fields.shape[1])
        self._fields = torch.from_numpy(np.array(log.item_fields, np.int32))
        self._powers = 2 ** torch.arange(INTERVAL_BUCKETS - 1) - 1  # seconds from which on a bucket holds

    def for_queries(self, queries: Queries) -> CrmInputs:
        """The same of queries; targets must be given, as their own rows have no item."""
        return CrmInputs(
            queries.log,
            self.recent,
            self.retrieved,
            searcher=None if self.searcher is None else self.searcher.for_queries(queries),
            statistics=None if self.statistics is None else self.statistics.for_queries(queries),
        )

    def neighbors(self, rows: Rows, targets: NDArray[np.int32] | None) -> Rows:
        """Retrieved positions `[B, retrieved]`, best first, padded with -1 at the end."""
        if targets is None and self.stored is not None:
            return np.asarray(self.stored[rows, : self.retrieved], np.int64)
        if self.searcher is None:
            raise ValueError("neighbors of other targets are wanted, but CrmInputs was given no searcher")
        return np.asarray(self.searcher.search(rows, targets, self.retrieved), np.int64)

    def __call__(self, rows: Rows, targets: NDArray[np.int32] | None = None) -> Batch:
        """A whole batch, on the CPU: `expand(gather(rows, targets))`."""
        return self.expand(self.gather(rows, targets))

    def gather(self, rows: Rows, targets: NDArray[np.int32] | None = None) -> Batch:
        """Copy what a batch needs out of the log.

        Args:
            rows: int64 `[B]` rows of the log.
            targets: int32 `[B]` dense items to score instead of the rows' own, or None.

        Returns:
            What `expand` takes: `user`, `item`, `dense` and `label` as it returns them, `second` int64
            `[B]`, and per history `recent` (and `retrieved`), its events in time order at the end of each
            line, `_event` int32 `[B, T]` (dense item), `_code` int16 `[B, T]` (rating), `_second` int64
            `[B, T]`, `_length` int64 `[B]` (events; what stands before them means nothing), `retrieved_rank`
            and `statistics`.
        """
        log = self.log
        rows = np.asarray(rows, np.int64)
        start, end = log.history(rows)
        items = log.item.take(rows) if targets is None else np.asarray(targets)
        batch = {
            "user": self._users(log.user.take(rows)),
            "item": self._items(items),
            "dense": items.astype(np.int32),
            "label": log.label.take(rows).astype(np.float32),
            "second": log.timestamp.take(rows),
            "recent_length": np.minimum(end - start, self.recent),
        }
        if self.statistics is not None:
            batch["statistics"] = self.statistics(rows, targets)
        first = end - self.recent
        early = np.flatnonzero(first < 0)  # windows that would begin above the log's first row
        np.maximum(first, 0, out=first)
        above = np.maximum(end[early, None] + np.arange(-self.recent, 0), 0)
        for name, column in self._columns.items():
            window = self._windows[name](first)
            window[early] = column.take(above)
            batch[f"recent_{EVENT[name]}"] = window
        if self.retrieved:
            # In time order, each with its rank: both in one number, rank in the low half.
            events = (self.neighbors(rows, targets) << 32) + np.arange(1, self.retrieved + 1)
            events.sort(axis=1)
            batch["retrieved_rank"] = events.astype(np.int32)  # the cast keeps the low half
            events >>= 32
            batch["retrieved_length"] = (events >= 0).sum(1)
            np.maximum(events, 0, out=events)
            for name, column in self._columns.items():
                batch[f"retrieved_{EVENT[name]}"] = column.take(events)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def expand(self, batch: Batch) -> Batch:
        """What a model looks up, from what `gather` copied; on the batch's device.

        Returns:
            `user` int32 `[B, F_u]`, `item` int32 `[B, F_i]`, `dense` int32 `[B]` (the target's dense id),
            `label` float32 `[B]` (of the rows' own item), and per history `recent` (and `retrieved`): `_item`
            int32 `[B, T, F_i]`, `_rating` int32 `[B, T]`, `_interval` int32 `[B, T]` (1 + floor(log2(1 +
            seconds before the sample)); the last bucket for all that is longer; 0 where the log has no
            times), `_elapsed` int64 `[B, T]` (the seconds themselves), `_dense` int32 `[B, T]` (dense items),
            `_mask` bool `[B, T]` (true where there is an event; item, rating and interval are 0 where it is
            false). `retrieved_rank` int32 `[B, K]`: 1 for the event nearest to the target, 2 for the next
            ..., 0 at padding. `statistics` int32 `[B, 6]` codes. What else the batch holds stays.
        """
        batch = dict(batch)
        second = batch.pop("second")
        # Nothing happens where they are there already.
        self._fields = self._fields.to(second.device)
        self._powers = self._powers.to(second.device)
        for name in ("recent", "retrieved") if self.retrieved else ("recent",):
            event = batch.pop(f"{name}_event")
            code = batch.pop(f"{name}_code")
            event_second = batch.pop(f"{name}_second")
            length = batch.pop(f"{name}_length")
            mask = torch.arange(-event.shape[1], 0, device=event.device) >= -length[:, None]
            elapsed = (second[:, None] - event_second).clamp_(min=0)
            batch[f"{name}_item"] = functional.embedding(event, self._fields).mul_(mask[..., None])
            batch[f"{name}_rating"] = code.int().mul_(mask)
            interval = torch.bucketize(elapsed, self._powers, right=True, out_int32=True)
            batch[f"{name}_interval"] = interval.mul_(mask if self.log.timed else 0)
            batch[f"{name}_elapsed"] = elapsed
            batch[f"{name}_dense"] = event
            batch[f"{name}_mask"] = mask
        if self.retrieved:
            batch["retrieved_rank"] = batch["retrieved_rank"] * batch["retrieved_mask"]
        return batch


class _Lines:
    """Takes lines of `width` values that begin every `step` values: rows of a table, or windows of a column.

    Each line is one element to NumPy, which then copies it in one go: a third of the time of gathering rows.
    """

    def __init__(self, values: NDArray[Any], width: int, step: int | None = None) -> None:
        """Make a view; of zeros where there are fewer values than a line has."""
        values = np.ascontiguousarray(values).reshape(-1)
        if len(values) < width:
            values = np.zeros(width, values.dtype)
        if step is None:
            step = width
        size = values.itemsize
        self.width = width
        self.dtype = values.dtype
        lines = (len(values) - width) // step + 1
        self._lines = np.ndarray(lines, f"V{width * size}", values, strides=(step * size,))

    def __call__(self, which: NDArray[np.integer]) -> NDArray[Any]:
        """A copy of these lines `[n, width]`."""
        return self._lines[which].view(self.dtype).reshape(len(which), self.width)
