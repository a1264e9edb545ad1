"""Puts virtual tokens before the inputs of an LM's decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

MARK = "reclora_prepended"
"""Attribute of a cache that was filled behind a soft prompt: its `Prepended`."""
ROWS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
"""Arguments of a forward that have a place for every token and are extended by those of the virtual ones."""


@dataclass(frozen=True)
class Prepended:
    """Where the virtual tokens of a forward stand.

    Attributes:
        added: Virtual tokens that this forward was given; 0 where its cache holds them already.
        start: int64 `[batch]`, padding before them; None: there is none.
    """

    added: int
    start: Tensor | None


STATIC = (
    "a soft prompt cannot extend {}, as a static cache is given; wanted a cache that grows, and a 2-D mask: "
    "leave cache_implementation out"
)
"""What is said of a cache, or its mask, that has no room for virtual tokens."""


def prepend_tokens(
    inputs: dict[str, Any], prompts: Tensor, segments: Tensor | None, embed: nn.Module
) -> tuple[dict[str, Any], Tensor | None, Prepended]:
    """Extends the inputs of one forward by the virtual tokens, at positions 0 to m - 1; all others move by m.

    They stand directly before the first real token of a row, behind the padding of a left-padded one: LMs
    with windows count the places between, recurrent ones walk over them. Segments of a packed row have
    virtual tokens each, seen by that segment only, before the row. When the cache of `generate` holds
    something, they are in it already.

    Args:
        inputs: Forward arguments of the decoder, by name.
        prompts: `[batch, segments, m, width]`.
        segments: `[batch, seq]`, or None when a row is one segment.
        embed: The LM's input embeddings.

    Returns:
        The arguments, `segments` of the extended row, and where the virtual tokens stand.

    Raises:
        ValueError: If packed rows come without a 4-D mask, any with a mask that is no tensor, other arguments
            that have a place for every token, or a cache without these virtual tokens.
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
    cache = find_cache(inputs)
    is_filled = cache is not None and _is_filled(cache)
    _check_inputs(inputs, batch, length)
    if any(isinstance(layer, StaticLayer) for layer in getattr(cache, "layers", ())):
        # One of a fixed length has no room for virtual tokens, whether or not a mask comes with it.
        raise ValueError(STATIC.format("a cache of fixed length"))
    _check_mask(mask, length, cache if is_filled else None, prompts, packed=segments is not None)

    start = None
    if is_filled:
        start = getattr(cache, MARK).start
    elif mask is not None and mask.dim() == 2:
        start = (mask.cumsum(-1) == 0).sum(-1)  # right padding and none: 0
    added = 0 if is_filled else num_segments * num_tokens

    owner = torch.arange(num_segments, device=embeds.device).repeat_interleave(num_tokens)
    if mask is not None and mask.dim() == 2:
        inputs["attention_mask"] = _insert(mask.new_ones(batch, num_tokens), mask, start)
    elif mask is not None:
        token_segments = owner.new_zeros(batch, length) if segments is None else segments.to(owner)
        inputs["attention_mask"] = _extend_mask(mask, owner, token_segments)

    positions = inputs.get("position_ids")
    if positions is None and segments is not None:
        positions = torch.arange(length, device=embeds.device)[None]
    if positions is not None:  # else the LM counts them itself, of the extended row
        positions = positions.expand(batch, -1) + num_tokens
        if added:
            virtual = torch.arange(num_tokens, device=positions.device).repeat(num_segments)
            positions = _insert(virtual.to(positions).expand(batch, -1), positions, start)
        inputs["position_ids"] = positions

    if added:
        embeds = _insert(prompts.flatten(1, 2).to(embeds), embeds, start)
    inputs["inputs_embeds"] = embeds
    if segments is not None:
        segments = torch.cat([owner.expand(batch, -1), segments.to(owner)], 1)
    return inputs, segments, Prepended(added, start)


def _insert(virtual: Tensor, row: Tensor, start: Tensor | None) -> Tensor:
    """Puts `[batch, m, ...]` into `[batch, seq, ...]` at the places `start` `[batch]`; None: before it."""
    joined = torch.cat([virtual, row], 1)
    if start is None:
        return joined
    num_tokens = virtual.shape[1]
    place = torch.arange(joined.shape[1], device=row.device)
    first = start.to(row.device)[:, None]
    not_padding = torch.where(place < first + num_tokens, place - first, place)
    return _take(joined, torch.where(place < first, place + num_tokens, not_padding))


def _take(row: Tensor, place: Tensor) -> Tensor:
    """The entries of `[batch, seq, ...]` at the places `[batch, n]`."""
    index = place.reshape(*place.shape, *(1 for _ in row.shape[2:])).expand(-1, -1, *row.shape[2:])
    return row.gather(1, index)


def find_cache(arguments: Any) -> Any:
    """The cache among the arguments or outputs of a forward, under either name of transformers; or None."""
    cache = arguments.get("past_key_values")
    return arguments.get("cache_params") if cache is None else cache


def _length(cache: Any) -> int | None:
    """Tokens that a cache holds; None: it has a state in their place (no layer attends)."""
    layers = getattr(cache, "layers", ())
    if layers and not any(hasattr(layer, "get_seq_length") for layer in layers):
        return None
    return int(cache.get_seq_length())


def _is_filled(cache: Any) -> bool:
    """Whether a cache holds anything."""
    length = _length(cache)
    return bool(cache.has_previous_state()) if length is None else length > 0


def _check_inputs(inputs: dict[str, Any], batch: int, length: int) -> None:
    """Refuses arguments that have a place for every token and are not known here.

    Args:
        inputs: Forward arguments of the decoder, by name.
        batch: Rows.
        length: Tokens of a row.

    Raises:
        ValueError: As `prepend_tokens`.
    """
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or (name in ROWS and name != "position_ids"):
            continue
        if name == "position_ids" and value.dim() == 2:
            continue
        if (batch, length) in (value.shape[:2], value.shape[1:3]):
            raise ValueError(
                f"a soft prompt cannot extend {name} {list(value.shape)}; leave it out, or use an adapter "
                "without virtual tokens (soft_prompt=0)"
            )


def _check_mask(mask: Any, length: int, filled: Any, prompts: Tensor, packed: bool) -> None:
    """Refuses what a soft prompt cannot extend.

    Args:
        mask: The forward's `attention_mask`.
        length: Tokens of a row.
        filled: The forward's cache, if it holds something.
        prompts: As for `prepend_tokens`.
        packed: Whether rows hold several segments.

    Raises:
        ValueError: As `prepend_tokens`.
    """
    is_tensor = isinstance(mask, Tensor)
    if isinstance(mask, dict) or (is_tensor and mask.dim() == 4 and mask.shape[2:] != (length, length)):
        form = list(mask.shape) if is_tensor else "of a dict"
        raise ValueError(STATIC.format(f"the attention_mask {form}"))
    if mask is not None and not is_tensor:
        raise ValueError(
            f"a soft prompt cannot extend a {type(mask).__name__}; wanted a tensor: trainer.attention=sdpa"
        )
    if filled is not None:
        batch, _, num_tokens = prompts.shape[:3]
        held: Any = getattr(filled, MARK, None)
        fits = not packed and held is not None and held.added == num_tokens
        if fits and held.start is not None:
            fits = len(held.start) == batch
        if fits and mask is not None:
            fits = mask.dim() == 2
        past = _length(filled)
        if fits and mask is not None and past is not None:
            fits = mask.shape[1] + num_tokens == past + length
        if not fits:
            raise ValueError(
                f"the cache holds {'a state' if past is None else f'{past} tokens'}, which "
                f"{'does' if past is None else 'do'} not fit the soft prompt of {num_tokens}; wanted a cache "
                "that this adapter filled, with a 2-D attention_mask"
            )
    elif packed and (mask is None or mask.dim() != 4):
        raise ValueError(
            "a soft prompt in packed rows needs to know who sees whom; pass attention_mask "
            "[batch, 1, seq, seq]"
        )


def _extend_mask(mask: Tensor, owner: Tensor, segments: Tensor) -> Tensor:
    """A 4-D attention mask, extended: every token sees the virtual tokens of its segment, they see no token.

    Args:
        mask: `[batch or 1, heads or 1, seq, seq]`, boolean or additive.
        owner: `[segments * num_tokens]`, the segment of each virtual token.
        segments: `[batch, seq]`, the segment of each token.
    """
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


def remove_tokens(output: Any, prepended: Prepended) -> Any:
    """Takes the virtual tokens off the hidden states of the decoder's output, and marks its cache.

    Raises:
        ValueError: If the output has no `last_hidden_state` by that name.
    """
    if not prepended.added:
        return output
    if not hasattr(output, "get") or output.get("last_hidden_state") is None:
        raise ValueError(
            f"a soft prompt got a {type(output).__name__} from the LM's decoder, wanted an output with "
            "last_hidden_state: leave return_dict out, or use soft_prompt=0"
        )
    output["last_hidden_state"] = _without(output["last_hidden_state"], prepended)
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(_without(states, prepended) for states in output["hidden_states"])
    cache = find_cache(output)
    if cache is not None:
        setattr(cache, MARK, prepended)
    return output


def _without(states: Tensor, prepended: Prepended) -> Tensor:
    """Hidden states `[batch, seq, width]` of the row alone."""
    if prepended.start is not None:
        place = torch.arange(states.shape[1], device=states.device) - prepended.added
        start = prepended.start.to(states.device)
        # The virtual tokens' places come first, whatever is put there: what follows has the strides of a row
        # that was not reordered, and so the same sums behind it.
        states = _take(
            states, torch.where(place < start[:, None], place.clamp(min=0), place + prepended.added)
        )
    return states[:, prepended.added :]
