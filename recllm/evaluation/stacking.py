"""The stacking controls: logistic regressions on a few systems' logits, or on a CRM's representation.

They say what is to be had of the same parts without a gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recllm.eventlog.log import EventLog, Rows
from recllm.systems.crm import Crm
from recllm.systems.system import Kind, Scores, System, Task

Floats = NDArray[np.float64]

CONTROLS = ("refit", "blend", "blend-refit")
"""Names of the systems that are such regressions."""
REFIT_RIDGE = 1.0
"""`ridge` of `refit`, whose features are hundreds."""


class Stacked(System):
    """A logistic regression that is fitted when it is first asked; it answers Yes or No only."""

    kind = Kind.STACKED
    tasks = (Task.CTR,)

    def stands_at(self, sweep: Mapping[str, str]) -> bool:
        """See `System`: it is fitted anew in every evaluation."""
        return True


class Refit(Stacked):
    """The last layer of a CRM, fitted anew on the rows that stage 2 tunes on.

    Args:
        name: of the system.
        log: the event log.
        crm: one that was not trained on these rows.
        rows: int64 `[n]`, the rows.
    """

    def __init__(self, name: str, log: EventLog, crm: Crm, rows: Rows) -> None:
        """See the class."""
        super().__init__(name)
        self.log = log
        self.crm = crm
        self.rows = rows

    @cached_property
    def weights(self) -> Floats:
        """`[d_c + 1]`, the bias last."""
        labels = self.log.label[self.rows]
        return logistic_blend(self.crm.representations(self.rows), labels, REFIT_RIDGE)

    def ctr(self, rows: Rows) -> Scores:
        """See `System`."""
        return apply_blend(self.crm.representations(rows), self.weights)


class Blend(Stacked):
    """A regression on the logits of some systems.

    Args:
        name: of the system.
        log: the event log.
        parts: the systems.
        rows: int64 `[n]`, rows that it is fitted on: of the validation split, which trained none of them.
        lm: name of the language model that has a part in it.
    """

    def __init__(self, name: str, log: EventLog, parts: Sequence[System], rows: Rows, lm: str | None) -> None:
        """See the class."""
        super().__init__(name, lm=lm)
        self.log = log
        self.parts = parts
        self.rows = rows

    @cached_property
    def weights(self) -> Floats:
        """`[f + 1]`, the bias last."""
        return logistic_blend(self._features(self.rows), self.log.label[self.rows])

    def ctr(self, rows: Rows) -> Scores:
        """See `System`."""
        return apply_blend(self._features(rows), self.weights)

    def _features(self, rows: Rows) -> Scores:
        return np.stack([part.ctr(rows) for part in self.parts], 1)


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
    mean = x.mean(axis=0)
    scale = x.std(axis=0)
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
        weights = weights - step
        previous = value
        value = trial
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
