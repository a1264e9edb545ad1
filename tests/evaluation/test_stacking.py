"""The blend: known weights come back, and it beats its parts."""

from __future__ import annotations

import numpy as np

from recllm import metrics
from recllm.evaluation.stacking import apply_blend, logistic_blend


def test_blend_recovers_known_weights() -> None:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(60_000, 2)) * [1.0, 10.0] + [3.0, 0.0]
    true = np.array([1.5, -0.1, -4.0])
    labels = rng.random(60_000) < 1 / (1 + np.exp(-(x @ true[:2] + true[2])))
    weights = logistic_blend(x, labels)
    np.testing.assert_allclose(weights, true, rtol=0.06)
    # the gradient of the log loss vanishes there
    residual = 1 / (1 + np.exp(-apply_blend(x, weights))) - labels
    np.testing.assert_allclose(np.append(x.T @ residual, residual.sum()) / 60_000, 0, atol=1e-6)


def test_blend_is_no_worse_than_its_parts_and_survives_separable_labels() -> None:
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 2, 3000)
    parts = rng.normal(size=(3000, 2)) + labels[:, None]
    blended = apply_blend(parts, logistic_blend(parts, labels))
    for part in parts.T:
        assert metrics.log_loss(blended, labels) < metrics.log_loss(part, labels)
        assert metrics.auc(blended, labels) > metrics.auc(part, labels)
    separable = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    weights = logistic_blend(separable, [0, 0, 1, 1])
    assert np.isfinite(weights).all()
    assert metrics.auc(apply_blend(separable, weights), [0, 0, 1, 1]) == 1.0
