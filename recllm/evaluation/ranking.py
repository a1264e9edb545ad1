"""Rows of the ranking task: which of these items comes next?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm import metrics
from recllm.evaluation import bootstrap
from recllm.evaluation.comparisons import compare, ranking_comparisons
from recllm.evaluation.context import Evaluation
from recllm.evaluation.results import ResultRow
from recllm.evaluation.rows import result_row
from recllm.eventlog.log import EventLog, Rows
from recllm.systems.counting import Cooccurrence, MetBefore, Popularity
from recllm.systems.system import Scores, System, Task


def ranking(evaluation: Evaluation) -> list[ResultRow]:
    """Rows of all systems that rank, for each kind of candidates."""
    kinds = evaluation.config.candidates
    lists = {kind: evaluation.ranking_rows(kind) for kind in kinds}
    scores: dict[str, dict[System, Scores]] = {kind: {} for kind in kinds}
    decoding: dict[str, dict[System, dict[str, float]]] = {kind: {} for kind in kinds}
    for system in ranking_systems(evaluation):  # one after the other: each LM is opened once for all kinds
        for kind in kinds:
            scores[kind][system] = system.rank(*lists[kind])
            decoding[kind][system] = system.decoding(*lists[kind], evaluation.config.generate_rows)
    table = []
    for kind in kinds:
        table += _ranking(evaluation, kind, *lists[kind], scores[kind], decoding[kind])
    return table


def ranking_systems(evaluation: Evaluation) -> list[System]:
    """What ranks, in the table's order; of the CRMs that answer Yes or No the one beside the LMs.

    Where whole items are held out, all of them: what each makes of an item that nobody rated is the question.
    """
    log = evaluation.log
    systems: list[System] = [
        Popularity(log),
        *([MetBefore(log)] if log.repeats else []),
        Cooccurrence(log, directed=False),
        Cooccurrence(log, directed=True),
        *evaluation.of_unrated,
    ]
    if log.item_split is not None:
        systems += [system for system in evaluation.crms if Task.CTR in system.tasks]
    elif evaluation.beside is not None:
        systems.append(evaluation.beside)
    systems += evaluation.towers
    systems += [system for system in evaluation.crms if Task.CTR not in system.tasks]
    if evaluation.lms is not None:
        systems += evaluation.lms.ranking
    return systems


def _ranking(
    evaluation: Evaluation,
    kind: str,
    rows: Rows,
    lists: NDArray[np.int32],
    scores: Mapping[System, Scores],
    decoding: Mapping[System, Mapping[str, float]],
) -> list[ResultRow]:
    """Rows of a kind of candidates."""
    log = evaluation.log
    own = (lists == log.item[rows][:, None]).argmax(1)
    values = {system: metrics.ranking_values(of_system, own) for system, of_system in scores.items()}
    resampled = {
        system: bootstrap.of_mean(of_rows["hr@1"], log.user[rows], evaluation.config.bootstrap)
        for system, of_rows in values.items()
    }
    comparisons = ranking_comparisons(scores)
    strata = _gap_strata(log, rows)
    table = []
    for system, of_rows in values.items():
        figures: dict[str, Any] = metrics.means(of_rows)
        figures |= decoding[system]
        for stratum, chosen in strata.items():
            figures[f"hr@1/{stratum}"] = metrics.means({"hr@1": of_rows["hr@1"]}, chosen)["hr@1"]
            figures[f"rows/{stratum}"] = float(chosen.sum())
        differences = compare(system, comparisons[system], resampled)
        table.append(
            result_row(
                evaluation.run,
                system,
                Task.RANKING,
                f"test/{len(rows)}",
                len(rows),
                figures,
                differences,
                candidates=kind,
            )
        )
    return table


def _gap_strata(log: EventLog, rows: Rows) -> dict[str, NDArray[np.bool_]]:
    """Rows by the time since the user's last event; none of a log without times."""
    if not log.timed:
        return {}
    start, end = log.history(rows)
    gap = log.timestamp[rows] - log.timestamp[end - 1]
    gap[start == end] = metrics.LONG_AGO  # a user's first event comes after none
    return metrics.gap_strata(gap)
