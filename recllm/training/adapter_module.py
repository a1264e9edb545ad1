"""A frozen LM with an adapter, as Lightning trains it."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torchmetrics import MeanMetric

from recllm.console import say
from recllm.errors import StageError
from recllm.files import load_weights
from recllm.lm.logprobs import candidate_logps
from recllm.metrics import ranking_values
from recllm.pipeline.run import Run
from recllm.training.callbacks import WEIGHTS, broken, part_of, rows_of
from recllm.training.checkpoints import best
from recllm.training.sharding import ShardedStrategy, shard


def summed(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """What a step returns, of what its micro-batches did: losses add up, other figures are weighted means."""
    if len(outputs) == 1:
        return outputs[0]
    weights: dict[str, Any] = {}
    totals: dict[str, Any] = {}
    for output in outputs:
        for name, value in output.items():
            if name in ("loss", WEIGHTS):
                continue
            weight = output[WEIGHTS][name]
            totals[name] = totals.get(name, 0) + value * weight
            weights[name] = weights.get(name, 0) + weight
    # A figure that no micro-batch counts rows of has weight 0, and counts as nothing.
    means = {name: total / weights[name] if weights[name] else total for name, total in totals.items()}
    return {"loss": sum(output["loss"] for output in outputs), **means, WEIGHTS: weights}


class AdapterModule(lightning.LightningModule):
    """A frozen LM with an adapter; its checkpoints hold only what trains: frozen LM weights are in none."""

    has_gradients = False
    """Whether micro-batches of the present step had their backward passes when Lightning begins its own."""

    def __init__(self, model: Any) -> None:
        """Train the adapter of `model`."""
        super().__init__()
        self.model = model
        self.rows_of_step: list[int] = []
        self.sharded = False
        self.hr = MeanMetric()
        self.ndcg = MeanMetric()

    def configure_model(self) -> None:
        """Shard the frozen LM, where the strategy says so."""
        if isinstance(self.trainer.strategy, ShardedStrategy) and not self.sharded:
            say(shard(self, self.model, self.trainer.strategy.root_device))
            self.sharded = True

    def loss(self, batch: Any) -> dict[str, Any]:
        """A micro-batch's share of the step's loss; figures beside it, and their weights (`WEIGHTS`)."""
        raise NotImplementedError

    def training_step(self, batch: list[Any], index: int) -> dict[str, Any]:
        """The loss of a step: the backward pass of each micro-batch but the last is done here.

        Their gradients are not reduced over processes: that is done behind the last one's backward pass, by
        whom a step is known to have only one.

        Raises:
            SIGTERMException: between two micro-batches of a process that trains alone and has got SIGTERM.
        """
        self.model.train()
        outputs = []
        self.has_gradients = len(batch) > 1
        if self.has_gradients and part_of(self.trainer, index) == 0:
            self.optimizers(use_pl_optimizer=False).zero_grad()  # type: ignore[union-attr]
        for micro_batch in batch[:-1]:
            output = self.loss(micro_batch)
            loss = output["loss"] / self.trainer.accumulate_grad_batches
            with torch.autocast(self.device.type, enabled=False):
                self.trainer.strategy.backward(loss, None)
            outputs.append({**output, "loss": output["loss"].detach()})
            if self.trainer.received_sigterm and self.trainer.world_size == 1:
                raise SIGTERMException
        outputs.append(self.loss(batch[-1]))
        return summed(outputs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Nothing where micro-batches have their gradients already: Lightning calls it behind the forward."""
        if not self.has_gradients:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def score_candidates(self, batch: dict[str, Any]) -> Tensor:
        """Update and log `valid/hr@1`, `valid/ndcg@10` of a batch of candidates; their scores `[B, C]`."""
        logps = candidate_logps(self.model, batch)
        values = ranking_values(logps.float().cpu().numpy(), batch["chosen"].cpu().numpy())
        for name, metric in (("hr@1", self.hr), ("ndcg@10", self.ndcg)):
            metric.update(torch.from_numpy(values[name]).float())
            self.log(f"valid/{name}", metric, add_dataloader_idx=False)
        return logps

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Stop before a gradient that is not finite reaches the weights."""
        if self.trainer.precision == "16-mixed":
            return  # its scaler meets such gradients by design, skips the step and lowers the scale
        is_finite = [value.grad.isfinite().all() for value in self.parameters() if value.grad is not None]
        if is_finite and not torch.stack(is_finite).all():
            raise StageError(broken("a gradient", self.trainer.global_step, self.rows_of_step))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Remember which rows of the log the step reads, all its parts together."""
        if part_of(self.trainer, batch_idx) == 0:
            self.rows_of_step = []
        self.rows_of_step += rows_of(batch)

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
