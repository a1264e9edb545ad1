"""Softmax-DPO: hand arithmetic, gradients, masks, extremes."""

from __future__ import annotations

import math

import pytest
import torch

from recllm.losses import preference_statistics, softmax_dpo


def naive(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """The form that the paper prints: -log sigmoid(-log sum exp(r_l - r_w))."""
    reward = beta * (policy - reference)
    return -torch.log(torch.sigmoid(-torch.log(torch.exp(reward[:, 1:] - reward[:, :1]).sum(1))))


def test_one_rejected_by_hand() -> None:
    # rewards 2 * (-1 - -2) = 2 and 2 * (-3 - -2.5) = -1: loss = ln(1 + e^-3)
    loss = softmax_dpo(torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.5]]), beta=2.0)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-3.0)), rel=1e-6)


def test_two_rejected_by_hand() -> None:
    # rewards .5 * (2, 0, -4) = (1, 0, -2): loss = ln(1 + e^-1 + e^-3)
    policy = torch.tensor([[-4.0, -5.0, -9.0]])
    reference = torch.tensor([[-6.0, -5.0, -5.0]])
    loss = softmax_dpo(policy, reference, beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1) + math.exp(-3)), rel=1e-6)


@pytest.mark.parametrize("rejected", [1, 3, 7, 19])
def test_policy_equal_to_reference_costs_log_of_the_number_of_candidates(rejected: int) -> None:
    logps = -10 * torch.rand(5, 1 + rejected, dtype=torch.float64)
    loss = softmax_dpo(logps, logps.clone(), beta=1.0)
    torch.testing.assert_close(
        loss, torch.full((5,), math.log(1 + rejected), dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_one_rejected_is_sigmoid_dpo() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = (5 * torch.randn(64, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    dpo = -torch.nn.functional.logsigmoid(
        0.3 * ((policy[:, 0] - reference[:, 0]) - (policy[:, 1] - reference[:, 1]))
    )
    torch.testing.assert_close(softmax_dpo(policy, reference, 0.3), dpo, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rejected", [1, 2, 7])
def test_values_and_gradients_equal_the_printed_form(rejected: int) -> None:
    generator = torch.Generator().manual_seed(rejected)
    policy = torch.randn(16, 1 + rejected, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(16, 1 + rejected, generator=generator, dtype=torch.float64)
    ours, printed = softmax_dpo(policy, reference, 1.5), naive(policy, reference, 1.5)
    torch.testing.assert_close(ours, printed, rtol=1e-9, atol=1e-12)
    (a,) = torch.autograd.grad(ours.sum(), policy)
    (b,) = torch.autograd.grad(printed.sum(), policy)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a.sum(1), torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [-1e4, -120.0, 95.0, 1e4])
def test_finite_where_the_printed_form_is_not(dtype: torch.dtype, margin: float) -> None:
    # One rejected reward is `margin` above the chosen one: loss -> margin for large ones, 0 for very negative
    # ones.
    policy = torch.tensor([[0.0, margin, -1e4]], dtype=dtype, requires_grad=True)
    loss = softmax_dpo(policy, torch.zeros(1, 3, dtype=dtype), beta=1.0)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(max(policy.detach()[0, 1].item(), 0.0), abs=1e-3)
    assert policy.grad is not None
    assert policy.grad.isfinite().all()
    expected = -1.0 if margin > 0 else 0.0
    assert policy.grad[0, 0].item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_cells_touch_nothing(junk: float) -> None:
    generator = torch.Generator().manual_seed(1)
    policy = torch.randn(4, 5, generator=generator)
    reference = torch.randn(4, 5, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()
    dirty_policy = policy.masked_fill(~mask, junk).requires_grad_()
    dirty_reference = reference.masked_fill(~mask, junk)
    loss = softmax_dpo(dirty_policy, dirty_reference, 0.7, mask)
    (gradient,) = torch.autograd.grad(loss.sum(), dirty_policy)
    for row in range(4):
        kept = policy[row][mask[row]][None].clone().requires_grad_()
        alone = softmax_dpo(kept, reference[row][mask[row]][None], 0.7)
        torch.testing.assert_close(loss[row], alone[0], rtol=1e-5, atol=1e-6)
        (wanted,) = torch.autograd.grad(alone.sum(), kept)
        torch.testing.assert_close(gradient[row][mask[row]], wanted[0], rtol=1e-5, atol=1e-6)
    assert (gradient[~mask] == 0).all()


def test_no_rejected_candidate_costs_nothing() -> None:
    policy = torch.tensor([[-3.0, math.nan]], requires_grad=True)
    loss = softmax_dpo(policy, torch.zeros(1, 2), 1.0, torch.tensor([[True, False]]))
    loss.sum().backward()
    assert loss.item() == 0.0
    assert policy.grad is not None
    assert (policy.grad == 0).all()


def test_reference_gets_no_gradient() -> None:
    policy, reference = torch.zeros(1, 3, requires_grad=True), torch.zeros(1, 3, requires_grad=True)
    softmax_dpo(policy, reference, 1.0).sum().backward()
    assert reference.grad is None
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad, torch.tensor([[-2 / 3, 1 / 3, 1 / 3]]))


def test_large_rewards_keep_their_small_margins() -> None:
    # float64 rewards of 1e9 that differ by 1: loss ln(1 + e^-1)
    policy = torch.tensor([[1e9, 1e9 - 1.0]], dtype=torch.float64)
    loss = softmax_dpo(policy, torch.zeros(1, 2, dtype=torch.float64), 1.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)), rel=1e-9)


@pytest.mark.parametrize(
    ("policy", "reference", "mask", "words"),
    [
        (torch.zeros(3), torch.zeros(3), None, "policy_logps"),
        (torch.zeros(3, 1), torch.zeros(3, 1), None, "K >= 1"),
        (torch.zeros(3, 2), torch.zeros(3, 3), None, "reference_logps"),
        (torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3, 3).bool(), "mask"),
        (torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[False, True]]), "column 0"),
    ],
)
def test_wrong_inputs_are_named(
    policy: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        softmax_dpo(policy, reference, 1.0, mask)


def test_statistics_by_hand() -> None:
    # Row 0: rewards 2, 1, -1 (rejected mean 0, margin 2, right). Row 1: rewards 0, 1, masked (margin -1,
    # wrong).
    policy = torch.tensor([[1.0, 0.5, -0.5], [-4.0, 0.5, math.nan]], dtype=torch.float64)
    reference = torch.tensor([[0.0, 0.0, 0.0], [-4.0, 0.0, math.inf]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    out = {k: v.item() for k, v in preference_statistics(policy, reference, 2.0, mask).items()}
    assert out["reward_chosen"] == pytest.approx((2 + 0) / 2)
    assert out["reward_rejected"] == pytest.approx((0 + 1) / 2)
    assert out["margin"] == pytest.approx((2 - 1) / 2)
    assert out["reward_accuracy"] == pytest.approx(0.5)
    assert out["chosen_logp"] == pytest.approx((1 - 4) / 2)
    kl = 0.0
    for p, q in (([1.0, 0.5, -0.5], [0.0, 0.0, 0.0]), ([-4.0, 0.5], [-4.0, 0.0])):
        a, b = sum(map(math.exp, p)), sum(map(math.exp, q))
        kl += (
            sum(math.exp(x) / a * (x - math.log(a) - y + math.log(b)) for x, y in zip(p, q, strict=True)) / 2
        )
    assert out["kl"] == pytest.approx(kl, rel=1e-9)


def test_statistics_count_ties_as_wrong_and_skip_rows_without_rejected() -> None:
    logps = torch.zeros(2, 2)
    out = preference_statistics(logps, logps, 1.0, torch.tensor([[True, True], [True, False]]))
    assert out["reward_accuracy"].item() == 0.0
    out = preference_statistics(
        torch.tensor([[1.0, 0.0], [9.0, math.nan]]), logps, 1.0, torch.tensor([[True, True], [True, False]])
    )
    assert out["reward_accuracy"].item() == 1.0
    assert out["margin"].item() == 1.0
