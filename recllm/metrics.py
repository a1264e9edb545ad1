"""The CTR and ranking metrics that the results table reports.

Numpy in float64 throughout. A CTR score is always a *logit* (log-odds of a like); for a language model that
is the difference of its two answer logits. AUC needs only the order of scores; log loss needs the logits
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CUTOFFS = {"hr": (1, 5, 10), "ndcg": (5, 10)}
"""Cutoffs of the ranking metrics, in places."""


# ---- CTR


def auc(logits: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: fraction of (liked, not liked) pairs in the right order, ties counting half.

    Exact, by one sort. Equal to torchmetrics' `binary_auroc` (a test says so); ours because the bootstrap
    needs the same quantity a thousand times from one sort.

    Args:
        logits: `[n]`, any increasing transform of the score gives the same value.
        labels: `[n]` in {0, 1}.

    Returns:
        A value in [0, 1]; NaN if only one label occurs.

    Raises:
        ValueError: on NaN scores or unequal lengths.
    """
    scores, liked = check_scores(logits, labels)
    return SortedPairs(scores, liked).auc()


def log_loss(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean binary cross-entropy in nats, from logits (not probabilities): mean of softplus(z) - y z.

    Args:
        logits: `[n]` log-odds of a like.
        labels: `[n]` in {0, 1}.

    Returns:
        The mean over rows; finite for every finite logit, NaN for no rows.
    """
    scores, liked = check_scores(logits, labels)
    return (
        float(np.mean(np.logaddexp(0.0, np.where(liked, -scores, scores)))) if len(scores) else float("nan")
    )


def relative_improvement(value: float, base: float) -> float:
    """Relative improvement of an AUC over a base AUC as the paper defines it: (AUC - .5) / (base - .5) - 1.

    Only the part above chance counts, so .80 against .79 is +3.4 %, not +1.3 %.

    Args:
        value: AUC of the system.
        base: AUC of the system that it is compared with.

    Returns:
        A fraction (0.034 for +3.4 %); NaN if the base is chance itself.
    """
    return (value - 0.5) / (base - 0.5) - 1.0 if base != 0.5 else float("nan")


def per_user_auc(logits: ArrayLike, labels: ArrayLike, users: ArrayLike) -> float:
    """Mean over users of the AUC within the user, weighted by the user's number of rows (often called GAUC).

    Users whose rows all have the same label have no AUC and are left out, weight included.

    Args:
        logits: `[n]`.
        labels: `[n]` in {0, 1}.
        users: `[n]` integer ids.

    Returns:
        A value in [0, 1]; NaN if no user has both labels.
    """
    scores, liked = check_scores(logits, labels)
    _, user = np.unique(np.asarray(users), return_inverse=True)
    n = int(user.max()) + 1 if len(user) else 0
    positive = np.bincount(user, weights=liked, minlength=n)
    rows = np.bincount(user, minlength=n).astype(np.float64)
    negative = rows - positive

    order = np.lexsort((scores, user))
    user = user[order]
    scores = scores[order]
    liked = liked[order]
    start, end = _tie_bounds((user[1:] != user[:-1]) | (scores[1:] != scores[:-1]))
    below = np.concatenate(([0.0], np.cumsum(~liked)))  # negatives before each place, of earlier users too
    wins = np.where(liked, (below[start] + below[end]) / 2, 0.0)
    wins = np.bincount(user, weights=wins, minlength=n)
    wins = wins - positive * (np.cumsum(negative) - negative)  # take the earlier users' negatives out again

    has_auc = (positive > 0) & (negative > 0)
    if not has_auc.any():
        return float("nan")
    aucs = wins[has_auc] / (positive[has_auc] * negative[has_auc])
    return float(np.average(aucs, weights=rows[has_auc]))


def calibration_error(logits: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error (ECE): how far predicted probabilities are from observed shares of likes.

        ECE = sum_b n_b / n |mean p in b - mean y in b|        (Naeini et al. 2015; Guo et al. 2017, eq. 3)

    over bins of equal width in p, [b / bins, (b + 1) / bins); the last one holds 1.

    Args:
        logits: `[n]` log-odds of a like.
        labels: `[n]` in {0, 1}.
        bins: number of bins.

    Returns:
        A value in [0, 1]; NaN for no rows.
    """
    scores, liked = check_scores(logits, labels)
    if not len(scores):
        return float("nan")
    probability, place = _probability_bins(scores, bins)
    gap = np.bincount(place, weights=probability - liked, minlength=bins)
    return float(np.abs(gap).sum() / len(scores))


def reliability(logits: ArrayLike, labels: ArrayLike, bins: int = 15) -> list[list[float]]:
    """What `calibration_error` adds up: of each bin, how many rows, what was predicted, what was liked.

    Args:
        logits: `[n]` log-odds of a like.
        labels: `[n]` in {0, 1}.
        bins: number of bins.

    Returns:
        `[rows, mean probability, share of likes]` of each bin, ascending; three zeros of one without a row.
    """
    scores, liked = check_scores(logits, labels)
    probability, place = _probability_bins(scores, bins)
    count = np.bincount(place, minlength=bins)
    divisor = np.maximum(count, 1)
    predicted = np.bincount(place, weights=probability, minlength=bins) / divisor
    share = np.bincount(place, weights=liked, minlength=bins) / divisor
    return [list(each) for each in zip(count.tolist(), predicted.tolist(), share.tolist(), strict=True)]


def _probability_bins(scores: Floats, bins: int) -> tuple[Floats, NDArray[np.int64]]:
    """Probability of each score, and the bin of equal width that it lies in."""
    probability = 0.5 * (1.0 + np.tanh(0.5 * scores))  # the logistic function, without overflow
    return probability, np.minimum((probability * bins).astype(np.int64), bins - 1)


def ctr_metrics(logits: ArrayLike, labels: ArrayLike, users: ArrayLike) -> dict[str, float]:
    """The CTR metrics of one table row: `auc`, `logloss`, `per_user_auc`, `ece` (15 bins).

    Args:
        logits: `[n]` log-odds of a like.
        labels: `[n]` in {0, 1}.
        users: `[n]` integer ids.

    Returns:
        Metric name to value.
    """
    return {
        "auc": auc(logits, labels),
        "logloss": log_loss(logits, labels),
        "per_user_auc": per_user_auc(logits, labels, users),
        "ece": calibration_error(logits, labels),
    }


# ---- ranking


def ranking_values(scores: ArrayLike, target: ArrayLike) -> dict[str, Floats]:
    """Ranking metrics of every row; a table row reports their means (`means`).

    With the target at place p (1 is best): HR@k = [p <= k], NDCG@k = [p <= k] / log2(1 + p), reciprocal rank
    = 1 / p. A target that ties with t other candidates is at any of its t + 1 places with equal chance, and
    the row gets the *expected* value over them: a constant scorer of 20 candidates has HR@1 = 1/20, neither 0
    nor 1.

    Args:
        scores: `[R, C]`, larger is better. -inf is allowed (ties with other -inf); NaN is not.
        target: `[R]` column of the target.

    Returns:
        `hr@1`, `hr@5`, `hr@10`, `ndcg@5`, `ndcg@10`, `mrr`, each `[R]`.

    Raises:
        ValueError: on NaN scores or a target out of range.
    """
    matrix = np.asarray(scores, dtype=np.float64)
    column = np.asarray(target, dtype=np.int64)
    if matrix.ndim != 2 or column.shape != matrix.shape[:1]:
        raise ValueError(f"scores {matrix.shape} and target {column.shape}, want [R, C] and [R]")
    if np.isnan(matrix).any():
        raise ValueError(f"{int(np.isnan(matrix).any(axis=1).sum())} rows have NaN scores, want numbers")
    n = matrix.shape[1]
    if len(column) and not (0 <= column.min() and column.max() < n):
        raise ValueError(f"target columns {column.min()}..{column.max()}, want 0..{n - 1}")
    own = np.take_along_axis(matrix, column[:, None], axis=1)
    better = (matrix > own).sum(axis=1)
    through = better + (matrix == own).sum(axis=1)  # the target is one of these

    place = np.arange(1, n + 1)
    gains = {f"hr@{k}": (place <= k).astype(np.float64) for k in CUTOFFS["hr"]}
    gains |= {f"ndcg@{k}": (place <= k) / np.log2(1.0 + place) for k in CUTOFFS["ndcg"]}
    gains["mrr"] = 1.0 / place
    values = {}
    for name, gain in gains.items():
        total = np.concatenate(([0.0], np.cumsum(gain)))
        expected = (total[through] - total[better]) / (through - better)
        # Without a tie the gain itself, so that hits stay exactly 0 or 1.
        values[name] = np.where(through - better == 1, gain[better], expected)
    return values


def values_by_place(places: ArrayLike, hits: Sequence[int], gains: Sequence[int]) -> dict[str, Floats]:
    """Ranking metrics of every row by the place of its target in a list, without ties; see `ranking_values`.

    Args:
        places: int64 `[R]`, p - 1; -1: the target is not in the list, and all metrics are 0.
        hits: cutoffs of the hit rate.
        gains: cutoffs of NDCG.

    Returns:
        `hr@k`, `ndcg@k` and `mrr`, each `[R]`.
    """
    columns = np.asarray(places, dtype=np.int64)
    found = columns >= 0
    place = np.where(found, columns + 1, 1).astype(np.float64)
    values = {f"hr@{k}": (found & (place <= k)).astype(np.float64) for k in hits}
    values |= {f"ndcg@{k}": np.where(found & (place <= k), 1.0 / np.log2(1.0 + place), 0.0) for k in gains}
    values["mrr"] = np.where(found, 1.0 / place, 0.0)
    return values


def means(values: Mapping[str, Floats], rows: Bools | None = None) -> dict[str, float]:
    """Mean of each metric over all rows, or over a stratum.

    Args:
        values: metric name to `[R]`.
        rows: bool `[R]`; None is all rows.

    Returns:
        Metric name to mean; NaN for an empty stratum.
    """
    result = {}
    for name, value in values.items():
        stratum = value if rows is None else value[rows]
        result[name] = float(stratum.mean()) if len(stratum) else float("nan")
    return result


LONG_AGO = 3601
"""Seconds from which on an event before is `later` in `gap_strata`."""


def gap_strata(seconds: ArrayLike) -> dict[str, Bools]:
    """Rows by the time since the previous event of the same user; disjoint and complete.

    On data like ML-1M "the next item" often means "the next one on the page that was being rated" (37 % of
    its targets share their second with the event before), so ranking numbers are reported per stratum too.

    Args:
        seconds: `[R]` seconds between the target's event and the last event of its history, >= 0.

    Returns:
        `same_second` (0), `minute` (1..60), `hour` (61..3600), `later` (> 3600): bool `[R]` each.
    """
    gap = np.asarray(seconds, dtype=np.int64)
    if (gap < 0).any():
        raise ValueError(f"a gap of {int(gap.min())} seconds, want >= 0: target before its history")
    return {
        "same_second": gap == 0,
        "minute": (gap > 0) & (gap <= 60),
        "hour": (gap > 60) & (gap < LONG_AGO),
        "later": gap >= LONG_AGO,
    }


# ---- helpers


class SortedPairs:
    """Scores sorted once, so that the AUC under any user weights is one cumulative sum.

    Args:
        scores: `[n]`.
        liked: `[n]`.
        cluster: `[n]` index of each row's weight; None: one for all.
    """

    def __init__(self, scores: Floats, liked: Bools, cluster: Ints | None = None) -> None:
        """Sorts."""
        order = np.argsort(scores)
        scores = scores[order]
        liked = liked[order]
        start, end = _tie_bounds(scores[1:] != scores[:-1])
        before = np.concatenate(([0], np.cumsum(~liked)))  # place -> number of negatives before it
        # Of each positive: negatives below its tie group, and below or within it.
        self.start = before[start[liked]]
        self.end = before[end[liked]]
        cluster = np.zeros(len(scores), dtype=np.int64) if cluster is None else cluster
        self.positive_cluster = cluster[order][liked]
        self.negative_cluster = cluster[order][~liked]

    def auc(self, weight: Floats | None = None) -> float:
        """Weighted AUC; `weight` is one number per cluster, None is 1 for all."""
        if weight is None:
            positive = np.ones(len(self.positive_cluster))
            negative = np.ones(len(self.negative_cluster))
        else:
            positive = weight[self.positive_cluster]
            negative = weight[self.negative_cluster]
        below = np.concatenate(([0.0], np.cumsum(negative)))
        pairs = positive.sum() * below[-1]
        if pairs == 0:
            return float("nan")
        return float(positive @ (below[self.start] + below[self.end]) / (2.0 * pairs))


def _tie_bounds(changes: Bools) -> tuple[Ints, Ints]:
    """First place and one past the last place of each sorted element's tie group; `changes` is `[n - 1]`."""
    edges = np.concatenate(([0], np.flatnonzero(changes) + 1, [len(changes) + 1]))
    group = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    return edges[group], edges[group + 1]


def check_scores(logits: ArrayLike, labels: ArrayLike) -> tuple[Floats, Bools]:
    """Scores and labels as arrays; a ValueError where they are not numbers and 0 or 1, equally many."""
    scores = np.asarray(logits, dtype=np.float64)
    values = np.asarray(labels)
    if scores.ndim != 1 or scores.shape != values.shape:
        raise ValueError(f"scores {scores.shape} and labels {values.shape}, want both [n]")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN, want numbers")
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"labels {np.unique(values)[:5].tolist()}, want 0 and 1 only")
    return scores, values.astype(bool)
