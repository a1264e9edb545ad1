"""Target attention in pieces that fit the processor's cache, forward and backward.

The largest tensors of DIN and SIM are the hidden layers of the activation unit: [B, T, h] floats, 31 MB for
4,096 samples of 30 events and 64 units. Written as whole-batch operations each of them goes to memory and
back several times, and training waits for memory. Here a piece of the batch (`PIECE` bytes) runs through all
layers while it lies in the cache, forward and again backward, where its hidden layers are computed anew
rather than kept.

Nor is a product computed for what few rows decide: events that differ by a rating and a time interval share
what the first layer makes of these two (`rows`), and what a query changes in that layer is one matrix a
sample, not one vector an event.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PIECE = 4 * 2**20
"""Bytes of one piece's intermediate tensors on a CPU, for each thread; best of 1 to 16 MiB."""


class _Work:
    """Tensors that every piece of a batch uses again."""

    def __init__(
        self, vectors: Sequence[Tensor], samples: int, matrix: Tensor, widths: Sequence[int]
    ) -> None:
        length = vectors[0].shape[1]
        self.columns = _columns(vectors)
        self.matrix = matrix.new_empty(samples, *matrix.shape)
        self.hidden = [matrix.new_empty(samples * length, hidden) for hidden in widths]
        self.marked = torch.empty_like(self.hidden[0])

    def run(
        self,
        vectors: Sequence[Tensor],
        marks: Sequence[tuple[Tensor, Tensor]],
        query: Tensor,
        constant: Tensor,
        of_event: Tensor,
        of_product: Tensor,
        deeper: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[Tensor]]:
        """First layers' matrices [c, d, h] and hidden layers [c T, h] after ReLU of a piece."""
        samples, length, _ = vectors[0].shape
        matrix = torch.addcmul(of_event, query.unsqueeze(2), of_product, out=self.matrix[:samples])
        hidden = [layer[: samples * length] for layer in self.hidden]
        first = hidden[0].view(samples, length, -1)
        if marks:
            self._look_up(marks, hidden[0])
            first.add_(constant.unsqueeze(1))
        else:
            first.copy_(constant.unsqueeze(1).expand_as(first))
        for part, columns in zip(vectors, self.columns, strict=True):
            first.baddbmm_(part, matrix[:, columns])
        hidden[0].relu_()
        for below, above, (weight, bias) in zip(hidden, hidden[1:], deeper, strict=False):
            torch.addmm(bias, below, weight.t(), out=above).relu_()
        return matrix, hidden

    def _look_up(self, marks: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> None:
        """Sum of the rows that the marks name, `out` [c T, h]."""
        (ids, rows), *others = marks
        torch.index_select(rows, 0, ids.view(-1), out=out)
        for ids, rows in others:
            out.add_(torch.index_select(rows, 0, ids.view(-1), out=self.marked[: len(out)]))


def _columns(vectors: Sequence[Tensor]) -> list[slice]:
    """Where each part of an event stands in all of them joined."""
    ends = [0]
    for part in vectors:
        ends.append(ends[-1] + part.shape[2])
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _pieces(vectors: Sequence[Tensor], widths: Sequence[int]) -> list[slice]:
    """Slices of the batch; one on a GPU, where launches cost more than memory."""
    samples, length, _ = vectors[0].shape
    if vectors[0].device.type != "cpu":
        return [slice(0, samples)]
    dim = sum(part.shape[2] for part in vectors)
    floats = 2 * (length * (dim + sum(widths)) + dim * widths[0])
    size = max(1, PIECE * torch.get_num_threads() // (floats * vectors[0].element_size()))
    return [slice(start, min(start + size, samples)) for start in range(0, samples, size)]


def _pairs(flat: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(flat[0::2], flat[1::2], strict=True))


class Attend(torch.autograd.Function):
    """Weights of events, an MLP's output of event and query, and the sum of the events by weight.

        M   = W_e + diag(q) W_p                                         once a sample
        h_1 = relu(c + x M + sum_j J_j[m_j]),   h_i = relu(W_i h_{i-1} + b_i)
        a   = mask (w h + b),   out = sum_t a_t x_t

    An event is vectors x and marks m, ids of few values each, of which the first layer's outputs are known.

    Arguments of `apply`: n_x and n_m, how many parts there are of each; mask [B, T] of the vectors' dtype;
    query [B, d]; constant c [B, h_1]; W_e and W_p [d, h_1]; then n_x parts of x, [B, T, d_i], whose widths
    sum to d; for each of the n_m marks ids, integers [B, T], and J_j [n_j, h_1]; then weight and bias of each
    further layer as `nn.Linear` has them, the last one with a single output. Returns out [B, d] and
    a [B, T].
    """

    @staticmethod
    def forward(
        ctx: Any,
        num_vectors: int,
        num_marks: int,
        mask: Tensor,
        query: Tensor,
        constant: Tensor,
        of_event: Tensor,
        of_product: Tensor,
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See the class."""
        vectors = [part.contiguous() for part in parts[:num_vectors]]
        pairs = _pairs([part.contiguous() for part in parts[num_vectors:]])
        marks = pairs[:num_marks]
        deeper = pairs[num_marks:]
        widths = [of_event.shape[1], *(len(weight) for weight, _ in deeper[:-1])]
        last, bias = deeper[-1]
        scores = torch.empty_like(mask)
        out = torch.empty_like(query)
        pieces = _pieces(vectors, widths)
        work = _Work(vectors, pieces[0].stop if pieces else 0, of_event, widths)
        for piece in pieces:
            own = [part[piece] for part in vectors]
            own_marks = [(ids[piece], rows) for ids, rows in marks]
            score = scores[piece]
            _, hidden = work.run(own, own_marks, query[piece], constant[piece], of_event, of_product, deeper)
            torch.addmv(bias, hidden[-1], last[0], out=score.view(-1))
            score.mul_(mask[piece])
            for part, columns in zip(own, work.columns, strict=True):
                out[piece, columns] = torch.bmm(score.unsqueeze(1), part).squeeze(1)
        ctx.counts = num_vectors, num_marks
        flat = [value for pair in pairs for value in pair]
        ctx.save_for_backward(mask, query, constant, of_event, of_product, scores, *vectors, *flat)
        return out, scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients; hidden layers are computed again piece by piece. Weights' sums are float32 or wider."""
        mask, query, constant, of_event, of_product, scores, *parts = ctx.saved_tensors
        num_vectors, num_marks = ctx.counts
        vectors = parts[:num_vectors]
        pairs = _pairs(parts[num_vectors:])
        marks = pairs[:num_marks]
        deeper = pairs[num_marks:]
        length = mask.shape[1]
        widths = [of_event.shape[1], *(len(weight) for weight, _ in deeper[:-1])]
        pieces = _pieces(vectors, widths)
        work = _Work(vectors, pieces[0].stop if pieces else 0, of_event, widths)
        slopes = [torch.empty_like(hidden) for hidden in work.hidden]
        # Of each part its own: `torch.bmm` writes to strided tensors matrix by matrix.
        of_matrices = [work.matrix.new_empty(work.matrix[:, columns].shape) for columns in work.columns]
        d_vectors = [torch.empty_like(part) for part in vectors]
        d_query = torch.empty_like(query)
        d_constant = torch.empty_like(constant)
        wide = torch.promote_types(mask.dtype, torch.float32)
        d_event = torch.zeros_like(of_event, dtype=wide)
        d_product = torch.zeros_like(of_product, dtype=wide)
        d_rows = [torch.zeros_like(rows, dtype=wide) for _, rows in marks]
        d_deeper = [(torch.zeros_like(a, dtype=wide), torch.zeros_like(b, dtype=wide)) for a, b in deeper]
        for piece in pieces:
            own = [part[piece] for part in vectors]
            own_marks = [(ids[piece], rows) for ids, rows in marks]
            own_query = query[piece]
            samples = len(own_query)
            d_score = grad_scores[piece].unsqueeze(1).clone()
            for part, columns in zip(own, work.columns, strict=True):
                d_score.baddbmm_(grad[piece, columns].unsqueeze(1), part.transpose(1, 2))
            d_score = d_score.squeeze(1).mul_(mask[piece]).view(-1)
            matrix, hidden = work.run(
                own, own_marks, own_query, constant[piece], of_event, of_product, deeper
            )
            d_deeper[-1][0].add_(torch.mv(hidden[-1].t(), d_score))
            d_deeper[-1][1].add_(d_score.sum())
            slope = torch.mul(d_score.unsqueeze(1), deeper[-1][0], out=slopes[-1][: len(d_score)])
            _through_relu(slope, hidden[-1])
            for layer in range(len(deeper) - 2, -1, -1):
                d_deeper[layer][0].add_(torch.mm(slope.t(), hidden[layer]))
                d_deeper[layer][1].add_(slope.sum(0))
                slope = torch.mm(slope, deeper[layer][0], out=slopes[layer][: len(d_score)])
                _through_relu(slope, hidden[layer])
            for (ids, _), sums in zip(own_marks, d_rows, strict=True):
                sums.index_add_(0, ids.view(-1), slope.to(wide))
            slope = slope.view(samples, length, -1)
            torch.sum(slope, 1, out=d_constant[piece])
            for part, columns, d_matrices, d_part in zip(
                own, work.columns, of_matrices, d_vectors, strict=True
            ):
                slope_of_sum = grad[piece, columns].unsqueeze(1)
                torch.bmm(slope, matrix[:, columns].transpose(1, 2), out=d_part[piece])
                d_part[piece].addcmul_(scores[piece].unsqueeze(2), slope_of_sum)
                d_matrix = torch.bmm(part.transpose(1, 2), slope, out=d_matrices[:samples])
                d_event[columns].add_(d_matrix.sum(0))
                of_query = torch.bmm(of_product[columns].unsqueeze(1), d_matrix.permute(1, 2, 0))
                d_query[piece, columns] = of_query.squeeze(1).t()
                d_product[columns].add_(d_matrix.mul_(own_query[:, columns].unsqueeze(2)).sum(0))
        dtype = mask.dtype
        d_marks = [value for sums in d_rows for value in (None, sums.to(dtype))]
        d_flat = [value.to(dtype) for pair in d_deeper for value in pair]
        d_layer = d_event.to(dtype), d_product.to(dtype)
        return None, None, None, d_query, d_constant, *d_layer, *d_vectors, *d_marks, *d_flat


def _through_relu(slope: Tensor, hidden: Tensor) -> None:
    """Zeroes the slope in place where the unit was off."""
    torch.ops.aten.threshold_backward.grad_input(slope, hidden, 0, grad_input=slope)
