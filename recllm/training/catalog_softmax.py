"""Cross-entropy of a softmax over a catalog, in blocks: all scores never stand in memory at once."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

BLOCK = 1 << 20
"""Scores of a block (float32, 4 MiB): what the last cache of a processor holds."""


def catalog_cross_entropy(users: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """Sum over rows of -log softmax(users items^T) at each row's target.

    The same number as `cross_entropy(users @ items.t(), target, reduction="sum")`, and the same gradients.
    The gradients are computed in the forward pass, block by block while a block's scores are in the cache:
    memory is that of users and items, and not of every score three times over.

    Args:
        users: float `[n, hidden]`.
        items: float `[m, hidden]`.
        target: int64 `[n]`, places in `items`.

    Returns:
        float32 scalar. Under autocast the products are computed in its dtype, and all else in float32.
    """
    return cast(Tensor, _CrossEntropy.apply(users, items, target))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, users: Tensor, items: Tensor, target: Tensor) -> Tensor:
        loss = torch.zeros((), device=users.device)
        of_users = torch.empty_like(users, dtype=torch.float32)
        of_items = torch.zeros_like(items, dtype=torch.float32)
        size = max(1, BLOCK // len(items))
        for low in range(0, len(users), size):
            block = users[low : low + size]
            own = target[low : low + size, None]
            scores = (block @ items.t()).float()
            own_scores = scores.gather(1, own)
            highest = scores.amax(1, keepdim=True)
            odds = scores.sub_(highest).exp_()
            total = odds.sum(1, keepdim=True)
            loss += (total.log() + highest - own_scores).sum()
            # The gradient of a row's loss by its scores: softmax, less 1 at the target.
            gradient = odds.div_(total)
            gradient.scatter_add_(1, own, gradient.new_full((len(block), 1), -1.0))
            gradient = gradient.to(block.dtype)
            of_users[low : low + size] = gradient @ items
            of_items += gradient.t() @ block
        ctx.save_for_backward(of_users.to(users.dtype), of_items.to(items.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (outer,) = outputs
        of_users, of_items = ctx.saved_tensors
        return outer * of_users, outer * of_items, None
