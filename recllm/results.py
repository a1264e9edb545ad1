"""Rows of `results.json` (one run) and `table.json` (what several runs add up to), and how they look."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recllm.bands import BANDS
from recllm.manifest import write_json

Metrics = dict[str, float | None]

HEADLINE = {"ctr": "auc", "ranking": "hr@1"}
CANDIDATES = ("uniform", "popular", "hard")
"""Task -> the metric that `delta`, `interval95` and `p_value` are about."""

COLUMNS = {
    "ctr": {"auc": "AUC", "logloss": "log loss", "per_user_auc": "user AUC", "ece": "ECE"},
    "ranking": {"hr@1": "HR@1", "hr@5": "HR@5", "ndcg@10": "NDCG@10", "mrr": "MRR", "valid_ratio": "valid"},
}
"""Task -> metrics that the report shows, with their headings; every other metric is in the file only."""

NARROW = ("auc", "logloss", "hr@1", "ndcg@10", "valid_ratio")
"""Those of them that fit a terminal of 100 columns."""

# fmt: off
SYSTEMS = (
    "popularity", "cooccurrence", "cooccurrence-directed",
    "deepfm", "autoint", "dcnv2", "gru4rec", "caser", "sasrec", "din", "sim", "sim-heldout", "crm-ranker",
    "lm", "ctr-bert", "tallrec", "rella", "lora", "lora-wide",
    "dora", "rslora", "vera", "adalora", "pissa", "milora", "random-svd",
    "reclora-uniform", "reclora-shuffled", "reclora-factor", "reclora-core", "reclora-in-sample", "reclora",
    "reclora-milora", "reclora-pissa", "reclora-random-svd",
    "sft", "sft-continued", "dpo", "dpo-pairwise", "dmpo", "mppo", "s-dpo", "s-dpo-paper", "sft-pointwise",
    "s-dpo-pointwise", "blend",
)
# fmt: on
"""The order of systems in a table; unknown ones follow in alphabetical order."""


@dataclass(frozen=True)
class ResultRow:
    """One system on one row set; one line of the table.

    Attributes:
        system: name of the system.
        stage: the stage that trained it (`stage1` ...), or `none` for what is only counted.
        task: `ctr` or `ranking`.
        row_set: named rows, e.g. `test/all`.
        rows: number of rows.
        metrics: mean over seeds by name; None where it is undefined (AUC of one class).
        candidates: `uniform20`, `popular20` or `hard20` (ranking only).
        k: number of rejected candidates in training (preference systems only).
        lm: the language model, where there is one.
        seeds: `{"seed", "metrics", "delta", "interval95", "p_value"}` of each seed, ascending.
        delta: difference to `paired_with` in the task's headline metric (AUC or HR@1) on the same rows.
        interval95: 95 % interval of `delta`, bootstrap clustered by user. Over several seeds: the mean of
            their bounds. It covers the choice of users, not the choice of seeds.
        p_value: two-sided; over several seeds the largest.
        paired_with: the system that it is compared with.
        crm_auc_same_rows: AUC on the same rows of the CRM beside which a language model stands.
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
    seeds: list[dict[str, Any]] = field(default_factory=list)
    delta: float | None = None
    interval95: list[float] | None = None
    p_value: float | None = None
    paired_with: str | None = None
    crm_auc_same_rows: float | None = None
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
    def key(self) -> tuple[str, str, str, str, int, str]:
        """What makes two rows the same line of the table, whatever their seeds."""
        return self.task, self.row_set, self.candidates or "", self.system, self.k or 0, self.lm or ""

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
    for name in ("delta", "interval95", "p_value"):
        own[name] = getattr(row, name)
    return replace(row, seeds=[own])


def merge(old: Iterable[ResultRow], new: Iterable[ResultRow]) -> list[ResultRow]:
    """Add rows to a table; runs of different days and seeds add up.

    Rows are the same line if (task, system, row_set, candidates, k, lm) are equal; within a line a seed that
    comes again replaces its former figures, another one is added, and metrics become means over seeds.
    Everything else (commit, date, command ...) is that of the newer row. Where the number of rows or the
    paired system has changed, figures cannot be averaged: the newer row replaces the line. Merging the same
    rows twice changes nothing.

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


def write(path: Path, rows: Iterable[ResultRow]) -> None:
    """Write rows atomically as a JSON list; NaN becomes null, so that every JSON reader takes it."""
    write_json(path, [_without_nan(asdict(row)) for row in rows])


# ---- looks


@dataclass(frozen=True)
class View:
    """One table ready to be shown: systems that are comparable, i.e. the same task, rows and candidates.

    Attributes:
        title: task, row set, candidates.
        heading: column headings; the first column is the system.
        cells: `[lines][columns]` text.
        best: `(line, column)` of the best value of each metric.
    """

    title: str
    heading: list[str]
    cells: list[list[str]]
    best: set[tuple[int, int]]


def in_order(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Rows as tables show them: by task, row set, candidates and system."""
    return sorted(rows, key=_order)


def views(rows: Iterable[ResultRow], task: str, narrow: bool = False) -> list[View]:
    """The tables of a task, one for each (row set, candidates).

    Args:
        rows: any rows.
        task: `ctr` or `ranking`.
        narrow: only the metrics that fit a terminal.

    Returns:
        Tables in order of row set and candidates.
    """
    groups: dict[tuple[str, str], list[ResultRow]] = {}
    for row in in_order(rows):
        if row.task == task:
            groups.setdefault((row.row_set, row.candidates or ""), []).append(row)
    names = [name for name in COLUMNS[task] if not narrow or name in NARROW]
    return [_view(task, row_set, candidates, group, names) for (row_set, candidates), group in groups.items()]


def band_views(rows: Iterable[ResultRow]) -> list[View]:
    """AUC by how much training has seen of the rows' users and items, one table for each row set.

    Args:
        rows: any rows; those of the CTR task that hold metrics of bands are shown.

    Returns:
        Tables in order of row set; a heading names the band, its rows, and its largest count of events.
    """
    groups: dict[str, list[ResultRow]] = {}
    for row in in_order(rows):
        if row.task == "ctr" and any(name.startswith("auc/") for name in row.metrics):
            groups.setdefault(row.row_set, []).append(row)
    return [_band_view(row_set, group) for row_set, group in groups.items()]


def _band_view(row_set: str, rows: list[ResultRow]) -> View:
    shown = [band for band in BANDS if any(row.metrics.get(f"auc/{band}") is not None for row in rows)]
    heading = ["system", "rows"]
    for band in shown:
        count, upto = (rows[0].metrics.get(f"{name}/{band}") for name in ("rows", "upto"))
        edge = "" if upto is None else f" (<= {upto:,.0f})"
        heading.append(f"{BANDS[band]}{edge}, {count or 0:,.0f} rows")
    cells = [
        [row.label, f"{row.rows:,}", *(number(row.metrics.get(f"auc/{band}")) for band in shown)]
        for row in rows
    ]
    best = set()
    for place, band in enumerate(shown):
        values = [row.metrics.get(f"auc/{band}") for row in rows]
        top = max(value for value in values if value is not None)
        best |= {(line, 2 + place) for line, value in enumerate(values) if value == top and len(rows) > 1}
    return View(f"AUC by band, rows {row_set}", heading, cells, best)


def print_table(rows: Sequence[ResultRow], console: Console | None = None) -> None:
    """Print the CTR and the ranking tables: 100 columns, plain text when piped (best marked by `*`).

    Args:
        rows: any rows.
        console: where to; a new one on standard output by default.
    """
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=100)
    for task in HEADLINE:
        tables = views(rows, task, narrow=True)
        if not tables:
            console.print(f"No {task} results.")
        for view in tables:
            # Only the system may wrap: its label has spaces, everything else would lose digits.
            table = Table(title=view.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
            table.padding = (0, 1, 0, 0)
            for number, heading in enumerate(view.heading):
                right = 0 < number < len(view.heading) - 2
                table.add_column(
                    heading, justify="right" if right else "left", no_wrap=number > 0, overflow="fold"
                )
            for line, cells in enumerate(view.cells):
                table.add_row(
                    *(_marked(text, (line, n) in view.best, console) for n, text in enumerate(cells))
                )
            console.print(table)
    console.print(
        "Differences: headline metric (AUC, HR@1), 95 % interval by users (bootstrap), not by seeds."
    )


def _marked(text: str, best: bool, console: Console) -> Text:
    if not best:
        return Text(text)
    return Text(text, style="bold") if console.is_terminal else Text(f"{text}*")


def _view(task: str, row_set: str, candidates: str, rows: list[ResultRow], names: list[str]) -> View:
    shown = [name for name in names if any(row.metrics.get(name) is not None for row in rows)]
    crm = any(row.crm_auc_same_rows is not None for row in rows)
    heading = ["system", "rows"] + [COLUMNS[task][name] for name in shown]
    heading += ["CRM AUC"] * crm + ["difference", "against"]
    cells = []
    for row in rows:
        line = [row.label, f"{row.rows:,}"] + [number(row.metrics.get(name)) for name in shown]
        line += [number(row.crm_auc_same_rows)] * crm
        line += [interval(row), row.paired_with or ""]
        cells.append(line)
    best = set()
    for offset, name in enumerate(shown):
        values = [row.metrics.get(name) for row in rows]
        known = [value for value in values if value is not None and not math.isnan(value)]
        if len(known) > 1:
            top = min(known) if name in ("logloss", "ece") else max(known)
            best |= {(line, 2 + offset) for line, value in enumerate(values) if value == top}
    kind = "CTR" if task == "ctr" else f"Ranking, {candidates or 'unnamed'} candidates"
    return View(f"{kind}, rows {row_set}", heading, cells, best)


def number(value: float | None, sign: str = "") -> str:
    """`.8123`: four places, no zero before the point."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:{sign}.4f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:{sign}.4f}"


def interval(row: ResultRow) -> str:
    """`+.0123 [+.0010, +.0220]`: the difference and its interval, as far as they are known."""
    if row.delta is None and row.interval95 is None:
        return ""
    bounds = "" if row.interval95 is None else f"[{', '.join(number(b, '+') for b in row.interval95)}]"
    return f"{number(row.delta, '+')} {bounds}".strip()


# ---- helpers


def _averaged(row: ResultRow) -> ResultRow:
    """The row with its top-level figures recomputed from its seeds; as it is without any."""
    if not row.seeds:
        return row
    names = dict.fromkeys(name for entry in row.seeds for name in entry["metrics"])
    metrics = {name: _mean([entry["metrics"].get(name) for entry in row.seeds]) for name in names}
    intervals = [entry["interval95"] for entry in row.seeds if entry.get("interval95") is not None]
    p_values = [entry["p_value"] for entry in row.seeds if entry.get("p_value") is not None]
    lows, highs = [pair[0] for pair in intervals], [pair[1] for pair in intervals]
    low, high = _mean(lows), _mean(highs)
    return replace(
        row,
        metrics=metrics,
        delta=_mean([entry.get("delta") for entry in row.seeds]),
        interval95=[low, high] if low is not None and high is not None else None,
        p_value=max(p_values, default=None),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return math.fsum(known) / len(known) if known else None


def _order(row: ResultRow) -> tuple[Any, ...]:
    system, _, point = row.system.partition("+")  # points of a sweep: in order of their numbers
    place = SYSTEMS.index(system) if system in SYSTEMS else len(SYSTEMS)
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", point)]
    # Uniform candidates come first: the easiest set, the one that others report.
    kind = (row.candidates or "").rstrip("0123456789")
    candidates = CANDIDATES.index(kind) if kind in CANDIDATES else len(CANDIDATES), row.candidates or ""
    return (
        list(HEADLINE).index(row.task),
        row.row_set,
        candidates,
        place,
        system,
        numbers,
        point,
        row.k or 0,
        row.lm or "",
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
