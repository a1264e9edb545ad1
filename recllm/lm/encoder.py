"""Bidirectional encoders: a small BERT that is trained here on masked tokens, or any by hub id or folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from recllm.lm.config import EncoderConfig, LmConfig, TinyConfig
from recllm.lm.hub import loading_error, locate
from recllm.lm.load import LOADING_ERRORS, fit_tokenizer, load_tokenizer
from recllm.lm.tiny import shape_arguments

if TYPE_CHECKING:
    from transformers import BertForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

MASK = "<mask>"
MASKED_FRACTION = 0.8
"""Of the tokens that are to be guessed, the fraction that is read as the mask (BERT's)."""
REPLACED_FRACTION = 0.1
"""Of the same tokens, the fraction that is read as any other token (BERT's); the rest stays."""
LEAST_CHANGE = 1e-4
"""Of an encoder that reads both ways, the first token's state changes with the last token by this at least,
as a fraction of the change of the last token's own state."""


def add_mask_token(tokenizer: PreTrainedTokenizerBase, context: int) -> PreTrainedTokenizerBase:
    """Add the mask to the tiny LM's tokenizer, in place, and set the encoder's longest input (tokens)."""
    tokenizer.add_special_tokens({"mask_token": MASK})
    tokenizer.model_max_length = context
    return tokenizer


def build_encoder(config: TinyConfig, tokenizer: PreTrainedTokenizerBase) -> BertForMaskedLM:
    """An untrained BERT with tied embeddings for that tokenizer; torch's generator draws the weights."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**shape_arguments(config, tokenizer), type_vocab_size=1))


def mask_tokens(
    tokens: NDArray[np.int32],
    guessable: NDArray[np.bool_],
    mask_fraction: float,
    mask_id: int,
    vocabulary: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Hide a fraction of tokens as BERT does (Devlin et al., arXiv 1810.04805, section 3.1).

    Args:
        tokens: int32 `[n]`.
        guessable: bool `[n]`, which tokens may be targets.
        mask_fraction: of those, the fraction that are targets; each token is drawn by itself.
        mask_id: the mask.
        vocabulary: number of tokens out of which others are drawn.
        rng: draws; as many numbers for the same n, whatever is guessable.

    Returns:
        The tokens as the encoder reads them, int32 `[n]`, and which of them are targets, bool `[n]`.
    """
    is_target = (rng.random(len(tokens)) < mask_fraction) & guessable
    draw = rng.random(len(tokens))
    other = rng.integers(vocabulary, size=len(tokens), dtype=np.int32)
    inputs = np.where(is_target & (draw < MASKED_FRACTION), np.int32(mask_id), tokens)
    inputs = np.where(is_target & (draw >= 1 - REPLACED_FRACTION), other, inputs)
    return inputs, is_target


def load_encoder(
    config: EncoderConfig, path: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """An encoder with weights in float32, its fast tokenizer, and the most tokens of a text.

    A tokenizer that names no BOS or EOS has its CLS or SEP in their place. The pooler on top of some
    encoders, which no masked token trains, is left out.

    Args:
        config: Which one.
        path: Folder that is loaded in place of `config.path`.

    Raises:
        ValueError: It cannot be had or lacks weights, is no encoder alone, reads from left to right only, or
            has fewer positions than `encoder.context`.
    """
    as_lm = LmConfig(name="encoder", path=config.path, revision=config.revision)
    tokenizer, shape = load_tokenizer(as_lm, path, "encoder")
    source, options = locate(as_lm, path, "encoder")
    if shape.is_encoder_decoder:
        raise ValueError(f"encoder.path {source!r} has a decoder too; wanted an encoder alone, e.g. a BERT")
    try:
        model, missing = _load_weights(source, options)
    except LOADING_ERRORS as error:
        raise loading_error(as_lm, source, error, "encoder") from error
    if missing:
        raise ValueError(f"encoder.path {source!r} has no weights {missing[0]!r}: choose another encoder")
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if not _reads_both_ways(model):
        raise ValueError(
            f"encoder.path {source!r} reads from left to right only; wanted a bidirectional encoder, "
            "e.g. a BERT; a causal LM is chosen by LM="
        )
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.cls_token
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    fit_tokenizer(tokenizer, int(model.get_input_embeddings().weight.shape[0]), source, "encoder")
    return model, tokenizer, _context(config, source, shape, tokenizer)


def _load_weights(source: str, options: dict[str, Any]) -> tuple[Any, list[str]]:
    """The encoder in float32, and the names of weights that it has and the files have not, but the pooler's.

    Args:
        source: hub id or folder.
        options: what else `from_pretrained` needs to find it.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # heads that are left out are many lines; the caller names what is missing
    try:
        model, report = AutoModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **options
        )
    finally:
        logging.set_verbosity(level)
    return model, sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))


@torch.no_grad()
def _reads_both_ways(model: Any) -> bool:
    """Whether the first token's state depends on the last token, by an example of two rows."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = torch.arange(5, 13).repeat(2, 1) % vocabulary
    tokens[1, -1] = 14 % vocabulary
    first, second = model.eval()(input_ids=tokens).last_hidden_state
    change = (first - second).norm(dim=-1)
    return bool(change[0] > LEAST_CHANGE * change[-1])


def _context(config: EncoderConfig, source: str, shape: Any, tokenizer: Any) -> int:
    """Most tokens of a text: of the encoder's positions and what its tokenizer says, the fewer.

    Raises:
        ValueError: Neither says it and `encoder.context` is not set, or that is more than they allow.
    """
    limits = []
    for limit in (getattr(shape, "max_position_embeddings", None), tokenizer.model_max_length):
        if limit and limit < 1 << 30:  # a tokenizer without a limit says 1e30
            limits.append(int(limit))
    if config.context is None:
        if not limits:
            raise ValueError(f"encoder.path {source!r} states no longest input: set encoder.context (tokens)")
        return min(limits)
    if limits and config.context > min(limits):
        raise ValueError(
            f"encoder.context is {config.context}, encoder {source!r} has {min(limits)} positions: lower it"
        )
    return config.context
