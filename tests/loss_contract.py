"""What holds of every preference loss: a test class that each one inherits.

A new loss gets a class in `test_losses.py` that names it and inherits the rest:

    class TestMine(LossContract):
        kind = "mine"
        function = staticmethod(mine)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from recllm.losses import REFERENCE_FREE, preference_loss

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()
"""Rows with two, two, one and four rejected candidates, not all of them on the left."""


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Log-probabilities of policy and reference."""
    generator = torch.Generator().manual_seed(seed)
    policy = torch.randn(*shape, generator=generator, dtype=dtype)
    return policy, torch.randn(*shape, generator=generator, dtype=dtype)


def close(one: Tensor, other: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


class LossContract:
    """What holds of any preference loss, of `[B, 1 + K]` log-probabilities with the chosen one in column 0.

    Attributes:
        kind: Its name for `preference_loss`.
        function: What computes it; `loss` calls it.
    """

    kind: str
    function: Callable[..., Tensor]

    def loss(
        self,
        policy: Tensor,
        reference: Tensor,
        beta: float = 0.7,
        mask: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        return self.function(policy, reference, beta, mask, label_smoothing)

    def cost_of_no_preference(self, rejected: int) -> float:
        """The loss where no reward differs from another: the surprise of a coin."""
        return math.log(2)

    @property
    def reads_reference(self) -> bool:
        return self.kind not in REFERENCE_FREE

    def rewards(self, policy: Tensor, reference: Tensor, beta: float) -> Tensor:
        return beta * (policy - reference) if self.reads_reference else beta * policy

    # ---- shapes and types

    @pytest.mark.parametrize("rejected", [1, 2, 19])
    def test_one_loss_a_row(self, rejected):
        policy, reference = draw(6, 1 + rejected)
        assert self.loss(policy, reference).shape == (6,)
        assert self.loss(policy[:0], reference[:0]).shape == (0,)

    @pytest.mark.parametrize(
        ("dtype", "wanted"),
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
        ],
    )
    def test_computed_in_float32_at_least(self, dtype, wanted):
        policy, reference = draw(6, 4)
        assert self.loss(policy.to(dtype), reference.to(dtype)).dtype == wanted

    def test_its_name_gives_it(self):
        policy, reference = draw(4, 5)
        given = reference if self.reads_reference else None
        named = preference_loss(self.kind, policy, given, 0.7, MASK, label_smoothing=0.05)
        assert torch.equal(named, self.loss(policy, reference, 0.7, MASK, 0.05))

    # ---- what it prefers

    def test_a_likelier_chosen_one_costs_less_and_a_likelier_rejected_one_more(self):
        policy, reference = draw(50, 5)
        policy.requires_grad_()
        loss = self.loss(policy, reference)
        (gradient,) = torch.autograd.grad(loss.sum(), policy)
        assert (gradient[:, 0] < 0).all()
        assert (gradient[:, 1:] > 0).all()
        raised = policy.detach().clone()
        raised[:, 0] += 0.5
        assert (self.loss(raised, reference) < loss).all()
        raised = policy.detach().clone()
        raised[:, 3] += 0.5
        assert (self.loss(raised, reference) > loss).all()

    @pytest.mark.parametrize("rejected", [1, 3, 7, 19])
    def test_the_cost_of_no_preference(self, rejected):
        policy = draw(5, 1)[0].expand(-1, 1 + rejected)
        cost = torch.full((5,), self.cost_of_no_preference(rejected), dtype=torch.float64)
        close(self.loss(policy, torch.zeros_like(policy)), cost, rtol=1e-12, atol=0)
        if self.reads_reference:
            logps = -10 * draw(5, 1 + rejected)[0].abs()
            close(self.loss(logps, logps.clone(), 1.0), cost, rtol=1e-12, atol=0)

    def test_one_rejected_is_sigmoid_dpo(self):
        policy, reference = draw(64, 2, seed=0)
        rewards = self.rewards(5 * policy, 5 * reference, 0.3)
        close(self.loss(5 * policy, 5 * reference, 0.3), -logsigmoid(rewards[:, 0] - rewards[:, 1]))

    def test_one_rejected_with_label_smoothing_is_conservative_dpo(self):
        policy, reference = draw(64, 2, seed=0)
        rewards = self.rewards(policy, reference, 0.3)
        margin = rewards[:, 1] - rewards[:, 0]
        wanted = 0.9 * softplus(margin) + 0.1 * softplus(-margin)
        close(self.loss(policy, reference, 0.3, None, 0.1), wanted)

    # ---- what it does not depend on

    def test_the_order_of_the_rejected_ones_does_not_matter(self):
        policy, reference = draw(4, 5)
        expected = self.loss(policy, reference, 0.7, MASK, 0.1)
        for order in ([0, 2, 1, 4, 3], [0, 4, 3, 2, 1]):
            close(self.loss(policy[:, order], reference[:, order], 0.7, MASK[:, order], 0.1), expected)

    def test_a_row_is_its_own(self):
        policy, reference = draw(4, 5)
        expected = self.loss(policy, reference, 0.7, MASK)
        for row in range(4):
            one = slice(row, row + 1)
            close(self.loss(policy[one], reference[one], 0.7, MASK[one]), expected[one])

    def test_what_a_prompt_adds_to_all_of_its_candidates_does_not_matter(self):
        policy, reference = draw(4, 5)
        shift = 10 * draw(4, 1, seed=2)[0]
        expected = self.loss(policy, reference, 0.7, MASK)
        close(self.loss(policy + shift, reference, 0.7, MASK), expected)
        close(self.loss(policy, reference + shift, 0.7, MASK), expected)

    def test_the_reference_counts_as_much_as_the_policy_or_not_at_all(self):
        policy, reference = draw(4, 5)
        shift = 10 * draw(4, 5, seed=2)[0]
        expected = self.loss(policy, reference, 0.7, MASK)
        moved = self.loss(policy, reference + shift, 0.7, MASK)
        if self.reads_reference:
            close(self.loss(policy + shift, reference + shift, 0.7, MASK), expected)
            assert ((moved - expected).abs() > 1e-3).all()
        else:
            assert torch.equal(moved, expected)

    @pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
    def test_masked_cells_touch_nothing(self, junk):
        policy, reference = draw(4, 5, dtype=torch.float32)
        dirty_policy = policy.masked_fill(~MASK, junk).requires_grad_()
        loss = self.loss(dirty_policy, reference.masked_fill(~MASK, junk), 0.7, MASK)
        (gradient,) = torch.autograd.grad(loss.sum(), dirty_policy)
        for row in range(4):
            present = policy[row][MASK[row]][None].clone().requires_grad_()
            alone = self.loss(present, reference[row][MASK[row]][None], 0.7)
            close(loss[row], alone[0], rtol=1e-5, atol=1e-6)
            (wanted,) = torch.autograd.grad(alone.sum(), present)
            close(gradient[row][MASK[row]], wanted[0], rtol=1e-5, atol=1e-6)
        assert (gradient[~MASK] == 0).all()

    def test_no_rejected_candidate_costs_nothing(self):
        policy = torch.tensor([[-3.0, math.nan]], requires_grad=True)
        loss = self.loss(policy, torch.zeros(1, 2), 1.0, torch.tensor([[True, False]]))
        loss.sum().backward()
        assert loss.item() == 0.0
        assert policy.grad is not None
        assert (policy.grad == 0).all()

    # ---- gradients and extremes

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    def test_gradients_are_those_of_the_values(self, label_smoothing):
        policy, reference = draw(4, 5)

        def loss(values: Tensor) -> Tensor:
            return self.loss(values, reference, 0.7, MASK, label_smoothing)

        assert torch.autograd.gradcheck(loss, policy.requires_grad_())

    def test_the_reference_gets_no_gradient(self):
        policy, reference = draw(4, 5)
        self.loss(policy.requires_grad_(), reference.requires_grad_()).sum().backward()
        assert reference.grad is None
        assert policy.grad is not None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("margin", [-1e4, 1e4])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    def test_finite_with_every_option_at_huge_margins(self, dtype, margin, label_smoothing):
        policy = torch.tensor(
            [[0.0, margin, margin], [margin, 0.0, math.nan]], dtype=dtype, requires_grad=True
        )
        mask = torch.tensor([[True, True, True], [True, True, False]])
        lengths = torch.tensor([[1, 2, 3], [4, 5, 0]])
        for normalize in (False, True):
            loss = preference_loss(
                self.kind, policy, torch.zeros(2, 3, dtype=dtype), 1.0, mask,
                lengths=lengths, length_normalize=normalize, sft_weight=0.5, label_smoothing=label_smoothing,
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(loss.sum(), policy)
            assert loss.dtype == torch.float32
            assert loss.isfinite().all()
            assert gradient.isfinite().all()
            assert gradient[1, 2] == 0

    def test_huge_rewards_keep_their_small_margins(self):
        # float64 rewards of 1e9 that differ by 1: loss ln(1 + e^-1)
        policy = torch.tensor([[1e9, 1e9 - 1.0]], dtype=torch.float64)
        loss = self.loss(policy, torch.zeros(1, 2, dtype=torch.float64), 1.0)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)), rel=1e-9)

    # ---- errors

    @pytest.mark.parametrize(
        ("policy", "mask", "words"),
        [
            (torch.zeros(3), None, "policy_logps"),
            (torch.zeros(3, 1), None, "K >= 1"),
            (torch.zeros(3, 2), torch.ones(3, 3).bool(), "mask"),
            (torch.zeros(1, 2), torch.tensor([[False, True]]), "column 0"),
        ],
    )
    def test_wrong_inputs_are_named_in_one_line(self, policy, mask, words):
        with pytest.raises(ValueError, match=words) as error:
            self.loss(policy, torch.zeros_like(policy), 1.0, mask)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("wrong", [-0.1, 0.5])
    def test_label_smoothing_is_a_probability_below_a_half(self, wrong):
        policy, reference = draw(4, 5)
        with pytest.raises(ValueError, match="label_smoothing"):
            self.loss(policy, reference, 1.0, None, wrong)
