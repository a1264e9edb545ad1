"""Export of RecLoRA for one representation as an ordinary PEFT LoRA."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

from recllm.reclora.model import RecLoraModel


def export_user(
    model: PeftModel, representation: Tensor, directory: str | Path, adapter_name: str | None = None
) -> None:
    """Writes the adapter, gated by one representation, as a plain LoRA that stock PEFT loads.

    A is the stack of the A_k, B the B_k side by side, each times its alpha_k (and N_m with `rescale`): rank
    N_m r and lora_alpha N_m lora_alpha, so that lora_alpha / r is unchanged. The gate is not in the file.

    Args:
        model: What `get_peft_model` or `PeftModel.from_pretrained` returned.
        representation: `[representation_dim]`.
        directory: Folder to write `adapter_config.json` and `adapter_model.safetensors` to; created
            if absent.
        adapter_name: The adapter; the active one by default.

    Raises:
        ValueError: If the model has no RecLoRA adapter, or the representation is not one vector of the right
            width.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, RecLoraModel):
        raise ValueError(f"export_user got a {type(model).__name__} without RecLoRA; pass the PeftModel")
    if representation.dim() != 1:
        raise ValueError(
            f"representation has shape {list(representation.shape)}, wanted [dim]: one user a call"
        )
    name = tuner._name(adapter_name)
    config = tuner._config(name)
    layers = tuner.layers(name)
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        alpha = tuner.alpha(representation[None], name)[0].expand(len(layers), -1)
        weights = (alpha * (config.num_meta if config.rescale else 1)).repeat_interleave(config.r, dim=-1)
        for (path, layer), weight in zip(layers, weights, strict=True):
            a, b = layer.reclora_A[name], layer.reclora_B[name]
            tensors[f"base_model.model.{path}.lora_A.weight"] = a.detach().cpu().contiguous()
            tensors[f"base_model.model.{path}.lora_B.weight"] = (b * weight.to(b)).cpu().contiguous()
    lora = LoraConfig(
        r=config.num_meta * config.r,
        lora_alpha=config.num_meta * config.lora_alpha,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        task_type=config.task_type,
        inference_mode=True,
    )
    # LoraConfig makes a set of the names, whose order in the file would differ between processes.
    lora.target_modules = config.target_modules
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    lora.save_pretrained(str(directory))
