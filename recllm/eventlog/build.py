"""From canonical tables to the event log: dense ids, counts, row orders, candidates.

The event log is sorted by (user, timestamp, external item id, rating, label). A sample is a row of it, and
its history is the rows above it of the same user.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.dense import dense_events, with_placeholders
from recllm.eventlog.fields import field_sizes, trained_fields
from recllm.eventlog.given import Given, given_columns
from recllm.eventlog.held_items import SplitEvents, hold_items_out, split_items
from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.log import EventLog
from recllm.eventlog.metrics import count_after_held_out, measure
from recllm.eventlog.notes import notes
from recllm.eventlog.row_orders import write_row_orders
from recllm.eventlog.sampled_negatives import with_sampled_negatives
from recllm.eventlog.spans import HistorySpans
from recllm.eventlog.splits import BY_TIME, split_samples, training_events
from recllm.files import write_array, write_text
from recllm.tables import canonical

Array = npt.NDArray[Any]


def build_log(tables_folder: Path, out_folder: Path, config: PrepareConfig) -> dict[str, Any]:
    """Writes the event log of a dataset.

    Only training events (`recllm.eventlog.splits`) give counts and vocabularies; an id or attribute value
    without one reads 1 (unknown) in the CRM's fields.

    A log in which no event has a timestamp keeps the order of `events.parquet` within a user, and all of its
    events (nothing shows whether an item that is there twice is a copy or was met twice). It has time 0
    everywhere and says `timed: false` in `meta.json`. Where some have one, those without are dropped.

    Args:
        tables_folder: canonical tables, see `recllm.tables.canonical`.
        out_folder: the log's folder, e.g. `artifacts/demo/log`; created where absent. Arrays that are there
            are removed.
        config: see `PrepareConfig`.

    Returns:
        Metrics: `samples`, `train`, `valid`, `test`, `users`, `items`, `events`, `sampled_negatives` (samples
        that are no events); dropped rows, and rows that are no samples, by reason; `positive_rate_*`;
        `cold_user_share_*`, `cold_item_share_*`: samples whose user or item has no training sample,
        `unknown_user_share_*`, `unknown_item_share_*`: those whose id reads 1, as it has no training event;
        `shared_second_share`: rows of the same user and second as the row above, `tied_sample_share`: samples
        among them; `first_second_*`, `last_second_*`: the span of each split, `events_before_1973` and
        `events_of_the_future`: times that no log can have; `notes`: what the choices mean for whoever reads
        the figures, in words.

    Raises:
        ValueError: the tables or the config are wrong, one line each.
    """
    events, items, users = canonical.read(tables_folder)
    total, timed = _times(events, config)
    frame, users, items, dropped = dense_events(events, users, items, total, timed)
    columns, rating_levels, shows_labels = _columns(frame, config)
    del frame
    histories = HistorySpans.of(columns["user"], columns["timestamp"] if timed else None, len(users), config)
    given = Given.taken_from(columns, config)
    split, order, training = _split(columns, histories, timed, config, given)
    held_out: dict[str, Array] = {}
    if config.split == "items":
        whole = SplitEvents(columns, histories, split, order, training)
        held_out["item_split"] = split_items(len(items), config, given)
        events_left, behind = hold_items_out(whole, held_out["item_split"], config)
        held_out |= behind
        columns = events_left.columns
        histories = events_left.histories
        split = events_left.split
        order = events_left.order
        training = events_left.training

    arrays = {
        **columns,
        "split": split,
        "training": training,
        "offsets": histories.offsets,
        **trained_fields(columns["user"], columns["item"], columns["label"], training, users, items, config),
    }
    if config.ties == "strict":
        arrays["history_end"] = histories.end
        if held_out:  # a held-out item's row may stand behind the last event of all
            arrays["history_end"] = np.append(histories.end, len(histories.end))
    arrays |= held_out
    meta = {
        "user_fields": field_sizes(users, "user", config.user_fields),
        "item_fields": field_sizes(items, "item", config.item_fields),
        "rating_levels": rating_levels,
        "shows_labels": shows_labels,
        "draws_met": config.draws_met,
        "ranks_repeats": config.repeats == "keep",
        "repeats": _repeats(columns, FIRST_ID + len(items)),
        "n_users": FIRST_ID + len(users),
        "n_items": FIRST_ID + len(items),
        "n_events": len(columns["user"]),
        **({"n_held": len(held_out["anchor"])} if held_out else {}),
        "timed": timed,
        "candidates": config.candidates,
        "window": config.window,
        "given_candidates": given.splits_with_lists(split),
        "category_field": 1 + config.item_fields.index(config.category),
    }
    log = EventLog(out_folder, arrays, meta)
    if config.sampled_negatives:
        arrays, order = with_sampled_negatives(log, arrays, order, config, users["external"])
        log = EventLog(out_folder, arrays, meta)
    _check_labels(log.label[order["train"]], config)

    _write(out_folder, arrays, users, items)
    ranking = write_row_orders(log, config, order, users["external"], given)
    # Last, as a folder without it is no log.
    write_text(out_folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    metrics = measure(log, order, histories, dropped, config) | ranking
    if config.split == "given":
        metrics["train_after_held_out"] = count_after_held_out(log, order["train"])
    return metrics | {"notes": notes(config, metrics)}


def _times(events: pl.LazyFrame, config: PrepareConfig) -> tuple[int, bool]:
    """How many events there are, and whether they have times; refuses what needs them where none has."""
    total, without = events.select(pl.len(), null=pl.col("timestamp").null_count()).collect().row(0)
    timed = without < total
    if not timed and config.ties == "strict":
        raise ValueError(
            f"prepare.ties=strict, but none of the {total} events has a timestamp; wanted times, or "
            "ARGS='prepare.ties=rows'"
        )
    if not timed and config.split in BY_TIME:
        raise ValueError(
            f"prepare.split={config.split}, but none of the {total} events has a timestamp; wanted times, or "
            "ARGS='prepare.split=last' (in the order of the file), prepare.split=user or prepare.split=random"
        )
    return total, timed


def _columns(frame: pl.DataFrame, config: PrepareConfig) -> tuple[dict[str, Array], list[str], bool]:
    """Arrays `[N]` of what an event itself is, user to timestamp.

    Returns:
        The arrays, the text of each rating level, and whether two codes behind those of the levels show the
        labels of events without a rating.
    """
    rating = frame["rating"].to_numpy()
    label = frame["label"].fill_null(-1).to_numpy()
    if config.label_threshold is not None:
        label = np.where(np.isnan(rating), label, rating > config.label_threshold).astype(np.int8)
    levels = np.unique(rating[~np.isnan(rating)])
    if len(levels) > 100:
        raise ValueError(
            f"{len(levels)} distinct ratings, wanted at most 100; round them in the dataset's recipe.py"
        )
    is_unrated = np.isnan(rating)
    code = np.where(is_unrated, 0, np.searchsorted(levels, rating) + 1).astype(np.int16)
    all_alike = is_unrated.all() and label.min() == label.max()
    shows_labels = config.history_labels == "mark" and bool((label[is_unrated] >= 0).any()) and not all_alike
    if shows_labels:
        for value in (0, 1):
            code[is_unrated & (label == value)] = len(levels) + 1 + value
    columns = {
        "user": frame["user"].to_numpy(),
        "item": frame["item"].to_numpy(),
        "rating": code,
        "label": label,
        "timestamp": frame["timestamp"].to_numpy(),
        **given_columns(frame),
    }
    return columns, [f"{level:g}" for level in levels], shows_labels


def _repeats(columns: dict[str, Array], items: int) -> int:
    """How many events are of an item that their user had met before."""
    pairs = columns["user"].astype(np.int64) * items + columns["item"]
    return len(pairs) - len(np.unique(pairs))


def _split(
    columns: dict[str, Array], histories: HistorySpans, timed: bool, config: PrepareConfig, given: Given
) -> tuple[Array, dict[str, Array], Array]:
    """The split of each event, the rows of each split, and the training events; see `splits`.

    Raises:
        ValueError: a split is empty.
    """
    user = columns["user"]
    times = columns["timestamp"] if timed else None
    labeled = columns["label"] >= 0
    split, order = split_samples(config, user, histories.long_enough & labeled, times, given.split)
    if not all(len(rows) for rows in order.values()):
        parts = ", ".join(f"{len(rows)} {name}" for name, rows in order.items())
        raise ValueError(
            f"{sum(map(len, order.values()))} of {len(user)} events are samples, with a label and "
            f"{config.min_history} earlier events ({parts}), wanted some of each; "
            f"{_split_remedy(config, user, labeled, times, given.split)}"
        )
    return split, order, training_events(config, user, split, order, times, given.split)


def _split_remedy(
    config: PrepareConfig, user: Array, labeled: Array, times: Array | None, given: Array | None
) -> str:
    """The first of some changes that leaves no split empty, in words; each is tried."""
    fewer: dict[str, Any] = {"min_history": 0} if config.min_history else {}
    changes: list[tuple[dict[str, Any], str]] = [(fewer, "lower it: ARGS='prepare.min_history=<fewer>'")]
    if config.split == "last":
        changes.append(({**fewer, "last_n": 1}, "ARGS='{history}prepare.last_n=1'"))
    shares = {"shares": [0.5, 0.25]}
    if config.split == "last":
        changes.append(
            ({**fewer, **shares, "split": "random"}, "ARGS='{history}prepare.split=random {shares}'")
        )
    elif config.split != "given":
        changes.append(({**fewer, **shares}, "ARGS='{history}{shares}'"))
    if config.split == "user":
        changes.append(
            ({**fewer, **shares, "split": "random"}, "ARGS='{history}prepare.split=random {shares}'")
        )
    for change, words in changes:
        if not change:
            continue
        _, order = split_samples(replace(config, **change), user, labeled, times, given)
        if all(len(rows) for rows in order.values()):
            history = "prepare.min_history=0 " if fewer else ""
            return words.format(history=history, shares="prepare.shares=[0.5,0.25]")
    return "give more events with a label: no key helps"


def _check_labels(label: Array, config: PrepareConfig) -> None:
    """Refuse training samples that are all alike: there is nothing to learn, and no AUC."""
    if label.min() != label.max() or (config.labels == "liked" and label[0] == 1):
        return
    threshold = "prepare.label_threshold"
    if config.label_threshold is None:
        threshold = "what counts as liked (source.label, or the dataset's recipe.py)"
    mend = f"change {threshold}, or mend the labels"
    if label[0] == 1 and not config.sampled_negatives:
        mend = f"draw negatives, ARGS='prepare.sampled_negatives=1', or change {threshold}"
    raise ValueError(f"all {len(label)} training samples have label {label[0]}, wanted both 0 and 1; {mend}")


def _write(folder: Path, arrays: dict[str, Array], users: pl.DataFrame, items: pl.DataFrame) -> None:
    """Writes arrays and tables; arrays of an earlier log are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.npy"):
        stale.unlink()
    for name, values in arrays.items():
        write_array(folder / f"{name}.npy", values)
    with_placeholders(users, "user").write_parquet(folder / "users.parquet")
    with_placeholders(items, "item").write_parquet(folder / "items.parquet")
