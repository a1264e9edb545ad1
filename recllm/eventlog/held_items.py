"""Items of which nothing trains: their events leave the log, and those that are samples lie behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recllm.eventlog.ids import TRAIN, UNUSED

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Parted:
    """The events of a log, dealt into those of items that train and those of held-out items.

    Attributes:
        known: rows of the former in the whole log, ascending, int64 `[K]`; they are the events from now on.
        held: rows of the latter, ascending, int64 `[H]`; they stand behind the events.
        anchor: int64 `[H]`, how many of the events lie above the end of each one's history: the event at
            which it stands, or the row behind its user's last one.
        place: int64 `[N]`, where each row of the whole log stands now.
    """

    known: Array
    held: Array
    anchor: Array
    place: Array

    @classmethod
    def of(cls, is_held: Array, end: Array) -> Parted:
        """Deal out events.

        Args:
            is_held: bool `[N]`, whether an event is of a held-out item.
            end: int64 `[N]`, the row behind the last one of each event's history.
        """
        known = np.flatnonzero(~is_held)
        held = np.flatnonzero(is_held)
        above = np.concatenate([[0], np.cumsum(~is_held)])
        place = np.empty(len(is_held), np.int64)
        place[known] = np.arange(len(known))
        place[held] = len(known) + np.arange(len(held))
        return cls(known, held, above[end[held]], place)

    def reorder(self, values: Array) -> Array:
        """Values `[N]` of the whole log, those of events first."""
        return np.concatenate([values[self.known], values[self.held]])


def split_of_parted(parted: Parted, split: Array, item_split: Array, long_enough: Array) -> Array:
    """Which rows are samples where whole items are held out, int8 `[N]`, in the order of `Parted.reorder`.

    An event trains if it did by time; a row of a held-out item is asked if it lies in the span that its item
    is held out for. Both must have a history that is long enough without held-out items.

    Args:
        parted: the events.
        split: code of each row by time, in that order.
        item_split: code of each row's item, in that order; TRAIN: it is not held out.
        long_enough: bool, in that order.
    """
    is_sample = (split == item_split) & long_enough
    is_sample[: len(parted.known)] &= split[: len(parted.known)] == TRAIN
    return np.where(is_sample, split, UNUSED).astype(np.int8)
