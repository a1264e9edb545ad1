"""Embedding tables whose gradient is cheap on a CPU, and what histories need of them without lookups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

COUNTED = 8
"""What T events share of a table of up to 8 T rows is computed once a row of it, not once an event."""


class Rows(torch.autograd.Function):
    """Rows of a table by id; row 0 is padding, and gets no gradient.

    Arguments of `apply`: table float [n, d]; ids, integers of any shape [...]. Returns [..., d].

    The gradient sorts the ids and sums their rows (`scatter_add_` does, for one index a row), where that of
    `functional.embedding` goes through all ids once a thread: lookup and gradient of 16 values take six
    tenths of its time on one thread and four on two, of one value an eighth (120,000 ids, 3,700 rows).
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


def rows_of(table: Tensor, ids: Tensor) -> Tensor:
    """`Rows` on a CPU; what PyTorch has for it on a GPU, and for the compiler."""
    if table.device.type != "cpu" or torch.compiler.is_compiling():
        return functional.embedding(ids, table, padding_idx=0)
    rows: Tensor = Rows.apply(table, ids)
    return rows


class Table(nn.Embedding):
    """`nn.Embedding` with `padding_idx=0`, whose dense gradient is that of `rows_of`.

    Args:
        size: rows n, padding among them.
        dim: width d of a row.
    """

    def __init__(self, size: int, dim: int) -> None:
        """Draws the rows from N(0, 1)."""
        super().__init__(size, dim, padding_idx=0)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of integer ids [...]: [..., d]."""
        return super().forward(input) if self.sparse else rows_of(self.weight, input)

    def rows(self) -> Tensor:
        """All rows [n, d], of which row 0 gets no gradient, whatever is made of them."""
        return torch.cat([self.weight[:1].detach(), self.weight[1:]])

    def counts(self, length: int) -> bool:
        """Whether events are counted by row, rather than looked up; not where rows are trained alone."""
        return not self.sparse and self.num_embeddings <= COUNTED * length


def products(table: Table, ids: Tensor, query: Tensor) -> Tensor:
    """Inner products of a table's rows with one vector a sample: ids [B, T], query [B, d] -> [B, T]."""
    if table.counts(ids.shape[1]):
        values = (query @ table.weight.t()).gather(1, ids.long())
        return values.masked_fill(ids == 0, 0.0)  # so that padding has no gradient
    return torch.bmm(table(ids), query.unsqueeze(2)).squeeze(2)


def weighted_sums(table: Table, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of a table's rows, for several sets of weights at once.

    Args:
        table: n rows of width d; row 0, which is zero, gets no gradient, whatever its weights.
        ids: integers [B, T].
        weights: [B, C, T], 0 where `ids` is padding; events of code 0, as those without a rating, have some.

    Returns:
        [B, C, d].
    """
    samples, length = ids.shape
    if table.counts(length):
        often = weights.new_zeros(samples, weights.shape[1], table.num_embeddings)
        return often.scatter_add(2, ids.long().unsqueeze(1).expand_as(weights), weights) @ table.rows()
    return torch.bmm(weights, table(ids))
