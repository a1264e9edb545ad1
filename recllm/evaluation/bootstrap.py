"""Intervals of differences between systems: a paired bootstrap that draws whole users."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recllm.metrics import SortedPairs, check_scores

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A paired difference, first system minus second.

    Attributes:
        delta: the difference on the rows as they are.
        interval95: 2.5 % and 97.5 % quantiles of the difference over resamples.
        p_value: two-sided, 2 min(P(d <= 0), P(d >= 0)) over resamples with one added to counts, at most 1; so
            with 1,000 draws .002 (2 / 1,001) says "at most .002": a smaller one cannot be told.
    """

    delta: float
    interval95: tuple[float, float]
    p_value: float


@dataclass(frozen=True)
class Resampled:
    """A system's metric on the rows as they are, and on resamples of their users.

    The resamples are a function of the users, the number of draws and the seed: of two systems on the same
    rows they are the same, and the difference of their draws is paired.

    Attributes:
        value: on the rows as they are.
        draws: on each resample `[D]`; NaN where a resample has one label only.
    """

    value: float
    draws: Floats

    def minus(self, other: Resampled) -> Difference:
        """The paired difference to another system on the same rows; resamples with NaN are left out.

        Raises:
            ValueError: where the two have different numbers of draws.
        """
        if self.draws.shape != other.draws.shape:
            raise ValueError(f"{len(self.draws)} and {len(other.draws)} draws, want equally many")
        delta = self.value - other.value
        resampled = self.draws - other.draws
        usable = resampled[~np.isnan(resampled)]
        if not len(usable):
            return Difference(delta, (float("nan"), float("nan")), float("nan"))
        low, high = np.quantile(usable, (0.025, 0.975))
        tail = 1 + min(int((usable <= 0).sum()), int((usable >= 0).sum()))
        return Difference(delta, (float(low), float(high)), min(1.0, 2 * tail / (len(usable) + 1)))


def of_mean(values: ArrayLike, users: ArrayLike, draws: int = 1000, seed: int = 0) -> Resampled:
    """Resamples of a mean of per-row values (HR, NDCG, log loss ...), clustered by user.

    Whole users are drawn with replacement, as many as there are: rows of one user are not independent. A
    draw's statistic is the mean over its rows (users with more rows weigh more, as in the table).

    Args:
        values: `[n]` per-row values of a system.
        users: `[n]` integer ids.
        draws: number of resamples.
        seed: seed of the resamples.
    """
    value = np.asarray(values, dtype=np.float64)
    cluster, n = _clusters(users, value)
    total = np.bincount(cluster, weights=value, minlength=n)
    rows = np.bincount(cluster, minlength=n)
    drawn = [(weight @ total) / (weight @ rows) for weight in _resamples(n, draws, seed)]
    return Resampled(float(value.mean()), np.array(drawn))


def of_auc(
    scores: ArrayLike, labels: ArrayLike, users: ArrayLike, draws: int = 1000, seed: int = 0
) -> Resampled:
    """Resamples of an AUC, clustered by user.

    The scores are sorted once; a resample only changes the weight of each row (how often its user was drawn),
    and the weighted AUC is one cumulative sum.

    Args:
        scores: `[n]` scores of a system.
        labels: `[n]` in {0, 1}.
        users: `[n]` integer ids.
        draws: number of resamples.
        seed: seed of the resamples.
    """
    value, liked = check_scores(scores, labels)
    cluster, n = _clusters(users, value)
    pairs = SortedPairs(value, liked, cluster)
    return Resampled(pairs.auc(), np.array([pairs.auc(weight) for weight in _resamples(n, draws, seed)]))


def _clusters(users: ArrayLike, values: Floats) -> tuple[NDArray[np.intp], int]:
    ids = np.asarray(users)
    if values.shape != ids.shape or values.ndim != 1 or not len(values):
        raise ValueError(f"values {values.shape} and users {ids.shape}, want both [n], n > 0")
    unique, cluster = np.unique(ids, return_inverse=True)
    return cluster, len(unique)


def _resamples(n: int, draws: int, seed: int) -> Iterator[Floats]:
    """Yields `[n]` float64: how often each of n users was drawn."""
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
