"""A frozen causal LM, and everything that turns rows of the log into its input."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recllm.config.schema import Config
from recllm.console import say
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.queries import Queries
from recllm.lm.config import LmConfig
from recllm.lm.layout import SEPARATE, SHARED
from recllm.lm.load import context_length, load_lm
from recllm.lm.probe import attention_windows, find_layout
from recllm.lm.tasks import NextTitleLists, YesNoCandidates, YesNoPrompts
from recllm.pipeline.finished import Finished
from recllm.retrieval.stored import Retrieval
from recllm.systems.crm import Crm
from recllm.systems.texts import build_pieces
from recllm.text.prompts import Prompts


@dataclass(frozen=True)
class Lm:
    """A frozen causal LM and everything that turns rows of the log into its input."""

    model: Any
    tokenizer: Any
    prompts: Prompts
    log: EventLog
    config: Config
    retrieval: Retrieval | None
    layout: str = SHARED

    @classmethod
    def open(
        cls, config: Config, stage: Finished, log: EventLog, retrieval: Retrieval | None, reserved: int = 0
    ) -> Lm:
        """Load a finished LM.

        Args:
            config: of the stage that asks: its prompts, wording, LM and trainer.
            stage: the LM's stage.
            log: the event log.
            retrieval: nearest events, for prompts that show them.
            reserved: tokens of the context that prompts leave free.
        """
        model, tokenizer = causal_lm(config.lm.model, stage)
        pieces = build_pieces(config, log, tokenizer)
        context = context_length(config.lm.model, model.config)
        layout = find_layout(model, context)
        if layout == SEPARATE:
            window = min(attention_windows(model.config), default=context)
            mend = f"; lm.model.context={window} would mend it" if window < context else ""
            say(
                f"{config.lm.model.name} cannot share a prompt of {context:,} tokens among titles: "
                f"each title is a sequence of its own, several times slower{mend}"
            )
        if config.trainer.attention == "flex":
            if not torch.cuda.is_available():
                raise ValueError("trainer.attention=flex needs a GPU; wanted sdpa here")
            if layout == SHARED:
                model.set_attn_implementation("flex_attention")  # after the example, which runs on any device
        prompts = Prompts(log, pieces, context - reserved)
        return cls(model, tokenizer, prompts, log, config, retrieval, layout)

    def for_queries(self, queries: Queries) -> Lm:
        """The same LM, asked of queries."""
        return dataclasses.replace(
            self,
            prompts=self.prompts.for_queries(queries),
            log=queries.log,
            retrieval=None if self.retrieval is None else self.retrieval.for_queries(queries),
        )

    def history(self, rows: Rows, retrieved: bool) -> Rows:
        """Short histories `[B, k]` of Yes/No prompts: nearest to the target, or the most recent events."""
        k = self.config.prompt.history
        if retrieved:
            assert self.retrieval is not None
            return self.retrieval.nearest(rows, k)
        return self.log.recent(rows, k)

    def answers(self, rows: Rows, crm: Crm | None, retrieved: bool, mixed: bool = False) -> YesNoPrompts:
        """The Yes/No task on rows; a gate reads the CRM's representation of each row's own target.

        With `mixed`, all rows follow once more with the other kind of history.
        """
        history = self.history(rows, retrieved)
        if mixed:
            history = np.concatenate([history, self.history(rows, not retrieved)])
            rows = np.concatenate([rows, rows])
        return YesNoPrompts(self.prompts, rows, history, crm.representations(rows) if crm else None)

    def titles(
        self,
        rows: Rows,
        candidates: NDArray[np.int32],
        crm: Crm | None,
        each: bool = False,
        has_chosen: bool = True,
    ) -> NextTitleLists:
        """The next-title task on liked rows, after the most recent events, which tell nothing of the target.

        A gate reads the mean over all candidates of the CRM's representation; with `each` every title's own.
        Without `has_chosen` the rows' own items need not be among their candidates.
        """
        recent = self.log.recent(rows, self.config.prompt.history)
        representation = None
        if crm:
            representation = crm.each(rows, candidates) if each else crm.representations(rows, candidates)
        return NextTitleLists(
            self.prompts,
            self.log,
            rows,
            recent,
            candidates,
            representation,
            self.config.prompt.list_candidates,
            self.layout,
            has_chosen,
        )

    def verdicts(
        self,
        rows: Rows,
        candidates: NDArray[np.int32],
        crm: Crm | None,
        retrieved: bool,
        has_chosen: bool = True,
    ) -> YesNoCandidates:
        """The Yes/No task on every candidate of liked rows; a gate reads each candidate's representation.

        Without `has_chosen` the rows' own items need not be among their candidates.
        """
        k = self.config.prompt.history
        if retrieved:
            assert self.retrieval is not None
            history = self.retrieval.searcher.search(rows, candidates, k, "time")
        else:
            history = np.broadcast_to(self.log.recent(rows, k)[:, None], (*candidates.shape, k))
        representation = crm.each(rows, candidates) if crm else None
        return YesNoCandidates(self.prompts, self.log, rows, history, candidates, representation, has_chosen)

    def valid_titles(self, count: int, crm: Crm | None, each: bool = False) -> NextTitleLists:
        """The next-title task on stored validation rows, each once with every kind of candidate list."""
        return self.titles(*self._valid(count), crm, each)

    def valid_verdicts(self, count: int, crm: Crm | None, retrieved: bool) -> YesNoCandidates:
        """The Yes/No task on the candidates of the rows of `valid_titles`."""
        return self.verdicts(*self._valid(count), crm, retrieved)

    def _valid(self, count: int) -> tuple[Rows, NDArray[np.int32]]:
        parts = [self.log.ranking("valid", kind) for kind in self.log.candidate_kinds]
        rows = np.concatenate([rows[:count] for rows, _ in parts])
        return rows, np.concatenate([lists[:count] for _, lists in parts])


def causal_lm(config: LmConfig, stage: Finished) -> tuple[Any, Any]:
    """A frozen LM and its tokenizer: the one that a finished stage holds, or by hub id or folder."""
    return load_lm(config, stage.export if config.is_exported else None)
