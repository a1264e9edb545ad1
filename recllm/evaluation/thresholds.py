"""Figures that must not get worse: what `results/thresholds.json` wants, held against what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean

from recllm.errors import StageError
from recllm.evaluation.results import ResultRow
from recllm.evaluation.tables import LOWER_IS_BETTER


@dataclass(frozen=True)
class Threshold:
    """A figure of one line of a data set's table, and by how much it may be worse.

    Attributes:
        dataset: name of the data set.
        task: as of `ResultRow`, like all that tells the line: `system`, `row_set`, `candidates`, `variant`.
        system: see `task`.
        row_set: see `task`.
        metric: name of the figure, e.g. `auc`.
        value: what is wanted, the mean over the seeds.
        tolerance: by how much the figure may be worse, 0 or more.
        seeds: whose figures count.
        candidates: see `task`; None: there are none.
        variant: see `task`; None: all is the default.
        k: number of rejected candidates in training; None: any, where one line has the rest.
        lm: the language model; None: likewise.
    """

    dataset: str
    task: str
    system: str
    row_set: str
    metric: str
    value: float
    tolerance: float
    seeds: tuple[int, ...]
    candidates: str | None = None
    variant: str | None = None
    k: int | None = None
    lm: str | None = None

    @property
    def name(self) -> str:
        """What it is about, as a line says it."""
        k = None if self.k is None else f"k={self.k}"
        parts = (
            self.task,
            self.row_set,
            self.candidates,
            self.variant,
            self.lm,
            self.system,
            k,
            self.metric,
        )
        return " ".join(part for part in parts if part)

    def row(self, rows: Iterable[ResultRow]) -> ResultRow | None:
        """The line that it is about; None: nobody measured it.

        Raises:
            StageError: several lines are meant, which differ by k or LM.
        """
        table = (self.task, self.variant or "", self.row_set, self.candidates or "")
        meant = [
            row
            for row in rows
            if row.table == table
            and row.system == self.system
            and self.k in (None, row.k)
            and self.lm in (None, row.lm)
        ]
        if len(meant) > 1:
            there = ", ".join(f"k={row.k} lm={row.lm}" for row in meant)
            raise StageError(f"{self.name} means {len(meant)} lines ({there}); wanted one: say k or lm too")
        return meant[0] if meant else None


def read_thresholds(path: Path, dataset: str) -> list[Threshold]:
    """The thresholds of a data set.

    Args:
        path: a JSON list of objects with the keys of `Threshold`.
        dataset: which of them.

    Raises:
        StageError: a key is missing or not known, or there is none for the data set.
    """
    entries = json.loads(path.read_text())
    known = {field.name for field in fields(Threshold)}
    optional = {"candidates", "variant", "k", "lm"}
    for number, entry in enumerate(entries):
        wrong = sorted((set(entry) - known) | (known - optional - set(entry)))
        if wrong:
            raise StageError(
                f"{path}, entry {number}: the key {wrong[0]!r} is missing or not known; "
                f"wanted {', '.join(sorted(known))}"
            )
    thresholds = [Threshold(**entry | {"seeds": tuple(entry["seeds"])}) for entry in entries]
    own = [threshold for threshold in thresholds if threshold.dataset == dataset]
    if not own:
        there = ", ".join(sorted({threshold.dataset for threshold in thresholds}))
        raise StageError(f"{path} says nothing of {dataset}; wanted one of {there}, or entries for it")
    return own


def hold(threshold: Threshold, rows: Iterable[ResultRow]) -> tuple[bool, str]:
    """Whether a figure is as good as wanted, and the line that says so."""
    row = threshold.row(rows)
    of_seed = {} if row is None else {entry["seed"]: entry["metrics"] for entry in row.seeds}
    missing = [seed for seed in threshold.seeds if of_seed.get(seed, {}).get(threshold.metric) is None]
    if missing:
        return False, f"{threshold.name}: not measured for seed {missing[0]}"
    got = fmean(of_seed[seed][threshold.metric] for seed in threshold.seeds)
    is_cost = threshold.metric in LOWER_IS_BETTER
    worse_by = got - threshold.value if is_cost else threshold.value - got
    bound = threshold.value + (threshold.tolerance if is_cost else -threshold.tolerance)
    limit = f"{'at most' if is_cost else 'at least'} {bound:.4f}"
    return worse_by <= threshold.tolerance, f"{threshold.name}: {got:.4f}, wanted {limit}"
