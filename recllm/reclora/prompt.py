"""Puts virtual tokens before the inputs of an LM's backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def put_before(
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
    ids, embeds = inputs.pop("input_ids", None), inputs.get("inputs_embeds")
    embeds = embed(ids) if embeds is None else embeds
    batch, length = embeds.shape[:2]
    count, tokens = prompts.shape[1:3]
    if prompts.shape[0] != batch:
        raise ValueError(f"representation has {prompts.shape[0]} rows, the input {batch}; wanted one a row")
    added = count * tokens
    cache, mask, positions = (inputs.get(k) for k in ("past_key_values", "attention_mask", "position_ids"))
    past = cache.get_seq_length() if cache is not None else 0
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"a soft prompt cannot extend a {type(mask).__name__}; wanted a tensor: trainer.attention=sdpa"
        )
    if past:
        added = 0
        fits = mask is None or (mask.dim() == 2 and mask.shape[1] + tokens == past + length)
        if segments is not None or not fits:
            raise ValueError(
                f"the cache holds {past} tokens, which do not fit the soft prompt of {tokens}; wanted a "
                "cache that this adapter filled, with a 2-D attention_mask"
            )
    elif segments is not None and (mask is None or mask.dim() != 4):
        raise ValueError(
            "a soft prompt in packed rows needs to know who sees whom; pass attention_mask "
            "[batch, 1, seq, seq]"
        )
    owner = torch.arange(count, device=embeds.device).repeat_interleave(tokens)
    if mask is not None:
        own = owner.new_zeros(batch, length) if segments is None else segments.to(owner)
        inputs["attention_mask"] = _mask(mask, owner, own, tokens)
    if positions is None:
        first = past - tokens if past else 0  # the cache counts the virtual tokens already
        positions = torch.arange(first, first + length, device=embeds.device)[None]
    before = torch.arange(tokens, device=embeds.device).repeat(count)[None].expand(len(positions), -1)
    inputs["position_ids"] = torch.cat([before[:, :added], positions + tokens], 1)
    if added:
        embeds = torch.cat([prompts.flatten(1, 2).to(embeds), embeds], 1)
    if segments is not None:
        segments = torch.cat([owner.expand(batch, -1), segments.to(owner)], 1)
    return inputs | {"inputs_embeds": embeds}, segments, added


def _mask(mask: Tensor, owner: Tensor, own: Tensor, tokens: int) -> Tensor:
    """The attention mask, extended: every token sees the virtual tokens of its segment, they see no token.

    Args:
        mask: `[batch, keys]`, or `[batch or 1, heads or 1, seq, seq]`, boolean or additive.
        owner: `[segments * tokens]`, the segment of each virtual token.
        own: `[batch, seq]`, the segment of each token.
        tokens: Virtual tokens of a segment.
    """
    if mask.dim() == 2:
        return torch.cat([mask.new_ones(mask.shape[0], tokens), mask], 1)
    added, (batch, length) = len(owner), own.shape
    places = torch.arange(added, device=owner.device)
    sees = owner.new_zeros(batch, mask.shape[1], added + length, added + length, dtype=torch.bool)
    sees[:, :, :added, :added] = (owner[:, None] == owner) & (places[:, None] >= places)
    sees[:, :, added:, :added] = (own[..., None] == owner)[:, None]
    if mask.dtype != torch.bool:  # an additive mask
        sees = torch.zeros_like(sees, dtype=mask.dtype).masked_fill(~sees, torch.finfo(mask.dtype).min)
    sees[:, :, added:, added:] = mask
    return sees


def cut(output: Any, added: int) -> Any:
    """Takes the virtual tokens off the hidden states of the backbone's output."""
    output["last_hidden_state"] = output["last_hidden_state"][:, added:]
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(states[:, added:] for states in output["hidden_states"])
    return output
