"""Load a frozen causal language model and its tokenizer, from a hub id or a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recllm.lm.config import LmConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_lm(
    config: LmConfig, path: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The LM in eval mode with frozen weights, and its fast tokenizer.

    Args:
        config: Which one.
        path: Folder that is loaded in place of `config.path`.

    Raises:
        ValueError: A key has a value that does not exist, or weights or tokenizer cannot be had.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a stage prints a few lines, a bar for every file would hide them

    dtypes = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if config.dtype not in dtypes:
        raise ValueError(f"lm.model.dtype is {config.dtype!r}, want one of {', '.join(dtypes)}")
    quantization = _quantization(config)
    tokenizer, _ = load_tokenizer(config, path)
    source, options = locate(config, path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtypes[config.dtype], **options, **quantization
        )
    except (OSError, ImportError) as error:
        raise unloadable(config, source, error) from error
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    switch_off_dropout(model)
    return model.requires_grad_(False).eval(), tokenizer


def load_tokenizer(
    config: LmConfig, path: str | Path | None = None, key: str = "lm.model"
) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """An LM's fast tokenizer, and the LM's shape as transformers knows it; no weights are read.

    Args:
        config: Which one.
        path: Folder that is loaded in place of `config.path`.
        key: Section of the configuration that errors name.

    Raises:
        ValueError: The LM is not named, or its tokenizer cannot be had.
    """
    from transformers import AutoConfig, AutoTokenizer

    source, options = locate(config, path, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        shape = AutoConfig.from_pretrained(source, **options)
    except (OSError, ImportError) as error:
        raise unloadable(config, source, error, key) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{key}.path {source!r} has no fast tokenizer: add a tokenizer.json, or choose another one"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, shape


def locate(config: LmConfig, path: str | Path | None, key: str = "lm.model") -> tuple[str, dict[str, Any]]:
    """Folder or hub id, and what else `from_pretrained` needs to find it; arguments: see `load_tokenizer`."""
    source = str(path if path is not None else config.path or "")
    if not source:
        raise ValueError(
            f"lm.model.path is empty and LM {config.name!r} is not trained yet: set it, or make LM=tiny"
        )
    # A hub id has one slash at most and does not start at a folder; anything else must be there.
    local = path is not None or source.startswith((".", "/", "~")) or source.count("/") > 1
    if local:
        source = os.path.expanduser(source)
        if not os.path.isdir(source):
            raise ValueError(
                f"{key}.path is {source!r}, no such folder: give a folder with weights, or a hub id"
            )
    return source, {"revision": config.revision} if config.revision and not os.path.isdir(source) else {}


def unloadable(config: LmConfig, source: str, error: Exception, key: str = "lm.model") -> ValueError:
    """The one line that says why `source` cannot be loaded."""
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"{key}.path {source!r} ({key}.revision {config.revision}) cannot be loaded: {reason}")


def context_length(config: LmConfig, shape: PretrainedConfig) -> int:
    """Most tokens of prompt and answer together.

    Args:
        config: Its `context` bounds what the LM allows.
        shape: The LM's own configuration (`model.config`).

    Raises:
        ValueError: `lm.model.context` is more than the LM's positions.
    """
    most = getattr(shape, "max_position_embeddings", None)
    if config.context is None:
        if most is None:
            raise ValueError(f"LM {config.name!r} states no longest input: set lm.model.context (tokens)")
        return int(most)
    if most is not None and config.context > most:
        raise ValueError(
            f"lm.model.context is {config.context}, LM {config.name!r} has {most} positions: lower it"
        )
    return config.context


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Set every dropout to 0: under train(), as an adapter needs it, an LM answers as under eval()."""
    names = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in names:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _quantization(config: LmConfig) -> dict[str, Any]:
    if config.quantization == "none":
        return {}
    if config.quantization not in ("4bit", "8bit"):
        raise ValueError(f"lm.model.quantization is {config.quantization!r}, want none, 4bit or 8bit")
    if not torch.cuda.is_available():
        raise ValueError(
            f"lm.model.quantization is {config.quantization!r}, which needs a GPU: set it to none"
        )
    from transformers import BitsAndBytesConfig

    if config.quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": four}
