"""Puts an adapter of any kind on a frozen LM, and reads saved ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor

from recllm.lm.config import AdapterConfig, LmConfig
from recllm.paths import ADAPTER, RANKING_ADAPTER
from recllm.reclora import AdapterCard, RecLoraConfig, write_model_card

ADALORA_SCHEDULE = {"tinit": 0.1, "tfinal": 0.6, "deltaT": 0.002}
"""AdaLoRA's schedule as fractions of all steps: first pruning, last one before the end, steps between two.
About those of the paper's largest task (arXiv 2303.10512, appendix D)."""


class AdapterInputs(NamedTuple):
    """What an adapter reads besides the prompt.

    Attributes:
        representation_kind: The CRM's representation, as of `AdapterConfig.representation_kind`; None: none.
        virtual_tokens: Tokens of its soft prompt, which stand before a prompt and take up context.
    """

    representation_kind: str | None
    virtual_tokens: int


def adapter_folder(stage: Path, name: str) -> Path:
    """Folder of an adapter of a stage: `name`, or where stage 2 learned no titles its only one."""
    if name == RANKING_ADAPTER and not (stage / name).is_dir():
        return stage / ADAPTER
    return stage / name


def add_adapter(
    lm: Any,
    config: AdapterConfig,
    representation: Tensor | None,
    seed: int,
    steps: int = 1000,
    svd_cache: Path | None = None,
) -> PeftModel:
    """A fresh adapter that starts at the LM's own output (but for a soft prompt, which the LM has not).

    Args:
        lm: the frozen LM.
        config: kind, rank, gate.
        representation: float32 `[n, d_c]` of the tuning rows; it whitens the gate's input. None: the
            adapter reads none.
        seed: of the adapter's random start.
        steps: optimizer steps to come (`adalora` plans by them).
        svd_cache: folder for singular vectors; None: they are computed each time.
    """
    torch.manual_seed(seed)
    model = get_peft_model(lm, _peft_config(config, representation, steps, svd_cache))
    if config.representation_kind:
        assert representation is not None
        covariance = torch.cov(representation.T.double(), correction=0)
        model.base_model.set_statistics(representation.mean(0), covariance)  # type: ignore[operator]
    return model


def _peft_config(
    config: AdapterConfig, representation: Tensor | None, steps: int, svd_cache: Path | None
) -> PeftConfig:
    """PEFT's configuration of the adapter; arguments as of `add_adapter`."""
    modules: dict[str, Any] = {"target_modules": config.target_modules, "task_type": "CAUSAL_LM"}
    if config.kind == "vera":
        return VeraConfig(**modules, r=config.r)
    if config.kind == "adalora":
        return _adalora_config(config, modules, steps)
    scaled: dict[str, Any] = modules | {"r": config.r, "lora_alpha": config.lora_alpha}
    start: dict[str, Any] = {"init": config.init, "svd_cache": svd_cache and str(svd_cache)}
    if config.kind == "reclora":
        return RecLoraConfig(
            **scaled,
            **start,
            num_meta=config.num_meta,
            mixture=config.mixture,
            representation_dim=1 if representation is None else representation.shape[1],
            gate=config.gate,
            gate_input=config.gate_input,
            gate_hidden=config.gate_hidden,
            gate_temperature=config.gate_temperature,
            soft_prompt=config.soft_prompt,
            rescale=config.rescale,
        )
    if config.init != "gaussian":
        # Not PEFT's own PiSSA, which changes the frozen weights (and has no MiLoRA): the same function, with
        # the start subtracted in the forward, so that the LM under the adapter stays what it is.
        return RecLoraConfig(**scaled, **start, num_meta=1, gate_input="none", representation_dim=1)
    return LoraConfig(**scaled, use_dora=config.kind == "dora", use_rslora=config.kind == "rslora")


def _adalora_config(config: AdapterConfig, modules: dict[str, Any], steps: int) -> AdaLoraConfig:
    """AdaLoRA that begins with half as much rank again as it ends with, pruned by `ADALORA_SCHEDULE`."""
    schedule: dict[str, Any] = {}
    for name, fraction in ADALORA_SCHEDULE.items():
        schedule[name] = max(1, int(fraction * steps))
    # Of few steps, the three would not fit: PEFT wants a step at least between first and last pruning.
    schedule["tinit"] = min(schedule["tinit"], steps - schedule["tfinal"] - 1)
    return AdaLoraConfig(
        **modules,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        target_r=config.r,
        init_r=config.r + max(1, config.r // 2),
        total_step=steps,
        **schedule,
    )


def load_adapter(lm: Any, folder: Any, trainable: bool = False) -> PeftModel:
    """A saved adapter of any kind on the LM that it was made for; `adapter_config.json` has its type."""
    return PeftModel.from_pretrained(lm, folder, is_trainable=trainable)


def adapter_inputs(folder: Path) -> AdapterInputs:
    """What a saved adapter reads besides the prompt, by its `adapter_config.json`."""
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, RecLoraConfig) or not config.reads_representation:
        return AdapterInputs(None, 0)
    return AdapterInputs(config.gate_input if config.gated else "target", config.soft_prompt)


def save_adapter(model: PeftModel, folder: Path, card: AdapterCard) -> None:
    """Write configuration, weights and model card, the same to the bit in every process.

    Args:
        model: the LM with its adapter.
        folder: made if absent.
        card: what the card says; its `base` is what a reader loads the LM by, no path of this machine.
    """
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = card.base
    config.target_modules = sorted(config.target_modules)  # PEFT holds a set, whose order varies
    if isinstance(config, AdaLoraConfig):
        # Directions that were pruned by then are zero in the weights. The pattern is that of the last step,
        # the weights are of the best one: together they would cut what is not zero.
        config.rank_pattern = None
    # No adapter here trains embeddings; "auto" would look the LM's name up on the hub to find that out.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    write_model_card(folder, card, config)


def base_name(config: LmConfig) -> str:
    """Hub id of the LM; the name of one that a stage holds or that lies in a local folder."""
    local = config.is_exported or Path(str(config.path)).exists()
    return config.name if local else str(config.path)
