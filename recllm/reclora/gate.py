"""The gate of RecLoRA: representation -> mixing weights alpha; and the weights of the forward in progress."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.reclora.config import RecLoraConfig


class Gate(nn.Module):
    """`num_gates` independent MLPs: beta = W_2 ReLU(LN(W_1 R + b_1)) + b_2, alpha = softmax(beta / t_p).

    They are held as stacked weights and computed by one batched product. W_2 and b_2 start at zero, so that
    alpha starts uniform whatever the representation.

    Args:
        num_gates: G; 1 for a shared gate, the number of target modules otherwise.
        config: Widths and temperature.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_gates: int, config: RecLoraConfig) -> None:
        """Draws W_1 and b_1 as `nn.Linear` does; the rest starts at zero or one."""
        super().__init__()
        dim, hidden = config.representation_dim, config.gate_hidden
        bound = 1 / math.sqrt(dim)  # the default of nn.Linear
        self.temperature = config.gate_temperature
        self.weight_1 = nn.Parameter(torch.empty(num_gates, hidden, dim).uniform_(-bound, bound))
        self.bias_1 = nn.Parameter(torch.empty(num_gates, hidden).uniform_(-bound, bound))
        self.norm_weight = nn.Parameter(torch.ones(num_gates, hidden))
        self.norm_bias = nn.Parameter(torch.zeros(num_gates, hidden))
        self.weight_2 = nn.Parameter(torch.zeros(num_gates, config.num_meta, hidden))
        self.bias_2 = nn.Parameter(torch.zeros(num_gates, config.num_meta))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets the statistics by which the representation is standardized.

        Args:
            mean: `[dim]`.
            std: `[dim]`, not negative. A column with std 0 (a dead unit of the CRM) is only centred.

        Raises:
            ValueError: If a shape is wrong, a value not finite, or a std negative.
        """
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != self.mean.shape:
                raise ValueError(
                    f"set_statistics: {name} has shape {list(value.shape)}, wanted {list(self.mean.shape)} "
                    "(representation_dim of the config)"
                )
            if not torch.isfinite(value).all():
                raise ValueError(f"set_statistics: {name} holds values that are not finite")
        if (std < 0).any():
            raise ValueError("set_statistics: std holds negative values")
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, representation: Tensor) -> Tensor:
        """Returns alpha.

        Computed in the gate's own precision (float32 over a 16-bit LM), under autocast too: the softmax is
        cheap.

        Args:
            representation: `[batch, segments, dim]`, any float dtype.

        Returns:
            alpha `[num_gates, batch, segments, num_meta]`, positive, summing to 1 over the last axis.

        Raises:
            ValueError: If the representation's width is not the config's.
        """
        if representation.shape[-1] != self.mean.shape[0]:
            raise ValueError(
                f"representation is {representation.shape[-1]} wide, wanted {self.mean.shape[0]}; "
                "pass what the adapter's CRM computes, or set RecLoraConfig(representation_dim=...)"
            )
        with torch.autocast(representation.device.type, enabled=False):
            x = (representation.to(self.mean) - self.mean) / self.std
            hidden = torch.einsum("bsd,ghd->gbsh", x, self.weight_1) + self.bias_1[:, None, None]
            hidden = F.layer_norm(hidden, hidden.shape[-1:])
            hidden = F.relu(hidden * self.norm_weight[:, None, None] + self.norm_bias[:, None, None])
            beta = torch.einsum("gbsh,gnh->gbsn", hidden, self.weight_2) + self.bias_2[:, None, None]
            return torch.softmax(beta / self.temperature, dim=-1)


@dataclass(frozen=True)
class RankWeights:
    """What the layers need of one forward: a weight for every direction of the rank space.

    Attributes:
        weights: Adapter name -> `[num_gates, batch, segments, num_meta * r]`: scale * alpha, each alpha r
            times.
        segments: `[batch, seq]` int64, the segment of every token; None when a row is one segment.
    """

    weights: dict[str, Tensor]
    segments: Tensor | None

    def of(self, adapter_name: str, gate: int, x: Tensor) -> Tensor:
        """Returns the weights for a layer's input.

        Args:
            adapter_name: The adapter.
            gate: The layer's gate.
            x: The layer's input, `[batch, seq, d_in]`.

        Returns:
            `[batch, 1 or seq, num_meta * r]`, on the device of `x`.

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
        return weights.gather(1, self.segments.to(x.device)[..., None].expand(-1, -1, weights.shape[-1]))


class OpenGates:
    """The rank weights of the forward in progress; one object that a model and all its RecLoRA layers share.

    It is empty outside of a forward, so that a call that brings no representation meets no weights of an
    earlier one. What a checkpointed layer needs when it is recomputed in the backward is held by
    `GatedCheckpoint`.
    """

    def __init__(self) -> None:
        """Starts with nothing open."""
        self.current: RankWeights | None = None

    @contextmanager
    def opened(self, weights: RankWeights | None) -> Iterator[None]:
        """Makes `weights` the current ones within the context."""
        before, self.current = self.current, weights
        try:
            yield
        finally:
            self.current = before
