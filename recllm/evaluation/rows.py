"""Rows of the results table: what they say of a system, its figures, and its differences to others."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from recllm.config.sweep import tag
from recllm.evaluation.bootstrap import Difference
from recllm.evaluation.results import ResultRow, of_seed
from recllm.files import now
from recllm.pipeline.manifest import commit, hardware
from recllm.pipeline.run import Run
from recllm.systems.system import System, Task


def row_name(system: System, sweep: Mapping[str, str]) -> str:
    """A system as tables name it: with the value of a sweep, where it stands at it.

    Args:
        system: any.
        sweep: `key` and `value` that an evaluation stands at; empty: it is none of a sweep.
    """
    if sweep and system.stands_at(sweep):
        return f"{system.table_name}+{tag(sweep['key'], sweep['value'])}"
    return system.table_name


def result_row(
    run: Run,
    system: System,
    task: Task,
    row_set: str,
    count: int,
    figures: Mapping[str, Any],
    differences: Mapping[System, Difference],
    *,
    crm_auc: float | None = None,
    candidates: str | None = None,
    split: str | None = None,
    reliability: Sequence[Sequence[float]] = (),
) -> ResultRow:
    """A row of the table; whatever is known of the system, the system itself is asked.

    Args:
        run: the evaluation.
        system: the system.
        task: what it was asked.
        row_set: the rows, e.g. `test/all`.
        count: how many they are.
        figures: what was measured, by name.
        differences: to other systems on the same rows, the row's own comparison first.
        crm_auc: AUC on the same rows of the CRM beside it; None: it stands beside none.
        candidates: kind of candidates, of the ranking task; what may be recommended, of the whole catalog.
        split: how the log was split, of the whole catalog.
        reliability: bins of `metrics.reliability`, of the CTR task.
    """
    sweep = run.file.sweep
    against = {row_name(other, sweep): asdict(difference) for other, difference in differences.items()}
    paired_with = next(iter(against), None)
    own = against.pop(paired_with) if paired_with is not None else {}
    row = ResultRow(
        system=row_name(system, sweep),
        stage=system.stage,
        task=task.value,
        row_set=row_set,
        rows=count,
        metrics={**figures, **system.cost(), **system.labels_read()},
        candidates=candidates,
        k=system.k,
        lm=system.lm,
        variant=run.file.variant,
        paired_with=paired_with,
        **own,
        against=against,
        crm_auc_same_rows=crm_auc,
        reliability=[list(each) for each in reliability],
        split=split,
        commit=commit(),
        date=now(),
        hardware=hardware(),
        command=os.environ.get("RECLLM_COMMAND", "make evaluate"),
    )
    return of_seed(row, run.config.seed)
