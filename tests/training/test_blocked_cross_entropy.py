"""The cross-entropy in blocks is that of the whole, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from recllm.training.blocked_cross_entropy import blocked_cross_entropy


def drawn(seed=0, n=37, m=11, hidden=5):
    generator = torch.Generator().manual_seed(seed)
    users = torch.randn(n, hidden, generator=generator).requires_grad_()
    items = torch.randn(m, hidden, generator=generator).requires_grad_()
    return users, items, torch.randint(m, (n,), generator=generator)


@pytest.mark.parametrize("block", [1, 11, 100, 1 << 20])  # a row at a time, one, nine, all
def test_value_and_gradients_are_those_of_the_whole(monkeypatch, block):
    monkeypatch.setattr("recllm.training.blocked_cross_entropy.BLOCK", block)
    users, items, target = drawn()
    whole = F.cross_entropy(users @ items.t(), target, reduction="sum")
    wanted = torch.autograd.grad(3.0 * whole, (users, items))
    loss = blocked_cross_entropy(users, items, target)
    torch.testing.assert_close(loss, whole)
    for got, one in zip(torch.autograd.grad(3.0 * loss, (users, items)), wanted, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-5, atol=1e-6)


def test_rows_weigh_what_they_are_given(monkeypatch):
    monkeypatch.setattr("recllm.training.blocked_cross_entropy.BLOCK", 50)  # four rows at a time
    users, items, target = drawn()
    weight = torch.rand(len(users), generator=torch.Generator().manual_seed(1))
    weight[3] = 0.0
    whole = (weight * F.cross_entropy(users @ items.t(), target, reduction="none")).sum()
    wanted = torch.autograd.grad(whole, (users, items))
    loss = blocked_cross_entropy(users, items, target, weight)
    torch.testing.assert_close(loss, whole)
    got = torch.autograd.grad(loss, (users, items))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not got[0][3].any()


def test_scores_that_would_overflow():
    users = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    items = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = blocked_cross_entropy(users, items, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.0 + 400.0)
    # The second row is sure of the wrong item: v(wrong) - v(target) = -2; the first row's gradient is 0.
    assert users.grad.tolist() == [[0.0], [-2.0]]
    # v(wrong) gets +u, v(target) gets -u, of the second row's u = -200.
    assert items.grad.tolist() == [[200.0], [-200.0]]


def test_under_autocast_products_are_rounded_and_sums_are_not():
    users, items, target = drawn(n=400, m=300, hidden=16)
    whole = F.cross_entropy(users @ items.t(), target, reduction="sum")
    wanted = torch.autograd.grad(whole, (users, items))
    with torch.autocast("cpu", torch.bfloat16):
        loss = blocked_cross_entropy(users, items, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, whole, rtol=2e-3, atol=0)
    for got, one in zip(torch.autograd.grad(loss, (users, items)), wanted, strict=True):
        assert got.dtype == torch.float32
        assert (got - one).norm() < 0.02 * one.norm()
