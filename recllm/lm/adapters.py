"""Puts a LoRA of either kind on a frozen LM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from recllm.lm.config import LmConfig
from recllm.reclora import RecLoraConfig
from recllm.schema import AdapterConfig


def add_adapter(lm: Any, config: AdapterConfig, representation: Tensor | None, seed: int) -> PeftModel:
    """A fresh adapter that starts at the LM's own output.

    Args:
        lm: the frozen LM.
        config: kind, rank, gate.
        representation: float32 `[n, d_c]` of the tuning rows; it standardizes the gate's input.
        seed: of the adapter's random start.
    """
    torch.manual_seed(seed)
    if config.kind == "lora":
        plain = LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=config.target_modules,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(lm, plain)
    assert representation is not None
    gated = RecLoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        num_meta=config.num_meta,
        mixture=config.mixture,
        representation_dim=representation.shape[1],
        gate=config.gate,
        gate_hidden=config.gate_hidden,
        gate_temperature=config.gate_temperature,
        rescale=config.rescale,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(lm, gated)
    model.base_model.set_statistics(representation.mean(0), representation.std(0, correction=0))  # type: ignore[operator]
    return model


def load_adapter(lm: Any, folder: Any, trainable: bool = False) -> PeftModel:
    """A saved adapter of either kind on the LM that it was made for; `adapter_config.json` has its type."""
    return PeftModel.from_pretrained(lm, folder, is_trainable=trainable)


def save_adapter(model: PeftModel, folder: Path, base: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, the same to the bit in every process.

    Args:
        model: the LM with its adapter.
        folder: made if absent.
        base: what a reader loads the LM by: hub id, or its name here; no path of this machine.
    """
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules)  # PEFT holds a set, whose order varies
    # No adapter here trains embeddings; "auto" would look the LM's name up on the hub to find that out.
    model.save_pretrained(str(folder), save_embedding_layers=False)


def base_name(config: LmConfig) -> str:
    """Hub id of the LM; the name of one that was trained here or lies in a local folder."""
    local = config.path is None or Path(config.path).exists()
    return config.name if local else str(config.path)
