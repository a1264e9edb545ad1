"""The LM as a system: untuned, tuned by stage 2, aligned by stage 3.

Scores are computed once and kept under what they are made of, so that an interrupted or extended evaluation
computes only what is missing.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from recllm import processes
from recllm.config.schema import Config
from recllm.console import say
from recllm.eventlog.log import EventLog, Rows
from recllm.lm.adapters import adapter_folder, adapter_inputs, load_adapter
from recllm.lm.forgetting import BLOCKS, fix_gate_at_mean, held_out_text, text_loss, update_size
from recllm.lm.generate import valid_ratio
from recllm.lm.predict import answer_scores, answer_states, candidate_scores, title_choices
from recllm.lm.tasks import NextTitleLists, YesNoCandidates, YesNoPrompts
from recllm.paths import ADAPTER, RANKING_ADAPTER
from recllm.pipeline.finished import Finished
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.retrieval.stored import Retrieval
from recllm.systems import compatibility
from recllm.systems.crm import Crm, CrmSystem
from recllm.systems.lm import Lm
from recllm.systems.system import Kind, Scores, System, labels_as_text, tuning_cost
from recllm.text.pieces import Pieces
from recllm.training.precision import device_of

Prompted = TypeVar("Prompted", YesNoPrompts, NextTitleLists, YesNoCandidates)


@dataclass(frozen=True)
class Opened:
    """An LM that can be asked.

    Attributes:
        lm: turns rows into its input.
        model: the LM, with an adapter or without.
        crm: the CRM as the adapter's gate reads it; None: it reads none.
        retrieved: whether Yes/No prompts show the events nearest to the target.
    """

    lm: Lm
    model: Any
    crm: Crm | None
    retrieved: bool


class AdaptedLm:
    """A finished LM, open with one adapter at a time: several need not fit into memory.

    The last one stays open, so whoever asks many systems asks them one after the other. Who asks for several
    in turn sets `most_open`, and has as many LMs in memory.

    Args:
        config: of who asks: prompts, wording, LM and trainer.
        finished: the stage of the LM itself.
        log: the event log.
        retrieval: nearest events, for prompts that show them.
        crms: those that gate an adapter among them.
        pieces: as of `Lm.open`.
    """

    def __init__(
        self,
        config: Config,
        finished: Finished,
        log: EventLog,
        retrieval: Retrieval | None,
        crms: Sequence[Crm],
        pieces: Pieces | None = None,
    ) -> None:
        """See the class; nothing is loaded yet."""
        self.config = config
        self.finished = finished
        self.log = log
        self.retrieval = retrieval
        self.crms = crms
        self.pieces = pieces
        self.most_open = 1
        self._opened: dict[tuple[str, str], Opened] = {}

    def open(self, stage: Finished, adapter: str) -> Opened:
        """The LM with an adapter.

        Args:
            stage: that tuned it; the LM's own stage: the LM is not tuned.
            adapter: folder of the adapter within the stage; empty: none.
        """
        key = (stage.name, adapter)
        if key not in self._opened:
            while len(self._opened) >= self.most_open:
                del self._opened[next(iter(self._opened))]
            self._opened[key] = self._load(stage, adapter) if adapter else self._load_untuned()
        return self._opened[key]

    def close(self) -> None:
        """Forget what is open."""
        self._opened = {}

    def _load_untuned(self) -> Opened:
        lm = Lm.open(self.config, self.finished, self.log, self.retrieval, pieces=self.pieces)
        return Opened(lm, lm.model.to(device_of(self.config.trainer)), None, self.config.prompt.retrieved)

    def _load(self, stage: Finished, adapter: str) -> Opened:
        config = self.config
        compatibility.check_same_prompts(stage, config)
        folder = adapter_folder(stage.folder, adapter)
        gate_input, virtual = adapter_inputs(folder)
        lm = Lm.open(config, self.finished, self.log, self.retrieval, virtual, self.pieces)
        model = load_adapter(lm.model, folder).eval().to(device_of(config.trainer))
        crm = self._gate_crm(stage).read_as(gate_input, config.seed)
        return Opened(lm, model, crm, compatibility.retrieves(stage))

    def _gate_crm(self, stage: Finished) -> Crm:
        """The CRM that a system was tuned with, which may be one of its own that left the tuning rows out."""
        folder = stage.file.parents[Role.CRM]
        return next(crm for crm in self.crms if crm.made_by.name == folder)


class OpenLm(AdaptedLm):
    """The LM of an evaluation, which keeps what it answers.

    Args:
        run: the evaluation: its prompts, wording, trainer, cache and parents.
        log: the event log.
        retrieval: nearest events, for prompts that show them.
        crms: those that gate an adapter among them.
    """

    def __init__(self, run: Run, log: EventLog, retrieval: Retrieval, crms: Sequence[CrmSystem]) -> None:
        """See the class; nothing is loaded yet."""
        super().__init__(run.config, run.parents[Role.LM], log, retrieval, [system.crm for system in crms])
        self.run = run

    def kept(
        self,
        question: str,
        stage: Finished,
        adapter: str,
        given: object,
        compute: Callable[[], NDArray[Any]],
    ) -> NDArray[Any]:
        """What was computed for the same question to the same system, or is now.

        Args:
            question: a word for it.
            stage: that tuned the system; the LM's own stage: it is not tuned.
            adapter: folder of the adapter within the stage; empty: none.
            given: rows, lists and whatever else the answer depends on, as JSON takes it.
            compute: the answer.
        """
        parents = [self.run.parents[role].identity for role in (Role.LM, Role.NEIGHBORS, Role.LOG)]
        identity = [question, parents, stage.identity, adapter, self.run.file.config["prompt"], given]
        return self.run.cache.array(f"{question}-{stage.name}", identity, compute)


class LmSystem(System):
    """What all systems that are one LM have in common: how the two tasks are asked.

    Args:
        name: of the system.
        lm: opens the LM.
        stage: that tuned it; the LM's own stage: it is not tuned.
        answers: folder of the adapter that answers Yes or No; empty: none.
        titles: folder of the adapter that ranks; empty: none.
        pointwise: whether candidates are ranked by their Yes, each asked in a prompt of its own, instead of
            by the likelihood of their titles behind one prompt.
        k: as of `System`.
    """

    def __init__(
        self,
        name: str,
        lm: OpenLm,
        stage: Finished,
        *,
        answers: str = "",
        titles: str = "",
        pointwise: bool = False,
        k: int | None = None,
    ) -> None:
        """See the class; nothing is loaded before it is asked."""
        super().__init__(name, made_by=stage, lm=lm.run.config.lm.model.name, k=k)
        self.open_lm = lm
        self.finished = stage
        self.answers = answers
        self.titles = titles
        self.pointwise = pointwise

    @property
    def own_gates(self) -> bool:
        """Whether each candidate's title is gated by its own representation, not by the list's mean."""
        return False

    def ctr(self, rows: Rows) -> Scores:
        """See `System`: the logit of Yes against No."""

        def compute() -> NDArray[np.float32]:
            opened = self.open_lm.open(self.finished, self.answers)
            task = say_cut(opened.lm.answers(rows, opened.crm, opened.retrieved))
            return answer_scores(opened.model, task, self._batch_size())

        return self.open_lm.kept("ctr", self.finished, self.answers, rows.tolist(), compute)

    def rank(self, rows: Rows, lists: NDArray[np.int32]) -> Scores:
        """See `System`: the log-probability of every title, or of Yes to every candidate."""
        if self.pointwise:
            return self._verdicts(rows, lists)
        return self._choices(rows, lists)[..., 0]

    def milliseconds(self, rows: Rows, lists: NDArray[np.int32]) -> float:
        """See `System`: the time of one process."""
        self.open_lm.open(self.finished, self.titles)  # loading is no part of it
        with processes.alone():
            started = time.monotonic()
            if self.pointwise:
                self._score_verdicts(rows, lists)
            else:
                self._score_titles(rows, lists)
            return 1000 * (time.monotonic() - started) / len(rows)

    def decoding(self, rows: Rows, lists: NDArray[np.int32], generated: int) -> dict[str, float]:
        """See `System`.

        Returns:
            `constrained_hr@1`: how often decoding that may only spell candidates ends at the row's own item.
            Of `generated` rows also `valid_ratio`, how often the freely decoded title is a candidate's, and
            `generated_hr@1`, how often it is the row's own item's.
        """
        if self.pointwise:
            return {}
        chosen = (lists == self.open_lm.log.item[rows][:, None]).argmax(1)
        at_chosen = self._choices(rows, lists)[np.arange(len(rows)), chosen, 1]
        figures = {"constrained_hr@1": float(at_chosen.mean())}
        if generated:
            valid, hit = self._generated(rows[:generated], lists[:generated]).mean(0)
            figures["valid_ratio"] = float(valid)
            figures["generated_hr@1"] = float(hit)
        return figures

    def labels_read(self) -> dict[str, float]:
        """See `System`: what the LM has read, whatever was tuned on it."""
        return labels_as_text(self.open_lm.finished.manifest.metrics)

    def _choices(self, rows: Rows, lists: NDArray[np.int32]) -> NDArray[np.float32]:
        """Log-probability of every candidate's title, and where constrained decoding ends, `[n, C, 2]`."""
        given = [rows.tolist(), lists.tolist()]
        compute = functools.partial(self._score_titles, rows, lists)
        return self.open_lm.kept("titles", self.finished, self.titles, given, compute)

    def _score_titles(self, rows: Rows, lists: NDArray[np.int32]) -> NDArray[np.float32]:
        opened = self.open_lm.open(self.finished, self.titles)
        task = say_cut(opened.lm.titles(rows, lists, opened.crm, self.own_gates, has_chosen=False))
        return title_choices(opened.model, task, self._batch_size(4))

    def _verdicts(self, rows: Rows, lists: NDArray[np.int32]) -> NDArray[np.float32]:
        """Log-probability of Yes to every candidate, `[n, C]`."""
        given = [rows.tolist(), lists.tolist()]
        compute = functools.partial(self._score_verdicts, rows, lists)
        return self.open_lm.kept("verdicts", self.finished, self.titles, given, compute)

    def _score_verdicts(self, rows: Rows, lists: NDArray[np.int32]) -> NDArray[np.float32]:
        opened = self.open_lm.open(self.finished, self.titles)
        task = say_cut(opened.lm.verdicts(rows, lists, opened.crm, opened.retrieved, has_chosen=False))
        return candidate_scores(opened.model, task, self._batch_size(16))

    def _generated(self, rows: Rows, lists: NDArray[np.int32]) -> NDArray[np.float32]:
        """Per row 1 where the freely decoded title is a candidate, and where it is the own one, `[n, 2]`."""

        def compute() -> NDArray[np.float32]:
            opened = self.open_lm.open(self.finished, self.titles)
            task = opened.lm.titles(rows, lists, opened.crm)
            return valid_ratio(opened.model, opened.lm.tokenizer, task, self._batch_size(4))

        given = [rows.tolist(), lists.tolist()]
        return self.open_lm.kept("generated", self.finished, self.titles, given, compute)

    def _batch_size(self, prompts: int = 1) -> int:
        """Rows of a forward pass, each of which is as large as so many Yes/No prompts."""
        return max(1, self.open_lm.run.config.evaluate.batch_size // prompts)

    def _forgetting(self, valid_rows: str) -> dict[str, float]:
        """Loss on held-out text, and of an adapter the size of its update; of a gated one at its mean gate.

        Args:
            valid_rows: row set of the validation split over which a gate is averaged; empty: there is none.
        """
        config = self.open_lm.run.config
        history, block = config.prompt.history, config.lm.training.block

        def compute() -> NDArray[Any]:
            log = self.open_lm.log
            opened = self.open_lm.open(self.finished, self.answers)
            model = opened.model
            text = held_out_text(log, opened.lm.prompts.pieces, history, block)
            if opened.crm is not None:
                self.open_lm.close()  # the gated adapter is taken off
                model = fix_gate_at_mean(model, opened.crm.representations(log.rows("valid", valid_rows)))
            figures = {"text_loss": text_loss(model, *text)}
            if self.answers:
                figures |= update_size(model)
            return np.array([tuple(figures.values())], [(name, np.float64) for name in figures])

        given = [BLOCKS, block, valid_rows]
        kept = self.open_lm.kept("forgetting", self.finished, self.answers, given, compute)
        return {name: float(kept[name][0]) for name in kept.dtype.names or ()}


class UntunedLm(LmSystem):
    """The LM before anything is tuned.

    Args:
        lm: opens it.
    """

    kind = Kind.LM

    def __init__(self, lm: OpenLm) -> None:
        """See the class."""
        super().__init__("lm", lm, lm.finished)

    def forgetting(self) -> dict[str, float]:
        """See `System`: its loss on held-out text (`recllm.lm.forgetting.held_out_text`), nats a token."""
        return self._forgetting("")


class TunedLm(LmSystem):
    """The LM with an adapter of stage 2, which is selected for each task on validation rows of that task.

    Args:
        name: of the system.
        untuned: the LM that it was tuned from.
        stage: stage 2.
        answers: folder of the adapter that answers Yes or No.
        titles: folder of the adapter that ranks.
        pointwise: as of `LmSystem`.
    """

    kind = Kind.TUNED

    def __init__(
        self,
        name: str,
        untuned: UntunedLm,
        stage: Finished,
        *,
        answers: str = ADAPTER,
        titles: str = RANKING_ADAPTER,
        pointwise: bool = False,
    ) -> None:
        """See the class."""
        super().__init__(name, untuned.open_lm, stage, answers=answers, titles=titles, pointwise=pointwise)
        self.untuned = untuned

    @property
    def mixes_loras(self) -> bool:
        """See `System`."""
        return self.finished.config.stage2.adapter.kind == "reclora"

    def cost(self) -> dict[str, float]:
        """See `System`."""
        return tuning_cost(self.finished.manifest)

    def forgetting(self) -> dict[str, float]:
        """See `System`.

        Returns:
            `text_loss` as of the untuned LM, `forgotten`, by how much it is more than the untuned LM's, and
            `update`, the size of the update; an adapter with a gate is taken at the gate's mean over the
            validation rows of its stage 2. Of a soft prompt nothing: no LoRA is the same for every row.
        """
        gate_input, virtual = adapter_inputs(adapter_folder(self.finished.folder, self.answers))
        if virtual:
            return {}
        valid_rows = "" if gate_input is None else self.finished.config.stage2.fit.valid_rows
        figures = self._forgetting(valid_rows)
        figures["forgotten"] = figures["text_loss"] - self.untuned.forgetting()["text_loss"]
        return figures


class AlignedLm(LmSystem):
    """The LM with an adapter of stage 3.

    Args:
        name: of the system.
        stage: stage 3.
        start: what it was aligned from.
    """

    kind = Kind.ALIGNED

    def __init__(self, name: str, stage: Finished, start: TunedLm) -> None:
        """See the class."""
        config = stage.config.stage3
        super().__init__(
            name,
            start.open_lm,
            stage,
            answers=ADAPTER,
            titles=ADAPTER,
            pointwise=config.task == "answers",
            k=None if config.loss == "sft" else config.negatives,
        )
        self._start = start

    @property
    def table_name(self) -> str:
        """See `System`: a name may end with its K (`s-dpo-k15`), which is left away."""
        return re.sub(r"-k\d+$", "", self.name)

    @property
    def start(self) -> TunedLm:
        """See `System`."""
        return self._start

    @property
    def own_gates(self) -> bool:
        """See `LmSystem`."""
        return self.finished.config.stage3.gate == "item"


def say_cut(task: Prompted) -> Prompted:
    """The task; where the context cuts prompts, it is said how many."""
    if cut := task.count_cut():
        say(f"{cut:,} prompts are longer than {task.prompts.max_length} tokens and lose their oldest events")
    return task


def untuned_states(run: Run, task: YesNoPrompts, model: Any) -> NDArray[np.float32]:
    """What the LM head reads behind the prompts of a task, before anything is tuned, `[n, width]`.

    All gated systems share it, but for those with a soft prompt, whose drawn tokens stand in the prompt.

    Args:
        run: a stage with the LM as a parent.
        task: the prompts.
        model: the LM, or one whose adapter changes nothing yet; it is used where nothing is cached.
    """
    parents = [run.parents[role].identity for role in (Role.LOG, Role.NEIGHBORS, Role.LM)]
    config, virtual = run.file.config, run.config.stage2.adapter.soft_prompt
    drawn = [virtual, run.config.seed] if virtual else []
    given = [config["prompt"], config["stage2"]["mixed_prompts"], task.rows.tolist(), drawn]
    return run.cache.array("answer-states", [parents, given], lambda: answer_states(model, task))
