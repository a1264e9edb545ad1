"""A frozen LM with an adapter, as Lightning trains it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from recllm.console import say
from recllm.errors import StageError
from recllm.files import load_weights
from recllm.lm.logprobs import candidate_logps
from recllm.metrics import ranking_values
from recllm.pipeline.run import Run
from recllm.training.checkpoints import best
from recllm.training.micro_batch_module import MicroBatchModule
from recllm.training.sharding import ShardedStrategy, shard


class AdapterModule(MicroBatchModule):
    """A frozen LM with an adapter; its checkpoints hold only what trains: frozen LM weights are in none."""

    def __init__(self, model: Any) -> None:
        """Train the adapter of `model`."""
        super().__init__(model)
        self.sharded = False
        self.hr = MeanMetric()
        self.ndcg = MeanMetric()

    def configure_model(self) -> None:
        """Shard the frozen LM, where the strategy says so."""
        if isinstance(self.trainer.strategy, ShardedStrategy) and not self.sharded:
            say(shard(self, self.model, self.trainer.strategy.root_device))
            self.sharded = True

    def score_candidates(self, batch: dict[str, Any]) -> Tensor:
        """Update and log `valid/hr@1`, `valid/ndcg@10` of a batch of candidates; their scores `[B, C]`."""
        logps = candidate_logps(self.model, batch)
        values = ranking_values(logps.float().cpu().numpy(), batch["chosen"].cpu().numpy())
        for name, metric in (("hr@1", self.hr), ("ndcg@10", self.ndcg)):
            metric.update(torch.from_numpy(values[name]).float())
            self.log(f"valid/{name}", metric, add_dataloader_idx=False)
        return logps

    def load_best(self, run: Run, monitor: str) -> None:
        """Take the adapter weights of the checkpoint with the best score of a monitor."""
        state = load_weights(best(run, monitor))["state_dict"]
        self.on_load_checkpoint({"state_dict": state})
        self.load_state_dict(state, strict=False)

    @property  # type: ignore[misc]
    def strict_loading(self) -> bool:
        """False: a checkpoint lacks the frozen weights; `on_load_checkpoint` checks the others."""
        return False

    def _trainable(self) -> set[str]:
        """Names of the weights that train."""
        return {name for name, value in self.named_parameters() if value.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop what is frozen."""
        names = self._trainable()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not hold exactly what trains."""
        differing = self._trainable() ^ set(checkpoint["state_dict"])
        if differing:
            raise StageError(
                f"the checkpoint differs from this model in {min(differing)}; remove the stage's checkpoints "
                "and run make again"
            )
