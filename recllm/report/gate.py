"""What the gate does: alpha by group of users, over training, and users side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from numpy.typing import NDArray

from recllm.errors import StageError
from recllm.evaluation.gates import ENTROPY, Floats, GateRecord, Ints, distances, entropy, explained
from recllm.evaluation.tables import ResultTable
from recllm.eventlog.log import EventLog, Rows
from recllm.paths import GATE, LOGS
from recllm.pipeline.finished import Finished
from recllm.pipeline.stage_file import Role
from recllm.report.curves import read_series
from recllm.report.sheet import sheet
from recllm.text.prompts import fill

EXAMPLES = 3
"""Users whose nearest ones are listed."""
NEAREST = 2
"""Nearest users of each of them."""
DIVERGENT = 5
"""Users that are farthest from the mean."""
TITLES = 5
"""Latest titles of a user."""
VALUES = 30
"""A user field with more values than this (zip codes) groups nobody."""
DRAWN = 12
"""A field with more groups than this is in the table, not in the image."""


@dataclass(frozen=True)
class Group:
    """Users that share a value of a field: which of the record's users, bool `[u]`."""

    field: str
    value: str
    members: NDArray[np.bool_]


@dataclass(frozen=True)
class GateSection:
    """What the page shows of one system's gate.

    Attributes:
        title: the folder.
        summary: sentences.
        image: alpha by group, entropy over training; a `data:` URI.
        groups, nearest, divergent: tables.
    """

    title: str
    summary: list[str]
    image: str
    groups: ResultTable
    nearest: ResultTable
    divergent: ResultTable


def gate_sections(stages: Iterable[Finished], missing: list[str]) -> list[GateSection]:
    """One section for each stage 2 that kept a gate.

    Args:
        stages: finished ones of any kind.
        missing: a line is added of each whose event log is not there any more.
    """
    logs: dict[Path, EventLog] = {}
    sections = []
    for stage in stages:
        if stage.file.stage != "stage2" or not (stage.folder / GATE).exists():
            continue
        try:
            folder = stage.parent(Role.LOG).folder
        except StageError as error:
            missing.append(f"What the gate of {stage.name} does cannot be told: {error}")
            continue
        if folder not in logs:
            logs[folder] = EventLog.open(folder)
        sections.append(_section(stage, logs[folder]))
    return sections


def user_groups(log: EventLog, users: Ints) -> list[Group]:
    """Users by activity, in thirds as elsewhere, and by every field of their profile with few values.

    Args:
        log: the event log.
        users: `[u]` dense ids.

    Returns:
        Groups that hold somebody, fields in the order of the users table.
    """
    counts = np.bincount(log.user[log.train_events()], minlength=log.n_users)[users]
    seen = counts > 0
    low, mid = np.quantile(counts[seen], (1 / 3, 2 / 3), method="lower") if seen.any() else (0, 0)
    thirds = {
        "no training event": ~seen,
        f"1 to {low:,.0f} training events": seen & (counts <= low),
        f"to {mid:,.0f}": (counts > low) & (counts <= mid),
        "more": counts > mid,
    }
    groups = [Group("activity", name, members) for name, members in thirds.items()]
    table = pl.read_parquet(log.folder / "users.parquet")[users.tolist()]
    for name in [field["name"] for field in log.meta["user_fields"][1:]]:
        if name not in table.columns or table[name].dtype.is_nested():
            continue
        values = table[name].cast(pl.String).fill_null("not known").to_numpy()
        distinct = sorted(set(values), key=_natural)
        if len(distinct) <= VALUES:
            groups += [Group(name, str(value), values == value) for value in distinct]
    return [group for group in groups if group.members.any()]


def _natural(value: str) -> tuple[float, str]:
    """Numbers by size, `18-24` by its 18, words behind them by letter."""
    head = value.split("-")[0].rstrip("+")
    return (float(head) if head.isdigit() else math.inf), value


def _section(stage: Finished, log: EventLog) -> GateSection:
    record = GateRecord.read(stage.folder / GATE)
    users, alpha, last = record.by_user(log)
    groups = user_groups(log, users)
    summary = _summary(record, log, len(users))
    for field in dict.fromkeys(group.field for group in groups):
        members = [group.members for group in groups if group.field == field]
        share = explained(np.argmax(members, 0), alpha)
        if not math.isnan(share):
            summary.append(f"Of the variance between users, {field} explains {_percent(share)}.")
    people = _People(stage, log, users, last)
    return GateSection(
        stage.name,
        summary,
        _image(stage.folder, groups, alpha),
        _group_table(groups, alpha),
        _nearest_table(people, alpha),
        _divergent_table(people, alpha),
    )


def _summary(record: GateRecord, log: EventLog, users: int) -> list[str]:
    count = record.alpha.shape[-1]
    between = explained(log.user[record.rows], record.mixed)
    text = [
        f"{count} meta-LoRAs; alpha of {len(record.rows):,} validation rows of {users:,} random users.",
        f"Entropy: {entropy(record.alpha).mean():.3f} of a uniform gate's. The largest weight is "
        f"{record.alpha.max(-1).mean() * count:.2f} / N_m on average, the smallest "
        f"{record.alpha.min(-1).mean() * count:.2f} / N_m.",
    ]
    if not math.isnan(between):
        text.append(
            f"Of alpha's variance between rows, {_percent(between)} is between users, the rest within them."
        )
    return text


def _percent(share: float) -> str:
    return f"{100 * max(share, 0.0):.0f} %"


class _People:
    """Users in words: profile, and the titles of the latest events before their last row."""

    def __init__(self, stage: Finished, log: EventLog, users: Ints, last: Rows) -> None:
        table = pl.read_parquet(log.folder / "users.parquet")
        titles = pl.read_parquet(log.folder / "items.parquet")["title"].fill_null("untitled")
        self.profiles = fill(stage.config.wording.profile, table)
        self.titles = titles.to_list()
        self.log = log
        self.users = users
        self.last = last

    def __getitem__(self, place: int) -> list[str]:
        """Id, profile and latest titles of the user at a place."""
        user = int(self.users[place])
        events = self.log.recent(self.last[place : place + 1], TITLES)[0]
        titles = [self.titles[item] for item in self.log.item[events[events >= 0]]]
        return [f"user {user}", " ".join(self.profiles[user].split()), "; ".join(titles)]


def _group_table(groups: list[Group], alpha: Floats) -> ResultTable:
    mean, single = alpha.mean(0), entropy(alpha)
    cells = []
    for group in groups:
        own = alpha[group.members].mean(0)
        ratio = own / mean
        most, least = int(ratio.argmax()), int(ratio.argmin())
        cells.append([
            f"{group.field}: {group.value}", f"{group.members.sum():,}",
            f"{single[group.members].mean():.3f}", f"{distances(own[None], mean[None])[0, 0]:.4f}",
            f"{most + 1} (x {ratio[most]:.2f})", f"{least + 1} (x {ratio[least]:.2f})",
        ])  # fmt: skip
    heading = ["group", "users", "entropy", "distance from all", "most more than all", "most less"]
    return ResultTable("Alpha by group of users", heading, cells, set())


def _nearest_table(people: _People, alpha: Floats) -> ResultTable:
    cells = []
    apart = distances(alpha[:EXAMPLES], alpha)
    for place in range(len(apart)):
        cells.append(["", *people[place]])
        others = np.argsort(apart[place], kind="stable")
        for other in others[others != place][:NEAREST]:
            cells.append([f"at {apart[place, other]:.4f}", *people[int(other)]])
    return ResultTable(
        "Nearest users by alpha", ["distance", "user", "profile", "latest titles"], cells, set()
    )


def _divergent_table(people: _People, alpha: Floats) -> ResultTable:
    far = distances(alpha, alpha.mean(0, keepdims=True))[:, 0]
    order = np.argsort(-far, kind="stable")[:DIVERGENT]
    cells = [[f"{far[place]:.4f}", *people[int(place)]] for place in order]
    heading = ["distance from the mean", "user", "profile", "latest titles"]
    return ResultTable("Most divergent users", heading, cells, set())


def _image(folder: Path, groups: list[Group], alpha: Floats) -> str:
    panels: dict[str, Callable[[Axes], None]] = {}
    logged = folder / LOGS / "metrics.csv"
    curve = read_series(logged).get(ENTROPY) if logged.exists() else None
    if curve is not None:
        panels["entropy over training"] = partial(_curve, *curve)
    mean = alpha.mean(0)
    for field in dict.fromkeys(group.field for group in groups):
        of_field = [group for group in groups if group.field == field]
        if 1 < len(of_field) <= DRAWN:
            ratio = np.stack([alpha[group.members].mean(0) / mean for group in of_field])
            panels[f"alpha of all = 1, by {field}"] = partial(
                _heat, [group.value for group in of_field], ratio
            )
    panels["users by distance from the mean"] = partial(_spread, distances(alpha, mean[None])[:, 0])
    return sheet(panels)


def _curve(steps: Floats, values: Floats, axis: Axes) -> None:
    axis.plot(steps, values, marker="o", markersize=3)
    axis.set_xlabel("step")
    axis.set_ylabel("of a uniform gate's")


def _heat(names: list[str], ratio: Floats, axis: Axes) -> None:
    reach = max(0.01, float(np.abs(ratio - 1).max()))
    drawn = axis.imshow(ratio, aspect="auto", cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("meta-LoRA")
    axis.set_xticks([])
    axis.figure.colorbar(drawn, ax=axis)


def _spread(far: Floats, axis: Axes) -> None:
    axis.hist(far, bins=30)
    axis.set_xlabel("distance of alpha")
    axis.set_ylabel("users")
