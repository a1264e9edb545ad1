"""Cross-entropy of a softmax over many classes, in blocks: all scores never stand in memory at once."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

BLOCK = 1 << 20
"""Scores of a block (float32, 4 MiB): what the last cache of a processor holds."""


def blocked_cross_entropy(
    vectors: Tensor, classes: Tensor, target: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Sum over rows of -log softmax(vectors classes^T) at each row's target, weighted by row.

    The same number as `(weight * cross_entropy(vectors @ classes.t(), target, reduction="none")).sum()`, and
    the same gradients. The gradients are computed in the forward pass, block by block while a block's scores
    are in the cache: memory is that of vectors and classes, and not of every score three times over.
    PyTorch's `linear_cross_entropy` in chunks knows no weight of a row.

    Args:
        vectors: float `[n, hidden]`: users, or hidden states of an LM.
        classes: float `[m, hidden]`: items, or the weight of an LM's head.
        target: int64 `[n]`, places in `classes`.
        weight: float `[n]`; None: 1 for each row.

    Returns:
        Scalar, float32 (float64 of such vectors). Under autocast the products are computed in its dtype, and
        all else in float32.
    """
    return cast(Tensor, _CrossEntropy.apply(vectors, classes, target, weight))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, classes: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        wide = torch.promote_types(vectors.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=vectors.device)
        of_vectors = torch.empty_like(vectors, dtype=wide)
        of_classes = torch.zeros_like(classes, dtype=wide)
        size = max(1, BLOCK // len(classes))
        for low in range(0, len(vectors), size):
            rows = slice(low, low + size)
            block = vectors[rows]
            own = target[rows, None]
            scores = (block @ classes.t()).to(wide)
            own_scores = scores.gather(1, own)
            highest = scores.amax(1, keepdim=True)
            odds = scores.sub_(highest).exp_()
            total = odds.sum(1, keepdim=True)
            losses = total.log() + highest - own_scores
            # The gradient of a row's loss by its scores: softmax, less 1 at the target.
            gradient = odds.div_(total)
            gradient.scatter_add_(1, own, gradient.new_full((len(block), 1), -1.0))
            if weight is not None:
                losses = losses * weight[rows, None]
                gradient.mul_(weight[rows, None])
            loss += losses.sum()
            gradient = gradient.to(block.dtype)
            of_vectors[rows] = gradient @ classes
            of_classes += gradient.t() @ block
        ctx.save_for_backward(of_vectors.to(vectors.dtype), of_classes.to(classes.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (outer,) = outputs
        of_vectors, of_classes = ctx.saved_tensors
        return outer * of_vectors, outer * of_classes, None, None
