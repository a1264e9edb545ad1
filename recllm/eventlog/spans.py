"""Where the history of each event lies: the rows above it of the same user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.ids import FIRST_ID

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class HistorySpans:
    """The histories of the events.

    Attributes:
        offsets: int64 `[n_users + 1]`; the history of an event of user u begins at row `offsets[u]`.
        end: int64 `[N]`, the row behind each history's last one.
        same_second: bool `[N]`, whether an event has the user and the second of the row above.
        long_enough: bool `[N]`, whether the history has `prepare.min_history` events.
    """

    offsets: Array
    end: Array
    same_second: Array
    long_enough: Array

    @classmethod
    def of(cls, user: Array, timestamp: Array | None, users: int, config: PrepareConfig) -> HistorySpans:
        """Find them.

        Args:
            user: dense user of each event `[N]`, ascending.
            timestamp: seconds `[N]`, ascending within a user; None: the log has no times.
            users: how many there are.
            config: `ties` and `min_history` are read.
        """
        offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=FIRST_ID + users))])
        same_second = np.zeros(len(user), dtype=bool)
        if timestamp is not None:
            same_second[1:] = (user[1:] == user[:-1]) & (timestamp[1:] == timestamp[:-1])
        end = np.arange(len(user))
        if config.ties == "strict":
            end = np.maximum.accumulate(np.where(same_second, 0, end))
        return cls(offsets, end, same_second, end - offsets[user] >= config.min_history)
