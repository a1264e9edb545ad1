"""What AdaLoRA asks of a training loop beside the forward (arXiv 2303.10512)."""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor

IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""PEFT's running importances of the allocator, each parameter name -> tensor."""


def is_adalora(model: PeftModel) -> bool:
    """Whether the active adapter is one."""
    return isinstance(model.peft_config["default"], AdaLoraConfig)


def penalty(model: PeftModel) -> Tensor:
    """What keeps directions orthogonal: weighted mean of ||A A^T - I||_F and ||B^T B - I||_F (equation 4).

    PEFT adds it only to a loss that the LM itself computes.
    """
    config: Any = model.peft_config["default"]
    norms = []
    for name, value in model.named_parameters():
        if not value.requires_grad or ("lora_A" not in name and "lora_B" not in name):
            continue
        gram = value @ value.T if "lora_A" in name else value.T @ value
        norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)))
    return config.orth_reg_weight * torch.stack(norms).mean()


def allocate(model: PeftModel, step: int) -> None:
    """Prunes the least important directions, as many as the schedule says.

    Args:
        model: after a step of its optimizer, with that step's gradients.
        step: optimizer steps so far, this one included.
    """
    model.base_model.update_and_allocate(step)  # type: ignore[operator]


def state(model: PeftModel) -> dict[str, Any]:
    """What a resumed training needs of the allocation: tensors and primitives."""
    allocator: Any = model.base_model.rankallocator
    config: Any = model.peft_config["default"]
    return {name: dict(getattr(allocator, name)) for name in IMPORTANCE} | {"pattern": config.rank_pattern}


def load_state(model: PeftModel, saved: dict[str, Any]) -> None:
    """Takes up the allocation of an interrupted training."""
    allocator: Any = model.base_model.rankallocator
    config: Any = model.peft_config["default"]
    device = next(model.parameters()).device
    for name in IMPORTANCE:
        setattr(allocator, name, {key: value.to(device) for key, value in saved[name].items()})
    config.rank_pattern = saved["pattern"]
