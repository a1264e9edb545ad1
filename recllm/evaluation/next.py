"""Rows over the whole catalog: which item comes next?

Every system recommends a list of `evaluate.next.retrieved` items out of the whole catalog, without sampled
candidates, and a row's own item is looked up in it. An item that is not in the list is not found: its
reciprocal rank is 0. With one item a row, recall at k is the hit rate at k.

Baselines and retrievers recommend on `evaluate.next.rows`. CRMs and LMs order anew what a retriever found, on
`evaluate.next.cascade_rows`, where all else is measured, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm import processes
from recllm.config.evaluate import NextConfig
from recllm.console import say
from recllm.errors import StageError
from recllm.evaluation import bootstrap
from recllm.evaluation.comparisons import catalog_comparisons, compare
from recllm.evaluation.context import LmSystems, of_unrated, texts_lm
from recllm.evaluation.results import HEADLINE, ResultRow
from recllm.evaluation.rows import result_row
from recllm.eventlog.all_data import check_holds_out
from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.queries import LogRows
from recllm.metrics import means, values_by_place
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Group, Role
from recllm.retrieval.stored import Retrieval
from recllm.systems.cascade import CascadeSystem, CrmStep, Lists, SystemStep, retrieve
from recllm.systems.catalog import NO_ITEM, CatalogScorer, Excluded, Items
from recllm.systems.catalog_counting import Als, CatalogPopularity, Ease, ItemKnn, Transitions
from recllm.systems.crm import Crm, CrmSystem
from recllm.systems.lm_systems import OpenLm
from recllm.systems.retriever import Retriever, retrieves
from recllm.systems.system import System, Task

HITS = (1, 5, 10, 20, 100)
"""Cutoffs of the hit rate."""
GAINS = (5, 10, 20, 100)
"""Cutoffs of NDCG."""
TOP = 10
"""Recommended items by which coverage and popularity bias are measured."""
ROWS_AT_ONCE = 4096
"""Rows whose lists are in memory at once."""
TIMED_ROWS = 32
"""Rows by which the time of an LM is measured, whose scores may have been kept."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """What is known of a system's lists for some rows; the lists themselves would not fit for many.

    Attributes:
        columns: int64 `[R]`, where each row's own item stands in its list; -1: it is not there.
        top: int32 `[R, TOP]`, the first items of each list.
        milliseconds: a row.
    """

    columns: Rows
    top: Items
    milliseconds: float

    @classmethod
    def of(cls, lists: Lists, own: Items, milliseconds: float) -> Answer:
        """From lists, and the rows' own items `[R]`."""
        return cls(lists.places(own), lists.items[:, :TOP], milliseconds)


@dataclass
class NextEvaluation:
    """The log and all systems of an evaluation over the whole catalog.

    Attributes:
        run: the evaluation.
        log: the event log.
        crms: all CRMs, retrievers among them.
        lms: systems of stages 2 and 3 with the LM; None: there are none.
    """

    run: Run
    log: EventLog
    crms: dict[str, Crm]
    lms: LmSystems | None = None
    _fitted: dict[str, CatalogScorer] = field(default_factory=dict)

    @classmethod
    def open(cls, run: Run) -> NextEvaluation:
        """Open the parents; LMs are loaded when they are asked."""
        log = EventLog.open(run.parents[Role.LOG].folder)
        check_holds_out(log)
        retrieval = None
        if Role.NEIGHBORS in run.parents:
            retrieval = Retrieval.open(run.parents[Role.NEIGHBORS].folder, log)
        stages = run.systems.get(Group.CRMS, {})
        crms = {name: Crm.open(stage, log, retrieval, run.cache) for name, stage in stages.items()}
        lms = None
        if retrieval is not None and run.systems.get(Group.TUNED):
            systems = [CrmSystem(name, crm) for name, crm in crms.items()]
            lms = LmSystems.open(run, OpenLm(run, log, retrieval, systems))
        return cls(run, log, crms, lms)

    @property
    def config(self) -> NextConfig:
        """What is measured."""
        return self.run.config.evaluate.next

    @property
    def split(self) -> str:
        """How the log was split (`prepare.split`)."""
        return str(self.run.parents[Role.LOG].config.prepare.split)

    @property
    def row_set(self) -> str:
        """What a row set's name is followed by: which of its rows count."""
        return self.config.targets

    @property
    def catalog(self) -> str:
        """What may be recommended, as the table says it."""
        return "unseen" if self.config.seen == "removed" else "catalog"

    def rows(self, split: str, name: str) -> Rows:
        """The rows of a row set whose event counts.

        Raises:
            StageError: there is none.
        """
        rows = self.log.rows(split, name)
        rows = rows[~self.log.is_drawn(rows)]
        if self.config.targets == "liked":
            rows = rows[self.log.label[rows] == 1]
        if not len(rows):
            raise StageError(
                f"no row of the {split} split ({name}) has a target (evaluate.next.targets="
                f"{self.config.targets}); wanted some, e.g. ARGS=evaluate.next.targets=any"
            )
        return rows

    @cached_property
    def baselines(self) -> list[CatalogScorer]:
        """The baselines that can be had here; of others it is said why they cannot."""
        config = self.config
        log = self.log
        builders: dict[str, Callable[[], CatalogScorer]] = {
            "popularity": lambda: CatalogPopularity(log),
            "popularity-7-days": lambda: CatalogPopularity(log, days=7),
            "transitions": lambda: Transitions(log),
            "item-knn": lambda: ItemKnn(log, config.item_knn_neighbors),
            "ease": lambda: Ease(log, config.ease_l2),
            "als": lambda: Als(
                log, self.run.config.seed, config.als_factors, config.als_l2, config.als_alpha
            ),
        }
        fitted = []
        for name in config.baselines:
            started = time.monotonic()
            try:
                fitted.append(builders[name]())
            except StageError as error:
                say(f"without {error}")
                continue
            say(f"fitted {name} in {time.monotonic() - started:.0f} s")
        return fitted + of_unrated(self.run, log)

    @cached_property
    def retrievers(self) -> list[Retriever]:
        """The CRMs that score a whole catalog; of one that reads texts it is said what these add."""
        retrievers = [
            Retriever(name, crm, self.log, texts_lm(self.run, crm))
            for name, crm in self.crms.items()
            if retrieves(crm)
        ]
        for retriever in retrievers:
            if len(retriever.by_text):
                say(f"{retriever.name}: {retriever.by_text_sentence}")
        return retrievers

    @cached_property
    def cascades(self) -> list[CascadeSystem]:
        """What orders anew the items of the first retriever: each CRM, and behind the gate's the LM systems.

        Every cascade comes after the one that it begins with. CRMs that left rows out of their training only
        gate.
        """
        if not self.retrievers:
            return []
        retriever = self.retrievers[0]
        cascades: list[CascadeSystem] = []
        orders = [
            name for name, crm in self.crms.items() if not retrieves(crm) and not name.endswith("-heldout")
        ]
        for name in orders:
            crm = self.crms[name]
            step = CrmStep(crm, name)
            cascades.append(CascadeSystem(retriever, step, CrmSystem(name, crm), self.config.retrieved))
        if self.lms is not None:
            before: CatalogScorer | CascadeSystem = cascades[-1] if cascades else retriever
            for system in self.lms.ranking:
                cascades.append(CascadeSystem(before, SystemStep(system), system, self.config.reranked))
        return cascades


def next_items(evaluation: NextEvaluation) -> list[ResultRow]:
    """Rows of all systems: of what recommends by itself on all rows, and of cascades on fewer."""
    config = evaluation.config
    alone: list[CatalogScorer] = [*evaluation.baselines, *evaluation.retrievers]
    if not alone:
        raise StageError("no system recommends anything; wanted evaluate.next.baselines, or CRM=retriever")
    rows = evaluation.rows("test", config.rows)
    answers: dict[System, Answer] = {system: _ask(evaluation, system, rows) for system in alone}
    table = _table(evaluation, config.rows, rows, answers)
    if evaluation.cascades:
        rows = evaluation.rows("test", config.cascade_rows)
        answers = {system: _ask(evaluation, system, rows) for system in alone}
        table += _table(evaluation, config.cascade_rows, rows, answers | _cascaded(evaluation, rows, answers))
    return table


def _lists(evaluation: NextEvaluation, system: CatalogScorer, rows: Rows) -> Lists:
    """What a system recommends for rows."""
    exclude = None if evaluation.config.seen == "kept" else Excluded.seen(evaluation.log, rows)
    return retrieve(system, LogRows(evaluation.log, rows), evaluation.config.retrieved, exclude)


def _ask(evaluation: NextEvaluation, system: CatalogScorer, rows: Rows) -> Answer:
    """What is known of a system's lists for rows, and how long they take."""
    columns = np.empty(len(rows), np.int64)
    top = np.empty((len(rows), TOP), np.int32)
    seconds = 0.0
    for first in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[first : first + ROWS_AT_ONCE]
        started = time.monotonic()
        lists = _lists(evaluation, system, part)
        seconds += time.monotonic() - started
        columns[first : first + ROWS_AT_ONCE] = lists.places(evaluation.log.item[part])
        top[first : first + ROWS_AT_ONCE] = lists.items[:, :TOP]
    return Answer(columns, top, 1000 * seconds / len(rows))


def _cascaded(evaluation: NextEvaluation, rows: Rows, answers: dict[System, Answer]) -> dict[System, Answer]:
    """What the cascades make of the retriever's lists; each is fitted on validation rows first."""
    log = evaluation.log
    valid = evaluation.rows("valid", evaluation.config.joined_rows)
    retriever = evaluation.retrievers[0]
    fitted: dict[System, Lists] = {retriever: _lists(evaluation, retriever, valid)}
    ordered: dict[System, Lists] = {retriever: _lists(evaluation, retriever, rows)}
    result: dict[System, Answer] = {}
    for cascade in evaluation.cascades:
        fitted[cascade] = cascade.fit(LogRows(log, valid), fitted[cascade.before], log.item[valid])
        before = ordered[cascade.before]
        if cascade.lm is None:
            with processes.alone():  # one process's time
                started = time.monotonic()
                ordered[cascade] = cascade.order(LogRows(log, rows), before)
                milliseconds = 1000 * (time.monotonic() - started) / len(rows)
        else:
            ordered[cascade] = cascade.order(LogRows(log, rows), before)
            milliseconds = _milliseconds(cascade, rows, before)
        milliseconds += (answers | result)[cascade.before].milliseconds
        result[cascade] = Answer.of(ordered[cascade], log.item[rows], milliseconds)
        say(f"{cascade.name}: weights {', '.join(f'{weight:.3f}' for weight in cascade.weights.values())}")
    return result


def _milliseconds(cascade: CascadeSystem, rows: Rows, before: Lists) -> float:
    """Time a row of an LM's step, on a few rows with the longest lists, of which nothing is kept."""
    lists = before.items[:, : cascade.reranker.depth]
    lengths = (lists != NO_ITEM).sum(axis=1)
    longest = int(lengths.max(initial=0))
    if longest == 0:
        return 0.0  # nothing is scored
    few = np.flatnonzero(lengths == longest)[:TIMED_ROWS]
    return cascade.system.milliseconds(rows[few], lists[few, :longest])


def _table(
    evaluation: NextEvaluation, name: str, rows: Rows, answers: Mapping[System, Answer]
) -> list[ResultRow]:
    """Rows of the table of a row set."""
    log = evaluation.log
    own = log.item[rows]
    tied = is_tied(log, rows)
    say(
        f"{tied.sum():,} of {len(rows):,} targets ({name}) share their second with another event of their "
        "user: another order of ties could change them"
    )
    values = {system: values_by_place(answer.columns, HITS, GAINS) for system, answer in answers.items()}
    headline = HEADLINE[Task.NEXT]
    resampled = {
        system: bootstrap.of_mean(of_rows[headline], log.user[rows], evaluation.run.config.evaluate.bootstrap)
        for system, of_rows in values.items()
    }
    comparisons = catalog_comparisons(list(answers), evaluation.retrievers)
    found = None
    if evaluation.retrievers:
        found = answers[evaluation.retrievers[0]].columns >= 0
    table = []
    for system, answer in answers.items():
        of_rows = values[system]
        figures: dict[str, Any] = means(of_rows)
        longest = evaluation.config.retrieved
        figures[f"recall@{longest}"] = float((answer.columns >= 0).mean())
        figures |= of_lists(log, answer.top)
        figures |= by_coldness(log, own, of_rows, answer.columns >= 0, longest)
        if found is not None:
            figures |= _given_recall(of_rows, values[evaluation.retrievers[0]], found)
        if isinstance(system, CascadeSystem):
            figures |= {f"weight/{step}": weight for step, weight in system.weights.items()}
        figures |= by_ties(of_rows, tied)
        figures["milliseconds"] = answer.milliseconds
        table.append(
            result_row(
                evaluation.run,
                system,
                Task.NEXT,
                f"test/{name}/{evaluation.row_set}",
                len(rows),
                figures,
                compare(system, comparisons[system], resampled),
                candidates=evaluation.catalog,
                split=evaluation.split,
            )
        )
    return table


def is_tied(log: EventLog, rows: Rows) -> NDArray[np.bool_]:
    """Which rows share user and second with the event above or below them, bool `[R]`.

    Events of one second are ordered by their items' ids, for want of anything else: another order could make
    another one the row. In a log without times there is none, as its order is given.
    """
    tied = np.zeros(len(rows), np.bool_)
    if not log.timed:
        return tied
    at = log.anchors(rows)  # a held-out item's row stands between the event before this one and this one
    for other in (at - 1, np.where(at == rows, at + 1, at)):
        other = np.clip(other, 0, log.n_events - 1)
        tied |= (
            (other != rows)
            & (log.user[other] == log.user[rows])
            & (log.timestamp[other] == log.timestamp[rows])
        )
    return tied


def by_ties(values: Mapping[str, Floats], tied: NDArray[np.bool_]) -> dict[str, float]:
    """How many rows another order of ties could change, and figures of those that none could."""
    chosen = {name: values[name] for name in ("hr@10", "ndcg@10")}
    figures = {f"{metric}/untied": value for metric, value in means(chosen, ~tied).items()}
    return {**figures, "rows/untied": float((~tied).sum()), "tied_targets": float(tied.sum())}


def of_lists(log: EventLog, items: Items) -> dict[str, float]:
    """Coverage and popularity bias of recommended items `[R, k]`.

    Coverage is the share of the catalog's items that anybody is recommended; popularity bias is the mean of
    log(1 + training events) of what is recommended.
    """
    there = items[items != NO_ITEM]
    covered = len(np.unique(there)) / (log.n_items - FIRST_ID)
    bias = float(np.log1p(log.item_count[there].astype(np.float64)).mean()) if len(there) else float("nan")
    return {f"coverage@{TOP}": covered, f"popularity_bias@{TOP}": bias}


def by_coldness(
    log: EventLog, own: Items, values: Mapping[str, Floats], found: NDArray[np.bool_], longest: int
) -> dict[str, float]:
    """Figures of rows whose item has a training event (warm), and of those whose item has none (cold)."""
    cold = log.item_count[own] == 0
    figures: dict[str, float] = {}
    chosen = {name: values[name] for name in ("hr@10", "ndcg@10")}
    chosen[f"recall@{longest}"] = found.astype(np.float64)
    for name, rows in (("warm", ~cold), ("cold", cold)):
        figures |= {f"{metric}/{name}": value for metric, value in means(chosen, rows).items()}
        figures[f"rows/{name}"] = float(rows.sum())
    return figures


def _given_recall(
    values: Mapping[str, Floats], of_retriever: Mapping[str, Floats], found: NDArray[np.bool_]
) -> dict[str, float]:
    """How good the order is where the retriever found the item, and what it gains over the retriever's."""
    chosen = {name: values[name] for name in ("hr@1", "hr@10", "ndcg@10")}
    figures = {f"{metric}/found": value for metric, value in means(chosen, found).items()}
    gain = means({"ndcg@10": values["ndcg@10"] - of_retriever["ndcg@10"]}, found)
    return {**figures, "rows/found": float(found.sum()), "gain_ndcg@10/found": gain["ndcg@10"]}
