"""What a user did, from both places that know of it: the bundle's log, and the event store.

A stored event that the log holds already counts once. Of a log with times that is an event of the same item
and second; of one without, the first stored events of an item are left out, as many as the log has of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.log import Rows
from recllm.serving.recommender import Recommender
from recllm.serving.server.events import EventStore
from recllm.serving.server.messages import Event, OneUser


@dataclass(frozen=True)
class Stored:
    """Events of the store that a log does not hold, in the order of time.

    Attributes:
        events: by the user's id as text.
    """

    events: dict[str, list[Event]]

    def join(self, user: OneUser) -> list[Event]:
        """The events that a request brings of a user, and the stored ones before the second it asks about."""
        stored = self.events.get(str(user.user), [])
        if user.time is not None:
            stored = [event for event in stored if event.timestamp is None or event.timestamp < user.time]
        return [*stored, *user.history]


def stored_events(store: EventStore | None, recommender: Recommender, users: Sequence[str]) -> Stored:
    """Events of the store that the recommender's log does not hold.

    Args:
        store: where they are; None: nowhere.
        recommender: whose log it is.
        users: ids as text.

    Raises:
        StoreUnavailable: the database failed.
    """
    events: dict[str, list[Event]] = {}
    if store is None:
        return Stored(events)
    table = store.histories(users)
    table = table.with_columns(dense=recommender.maker.items.dense(table["item"]))
    for (user,), part in table.group_by("user", maintain_order=True):
        logged = _Logged(recommender, str(user))
        events[str(user)] = [
            Event.model_construct(
                item=line["item"], rating=line["rating"], label=line["label"], timestamp=line["timestamp"]
            )
            for line in part.to_dicts()
            if not logged.holds(line["dense"], line["timestamp"])
        ]
    return Stored(events)


class _Logged:
    """Events of a user that a log holds.

    Args:
        recommender: whose log it is.
        user: id as text.
    """

    def __init__(self, recommender: Recommender, user: str) -> None:
        """Counts them."""
        log = recommender.log
        rows = logged_rows(recommender, user)
        self._is_timed = log.timed
        items = log.item[rows].tolist()
        self._moments = set(zip(items, log.timestamp[rows].tolist(), strict=True)) if log.timed else set()
        self._counts = Counter(items)

    def holds(self, item: int, second: int) -> bool:
        """Whether a stored event is among them; to be asked in the order of time."""
        if self._is_timed:
            return (item, second) in self._moments
        is_left = self._counts[item] > 0
        self._counts[item] -= is_left
        return is_left


def logged_rows(recommender: Recommender, user: str) -> Rows:
    """Rows of the log that are events of a user, in its order; of one that it does not know, none."""
    dense = int(recommender.maker.users.dense([user])[0])
    if dense < FIRST_ID:
        return np.zeros(0, np.int64)
    offsets = recommender.log.offsets
    return np.arange(int(offsets[dense]), int(offsets[dense + 1]))


def whole_history(
    store: EventStore | None, recommender: Recommender, user: str, most: int
) -> list[dict[str, Any]]:
    """The latest events of a user, logged and stored, oldest first: what `messages.PastEvent` says of each.

    Raises:
        StoreUnavailable: the database failed.
    """
    log = recommender.log
    rows = logged_rows(recommender, user)[-most:]
    levels = [float(level) for level in log.meta["rating_levels"]]
    logged = [
        {
            "item": item,
            "rating": levels[code - 1] if 1 <= code <= len(levels) else None,
            "label": label if label >= 0 else None,
            "timestamp": second if log.timed else None,
            "source": "log",
        }
        for item, code, label, second in zip(
            recommender.maker.items.external(log.item[rows]).to_list(),
            log.rating[rows].tolist(),
            log.label[rows].tolist(),
            log.timestamp[rows].tolist(),
            strict=True,
        )
    ]
    beyond = stored_events(store, recommender, [user]).events.get(user, [])
    stored = [
        {
            "item": event.item,
            "rating": event.rating,
            "label": event.label,
            "timestamp": event.timestamp,
            "source": "store",
        }
        for event in beyond
    ]
    events = [*logged, *stored]
    if log.timed:
        events.sort(key=lambda event: event["timestamp"])
    events = events[-most:]
    names = [str(event["item"]) for event in events]
    known = recommender.maker.items.external(recommender.maker.items.dense(names)).to_list()
    for event, item, title in zip(events, known, recommender.titles(names), strict=True):
        event["title"] = title
        if item is not None:  # in the type of the log's ids, which the store keeps as text
            event["item"] = item
    return events
