"""Evaluation: every system on the test split, on the same rows, against every baseline, with intervals.

Each system's scores are kept in `scores/` under the identity of what made them, so that an interrupted or
extended evaluation computes only what is missing. Validation rows serve the stacking control; nothing is
selected here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm import metrics, parents
from recllm.bands import Bands
from recllm.blend import apply_blend, logistic_blend
from recllm.counting import Cooccurrence, popularity_ctr, popularity_rank
from recllm.data.log import Rows
from recllm.lm.adapters import load_adapter
from recllm.lm.generate import valid_ratio
from recllm.lm.infer import Scores, answer_scores, title_scores
from recllm.lm.tasks import Titles
from recllm.manifest import commit, digest, hardware, now
from recllm.paths import ADAPTER, RANKING_ADAPTER
from recllm.results import ResultRow, of_seed, write
from recllm.run import Run, main, read_config, say
from recllm.training import device_of

ROWS = "rows.json"
SEEN_BY_LM = ("answers_as_text", "ratings_as_text")


class Kept:
    """Scores on disk, by what made them."""

    def __init__(self, folder: Path) -> None:
        """Keep in `folder`."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, identity: object, compute: Callable[[], Scores]) -> Scores:
        """The stored scores, or those that `compute` returns, stored."""
        path = self.folder / f"{name.replace(':', '-')}-{digest(identity)[:16]}.npy"
        if not path.exists():
            temporary = Path(f"{path}.tmp.npy")
            np.save(temporary, compute())
            temporary.replace(path)
            say(f"  scored {name}")
        return np.load(path)


class Evaluation:
    """Scores of all systems of a run, and the rows of the results table that follow from them."""

    def __init__(self, run: Run) -> None:
        """Open parents and row sets."""
        self.run, self.config = run, run.config.evaluate
        self.log = parents.event_log(run)
        self.retrieval = parents.Retrieval.open(run, self.log)
        self.kept = Kept(run.folder / "scores")
        crms = [role for role in run.parents if role.startswith("crm:")]
        self.crms = {role[4:]: parents.Crm.open(run, self.log, self.retrieval, role) for role in crms}
        named = {folder: role for role, folder in run.parents.items() if ":" in role}
        self.gate = named[run.parents["stage1"]].partition(":")[2]
        self.start = named[run.parents["stage2"]].partition(":")[2]
        self.everything = self.log.rows("test", "all")
        self.asked = self.log.rows("test", self.config.ctr_rows)
        self.rows: list[ResultRow] = []

    def lm_logits(self, role: str, rows: Rows) -> Scores:
        """Yes/No logits `[n]` of an LM system; role `lm` is the LM untuned."""

        def compute() -> Scores:
            lm, model, crm, retrieved = self._open(role, ADAPTER)
            return answer_scores(model, lm.answers(rows, crm, retrieved), self.config.batch_size)

        return self.kept.get(f"ctr-{role}", [self._identity(role), rows.tolist()], compute)

    def lm_titles(self, role: str, kind: str, adapter: str) -> Scores:
        """Log-probabilities `[n, C]` of the stored candidates."""

        def compute() -> Scores:
            lm, model, crm, _ = self._open(role, adapter)
            return title_scores(model, self._task(lm, crm, kind))

        return self.kept.get(
            f"{kind}-{role}", [self._identity(role), self._ranking(kind)[0].tolist()], compute
        )

    def lm_valid_ratio(self, role: str, kind: str, adapter: str) -> Scores:
        """Per row 1 where the greedy title is a candidate, and 1 where it is the target: `[n, 2]`."""

        def compute() -> Scores:
            lm, model, crm, _ = self._open(role, adapter)
            return valid_ratio(model, lm.tokenizer, self._task(lm, crm, kind, self.config.generate_rows))

        identity = [self._identity(role), self.config.generate_rows, adapter]
        return self.kept.get(f"generated-{kind}-{role}", identity, compute)

    def _task(self, lm: parents.Lm, crm: parents.Crm | None, kind: str, count: int | None = None) -> Titles:
        rows, candidates = self._ranking(kind)
        return lm.titles(rows[:count], candidates[:count], crm)

    def _ranking(self, kind: str) -> tuple[Rows, NDArray[np.int32]]:
        rows, candidates = parents.ranking(self.run, self.log, "test", kind)
        return rows[: self.config.ranking_rows], candidates[: self.config.ranking_rows]

    def _identity(self, role: str) -> list[str]:
        roles = ("lm", "neighbours", "log", *({role} - {"lm"}))
        return [
            role,
            *(self.run.manifest(name).identity for name in roles),
            digest(self.run.content["config"]["prompt"]),
        ]

    def _open(self, role: str, adapter: str) -> tuple[parents.Lm, Any, parents.Crm | None, bool]:
        """The LM with the system's adapter, its gate's CRM, and whether its Yes/No prompts are retrieved."""
        lm = parents.Lm.open(self.run, self.log, self.retrieval)
        device = device_of(self.run.config.trainer)
        if role == "lm":
            return lm, lm.model.to(device), None, self.run.config.prompt.retrieved
        folder = self.run.parent(role)
        model = load_adapter(lm.model, folder / adapter).eval().to(device)
        gated = model.peft_config["default"].peft_type == "RECLORA"
        retrieved = read_config(folder)["config"]["prompt"]["retrieved"]
        return lm, model, self.crms[self._gate_of(folder)] if gated else None, retrieved

    def _gate_of(self, folder: Path) -> str:
        """The CRM that a system was tuned with: `sim`, or `sim-heldout` of `representation=out_of_fold`."""
        read = read_config(folder)["parents"]["stage1"]
        return next(name for name in self.crms if self.run.parents[f"crm:{name}"] == read)

    def ctr(self) -> None:
        """Rows of the CTR task."""
        log, gate = self.log, self.crms[self.gate]
        liking = popularity_ctr(log)
        for rows, name in ((self.everything, "test/all"), (self.asked, f"test/{self.config.ctr_rows}")):
            if name == "test/all" and self.config.ctr_rows == "all" and rows is self.asked:
                continue
            scored: dict[str, Any] = {"popularity": liking[log.item[rows]]}
            scored |= {crm: opened.logits(rows) for crm, opened in self.crms.items() if crm != "ranker"}
            pairs = {crm: "popularity" for crm in scored if crm != "popularity"}
            if len(rows) == len(self.asked) and name == f"test/{self.config.ctr_rows}":
                scored["lm"] = self.lm_logits("lm", rows)
                tuned = [role for role in self.run.parents if role.startswith("tuned:")]
                scored |= {role[6:]: self.lm_logits(role, rows) for role in tuned}
                pairs |= {system: self.gate for system in scored if system not in ("popularity", *self.crms)}
                if "lora" in scored:
                    scored["blend"] = self._blend(rows, gate.logits(rows), scored["lora"])
                    pairs |= {"blend": self.gate} | {s: "lora" for s in scored if s.startswith("reclora")}
            if "din" in scored and self.gate != "din":
                pairs[self.gate] = "din"
            labels, users, bands = log.label[rows], log.user[rows], Bands.of(log, rows)
            crm_auc = metrics.auc(gate.logits(rows), labels)
            for system, logits in scored.items():
                other = pairs.get(system)
                difference = other and metrics.paired_bootstrap_auc(
                    logits, scored[other], labels, users, self.config.bootstrap, seed=0
                )
                figures = metrics.ctr_metrics(logits, labels, users) | bands.metrics(logits, labels)
                base = metrics.auc(scored["popularity"], labels)
                figures["relative_improvement"] = metrics.relative_improvement(figures["auc"], base)
                is_lm = system not in ("popularity", *self.crms)
                self._add(
                    system, "ctr", name, len(rows), figures, other, difference, crm_auc if is_lm else None
                )

    def _blend(self, rows: Rows, crm: Scores, lora: Scores) -> Any:
        """Logistic regression on the gate CRM's logit and plain LoRA's, fitted on validation rows."""
        valid = self.log.rows("valid", self.config.blend_rows)
        features = np.stack([self.crms[self.gate].logits(valid), self.lm_logits("tuned:lora", valid)], 1)
        weights = logistic_blend(features, self.log.label[valid])
        return apply_blend(np.stack([crm, lora], 1), weights)

    def ranking(self) -> None:
        """Rows of the ranking task, for each kind of candidates."""
        log = self.log
        counts = popularity_rank(log)
        together = {False: Cooccurrence(log, directed=False), True: Cooccurrence(log, directed=True)}
        for kind in self.config.candidates:
            rows, candidates = self._ranking(kind)
            target = (candidates == log.item[rows][:, None]).argmax(1)
            scored: dict[str, Any] = {
                "popularity": counts[candidates],
                "cooccurrence": together[False].score(rows, candidates),
                "cooccurrence-directed": together[True].score(rows, candidates),
                self.gate: self.crms[self.gate].logits(rows, candidates),
                "crm-ranker": self.crms["ranker"].logits(rows, candidates),
                "lm": self.lm_titles("lm", kind, ADAPTER),
            }
            generated = {"lm": self.lm_valid_ratio("lm", kind, ADAPTER)} if self.config.generate_rows else {}
            pairs = {system: "popularity" for system in scored if system != "popularity"}
            for role in self.run.parents:
                family, _, name = role.partition(":")
                if family not in ("tuned", "aligned"):
                    continue
                system = "sft" if (family, name) == ("tuned", self.start) else name
                adapter = RANKING_ADAPTER if family == "tuned" else ADAPTER
                scored[system] = self.lm_titles(role, kind, adapter)
                if self.config.generate_rows:
                    generated[system] = self.lm_valid_ratio(role, kind, adapter)
                pairs[system] = "sft" if family == "aligned" else "lm"
            _, end = log.history(rows)
            strata = metrics.gap_strata(log.timestamp[rows] - log.timestamp[end - 1]) if log.timed else {}
            values = {system: metrics.ranking_values(scores, target) for system, scores in scored.items()}
            for system, of_rows in values.items():
                other = pairs.get(system)
                difference = other and metrics.paired_bootstrap(
                    of_rows["hr@1"], values[other]["hr@1"], log.user[rows], self.config.bootstrap, seed=0
                )
                figures = metrics.means(of_rows)
                for stratum, chosen in strata.items():
                    figures[f"hr@1/{stratum}"] = metrics.means({"hr@1": of_rows["hr@1"]}, chosen)["hr@1"]
                    figures[f"rows/{stratum}"] = float(chosen.sum())
                if system in generated:
                    figures["valid_ratio"], figures["generated_hr@1"] = map(float, generated[system].mean(0))
                name = f"test/{len(rows)}"
                self._add(system, "ranking", name, len(rows), figures, other, difference, None, kind)

    def _add(
        self,
        system: str,
        task: str,
        row_set: str,
        count: int,
        figures: dict[str, Any],
        other: str | None,
        difference: Any,
        crm_auc: float | None,
        kind: str | None = None,
    ) -> None:
        role = next((r for r in self.run.parents if r.partition(":")[2] == system), None)
        if system == "sft":
            role = f"tuned:{self.start}"
        aligned = role is not None and role.startswith("aligned:")
        counted = system in ("popularity", "cooccurrence", "cooccurrence-directed", "blend")
        is_lm = system == "lm" or (role is not None and not role.startswith("crm:"))
        if is_lm:
            figures |= {key: float(self.run.manifest("lm").metrics.get(key, 0)) for key in SEEN_BY_LM}
        row = ResultRow(
            system=system,
            stage=self.run.manifest(role).stage
            if role
            else ("none" if counted else "lm" if is_lm else "stage1"),
            task=task,
            row_set=row_set,
            rows=count,
            metrics=figures,
            candidates=kind,
            k=self.run.manifest(role).metrics["k"]
            if role and aligned and system != "sft-continued"
            else None,
            lm=self.run.config.lm.model.name if is_lm else None,
            delta=difference.delta if difference else None,
            interval95=list(difference.interval95) if difference else None,
            p_value=difference.p_value if difference else None,
            paired_with=other,
            crm_auc_same_rows=crm_auc,
            commit=commit(),
            date=now(),
            hardware=hardware(),
            command=os.environ.get("RECLLM_COMMAND", "make evaluate"),
        )
        self.rows.append(of_seed(row, self.run.config.seed))


def work(run: Run) -> None:
    """Score everything, write the rows of the table."""
    evaluation = Evaluation(run)
    evaluation.ctr()
    evaluation.ranking()
    write(run.folder / ROWS, evaluation.rows)
    headline = {
        f"{row.task}/{row.row_set}{'/' + row.candidates if row.candidates else ''}/{row.system}": row.metrics[
            "auc" if row.task == "ctr" else "hr@1"
        ]
        for row in evaluation.rows
    }
    run.finish([run.folder / ROWS], headline)


if __name__ == "__main__":
    sys.exit(main(work, sys.argv[1:]))
