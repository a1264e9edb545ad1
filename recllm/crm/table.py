"""Embedding tables whose gradient is cheap on a CPU, where that of `nn.Embedding` is most of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Rows(torch.autograd.Function):
    """Rows of a table by id; row 0 is padding, and gets no gradient.

    Arguments of `apply`: table float [n, d]; ids, integers of any shape [...]. Returns [..., d].

    The gradient sorts the ids and sums their rows (`scatter_add_` does, for one index a row), where that of
    `functional.embedding` goes through all ids once a thread: here it takes a half of its time on one thread
    and a third on two, and for rows of one or two values a tenth.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return functional.embedding(ids, table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient of the table [n, d]."""
        (ids,) = ctx.saved_tensors
        grad = grad.reshape(-1, ctx.shape[1])
        index = ids.reshape(-1, 1).long().expand_as(grad)
        of_table = grad.new_zeros(ctx.shape).scatter_add_(0, index, grad)
        of_table[0] = 0.0
        return of_table, None


class Table(nn.Embedding):
    """`nn.Embedding` with `padding_idx=0`, whose dense gradient on a CPU is that of `Rows`.

    Args:
        size: rows n, padding among them.
        dim: width d of a row.
    """

    def __init__(self, size: int, dim: int) -> None:
        """Draws the rows from N(0, 1)."""
        super().__init__(size, dim, padding_idx=0)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of integer ids [...]: [..., d]."""
        if self.sparse or self.weight.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(input)
        rows: Tensor = Rows.apply(self.weight, input)
        return rows
