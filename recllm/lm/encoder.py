"""Bidirectional encoders: a small BERT that is trained here on masked tokens, or any by hub id or folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from recllm.lm.config import EncoderConfig, LmConfig, TinyConfig
from recllm.lm.load import load_tokenizer, locate, unloadable
from recllm.lm.tiny import sizes

if TYPE_CHECKING:
    from transformers import BertForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

MASK = "<mask>"
MASKED, SWAPPED = 0.8, 0.1
"""Of the tokens that are to be guessed, shares that are masked and that are any other token (BERT's)."""
BOTH_WAYS = 1e-4
"""Least change of the first token's state by the last token, as a share of the change of the last one's."""


def with_mask(tokenizer: PreTrainedTokenizerBase, context: int) -> PreTrainedTokenizerBase:
    """The tiny LM's tokenizer with a token more, the mask, and the encoder's longest input (tokens)."""
    tokenizer.add_special_tokens({"mask_token": MASK})
    tokenizer.model_max_length = context
    return tokenizer


def build_encoder(config: TinyConfig, tokenizer: PreTrainedTokenizerBase) -> BertForMaskedLM:
    """An untrained BERT with tied embeddings for that tokenizer; torch's generator draws the weights."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**sizes(config, tokenizer), type_vocab_size=1))


def mask(
    tokens: NDArray[np.int32],
    guessable: NDArray[np.bool_],
    share: float,
    mask_id: int,
    vocabulary: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Hide a share of tokens as BERT does (Devlin et al., arXiv 1810.04805, section 3.1).

    Args:
        tokens: i32 [n].
        guessable: bool [n], which tokens may be chosen.
        share: of them that is chosen, each token by itself.
        mask_id: the mask.
        vocabulary: tokens out of which others are drawn.
        rng: draws; as many numbers for the same n, whatever is guessable.

    Returns:
        The tokens as they are read, i32 [n], and which of them are to be guessed, bool [n].
    """
    chosen = (rng.random(len(tokens)) < share) & guessable
    kind, other = rng.random(len(tokens)), rng.integers(vocabulary, size=len(tokens), dtype=np.int32)
    read = np.where(chosen & (kind < MASKED), np.int32(mask_id), tokens)
    return np.where(chosen & (kind >= 1 - SWAPPED), other, read), chosen


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
    from transformers import AutoModel
    from transformers.utils import logging

    named = LmConfig(name="encoder", path=config.path, revision=config.revision)
    tokenizer, shape = load_tokenizer(named, path, "encoder")
    source, options = locate(named, path, "encoder")
    if shape.is_encoder_decoder:
        raise ValueError(f"encoder.path {source!r} has a decoder too; wanted an encoder alone, e.g. a BERT")
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # heads that are left out are many lines; what is missing is said below
    try:
        model, found = AutoModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise unloadable(named, source, error, "encoder") from error
    finally:
        logging.set_verbosity(level)
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith("pooler.")):
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
    return model, tokenizer, _context(config, source, shape, tokenizer)


@torch.no_grad()
def _reads_both_ways(model: Any) -> bool:
    """Whether the first token's state depends on the last token: found out by an example."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = torch.arange(5, 13).repeat(2, 1) % vocabulary
    tokens[1, -1] = 14 % vocabulary
    first, second = model.eval()(input_ids=tokens).last_hidden_state
    change = (first - second).norm(dim=-1)
    return bool(change[0] > BOTH_WAYS * change[-1])


def _context(config: EncoderConfig, source: str, shape: Any, tokenizer: Any) -> int:
    """Most tokens of a text: of the encoder's positions and what its tokenizer says, the fewer."""
    positions = getattr(shape, "max_position_embeddings", None)
    known = [int(most) for most in (positions, tokenizer.model_max_length) if most and most < 1 << 30]
    if config.context is None and not known:
        raise ValueError(f"encoder.path {source!r} states no longest input: set encoder.context (tokens)")
    if config.context is not None and config.context > min(known, default=config.context):
        raise ValueError(
            f"encoder.context is {config.context}, encoder {source!r} has {min(known)} positions: lower it"
        )
    return min(known) if config.context is None else config.context
