"""Rows and candidate lists that stages draw from a log."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recllm.console import say
from recllm.errors import StageError
from recllm.eventlog.candidates import KINDS, candidate_lists, have_new_items, met_before, most_new_items
from recllm.eventlog.external import ExternalIds
from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.names import sized


def has_ranking_rows(log: EventLog) -> bool:
    """Whether validation rows of the ranking task are stored, by which checkpoints can be selected."""
    return all(len(log.ranking("valid", kind)[0]) for kind in log.candidate_kinds)


def check_ranking_rows(log: EventLog) -> None:
    """Refuse a log without stored validation rows of the ranking task.

    Raises:
        StageError: what to set.
    """
    if not has_ranking_rows(log):
        raise StageError(
            "no validation rows are ranked, so nothing selects a checkpoint; wanted "
            "prepare.ranking_valid_rows above 0, and validation rows whose item was liked"
        )


def validation_rows(log: EventLog, name: str, key: str) -> Rows:
    """The row set `name` of the validation split; where `auto` is not all of it, that is said.

    Args:
        log: the event log.
        name: of the row set.
        key: where it is configured, e.g. `stage1.fit.valid_rows`.
    """
    total = len(log.rows("valid", "all"))
    chosen = sized(name, total)
    if chosen not in (name, "all"):
        say(f"{chosen} of {total:,} validation rows select the checkpoint ({key}=all: all of them)")
    return log.rows("valid", chosen)


def selection_rows(log: EventLog, name: str, key: str, cold_share: float | None = None) -> Rows:
    """The row set `name` of the validation split, by whose AUC checkpoints are selected.

    Args:
        log: the event log.
        name: of the row set.
        key: where it is configured, e.g. `stage1.fit.valid_rows`.
        cold_share: share of them with a cold user; None: as it is.

    Raises:
        StageError: all of them have the same label, so that there is no AUC.
    """
    rows = validation_rows(log, name, key)
    if cold_share is not None:
        rows = with_cold_share(log, rows, cold_share)
    label = log.label[rows]
    if label.min() != label.max():
        return rows
    every = log.label[log.rows("valid", "all")]
    mend = f"ARGS={key}=all" if every.min() != every.max() else "another prepare.split or prepare.shares"
    raise StageError(
        f"all {len(rows):,} validation rows ({key}={name}) have label {label[0]}, so there is no AUC to "
        f"select by; wanted both 0 and 1, e.g. by {mend}"
    )


def with_cold_share(log: EventLog, rows: Rows, share: float) -> Rows:
    """Validation rows of which a share has a cold user: one without a training sample.

    Of the kind of row that is too many, those are left out that come last in the stored permutation of the
    split, which the log's seed has drawn; all rows of the other kind stay.

    Args:
        log: the event log.
        rows: of the validation split.
        share: wanted, from 0 to 1.

    Returns:
        They, in the order of `rows`.

    Raises:
        StageError: one kind is wanted, and has no row.
    """
    permutation = log.rows("valid", "1.0")
    drawn = permutation[np.isin(permutation, rows)]
    is_warm = np.isin(log.user[drawn], log.user[log.rows("train", "all")])
    cold = drawn[~is_warm]
    warm = drawn[is_warm]
    if (share > 0 and not len(cold)) or (share < 1 and not len(warm)):
        raise StageError(
            f"stage1.cold_share={share}, but {len(cold):,} of {len(rows):,} validation rows have a cold "
            f"user; wanted {1 if len(cold) else 0}, or null for the rows as they are"
        )
    if share * len(warm) < (1 - share) * len(cold):
        cold = cold[: round(share / (1 - share) * len(warm))]
    elif share > 0:
        warm = warm[: round((1 - share) / share * len(cold))]
    return rows[np.isin(rows, np.concatenate([cold, warm]))]


def aligned_rows(log: EventLog, tuned: Rows, count: int) -> Rows:
    """Liked training rows for stage 3: in the order of the stored permutation those that tuned no start.

    Where the rest of the training split is too small, the `tuned` ones fill up, in the same order.
    """
    permutation = log.rows("train", "1.0")
    used = np.isin(permutation, tuned)
    rest = np.concatenate([permutation[~used], permutation[used]])
    liked = rest[log.label[rest] == 1]
    return with_new_items(log, liked, log.meta["candidates"] - 1, "prepare.candidates")[:count]


def with_new_items(log: EventLog, rows: Rows, wanted: int, key: str) -> Rows:
    """The rows that can have as many negatives as wanted; says how many have users who have met too much.

    As in validation and test, rows of an item that the user had met before are left out, where they are no
    ranking rows (`prepare.repeats`); it is said how many.

    Args:
        log: the event log.
        rows: liked training rows `[R]`.
        wanted: negatives of a row.
        key: where they are configured, e.g. `prepare.candidates`.

    Raises:
        StageError: none is left.
    """
    if log.repeats and not log.ranks_repeats and len(rows):
        rows = _without_repeats(log, rows)
    enough = have_new_items(log, rows, wanted)
    if enough.all():
        return rows
    if not enough.any():
        users = ExternalIds.open(log.folder, "user")
        most, user = most_new_items(log, rows, users.by_dense_id[FIRST_ID:])
        raise StageError(
            f"none of the {len(rows):,} liked training rows has {wanted} items that are new to its user; the "
            f"most, {most}, has user {user!r}; lower {key}"
        )
    say(
        f"{(~enough).sum():,} of {len(rows):,} liked training rows are left out, as fewer than {wanted} "
        f"items are new to their users ({key})"
    )
    return rows[enough]


def _without_repeats(log: EventLog, rows: Rows) -> Rows:
    """The rows whose item is new to their user; says how many are not.

    Raises:
        StageError: none is left.
    """
    met = met_before(log, rows)
    if met.all():
        raise StageError(
            f"prepare.repeats=leave_out, but all {len(rows):,} liked training rows are of items that their "
            "users had met before, wanted others to rank; ARGS=prepare.repeats=keep"
        )
    if met.any():
        say(
            f"{met.sum():,} of {len(rows):,} liked training rows are left out, as their users had met the "
            "item before (prepare.repeats=leave_out)"
        )
    return rows[~met]


def drawn_lists(log: EventLog, rows: Rows, seed: int, kind: str = "mixed") -> NDArray[np.int32]:
    """Candidate lists `[n, C]` of training rows, as long as the stored ones.

    Of one kind, or `mixed`: uniform and popular by turns.
    """
    size = log.meta["candidates"]
    lists = np.empty((len(rows), size), np.int32)
    kinds = KINDS if kind == "mixed" else (kind,)
    for place, name in enumerate(kinds):
        lists[place :: len(kinds)] = candidate_lists(log, rows[place :: len(kinds)], name, size, seed)
    return lists
