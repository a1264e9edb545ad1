"""Paired intervals that draw whole users."""

import math

import numpy as np
import pytest

from recllm import metrics
from recllm.evaluation.bootstrap import Difference, Resampled, of_auc, of_mean


def mean_difference(first, second, users, draws):
    return of_mean(first, users, draws).minus(of_mean(second, users, draws))


def auc_difference(first, second, labels, users, draws):
    return of_auc(first, labels, users, draws).minus(of_auc(second, labels, users, draws))


def test_bootstrap_of_identical_systems_is_zero() -> None:
    rng = np.random.default_rng(3)
    values, users, labels = rng.normal(size=200), rng.integers(0, 20, 200), rng.integers(0, 2, 200)
    for out in (
        mean_difference(values, values, users, 50),
        auc_difference(values, values, labels, users, 50),
    ):
        assert out == Difference(0.0, (0.0, 0.0), 1.0)


def test_bootstrap_auc_is_invariant_to_the_scale_of_scores_and_antisymmetric() -> None:
    rng = np.random.default_rng(4)
    users, labels = rng.integers(0, 40, 500), rng.integers(0, 2, 500)
    a, b = rng.normal(size=500) + labels, rng.normal(size=500)
    forth = auc_difference(a, b, labels, users, 200)
    back = auc_difference(np.exp(b), a * 3 - 7, labels, users, 200)
    assert forth.delta == pytest.approx(metrics.auc(a, labels) - metrics.auc(b, labels), abs=1e-12)
    assert forth.delta == pytest.approx(-back.delta, abs=1e-12)
    assert forth.interval95[0] == pytest.approx(-back.interval95[1], abs=1e-12)
    assert forth.interval95[0] > 0.1
    assert forth.p_value == pytest.approx(2 / 201)


def test_bootstrap_width_is_that_of_the_clusters() -> None:
    # 100 users with 20 equal rows each: the standard error is 1 / sqrt(100), not 1 / sqrt(2000)
    rng = np.random.default_rng(6)
    values = np.repeat(rng.permutation(np.repeat([-1.0, 1.0], 50)), 20)
    users, zero = np.repeat(np.arange(100), 20), np.zeros(2000)
    clustered = mean_difference(values, zero, users, 2000)
    rows = mean_difference(values, zero, np.arange(2000), 2000)
    width = [high - low for low, high in (clustered.interval95, rows.interval95)]
    assert width[0] == pytest.approx(2 * 1.96 / math.sqrt(100), rel=0.1)
    assert width[1] == pytest.approx(2 * 1.96 / math.sqrt(2000), rel=0.1)
    assert clustered.p_value > 0.5


def test_bootstrap_weighs_users_by_their_rows() -> None:
    # user 0 has 3 rows of difference 1, user 1 one row of 0: possible draws 1, 3/4, 0
    out = mean_difference([1.0, 1, 1, 0], [0.0, 0, 0, 0], [0, 0, 0, 1], 400)
    assert out.delta == 0.75
    assert out.interval95 == (0.0, 1.0)


def test_a_resample_with_one_label_is_left_out_of_the_pair():
    # Differences of draws: NaN, .1, .3; with two draws above 0, P(d <= 0) counts one of three.
    one = Resampled(0.8, np.array([np.nan, 0.7, 0.9]))
    other = Resampled(0.6, np.array([0.5, 0.6, 0.6]))
    out = one.minus(other)
    assert (out.delta, out.p_value) == (pytest.approx(0.2), pytest.approx(2 / 3))
    assert out.interval95 == (pytest.approx(0.1 + 0.025 * 0.2), pytest.approx(0.3 - 0.025 * 0.2))


def test_a_draw_of_one_user_alone_has_no_auc():
    drawn = of_auc([0.1, 0.9], [0, 1], [0, 1], draws=50).draws
    assert np.isnan(drawn).any()  # one of the two users twice
    assert set(drawn[~np.isnan(drawn)]) == {1.0}


def test_unlike_numbers_of_draws_are_no_pair():
    with pytest.raises(ValueError, match="20 and 10 draws"):
        of_mean([1.0, 0.0], [0, 1], 20).minus(of_mean([1.0, 0.0], [0, 1], 10))
    with pytest.raises(ValueError, match="want both"):
        of_mean([1.0, 0.0], [0, 1, 2])
