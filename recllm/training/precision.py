"""Device, precision and compilation, also for what only scores: Lightning is not loaded for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from recllm.config.schema import TrainerConfig
from recllm.console import say

if TYPE_CHECKING:
    import lightning


def device_of(trainer: TrainerConfig) -> torch.device:
    """Where work outside of training runs: the GPU where training would use one, else the CPU."""
    gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def training_precision(model: torch.nn.Module, precision: str) -> AbstractContextManager[Any]:
    """A context in which a model computes as it does when Lightning trains it.

    Args:
        model: the model, on its device. Of a `-true` precision its weights are converted at once, as `fit`
            would.
        precision: Lightning's name: `32-true`, `bf16-mixed`, `bf16-true`, `16-mixed`. What reads a
            representation stays float32 in all of them.
    """
    dtypes = {"bf16": torch.bfloat16, "16": torch.float16}
    bits, _, kind = precision.partition("-")
    if bits not in dtypes:
        return nullcontext()
    if kind == "true":
        model.to(dtypes[bits])
        return nullcontext()
    device = next(model.parameters()).device
    return torch.autocast(device.type, dtypes[bits])


def compile_model(module: lightning.LightningModule, batch: Any) -> None:
    """Compiles `module.model` (torch.compile), or says why not and leaves it as it is.

    A compiler shows what it cannot do when it is used, so it is used here: on a batch of training, forward
    and backward, before anything depends on it.

    Args:
        module: what trains; `module.model` is compiled in place, so that names of weights stay.
        batch: a batch of training, on the module's device.
    """
    model: Any = module.model
    model.compile()
    try:
        step: Any = module.training_step(batch, 0)
        step["loss"].backward()
    except Exception as error:  # the compiler raises many types, of its own and of what it calls
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        say(f"not compiled, {type(error).__name__}: {line.strip()[:160]}")
        model._compiled_call_impl = None
    finally:
        module.zero_grad(set_to_none=True)
