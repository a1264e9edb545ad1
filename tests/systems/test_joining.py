"""Joined scores of a cascade, with arithmetic by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recllm.systems.joining import RIDGE, fit, join, reorder, standardize

NEVER = -np.inf


def test_scores_are_standardized_within_their_list():
    # Mean 2 and variance (1 + 0 + 1) / 3; the second list has two items: mean 15, deviation 5.
    z = standardize(np.array([[1.0, 2.0, 3.0], [10.0, 20.0, NEVER]]))
    far = math.sqrt(1.5)
    np.testing.assert_allclose(z[0], [-far, 0, far])
    assert z[1].tolist() == [-1, 1, NEVER]


@pytest.mark.parametrize("value", [0.0, 0.1, -1e8])
def test_equal_scores_say_nothing(value):
    z = standardize(np.array([[value] * 7, [NEVER] * 7], np.float32))
    assert (z[0] == 0).all()
    assert np.isneginf(z[1]).all()


def test_the_weight_of_one_step_is_the_log_odds_of_its_being_right():
    """Lists of two have z = +1 and -1, so P(better one) = 1 / (1 + exp(-2 w)): w = log(odds) / 2."""
    scores = np.array([[5.0, 3.0]] * 4)
    own = np.array([0, 0, 0, 1])
    assert fit([scores], own)[0] == pytest.approx(math.log(3) / 2, abs=RIDGE)


def test_shorter_lists_and_lists_without_the_own_item():
    """The third column is no item, the last list lacks the own item: neither changes the weight above."""
    scores = np.array([[5.0, 3.0, NEVER]] * 5)
    own = np.array([0, 0, 0, 1, -1])
    assert fit([scores], own)[0] == pytest.approx(math.log(3) / 2, abs=RIDGE)
    with pytest.raises(ValueError, match="none of 2 lists"):
        fit([scores[:2]], np.array([-1, -1]))


def test_a_step_that_is_always_right_keeps_a_finite_weight():
    weights = fit([np.array([[1.0, 0.0]] * 10)], np.zeros(10, int))
    assert 2 < weights[0] < 20


def test_weights_are_where_the_likelihood_is_greatest():
    """Draws from known weights are recovered, a step of noise gets none, and the gradient is 0 there."""
    random = np.random.default_rng(0)
    steps = [random.normal(size=(4000, 6)) * scale + shift for scale, shift in ((1, 0), (30, -5), (0.01, 2))]
    utility = join(steps, np.array([1.0, 0.5, 0.0]))
    own = (utility + random.gumbel(size=utility.shape)).argmax(axis=1)
    weights = fit(steps, own)
    np.testing.assert_allclose(weights, [1.0, 0.5, 0.0], atol=0.06)

    def likelihood(at):
        joined = join(steps, at)
        return (joined[np.arange(len(own)), own] - np.log(np.exp(joined).sum(axis=1))).sum()

    for change in np.eye(3) * 0.02:
        assert likelihood(weights) > max(likelihood(weights + change), likelihood(weights - change))


def test_joined_scores_by_hand():
    first = np.array([[3.0, 1.0, NEVER]])
    second = np.array([[10.0, 30.0, NEVER]])
    assert join([first, second], np.array([2.0, 0.5])).tolist() == [[1.5, -1.5, NEVER]]


def test_what_is_below_the_cut_keeps_its_order_behind_what_is_above():
    joined = np.array([[0.1, 0.9, 0.5], [1.0, 1.0, NEVER]])
    ids = np.array([[7, 8, 9], [8, 7, 9]])
    assert reorder(joined, 5, ids).tolist() == [[1, 2, 0, 3, 4], [1, 0, 2, 3, 4]]
