"""The gate first: it learns with the LM head's meta-LoRAs, on states of the LM that are computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recllm.config.stages import FitConfig
from recllm.errors import StageError
from recllm.lm.logprobs import answer_loss
from recllm.lm.predict import Scores
from recllm.lm.tasks import YesNoPrompts
from recllm.training.loaders import Stream, plan_steps
from recllm.training.optimizer import optimizer


@torch.no_grad()
def check_logits(model: Any, passes: float) -> None:
    """Refuse an LM whose logits are not what its head gives: the head alone would learn other ones.

    Args:
        model: the LM with an adapter.
        passes: `stage2.gate_first`.

    Raises:
        StageError: a softcap or scale stands behind the head.
    """
    given: list[Tensor] = []

    def replace(module: Any, args: Any, output: Tensor) -> Tensor:
        # Of any size that logits have: what bends or cuts them shows, in 16 bit too.
        values = torch.linspace(-100, 100, output.numel(), device=output.device)
        given.append(values.view(output.shape).to(output.dtype))
        return given[-1]

    handle = model.get_output_embeddings().register_forward_hook(replace)
    try:
        ids = torch.arange(3, device=next(model.parameters()).device)[None]
        with model.disable_adapter():
            logits = model(ids, use_cache=False).logits
    finally:
        handle.remove()
    if not torch.equal(logits, given[-1].to(logits.dtype)):
        name = type(model.get_base_model()).__name__
        raise StageError(
            f"stage2.gate_first={passes:g} trains the LM head apart, and {name} changes the logits behind it "
            "(a softcap or a scale); wanted stage2.gate_first=0"
        )


def train_gate(
    model: Any,
    states: Scores,
    task: YesNoPrompts,
    answers: tuple[int, int],
    passes: float,
    fit: FitConfig,
    seed: int,
) -> float:
    """Trains gate and LM head of a fresh RecLoRA adapter on Yes/No, and leaves its other layers as they are.

    A gate needs several passes over the rows before it knows what the CRM knows, an LM fewer. Below the head
    the update is zero at the start, so that the state behind a prompt is the LM's own: one forward of the LM
    serves all these passes, each of which costs a product of the head.

    Args:
        model: the LM with the adapter, whose target modules hold the head.
        states: what the head reads behind each prompt (`answer_states`), float32 `[n, width]`.
        task: rows with representations.
        answers: token ids of yes and no.
        passes: over the rows.
        fit: `batch_size`, peak learning rate, warm-up, clipping.
        seed: of the order of the rows.

    Returns:
        Mean loss over the last tenth of the steps, nats.
    """
    assert task.representation is not None  # a gate reads one
    device = next(model.parameters()).device
    head_inputs = torch.from_numpy(states).to(device)
    representation = task.representation.to(device)
    label = task.label.to(device)

    steps, _ = plan_steps(len(task), fit.batch_size, passes, 1)
    order = Stream(len(task), fit.batch_size, seed)
    optimizers = optimizer(model, fit, steps)
    adam = optimizers["optimizer"]
    scheduler = optimizers["lr_scheduler"]["scheduler"]
    parameters = [value for group in adam.param_groups for value in group["params"]]

    model.train()
    losses = []
    for step in range(steps):
        rows = torch.from_numpy(order.indices(step, 0, 1)).to(device)
        logits = model.base_model.head_logits(head_inputs[rows], representation[rows])
        loss = answer_loss(logits, label[rows], *answers)
        loss.backward()
        if fit.clip:
            torch.nn.utils.clip_grad_norm_(parameters, fit.clip)
        adam.step()
        scheduler.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)
