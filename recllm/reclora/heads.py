"""What reads the representation: small MLPs, one for the gate's mixing weights, one for a soft prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.reclora.config import RecLoraConfig


class Head(nn.Module):
    """`num_heads` independent MLPs of the standardized representation: W_2 ReLU(LN(W_1 R + b_1)) + b_2.

    They are held as stacked weights and computed by one batched product. W_2 starts at zero, so that nothing
    depends on the representation at the start.

    Args:
        num_heads: G.
        config: Width of the representation, hidden width.
        out: Numbers that a head makes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_heads: int, config: RecLoraConfig, out: int) -> None:
        """Draws W_1 and b_1 as `nn.Linear` does; the rest starts at zero or one."""
        super().__init__()
        dim, hidden = config.representation_dim, config.gate_hidden
        bound = 1 / math.sqrt(dim)  # the default of nn.Linear
        self.weight_1 = nn.Parameter(torch.empty(num_heads, hidden, dim).uniform_(-bound, bound))
        self.bias_1 = nn.Parameter(torch.empty(num_heads, hidden).uniform_(-bound, bound))
        self.norm_weight = nn.Parameter(torch.ones(num_heads, hidden))
        self.norm_bias = nn.Parameter(torch.zeros(num_heads, hidden))
        self.weight_2 = nn.Parameter(torch.zeros(num_heads, out, hidden))
        self.bias_2 = nn.Parameter(torch.zeros(num_heads, out))
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

    def raw(self, representation: Tensor) -> Tensor:
        """Returns the MLPs' outputs.

        Computed in the head's own precision (float32 over a 16-bit LM), under autocast too: it is cheap.

        Args:
            representation: `[batch, segments, dim]`, any float dtype.

        Returns:
            `[num_heads, batch, segments, out]`.

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
            return torch.einsum("gbsh,gnh->gbsn", hidden, self.weight_2) + self.bias_2[:, None, None]


class Gate(Head):
    """Mixing weights: alpha = softmax(beta / t_p), or for the mixture `core` the matrix G = I + beta.

    b_2 starts at zero as W_2 does, so that alpha starts uniform, and G at the identity, whatever the
    representation.

    Args:
        num_gates: G; 1 for a shared gate, the number of target modules otherwise.
        config: Widths, temperature, mixture.
    """

    def __init__(self, num_gates: int, config: RecLoraConfig) -> None:
        """Makes the heads."""
        self.core = config.r if config.mixture == "core" else 0
        super().__init__(num_gates, config, self.core**2 or config.num_meta)
        self.temperature = config.gate_temperature

    def forward(self, representation: Tensor) -> Tensor:
        """Returns the mixing weights.

        Args:
            representation: `[batch, segments, dim]`, any float dtype.

        Returns:
            alpha `[num_gates, batch, segments, num_meta]`, positive, summing to 1 over the last axis; for
            `core` G `[num_gates, batch, segments, r, r]`.

        Raises:
            ValueError: If the representation's width is not the config's.
        """
        beta = self.raw(representation)
        if self.core:
            return beta.unflatten(-1, (self.core, self.core)) + torch.eye(self.core).to(beta)
        return torch.softmax(beta / self.temperature, dim=-1)


class SoftPrompt(Head):
    """Virtual tokens of a representation (the soft prompts of ReLLaX): embeddings to put before the prompt.

    b_2 starts at embeddings of tokens drawn from the vocabulary, as in prompt tuning (arXiv 2104.08691,
    section 3.2), so that all representations start with the same ordinary tokens. The start is therefore not
    the LM's own output, which has none.

    Args:
        config: Number of tokens, widths.
        table: The LM's input embeddings, `[vocabulary, width]`.
    """

    def __init__(self, config: RecLoraConfig, table: Tensor) -> None:
        """Draws the tokens."""
        self.tokens = config.soft_prompt
        super().__init__(1, config, self.tokens * table.shape[1])
        drawn = table[torch.randint(len(table), (self.tokens,), device=table.device)]
        self.bias_2.data.copy_(drawn.reshape(1, -1))

    def forward(self, representation: Tensor) -> Tensor:
        """Returns embeddings `[batch, segments, tokens, width]` for representations `[batch, segments, dim]`.

        Raises:
            ValueError: If the representation's width is not the config's.
        """
        return self.raw(representation)[0].unflatten(-1, (self.tokens, -1))
