"""Figures of an event log: what it holds, what was dropped, who and what is cold."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from recllm.eventlog import candidates
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.ids import FIRST_ID, SPLITS, TEST, UNUSED, VALID
from recllm.eventlog.log import EventLog
from recllm.eventlog.spans import HistorySpans
from recllm.tables.parse import EARLIEST_CLOCK

Array = npt.NDArray[Any]


def measure(
    log: EventLog,
    order: dict[str, Array],
    histories: HistorySpans,
    dropped: dict[str, int],
    config: PrepareConfig,
) -> dict[str, Any]:
    """What `build_log` returns, but for what the ranking rows and the notes say."""
    events = slice(log.n_events)
    metrics: dict[str, Any] = {"samples": sum(map(len, order.values()))}
    metrics |= {name: len(rows) for name, rows in order.items()}
    metrics |= {"users": log.n_users - FIRST_ID, "items": log.n_items - FIRST_ID, "events": log.n_events}
    metrics |= dropped
    drawn = np.flatnonzero(log.is_drawn(np.arange(len(log.user))))
    metrics["sampled_negatives"] = len(drawn)
    if log.item_split is not None:
        for name, code in (("valid", VALID), ("test", TEST)):
            metrics[f"held_items_{name}"] = int((log.item_split == code).sum())
        metrics["held_events"] = len(log.held_rows)
    if config.sampled_negatives:
        with_negatives = len(drawn) // config.sampled_negatives
        observed = slice(len(log.user) - len(drawn))
        liked = (log.label[observed] == 1) & (log.split[observed] != UNUSED)
        metrics["liked_without_negatives"] = int(liked.sum()) - with_negatives
        met = candidates.met_before(log, np.flatnonzero(liked))
        metrics["liked_met_before_share"] = float(met.mean()) if len(met) else 0.0
        metrics["drawn_met_before_share"] = 0.0
        if log.draws_met and len(drawn):
            metrics["drawn_met_before_share"] = float(candidates.met_before(log, drawn).mean())
    metrics |= _shown_in_histories(log)
    metrics["not_sample_short_history"] = int((~histories.long_enough).sum())
    metrics["not_sample_no_label"] = int((log.label[events] < 0).sum())
    if config.ties == "strict":
        rows_above = np.arange(log.n_events) - histories.offsets[log.user[events]]
        lost = (rows_above >= config.min_history) & ~histories.long_enough
        metrics["not_sample_same_second"] = int(lost.sum())
    if log.timed:
        for name, rows in order.items():
            seconds = log.timestamp[rows]
            metrics |= {f"first_second_{name}": int(seconds.min()), f"last_second_{name}": int(seconds.max())}
        seconds = log.timestamp[events]
        metrics["events_before_1973"] = int((seconds < EARLIEST_CLOCK).sum())
        metrics["events_of_the_future"] = int((seconds > time.time()).sum())
    metrics |= {f"positive_rate_{name}": float(log.label[rows].mean()) for name, rows in order.items()}
    metrics |= _cold_shares(
        "user", log.user, np.bincount(log.user[log.training], minlength=log.n_users), order
    )
    metrics |= _cold_shares("item", log.item, log.item_count, order)
    if log.timed:
        metrics["shared_second_share"] = float(histories.same_second.mean())
        metrics["tied_sample_share"] = float(histories.same_second[log.split[events] != UNUSED].mean())
    return metrics


def _shown_in_histories(log: EventLog) -> dict[str, Any]:
    """Shares of the events whose label their rating does not tell, or that have none, and what shows it."""
    events = slice(log.n_events)
    code = log.rating[events]
    label = log.label[events]
    levels = len(log.meta["rating_levels"])
    is_rated = (code > 0) & (code <= levels)
    liked, disliked = (
        np.bincount(code[is_rated & (label == value)], minlength=levels + 1) for value in (1, 0)
    )
    tells_no_label = (liked > 0) & (disliked > 0)
    return {
        "shows_labels": log.shows_labels,
        "unrated_disliked_share": float((~is_rated & (label == 0)).mean()),
        "unrated_unlabeled_share": float((~is_rated & (label < 0)).mean()),
        "label_beside_rating_share": float(
            (is_rated & (label >= 0) & tells_no_label[code * is_rated]).mean()
        ),
    }


def _cold_shares(name: str, ids: Array, count: Array, order: dict[str, Array]) -> dict[str, float]:
    """Shares of held-out samples whose user or item has no training sample (cold), or event (unknown).

    Args:
        name: `user` or `item`.
        ids: dense id of every row of the log.
        count: training events of each id.
        order: rows of each split.
    """
    has_sample = np.zeros(len(count), dtype=bool)
    has_sample[ids[order["train"]]] = True
    shares = {}
    for split in ("valid", "test"):
        held_out = ids[order[split]]
        shares[f"cold_{name}_share_{split}"] = float((~has_sample[held_out]).mean())
        shares[f"unknown_{name}_share_{split}"] = float((count[held_out] == 0).mean())
    return shares


def count_after_held_out(log: EventLog, rows: Array) -> int:
    """How many of the rows have a held-out sample in their history."""
    held_out = np.concatenate([[0], np.cumsum(log.split[: log.n_events] > SPLITS["train"])])
    start, end = log.history(rows)
    return int((held_out[end] > held_out[start]).sum())
