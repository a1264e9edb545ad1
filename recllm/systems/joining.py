"""How the scores of a cascade's steps are joined: one conditional logit over the items of a list.

Steps score on scales of their own (dot products, log-odds, log-probabilities of titles), so each step's
scores are standardized within a list first, and

    P(item | list) = exp(sum_s w_s z_s(item)) / sum_{j in list} exp(sum_s w_s z_s(j))

(McFadden, "Conditional logit analysis of qualitative choice behavior", 1974). The weights w maximize the
likelihood of the items that came next in lists of the validation split: a convex problem with one weight a
step. A step that adds nothing gets a weight near 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

Floats = NDArray[np.float64]

RIDGE = 1e-3
"""Half of it times the squared weights is added to the sum of losses: weights stay finite where one step
alone is always right, and it is nothing beside hundreds of lists."""


def standardize(scores: NDArray[np.floating]) -> Floats:
    """Scores of each list with mean 0 and standard deviation 1; 0 where all of a list are equal.

    Args:
        scores: `[R, C]`, larger is better; -inf where a list is shorter than C.

    Returns:
        float64 `[R, C]`, -inf where it was; means and deviations are over the items that are there.
    """
    values = np.asarray(scores, np.float64)
    there = ~np.isneginf(values)
    count = np.maximum(there.sum(axis=1, keepdims=True), 1)
    present = np.where(there, values, 0.0)
    centered = np.where(there, present - present.sum(axis=1, keepdims=True) / count, 0.0)
    deviation = np.sqrt((centered**2).sum(axis=1, keepdims=True) / count)
    # Rounding leaves equal scores of any size a deviation that is not quite 0.
    magnitude = np.abs(present).max(axis=1, keepdims=True, initial=0.0)
    equal = deviation <= 1e-12 * magnitude
    deviation[equal] = 1.0
    centered[equal[:, 0]] = 0.0
    return np.where(there, centered / deviation, -np.inf)


def fit(scores: Sequence[NDArray[np.floating]], own: NDArray[np.integer]) -> Floats:
    """Weights of the steps by maximum likelihood.

    Args:
        scores: of each step `[R, C]`, larger is better; in all steps alike -inf where a list is shorter
            than C.
        own: `[R]`, the column of the item that came next; -1: it is not in the list, which then says nothing.

    Returns:
        float64 `[S]`, one weight a step.

    Raises:
        ValueError: no list holds the item that came next.
    """
    usable = np.asarray(own) >= 0
    if not usable.any():
        raise ValueError(
            f"none of {len(usable)} lists holds the item that came next, so no weights can be fitted; "
            "wanted longer lists or more validation rows"
        )
    columns = np.asarray(own)[usable]
    z = np.stack([standardize(step[usable]) for step in scores])
    there = ~np.isneginf(z[0])
    z[:, ~there] = 0.0
    rows = np.arange(len(columns))
    of_own = z[:, rows, columns]

    def loss(weights: Floats) -> tuple[float, Floats]:
        utility = np.where(there, np.tensordot(weights, z, axes=1), -np.inf)
        total = special.logsumexp(utility, axis=1)
        probability = np.exp(utility - total[:, None])
        value = float((total - weights @ of_own).sum()) + 0.5 * RIDGE * float(weights @ weights)
        expected = np.einsum("rc,src->s", probability, z)
        return value, expected - of_own.sum(axis=1) + RIDGE * weights

    found = optimize.minimize(
        loss, np.zeros(len(z)), jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-8}
    )
    return cast(Floats, found.x)


def join(scores: Sequence[NDArray[np.floating]], weights: NDArray[np.floating]) -> Floats:
    """The joined score of every item, sum_s w_s z_s.

    Args:
        scores: of each step `[R, C]`, as `fit` takes them.
        weights: `[S]`.

    Returns:
        float64 `[R, C]`, -inf where a list is shorter than C.
    """
    first = standardize(scores[0])
    there = ~np.isneginf(first)
    joined = np.where(there, 0.0, -np.inf)
    for step, weight in zip(scores, weights, strict=True):
        joined[there] += weight * standardize(step)[there]
    return joined


def reorder(joined: NDArray[np.floating], length: int, ids: NDArray[np.integer]) -> NDArray[np.intp]:
    """Where the items of a list come to stand when its first ones are ordered anew.

    Items below the cut keep their order, behind those above.

    Args:
        joined: `[R, M]`, the joined scores of the first M items of each list.
        length: of the lists, M or more.
        ids: `[R, M]`, of these items: of equal scores the smaller id comes first.

    Returns:
        `[R, length]`, the former place of the item at each new place.
    """
    n_rows, n_above = joined.shape
    places = np.tile(np.arange(length), (n_rows, 1))
    places[:, :n_above] = np.lexsort((ids, -joined), axis=1)
    return places
