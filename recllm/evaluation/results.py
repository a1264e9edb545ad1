"""Rows of `results.json` (one run) and `table.json` (what several runs add up to)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from recllm.files import write_text

Metrics = dict[str, float | None]

HEADLINE = {"ctr": "auc", "ranking": "hr@1", "next": "ndcg@10"}
"""Task -> the metric that `delta`, `interval95` and `p_value` are about."""

CANDIDATES = ("uniform", "popular", "hard")

# fmt: off
SYSTEMS = (
    "popularity", "popularity-by-category", "popularity-7-days", "text-knn", "met-before", "cooccurrence",
    "cooccurrence-directed", "transitions", "item-knn", "ease", "als", "sasrec-rectools", "retriever",
    "retriever-lm", "deepfm", "autoint", "dcnv2", "gru4rec", "caser", "sasrec", "din", "din-lm", "sim",
    "sim-lm", "sim-heldout", "crm-ranker", "crm-ranker-heldout", "lm", "ctr-bert", "ctr-bert-minilm",
    "tallrec", "rella", "lora", "lora-wide", "dora", "rslora", "vera", "adalora", "pissa", "milora",
    "random-svd", "reclora-uniform", "reclora-shuffled", "reclora-factor", "reclora-core",
    "reclora-in-sample", "reclora", "reclora-milora", "reclora-pissa", "reclora-random-svd",
    "sft", "sft-continued", "dpo", "dpo-pairwise",
    "dmpo", "mppo", "s-dpo", "s-dpo-paper", "sft-pointwise", "s-dpo-pointwise", "refit", "blend",
    "blend-refit",
)
# fmt: on
"""The order of systems in a table; unknown ones follow in alphabetical order."""


@dataclass(frozen=True)
class ResultRow:
    """One system on one row set; one line of the table.

    Attributes:
        system: name of the system.
        stage: the stage that trained it (`stage1` ...), or `none` for what is only counted.
        task: `ctr`, `ranking`, or `next` (over the whole catalog).
        row_set: named rows, e.g. `test/all`; of `next` also which of them count, `test/all/liked`.
        rows: number of rows.
        metrics: mean over seeds by name; None where it is undefined (AUC of one class).
        candidates: `uniform20`, `popular20` or `hard20` (ranking); of `next` `unseen` where items of a row's
            history are not recommended, else `catalog`.
        k: number of rejected candidates in training (preference systems only).
        lm: the language model, where there is one.
        variant: the gate's CRM, stage 3's start, the retrieval's vectors and the experiment where they are
            not the default, e.g. `din+quick`; rows of different variants are never averaged, nor shown in one
            table.
        seeds: `{"seed", "metrics", "delta", "interval95", "p_value", "against", "crm_auc_same_rows",
            "reliability"}` of each seed, ascending; the last one where it was measured.
        delta: difference to `paired_with` in the task's headline metric (`HEADLINE`) on the same rows.
        interval95: 95 % interval of `delta`, bootstrap clustered by user. Over several seeds: the mean of
            their bounds. It covers the choice of users, not the choice of seeds.
        p_value: two-sided; over several seeds the largest.
        paired_with: the system that it is compared with.
        against: `{"delta", "interval95", "p_value"}` of the differences to further systems, by name.
        crm_auc_same_rows: AUC on the same rows of the CRM beside which a language model stands.
        reliability: `[rows, mean probability, share of likes]` of each bin of the ECE (`ctr` only); over
            several seeds the bins of all of them together. Empty where they were not kept.
        split: how the log was split, `prepare.split` (`next` only).
        commit: the code's commit.
        date: when it was computed, UTC.
        hardware: processor and GPU.
        command: what was typed.
    """

    system: str
    stage: str
    task: str
    row_set: str
    rows: int
    metrics: Metrics
    candidates: str | None = None
    k: int | None = None
    lm: str | None = None
    variant: str | None = None
    seeds: list[dict[str, Any]] = field(default_factory=list)
    delta: float | None = None
    interval95: list[float] | None = None
    p_value: float | None = None
    paired_with: str | None = None
    against: dict[str, dict[str, Any]] = field(default_factory=dict)
    crm_auc_same_rows: float | None = None
    reliability: list[list[float]] = field(default_factory=list)
    split: str | None = None
    commit: str = "unknown"
    date: str = ""
    hardware: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        """Refuse a task that no table shows."""
        if self.task not in HEADLINE:
            raise ValueError(
                f"task {self.task!r} of {self.system} is unknown; wanted {' or '.join(HEADLINE)}"
            )

    @property
    def key(self) -> tuple[str, str, str, str, str, int, str]:
        """What makes two rows the same line of the table, whatever their seeds."""
        return *self.table, self.system, self.k or 0, self.lm or ""

    @property
    def table(self) -> tuple[str, str, str, str]:
        """What rows of one table have in common."""
        return self.task, self.variant or "", self.row_set, self.candidates or ""

    @property
    def row_label(self) -> str:
        """The row set and the variant, as tables show them."""
        return self.row_set + (f", {self.variant}" if self.variant else "")

    @property
    def headline(self) -> tuple[str, float | None]:
        """The row's name in its evaluation's manifest, and its headline metric."""
        where = "/".join(part for part in (self.task, self.row_set, self.candidates, self.system) if part)
        return where, self.metrics[HEADLINE[self.task]]

    @property
    def label(self) -> str:
        """The system with its K, its LM and how many seeds (if several), as tables show it."""
        k = f" K={self.k}" if self.k is not None else ""
        lm = f" ({Path(self.lm).name})" if self.lm else ""
        return f"{self.system}{k}{lm}" + (f", {len(self.seeds)} seeds" if len(self.seeds) > 1 else "")


def of_seed(row: ResultRow, seed: int) -> ResultRow:
    """The row of a single run: `seeds` holds its own figures.

    Args:
        row: a row as computed, `seeds` empty.
        seed: the run's seed.

    Returns:
        The row to write to `results.json`.
    """
    own = {"seed": seed, "metrics": dict(row.metrics)}
    for name in ("delta", "interval95", "p_value", "against", "crm_auc_same_rows"):
        own[name] = getattr(row, name)
    if row.reliability:
        own["reliability"] = row.reliability
    return replace(row, seeds=[own])


def merge(old: Iterable[ResultRow], new: Iterable[ResultRow]) -> list[ResultRow]:
    """Add rows to a table; runs of different days and seeds add up.

    Rows are the same line if (task, variant, row_set, candidates, system, k, lm) are equal; within a line a
    seed that comes again replaces its former figures, another one is added, and metrics become means over
    seeds. Everything else (commit, date, command ...) is that of the newer row. Where the number of rows or
    the paired system has changed, figures cannot be averaged: the newer row replaces the line. Merging the
    same rows twice changes nothing.

    Args:
        old: rows of the table so far.
        new: rows to add.

    Returns:
        Rows in table order.
    """
    lines: dict[tuple[Any, ...], ResultRow] = {}
    for row in (*old, *new):
        before = lines.get(row.key)
        same = before is not None and (before.rows, before.paired_with) == (row.rows, row.paired_with)
        seeds = {entry["seed"]: entry for entry in before.seeds} if before is not None and same else {}
        seeds |= {entry["seed"]: entry for entry in row.seeds}
        lines[row.key] = _averaged(replace(row, seeds=[seeds[seed] for seed in sorted(seeds)]))
    return sorted(lines.values(), key=_order)


def read(path: Path) -> list[ResultRow]:
    """Rows of a file; none if it does not exist.

    Raises:
        ValueError: if the file holds anything but rows.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    names = {f.name for f in fields(ResultRow)}
    if not isinstance(content, list):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, want a list of rows; move it away and run again"
        )
    for row in content:
        if extra := set(row) - names:
            raise ValueError(f"{path} has the key {sorted(extra)[0]!r}, want only {', '.join(sorted(names))}")
    return [ResultRow(**row) for row in content]


def write(path: Path, rows: Iterable[ResultRow], decimals: int | None = None) -> None:
    """Write rows atomically as a JSON list, a row a line; NaN becomes null.

    Args:
        path: the file.
        rows: what it holds afterwards.
        decimals: digits behind the point that are kept; None: all.
    """
    lines = (json.dumps(_written(_as_kept(row), decimals), ensure_ascii=False) for row in rows)
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def _as_kept(row: ResultRow) -> dict[str, Any]:
    """A row without reliability where none was measured: of ranks, and of rows from before it was."""
    kept = asdict(row)
    if not row.reliability:
        del kept["reliability"]
    return kept


def in_order(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Rows as tables show them: by task, row set, candidates and system."""
    return sorted(rows, key=_order)


def by_table(rows: Iterable[ResultRow]) -> list[list[ResultRow]]:
    """Rows in order, those of one table together."""
    return [list(group) for _, group in groupby(in_order(rows), key=lambda row: row.table)]


def by_system(name: str) -> tuple[Any, ...]:
    """What systems are sorted by: `SYSTEMS`, then the alphabet; points of a sweep by their numbers."""
    system, _, point = name.partition("+")
    place = SYSTEMS.index(system) if system in SYSTEMS else len(SYSTEMS)
    return place, system, [float(number) for number in re.findall(r"\d+(?:\.\d+)?", point)], point


def _averaged(row: ResultRow) -> ResultRow:
    """The row with its top-level figures recomputed from its seeds; as it is without any."""
    if not row.seeds:
        return row
    names = dict.fromkeys(name for entry in row.seeds for name in entry["metrics"])
    metrics = {name: _mean([entry["metrics"].get(name) for entry in row.seeds]) for name in names}
    further = [entry.get("against", {}) for entry in row.seeds]
    everywhere = [name for name in further[0] if all(name in entry for entry in further)]
    against = {name: _difference([entry[name] for entry in further]) for name in everywhere}
    beside = _mean([entry.get("crm_auc_same_rows") for entry in row.seeds])
    pooled = _pooled([entry.get("reliability", []) for entry in row.seeds])
    return replace(
        row,
        metrics=metrics,
        against=against,
        crm_auc_same_rows=beside,
        reliability=pooled,
        **_difference(row.seeds),
    )


def _pooled(of_seeds: Sequence[list[list[float]]]) -> list[list[float]]:
    """Bins of all seeds together; none where a seed has none."""
    if not all(of_seeds):
        return []
    pooled = []
    for bins in zip(*of_seeds, strict=True):
        count = sum(rows for rows, _, _ in bins)
        predicted = math.fsum(rows * mean for rows, mean, _ in bins) / max(1, count)
        share = math.fsum(rows * liked for rows, _, liked in bins) / max(1, count)
        pooled.append([count, predicted, share])
    return pooled


def _difference(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`delta`, `interval95` and `p_value` over seeds."""
    intervals = [entry["interval95"] for entry in entries if entry.get("interval95") is not None]
    p_values = [entry["p_value"] for entry in entries if entry.get("p_value") is not None]
    low = _mean([pair[0] for pair in intervals])
    high = _mean([pair[1] for pair in intervals])
    return {
        "delta": _mean([entry.get("delta") for entry in entries]),
        "interval95": [low, high] if low is not None and high is not None else None,
        "p_value": max(p_values, default=None),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None and not math.isnan(value)]
    return math.fsum(measured) / len(measured) if measured else None


def _order(row: ResultRow) -> tuple[Any, ...]:
    # Uniform candidates come first: the easiest set, the one that others report.
    kind = (row.candidates or "").rstrip("0123456789")
    candidates = CANDIDATES.index(kind) if kind in CANDIDATES else len(CANDIDATES), row.candidates or ""
    return (
        list(HEADLINE).index(row.task),
        row.variant or "",
        row.row_set,
        candidates,
        *by_system(row.system),
        row.k or 0,
        row.lm or "",
    )


def _written(value: Any, decimals: int | None) -> Any:
    if isinstance(value, dict):
        return {name: _written(inner, decimals) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_written(inner, decimals) for inner in value]
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return None
    return value if decimals is None else round(value, decimals)
