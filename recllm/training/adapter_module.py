"""A frozen LM with an adapter, as Lightning trains it."""

from __future__ import annotations

import gc
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torchmetrics import MeanMetric

from recllm import processes
from recllm.console import say
from recllm.errors import StageError
from recllm.files import load_weights
from recllm.lm.forwards import is_out_of_memory
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


class StepStart:
    """What a step, or a part of it, begins with: gradients of the parts before, and the random state."""

    def __init__(self, module: lightning.LightningModule) -> None:
        """Keep copies."""
        self.gradients = {
            name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None
        }
        self.random = torch.get_rng_state()
        self.random_of_gpu = torch.cuda.get_rng_state() if module.device.type == "cuda" else None

    def restore(self, module: lightning.LightningModule) -> None:
        """Begin anew; what is left of the attempt before is freed."""
        for name, value in module.named_parameters():
            value.grad = self.gradients[name].clone() if name in self.gradients else None
        torch.set_rng_state(self.random)
        gc.collect()
        if self.random_of_gpu is not None:
            torch.cuda.set_rng_state(self.random_of_gpu)
            torch.cuda.empty_cache()


class AdapterModule(lightning.LightningModule):
    """A frozen LM with an adapter; its checkpoints hold only what trains: frozen LM weights are in none."""

    has_gradients = False
    """Whether the present step has had its backward passes when Lightning begins its own."""
    recomputes = False
    """Whether layers are computed anew in the backward pass."""

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
        """The loss of a step, or of a part of it; the backward pass of each micro-batch is done here.

        Where memory does not do, in whichever process, all processes forget what they have of it and begin
        anew with less: micro-batches of half as many tokens, then layers that are computed anew in the
        backward pass. That holds for all steps that follow. An LM that is sharded cannot do so, since its
        processes wait for each other within a forward.

        Raises:
            SIGTERMException: between two micro-batches of a process that trains alone and has got SIGTERM.
            StageError: the least that a step can do with is too much.
        """
        self.model.train()
        part = part_of(self.trainer, index)
        if part == 0:
            self.optimizers(use_pl_optimizer=False).zero_grad()  # type: ignore[union-attr]
        self.has_gradients = True
        start = StepStart(self)
        while (outputs := self._outputs(batch)) is None:
            start.restore(self)
            batch = self._with_less_memory(batch, part)
        step = summed(outputs)
        return {**step, "loss": self._with_gradients(step["loss"])}

    def _outputs(self, batch: list[Any]) -> list[dict[str, Any]] | None:
        """What each micro-batch gives, with its gradients; None where memory does not do in some process."""
        outputs: list[dict[str, Any]] = []
        is_enough = True
        try:
            for place, micro_batch in enumerate(batch):
                output = self.loss(micro_batch)
                loss = output["loss"] / self.trainer.accumulate_grad_batches
                with torch.autocast(self.device.type, enabled=False):
                    self.trainer.strategy.backward(loss, None)
                outputs.append({**output, "loss": output["loss"].detach()})
                is_last = place == len(batch) - 1
                if self.trainer.received_sigterm and self.trainer.world_size == 1 and not is_last:
                    raise SIGTERMException
        except RuntimeError as error:
            if not is_out_of_memory(error) or not self._can_repeat():
                raise
            is_enough = False
        # The others agree outside of the handler: it holds all that the failed forward has made.
        if self._can_repeat():
            is_enough = processes.all_agree(is_enough)
        return outputs if is_enough else None

    def _can_repeat(self) -> bool:
        """Whether a step can be done again: no process is left within a forward, and all can tell."""
        strategy = self.trainer.strategy
        return not isinstance(strategy, ShardedStrategy) and self.trainer.world_size == processes.world()

    def _with_less_memory(self, batch: list[Any], part: int) -> list[Any]:
        """The micro-batches of a step as they need less memory than `batch` does; it is said how."""
        step = self.trainer.global_step
        loaders: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        smaller: list[Any] | None = loaders.cut_smaller(step, part, len(batch), self.device)
        if smaller is not None:
            say(
                f"out of memory in step {step + 1}, which is done again: from here on a forward has "
                f"{loaders.budget.tokens:,} tokens at most"
            )
            return smaller
        if not self.recomputes and getattr(self.model, "supports_gradient_checkpointing", False):
            self.recompute()
            say(
                f"out of memory in step {step + 1} with one row a forward, which is done again: from here on "
                "layers are computed anew in the backward pass"
            )
            return batch
        raise StageError(
            f"out of memory in step {step + 1} with one row a forward and recomputed layers; wanted shorter "
            "prompts (prompt.history), a smaller LM, or trainer.strategy=sharded"
        )

    def recompute(self) -> None:
        """From here on the LM's layers keep no activations for the backward pass (gradient checkpointing)."""
        # Not reentrant: an adapter's gate is shared by all layers, and their inputs need no gradient.
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.recomputes = True

    def _with_gradients(self, loss: Tensor) -> Tensor:
        """The loss as Lightning takes it, whose own backward pass adds nothing to the gradients.

        Of several processes it passes by every weight that trains: behind that, gradients are reduced.
        """
        if self.trainer.world_size == 1:
            return loss.detach().requires_grad_()
        zeros = [value.reshape(-1)[0] * 0 for value in self.parameters() if value.requires_grad]
        return loss.detach() + torch.stack([zero.float() for zero in zeros]).sum()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Nothing where a step has its gradients already: Lightning calls it behind the forward."""
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
