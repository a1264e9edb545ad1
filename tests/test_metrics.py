"""Metrics by hand, against torchmetrics, and by brute force; bootstrap on data whose variance is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from recllm import metrics


def brute_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Counts pairs one by one."""
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0 for p in scores[labels == 1] for n in scores[labels == 0]
    ]
    return float(np.mean(wins))


def test_auc_by_hand() -> None:
    # likes at .8 and .4, others at .6 and .2: three of four pairs right
    assert metrics.auc([0.8, 0.4, 0.6, 0.2], [1, 1, 0, 0]) == 0.75
    # the tie at .5 counts half: pairs (.5,.5) 1/2, (.5,.1) 1 -> .75
    assert metrics.auc([0.5, 0.5, 0.1], [1, 0, 0]) == 0.75
    assert metrics.auc([1.0, 1.0, 1.0], [1, 0, 0]) == 0.5
    assert math.isnan(metrics.auc([1.0, 2.0], [1, 1]))


def test_auc_equals_torchmetrics_and_brute_force() -> None:
    rng = np.random.default_rng(0)
    scores, labels = np.round(rng.normal(size=400), 1), rng.integers(0, 2, 400)  # rounding makes many ties
    ours = metrics.auc(scores, labels)
    theirs = binary_auroc(torch.from_numpy(1 / (1 + np.exp(-scores))), torch.from_numpy(labels))
    assert ours == pytest.approx(theirs.item(), abs=1e-6)
    assert ours == pytest.approx(brute_auc(scores, labels), abs=1e-12)


def test_log_loss_by_hand() -> None:
    # probabilities .75 (liked) and .2 (not liked): -(ln .75 + ln .8) / 2
    logits = [math.log(3), math.log(0.25)]
    assert metrics.log_loss(logits, [1, 0]) == pytest.approx(-(math.log(0.75) + math.log(0.8)) / 2)
    assert metrics.log_loss([1e4, -1e4], [1, 0]) == 0.0
    assert metrics.log_loss([1e4], [0]) == 1e4


def test_relative_improvement_by_hand() -> None:
    assert metrics.relative_improvement(0.8, 0.75) == pytest.approx(0.2)
    assert metrics.relative_improvement(0.75, 0.75) == 0.0


def test_per_user_auc_by_hand() -> None:
    # user 7: 3 rows, AUC 1/2 ; user 9: 2 rows, AUC 1 ; user 8: one label only, out. (3 * .5 + 2 * 1) / 5 = .7
    scores = [0.5, 0.9, 0.1, 3.0, 2.0, 5.0]
    labels = [1, 0, 0, 1, 0, 1]
    users = [7, 7, 7, 9, 9, 8]
    assert metrics.per_user_auc(scores, labels, users) == pytest.approx(0.7)
    assert math.isnan(metrics.per_user_auc([1.0, 2.0], [1, 0], [1, 2]))


def test_per_user_auc_equals_a_loop_over_users() -> None:
    rng = np.random.default_rng(1)
    users, labels = rng.integers(0, 30, 600), rng.integers(0, 2, 600)
    scores = np.round(rng.normal(size=600), 1)
    both_labels = [u for u in range(30) if len(set(labels[users == u])) == 2]
    values = [brute_auc(scores[users == u], labels[users == u]) for u in both_labels]
    wanted = np.average(values, weights=[(users == u).sum() for u in both_labels])
    assert metrics.per_user_auc(scores, labels, users) == pytest.approx(wanted, abs=1e-12)


def test_calibration_error_by_hand() -> None:
    # Four bins. p = .1, .2 lie in the first (one like of two), .5 in the third (liked), .9 in the last (not).
    p = np.array([0.1, 0.2, 0.5, 0.9])
    wanted = (abs(0.15 - 0.5) * 2 + abs(0.5 - 1) + abs(0.9 - 0)) / 4
    assert metrics.calibration_error(np.log(p / (1 - p)), [0, 1, 1, 0], bins=4) == pytest.approx(wanted)
    assert metrics.calibration_error([-800.0, 800.0], [0, 1]) == 0.0  # p = 1 belongs to the last bin
    assert math.isnan(metrics.calibration_error([], []))


def test_reliability_by_hand_and_against_the_calibration_error() -> None:
    p = np.array([0.1, 0.2, 0.5, 0.9])
    bins = metrics.reliability(np.log(p / (1 - p)), [0, 1, 1, 0], bins=4)
    assert bins == [
        [2, pytest.approx(0.15), 0.5],
        [0, 0, 0],
        [1, pytest.approx(0.5), 1],
        [1, pytest.approx(0.9), 0],
    ]
    assert metrics.reliability([], [], bins=2) == [[0, 0, 0], [0, 0, 0]]
    # The error is what the bins' gaps add up to.
    rng = np.random.default_rng(3)
    logits = rng.normal(size=500)
    labels = rng.integers(0, 2, 500)
    kept = metrics.reliability(logits, labels)
    assert sum(rows for rows, _, _ in kept) == 500
    gaps = sum(rows * abs(predicted - liked) for rows, predicted, liked in kept) / 500
    assert metrics.calibration_error(logits, labels) == pytest.approx(gaps)


def test_a_calibrated_score_has_a_small_calibration_error_and_a_shifted_one_a_large_one() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(size=100_000)
    labels = rng.random(100_000) < 1 / (1 + np.exp(-logits))
    assert metrics.calibration_error(logits, labels) < 0.01
    # The mean over the bins' gaps is the gap of the means where all gaps have one sign.
    shifted = 1 / (1 + np.exp(-(logits + 1)))
    wanted = shifted.mean() - labels.mean()
    assert metrics.calibration_error(logits + 1, labels) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    ("scores", "labels", "words"),
    [([float("nan"), 1.0], [0, 1], "NaN"), ([1.0], [0, 1], "want both"), ([1.0, 2.0], [1, 2], "labels")],
)
def test_bad_ctr_inputs_are_named(scores: list[float], labels: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        metrics.auc(scores, labels)


def test_ranking_by_hand() -> None:
    # 12 candidates; targets at places 1, 3, 8, 12
    scores = np.tile(np.arange(12, 0, -1.0), (4, 1))
    values = metrics.ranking_values(scores, [0, 2, 7, 11])
    assert values["hr@1"].tolist() == [1, 0, 0, 0]
    assert values["hr@5"].tolist() == [1, 1, 0, 0]
    assert values["hr@10"].tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(values["ndcg@5"], [1, 1 / math.log2(4), 0, 0])
    np.testing.assert_allclose(values["ndcg@10"], [1, 0.5, 1 / math.log2(9), 0])
    np.testing.assert_allclose(values["mrr"], [1, 1 / 3, 1 / 8, 1 / 12])
    assert metrics.means(values)["hr@5"] == 0.5


def test_ties_get_the_expected_value() -> None:
    values = metrics.ranking_values(np.zeros((1, 20)), [13])
    assert values["hr@1"][0] == pytest.approx(1 / 20)
    assert values["hr@10"][0] == pytest.approx(10 / 20)
    assert values["mrr"][0] == pytest.approx(sum(1 / p for p in range(1, 21)) / 20)
    # one better, one tied: places 2 and 3
    values = metrics.ranking_values([[3.0, 2.0, 2.0, 1.0]], [1])
    assert values["ndcg@5"][0] == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / 2)


def test_ranking_does_not_depend_on_the_order_of_candidates() -> None:
    rng = np.random.default_rng(2)
    scores, target = np.round(rng.normal(size=(50, 20)), 1), rng.integers(0, 20, 50)
    shuffle = rng.permutation(20)
    moved = metrics.ranking_values(scores[:, shuffle], np.argsort(shuffle)[target])
    for name, value in metrics.ranking_values(scores, target).items():
        np.testing.assert_allclose(moved[name], value)


def test_bad_ranking_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="NaN"):
        metrics.ranking_values([[float("nan"), 1.0]], [0])
    with pytest.raises(ValueError, match=r"0\.\.1"):
        metrics.ranking_values([[1.0, 2.0]], [2])


def test_strata_are_disjoint_and_complete() -> None:
    masks = metrics.gap_strata([0, 1, 60, 61, 3600, 3601])
    assert np.sum(list(masks.values()), axis=0).tolist() == [1] * 6
    assert {k: v.sum() for k, v in masks.items()} == {"same_second": 1, "minute": 2, "hour": 2, "later": 1}
    values = {"hr@1": np.array([1.0, 0, 1, 0, 0, 0])}
    assert metrics.means(values, masks["minute"]) == {"hr@1": 0.5}
    with pytest.raises(ValueError, match="-5 seconds"):
        metrics.gap_strata([-5])


def test_weighted_auc_equals_the_auc_of_repeated_rows() -> None:
    rng = np.random.default_rng(5)
    users, labels = rng.integers(0, 8, 120), rng.integers(0, 2, 120)
    scores = np.round(rng.normal(size=120), 1)
    weight = rng.integers(0, 4, 8)
    repeated = np.repeat(np.arange(120), weight[users])
    fast = metrics.SortedPairs(scores, labels.astype(bool), users).auc(weight.astype(float))
    assert fast == pytest.approx(brute_auc(scores[repeated], labels[repeated]), abs=1e-12)
