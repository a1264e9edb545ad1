"""What an evaluation is made of: the log, row sets, and all systems of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from recllm.config.schema import EvaluateConfig
from recllm.console import say
from recllm.evaluation.stacking import Blend, Refit, Stacked
from recllm.eventlog.all_data import check_holds_out
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.names import sized
from recllm.paths import ADAPTER, RANKING_ADAPTER
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Group, Role
from recllm.retrieval.stored import Retrieval
from recllm.systems.catalog import CatalogScorer
from recllm.systems.crm import Crm, CrmSystem
from recllm.systems.item_texts import text_dimensions, text_vectors
from recllm.systems.lm_systems import AlignedLm, OpenLm, TunedLm, UntunedLm
from recllm.systems.system import System, Task
from recllm.systems.towers import Towers
from recllm.systems.unrated import CategoryPopularity, TextKnn


def texts_lm(run: Run, crm: Crm) -> str | None:
    """Name of the language model whose vectors of texts a CRM of an evaluation reads; None: it reads none."""
    return run.config.lm.model.name if crm.reads_texts else None


def of_unrated(run: Run, log: EventLog) -> list[CatalogScorer]:
    """Baselines of items that nobody rated; none of a log that holds no items out.

    Args:
        run: the evaluation; where its neighbors have vectors of texts, a baseline reads them.
        log: the event log.
    """
    if log.item_split is None:
        return []
    systems: list[CatalogScorer] = [CategoryPopularity(log)]
    neighbors = run.parents.get(Role.NEIGHBORS)
    if neighbors is not None and (dimensions := text_dimensions(neighbors)):
        vectors = text_vectors(neighbors, dimensions).numpy()
        systems.append(TextKnn(log, vectors, run.config.lm.model.name))
    return systems


@dataclass(frozen=True)
class LmSystems:
    """All systems that are one LM.

    Attributes:
        untuned: the LM itself.
        tuned: systems of stage 2.
        start: the one of them that alignments start from where their files name no other; where nothing is
            aligned and it was not asked for, the first.
        by_titles: it, where it was asked for, and each other one that titles were aligned from, as the table
            calls it beside them: with the adapter that ranks titles best.
        by_answers: each that answers were aligned from, with the adapter that answers best.
        aligned: systems of stage 3.
    """

    untuned: UntunedLm
    tuned: list[TunedLm]
    start: TunedLm
    by_titles: dict[TunedLm, TunedLm]
    by_answers: dict[TunedLm, TunedLm]
    aligned: list[AlignedLm]

    @classmethod
    def open(cls, run: Run, open_lm: OpenLm) -> LmSystems:
        """All LM systems among a run's parents; nothing is loaded yet."""
        untuned = UntunedLm(open_lm)
        tuned = [TunedLm(name, untuned, stage) for name, stage in run.systems[Group.TUNED].items()]
        by_folder = {system.finished.name: system for system in tuned}
        start = tuned[0]
        by_titles: dict[TunedLm, TunedLm] = {}
        if Role.START in run.parents:
            start = by_folder[run.parents[Role.START].name]
            by_titles[start] = TunedLm("sft", untuned, start.finished, answers=RANKING_ADAPTER)
        by_answers: dict[TunedLm, TunedLm] = {}
        aligned = []
        for name, finished in run.systems.get(Group.ALIGNED, {}).items():
            own_start = by_folder[finished.file.parents[Role.START]]
            suffix = "" if own_start is start else f"-{own_start.name}"
            if finished.config.stage3.task == "titles":
                if own_start not in by_titles:
                    by_titles[own_start] = TunedLm(
                        f"sft{suffix}", untuned, own_start.finished, answers=RANKING_ADAPTER
                    )
                aligned.append(AlignedLm(name, finished, by_titles[own_start]))
                continue
            if own_start not in by_answers:
                by_answers[own_start] = TunedLm(
                    f"sft-pointwise{suffix}", untuned, own_start.finished, titles=ADAPTER, pointwise=True
                )
            aligned.append(AlignedLm(name, finished, by_answers[own_start]))
        return cls(untuned, tuned, start, by_titles, by_answers, aligned)

    @property
    def starts(self) -> list[TunedLm]:
        """`by_titles` and `by_answers`, as far as something started there."""
        used = [system.start for system in self.aligned]
        return [start for start in (*self.by_titles.values(), *self.by_answers.values()) if start in used]

    @property
    def ranking(self) -> list[System]:
        """What is ranked with: a start under the name that it has beside what is aligned."""
        tuned = [self.by_titles.get(system, system) for system in self.tuned]
        pointwise = [start for start in self.starts if start.pointwise]
        return [self.untuned, *tuned, *self.aligned, *pointwise]


@dataclass(frozen=True)
class Evaluation:
    """The log and all systems of a run.

    Attributes:
        run: the evaluation.
        log: the event log.
        crms: all CRMs.
        gate_crm: the one that gates, trained on all samples.
        lms: systems of stages 2 and 3 with the LM; None where CRMs are compared alone (`SYSTEM=none`).
        towers: two-tower systems.
    """

    run: Run
    log: EventLog
    crms: list[CrmSystem]
    gate_crm: CrmSystem
    lms: LmSystems | None
    towers: list[Towers]

    @classmethod
    def open(cls, run: Run) -> Evaluation:
        """Open the parents; LMs are loaded when they are asked."""
        log = EventLog.open(run.parents[Role.LOG].folder)
        check_holds_out(log)
        retrieval = None
        if Role.NEIGHBORS in run.parents:
            retrieval = Retrieval.open(run.parents[Role.NEIGHBORS].folder, log)
        opened = {
            name: Crm.open(stage, log, retrieval, run.cache)
            for name, stage in run.systems[Group.CRMS].items()
        }
        crms = [CrmSystem(name, crm, texts_lm(run, crm)) for name, crm in opened.items()]
        gate = run.parents[Role.CRM].name
        lms = None
        if retrieval is not None and Role.LM in run.parents:
            lms = LmSystems.open(run, OpenLm(run, log, retrieval, crms))
        towers = run.systems.get(Group.TOWERS, {})
        return cls(
            run=run,
            log=log,
            crms=crms,
            gate_crm=next(system for system in crms if system.crm.made_by.name == gate),
            lms=lms,
            towers=[Towers(name, stage, run, log) for name, stage in towers.items()],
        )

    @property
    def config(self) -> EvaluateConfig:
        """What is measured."""
        return self.run.config.evaluate

    @cached_property
    def lm_rows(self) -> str:
        """Row set of the test split on which LMs answer Yes or No; of a large log it is said how many."""
        rows = len(self.log.rows("test", "all"))
        name = sized(self.config.ctr_rows, rows)
        if name not in (self.config.ctr_rows, "all"):
            say(f"LMs answer on {name} of {rows:,} test rows (evaluate.ctr_rows=all: on all of them)")
        return name

    @property
    def aligned(self) -> Sequence[AlignedLm]:
        """Systems of stage 3."""
        return self.lms.aligned if self.lms is not None else []

    @cached_property
    def of_unrated(self) -> list[CatalogScorer]:
        """The baselines that know something of items that nobody rated, where such items are held out."""
        return of_unrated(self.run, self.log)

    @property
    def beside(self) -> CrmSystem | None:
        """The CRM beside which LMs stand: the one that gates, if it answers Yes or No; None: no CRM does."""
        answering = [system for system in self.crms if Task.CTR in system.tasks]
        if self.gate_crm in answering:
            return self.gate_crm
        return answering[-1] if answering else None

    @cached_property
    def stacked(self) -> list[Stacked]:
        """The stacking controls, as far as their parts are there.

        `refit`: the out-of-fold CRM's representation, fitted on the rows that stage 2 tunes on. `blend` and
        `blend-refit`: the logits of plain LoRA and of the CRM beside it, or of `refit`, fitted on validation
        rows.
        """
        if self.lms is None:
            return []
        refit = self._refit(self.lms.start)
        stacked: list[Stacked] = [] if refit is None else [refit]
        lora = next((system for system in self.lms.tuned if system.name == "lora"), None)
        if lora is None:
            return stacked
        valid = self.log.rows("valid", self.config.blend_rows)
        if self.beside is not None:
            stacked.append(Blend("blend", self.log, [self.beside, lora], valid, lora.lm))
        if refit is not None:
            stacked.append(Blend("blend-refit", self.log, [refit, lora], valid, lora.lm))
        return stacked

    def _refit(self, tuned: TunedLm) -> Refit | None:
        """A new last layer of the gate's CRM, of the version that left the tuning rows out."""
        gate = self.gate_crm.crm
        held_out = next((crm.crm for crm in self.crms if crm.crm.is_held_out_version_of(gate)), None)
        if held_out is None:
            return None
        rows = self.log.rows("train", tuned.finished.config.subsample)
        return Refit("refit", self.log, held_out, rows)

    def ranking_rows(self, kind: str) -> tuple[Rows, NDArray[np.int32]]:
        """Rows `[R]` of the ranking task and their candidates `[R, C]`.

        Args:
            kind: of the candidates, e.g. `uniform20`; those of `hard20` lie with the neighbors.
        """
        folder = self.run.parents[Role.NEIGHBORS].folder if kind.startswith("hard") else None
        rows, lists = self.log.ranking("test", kind, folder)
        return rows[: self.config.ranking_rows], lists[: self.config.ranking_rows]
