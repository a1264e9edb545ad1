"""From canonical tables to the event log: dense ids, counts, row orders, candidates.

The event log is sorted by (user, timestamp, external item id, rating, label). A sample is a row of it, and
its history is the rows above it of the same user.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.eventlog import candidates, draws
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.held_items import Parted, split_of_parted
from recllm.eventlog.ids import FIRST_ID, SPLITS, TEST, UNUSED, VALID
from recllm.eventlog.log import EventLog
from recllm.eventlog.names import CandidateKind
from recllm.eventlog.splits import BY_TIME, held_items, split_samples, training_events
from recllm.files import write_array, write_text
from recllm.tables import canonical
from recllm.tables.parse import EARLIEST_CLOCK

Array = npt.NDArray[Any]

MERGED = (
    "dropped_duplicates",
    "dropped_duplicates_labeled",
    "dropped_duplicates_saying_less",
    "differing_at_one_moment",
)
"""Counts of events that share user, item and second with another: those that do not stay, the ones with a
label and the ones without rating and label among them; those that do, as they say something else."""

_CHUNK = 1 << 18  # liked samples whose negatives are drawn at once; bounds memory


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
    frame, users, items, dropped = _dense(events, users, items, total, timed)
    columns, rating_levels, shows_labels = _columns(frame, config)
    del frame
    histories = _histories(columns["user"], columns["timestamp"] if timed else None, len(users), config)
    given = _Given.taken_from(columns, config)
    split, order, training = _split(columns, histories, timed, config, given)
    held_out: dict[str, Array] = {}
    if config.split == "items":
        whole = _Events(columns, histories, split, order, training)
        held_out["item_split"] = _item_split(len(items), config, given)
        events_left, behind = _hold_items_out(whole, held_out["item_split"], config)
        held_out |= behind
        columns = events_left.columns
        histories = events_left.histories
        split = events_left.split
        order = events_left.order
        training = events_left.training

    item_count = np.bincount(columns["item"][training], minlength=FIRST_ID + len(items)).astype(np.int32)
    user_count = np.bincount(columns["user"][training], minlength=FIRST_ID + len(users))
    liked = columns["item"][training & (columns["label"] == 1)]
    arrays = {
        **columns,
        "split": split,
        "training": training,
        "offsets": histories.offsets,
        "user_fields": crm_ids(users, "user", config.user_fields, user_count[FIRST_ID:] > 0),
        "item_fields": crm_ids(items, "item", config.item_fields, item_count[FIRST_ID:] > 0),
        "item_count": item_count,
        "item_likes": np.bincount(liked, minlength=len(item_count)).astype(np.int32),
    }
    if config.ties == "strict":
        arrays["history_end"] = histories.end
        if held_out:  # a held-out item's row may stand behind the last event of all
            arrays["history_end"] = np.append(histories.end, len(histories.end))
    arrays |= held_out
    meta = {
        "user_fields": _sizes(users, "user", config.user_fields),
        "item_fields": _sizes(items, "item", config.item_fields),
        "rating_levels": rating_levels,
        "shows_labels": shows_labels,
        "draws_met": config.draws_met,
        "ranks_repeats": config.repeats == "keep",
        "repeats": _repeats(columns, len(item_count)),
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
        arrays, order = _with_sampled_negatives(log, arrays, order, config, users["external"])
        log = EventLog(out_folder, arrays, meta)
    _check_labels(log.label[order["train"]], config)

    _write(out_folder, arrays, users, items)
    ranking = _row_orders(log, config, order, users["external"], given)
    # Last, as a folder without it is no log.
    write_text(out_folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    metrics = _metrics(log, order, histories, dropped, config) | ranking
    if config.split == "given":
        metrics["train_after_held_out"] = _after_held_out(log, order["train"])
    return metrics | {"notes": notes(config, metrics)}


def notes(config: PrepareConfig, metrics: dict[str, Any]) -> list[str]:
    """What the choices mean for whoever reads the figures: one sentence each, none for the paper's."""
    sentences = []
    if "shared_second_share" not in metrics:
        sentences.append(
            "no event has a timestamp: within a user they stand in the order of the file; time intervals, "
            "a split by time and results by the time since the last event are lost"
        )
    if config.split == "last":
        sentences.append("split=last: training events of one user may be later than test events of another")
    if config.split == "user":
        sentences.append("split=user: every user of the validation and test split is cold")
    if config.split == "items":
        sentences.append(
            f"split=items: {metrics['held_items_valid']:,} items validate and {metrics['held_items_test']:,} "
            f"test; {metrics['held_events']:,} events of theirs are in no history, count or text"
        )
    if config.split == "random":
        sentences.append(
            "split=random: test events stand in histories of training samples, and later events train what "
            "earlier ones test; figures are better than those of a split by time"
        )
    if config.split == "given":
        sentences.append(
            f"split=given: {metrics['train_after_held_out']:,} of {metrics['train']:,} training samples have "
            "held-out events in their histories"
        )
    if config.window:
        sentences.append(f"window={config.window}: a history is the last {config.window} events before")
    if config.labels == "liked" and not config.sampled_negatives and metrics["positive_rate_train"] == 1:
        sentences.append("labels=liked: all samples are liked; nothing learns to answer Yes or No here")
    tied = metrics.get("tied_sample_share", 0.0)
    if config.ties == "strict":
        sentences.append(
            f"ties=strict: the histories of {tied:.1%} of the samples have lost events of their own second, "
            f"{metrics['not_sample_same_second']:,} rows are no samples for it"
        )
    elif tied:
        sentences.append(
            f"ties=rows: {tied:.1%} of the samples have an event of their own second as their last one"
        )
    if config.sampled_negatives:
        which = "met or not" if config.draws_met else "that the user had not met"
        sentences.append(
            f"{metrics['sampled_negatives']:,} samples are drawn items {which} "
            f"({config.sampled_by}); nobody is known to dislike them"
        )
    if seen := metrics.get("liked_without_negatives", 0):
        sentences.append(
            f"{seen:,} liked samples have no drawn items beside them: fewer than {config.sampled_negatives} "
            "are new to their users"
        )
    seen_much = {name: metrics.get(f"not_ranking_{name}_seen_much", 0) for name in ("valid", "test")}
    if any(seen_much.values()):
        counts = ", ".join(f"{count:,} {name}" for name, count in seen_much.items())
        sentences.append(
            f"liked samples that are no ranking rows, as fewer than {config.candidates - 1} items are new to "
            f"their users: {counts}"
        )
    sentences += _notes_on_repeats(config, metrics)
    sentences += _notes_on_histories(config, metrics)
    early = metrics.get("events_before_1973", 0)
    late = metrics.get("events_of_the_future", 0)
    if early or late:
        sentences.append(
            f"{early:,} events are of before 1973 and {late:,} of the future, as in no log; see whether "
            "times are in another unit, or stand for a missing one"
        )
    if merged := metrics["dropped_duplicates"]:
        less = metrics["dropped_duplicates_saying_less"]
        sentences.append(
            f"{merged:,} rows were merged into another of their user, item and second: {merged - less:,} are "
            f"like it ({metrics['dropped_duplicates_labeled']:,} with a label), {less:,} have neither rating "
            "nor label"
        )
    if differing := metrics["differing_at_one_moment"]:
        sentences.append(
            f"{differing:,} rows differ from another of their user, item and second in rating or label only; "
            "all of them are events"
        )
    return sentences


def _notes_on_repeats(config: PrepareConfig, metrics: dict[str, Any]) -> list[str]:
    """What samples of an item that was met before do to lists and to drawn dislikes, where there are any."""
    sentences = []
    left_out = {name: metrics.get(f"not_ranking_{name}_met_before", 0) for name in ("valid", "test")}
    if any(left_out.values()):
        shares = ", ".join(
            f"{count / metrics[f'liked_{name}']:.1%} of {metrics[f'liked_{name}']:,} {name}"
            for name, count in left_out.items()
            if count
        )
        sentences.append(
            "repeats=leave_out: liked samples of items that their users had met before are no ranking rows: "
            f"{shares}"
        )
    for name in ("valid", "test"):
        if kept := metrics.get(f"ranking_{name}_met_before", 0):
            rows = metrics[f"ranking_{name}_rows"]
            others = metrics[f"ranking_{name}_candidates_met_before_share"]
            sentences.append(
                f"repeats=keep: the target of {kept / rows:.1%} of {rows:,} {name} ranking rows was met "
                f"before, and {others:.1%} of the other candidates: see the row 'met-before'"
            )
    if share := metrics.get("liked_met_before_share", 0.0):
        sentences.append(
            f"{share:.1%} of the liked samples are of an item that the user had met before, "
            f"{metrics['drawn_met_before_share']:.1%} of the drawn ones: see the row 'met-before'"
        )
    return sentences


def _notes_on_histories(config: PrepareConfig, metrics: dict[str, Any]) -> list[str]:
    """What of the events in histories is disliked or says nothing, and whether anything shows it."""
    sentences = []
    if disliked := metrics.get("unrated_disliked_share", 0.0):
        shown = "nothing shows it (history_labels=hide)"
        if metrics["shows_labels"]:
            shown = "histories mark which are liked and which are not (history_labels=mark)"
        sentences.append(
            f"{disliked:.1%} of the events that stand in histories are disliked and have no rating; {shown}"
        )
    if unlabeled := metrics.get("unrated_unlabeled_share", 0.0):
        sentences.append(
            f"{unlabeled:.1%} of the events that stand in histories have neither rating nor label: "
            "their items stand there alone"
        )
    if hidden := metrics.get("label_beside_rating_share", 0.0):
        sentences.append(
            f"{hidden:.1%} of the events have a rating that others have too whose label is the other one: "
            "histories show the rating alone"
        )
    return sentences


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
        **_given_columns(frame),
    }
    return columns, [f"{level:g}" for level in levels], shows_labels


def _repeats(columns: dict[str, Array], items: int) -> int:
    """How many events are of an item that their user had met before."""
    pairs = columns["user"].astype(np.int64) * items + columns["item"]
    return len(pairs) - len(np.unique(pairs))


def _given_columns(frame: pl.DataFrame) -> dict[str, Array]:
    """What the data set says itself, as far as it does; see `_Given`."""
    columns: dict[str, Array] = {}
    if "split" in frame.columns:
        columns["given_split"] = frame["split"].fill_null(UNUSED).to_numpy()
    if "candidates" in frame.columns:
        has_list = frame["candidates"].is_not_null()
        columns["given_rows"] = np.flatnonzero(has_list.to_numpy())
        lists = frame["candidates"].filter(has_list).to_list()
        columns["given_lists"] = np.array(lists, np.int32).reshape(len(lists), -1)
    return columns


@dataclass(frozen=True)
class _Given:
    """Splits and candidate lists that the data set says itself.

    Attributes:
        split: code of each event's split, -1 for none, int8 `[N]`; None: the data set says none.
        rows: the rows that have a list, ascending, int64 `[R]`.
        lists: their candidates, int32 `[R, C]`.
    """

    split: Array | None
    rows: Array
    lists: Array

    @classmethod
    def taken_from(cls, columns: dict[str, Array], config: PrepareConfig) -> "_Given":
        """Takes them out of the columns of a log.

        Raises:
            ValueError: `prepare.split` wants what the data set does not say, or lists are of another length
                than those that are drawn.
        """
        split = columns.pop("given_split", None)
        if split is None and config.split == "given":
            raise ValueError(
                "prepare.split=given, but events.parquet has no column split; wanted source.events.split, or "
                "source.valid.path and source.test.path, in conf/dataset/"
            )
        rows = columns.pop("given_rows", np.zeros(0, np.int64))
        lists = columns.pop("given_lists", np.zeros((0, config.candidates), np.int32))
        if len(rows) and lists.shape[1] != config.candidates:
            raise ValueError(
                f"the data set's lists have {lists.shape[1]} candidates, wanted prepare.candidates="
                f"{config.candidates}; ARGS='prepare.candidates={lists.shape[1]}'"
            )
        return cls(split, rows, lists)

    def of(self, rows: Array) -> tuple[Array, Array]:
        """Those of the rows that have a list, in their order, and the lists."""
        place = np.searchsorted(self.rows, rows)
        has_list = np.isin(rows, self.rows)
        return rows[has_list], self.lists[place[has_list]]

    def splits_with_lists(self, split: Array) -> list[str]:
        """Names of the held-out splits some of whose samples have a list."""
        present = split[self.rows]
        return [name for name in ("valid", "test") if (present == SPLITS[name]).any()]


def _after_held_out(log: EventLog, rows: Array) -> int:
    """How many of the rows have a held-out sample in their history."""
    held_out = np.concatenate([[0], np.cumsum(log.split[: log.n_events] > SPLITS["train"])])
    start, end = log.history(rows)
    return int((held_out[end] > held_out[start]).sum())


@dataclass(frozen=True)
class _Histories:
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


def _histories(user: Array, timestamp: Array | None, users: int, config: PrepareConfig) -> _Histories:
    """Histories of events `[N]` by ascending dense user, of whom there are `users`; without times, None."""
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=FIRST_ID + users))])
    same_second = np.zeros(len(user), dtype=bool)
    if timestamp is not None:
        same_second[1:] = (user[1:] == user[:-1]) & (timestamp[1:] == timestamp[:-1])
    end = np.arange(len(user))
    if config.ties == "strict":
        end = np.maximum.accumulate(np.where(same_second, 0, end))
    return _Histories(offsets, end, same_second, end - offsets[user] >= config.min_history)


def _split(
    columns: dict[str, Array], histories: _Histories, timed: bool, config: PrepareConfig, given: _Given
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


def _item_split(items: int, config: PrepareConfig, given: _Given) -> Array:
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


@dataclass(frozen=True)
class _Events:
    """The events of a log, and what is asked of them.

    Attributes:
        columns: arrays `[N]` of what an event itself is, user to timestamp.
        histories: of the events.
        split: code of each event, int8 `[N]`.
        order: rows of each split.
        training: the training events, bool `[N]`.
    """

    columns: dict[str, Array]
    histories: _Histories
    split: Array
    order: dict[str, Array]
    training: Array


def _hold_items_out(
    whole: _Events, item_split: Array, config: PrepareConfig
) -> tuple[_Events, dict[str, Array]]:
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
    histories = _histories(known["user"], known["timestamp"], users, config)
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
    events = _Events(known, histories, split[: len(parted.known)], order, training)
    return events, behind


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


def _with_sampled_negatives(
    log: EventLog,
    arrays: dict[str, Array],
    order: dict[str, Array],
    config: PrepareConfig,
    external: pl.Series,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The arrays with sampled negatives behind the events, and the orders with them behind their positives.

    A negative is a function of (seed, row of its positive, which one of it), and lies in no user's range of
    rows, so that it is in no history. `anchor` says at which event each one stands. A positive whose user has
    met so much that too few items are left has none.

    Raises:
        ValueError: all of them are such.
    """
    count = config.sampled_negatives
    every_liked = np.flatnonzero((log.split != UNUSED) & (log.label == 1))
    liked = every_liked[candidates.have_new_items(log, every_liked, count)]
    if len(every_liked) and not len(liked):
        most, user = _most_new_items(log, every_liked, external)
        mend = f"ARGS='prepare.sampled_negatives={most}' or fewer" if most else "give samples with label 0"
        raise ValueError(
            f"prepare.sampled_negatives={count}, but none of the {len(every_liked):,} liked samples has as "
            f"many items of the training catalog that are new to its user; the most, {most}, has user "
            f"{user!r}; {mend}"
        )
    has_negatives = np.zeros(len(log.user), dtype=bool)
    has_negatives[liked] = True
    seed = draws.derive(config.seed, "sampled")
    seen = candidates.Seen(log)
    items = np.empty((len(liked), count), np.int32)
    for first in range(0, len(liked), _CHUNK):
        part = slice(first, first + _CHUNK)
        items[part] = candidates.negatives(log, liked[part], config.sampled_by, count, seed, seen=seen)
    anchor = np.repeat(liked, count)
    columns = {
        "user": log.user[anchor],
        "item": items.ravel(),
        "rating": np.zeros(len(anchor), log.rating.dtype),
        "label": np.zeros(len(anchor), log.label.dtype),
        "timestamp": log.timestamp[anchor],
        "split": log.split[anchor],
        "training": np.zeros(len(anchor), bool),
    }
    longer = {name: np.concatenate([arrays[name], values]) for name, values in columns.items()}

    def with_negatives(rows: Array) -> Array:
        """The rows, and behind each liked one those of its negatives."""
        times = np.where(has_negatives[rows], 1 + count, 1)
        place = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        repeated = np.repeat(rows, times)
        first_negative = len(log.user) + np.searchsorted(liked, repeated) * count
        return np.where(place, first_negative + place - 1, repeated)

    longer_order = {name: with_negatives(rows) for name, rows in order.items()}
    anchors = np.concatenate([arrays.get("anchor", np.zeros(0, np.int64)), log.anchors(anchor)])
    return {**arrays, **longer, "anchor": anchors}, longer_order


def _dense(
    events: pl.LazyFrame, users: pl.DataFrame, items: pl.DataFrame, total: int, timed: bool
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """Events with dense ids in the log's order; users and items that have events, in order of their ids."""
    place = ["timestamp", "item", "rating", "label"]
    if timed:
        events = events.filter(pl.col("timestamp").is_not_null())
    else:
        events = events.with_columns(timestamp=pl.lit(0, pl.Int64)).with_row_index("place")
        place = ["place"]
    users = _with_events(users, "user", events)
    items = _with_events(items, "item", events)
    given = [column for column in canonical.GIVEN if column in events.collect_schema()]
    frame = (
        events.join(users.lazy().select("external", dense_user="user"), left_on="user", right_on="external")
        .join(items.lazy().select("external", dense_item="item"), left_on="item", right_on="external")
        .select(
            *([] if timed else ["place"]),
            user="dense_user",
            item="dense_item",
            rating=pl.col("rating").fill_null(float("nan")),
            label="label",
            timestamp="timestamp",
            **{column: pl.col(column) for column in given},
        )
        .collect(engine="streaming")
    )
    dropped = {"dropped_no_time": total - frame.height}
    # Dense ids ascend with external ids. Rating and label as last keys make the order, and all that follows
    # from it, independent of the order of the files, and of the one that the join hands rows on in.
    frame = frame.sort("user", *place, *(["split"] if timed and "split" in given else []))
    dropped |= dict.fromkeys(MERGED, 0)
    if timed:
        frame, merged = _merge(frame)
        dropped |= merged
    if "candidates" in given:
        frame = frame.with_columns(_dense_lists(frame["candidates"], items))
    return frame, users, items, dropped


def _dense_lists(lists: pl.Series, items: pl.DataFrame) -> pl.Series:
    """Lists of external item ids as lists of dense ones."""
    places = pl.DataFrame({"place": range(len(lists)), "external": lists}).drop_nulls()
    long = places.explode("external").join(
        items.select("external", "item"), on="external", how="left", maintain_order="left"
    )
    dense = long.group_by("place", maintain_order=True).agg("item")
    every = pl.DataFrame({"place": range(len(lists))})
    joined = every.join(dense, on="place", how="left", maintain_order="left")
    return joined["item"].alias(lists.name)


def _merge(frame: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """Merges events of one user, item and second that say the same, and those that say nothing into others.

    Rows that are alike in rating and label are one event. A row that has neither, such as a view, is no event
    of its own where another row of its user, item and second has one, such as a purchase. All others stay.

    Args:
        frame: events, sorted by user, timestamp, item, rating (NaN: none) and label.

    Returns:
        The events that stay, in the same order, and the counts `MERGED`.
    """
    same_moment = np.zeros(frame.height, dtype=bool)
    same_moment[1:] = True
    for column in ("user", "timestamp", "item"):
        values = frame[column].to_numpy()
        same_moment[1:] &= values[1:] == values[:-1]
    if not same_moment.any():
        return frame, dict.fromkeys(MERGED, 0)
    rating = frame["rating"].to_numpy()
    label = frame["label"].fill_null(-1).to_numpy()
    is_unrated = np.isnan(rating)
    alike = same_moment.copy()
    alike[1:] &= (rating[1:] == rating[:-1]) | (is_unrated[1:] & is_unrated[:-1])
    alike[1:] &= label[1:] == label[:-1]
    if "split" in frame.columns:
        split = frame["split"].fill_null(UNUSED).to_numpy()
        alike[1:] &= split[1:] == split[:-1]
    says_nothing = is_unrated & (label < 0)
    moment = np.cumsum(~same_moment) - 1
    says_something = np.bincount(moment, ~says_nothing) > 0
    gives_way = says_nothing & says_something[moment]
    stays = ~alike & ~gives_way
    counts = {
        "dropped_duplicates": np.count_nonzero(~stays),
        "dropped_duplicates_labeled": np.count_nonzero(alike & (label >= 0)),
        "dropped_duplicates_saying_less": np.count_nonzero(gives_way),
        "differing_at_one_moment": np.count_nonzero(stays) - len(np.unique(moment[stays])),
    }
    return frame.filter(pl.Series(stays)), {name: int(counts[name]) for name in MERGED}


def _with_events(table: pl.DataFrame, name: str, events: pl.LazyFrame) -> pl.DataFrame:
    """The users or items that have events, by ascending external id, with their dense ids in column `name`.

    Items that stand in given lists of candidates are there too.

    Raises:
        ValueError: an event's user or item is not in the table.
    """
    ids = events.select(pl.col(name).unique()).collect(engine="streaming")
    if name == "item" and "candidates" in events.collect_schema():
        listed = events.select(pl.col("candidates").drop_nulls().explode().unique().alias(name)).collect()
        ids = pl.concat([ids, listed]).unique()
    missing = ids.join(table, on=name, how="anti")
    if missing.height:
        raise ValueError(
            f"{missing.height} {name}s of events.parquet (first: {missing[name][0]}) are not in "
            f"{name}s.parquet, wanted all; mend the dataset's recipe.py"
        )
    present = table.join(ids, on=name, how="semi").sort(name).rename({name: "external"})
    return present.with_row_index(name, FIRST_ID).cast({name: pl.Int32})


def crm_ids(table: pl.DataFrame, name: str, columns: Sequence[str], trained: Array) -> Array:
    """CRM ids `[2 + rows, 1 + columns]` int32: the id, then each attribute's value; 1 where never trained."""
    fields = np.zeros((FIRST_ID + table.height, 1 + len(columns)), dtype=np.int32)
    fields[1] = 1
    fields[FIRST_ID:, 0] = np.where(trained, table[name].to_numpy(), 1)
    for place, column in enumerate(columns, start=1):
        ids = _value_ids(table, name, column)
        is_trained = np.zeros(ids.max() + 1, dtype=bool)
        is_trained[ids[trained]] = True
        fields[FIRST_ID:, place] = np.where(is_trained[ids], ids, 1)
    return fields


def _value_ids(table: pl.DataFrame, name: str, column: str) -> Array:
    """Ids from 2 on for the distinct values in ascending order, 1 for null."""
    if column not in table.columns:
        raise ValueError(
            f"prepare.{name}_fields names {column!r}, wanted columns of {name}s.parquet: {table.columns[2:]}"
        )
    return table[column].rank("dense").cast(pl.Int64).fill_null(0).to_numpy() + 1


def _sizes(table: pl.DataFrame, name: str, columns: Sequence[str]) -> list[dict[str, str | int]]:
    sizes: list[dict[str, str | int]] = [{"name": name, "size": FIRST_ID + table.height}]
    return sizes + [
        {"name": column, "size": FIRST_ID + table[column].drop_nulls().n_unique()} for column in columns
    ]


def _placeholders(table: pl.DataFrame, name: str) -> pl.DataFrame:
    """The table with null rows for padding and unknown in front, so that row i describes dense id i."""
    empty = pl.DataFrame({name: pl.Series([0, 1], dtype=pl.Int32)})
    return pl.concat([empty, table], how="diagonal")


def _row_orders(
    log: EventLog, config: PrepareConfig, order: dict[str, Array], external: pl.Series, given: _Given
) -> dict[str, float]:
    """Writes orders, permutations, ranking rows and candidate lists; counts ranking targets that are cold.

    Where the data set has lists of its own for a split, those samples are its ranking rows.

    Raises:
        ValueError: no row can be ranked, as the users have met nearly everything.
    """
    metrics: dict[str, float] = {}
    most = {"valid": config.ranking_valid_rows, "test": config.ranking_test_rows}
    liked = {}
    for name, rows in order.items():
        _save(log.folder, f"order_{name}", rows)
        permuted = draws.permutation(draws.derive(config.seed, "permutation", name), rows)
        _save(log.folder, f"permutation_{name}", permuted)
        if name in log.meta["given_candidates"]:
            liked[name] = given.of(permuted[log.label[permuted] == 1])[0]
        elif name != "train":
            liked[name], counts = _without_repeats(log, config, permuted[log.label[permuted] == 1], name)
            metrics |= counts
    rankable = {
        name: rows[candidates.have_new_items(log, rows, config.candidates - 1)]
        for name, rows in liked.items()
    }
    seen_all = [name for name, rows in liked.items() if most[name] and len(rows) > len(rankable[name]) == 0]
    if seen_all:
        raise ValueError(_nothing_to_rank(log, config, {name: liked[name] for name in seen_all}, external))
    for name, rows in rankable.items():
        ranking = rows[: most[name]]
        _save(log.folder, f"ranking_{name}", ranking)
        metrics[f"ranking_{name}_rows"] = len(ranking)
        metrics[f"ranking_{name}_cold_targets"] = int((log.item_count[log.item[ranking]] == 0).sum())
        if name in log.meta["given_candidates"]:
            given_kind = CandidateKind("given", config.candidates)
            _save(log.folder, f"candidates_{name}_{given_kind}", given.of(ranking)[1])
        if most[name]:
            metrics[f"not_ranking_{name}_seen_much"] = len(liked[name]) - len(rows)
            met = int(candidates.met_before(log, ranking).sum()) if config.repeats == "keep" else 0
            metrics[f"ranking_{name}_met_before"] = met
            metrics[f"ranking_{name}_candidates_met_before_share"] = 0.0
        for kind in candidates.KINDS:
            lists = candidates.candidate_lists(log, ranking, kind, config.candidates, config.seed)
            _save(log.folder, f"candidates_{name}_{CandidateKind(kind, config.candidates)}", lists)
            if kind == "uniform" and log.draws_met and len(ranking):
                others = candidates.met_before(log, ranking, lists) & (lists != log.item[ranking, None])
                share = others.sum() / (len(ranking) * (config.candidates - 1))
                metrics[f"ranking_{name}_candidates_met_before_share"] = float(share)
    return metrics


def _without_repeats(
    log: EventLog, config: PrepareConfig, liked: Array, name: str
) -> tuple[Array, dict[str, int]]:
    """The liked samples of a split that may be ranked, without those of an item met before; counts of these.

    Raises:
        ValueError: all of them are such.
    """
    is_ranked = bool({"valid": config.ranking_valid_rows, "test": config.ranking_test_rows}[name])
    if config.repeats == "keep" or not is_ranked or not len(liked):
        return liked, {}
    new = liked[~candidates.met_before(log, liked)]
    if not len(new):
        # Then other candidates may be items that were met, too.
        keeping_helps = (log.item_count > 0).sum() - (
            log.item_count[log.item[liked]] > 0
        ) >= config.candidates - 1
        mend = "repeats=keep" if keeping_helps.any() else "ranking_valid_rows=0 prepare.ranking_test_rows=0"
        raise ValueError(
            f"prepare.repeats=leave_out, but all {len(liked):,} liked {name} samples are of items that their "
            f"users had met before, wanted others to rank; ARGS='prepare.{mend}'"
        )
    return new, {f"liked_{name}": len(liked), f"not_ranking_{name}_met_before": len(liked) - len(new)}


def _nothing_to_rank(
    log: EventLog, config: PrepareConfig, liked: dict[str, Array], external: pl.Series
) -> str:
    """What is wrong where no liked sample of these splits can be ranked, and what mends it in all of them."""
    found = {name: _most_new_items(log, rows, external) for name, rows in liked.items()}
    name = min(found, key=lambda name: found[name][0])
    most, user = found[name]
    mend = f"prepare.candidates={most + 1}"
    if not most:
        mend = " ".join(f"prepare.ranking_{name}_rows=0" for name in found)
    return (
        f"prepare.candidates={config.candidates}, but none of the {len(liked[name]):,} liked {name} samples "
        f"has {config.candidates - 1} items of the training catalog that are new to its user; the most, "
        f"{most}, has user {user!r}; ARGS='{mend}'"
    )


def _most_new_items(log: EventLog, rows: Array, external: pl.Series) -> tuple[int, object]:
    """The most items that are new to the user of one of the rows, and that user's own id."""
    new_items = candidates.count_new_items(log, rows)
    best = int(new_items.argmax())
    return int(new_items[best]), external[int(log.user[rows[best]]) - FIRST_ID]


def _write(folder: Path, arrays: dict[str, Array], users: pl.DataFrame, items: pl.DataFrame) -> None:
    """Writes arrays and tables; arrays of an earlier log are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.npy"):
        stale.unlink()
    for name, values in arrays.items():
        _save(folder, name, values)
    _placeholders(users, "user").write_parquet(folder / "users.parquet")
    _placeholders(items, "item").write_parquet(folder / "items.parquet")


def _metrics(
    log: EventLog,
    order: dict[str, Array],
    histories: _Histories,
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
    code, label = log.rating[events], log.label[events]
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


def _save(folder: Path, name: str, values: Array) -> None:
    write_array(folder / f"{name}.npy", np.ascontiguousarray(values))
