"""What reads the representation: small MLPs, one for the gate's mixing weights, one for a soft prompt."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.reclora.config import RecLoraConfig

FLOOR = 1e-4
"""Variance that whitening adds to each direction, as a fraction of the widest one's: narrow ones stay so."""


class Head(nn.Module):
    """`num_heads` independent MLPs of the whitened representation: W_2 ReLU(LN(W_1 R + b_1)) + b_2.

    They are held as stacked weights and computed by one batched product. W_2 starts at zero, so that nothing
    depends on the representation at the start.

    Its numbers stay float32 (or wider) when the model is converted to 16 bit (`.half()`, `.to(dtype)`,
    Lightning's `bf16-true`): entries of the whitening reach thousands, where bfloat16 is off by 8.

    Args:
        num_heads: G.
        config: Width of the representation, hidden width.
        out: Numbers that a head makes.
    """

    mean: Tensor
    whiten: Tensor

    def __init__(self, num_heads: int, config: RecLoraConfig, out: int) -> None:
        """Draws W_1 and b_1 as `nn.Linear` does; the rest starts at zero or one."""
        super().__init__()
        dim = config.representation_dim
        hidden = config.gate_hidden
        bound = 1 / math.sqrt(dim)  # the default of nn.Linear
        self.weight_1 = nn.Parameter(torch.empty(num_heads, hidden, dim).uniform_(-bound, bound))
        self.bias_1 = nn.Parameter(torch.empty(num_heads, hidden).uniform_(-bound, bound))
        self.norm_weight = nn.Parameter(torch.ones(num_heads, hidden))
        self.norm_bias = nn.Parameter(torch.zeros(num_heads, hidden))
        self.weight_2 = nn.Parameter(torch.zeros(num_heads, out, hidden))
        self.bias_2 = nn.Parameter(torch.zeros(num_heads, out))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("whiten", torch.eye(dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Head:
        """Applies a conversion as `nn.Module` does, but for those to less than float32."""

        def convert(value: Tensor) -> Tensor:
            converted = fn(value)
            if converted.dtype not in (torch.bfloat16, torch.float16):
                return converted
            return value.to(converted.device, torch.promote_types(value.dtype, torch.float32))

        super()._apply(convert, recurse)
        return self

    def set_statistics(self, mean: Tensor, covariance: Tensor) -> None:
        """Sets the statistics by which the representation R is whitened: (C + f I)^-1/2 (R - mean).

        Most of the variance of a CRM's last layer lies along its logit; what else it knows are directions a
        hundred times narrower, which neither survive the LayerNorm nor move in a pass of AdamW where columns
        are only brought to variance 1. f is `FLOOR` times the largest eigenvalue of C, so that noise in the
        narrowest ones is not blown up. On MovieLens-1M all but three lie below a thousandth of the widest,
        and what helps to read a CRM on rows later than its own lies there (docs/stage2.md).

        Args:
            mean: `[dim]`.
            covariance: C, `[dim, dim]`, symmetric. Zero (one row, a dead CRM): R is only centered.

        Raises:
            ValueError: If a shape is wrong, a value not finite, or C no covariance.
        """
        for name, value, wanted in (("mean", mean, self.mean), ("covariance", covariance, self.whiten)):
            if value.shape != wanted.shape:
                raise ValueError(
                    f"set_statistics: {name} has shape {list(value.shape)}, wanted {list(wanted.shape)} "
                    "(representation_dim of the config)"
                )
            if not torch.isfinite(value).all():
                raise ValueError(f"set_statistics: {name} holds values that are not finite")
        variance, directions = torch.linalg.eigh(covariance.double())
        widest = float(variance[-1])
        if float(variance[0]) < -1e-6 * abs(widest) or widest < 0:
            raise ValueError("set_statistics: covariance has a negative eigenvalue")
        scale = (variance.clamp_min(0) + FLOOR * widest).rsqrt() if widest else torch.ones_like(variance)
        self.mean.copy_(mean)
        self.whiten.copy_(directions * scale @ directions.T)

    def mlp_outputs(self, representation: Tensor) -> Tensor:
        """Returns what the MLPs make of a representation.

        Computed in the head's own precision (float32 also in a 16-bit LM), under autocast too: it is cheap.

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
            x = (representation.to(self.mean) - self.mean) @ self.whiten
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
        beta = self.mlp_outputs(representation)
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
        tokens = torch.randint(len(table), (self.tokens,), device=table.device)
        self.bias_2.data.copy_(table[tokens].reshape(1, -1))

    def forward(self, representation: Tensor) -> Tensor:
        """Returns embeddings `[batch, segments, tokens, width]` for representations `[batch, segments, dim]`.

        Raises:
            ValueError: If the representation's width is not the config's.
        """
        return self.mlp_outputs(representation)[0].unflatten(-1, (self.tokens, -1))
