"""An evaluation: scores of all systems of a run, and the rows of the results table that follow from them."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm import metrics
from recllm.evaluation import bootstrap
from recllm.evaluation.bootstrap import Difference, Resampled
from recllm.evaluation.comparisons import Pairs, compare, ctr_pairs, ranking_pairs
from recllm.evaluation.results import ResultRow, of_seed
from recllm.evaluation.rows import cost, named
from recllm.evaluation.slices import Slices
from recllm.evaluation.stacking import BLENDS, CONTROLS, REFIT_RIDGE, apply_blend, logistic_blend
from recllm.eventlog.log import EventLog, Rows
from recllm.files import now
from recllm.lm.predict import Scores
from recllm.paths import ADAPTER, RANKING_ADAPTER
from recllm.pipeline.manifest import commit, hardware
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Group, Role
from recllm.retrieval.stored import Retrieval
from recllm.systems.counting import Cooccurrence, popularity_ctr, popularity_rank
from recllm.systems.crm import Crm
from recllm.systems.scores import LmSystems, TowerSystems

ROWS = "rows.json"

STARTS = {"sft": RANKING_ADAPTER, "sft-pointwise": ADAPTER}
"""Systems from which stage 3 starts, by what it compares (titles, answers): the adapter of its stage 2."""

SEEN_BY_LM = ("answers_as_text", "ratings_as_text")


class Evaluation:
    """Scores of all systems of a run, and the rows of the results table that follow from them."""

    def __init__(self, run: Run) -> None:
        """Open parents and row sets."""
        self.run, self.config = run, run.config.evaluate
        self.log = EventLog.open(run.parents[Role.LOG].folder)
        retrieval = (
            Retrieval.open(run.parents[Role.NEIGHBORS].folder, self.log)
            if Role.NEIGHBORS in run.parents
            else None
        )
        crms = run.systems[Group.CRMS]
        self.crms = {name: Crm.open(crm, self.log, retrieval, run.cache) for name, crm in crms.items()}
        self.lms = (
            LmSystems(run, self.log, retrieval, self.crms) if retrieval and Role.LM in run.parents else None
        )
        """Systems of stages 2 and 3; None where CRMs are compared alone (`SYSTEM=none`)."""
        self.towers = TowerSystems(run, self.log)
        self.made_by = {
            f"{g}:{name}": stage for g, group in run.systems.items() for name, stage in group.items()
        }
        self.folders = {role: stage.name for role, stage in self.made_by.items()}
        likes = [name for name, crm in self.crms.items() if not crm.ranks]
        self.gate = next(name for name, crm in crms.items() if crm.name == run.parents[Role.CRM].name)
        self.likes = self.gate if self.gate in likes else likes[-1] if likes else None
        """The CRM beside which LMs stand in the CTR task: the gate's, if that is no ranker."""
        self.start = ""
        if self.lms:
            tuned = run.systems[Group.TUNED]
            self.start = next(
                name for name, stage in tuned.items() if stage.name == run.parents[Role.START].name
            )
        aligned = run.systems.get(Group.ALIGNED, {})
        tasks = {name: stage.config.stage3.task for name, stage in aligned.items()}
        self.aligned = {name: "sft" if task == "titles" else "sft-pointwise" for name, task in tasks.items()}
        """Systems of stage 3, and which of `STARTS` each started from."""
        self.two_towers = [role for role in self.made_by if role.startswith("towers:")]
        self.everything = self.log.rows("test", "all")
        self.asked = self.log.rows("test", self.config.ctr_rows)
        self.point = run.file.sweep or None
        self.rows: list[ResultRow] = []

    def lm_logits(self, role: str, rows: Rows, adapter: str = ADAPTER) -> Scores:
        """Yes/No logits `[n]` of an LM system; role `lm` is the LM untuned."""
        assert self.lms is not None  # asked for only where there are such systems
        return self.lms.logits(role, adapter, rows)

    def _ranking(self, kind: str) -> tuple[Rows, NDArray[np.int32]]:
        lying = self.run.parents[Role.NEIGHBORS].folder if kind.startswith("hard") else None
        rows, candidates = self.log.ranking("test", kind, lying)
        return rows[: self.config.ranking_rows], candidates[: self.config.ranking_rows]

    def ctr(self) -> None:
        """Rows of the CTR task."""
        log, crm = self.log, self.crms[self.likes] if self.likes else None
        changed: dict[str, dict[str, float]] = {}
        liking = popularity_ctr(log)
        asked = f"test/{self.config.ctr_rows}"
        row_sets = ({} if self.point else {"test/all": self.everything}) | {asked: self.asked}
        for name, rows in row_sets.items():
            scored: dict[str, Any] = {"popularity": liking[log.item[rows]]}
            scored |= {n: opened.logits(rows) for n, opened in self.crms.items() if not opened.ranks}
            if self.lms and name == asked:
                scored |= {} if self.point else {"lm": self.lm_logits("lm", rows)}
                tuned = [role for role in self.made_by if role.startswith("tuned:")]
                changed["lm"] = self.lms.change("lm", ADAPTER)
                for role in tuned:  # one system after the other: each is opened once
                    scored[role[6:]] = self.lm_logits(role, rows)
                    changed[role[6:]] = self.lms.change(role, ADAPTER)
                scored |= {role[7:]: self.towers.logits(role, rows) for role in self.two_towers}
                scored |= self._stacked(rows, scored.get("lora"))
            labels, bands = log.label[rows], Slices.of(log, rows)
            pairs, held = ctr_pairs(scored, self.crms, self.likes), self._resampled(scored, rows)
            crm_auc = metrics.auc(crm.logits(rows), labels) if crm else None
            for system, logits in scored.items():
                figures = metrics.ctr_metrics(logits, labels, log.user[rows]) | bands.metrics(logits, labels)
                base = metrics.auc(scored["popularity"], labels)
                figures["relative_improvement"] = metrics.relative_improvement(figures["auc"], base)
                figures |= changed.get(system, {})
                is_lm = system not in ("popularity", *self.crms)
                differences = compare(system, pairs[system], held)
                self._add(system, "ctr", name, len(rows), figures, differences, crm_auc if is_lm else None)

    def _resampled(self, scored: dict[str, Any], rows: Rows) -> dict[str, Resampled]:
        """AUC of each system over resamples of the users."""
        labels, users, draws = self.log.label[rows], self.log.user[rows], self.config.bootstrap
        return {system: bootstrap.of_auc(logits, labels, users, draws) for system, logits in scored.items()}

    def _stacked(self, rows: Rows, lora: Scores | None) -> dict[str, Any]:
        """`CONTROLS`: what logistic regressions make of the same parts without a gate, where those are there.

        `refit`: the out-of-fold CRM's representation, fitted on the rows that stage 2 tunes on. `blend` and
        `blend-refit`: plain LoRA's logit and the CRM's, or `refit`'s, fitted on validation rows.
        """
        log, valid = self.log, self.log.rows("valid", self.config.blend_rows)
        beside: dict[str, list[Any]] = {}
        if self.likes:
            beside["blend"] = [self.crms[self.likes].logits(asked) for asked in (valid, rows)]
        if held := self.crms.get(f"{self.gate}-heldout"):
            tuned = log.rows("train", self.run.parents[Role.START].config.subsample)
            last = logistic_blend(held.representations(tuned), log.label[tuned], REFIT_RIDGE)
            beside["blend-refit"] = [
                apply_blend(held.representations(asked), last) for asked in (valid, rows)
            ]
        stacked = {"refit": beside["blend-refit"][1]} if held else {}
        if lora is not None:
            ours = self.lm_logits("tuned:lora", valid)
            for name, (fitted, asked) in beside.items():
                weights = logistic_blend(np.stack([fitted, ours], 1), log.label[valid])
                stacked[name] = apply_blend(np.stack([asked, lora], 1), weights)
        return stacked

    def alignment_cost(self) -> None:
        """Yes/No rows of what stage 3 starts from and of what it makes of it: what alignment costs there."""
        rows = self.log.rows("test", self.config.aligned_rows)
        labels = self.log.label[rows]
        crm_auc = metrics.auc(self.crms[self.likes].logits(rows), labels) if self.likes else None
        scored = {
            start: self.lm_logits(f"tuned:{self.start}", rows, adapter)
            for start, adapter in STARTS.items()
            if start in self.aligned.values()
        }
        scored |= {system: self.lm_logits(f"aligned:{system}", rows) for system in self.aligned}
        held = self._resampled(scored, rows)
        for system, logits in scored.items():
            start = [self.aligned[system]] if system in self.aligned else []
            figures = metrics.ctr_metrics(logits, labels, self.log.user[rows])
            name = f"test/{self.config.aligned_rows}"
            self._add(system, "ctr", name, len(rows), figures, compare(system, start, held), crm_auc)

    def ranking(self) -> None:
        """Rows of the ranking task, for each kind of candidates."""
        asked = {"lm": ("lm", ADAPTER)} if self.lms else {}
        for role in self.made_by:
            family, _, name = role.partition(":")
            if family in ("tuned", "aligned"):
                system = "sft" if role == f"tuned:{self.start}" else name
                asked[system] = (role, RANKING_ADAPTER if family == "tuned" else ADAPTER)
        pointwise = [system for system, start in self.aligned.items() if start != "sft"]
        if pointwise:
            asked["sft-pointwise"] = (f"tuned:{self.start}", ADAPTER)
            pointwise.append("sft-pointwise")
        told, said = {}, {}
        for system, (role, adapter) in asked.items():  # one system after the other: each is opened once
            assert self.lms is not None
            for kind in self.config.candidates:
                rows, lists = self._ranking(kind)
                if system in pointwise:
                    told[system, kind] = self.lms.verdicts(role, adapter, kind, rows, lists)[..., None]
                    continue
                told[system, kind] = self.lms.titles(role, adapter, kind, rows, lists)
                if count := self.config.generate_rows:
                    said[system, kind] = self.lms.generated(role, adapter, kind, rows[:count], lists[:count])
        counts = popularity_rank(self.log)
        together = {directed: Cooccurrence(self.log, directed=directed) for directed in (False, True)}
        for kind in self.config.candidates:
            rows, lists = self._ranking(kind)
            scored: dict[str, Any] = {
                "popularity": counts[lists],
                "cooccurrence": together[False].score(rows, lists),
                "cooccurrence-directed": together[True].score(rows, lists),
                **({self.likes: self.crms[self.likes].logits(rows, lists)} if self.likes else {}),
                **{role[7:]: self.towers.logits(role, rows, lists) for role in self.two_towers},
            }
            scored |= {f"crm-{n}": crm.logits(rows, lists) for n, crm in self.crms.items() if crm.ranks}
            scored |= {system: told[system, kind][..., 0] for system in asked}
            target = (lists == self.log.item[rows][:, None]).argmax(1)
            extra: dict[str, dict[str, float]] = {system: {} for system in scored}
            for system in asked.keys() - set(pointwise):
                held = told[system, kind][np.arange(len(rows)), target, 1]
                extra[system]["constrained_hr@1"] = float(held.mean())
                if (system, kind) in said:
                    valid, hit = said[system, kind].mean(0)
                    extra[system] |= {"valid_ratio": float(valid), "generated_hr@1": float(hit)}
            pairs = ranking_pairs(scored, asked, self.aligned)
            self._rank(kind, rows, target, scored, pairs, extra)

    def _rank(
        self,
        kind: str,
        rows: Rows,
        target: NDArray[np.int64],
        scored: dict[str, NDArray[Any]],
        pairs: Pairs,
        extra: dict[str, dict[str, float]],
    ) -> None:
        log = self.log
        start, end = log.history(rows)
        gap = log.timestamp[rows] - log.timestamp[end - 1]
        gap[start == end] = metrics.LONG_AGO  # a user's first event comes after none
        strata = metrics.gap_strata(gap) if log.timed else {}
        values = {system: metrics.ranking_values(scores, target) for system, scores in scored.items()}
        draws = self.config.bootstrap
        held = {
            system: bootstrap.of_mean(of_rows["hr@1"], log.user[rows], draws)
            for system, of_rows in values.items()
        }
        for system, of_rows in values.items():
            figures = metrics.means(of_rows) | extra[system]
            for stratum, chosen in strata.items():
                figures[f"hr@1/{stratum}"] = metrics.means({"hr@1": of_rows["hr@1"]}, chosen)["hr@1"]
                figures[f"rows/{stratum}"] = float(chosen.sum())
            differences = compare(system, pairs[system], held)
            self._add(system, "ranking", f"test/{len(rows)}", len(rows), figures, differences, None, kind)

    def _add(
        self,
        system: str,
        task: str,
        row_set: str,
        count: int,
        figures: dict[str, Any],
        differences: dict[str, Difference],
        crm_auc: float | None,
        kind: str | None = None,
    ) -> None:
        role = next((r for r in self.made_by if r.partition(":")[2] == system), None)
        if system in STARTS:
            role = f"tuned:{self.start}"
        aligned = role is not None and role.startswith("aligned:")
        counted = system in ("popularity", "cooccurrence", "cooccurrence-directed", *CONTROLS)
        is_lm = system == "lm" or (role is not None and not role.startswith("crm:"))
        towers = role in self.two_towers
        stage = self.made_by[role].file.stage if role else "none" if counted else "lm" if is_lm else "stage1"
        lm = self.run.config.lm.model.name if system in BLENDS else None
        if role and (towers or role.startswith("tuned:")):
            figures |= cost(self.made_by[role].manifest)
        if is_lm:
            made = (self.made_by[role] if role and towers else self.run.parents[Role.LM]).manifest.metrics
            figures |= {key: float(made.get(key, 0)) for key in SEEN_BY_LM}
            lm = made["encoder"] if towers else self.run.config.lm.model.name
        against = {named(o, self.point, self.folders): asdict(d) for o, d in differences.items()}
        paired_with = next(iter(against), None)
        shown = re.sub(r"-k\d+$", "", system) if aligned else system  # K has a column of its own
        row = ResultRow(
            system=named(shown, self.point, self.folders),
            stage="stage2" if towers else stage,
            task=task,
            row_set=row_set,
            rows=count,
            metrics=figures,
            candidates=kind,
            k=self.made_by[role].config.stage3.negatives
            if role and aligned and system != "sft-continued"
            else None,
            lm=lm,
            variant=self.run.file.variant,
            paired_with=paired_with,
            **(against.pop(paired_with) if paired_with else {}),
            against=against,
            crm_auc_same_rows=crm_auc,
            commit=commit(),
            date=now(),
            hardware=hardware(),
            command=os.environ.get("RECLLM_COMMAND", "make evaluate"),
        )
        self.rows.append(of_seed(row, self.run.config.seed))
