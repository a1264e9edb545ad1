"""A module whose steps are cut into micro-batches, so that they fit into memory, as Lightning trains it."""

from __future__ import annotations

import gc
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from recllm import processes
from recllm.console import say
from recllm.errors import StageError
from recllm.lm.forwards import is_out_of_memory
from recllm.training.callbacks import WEIGHTS, broken, part_of, rows_of
from recllm.training.sharding import ShardedStrategy


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


class MicroBatchModule(lightning.LightningModule):
    """Trains on batches that are lists of micro-batches; who derives says what the loss of one is."""

    has_gradients = False
    """Whether the present step has had its backward passes when Lightning begins its own."""
    recomputes = False
    """Whether layers are computed anew in the backward pass."""

    def __init__(self, model: Any) -> None:
        """Train `model`, or what of it asks for gradients."""
        super().__init__()
        self.model = model
        self.rows_of_step: list[int] = []

    @property
    def transformer(self) -> Any:
        """The part of `model` whose layers can be computed anew: transformers' own."""
        return self.model

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
        if not self.recomputes and getattr(self.transformer, "supports_gradient_checkpointing", False):
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
        """From here on its layers keep no activations for the backward pass (gradient checkpointing)."""
        # Not reentrant: an adapter's gate is shared by all layers, and their inputs need no gradient.
        self.transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
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
