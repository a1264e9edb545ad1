"""Negatives and candidate lists: what a next item is ranked against.

Everything here is a function of (seed, row), so that a list does not depend on the batch that asks for it.

`uniform` and `popular` lists need nothing but the log. `hard` ones hold items that are alike, by the vectors
that retrieval uses, and so are made after it. The items nearest to a target would give it away: on ML-1M it
is the one most like the others of its list in 78 % of such lists. So negatives are items near a center that
is itself near the target: then 4 %, where a guess has 5 %.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.eventlog import draws
from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.names import CandidateDraw

Rows = npt.NDArray[np.int64]
Items = npt.NDArray[np.int32]

KINDS: tuple[CandidateDraw, ...] = ("uniform", "popular")
_NEVER = np.iinfo(np.int64).min  # the key of an item that must not be drawn
_BYTES = 1 << 26  # of the rows whose negatives are drawn at once, about; bounds memory
_ROUNDS = 16  # rejection rounds; what is open after them is drawn exactly, over the whole catalog


class Histories(Protocol):
    """The arrays of an event log that this file reads (`recllm.eventlog.log.EventLog` has them all)."""

    user: npt.NDArray[np.int32]
    item: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    item_count: npt.NDArray[np.int32]
    item_split: npt.NDArray[np.int8] | None
    held_count: npt.NDArray[np.int32] | None

    @property
    def held_rows(self) -> Rows:
        """Rows of the events of held-out items."""

    @property
    def draws_met(self) -> bool:
        """Whether negatives may be items that the user had met before."""

    def anchors(self, rows: Rows) -> Rows:
        """The event at which each row stands."""


class Seen:
    """The first row of every (user, item) pair: whether a user had met an item before some row."""

    def __init__(self, log: Histories, users: npt.NDArray[np.int32] | None = None) -> None:
        """Sorts the pairs.

        Args:
            log: the event log.
            users: dense users to cover; None covers all of them (8 + 8 bytes an event).
        """
        self._items = len(log.item_count)
        rows = np.arange(log.offsets[-1]) if users is None else _rows_of(log.offsets, np.unique(users))
        stands = rows
        if len(log.held_rows):  # the user met these items, too, though nothing else knows of it
            rows = np.concatenate([rows, log.held_rows])
            stands = np.concatenate([stands, log.anchors(log.held_rows)])
            order = np.argsort(stands, kind="stable")
            rows = rows[order]
            stands = stands[order]
        keys = log.user[rows].astype(np.int64) * self._items + log.item[rows]
        self._keys, first = np.unique(keys, return_index=True)  # return_index is the first, and places ascend
        self._first_row = stands[first]

    def above(self, users: npt.NDArray[np.int32], items: Items, rows: Rows) -> npt.NDArray[np.bool_]:
        """True where the user's log holds the item above the row.

        Args:
            users: dense users `[B, 1]`.
            items: dense items `[B, n]`.
            rows: rows of the log `[B, 1]`.

        Returns:
            bool `[B, n]`.
        """
        keys = users.astype(np.int64) * self._items + items
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return (self._keys[place] == keys) & (self._first_row[place] < rows)


def met_before(log: Histories, rows: Rows, lists: Items | None = None) -> npt.NDArray[np.bool_]:
    """Whether each row's user had met its own item above it, bool `[R]`; of lists each one, `[R, C]`."""
    rows = np.asarray(rows, dtype=np.int64)
    users = log.user[rows]
    items = log.item[rows, None] if lists is None else lists
    met = Seen(log, users).above(users[:, None], items, log.anchors(rows)[:, None])
    return met[:, 0] if lists is None else met


@dataclass(frozen=True)
class Catalog:
    """What the candidates of some rows are drawn from.

    Items with a training event; of rows whose item is held out, the items that are held out for the same
    split. So whatever tells that an item has no event tells nothing of which one of a list is the row's own.

    Attributes:
        places: int64 `[R']`, the places of the rows.
        items: int32 `[I]`, ascending.
        events: int32 `[I]`, their training events; of held-out items `EventLog.held_count`.
    """

    places: Rows
    items: Items
    events: npt.NDArray[np.int32]

    @classmethod
    def of(cls, log: Histories, rows: Rows) -> list[Catalog]:
        """The catalogs of rows `[R]`; one, but where items are held out."""
        if log.item_split is None or log.held_count is None:
            items = np.flatnonzero(log.item_count).astype(np.int32)
            return [cls(np.arange(len(rows)), items, log.item_count[items])]
        counts = log.item_count + log.held_count
        catalogs = []
        of_rows = log.item_split[log.item[rows]]
        for code in np.unique(of_rows):
            items = np.flatnonzero((log.item_split == code) & (counts > 0)).astype(np.int32)
            catalogs.append(cls(np.flatnonzero(of_rows == code), items, counts[items]))
        return catalogs


def count_new_items(log: Histories, rows: Rows) -> Rows:
    """How many items of its catalog each row's user had not met before it, the row's own left out.

    Where the log draws items that were met as well, these count too.

    Args:
        log: the event log.
        rows: rows of the log `[R]`.

    Returns:
        int64 `[R]`: as many negatives as a row can have.
    """
    rows = np.asarray(rows, dtype=np.int64)
    new_items = np.empty(len(rows), np.int64)
    for catalog in Catalog.of(log, rows):
        new_items[catalog.places] = _count_new_items(log, rows[catalog.places], catalog)
    return new_items


def _count_new_items(log: Histories, rows: Rows, catalog: Catalog) -> Rows:
    """The same of rows that have one catalog."""
    users = log.user[rows]
    stands = log.anchors(rows)
    is_offered = np.zeros(len(log.item_count), dtype=bool)
    is_offered[catalog.items] = True
    if log.draws_met:
        return len(catalog.items) - is_offered[log.item[rows]]
    events = _rows_of(log.offsets, np.unique(users))
    lies = events
    if len(log.held_rows):
        events = np.concatenate([events, log.held_rows])
        lies = np.concatenate([lies, log.anchors(log.held_rows)])
        order = np.lexsort((lies, log.user[events]))
        events = events[order]
        lies = lies[order]
    keys = log.user[events].astype(np.int64) * len(log.item_count) + log.item[events]
    is_first = np.zeros(len(events), dtype=bool)
    is_first[np.unique(keys, return_index=True)[1]] = True
    running = np.concatenate([[0], np.cumsum(is_first & is_offered[log.item[events]])])
    # Users and places ascend together; both in one number.
    span = int(log.offsets[-1]) + 1
    ordered = log.user[events].astype(np.int64) * span + lies
    of_users = users.astype(np.int64) * span
    first = np.searchsorted(ordered, of_users + log.offsets[users])
    end = np.searchsorted(ordered, of_users + stands)
    is_new = is_offered[log.item[rows]] & ~met_before(log, rows)
    return len(catalog.items) - (running[end] - running[first]) - is_new


def most_new_items(log: Histories, rows: Rows, external: pl.Series) -> tuple[int, object]:
    """The most items that are new to the user of one of the rows, and that user's own id.

    Args:
        log: the event log.
        rows: rows of the log `[R]`.
        external: own ids of the users, from dense id 2 on.
    """
    new_items = count_new_items(log, rows)
    best = int(new_items.argmax())
    return int(new_items[best]), external[int(log.user[rows[best]]) - FIRST_ID]


def have_new_items(log: Histories, rows: Rows, wanted: int) -> npt.NDArray[np.bool_]:
    """Where `count_new_items` is `wanted` or more, bool `[R]`; looks at long histories only."""
    rows = np.asarray(rows, dtype=np.int64)
    length = log.anchors(rows) - log.offsets[log.user[rows]]
    enough = np.zeros(len(rows), dtype=bool)
    if log.item_split is None:
        enough = int((log.item_count > 0).sum()) - length - 1 >= wanted
    unclear = np.flatnonzero(~enough)
    if len(unclear):
        enough[unclear] = count_new_items(log, rows[unclear]) >= wanted
    return enough


def negatives(
    log: Histories,
    rows: Rows,
    kind: str,
    n: int,
    seed: int,
    exclude_target: bool = True,
    seen: Seen | None = None,
) -> Items:
    """Items that the user had not met before the row, drawn without replacement.

    Where the log draws items that were met as well (`EventLog.draws_met`), any but the row's own.
    An item of any row above is out, also one of the same second and whatever `history.ties` says: it was met.
    An item that the user meets later may be drawn, as nothing below the row may be known.

    Args:
        log: the event log.
        rows: rows of the log `[R]`.
        kind: `uniform` over the items of the rows' `Catalog`, those with a training event, or `popular`: in
            proportion to their events.
        n: negatives a row.
        seed: draws are functions of (seed, kind, row).
        exclude_target: leave the row's own item out as well.
        seen: the table of (user, item) pairs, to be built once where many batches are asked for; None builds
            it.

    Returns:
        int32 `[R, n]`, distinct within a row.

    Raises:
        ValueError: `kind` is none of the two, or a user has met so much that fewer than n items are left.
    """
    if kind not in KINDS:
        raise ValueError(f"candidates of kind {kind!r}, wanted one of {', '.join(KINDS)}")
    rows = np.asarray(rows, dtype=np.int64)
    seen = Seen(log, log.user[rows]) if seen is None else seen
    drawn = np.zeros((len(rows), n), dtype=np.int32)
    for catalog in Catalog.of(log, rows):
        own = rows[catalog.places]
        weight = (catalog.events if kind == "popular" else np.ones(len(catalog.items))).astype(np.float64)
        drawing = _Drawing(
            log,
            own,
            stands=log.anchors(own),
            seen=seen,
            exclude_target=exclude_target,
            seed=draws.derive(seed, "negatives", kind),
            catalog=catalog.items,
            weight=weight,
            cumulative=np.cumsum(weight) / weight.sum(),
        )
        drawn[catalog.places] = _drawn(drawing, n)
    return drawn


@dataclass(frozen=True)
class _Drawing:
    """What negatives of rows `[R]` are drawn from.

    Attributes:
        log: the event log.
        rows: rows of the log `[R]`.
        stands: the event at which each row stands `[R]`.
        seen: the table of (user, item) pairs.
        exclude_target: whether a row's own item is left out as well.
        seed: of these draws.
        catalog: items of the rows' `Catalog`, ascending `[I]`.
        weight: float64 `[I]`, in proportion to which they are drawn.
        cumulative: float64 `[I]`, running sum of the weights over all of them.
    """

    log: Histories
    rows: Rows
    stands: Rows
    seen: Seen
    exclude_target: bool
    seed: int
    catalog: Items
    weight: npt.NDArray[np.float64]
    cumulative: npt.NDArray[np.float64]


def _drawn(drawing: _Drawing, n: int) -> Items:
    """Negatives `[R, n]`, a part of the rows at a time, as none looks at another one."""
    chosen = np.zeros((len(drawing.rows), n), dtype=np.int32)
    # Each of a row's 2 n draws is held against its n chosen items, a byte each, and stands in about eight
    # arrays of eight bytes.
    size = max(1, _BYTES // max(1, 2 * n * (n + 64)))
    for first in range(0, len(chosen), size):
        part = slice(first, first + size)
        rows = replace(drawing, rows=drawing.rows[part], stands=drawing.stands[part])
        _draw_rows(rows, chosen[part])
    return chosen


def _draw_rows(drawing: _Drawing, chosen: Items) -> None:
    """Fills `chosen` `[R, n]`: drawn and rejected, and what is still open drawn exactly."""
    n = chosen.shape[1]
    filled = _draw_and_reject(drawing, chosen)
    for place in np.flatnonzero(filled < n):
        chosen[place, filled[place] :] = _draw_exactly(drawing, int(place), chosen[place, : filled[place]], n)


def _draw_and_reject(drawing: _Drawing, chosen: Items) -> Rows:
    """Fills rows of `chosen` `[R, n]` from the left in some rounds; returns how far each is filled `[R]`.

    A draw is used in its own order, so that how many are made in a round changes no result.
    """
    log = drawing.log
    rows = drawing.rows
    n = chosen.shape[1]
    cumulative = drawing.cumulative
    filled = np.zeros(len(rows), dtype=np.int64)
    width = 2 * n  # draws a row and round
    left = np.arange(len(rows))
    for turn in range(_ROUNDS):
        if not len(left):
            break
        uniform = draws.uniform(drawing.seed, rows[left], width, start=turn * width)
        place = np.minimum(np.searchsorted(cumulative, uniform, side="right"), len(cumulative) - 1)
        items = drawing.catalog[place]
        free = np.ones(items.shape, dtype=bool)
        if not log.draws_met:
            free = ~drawing.seen.above(log.user[rows[left], None], items, drawing.stands[left, None])
        if drawing.exclude_target:
            free &= items != log.item[rows[left], None]
        free &= ~(items[:, :, None] == chosen[left][:, None, :]).any(axis=2)
        free &= ~_repeats(items)
        slot = filled[left, None] + np.cumsum(free, axis=1) - 1
        row, column = np.nonzero(free & (slot < n))
        chosen[left[row], slot[row, column]] = items[row, column]
        filled[left] = np.minimum(filled[left] + free.sum(axis=1), n)
        left = left[filled[left] < n]
    return filled


def _draw_exactly(drawing: _Drawing, place: int, drawn: Items, n: int) -> Items:
    """What row number `place` lacks to n items, beside those `drawn` for it already.

    Who has read nearly everything rejects nearly every draw. Drawing without replacement in proportion to
    weights is the same as taking the smallest -log(u) / weight (Efraimidis and Spirakis 2006).

    Raises:
        ValueError: the user has met so much that fewer items are left.
    """
    log = drawing.log
    catalog = drawing.catalog
    row = drawing.rows[place : place + 1]
    out = np.zeros(len(catalog), dtype=bool)
    if not log.draws_met:
        stands = drawing.stands[place : place + 1, None]
        out = drawing.seen.above(log.user[row, None], catalog[None, :], stands)[0]
    out |= np.isin(catalog, drawn)
    if drawing.exclude_target:
        out |= catalog == log.item[row]
    free = len(catalog) - out.sum()
    need = n - len(drawn)
    if free < need:
        raise ValueError(
            f"row {row[0]}: {free + len(drawn)} items of the training catalog are new to its user, "
            f"wanted {n}; lower prepare.candidates or prepare.sampled_negatives"
        )
    bits = draws.hashes(draws.derive(drawing.seed, "exact"), row, catalog) >> np.uint64(11)
    arrival = np.where(out, np.inf, -np.log((bits + 1.0) * 2.0**-53) / drawing.weight)
    return catalog[np.argsort(arrival, kind="stable")[:need]]


def candidate_lists(log: Histories, rows: Rows, kind: str, n: int = 20, seed: int = 0) -> Items:
    """The target of each row among n - 1 negatives, in an order that does not tell which one is the target.

    The order sorts by a hash of (seed, row, item): it is a function of the row and the set of the candidates,
    so another one of them as the target would stand in the same place.

    Args:
        log: the event log.
        rows: rows of the log `[R]`.
        kind: `uniform` or `popular`, see `negatives`.
        n: candidates a row, the target included.
        seed: draws and order are functions of (seed, row).

    Returns:
        int32 `[R, n]`, distinct within a row.

    Raises:
        ValueError: as `negatives`.
    """
    rows = np.asarray(rows, dtype=np.int64)
    return _with_target(log, rows, negatives(log, rows, kind, n - 1, seed), seed)


def hard_lists(
    log: Histories,
    rows: Rows,
    vectors: npt.NDArray[np.float32],
    fold: npt.NDArray[np.integer[Any]],
    nearest: int = 50,
    n: int = 20,
    seed: int = 0,
) -> Items:
    """The target of each row among n - 1 items that are like it, in an order that does not tell it.

    A center is drawn out of the `nearest` items to the target, and the negatives out of the `nearest` items
    to the center that the user had not met before the row (or any, where the log draws what was met as well);
    uniformly, among the items of the rows' `Catalog`.
    Near is a large inner product; ties (an item without a vector is as near to everything) go by an order of
    the items that the seed draws.

    Args:
        log: the event log.
        rows: rows of the log `[R]`.
        vectors: item vectors `[folds, n_items, D]`, no longer than 1.
        fold: which of them a user's search uses `[n_users]`.
        nearest: how many items a draw is made out of: fewer are harder.
        n: candidates a row, the target included.
        seed: draws and order are functions of (seed, row).

    Returns:
        int32 `[R, n]`, distinct within a row.

    Raises:
        ValueError: `nearest` is below n - 1, or a user has met so much that fewer are left.
    """
    if nearest < n - 1:
        raise ValueError(f"{n - 1} of the {nearest} nearest items wanted; set retrieval.hard={n - 1} or more")
    rows = np.asarray(rows, dtype=np.int64)
    drawn = np.zeros((len(rows), n - 1), np.int32)
    for catalog in Catalog.of(log, rows):
        own = rows[catalog.places]
        drawn[catalog.places] = _hard_negatives(log, own, catalog.items, vectors, fold, nearest, n, seed)
    return _with_target(log, rows, drawn, seed)


def _hard_negatives(
    log: Histories,
    rows: Rows,
    catalog: Items,
    vectors: npt.NDArray[np.float32],
    fold: npt.NDArray[np.integer[Any]],
    nearest: int,
    n: int,
    seed: int,
) -> Items:
    """The negatives `[R, n - 1]` of `hard_lists`, out of these items."""
    place = np.full(len(log.item_count), -1)
    place[catalog] = np.arange(len(catalog))
    tie = np.argsort(draws.hashes(draws.derive(seed, "hard", "ties"), catalog)).argsort()
    chosen = np.zeros((len(rows), n - 1), np.int32)
    of_fold = fold[log.user[rows]]
    size = max(1, 8_000_000 // len(catalog))  # rows whose similarities are in memory at once
    for number in np.unique(of_fold):
        ours = np.flatnonzero(of_fold == number)
        table = vectors[number]
        for part in np.split(ours, np.arange(size, len(ours), size)):
            target = log.item[rows[part]]
            own = (np.arange(len(part)), place[target])
            keys = _nearness(table[target] @ table[catalog].T, tie, own)
            center_seed = draws.derive(seed, "hard", "center")
            center = catalog[_draw_of_nearest(keys, rows[part], nearest, 1, center_seed)]
            never = [own]
            if not log.draws_met:
                line, above = _events_above(log, rows[part])
                never.append((line, place[log.item[above]]))
                if log.item_split is not None:  # no event tells which held-out items were met
                    every = np.broadcast_to(catalog, (len(part), len(catalog)))
                    line, column = np.nonzero(met_before(log, rows[part], every))
                    never.append((line, column))
            keys = _nearness(table[center[:, 0]] @ table[catalog].T, tie, *never)
            negative_seed = draws.derive(seed, "hard")
            chosen[part] = catalog[_draw_of_nearest(keys, rows[part], nearest, n - 1, negative_seed)]
    return chosen


def _nearness(similarity: npt.NDArray[np.float32], tie: Rows, *never: tuple[Rows, Rows]) -> Rows:
    """Similarity on a grid of 2^-20 and then the order of ties, in an int64 `[B, C]`: larger is nearer.

    Cells that `never` names by line and column are as far as can be; a column of -1 is none.
    """
    keys = np.rint(similarity * np.float32(2**20)).astype(np.int64)
    keys *= 2**31
    keys += tie
    for line, column in never:
        keys[line[column >= 0], column[column >= 0]] = _NEVER
    return keys


def _draw_of_nearest(keys: Rows, rows: Rows, nearest: int, n: int, seed: int) -> Rows:
    """Columns `[B, n]`: of each line n of them, drawn out of the `nearest` with the largest keys."""
    first = max(0, keys.shape[1] - nearest)
    best = np.argpartition(keys, first, axis=1)[:, first:]
    order = draws.hashes(seed, rows[:, None], best) >> np.uint64(1)
    order[np.take_along_axis(keys, best, axis=1) == _NEVER] = np.iinfo(np.uint64).max
    free = (order < np.iinfo(np.uint64).max).sum(axis=1)
    if (short := np.flatnonzero(free < n)).size:
        raise ValueError(
            f"row {rows[short[0]]}: {free[short[0]]} items of the training catalog are new to its user, "
            f"wanted {n}; lower prepare.candidates"
        )
    return np.take_along_axis(best, np.argsort(order, axis=1)[:, :n], axis=1)


def _with_target(log: Histories, rows: Rows, drawn: Items, seed: int) -> Items:
    """The rows' own items among those drawn for them, sorted by a hash of (row, item)."""
    items = np.concatenate([log.item[rows, None], drawn], axis=1)
    order = np.argsort(draws.hashes(draws.derive(seed, "order"), rows[:, None], items), axis=1)
    return np.take_along_axis(items, order, axis=1)


def _events_above(log: Histories, rows: Rows) -> tuple[Rows, Rows]:
    """For every event above one of the rows, of the same user: which of the rows, and the event's row."""
    stands = log.anchors(rows)
    start = log.offsets[log.user[rows]]
    line = np.repeat(np.arange(len(rows)), stands - start)
    before = np.cumsum(stands - start) - (stands - start)
    return line, np.arange(len(line)) - before[line] + start[line]


def _rows_of(offsets: npt.NDArray[np.int64], users: npt.NDArray[np.int32]) -> Rows:
    """All rows of these users, ascending: the concatenated ranges, without a loop."""
    start = offsets[users]
    length = offsets[users + 1] - start
    shift = np.repeat(start - np.concatenate([[0], np.cumsum(length)[:-1]]), length)
    return np.arange(length.sum()) + shift


def _repeats(items: Items) -> npt.NDArray[np.bool_]:
    """True at every item `[B, n]` that stands further left in its row as well."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    repeated = np.zeros(items.shape, dtype=bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return repeated
