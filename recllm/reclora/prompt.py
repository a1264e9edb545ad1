"""Puts virtual tokens before the inputs of an LM's backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def prepend_tokens(
    inputs: dict[str, Any], prompts: Tensor, segments: Tensor | None, embed: nn.Module
) -> tuple[dict[str, Any], Tensor | None, int]:
    """Extends the inputs of one forward by the virtual tokens, at positions 0 to m - 1; all others move by m.

    In a left-padded row they stand before the padding, which the mask keeps apart and which has no part in
    the positions. Segments of a packed row have virtual tokens each, seen by that segment only. When the
    cache of `generate` holds something, they are in it already.

    Args:
        inputs: Forward arguments of the backbone, by name.
        prompts: `[batch, segments, m, width]`.
        segments: `[batch, seq]`, or None when a row is one segment.
        embed: The LM's input embeddings.

    Returns:
        The arguments, `segments` of the extended row, and how many tokens were put before the row.

    Raises:
        ValueError: If packed rows come without a 4-D mask, any with FlexAttention's block mask, or a cache
            without these virtual tokens.
    """
    inputs = dict(inputs)
    ids = inputs.pop("input_ids", None)
    embeds = inputs.get("inputs_embeds")
    embeds = embed(ids) if embeds is None else embeds
    batch, length = embeds.shape[:2]
    num_segments, num_tokens = prompts.shape[1:3]
    if prompts.shape[0] != batch:
        raise ValueError(f"representation has {prompts.shape[0]} rows, the input {batch}; wanted one a row")
    mask = inputs.get("attention_mask")
    cache = inputs.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    _check_mask(mask, past, length, num_tokens, packed=segments is not None)

    owner = torch.arange(num_segments, device=embeds.device).repeat_interleave(num_tokens)
    if mask is not None:
        token_segments = owner.new_zeros(batch, length) if segments is None else segments.to(owner)
        inputs["attention_mask"] = _extend_mask(mask, owner, token_segments, num_tokens)

    added = 0 if past else num_segments * num_tokens
    positions = inputs.get("position_ids")
    if positions is None:
        first = past - num_tokens if past else 0  # the cache counts the virtual tokens already
        positions = torch.arange(first, first + length, device=embeds.device)[None]
    virtual = torch.arange(num_tokens, device=embeds.device).repeat(num_segments)[None]
    virtual = virtual.expand(len(positions), -1)[:, :added]
    inputs["position_ids"] = torch.cat([virtual, positions + num_tokens], 1)

    if added:
        embeds = torch.cat([prompts.flatten(1, 2).to(embeds), embeds], 1)
    inputs["inputs_embeds"] = embeds
    if segments is not None:
        segments = torch.cat([owner.expand(batch, -1), segments.to(owner)], 1)
    return inputs, segments, added


def _check_mask(mask: Any, past: int, length: int, num_tokens: int, packed: bool) -> None:
    """Refuses what a soft prompt cannot extend.

    Args:
        mask: The forward's `attention_mask`.
        past: Tokens in the cache, the virtual ones among them.
        length: Tokens of a row.
        num_tokens: Virtual tokens of a segment.
        packed: Whether rows hold several segments.

    Raises:
        ValueError: As `prepend_tokens`.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"a soft prompt cannot extend a {type(mask).__name__}; wanted a tensor: trainer.attention=sdpa"
        )
    if past:
        fits = mask is None or (mask.dim() == 2 and mask.shape[1] + num_tokens == past + length)
        if packed or not fits:
            raise ValueError(
                f"the cache holds {past} tokens, which do not fit the soft prompt of {num_tokens}; wanted a "
                "cache that this adapter filled, with a 2-D attention_mask"
            )
    elif packed and (mask is None or mask.dim() != 4):
        raise ValueError(
            "a soft prompt in packed rows needs to know who sees whom; pass attention_mask "
            "[batch, 1, seq, seq]"
        )


def _extend_mask(mask: Tensor, owner: Tensor, segments: Tensor, num_tokens: int) -> Tensor:
    """The attention mask, extended: every token sees the virtual tokens of its segment, they see no token.

    Args:
        mask: `[batch, keys]`, or `[batch or 1, heads or 1, seq, seq]`, boolean or additive.
        owner: `[segments * num_tokens]`, the segment of each virtual token.
        segments: `[batch, seq]`, the segment of each token.
        num_tokens: Virtual tokens of a segment.
    """
    if mask.dim() == 2:
        return torch.cat([mask.new_ones(mask.shape[0], num_tokens), mask], 1)
    added = len(owner)
    batch, length = segments.shape
    places = torch.arange(added, device=owner.device)
    extended = owner.new_zeros(batch, mask.shape[1], added + length, added + length, dtype=torch.bool)
    extended[:, :, :added, :added] = (owner[:, None] == owner) & (places[:, None] >= places)
    extended[:, :, added:, :added] = (segments[..., None] == owner)[:, None]
    if mask.dtype != torch.bool:  # an additive mask
        least = torch.finfo(mask.dtype).min
        extended = torch.zeros_like(extended, dtype=mask.dtype).masked_fill(~extended, least)
    extended[:, :, added:, added:] = mask
    return extended


def remove_tokens(output: Any, added: int) -> Any:
    """Takes the virtual tokens off the hidden states of the backbone's output."""
    output["last_hidden_state"] = output["last_hidden_state"][:, added:]
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(states[:, added:] for states in output["hidden_states"])
    return output
