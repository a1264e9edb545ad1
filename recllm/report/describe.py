"""A look at the data: counts, splits, histories, popularity, and the prompts that are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.ticker import EngFormatter, LogFormatter
from numpy.typing import NDArray

from recllm.eventlog.ids import FIRST_ID, SPLITS
from recllm.eventlog.log import EventLog, Rows
from recllm.report.html import write_page
from recllm.report.sheet import sheet
from recllm.text.prompts import Prompts

Table = tuple[list[str], list[list[str]]]
"""Heading (empty: none), and lines of cells."""
Ints = NDArray[np.integer]

NO_LIMIT = 1 << 40
"""`Prompts.max_length` for prompts that are counted at their full length."""
BINS = 60
"""Equal stretches of time in a plot."""


@dataclass(frozen=True)
class Part:
    """Samples of one split.

    Attributes:
        rows: int64 `[n]`, rows of the log.
        history: int64 `[n]`, earlier events of each.
        users, items: int64 `[n_users]`, `[n_items]`, samples of each.
    """

    rows: Rows
    history: Ints
    users: Ints
    items: Ints

    @classmethod
    def of(cls, log: EventLog, split: str) -> Part:
        """All samples of a split."""
        rows = log.rows(split, "all")
        start, end = log.history(rows)
        users, items = (
            np.bincount(ids.take(rows), minlength=size)
            for ids, size in ((log.user, log.n_users), (log.item, log.n_items))
        )
        return cls(rows, end - start, users, items)


@dataclass(frozen=True)
class PromptLengths:
    """Prompts of a question, as long as they would be without a limit.

    Attributes:
        question: what is asked.
        split: whose rows they are.
        tokens: int64 `[n]`, tokens of each prompt; where a title answers, with the row's own.
        bare: int64 `[n]`, the same without any history.
        limit: tokens that the LM takes.
    """

    question: str
    split: str
    tokens: Ints
    bare: Ints
    limit: int


@dataclass(frozen=True)
class Example:
    """A prompt as the LM gets it, the answer that it should give, and the prompt's tokens."""

    title: str
    prompt: str
    answer: str
    tokens: int


def write_description(
    log: EventLog,
    metrics: dict[str, Any],
    out: Path,
    dataset: str,
    split: str,
    lengths: Sequence[PromptLengths] = (),
    examples: Sequence[Example] = (),
    missing: Sequence[str] = (),
    raw: Mapping[str, float] | None = None,
    texts: Sequence[list[str]] = (),
) -> list[tuple[str, Table]]:
    """Write the page of a data set: one HTML file that needs nothing else, no network either.

    Args:
        log: the event log.
        metrics: what `build_log` counted, its `notes` among them.
        out: the file to write; replaced atomically.
        dataset: its name.
        split: the configured `prepare.split`.
        lengths: of prompts, counted in tokens.
        examples: prompts to show.
        missing: what the page cannot say yet, and the command that mends it, one line each.
        raw: what the data set's recipe counted when it read the raw files; None: not known.
        texts: lines about the texts of items and users; none: there is nothing to tell.

    Returns:
        The page's tables, each with its title, for the terminal.
    """
    parts = {name: Part.of(log, name) for name in SPLITS}
    tables = [("Raw data", raw_table(raw))] if raw else []
    tables += [
        ("Events", event_table(log, metrics)),
        (f"Samples by split ({split})", split_table(log, parts)),
        ("Items", popularity_table(log)),
        *([("Texts", ([], list(texts)))] if texts else []),
        ("Prompts", prompt_table(lengths)),
    ]
    write_page(
        out,
        "describe.html.j2",
        dataset=dataset,
        missing=missing,
        notes=metrics["notes"],
        tables=tables,
        figure=_figure(log, parts),
        examples=examples,
    )
    return tables


def raw_table(counts: Mapping[str, float]) -> Table:
    """What was read of the raw files and what was left out of it, by reason."""
    return [], [[_counted(name).replace("_", " "), _count(count)] for name, count in counts.items()]


def _counted(name: str) -> str:
    """What a recipe's count is of, in words: `events dropped: no_time` of `dropped_events_no_time`."""
    kind, _, rest = name.partition("_")
    if kind == "dropped":
        table, _, reason = rest.partition("_")
        return f"{table} dropped: {reason}"
    return f"{rest} read" if kind == "read" else name


def _count(count: float) -> str:
    if isinstance(count, bool):
        return "yes" if count else "no"
    return f"{count:,}"


def event_table(log: EventLog, metrics: dict[str, Any]) -> Table:
    """What the log holds, and which rows of the tables are no events or no samples, and why."""
    levels = log.meta["rating_levels"]
    coded = np.bincount(log.rating[: log.n_events], minlength=log.codes + 1)
    rated = coded[1 : len(levels) + 1]
    shares = rated / max(1, rated.sum())
    ratings = [f"{level}: {share:.1%}" for level, share in zip(levels, shares, strict=True)]
    users, items = log.n_users - FIRST_ID, log.n_items - FIRST_ID
    lines = [
        ["events", f"{log.n_events:,}"],
        ["users", f"{users:,}, with {log.n_events / users:,.1f} events on average"],
        ["items", f"{items:,}, with {log.n_events / items:,.1f} events on average"],
        ["density", f"{log.n_events / users / items:.2%} of all pairs of a user and an item"],
        ["ratings", ", ".join(ratings) or "none"],
    ]
    if ratings and log.n_events > rated.sum():
        lines.append(["events without a rating", f"{log.n_events - rated.sum():,}"])
    if log.shows_labels:
        disliked, liked = coded[len(levels) + 1 :]
        lines.append(
            [
                "events without a rating, as histories show them",
                f"{liked:,} liked, {disliked:,} not liked, {coded[0]:,} neither",
            ]
        )
    if log.timed:
        first, end = _span(log)
        days = (end - 1 - first) / 86_400
        lines.append(["time (UTC)", f"{_day(first)} to {_day(end - 1)}, {days:,.0f} days"])
    else:
        lines.append(["time", "none; events of a user stand in the order of the file"])
    reasons = {
        "dropped_no_time": "rows dropped, as they have no time",
        "dropped_duplicates": "rows dropped, as user, time and item are there twice",
        "not_sample_short_history": "events that are no samples: too few earlier ones",
        "not_sample_same_second": "events that are no samples: too few in earlier seconds",
        "not_sample_no_label": "events that are no samples: no label",
        "sampled_negatives": "samples that are no events: drawn items",
    }
    lines += [[text, f"{metrics[name]:,}"] for name, text in reasons.items() if metrics.get(name)]
    return [], lines


def split_table(log: EventLog, parts: dict[str, Part]) -> Table:
    """Rows, labels, histories, times and cold shares of each split.

    A user or item is cold where no training sample has it.
    """
    columns = []
    for part in parts.values():
        low, tenth, median, ninth, high = _quantiles(part.history)
        column = [
            ("samples", f"{len(part.rows):,}"),
            ("liked", f"{log.label.take(part.rows).mean():.1%}"),
            ("users", f"{np.count_nonzero(part.users):,}"),
            ("items", f"{np.count_nonzero(part.items):,}"),
            ("earlier events, median", median),
            ("... of the middle 80 %", f"{tenth} to {ninth}"),
            ("... shortest and longest", f"{low} to {high}"),
        ]
        if log.timed:
            times = log.timestamp.take(part.rows)
            column += [("from", _day(times.min())), ("to", _day(times.max()))]
        for kind in ("users", "items"):
            cold = np.where(getattr(parts["train"], kind) > 0, 0, getattr(part, kind))
            column += [
                (f"cold {kind}", f"{np.count_nonzero(cold):,}"),
                ("... their samples", f"{cold.sum() / len(part.rows):.2%}"),
            ]
        columns.append(column)
    names = [name for name, _ in columns[0]]
    lines = [[name, *(column[line][1] for column in columns)] for line, name in enumerate(names)]
    return ["", *parts], lines


def popularity_table(log: EventLog) -> Table:
    """How training events are spread over the items."""
    counts = _by_popularity(log)
    lines = [
        ["with a training event", f"{len(counts):,}"],
        ["with none (the CRM reads them as unknown)", f"{log.n_items - FIRST_ID - len(counts):,}"],
        ["training events of an item, median", f"{np.median(counts):,.0f}"],
    ]
    for share in (0.01, 0.1):
        top = max(1, round(share * len(counts)))
        lines.append([f"training events of the {top:,} most popular ({share:.0%})",
                      f"{counts[:top].sum() / counts.sum():.1%}"])  # fmt: skip
    lines.append(["with a training event, but fewer than 5", f"{np.count_nonzero(counts < 5):,}"])
    return [], lines


def prompt_table(lengths: Sequence[PromptLengths]) -> Table:
    """Tokens of prompts, and how many do not fit."""
    heading = [
        "question",
        "split",
        "prompts",
        "tokens, median",
        "middle 80 %",
        "longest",
        "limit",
        "too long",
    ]
    lines = []
    for part in lengths:
        _, tenth, median, ninth, high = _quantiles(part.tokens)
        over = part.tokens > part.limit
        never = np.count_nonzero(part.bare > part.limit)
        too_long = f"{np.count_nonzero(over):,} ({over.mean():.1%})"
        if never:
            too_long += f", {never:,} even without history"
        lines.append(
            [part.question, part.split, f"{len(part.tokens):,}", median, f"{tenth} to {ninth}", high,
             f"{part.limit:,}", too_long]
        )  # fmt: skip
    return heading if lines else [], lines


def answer_lengths(prompts: Prompts, split: str, rows: Rows, history: Rows, limit: int) -> PromptLengths:
    """Count the tokens of Yes/No prompts.

    Args:
        prompts: with `NO_LIMIT`.
        split: whose rows these are.
        rows: rows of the log `[n]`.
        history: the events that each prompt shows `[n, k]`.
        limit: tokens that the LM takes.
    """
    whole = prompts.ctr_lengths(rows, history)
    bare = prompts.ctr_lengths(rows, history[:, :0])
    return PromptLengths("yes or no", split, whole, bare, limit)


def title_lengths(
    prompts: Prompts, split: str, rows: Rows, history: Rows, limit: int, listed: NDArray[np.int32] | None
) -> PromptLengths:
    """Count the tokens of next-title prompts with the row's own title; `listed`: items in the prompt."""
    title = prompts.room(prompts.log.item[rows][:, None])
    whole = prompts.ranking_lengths(rows, history, listed, reserve=0) + title
    bare = prompts.ranking_lengths(rows, history[:, :0], listed, reserve=0) + title
    return PromptLengths("next title", split, whole, bare, limit)


def _by_popularity(log: EventLog) -> Ints:
    """Training events of each item that has some, most first."""
    return np.sort(log.item_count[log.item_count > 0])[::-1].astype(np.int64)


def _figure(log: EventLog, parts: dict[str, Part]) -> str:
    panels = {
        "Length of the history": partial(_histories, parts),
        "Popularity of the items": partial(_popularity, log),
    }
    if log.meta["rating_levels"]:
        panels["Ratings"] = partial(_ratings, log, parts)
    if log.timed:
        panels["Samples over time"] = partial(_times, log, parts)
        panels["Liked over time"] = partial(_liked, log, parts)
    return sheet(panels)


def _histories(parts: dict[str, Part], axis: Axes) -> None:
    for name, part in parts.items():
        counts = np.bincount(part.history)
        met = np.flatnonzero(counts)
        axis.step(met, np.cumsum(counts[met]) / len(part.rows), where="post", linewidth=1.2, label=name)
    axis.set_xscale("symlog", linthresh=1)  # a history may be empty
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("at most so many earlier events")
    axis.set_ylabel("share of samples")
    axis.legend(frameon=False)


def _popularity(log: EventLog, axis: Axes) -> None:
    counts = _by_popularity(log)
    ranks = np.unique(np.geomspace(1, len(counts), 300).astype(np.int64))
    axis.loglog(ranks, counts[ranks - 1], linewidth=1.2)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(EngFormatter(sep=""))
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # where a decade is all there is
    axis.set_xlabel("rank of the item")
    axis.set_ylabel("training events")


def _ratings(log: EventLog, parts: dict[str, Part], axis: Axes) -> None:
    levels = log.meta["rating_levels"]
    for place, (name, part) in enumerate(parts.items()):
        counts = np.bincount(log.rating.take(part.rows), minlength=log.codes + 1)[1 : len(levels) + 1]
        shares = counts / max(1, counts.sum())
        axis.bar(np.arange(len(levels)) + (place - 1) * 0.28, shares, 0.28, label=name)
    every = -(-len(levels) // 10)  # at most ten are named
    axis.set_xticks(np.arange(len(levels))[::every], levels[::every])
    axis.set_xlabel("rating")
    axis.set_ylabel("share of samples")
    axis.legend(frameon=False)


def _times(log: EventLog, parts: dict[str, Part], axis: Axes) -> None:
    counts = [_over_time(log, part.rows) for part in parts.values()]
    axis.stackplot(_middles(log), *counts, labels=list(parts), step="mid", linewidth=0)
    axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_ylabel(f"samples in 1/{BINS} of the time")
    axis.legend(frameon=False)
    _date_axis(axis)


def _liked(log: EventLog, parts: dict[str, Part], axis: Axes) -> None:
    rows = np.concatenate([part.rows for part in parts.values()])
    samples, liked = _over_time(log, rows), _over_time(log, rows[log.label.take(rows) == 1])
    axis.plot(_middles(log), np.where(samples > 0, liked / np.maximum(samples, 1), np.nan), linewidth=1.2)
    axis.set_ylabel("liked, share of samples")
    _date_axis(axis)


def _span(log: EventLog) -> tuple[int, int]:
    """First second, and the one after the last."""
    times = log.timestamp[: log.n_events]
    return int(times.min()), int(times.max()) + 1


def _over_time(log: EventLog, rows: Rows) -> Ints:
    """Samples in each of `BINS` equal stretches of the log's time."""
    return np.histogram(log.timestamp.take(rows), BINS, _span(log))[0]


def _middles(log: EventLog) -> NDArray[np.datetime64]:
    edges = np.linspace(*_span(log), BINS + 1)
    return ((edges[:-1] + edges[1:]) / 2).astype("datetime64[s]")


def _date_axis(axis: Axes) -> None:
    locator = AutoDateLocator(minticks=3, maxticks=7)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _quantiles(values: Ints) -> list[str]:
    """Least, 10 %, median, 90 % and most, as values that are there."""
    return [f"{value:,}" for value in np.quantile(values, (0.0, 0.1, 0.5, 0.9, 1.0), method="lower")]


def _day(second: int) -> str:
    return datetime.fromtimestamp(int(second), UTC).date().isoformat()
