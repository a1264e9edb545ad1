"""Items of which nothing trains: their events leave the log, and those that are samples lie behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.given import Given
from recllm.eventlog.ids import FIRST_ID, SPLITS, TRAIN, UNUSED
from recllm.eventlog.spans import HistorySpans
from recllm.eventlog.splits import held_items

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


@dataclass(frozen=True)
class SplitEvents:
    """The events of a log, and what is asked of them.

    Attributes:
        columns: arrays `[N]` of what an event itself is, user to timestamp.
        histories: of the events.
        split: code of each event, int8 `[N]`.
        order: rows of each split.
        training: the training events, bool `[N]`.
    """

    columns: dict[str, Array]
    histories: HistorySpans
    split: Array
    order: dict[str, Array]
    training: Array


def split_items(items: int, config: PrepareConfig, given: Given) -> Array:
    """The split that each dense item is held out for, int8 `[2 + items]`.

    Raises:
        ValueError: the data set has candidate lists, whose items would be known and held out by chance.
    """
    if len(given.rows):
        raise ValueError(
            f"prepare.split=items, but {len(given.rows):,} events have candidate lists of their own, whose "
            "items it would deal out; wanted none, or ARGS='prepare.split=given'"
        )
    return np.concatenate([np.zeros(FIRST_ID, np.int8), held_items(config, items)])


def hold_items_out(
    whole: SplitEvents, item_split: Array, config: PrepareConfig
) -> tuple[SplitEvents, dict[str, Array]]:
    """The log without the events of held-out items, which stand behind it; see `splits`.

    Args:
        whole: all events, split by time.
        item_split: of each dense item.
        config: `min_history` and `held_items` are read.

    Returns:
        The events that are left, in whose orders rows of held-out items are rows behind them; and the arrays
        of columns, split and training with the rows behind, their `anchor`, and `held_count`.

    Raises:
        ValueError: a split is empty.
    """
    columns = whole.columns
    of_items = item_split[columns["item"]]
    parted = Parted.of(of_items > 0, whole.histories.end)
    known = {name: values[parted.known] for name, values in columns.items()}
    users = len(whole.histories.offsets) - 1 - FIRST_ID
    histories = HistorySpans.of(known["user"], known["timestamp"], users, config)
    length = parted.anchor - histories.offsets[columns["user"][parted.held]]
    long_enough = np.concatenate([histories.long_enough, length >= config.min_history])
    split = split_of_parted(parted, parted.reorder(whole.split), parted.reorder(of_items), long_enough)
    order = {}
    for name, rows in whole.order.items():
        moved = parted.place[rows]
        order[name] = moved[split[moved] == SPLITS[name]]
    if not all(len(rows) for rows in order.values()):
        parts = ", ".join(f"{len(rows)} {name}" for name, rows in order.items())
        raise ValueError(
            f"prepare.held_items={config.held_items} of {len(item_split) - FIRST_ID:,} items leave {parts} "
            "samples, wanted some of each; ARGS='prepare.held_items=[0.2,0.2]'"
        )
    in_span = columns["item"][parted.held[whole.training[parted.held]]]
    is_held = (item_split > 0).astype(np.int32)
    training = whole.training[parted.known]
    behind = {name: parted.reorder(values) for name, values in columns.items()}
    behind["split"] = split
    behind["training"] = np.concatenate([training, np.zeros(len(parted.held), bool)])
    behind["anchor"] = parted.anchor
    behind["held_count"] = is_held + np.bincount(in_span, minlength=len(item_split)).astype(np.int32)
    events = SplitEvents(known, histories, split[: len(parted.known)], order, training)
    return events, behind
