"""Tables: lookups, sums and products against `nn.Embedding` and literal formulas, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from recllm.crm.table import COUNTED, Rows, Table, products, weighted_sums


def test_the_gradient_sums_by_row_and_padding_has_none():
    table = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    rows = Rows.apply(table, torch.tensor([[1, 2], [0, 1]]))
    assert rows.tolist() == [[[1, 2], [3, 4]], [[0, 0], [1, 2]]]
    rows.backward(torch.tensor([[[1.0, 10.0], [2.0, 20.0]], [[4.0, 40.0], [8.0, 80.0]]]))
    assert table.grad.tolist() == [[0, 0], [9, 90], [2, 20]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 300), (2, 3, 4)])
@pytest.mark.parametrize("dim", [1, 16])
def test_a_table_is_an_embedding(shape, dim, dtype):
    torch.manual_seed(0)
    ids = torch.randint(0, 9, shape).to(dtype)
    table, plain = Table(9, dim).double(), torch.nn.Embedding(9, dim, padding_idx=0).double()
    plain.load_state_dict(table.state_dict())
    grad = torch.randn(*shape, dim, dtype=torch.float64)
    got, wanted = table(ids), plain(ids)
    assert torch.equal(got, wanted)
    got.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(table.weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-12)


def test_a_row_sparse_table_has_a_sparse_gradient():
    table = Table(9, 2)
    table.sparse = True
    table(torch.tensor([3, 3, 5])).sum().backward()
    grad = table.weight.grad.coalesce()
    assert grad.indices().tolist() == [[3, 5]]
    assert grad.values().tolist() == [[2, 2], [1, 1]]
    table.weight.grad = None
    ids, weights = torch.tensor([[3, 4]]), torch.ones(1, 1, 2)
    (weighted_sums(table, ids, weights).sum() + products(table, ids, torch.ones(1, 2)).sum()).backward()
    assert table.weight.grad.coalesce().indices().tolist() == [[3, 4]]


# Tables that are looked up an event, and tables whose values are counted.
@pytest.mark.parametrize("size", [6 * COUNTED, 6 * COUNTED + 1])
def test_sums_and_products_equal_lookups(size):
    torch.manual_seed(0)
    table = Table(size, 3).double()
    table.weight.data[0] = 0.0
    ids = torch.randint(0, size, (4, 6))
    ids[1] = ids[1, 0]  # one value many times
    ids[2, :3] = 0  # events of code 0, as those without a rating, have weights, and train no row
    weights = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    query = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    grads = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)

    def gradients(outputs):
        return torch.autograd.grad(outputs, (table.weight, weights, query), grads)

    events = functional.embedding(ids, table.weight, padding_idx=0)
    wanted = torch.einsum("bct,btd->bcd", weights, events), torch.einsum("btd,bd->bt", events, query)
    got = weighted_sums(table, ids, weights), products(table, ids, query)
    for one, other in zip((*got, *gradients(got)), (*wanted, *gradients(wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
