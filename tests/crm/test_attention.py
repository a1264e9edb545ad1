"""Target attention in pieces: the same numbers and gradients as the formula on the whole batch."""

import pytest
import torch

from recllm.crm import attention
from recllm.crm.layers import TargetAttention


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
    got, wanted = model(query, events, mask), plain(model, query, events, mask)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    pairs = zip(
        torch.autograd.grad(got, leaves, slope), torch.autograd.grad(wanted, leaves, slope), strict=True
    )
    for mine, theirs in pairs:
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_pieces_are_several_and_cover_the_batch(monkeypatch):
    monkeypatch.setattr(attention, "PIECE", 4_000)
    _, events, _ = inputs()
    pieces = attention._pieces(events, 3, [6])
    assert len(pieces) > 2
    assert [row for piece in pieces for row in range(9)[piece]] == list(range(9))


def test_no_samples_give_no_interests():
    model = TargetAttention(3, 5, [6])
    got = model(torch.zeros(0, 3), torch.zeros(0, 4, 5), torch.zeros(0, 4, dtype=torch.bool))
    assert got.shape == (0, 5)


def test_bfloat16_rounds_no_worse_than_the_plain_formula_does():
    torch.manual_seed(0)
    model = TargetAttention(3, 5, [16, 8])
    weights = list(model.parameters())
    query, events, mask = inputs(samples=2_000, dtype=torch.float32)
    wanted = torch.autograd.grad(plain(model, query, events, mask).sum(), weights)
    errors = []
    for form in (lambda: model(query, events, mask), lambda: plain(model, query, events, mask)):
        with torch.autocast("cpu", torch.bfloat16):
            out = form()
        assert out.dtype == torch.bfloat16
        got = torch.autograd.grad(out.float().sum(), weights)
        assert all(value.dtype == torch.float32 for value in got)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)])
    for mine, theirs in zip(*errors, strict=True):
        assert mine < max(2 * theirs, 0.02)
