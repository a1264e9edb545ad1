"""Export of RecLoRA for one representation, or many, as ordinary PEFT LoRAs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from recllm.reclora.card import AdapterCard, write_model_card
from recllm.reclora.config import RecLoraConfig
from recllm.reclora.mixture import uniform_weights, weigh
from recllm.reclora.model import RecLoraModel

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM serves (`max_lora_rank`)."""
WEIGHTS = "adapter_model.safetensors"
GATES = "gates.safetensors"


def export_user(
    model: PeftModel,
    representation: Tensor | None,
    directory: str | Path,
    adapter_name: str | None = None,
    card: AdapterCard | None = None,
) -> None:
    """Writes the adapter, gated by one representation, as a plain LoRA that stock PEFT loads.

    The gate and all scales are within A and B (lora_alpha / r is 1). Rank: N_m r for `product`, r for
    `factor` and `core`, twice that for a start by singular vectors (A0 and -B0 beside A and B), filled with
    zeros to the next rank that vLLM serves (one above 512 stays: PEFT loads it, vLLM does not).

    Args:
        model: What `get_peft_model` or `PeftModel.from_pretrained` returned.
        representation: `[representation_dim]`; None for an adapter without a gate.
        directory: Folder to write `adapter_config.json`, `adapter_model.safetensors` and `README.md` to;
            created if absent.
        adapter_name: The adapter; the active one by default.
        card: What `README.md` says of data and metrics.

    Raises:
        ValueError: If the model has no RecLoRA adapter, the adapter a soft prompt (which no LoRA can hold),
            or the representation is not one vector of the right width.
    """
    tuner, name, config = _find_adapter(model, adapter_name)
    gates = None
    if config.gated:
        if representation is None or representation.dim() != 1:
            got = "None" if representation is None else f"shape {list(representation.shape)}"
            raise ValueError(f"representation has {got}, wanted [dim]: one user a call")
        gates = _gates(tuner, representation[None], name)[0]
    _write(tuner, name, gates, directory, card, "The adapter of one user: the gate is in the weights.")


def export_mean(
    model: PeftModel,
    representations: Tensor,
    directory: str | Path,
    adapter_name: str | None = None,
    card: AdapterCard | None = None,
) -> None:
    """Writes the plain LoRA of the mean gate over representations `[n, representation_dim]`.

    For `product`, which is linear in alpha, it is the mean of the users' updates. Otherwise as `export_user`.
    """
    tuner, name, _ = _find_adapter(model, adapter_name)
    gates = _gates(tuner, representations, name).mean(0)
    note = f"The adapter of the mean gate over {len(representations):,} representations."
    _write(tuner, name, gates, directory, card, note)


def export_users(
    model: PeftModel,
    representations: Tensor,
    directory: str | Path,
    adapter_name: str | None = None,
    card: AdapterCard | None = None,
) -> None:
    """Writes one plain LoRA of the uniform gate, and every user's gate in a file of its own.

    `gates.safetensors` holds `alpha`, `[n, num_meta]`, or `[n, modules, num_meta]` with a gate per module, in
    the order of `representations`. A user's LoRA is the plain one with the columns of `lora_B` that belong to
    meta-LoRA k times num_meta * alpha_k: `pick_user` writes it, without the LM. So n users cost n * num_meta
    numbers beside one adapter. Arguments as in `export_user`, but for the first axis.

    Raises:
        ValueError: For `factor` and `core`, whose users share no stack; they have rank r each.
    """
    tuner, name, config = _find_adapter(model, adapter_name)
    if config.mixture != "product":
        raise ValueError(
            f"export_users got mixture={config.mixture!r}, wanted 'product'; "
            f"export_user writes one user's LoRA of rank {config.r}"
        )
    alpha = tuner.alpha(representations, name).detach().cpu().contiguous()
    note = f"The adapter of the uniform gate; `{GATES}` holds the gates of {len(alpha):,} users."
    _write(tuner, name, None, directory, card, note)
    paths = [f"base_model.model.{path}" for path, _ in tuner.layers(name)]
    metadata = {"modules": json.dumps(paths), "num_meta": str(config.num_meta), "r": str(config.r)}
    (Path(directory) / GATES).write_bytes(_in_order(save({"alpha": alpha}, metadata)))


def _in_order(file: bytes) -> bytes:
    """The bytes of a safetensors file with sorted metadata; safetensors' own order differs between runs."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def pick_user(directory: str | Path, row: int, out: str | Path, card: AdapterCard | None = None) -> None:
    """Writes one user's plain LoRA out of what `export_users` wrote.

    Args:
        directory: The folder of `export_users`.
        row: Row of the representations that it was given.
        out: Folder to write to; created if absent.
        card: What `README.md` says of data and metrics.

    Raises:
        ValueError: If there is no such row.
    """
    directory = Path(directory)
    with safe_open(directory / GATES, "pt") as file:
        metadata = file.metadata()
        gates = file.get_slice("alpha")
        num_users = gates.get_shape()[0]
        if not 0 <= row < num_users:
            raise ValueError(f"row {row} is none of the {num_users} gates in {directory / GATES}")
        alpha = gates[row]
    paths = json.loads(metadata["modules"])
    num_meta = int(metadata["num_meta"])
    r = int(metadata["r"])
    tensors = load_file(directory / WEIGHTS)
    for path, module_alpha in zip(paths, alpha.expand(len(paths), -1), strict=True):
        weights = (module_alpha * num_meta).repeat_interleave(r)
        b = tensors[f"{path}.lora_B.weight"]
        blocks = b.shape[1] // len(weights)  # a start's columns follow in the same order; then zeros
        weights = torch.cat([weights.repeat(blocks), weights.new_zeros(b.shape[1] - blocks * len(weights))])
        tensors[f"{path}.lora_B.weight"] = b * weights.to(b)
    config = PeftConfig.from_pretrained(str(directory))
    _save(config, tensors, Path(out), card, f"The adapter of user {row}: the gate is in the weights.")


def _find_adapter(model: PeftModel, adapter_name: str | None) -> tuple[RecLoraModel, str, RecLoraConfig]:
    """The tuner of a model, the adapter's name and configuration; a ValueError where none can be exported."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, RecLoraModel):
        raise ValueError(f"the export got a {type(model).__name__} without RecLoRA; pass the PeftModel")
    name = tuner._name(adapter_name)
    config = tuner._config(name)
    if config.soft_prompt:
        raise ValueError(
            f"adapter {name!r} has a soft prompt of {config.soft_prompt} tokens, which a LoRA cannot hold; "
            "train with soft_prompt=0 to export"
        )
    if config.modules_to_save:
        raise ValueError(
            f"adapter {name!r} trains whole modules ({', '.join(config.modules_to_save)}), which a LoRA "
            "cannot hold; save_pretrained keeps them with the adapter"
        )
    return tuner, name, config


@torch.no_grad()
def _gates(tuner: RecLoraModel, representations: Tensor, name: str) -> Tensor:
    """Gates of the layers, `[n, modules, ...]`, for representations `[n, dim]`."""
    gates = tuner.alpha(representations, name)
    layers = tuner.layers(name)
    if tuner._config(name).gate == "shared":
        gates = gates[:, None].expand(-1, len(layers), *gates.shape[1:])
    return gates


@torch.no_grad()
def _write(
    tuner: RecLoraModel,
    name: str,
    gates: Tensor | None,
    directory: str | Path,
    card: AdapterCard | None,
    note: str,
) -> None:
    """Writes the plain LoRA for gates `[modules, ...]`, or for the uniform one."""
    config = tuner._config(name)
    tensors: dict[str, Tensor] = {}
    rank = 0
    for index, (path, layer) in enumerate(tuner.layers(name)):
        if gates is None:
            weights = uniform_weights(config, layer.reclora_B[name])
        else:
            weights = weigh(gates[index], config)
        a, b = layer.plain_lora(name, weights)
        rank = next((served for served in RANKS if served >= len(a)), len(a))
        missing = rank - len(a)
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(len(b), missing)], 1)
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.detach().cpu().contiguous()
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        task_type=config.task_type,
        inference_mode=True,
    )
    _save(lora, tensors, Path(directory), card, note)


def _save(
    config: PeftConfig, tensors: dict[str, Tensor], directory: Path, card: AdapterCard | None, note: str
) -> None:
    names: str | Sequence[str] = config.target_modules  # type: ignore[attr-defined]
    # PEFT makes a set of the names, whose order in the file would differ between processes.
    config.target_modules = names if isinstance(names, str) else sorted(names)  # type: ignore[attr-defined]
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(directory))
    write_model_card(directory, card or AdapterCard(), config, note)
