"""Load a frozen causal language model and its tokenizer, from a hub id or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recllm.lm.config import LmConfig
from recllm.lm.hub import loading_error, locate

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Values of `lm.model.dtype`, as transformers takes them."""


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

    if config.dtype not in DTYPES:
        raise ValueError(f"lm.model.dtype is {config.dtype!r}, want one of {', '.join(DTYPES)}")
    quantization = _quantization(config)
    tokenizer, _ = load_tokenizer(config, path)
    source, options = locate(config, path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[config.dtype], **options, **quantization
        )
    except (OSError, ImportError) as error:
        raise loading_error(config, source, error) from error
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
        raise loading_error(config, source, error, key) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{key}.path {source!r} has no fast tokenizer: add a tokenizer.json, or choose another one"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, shape


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
    attributes = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in attributes:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _quantization(config: LmConfig) -> dict[str, Any]:
    """What `from_pretrained` takes for `lm.model.quantization`; a ValueError where it cannot be had here."""
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
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": nf4}
