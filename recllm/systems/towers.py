"""Two towers as a system: a tuned encoder reads users and items apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog.log import EventLog, Rows
from recllm.lm.towers import TwoTowers, tower_scores
from recllm.pipeline.finished import Finished
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.systems import compatibility
from recllm.systems.system import Kind, Scores, System, labels_as_text, tuning_cost
from recllm.systems.texts import tower_prompts
from recllm.training.precision import device_of


class Towers(System):
    """Two towers over one encoder; scores are kept under what they are made of.

    Args:
        name: of the system.
        stage: that tuned it.
        run: what asks: its prompts, device and cache.
        log: the event log.
    """

    kind = Kind.TOWERS

    def __init__(self, name: str, stage: Finished, run: Run, log: EventLog) -> None:
        """See the class; nothing is loaded before it is asked."""
        super().__init__(name, made_by=stage, lm=stage.manifest.metrics["encoder"])
        self.finished = stage
        self.run = run
        self.log = log

    def ctr(self, rows: Rows) -> Scores:
        """See `System`."""
        return self._logits(rows, None)

    def rank(self, rows: Rows, lists: NDArray[np.int32]) -> Scores:
        """See `System`: the CTR logit of every candidate."""
        return self._logits(rows, lists)

    def cost(self) -> dict[str, float]:
        """See `System`."""
        return tuning_cost(self.finished.manifest)

    def labels_read(self) -> dict[str, float]:
        """See `System`: what the encoder has read."""
        return labels_as_text(self.finished.manifest.metrics)

    def _logits(self, rows: Rows, lists: NDArray[np.int32] | None) -> Scores:
        """CTR logits `[n]` of the rows' own items, or `[n, C]` of lists; computed once."""

        def compute() -> NDArray[np.float32]:
            config = self.run.config
            compatibility.check_same_prompts(self.finished, config)
            model, tokenizer, context = TwoTowers.load(self.finished.export)
            prompts = tower_prompts(config, self.log, tokenizer, context)
            history = self.log.recent(rows, config.prompt.history)
            model = model.to(device_of(config.trainer))
            return tower_scores(model, prompts, tokenizer.pad_token_id, rows, history, lists)

        made_of = [self.run.parents[Role.LOG].identity, self.finished.identity]
        pairs = [rows.tolist(), None if lists is None else lists.tolist()]
        identity = [made_of, self.run.file.config["prompt"], pairs]
        return self.run.cache.array(f"logits-{self.finished.name}", identity, compute)
