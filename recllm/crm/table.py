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


class WeightedRows(torch.autograd.Function):
    """Weighted sums of a table's rows, of which no rows [B, T, d] are made.

    Arguments of `apply`: table float [n, d]; ids, integers [B, T]; weights [B, C, T]. Returns [B, C, d].
    Row 0 gets no gradient.

    Forward and gradient of the table are PyTorch's embedding bags, which multiply and add rows as they read
    them: the bags of the one are samples and hold rows of the table, those of the other are rows of the table
    and hold samples. With two sets of weights that takes half of the time of lookups and products (61,000
    ids, 3,700 rows of 32 values).
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(table, ids, weights)
        samples, length = ids.shape
        flat = ids.reshape(-1)
        starts = torch.arange(0, samples * length, length, dtype=ids.dtype)
        sums = [_bags(table, flat, starts, one) for one in _sets(weights, table.dtype)]
        return torch.stack(sums, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        """Gradients of the table [n, d] and of the weights [B, C, T]."""
        table, ids, weights = ctx.saved_tensors
        length = ids.shape[1]
        flat = ids.reshape(-1)
        place = flat.sort(stable=True).indices
        counts = torch.bincount(flat, minlength=len(table))
        starts = counts.cumsum(0) - counts
        sample = place // length
        of_table = torch.zeros_like(table)
        for number, one in enumerate(_sets(weights, table.dtype)):
            of_table += _bags(grad[:, number].contiguous(), sample, starts, one[place])
        of_table[0] = 0.0
        of_weights = torch.bmm(grad, functional.embedding(ids, table).transpose(1, 2))
        return of_table, None, of_weights.to(weights.dtype)


def _sets(weights: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Each set of weights [B, C, T], in the order of flat ids: [B T]."""
    return [one.reshape(-1).to(dtype) for one in weights.unbind(1)]


def _bags(rows: Tensor, ids: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Sums of weighted rows, of the ids from each start up to the next."""
    return functional.embedding_bag(ids, rows, starts, mode="sum", per_sample_weights=weights)


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
        if not isinstance(length, int):  # of an export for histories of any length
            return False
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
        weights: [B, C, T], of any value where `ids` is 0.

    Returns:
        [B, C, d].
    """
    samples, length = ids.shape
    if table.counts(length):
        often = weights.new_zeros(samples, weights.shape[1], table.num_embeddings)
        return often.scatter_add(2, ids.long().unsqueeze(1).expand_as(weights), weights) @ table.rows()
    if table.sparse or ids.device.type != "cpu" or torch.compiler.is_compiling() or not len(ids):
        return torch.bmm(weights, table(ids))
    sums: Tensor = WeightedRows.apply(table.weight, ids, weights)
    return sums
