"""The language model as the last step of a cascade."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.config.schema import Config
from recllm.errors import StageError
from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.log import EventLog
from recllm.eventlog.queries import Queries
from recllm.lm.adapters import adapter_folder, adapter_inputs, load_adapter
from recllm.lm.predict import candidate_scores
from recllm.paths import ADAPTER, RANKING_ADAPTER
from recllm.pipeline.finished import Finished
from recllm.retrieval.stored import Retrieval
from recllm.systems import compatibility
from recllm.systems.crm import Crm
from recllm.systems.lm import Lm
from recllm.systems.lm_systems import Opened
from recllm.training.precision import device_of

Items = NDArray[np.int32]


class LmStep:
    """A system of stage 2 or 3, which orders lists as it does in an evaluation.

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
        crm: the CRM that gates; None: nothing is gated.
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
        crm: Crm | None,
        batch_size: int,
    ) -> None:
        """Checks that the system goes with the cascade's prompts; nothing is loaded before it is asked."""
        compatibility.check_same_prompts(stage, config)
        self.config = config
        self.lm = lm
        self.stage = stage
        self.log = log
        self.retrieval = retrieval
        self.crm = crm
        self.batch_size = batch_size
        self.is_aligned = stage.file.stage == "stage3"
        self.pointwise = self.is_aligned and stage.config.stage3.task == "answers"
        self.own_gates = self.is_aligned and stage.config.stage3.gate == "item"
        self.most_open = 1
        self._opened: dict[Path, Opened] = {}
        if adapter_inputs(self._ranking).representation_kind == "shuffled":
            raise StageError(
                f"{stage.name} is a control whose users have each other's gates; wanted a system that reads "
                "its own user, e.g. SYSTEM=reclora"
            )

    @property
    def _ranking(self) -> Path:
        return adapter_folder(self.stage.folder, ADAPTER if self.is_aligned else RANKING_ADAPTER)

    @property
    def opened(self) -> Opened:
        """The language model that orders lists, opened where it is not yet."""
        return self._open(self._ranking)

    def scores(self, queries: Queries, items: Items) -> NDArray[np.float32]:
        """Log-probability of each item's title behind its query's prompt, or of Yes; see `Step`."""
        opened = self.opened
        scores = np.full(items.shape, -np.inf, np.float32)
        lm = opened.lm.for_queries(queries)
        crm = None if opened.crm is None else opened.crm.for_queries(queries)
        lengths = (items >= FIRST_ID).sum(1)
        # Lists of one length go together: a prompt and a gate read all of its list, and nothing else.
        for length in np.unique(lengths[lengths > 0]):
            which = np.flatnonzero(lengths == length)
            rows = queries.rows[which]
            lists = items[which, :length]
            if self.pointwise:
                task: Any = lm.verdicts(rows, lists, crm, opened.retrieved, has_chosen=False)
                size = max(1, self.batch_size // 4)
            else:
                task = lm.titles(rows, lists, crm, self.own_gates, has_chosen=False)
                size = self.batch_size
            scores[which, :length] = candidate_scores(opened.model, task, size)
        return scores

    def answers(self, queries: Queries, items: Items) -> NDArray[np.float32]:
        """Probability of Yes (against No) for one item of each query, float32 `[Q]`, items `[Q]`."""
        opened = self._open(adapter_folder(self.stage.folder, ADAPTER))
        lm = opened.lm.for_queries(queries)
        crm = None if opened.crm is None else opened.crm.for_queries(queries)
        task = lm.verdicts(queries.rows, items[:, None], crm, opened.retrieved, has_chosen=False)
        size = max(1, 4 * self.batch_size)
        return np.exp(candidate_scores(opened.model, task, size).reshape(len(items)))

    def _open(self, adapter: Path) -> Opened:
        if adapter in self._opened:
            return self._opened[adapter]
        while len(self._opened) >= self.most_open:  # more LMs need not fit into memory
            del self._opened[next(iter(self._opened))]
        gate_input, virtual = adapter_inputs(adapter)
        lm = Lm.open(self.config, self.lm, self.log, self.retrieval, virtual)
        model = load_adapter(lm.model, adapter).eval().to(device_of(self.config.trainer))
        crm = None if self.crm is None else self.crm.read_as(gate_input, self.config.seed)
        opened = Opened(lm, model, crm, compatibility.retrieves(self.stage))
        self._opened[adapter] = opened
        return opened
