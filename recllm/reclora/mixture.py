"""The three mixtures as maps of the rank space, and the mixing weights of the forward in progress.

The A_k lie stacked, the B_k side by side, so that every mixture is: to the rank space by A, a map there, back
by B. No loop over k, and no weights per sample.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from recllm.reclora.config import RecLoraConfig
from recllm.reclora.prompt import Prepended

MISSING = (
    "RecLoRA is active but got no representation; call model(..., representation=R) "
    "or use `with model.disable_adapter():`"
)


def weigh(gate: Tensor, config: RecLoraConfig) -> Tensor:
    """Brings what a gate gives into the form that `mix` and `plain_lora` take; the scale is in it.

    Args:
        gate: alpha `[..., num_meta]`, or for `core` G `[..., r, r]`.
        config: Mixture and scale.

    Returns:
        `product`: a weight for every direction of the rank space, `[..., num_meta * r]`. `factor`:
        `[..., num_meta]`, with the scale's root, since it is multiplied twice. `core`: `[..., r, r]`.
    """
    if config.mixture == "product":
        return (gate * config.scale).repeat_interleave(config.r, dim=-1)
    return gate * (math.sqrt(config.scale) if config.mixture == "factor" else config.scale)


def uniform_weights(config: RecLoraConfig, like: Tensor) -> Tensor:
    """The weights of a gate that is uniform: alpha = 1 / N_m, or G = I."""
    if config.mixture == "core":
        return weigh(torch.eye(config.r).to(like), config)
    return weigh(like.new_full((config.num_meta,), 1 / config.num_meta), config)


def mix(hidden: Tensor, weights: Tensor | None, config: RecLoraConfig) -> Tensor:
    """Maps the rank space.

    Args:
        hidden: A x, `[batch, seq, metas * r]`.
        weights: What `weigh` returned, `[batch, 1 or seq, ...]`; None for a uniform gate.
        config: The mixture.

    Returns:
        `[batch, seq, metas * r]`, for B.
    """
    if weights is None and config.mixture == "product":
        return hidden * (config.scale / config.num_meta)
    if config.mixture == "core":
        assert weights is not None
        maps = weights.to(hidden.dtype).transpose(-1, -2)
        if maps.shape[1] == 1:
            return torch.bmm(hidden, maps[:, 0])
        return (hidden[..., None, :] @ maps)[..., 0, :]
    if config.mixture == "factor":
        hidden_k = hidden.unflatten(-1, (config.num_meta, config.r))
        if weights is None:
            mean = hidden_k.mean(-2) * (config.scale / config.num_meta)
            return mean.repeat(*(1 for _ in mean.shape[:-1]), config.num_meta)
        alpha = weights.to(hidden.dtype)[..., None]
        return (alpha * (alpha * hidden_k).sum(-2, keepdim=True)).flatten(-2)
    assert weights is not None
    return hidden * weights.to(hidden.dtype)


def plain_lora(a: Tensor, b: Tensor, weights: Tensor, config: RecLoraConfig) -> tuple[Tensor, Tensor]:
    """A and B of the plain LoRA, of scale 1, that the mixture is for one gate.

    Args:
        a: The stacked A_k, `[metas * r, d_in]`.
        b: The B_k side by side, `[d_out, metas * r]`.
        weights: What `weigh` returned, without batch and segment axes.
        config: The mixture.

    Returns:
        `[rank, d_in]` and `[d_out, rank]`: rank N_m r for `product`, r for the others.
    """
    weights = weights.to(b)
    if config.mixture == "product":
        return a, b * weights
    if config.mixture == "core":
        return a, b @ weights
    a_k = a.unflatten(0, (config.num_meta, config.r))
    b_k = b.unflatten(1, (config.num_meta, config.r))
    return torch.einsum("n,nri->ri", weights, a_k), torch.einsum("n,onr->or", weights, b_k)


@dataclass(frozen=True)
class GateState:
    """What the representations of one forward became: all that the layers and the soft prompt need of them.

    Attributes:
        weights: Adapter name -> `[num_gates, batch, segments, ...]`, what `weigh` returned.
        prompts: `[batch, segments, tokens, width]` embeddings of the active soft prompts; None: there is
            none.
        segments: `[batch, seq]` int64, the segment of every token; None when a row is one segment.
        scored: Rows and positions, int64 `[M]` each, of the tokens whose hidden states the LM head is given;
            None: it is given whole rows, or the ends of them.
        kept: int64 `[length]`, positions of the row of which alone the LM head is given the hidden states
            (`logits_to_keep` as a tensor); None: the last ones.
        outermost: The module whose forward brought the representation, and ends with it.
        prepended: Where the soft prompt stands; None: it has not been put in yet.
        prepending: The module before whose inputs it was put.
    """

    weights: dict[str, Tensor]
    prompts: Tensor | None
    segments: Tensor | None
    scored: tuple[Tensor, Tensor] | None = None
    kept: Tensor | None = None
    outermost: nn.Module | None = None
    prepended: Prepended | None = None
    prepending: nn.Module | None = None

    def at_head(self, length: int) -> GateState:
        """What the LM head needs, if it is a target module: it comes after the choice of what is scored.

        Args:
            length: Tokens of a row that it is given, its last ones.
        """
        added = 0 if self.prepended is None else self.prepended.added  # and were taken off again
        segments = None if self.segments is None else self.segments[:, added:]
        if self.scored is None:
            if segments is None:
                return replace(self, segments=None)
            ends = segments[:, -length:]
            return replace(self, segments=ends if self.kept is None else segments[:, self.kept])
        rows, positions = self.scored
        segment = torch.zeros_like(rows) if segments is None else segments[rows, positions]
        weights = {name: of_all[:, rows, segment][:, :, None] for name, of_all in self.weights.items()}
        return replace(self, weights=weights, segments=None, scored=None)

    def layer_weights(self, adapter_name: str, gate: int, x: Tensor) -> Tensor:
        """Returns the weights for a layer's input.

        Args:
            adapter_name: The adapter.
            gate: The layer's gate.
            x: The layer's input, `[batch, seq, d_in]`.

        Returns:
            `[batch, 1 or seq, ...]`, on the device of `x`.

        Raises:
            ValueError: If the shapes of `x` and of representation or segments do not fit.
        """
        weights = self.weights[adapter_name][gate].to(x.device)
        if x.dim() != 3 or x.shape[0] != weights.shape[0]:
            raise ValueError(
                f"representation has {weights.shape[0]} rows, a target module's input shape {list(x.shape)}; "
                "wanted [batch, seq, dim] with one representation a row"
            )
        if self.segments is None:
            return weights
        if self.segments.shape != x.shape[:2]:
            raise ValueError(
                f"segments has shape {list(self.segments.shape)}, wanted {list(x.shape[:2])} as input_ids"
            )
        flat = weights.flatten(2)
        index = self.segments.to(x.device)[..., None].expand(-1, -1, flat.shape[-1])
        return flat.gather(1, index).unflatten(2, weights.shape[2:])


class CurrentGates:
    """Holds the gates of the forward in progress; one object that a model and all its RecLoRA layers share.

    It is empty outside of a forward, so that a call that brings no representation meets no weights of an
    earlier one. What a checkpointed layer needs when it is recomputed in the backward is held by
    `GatedCheckpoint`. Each thread has a forward of its own in progress; a copy starts empty.
    """

    def __init__(self) -> None:
        """Starts empty."""
        # An attribute, not a base class: torch.compile follows what is set on the plain type only.
        self._of_thread = threading.local()

    @property
    def state(self) -> GateState | None:
        """Gates of this thread's forward; None: there is none in progress."""
        state: GateState | None = getattr(self._of_thread, "state", None)
        return state

    @state.setter
    def state(self, state: GateState | None) -> None:
        self._of_thread.state = state

    def __reduce__(self) -> tuple[type[CurrentGates], tuple[()]]:
        return CurrentGates, ()

    @contextmanager
    def use(self, state: GateState | None) -> Iterator[None]:
        """Makes `state` the current one within the context."""
        before = self.state
        self.state = state
        try:
            yield
        finally:
            self.state = before
