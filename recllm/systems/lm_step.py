"""The language model as the last step of a cascade that answers queries."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.config.schema import Config
from recllm.errors import StageError
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.queries import Queries
from recllm.lm.adapters import adapter_folder, adapter_inputs
from recllm.lm.predict import candidate_scores
from recllm.paths import ADAPTER, RANKING_ADAPTER
from recllm.pipeline.finished import Finished
from recllm.retrieval.stored import Retrieval
from recllm.systems import compatibility
from recllm.systems.cascade import score_by_length
from recllm.systems.catalog import Items
from recllm.systems.crm import Crm
from recllm.systems.lm_systems import AdaptedLm, Opened


class LmStep:
    """A system of stage 2 or 3, which orders lists as it does in an evaluation; nothing is kept.

    All titles of a list stand behind one prompt, and several lists go through the LM at once, each with the
    gate of its own user. Where a system compares answers, each item has a prompt of its own.

    One adapter is open at a time: the one that ranks, or the one that answers Yes or No. Who asks for both in
    turn sets `most_open` to 2, and has two LMs in memory.

    Args:
        config: of the cascade: prompts, wording, LM and trainer.
        lm: the LM's stage.
        stage: that tuned it.
        log: the trained log.
        retrieval: nearest events, for prompts that show them.
        crm: the CRM that gates.
        batch_size: lists of one forward pass.
    """

    name = "lm"

    def __init__(
        self,
        config: Config,
        lm: Finished,
        stage: Finished,
        log: EventLog,
        retrieval: Retrieval,
        crm: Crm,
        batch_size: int,
    ) -> None:
        """Checks that the system goes with the cascade's prompts; nothing is loaded before it is asked."""
        compatibility.check_same_prompts(stage, config)
        self.config = config
        self.stage = stage
        self.batch_size = batch_size
        self.is_aligned = stage.file.stage == "stage3"
        self.pointwise = self.is_aligned and stage.config.stage3.task == "answers"
        self.own_gates = self.is_aligned and stage.config.stage3.gate == "item"
        self._lm = AdaptedLm(config, lm, log, retrieval, [crm])
        if adapter_inputs(stage.folder / self._ranking).representation_kind == "shuffled":
            raise StageError(
                f"{stage.name} is a control whose users have each other's gates; wanted a system that reads "
                "its own user, e.g. SYSTEM=reclora"
            )

    @property
    def _ranking(self) -> str:
        return adapter_folder(self.stage.folder, ADAPTER if self.is_aligned else RANKING_ADAPTER).name

    @property
    def most_open(self) -> int:
        """How many adapters stay open."""
        return self._lm.most_open

    @most_open.setter
    def most_open(self, count: int) -> None:
        self._lm.most_open = count

    @property
    def opened(self) -> Opened:
        """The language model that orders lists, opened where it is not yet."""
        return self._open(self._ranking)

    def scores(self, queries: Queries, items: Items) -> NDArray[np.float32]:
        """Log-probability of each item's title behind its query's prompt, or of Yes; see `Step`."""
        opened = self.opened
        lm = opened.lm.for_queries(queries)
        crm = None if opened.crm is None else opened.crm.for_queries(queries)

        def score(which: Rows, lists: Items) -> NDArray[np.float32]:
            rows = queries.rows[which]
            if self.pointwise:
                task: Any = lm.verdicts(rows, lists, crm, opened.retrieved, has_chosen=False)
                return candidate_scores(opened.model, task, max(1, self.batch_size // 4))
            task = lm.titles(rows, lists, crm, self.own_gates, has_chosen=False)
            return candidate_scores(opened.model, task, self.batch_size)

        return score_by_length(items, score)

    def answers(self, queries: Queries, items: Items) -> NDArray[np.float32]:
        """Probability of Yes (against No) for one item of each query, float32 `[Q]`, items `[Q]`."""
        opened = self._open(ADAPTER)
        lm = opened.lm.for_queries(queries)
        crm = None if opened.crm is None else opened.crm.for_queries(queries)
        task = lm.verdicts(queries.rows, items[:, None], crm, opened.retrieved, has_chosen=False)
        size = max(1, 4 * self.batch_size)
        return np.exp(candidate_scores(opened.model, task, size).reshape(len(items)))

    def _open(self, adapter: str) -> Opened:
        return self._lm.open(self.stage, adapter)
