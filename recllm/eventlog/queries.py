"""Queries: what may be asked about is not only a row of the log.

A query is a user, or nobody that the log knows; a history; and a second. A batch of queries becomes a small
event log in memory, in which each query is one local user: its history's events in order, and one more row,
the query's own, which stands where a sample's row would stand. Everything that reads rows of a log (features,
neighbors, prompts, systems) reads these rows by the same code, so that a query that is built from a row's
history has that row's features, neighbors, prompt and scores to the bit.

The rules:

| what a query has | what is read |
| --- | --- |
| a known user | the user's fields, and the events of the log before the query's second |
| a user that the log does not know | fields that read 1 (unknown), and fold 0 of cross-fitted vectors |
| no second | one behind the last of the log and of the query's own events: everything is past |
| events of its own | they stand behind, or between, the known ones, in the log's order (second, item, |
|  | rating, label); one of an item and second that the known history has is that event |
| an event without a second | it stands behind all others, a second before the query, in the order given |
| an event of its own that comes after the query's second | the query is refused |
| an event of an item that the log does not know | it is skipped |
| an event of an item without a training event | it is read; the item's id reads 1 in a CRM's fields |
| an event without a label | it is liked if most events of the log that have its rating, or none, are |
| a rating between the log's levels | the nearest level |
| no event at all | an empty history; what to recommend then is for the caller to say |

Of a log with `prepare.ties=strict` events of the query's own second are left out. In a log without times the
events of the request stand behind all known ones, in the order given.

Statistics of items count the events of the trained log before the query's second; those of the user count the
query's own history.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recllm.eventlog.external import ExternalIds
from recllm.eventlog.ids import FIRST_ID, UNKNOWN, UNUSED
from recllm.eventlog.log import EventLog, Rows

NO_SECOND = np.iinfo(np.int64).min
"""The second of an event, or of a query, that has none."""
NO_LABEL = -1
COUNTS = (
    "queries",
    "known_users",
    "unknown_users",
    "without_history",
    "own_events",
    "skipped_unknown_items",
    "skipped_repeated_events",
    "skipped_same_second",
    "events_of_items_never_trained",
)
"""What is counted of a batch of queries."""


@dataclass(frozen=True)
class OwnEvents:
    """Events that queries bring themselves.

    Attributes:
        query: int64 `[m]`, which query each belongs to.
        item: int32 `[m]` dense; `UNKNOWN`: it is skipped.
        rating: int16 `[m]` code, 0: none.
        label: int8 `[m]`, 1 liked, 0 not, -1 no label.
        second: int64 `[m]`; `NO_SECOND`: none.
    """

    query: Rows
    item: NDArray[np.int32]
    rating: NDArray[np.int16]
    label: NDArray[np.int8]
    second: Rows

    def keep(self, which: NDArray[np.bool_]) -> OwnEvents:
        """Some of them."""
        return OwnEvents(
            self.query[which], self.item[which], self.rating[which], self.label[which], self.second[which]
        )


@dataclass(frozen=True)
class LogRows:
    """Rows of the trained log that are asked about as they stand; `Queries` are the same of anybody.

    Attributes:
        log: the trained log.
        rows: int64 `[Q]`.
    """

    log: EventLog
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Queries:
    """A batch of queries as rows of a log of their own.

    Attributes:
        log: the log of the queries; query q is its user q.
        rows: int64 `[Q]`, the query's own row; its item is `UNKNOWN` and its label means nothing. Of some of
            a batch's queries (`some`), their rows.
        user: int32 `[users of the log]`, dense user of the trained log, `UNKNOWN` where it knows none.
        trained: the log whose items and users these are.
        counts: how many there are of what the rules speak of, see `COUNTS`.
        problems: place of a query -> why it cannot be asked, in a line; its history is then empty.
    """

    log: EventLog
    rows: Rows
    user: NDArray[np.int32]
    trained: EventLog
    counts: Counter[str] = field(default_factory=Counter)
    problems: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def some(self, which: NDArray[Any]) -> Queries:
        """Some of the queries, by place; they stay rows of the same log."""
        return replace(self, rows=self.rows[which])

    def of_users(self, values: NDArray[Any]) -> NDArray[Any]:
        """What an array of the trained log's users `[n_users, ...]` says of each user of the queries' log."""
        return values[self.user]

    def all_events(self) -> tuple[Rows, Rows]:
        """First row of all that is known of each query, and the row behind the last one, int64 `[Q]` each.

        More than `log.history` where histories have a window (`prepare.window`).
        """
        return self.log.offsets[self.log.user[self.rows]], self.rows

    @property
    def lengths(self) -> Rows:
        """Events of each query's history, int64 `[Q]`."""
        start, end = self.log.history(self.rows)
        return end - start


def build_queries(
    log: EventLog, user: NDArray[np.integer], second: Rows, own: OwnEvents | None = None
) -> Queries:
    """Queries of dense users.

    Args:
        log: the trained log.
        user: dense users `[Q]`; `UNKNOWN`: nobody that the log knows. A user may be asked about repeatedly.
        second: int64 `[Q]`; `NO_SECOND`: behind everything. Not read in a log without times.
        own: events that the queries bring; None: none.
    """
    users: NDArray[np.int32] = np.asarray(user, np.int32)
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    if own is not None:
        counts["own_events"] = len(own.query)
        is_known = own.item >= FIRST_ID
        counts["skipped_unknown_items"] = int((~is_known).sum())
        own = own.keep(is_known)
    second = _seconds(log, second, own)
    problems = _from_the_future(log, second, own)
    if problems and own is not None:
        own = own.keep(~np.isin(own.query, list(problems)))
    start = log.offsets[users]
    end = log.offsets[users + 1]
    if log.timed:
        end = _bisect(log.timestamp, start, end, second)
    if problems:
        end[list(problems)] = start[list(problems)]
    query = np.repeat(np.arange(len(users)), end - start)
    row = (
        np.arange(len(query)) - np.repeat(np.cumsum(end - start) - (end - start), end - start) + start[query]
    )
    events = OwnEvents(query, log.item[row], log.rating[row], log.label[row], log.timestamp[row])
    if own is not None and len(own.query):
        events = _merged(log, events, own, second, counts)
    counts["queries"] = len(users)
    counts["known_users"] = int((users >= FIRST_ID).sum())
    counts["unknown_users"] = len(users) - counts["known_users"]
    counts["events_of_items_never_trained"] = int((log.item_count[events.item] == 0).sum())
    length = np.bincount(events.query, minlength=len(users))
    counts["without_history"] = int((length == 0).sum())
    return _as_log(log, users, second, events, counts, problems)


def queries_of_rows(log: EventLog, rows: Rows) -> Queries:
    """Queries that stand where rows of the log stand: the row's user, second and history."""
    rows = np.asarray(rows, np.int64)
    start, end = log.history(rows)
    length = end - start
    query = np.repeat(np.arange(len(rows)), length)
    row = np.arange(len(query)) - np.repeat(np.cumsum(length) - length, length) + start[query]
    events = OwnEvents(query, log.item[row], log.rating[row], log.label[row], log.timestamp[row])
    counts = Counter(dict.fromkeys(COUNTS, 0))
    counts |= Counter({"queries": len(rows), "known_users": len(rows)})
    counts["without_history"] = int((length == 0).sum())
    return _as_log(log, log.user[rows], log.timestamp[rows], events, counts, {})


def without_events(queries: Queries, rows: Rows) -> Queries:
    """The same queries, as if some of their events had never happened.

    Args:
        queries: all of a batch.
        rows: rows of their log, of events.

    Raises:
        ValueError: a row is none, or a query's own.
    """
    log = queries.log
    is_event = np.ones(len(log.user), np.bool_)
    is_event[queries.rows] = False
    rows = np.asarray(rows, np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(is_event) or not is_event[rows].all()):
        raise ValueError(f"rows {rows.tolist()} are left out; wanted events of the {len(queries)} queries")
    is_event[rows] = False
    kept = np.flatnonzero(is_event)
    events = OwnEvents(
        log.user[kept].astype(np.int64),
        log.item[kept],
        log.rating[kept],
        log.label[kept],
        log.timestamp[kept],
    )
    second = log.timestamp[queries.rows]
    return _as_log(queries.trained, queries.user, second, events, queries.counts, queries.problems)


def _as_log(
    log: EventLog,
    user: NDArray[np.int32],
    second: Rows,
    events: OwnEvents,
    counts: Counter[str],
    problems: dict[int, str],
) -> Queries:
    """The log of queries whose events `[m]` stand in order, by query."""
    n_queries = len(user)
    length = np.bincount(events.query, minlength=n_queries)
    offsets = np.concatenate([[0], np.cumsum(length + 1)])
    rows = offsets[1:] - 1
    place = np.arange(len(events.query)) + events.query  # each query before has a row of its own
    size = len(events.query) + n_queries

    def column(values: NDArray[Any], own_row: int | Rows) -> NDArray[Any]:
        whole = np.empty(size, values.dtype)
        whole[place] = values
        whole[rows] = own_row
        return whole

    arrays = {
        "user": np.repeat(np.arange(n_queries, dtype=np.int32), length + 1),
        "item": column(events.item, UNKNOWN),
        "rating": column(events.rating, 0),
        "label": column(events.label, 0),
        "timestamp": column(events.second, second),
        "split": np.full(size, UNUSED, np.int8),
        "training": np.zeros(size, np.bool_),
        "offsets": offsets,
        "user_fields": log.user_fields[user],
        "item_fields": log.item_fields,
        "item_count": log.item_count,
        "item_likes": log.item_likes,
    }
    meta = {**log.meta, "n_users": n_queries, "n_events": size}
    return Queries(EventLog(log.folder, arrays, meta), rows, user, log, counts, problems)


def _seconds(log: EventLog, second: Rows, own: OwnEvents | None) -> Rows:
    """The second of each query `[Q]`: as it is given, or behind everything; 0 in a log without times."""
    second = np.array(second, np.int64)
    if not log.timed:
        return np.zeros_like(second)
    last = np.full(len(second), last_second(log), np.int64)
    if own is not None:
        np.maximum.at(last, own.query, own.second)
    return np.where(second == NO_SECOND, last + 1, second)


def last_second(log: EventLog) -> int:
    """The last second of a log's events; 0 where it has none, or no times."""
    return int(log.timestamp[: log.n_events].max(initial=0))


def _from_the_future(log: EventLog, second: Rows, own: OwnEvents | None) -> dict[int, str]:
    """Queries with an event of their own behind their own second, and a line about the first such event."""
    if own is None or not log.timed:
        return {}
    late = np.flatnonzero(own.second > second[own.query])
    problems = {}
    for event in late[::-1].tolist():  # the first one is written last
        query = int(own.query[event])
        problems[query] = (
            f"the history has an event at second {own.second[event]}, after the query's own, "
            f"{second[query]}; wanted events of before, or a later time"
        )
    return problems


def _bisect(values: Rows, low: Rows, high: Rows, bound: Rows) -> Rows:
    """First place in each ascending range `values[low:high]` that is not below the bound, `[Q]`."""
    low = low.copy()
    high = high.copy()
    while (is_open := low < high).any():
        middle = (low + high) // 2
        is_below = is_open & (values[np.where(is_open, middle, 0)] < bound)
        low = np.where(is_below, middle + 1, low)
        high = np.where(is_open & ~is_below, middle, high)
    return low


def _merged(log: EventLog, known: OwnEvents, own: OwnEvents, second: Rows, counts: Counter[str]) -> OwnEvents:
    """Known events and the queries' own ones, in the order of the log."""
    given = np.arange(len(own.query))
    timeless = np.zeros(len(own.query), np.bool_)
    own_second = np.zeros(len(own.query), np.int64)
    if log.timed:
        timeless = own.second == NO_SECOND
        own_second = np.where(timeless, second[own.query] - 1, own.second)
    is_own = np.repeat([False, True], [len(known.query), len(own.query)])
    query = np.concatenate([known.query, own.query])
    at = np.concatenate([known.second, own_second])
    item = np.concatenate([known.item, own.item])
    rating = np.concatenate([known.rating, own.rating])
    label = np.concatenate([known.label, own.label])
    in_given_order = np.concatenate([np.zeros(len(known.query), np.bool_), timeless])
    place = np.concatenate([np.arange(len(known.query)), given])
    if log.timed:
        tie = np.where(in_given_order, place, item)
        order = np.lexsort((label, rating, is_own, tie, in_given_order, at, query))
    else:
        order = np.lexsort((place, is_own, query))
    query, at, item = query[order], at[order], item[order]
    rating, label, is_own, in_given_order = rating[order], label[order], is_own[order], in_given_order[order]
    merged = OwnEvents(query, item, rating, label, at)
    if not log.timed:
        return merged
    same_moment = np.zeros(len(query), np.bool_)
    same_moment[1:] = (query[1:] == query[:-1]) & (at[1:] == at[:-1]) & (item[1:] == item[:-1])
    same_moment &= ~in_given_order
    alike = same_moment.copy()
    alike[1:] &= (rating[1:] == rating[:-1]) & (label[1:] == label[:-1])
    moment = np.cumsum(~same_moment) - 1
    has_known = np.bincount(moment, ~is_own) > 0
    repeated = is_own & same_moment & (alike | has_known[moment])
    too_late = np.zeros_like(repeated)
    if log.strict_ties:
        too_late = at >= second[query]
    counts["skipped_repeated_events"] = int(repeated.sum())
    counts["skipped_same_second"] = int((too_late & ~repeated).sum())
    return merged.keep(~repeated & ~too_late)


class QueryMaker:
    """Makes queries of external ids.

    Args:
        log: the trained log.
        users: its users' external ids; None reads them from the log's folder.
        items: its items' external ids; likewise.
    """

    def __init__(
        self, log: EventLog, users: ExternalIds | None = None, items: ExternalIds | None = None
    ) -> None:
        """Reads the ids, and counts which ratings are liked."""
        self.log = log
        self.users = users or ExternalIds.open(log.folder, "user")
        self.items = items or ExternalIds.open(log.folder, "item")
        self._levels = np.array([float(level) for level in log.meta["rating_levels"]])
        events = slice(log.n_events)
        code = log.rating[events].astype(np.int64)
        size = len(self._levels) + 1
        code[code >= size] = 0  # a label that is shown instead of a rating
        liked = np.bincount(code, log.label[events] == 1, size)
        labeled = np.bincount(code, log.label[events] >= 0, size)
        self._label_of_code = np.where(labeled > 0, 2 * liked > labeled, NO_LABEL).astype(np.int8)

    def make(
        self,
        users: pl.Series,
        seconds: pl.Series | None = None,
        histories: pl.DataFrame | None = None,
    ) -> Queries:
        """Queries of external users, one a line.

        Args:
            users: external ids `[Q]`; null, or an id that the log does not know: nobody.
            seconds: Unix seconds `[Q]`, null: behind everything; None: all are.
            histories: events that the queries bring: `query` (place in `users`), `item` (external id), and
                where they are known `rating`, `label` (1 or 0) and `timestamp` (seconds).
        """
        if seconds is None:
            second = np.full(len(users), NO_SECOND, np.int64)
        else:
            second = seconds.cast(pl.Int64).fill_null(NO_SECOND).to_numpy()
        own = None if histories is None or not histories.height else self.events(histories)
        return build_queries(self.log, self.users.dense(users), second, own)

    def events(self, histories: pl.DataFrame) -> OwnEvents:
        """Events of requests with dense items, rating codes and labels; see `make`."""
        rating = np.zeros(histories.height, np.int16)
        if "rating" in histories.columns and len(self._levels):
            value = histories["rating"].cast(pl.Float64, strict=False).fill_null(float("nan")).to_numpy()
            between = (self._levels[1:] + self._levels[:-1]) / 2
            rating = np.where(np.isnan(value), 0, np.searchsorted(between, value) + 1).astype(np.int16)
        label = self._label_of_code[rating]
        if "label" in histories.columns:
            given = histories["label"].cast(pl.Int8, strict=False).fill_null(NO_LABEL).to_numpy()
            label = np.where(given >= 0, given, label).astype(np.int8)
        if self.log.shows_labels:
            shown = np.where(label >= 0, len(self._levels) + 1 + label, 0)
            rating = np.where(rating > 0, rating, shown).astype(np.int16)
        second = np.full(histories.height, NO_SECOND, np.int64)
        if "timestamp" in histories.columns:
            second = histories["timestamp"].cast(pl.Int64, strict=False).fill_null(NO_SECOND).to_numpy()
        return OwnEvents(
            query=histories["query"].cast(pl.Int64).to_numpy(),
            item=self.items.dense(histories["item"]),
            rating=rating,
            label=label,
            second=second,
        )
