"""Scores of LM systems, and what tuning changed in them: computed once, kept under what made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from recllm.console import say
from recllm.eventlog.log import EventLog, Rows
from recllm.lm.adapters import load_adapter, needs, selected
from recllm.lm.forgetting import BLOCKS, at_mean_gate, held_out, text_loss, update_size
from recllm.lm.generate import valid_ratio
from recllm.lm.predict import Scores, answer_scores, answer_states, candidate_scores, title_choices
from recllm.lm.tasks import NextTitleLists, YesNoCandidates, YesNoPrompts
from recllm.lm.towers import TwoTowers, tower_scores
from recllm.pipeline.finished import Finished
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Group, Role
from recllm.retrieval.stored import Retrieval
from recllm.systems import compatibility
from recllm.systems.crm import Crm
from recllm.systems.lm import Lm
from recllm.systems.texts import tower_prompts
from recllm.training.precision import device_of

Opened = tuple[Lm, Any, Crm | None, bool]
Asked = TypeVar("Asked", YesNoPrompts, NextTitleLists, YesNoCandidates)


def told(task: Asked) -> Asked:
    """The task; where the context cuts prompts, it is said how many."""
    if cut := task.cut():
        say(f"{cut:,} prompts are longer than {task.prompts.max_length} tokens and lose their oldest events")
    return task


def untuned_states(run: Run, task: YesNoPrompts, model: Any) -> Scores:
    """What the LM head reads behind the prompts of a task, before anything is tuned, `[n, width]`.

    All gated systems share it, but for those with a soft prompt, whose drawn tokens stand in the prompt.

    Args:
        run: a stage with the LM as a parent.
        task: the prompts.
        model: the LM, or one whose adapter changes nothing yet; it is used where nothing is cached.
    """
    made_of = [run.parents[role].identity for role in (Role.LOG, Role.NEIGHBORS, Role.LM)]
    config, virtual = run.file.config, run.config.stage2.adapter.soft_prompt
    drawn = [virtual, run.config.seed] if virtual else []
    what = [config["prompt"], config["stage2"]["mixed_prompts"], task.rows.tolist(), drawn]
    return run.cache.array("answer-states", [made_of, what], lambda: answer_states(model, task))


class LmSystems:
    """The untuned LM (role `lm`) and every adapter (roles `tuned:*`, `aligned:*`) of an evaluation."""

    def __init__(self, run: Run, log: EventLog, retrieval: Retrieval, crms: dict[str, Crm]) -> None:
        """Systems among a run's parents; `crms` are those that gate them, by name."""
        self.run, self.log, self.retrieval, self.crms = run, log, retrieval, crms
        self.opened: tuple[tuple[str, str], Opened] | None = None

    def logits(self, role: str, adapter: str, rows: Rows) -> Scores:
        """Yes/No logits `[n]` of the rows' own items."""

        def compute() -> Scores:
            lm, model, crm, retrieved = self._open(role, adapter)
            task = told(lm.answers(rows, crm, retrieved))
            return answer_scores(model, task, self._size())

        return self._keep(f"ctr-{role}", role, adapter, rows.tolist(), compute)

    def titles(self, role: str, adapter: str, kind: str, rows: Rows, lists: NDArray[np.int32]) -> Scores:
        """Log-probability of every candidate, and where constrained decoding ends, `[n, C, 2]`."""

        def compute() -> Scores:
            lm, model, crm, _ = self._open(role, adapter)
            task = told(lm.titles(rows, lists, crm, self._each(role)))
            return title_choices(model, task, self._size(4))

        return self._keep(f"{kind}-{role}", role, adapter, [rows.tolist(), lists.tolist()], compute)

    def verdicts(self, role: str, adapter: str, kind: str, rows: Rows, lists: NDArray[np.int32]) -> Scores:
        """Log-probability of Yes to every candidate, `[n, C]`."""

        def compute() -> Scores:
            lm, model, crm, retrieved = self._open(role, adapter)
            task = told(lm.verdicts(rows, lists, crm, retrieved))
            return candidate_scores(model, task, self._size(16))

        name = f"verdicts-{kind}-{role}"
        return self._keep(name, role, adapter, [rows.tolist(), lists.tolist()], compute)

    def generated(self, role: str, adapter: str, kind: str, rows: Rows, lists: NDArray[np.int32]) -> Scores:
        """Per row 1 where the freely generated title is a candidate, and where it is the target, `[n, 2]`."""

        def compute() -> Scores:
            lm, model, crm, _ = self._open(role, adapter)
            return valid_ratio(model, lm.tokenizer, lm.titles(rows, lists, crm), self._size(4))

        name = f"generated-{kind}-{role}"
        return self._keep(name, role, adapter, [rows.tolist(), lists.tolist()], compute)

    def change(self, role: str, adapter: str) -> dict[str, float]:
        """What tuning changed in the LM; of role `lm` what it was before, of a soft prompt nothing.

        Returns:
            `text_loss` on held-out text (`recllm.lm.forgetting.held_out`), nats a token; of an adapter also
            `forgotten`, by how much it is more than the untuned LM's, and `update_size`. An adapter with a
            gate is taken at the gate's mean over the validation rows of its stage 2.
        """
        run, rows = self.run, ""
        if role != "lm":
            reads, virtual = needs(self._stage(role).folder / adapter)
            if virtual:
                return {}  # no LoRA is the same for every row
            rows = self._stage(role).config.stage2.fit.valid_rows if reads else ""
        history, block = run.config.prompt.history, run.config.lm.training.block

        def compute() -> NDArray[Any]:
            lm, model, crm, _ = self._open(role, adapter)
            text = held_out(self.log, lm.prompts.pieces, history, block)
            if crm is not None:
                self.opened = None  # the gated adapter is taken off
                model = at_mean_gate(model, crm.representations(self.log.rows("valid", rows)))
            found = {"text_loss": text_loss(model, *text)}
            found |= update_size(model) if role != "lm" else {}
            return np.array([tuple(found.values())], [(name, np.float64) for name in found])

        kept = self._keep(f"change-{role}", role, adapter, [BLOCKS, block, rows], compute)
        found = {name: float(kept[name][0]) for name in kept.dtype.names or ()}
        if role != "lm":
            found["forgotten"] = found["text_loss"] - self.change("lm", adapter)["text_loss"]
        return found

    def _size(self, share: int = 1) -> int:
        """Rows of a forward pass whose rows are `share` times as large as a Yes/No prompt."""
        return max(1, self.run.config.evaluate.batch_size // share)

    def _keep(
        self, name: str, role: str, adapter: str, what: object, compute: Callable[[], NDArray[Any]]
    ) -> NDArray[Any]:
        made_of = [self.run.parents[parent].identity for parent in (Role.LM, Role.NEIGHBORS, Role.LOG)]
        if role != "lm":
            made_of.append(self._stage(role).identity)
        form = self.run.file.config["prompt"]
        return self.run.cache.array(name, [role, made_of, adapter, form, what], compute)

    def _stage(self, role: str) -> Finished:
        """What made a system: `tuned:lora` of the evaluation's parents."""
        group, _, name = role.partition(":")
        return self.run.systems[Group(group)][name]

    def _open(self, role: str, adapter: str) -> Opened:
        """The LM with the system's adapter, its gate's CRM, and whether its Yes/No prompts are retrieved.

        The last one stays open: everything that is asked of a system is asked in turn.
        """
        if self.opened is None or self.opened[0] != (role, adapter):
            self.opened = None  # two of them need not fit into memory
            self.opened = (role, adapter), self._load(role, adapter)
        return self.opened[1]

    def _load(self, role: str, adapter: str) -> Opened:
        device = device_of(self.run.config.trainer)
        if role == "lm":
            lm = Lm.open(self.run.config, self.run.parents[Role.LM], self.log, self.retrieval)
            return lm, lm.model.to(device), None, self.run.config.prompt.retrieved
        stage = self._stage(role)
        compatibility.check_same_prompts(stage, self.run.config)
        saved = selected(stage.folder, adapter)
        reads, virtual = needs(saved)
        lm = Lm.open(self.run.config, self.run.parents[Role.LM], self.log, self.retrieval, virtual)
        model = load_adapter(lm.model, saved).eval().to(device)
        retrieved = compatibility.retrieves(stage)
        crm = self.crms[self._gate_of(stage)].read_as(reads, self.run.config.seed)
        return lm, model, crm, retrieved

    def _each(self, role: str) -> bool:
        """Whether a system's titles were aligned each with its own item's gate."""
        return role.startswith("aligned:") and self._stage(role).config.stage3.gate == "item"

    def _gate_of(self, stage: Finished) -> str:
        """The CRM that a system was tuned with: `sim`, or `sim-heldout` of `representation=out_of_fold`."""
        crm = stage.file.parents[Role.CRM]
        return next(name for name in self.crms if self.run.systems[Group.CRMS][name].name == crm)


class TowerSystems:
    """The two-tower systems (roles `towers:*`) of an evaluation; their scores lie with the run."""

    def __init__(self, run: Run, log: EventLog) -> None:
        """Systems among a run's parents."""
        self.run, self.log = run, log

    def logits(self, role: str, rows: Rows, lists: NDArray[np.int32] | None = None) -> Scores:
        """CTR logits `[n]` of the rows' own items, or `[n, C]` of lists."""

        def compute() -> Scores:
            config = self.run.config
            stage = self.run.systems[Group.TOWERS][role.partition(":")[2]]
            compatibility.check_same_prompts(stage, config)
            model, tokenizer, context = TwoTowers.load(stage.export)
            prompts = tower_prompts(config, self.log, tokenizer, context)
            history = self.log.recent(rows, config.prompt.history)
            model = model.to(device_of(config.trainer))
            return tower_scores(model, prompts, tokenizer.pad_token_id, rows, history, lists)

        towers = self.run.systems[Group.TOWERS][role.partition(":")[2]]
        made_of = [self.run.parents[Role.LOG].identity, towers.identity]
        what = [rows.tolist(), None if lists is None else lists.tolist()]
        identity = [role, made_of, self.run.file.config["prompt"], what]
        return self.run.cache.array(f"pairs-{role}", identity, compute)
