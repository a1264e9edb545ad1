"""Rows of the CTR task: will this user like this item?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from recllm import metrics
from recllm.evaluation import bootstrap
from recllm.evaluation.bootstrap import Resampled
from recllm.evaluation.comparisons import Comparisons, alignment_comparisons, compare, ctr_comparisons
from recllm.evaluation.context import Evaluation
from recllm.evaluation.results import ResultRow
from recllm.evaluation.rows import result_row
from recllm.evaluation.slices import Slices
from recllm.eventlog.log import Rows
from recllm.systems.counting import MetBefore, Popularity
from recllm.systems.system import Kind, Scores, System, Task


@dataclass(frozen=True)
class _Answered:
    """What some systems answered on a row set of the test split, and the rows that come of it.

    Attributes:
        evaluation: all systems.
        row_set: name of the row set.
        rows: int64 `[n]`, its rows.
        logits: of each system `[n]`.
        comparisons: which others each system is compared with.
    """

    evaluation: Evaluation
    row_set: str
    rows: Rows
    logits: Mapping[System, Scores]
    comparisons: Comparisons

    @cached_property
    def resampled(self) -> dict[System, Resampled]:
        """AUC of each system over resamples of the users."""
        labels = self.evaluation.log.label[self.rows]
        users = self.evaluation.log.user[self.rows]
        draws = self.evaluation.config.bootstrap
        return {
            system: bootstrap.of_auc(values, labels, users, draws) for system, values in self.logits.items()
        }

    def figures(self, system: System) -> dict[str, float]:
        """The CTR metrics of a system."""
        log = self.evaluation.log
        return metrics.ctr_metrics(self.logits[system], log.label[self.rows], log.user[self.rows])

    def row(self, system: System, figures: Mapping[str, Any], crm_auc: float | None) -> ResultRow:
        """A system's row of the table.

        Args:
            system: the system.
            figures: all that is said of it.
            crm_auc: of the CRM that it stands beside; None: it stands beside none.
        """
        return result_row(
            self.evaluation.run,
            system,
            Task.CTR,
            f"test/{self.row_set}",
            len(self.rows),
            figures,
            compare(system, self.comparisons[system], self.resampled),
            crm_auc=crm_auc,
            reliability=metrics.reliability(self.logits[system], self.evaluation.log.label[self.rows]),
        )


def ctr(evaluation: Evaluation) -> list[ResultRow]:
    """CRMs on all rows of the test split, and all systems on those of `evaluate.ctr_rows`.

    At a value of a sweep the former are left out, and so is the untuned LM: they are the same at every value.
    """
    popularity = Popularity(evaluation.log)
    counting: list[System] = [popularity]
    if evaluation.log.repeats:
        counting.append(MetBefore(evaluation.log))
    counting += evaluation.of_unrated
    crms = [system for system in evaluation.crms if Task.CTR in system.tasks]
    of_all = "all"
    of_lms = evaluation.lm_rows
    systems: dict[str, list[System]] = {}
    if not evaluation.run.file.sweep:
        systems[of_all] = [*counting, *crms]
    systems[of_lms] = [*counting, *crms, *_lm_systems(evaluation)]
    table = []
    for row_set, asked in systems.items():
        table += _ctr(evaluation, row_set, asked, popularity)
    return table


def alignment_cost(evaluation: Evaluation) -> list[ResultRow]:
    """Yes/No rows of what stage 3 starts from and of what it makes of it: what alignment costs there."""
    assert evaluation.lms is not None  # what is aligned is an LM
    log = evaluation.log
    row_set = evaluation.config.aligned_rows
    rows = log.rows("test", row_set)
    systems: list[System] = [*evaluation.lms.starts, *evaluation.lms.aligned]
    logits = {system: system.ctr(rows) for system in systems}
    crm_auc = None
    if evaluation.beside is not None:
        crm_auc = metrics.auc(evaluation.beside.ctr(rows), log.label[rows])
    answered = _Answered(evaluation, row_set, rows, logits, alignment_comparisons(systems))
    return [answered.row(system, answered.figures(system), crm_auc) for system in systems]


def _lm_systems(evaluation: Evaluation) -> list[System]:
    """Whatever has to do with texts, and the stacking controls."""
    if evaluation.lms is None:
        return []
    untuned = [] if evaluation.run.file.sweep else [evaluation.lms.untuned]
    return [*untuned, *evaluation.lms.tuned, *evaluation.towers, *evaluation.stacked]


def _ctr(
    evaluation: Evaluation, row_set: str, systems: Sequence[System], popularity: Popularity
) -> list[ResultRow]:
    """Rows of some systems on a row set of the test split."""
    log = evaluation.log
    rows = log.rows("test", row_set)
    labels = log.label[rows]
    logits: dict[System, Scores] = {}
    forgetting: dict[System, dict[str, float]] = {}
    for system in systems:  # one after the other, all that is asked of it: each LM is opened once
        logits[system] = system.ctr(rows)
        forgetting[system] = system.forgetting()
    slices = Slices.of(log, rows)
    answered = _Answered(evaluation, row_set, rows, logits, ctr_comparisons(systems, evaluation.beside))
    popularity_auc = metrics.auc(logits[popularity], labels)
    crm_auc = None
    if evaluation.beside is not None:
        crm_auc = metrics.auc(logits[evaluation.beside], labels)
    table = []
    for system in systems:
        figures = answered.figures(system) | slices.metrics(logits[system], labels)
        figures["relative_improvement"] = metrics.relative_improvement(figures["auc"], popularity_auc)
        figures |= forgetting[system]
        stands_beside_crm = system.kind not in (Kind.COUNTING, Kind.CRM)
        table.append(answered.row(system, figures, crm_auc if stands_beside_crm else None))
    return table
