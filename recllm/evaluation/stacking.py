"""The stacking controls: logistic regressions on a few systems' logits, or on a CRM's representation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

BLENDS = ("blend", "blend-refit")
"""Those that an LM's logit is part of."""
CONTROLS = ("refit", *BLENDS)
"""Systems of an evaluation that are such regressions: what is to be had without a gate."""
REFIT_RIDGE = 1.0
"""`ridge` of `refit`, whose features are hundreds."""


def logistic_blend(features: ArrayLike, labels: ArrayLike, ridge: float = 1e-3) -> Floats:
    """Weights of a logistic regression.

    Newton's method with step halving; features are standardized inside, so that their scale does not matter.

    Args:
        features: `[n, f]`: logits of f systems, or a representation.
        labels: `[n]` in {0, 1}.
        ridge: penalty (half of it times the squared weights, on the *sum* of losses); keeps weights finite
            where the labels are separable and is nothing beside thousands of rows.

    Returns:
        `[f + 1]`, the bias last; use `apply_blend`.
    """
    x = np.asarray(features, dtype=np.float64)
    y = np.asarray(labels, dtype=np.float64)
    if x.ndim != 2 or x.shape[:1] != y.shape or not np.isfinite(x).all():
        raise ValueError(f"features {x.shape} and labels {y.shape}, want finite [n, f] and [n]")
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale == 0] = 1.0
    z = np.column_stack([(x - mean) / scale, np.ones(len(x))])
    penalty = np.append(np.full(x.shape[1], ridge), ridge * 1e-3)

    def objective(w: Floats) -> float:
        margin = z @ w
        return float(np.sum(np.logaddexp(0.0, margin) - y * margin) + 0.5 * np.sum(penalty * w * w))

    weights = np.zeros(z.shape[1])
    value = objective(weights)
    for _ in range(100):
        p = 0.5 * (1.0 + np.tanh(0.5 * (z @ weights)))  # the sigmoid, without overflow
        gradient = z.T @ (p - y) + penalty * weights
        step = np.linalg.solve((z * (p * (1 - p))[:, None]).T @ z + np.diag(penalty), gradient)
        while (trial := objective(weights - step)) > value and np.abs(step).max() > 1e-12:
            step /= 2
        weights, previous, value = weights - step, value, trial
        if previous - value <= 1e-12 * max(1.0, abs(value)):
            break
    slopes = weights[:-1] / scale
    return np.append(slopes, weights[-1] - slopes @ mean)


def apply_blend(features: ArrayLike, weights: ArrayLike) -> Floats:
    """Logits of the blend.

    Args:
        features: `[n, f]` of the same systems in the same order.
        weights: `[f + 1]` from `logistic_blend`.

    Returns:
        `[n]` logits.
    """
    w = np.asarray(weights, dtype=np.float64)
    blended: Floats = np.asarray(features, dtype=np.float64) @ w[:-1] + w[-1]
    return blended
