"""Target attention in pieces: the same numbers and gradients as the formula on the whole batch."""

import pytest
import torch

from recllm.crm import attention, layers
from recllm.crm.layers import Events, TargetAttention
from recllm.crm.table import Table


def inputs(samples=9, length=4, width=3, event_dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    mask = torch.rand(samples, length, generator=generator) < 0.7
    mask[0] = False
    return draw(samples, width), draw(samples, length, event_dim), mask


def plain(model, query, events, mask):
    return torch.bmm(model.scores(query, events, mask).unsqueeze(1), events).squeeze(1)


@pytest.mark.parametrize("hidden", [[6], [7, 4], [6, 5, 4]])
@pytest.mark.parametrize("event_dim", [3, 5])
@pytest.mark.parametrize("piece", [1, 4_000, 2**22])  # a sample at a time, some, all
def test_values_and_gradients_are_those_of_the_plain_formula(monkeypatch, hidden, event_dim, piece):
    monkeypatch.setattr(attention, "PIECE", piece)
    torch.manual_seed(0)
    model = TargetAttention(3, event_dim, hidden).double()
    query, events, mask = inputs(event_dim=event_dim)
    slope = torch.randn(9, event_dim, dtype=torch.float64)
    leaves = [query, events, *model.parameters()]
    got = model(query, Events([events], [], mask))
    wanted = plain(model, query, events, mask)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    pairs = zip(
        torch.autograd.grad(got, leaves, slope), torch.autograd.grad(wanted, leaves, slope), strict=True
    )
    for mine, theirs in pairs:
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("most", [0, 20, 4096])  # marks are looked up alone, the first two as one, all as one
@pytest.mark.parametrize("piece", [4_000, 2**22])
def test_events_in_parts_are_the_same_events_joined(monkeypatch, most, piece):
    monkeypatch.setattr(attention, "PIECE", piece)
    monkeypatch.setattr(layers, "MERGED", most)
    torch.manual_seed(0)
    query, vectors, mask = inputs(width=5, event_dim=5)
    tables = [Table(size, dim).double() for size, dim in ((4, 2), (5, 3), (6, 1))]
    for table in tables:
        torch.nn.init.zeros_(table.weight[0])
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randint(0, len(table.weight), mask.shape, generator=generator) for table in tables]
    marks = [(table, own.masked_fill(~mask, 0)) for table, own in zip(tables, ids, strict=True)]
    parts = [part.detach().requires_grad_() for part in (vectors * mask.unsqueeze(2)).split([2, 3], dim=2)]
    model = TargetAttention(5, 11, [6, 4]).double()
    events = Events(parts, marks, mask)
    got = model(query, events)
    wanted = plain(model, query, events.joined(), mask)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    slope = torch.randn(9, 11, generator=generator, dtype=torch.float64)
    leaves = [query, *parts, *model.parameters(), *(table.weight for table in tables)]
    pairs = zip(
        torch.autograd.grad(got, leaves, slope), torch.autograd.grad(wanted, leaves, slope), strict=True
    )
    for mine, theirs in pairs:
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_marks_are_one_while_their_values_are_few():
    """Two values and three make one mark of six, whose output is the sum; five more would be too many."""
    two = (torch.tensor([[1, 0]]), torch.tensor([[10.0], [20.0]]))
    three = (torch.tensor([[2, 1]]), torch.tensor([[1.0], [2.0], [3.0]]))
    five = (torch.tensor([[4, 0]]), torch.zeros(5, 1))
    merged = layers._merged([two, three, five])
    assert len(merged) == 1
    assert merged[0][1].shape == (30, 1)
    ((ids, rows),) = layers._merged([two, three])
    assert ids.tolist() == [[5, 1]]
    assert rows[:, 0].tolist() == [11, 12, 13, 21, 22, 23]


def test_the_pieces_are_several_and_cover_the_batch(monkeypatch):
    monkeypatch.setattr(attention, "PIECE", 4_000)
    _, events, _ = inputs()
    pieces = attention._pieces([events], [6])
    assert len(pieces) > 2
    assert [row for piece in pieces for row in range(9)[piece]] == list(range(9))


def test_no_samples_give_no_interests():
    model = TargetAttention(3, 5, [6])
    got = model(torch.zeros(0, 3), Events([torch.zeros(0, 4, 5)], [], torch.zeros(0, 4, dtype=torch.bool)))
    assert got.shape == (0, 5)


def test_bfloat16_rounds_no_worse_than_the_plain_formula_does():
    torch.manual_seed(0)
    model = TargetAttention(3, 5, [16, 8])
    weights = list(model.parameters())
    query, events, mask = inputs(samples=2_000, dtype=torch.float32)
    wanted = torch.autograd.grad(plain(model, query, events, mask).sum(), weights)
    errors = []
    for form in (lambda: model(query, Events([events], [], mask)), lambda: plain(model, query, events, mask)):
        with torch.autocast("cpu", torch.bfloat16):
            out = form()
        assert out.dtype == torch.bfloat16
        got = torch.autograd.grad(out.float().sum(), weights)
        assert all(value.dtype == torch.float32 for value in got)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)])
    for mine, theirs in zip(*errors, strict=True):
        assert mine < max(2 * theirs, 0.02)
