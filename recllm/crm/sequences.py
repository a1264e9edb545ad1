"""Training sequences of a retriever: the training events of every user, cut into windows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recllm.eventlog.log import EventLog, Rows


class Sequences:
    """Windows of the training events of each user, in time order.

    A user's events are cut from the end: all windows but the first are full. The last event of a window is
    the first one of the next: it is found in the one, and read in the other, so that every training event but
    a user's first is found once a pass.

    Args:
        log: the event log.
        length: events that are read in a window, T.
        is_target: bool `[N]`, the events that are to be found; others are read only.
    """

    def __init__(self, log: EventLog, length: int, is_target: NDArray[np.bool_]) -> None:
        """Cuts; 16 bytes a window stay, and 8 bytes a training event."""
        self.log = log
        self.length = length
        self.events = np.flatnonzero(log.train_events()[: log.n_events])
        user = log.user[self.events]
        ends = np.flatnonzero(np.diff(user, append=-1)) + 1
        starts = np.concatenate([[0], ends[:-1]])
        # A window of n events finds n - 1 of them.
        windows = np.maximum(-(-(ends - starts - 1) // length), 0)
        of_user = np.repeat(np.arange(len(ends)), windows)
        back = np.arange(len(of_user)) - np.repeat(np.cumsum(windows) - windows, windows)
        self.end = ends[of_user] - back * length
        self.start = np.maximum(starts[of_user], self.end - length - 1)
        self._item = log.item_fields[:, 0]
        self._is_target = is_target[self.events]
        self._is_target[starts] = False  # nothing stands before a user's first event
        counted = np.concatenate([[0], np.cumsum(self._is_target)])
        self.targets = counted[self.end] - counted[self.start + 1]
        keep = self.targets > 0
        self.start = self.start[keep]
        self.end = self.end[keep]
        self.targets = self.targets[keep]

    def __len__(self) -> int:
        """How many windows there are with something to find."""
        return len(self.start)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Events that are read, of each window `[n]`."""
        return self.end - self.start - 1

    def counts(self) -> NDArray[np.int64]:
        """How often an id of the item table is to be found in a pass, `[rows]`."""
        items = self._item[self.log.item[self.events[self._is_target]]]
        return np.bincount(items, minlength=len(self._item))

    def __call__(self, windows: Rows) -> dict[str, Tensor]:
        """A batch of windows.

        Args:
            windows: their numbers, int64 `[B]`.

        Returns:
            `items` and `ratings` int32 `[B, T]`, `seconds` int64 `[B, T + 1]`, as `Retriever.states` takes
            them, T being the longest of these windows; `target` int64 `[B, T]`, the id of the item behind
            each event, 0 where nothing is to be found.
        """
        log = self.log
        start = self.start[windows, None]
        end = self.end[windows, None]
        length = int((end - start).max()) - 1
        place = start + np.arange(length + 1)
        there = place < end
        rows = self.events[np.where(there, place, end - 1)]
        items = self._item[log.item[rows]]
        read = there[:, 1:]  # the last event of a window is only found
        is_target = self._is_target[np.where(there, place, 0)]
        target = np.where(read & is_target[:, 1:], items[:, 1:], 0)
        batch = {
            "items": np.where(read, items[:, :-1], 0).astype(np.int32),
            "ratings": np.where(read, log.rating[rows[:, :-1]], 0).astype(np.int32),
            "seconds": log.timestamp[rows],
            "target": target.astype(np.int64),
        }
        return {name: torch.from_numpy(values) for name, values in batch.items()}
