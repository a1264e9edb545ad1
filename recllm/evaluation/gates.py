"""What a gate gives to whom: alpha of validation rows, kept by stage 2 and read by the report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog.log import EventLog, Rows
from recllm.files import publish

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

ENTROPY = "valid/gate_entropy"
"""How stage 2 logs the mean entropy of validation rows."""
EACH = 10
"""Validation rows of a user, at most."""
ROWS = 4000
"""Validation rows in all, at most."""


def asked_rows(log: EventLog, each: int = EACH, most: int = ROWS) -> Rows:
    """Validation rows for which alpha is kept: whole users, in the stored random order.

    Args:
        log: the event log.
        each: rows of a user, at most; the first ones of the permutation.
        most: rows in all, at most (but one user there is).

    Returns:
        int64 `[n]`, a user's rows together.
    """
    rows = log.rows("valid", "1.0")
    _, first, which = np.unique(log.user[rows], return_index=True, return_inverse=True)
    turn = np.argsort(np.argsort(first))[which]  # users by their first row
    order = np.argsort(turn, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(turn))])
    rank = np.arange(len(rows)) - starts[turn[order]]
    first_ones = order[rank < each]
    end = np.cumsum(np.bincount(turn[first_ones]))
    users = max(1, int((end <= most).sum()))
    return np.asarray(rows[first_ones[: end[users - 1]]])


def entropy(alpha: Floats) -> Floats:
    """Entropy over log N_m along the last axis: 1 where alpha is uniform, 0 where one meta-LoRA has it all.

    Args:
        alpha: `[..., N_m]`, rows sum to 1. With N_m = 1 it is 0.
    """
    bits = -(alpha * np.log(np.maximum(alpha, 1e-12))).sum(-1)
    return np.asarray(bits / (math.log(alpha.shape[-1]) or 1.0))


def distances(some: Floats, others: Floats) -> Floats:
    """Half the sum of absolute differences (total variation): 0 for the same alpha, 1 for disjoint ones.

    Args:
        some: `[n, N_m]`.
        others: `[m, N_m]`.

    Returns:
        `[n, m]`.
    """
    return np.asarray(np.abs(some[:, None] - others[None]).sum(-1) / 2)


def explained(groups: Ints, alpha: Floats) -> float:
    """Share of alpha's variance that lies between groups, corrected for their number (adjusted R^2).

    Args:
        groups: `[n]`, the group of each.
        alpha: `[n, N_m]`.

    Returns:
        About 0 where groups say nothing (below it by chance), 1 where they say all; NaN where every row is a
        group of its own, or alpha does not vary.
    """
    _, which, counts = np.unique(groups, return_inverse=True, return_counts=True)
    n, k = len(alpha), len(counts)
    within = ((alpha - grouped_mean(which, alpha, k)[which]) ** 2).sum()
    total = ((alpha - alpha.mean(0)) ** 2).sum()
    return float(1 - (within / (n - k)) / (total / (n - 1))) if n > k and total > 1e-12 * n else math.nan


def grouped_mean(which: Ints, alpha: Floats, count: int) -> Floats:
    """Mean alpha `[count, N_m]` of the rows `[n, N_m]` of each group `[n]`, 0 .. count - 1, none empty."""
    sums = np.zeros((count, alpha.shape[1]))
    np.add.at(sums, which, alpha)
    return np.asarray(sums / np.bincount(which, minlength=count)[:, None])


@dataclass(frozen=True)
class GateRecord:
    """Alpha of rows.

    Attributes:
        rows: int64 `[n]`, rows of the log; a user's rows stand together.
        alpha: float32 `[n, G, N_m]`; G = 1 for a shared gate, else one a module.
    """

    rows: Rows
    alpha: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write both to an `.npz`."""
        with publish(path) as temporary:
            np.savez(temporary, rows=self.rows, alpha=self.alpha)

    @classmethod
    def read(cls, path: Path) -> GateRecord:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(stored["rows"], stored["alpha"])

    @property
    def mixed(self) -> Floats:
        """Alpha `[n, N_m]`, the mean over modules."""
        return np.asarray(self.alpha.mean(1, dtype=np.float64))

    def summary(self) -> dict[str, float]:
        """How far alpha is from uniform: mean entropy, mean largest weight, mean spread between rows."""
        return {
            "entropy": float(entropy(self.alpha).mean()),
            "largest": float(self.alpha.max(-1).mean()),
            "spread": float(self.alpha.std(0).mean()),
        }

    def by_user(self, log: EventLog) -> tuple[Ints, Floats, Rows]:
        """Users `[u]` in the order of their rows, their mean alpha `[u, N_m]`, and their last row `[u]`."""
        ids, first, which = np.unique(log.user[self.rows], return_index=True, return_inverse=True)
        in_time = np.lexsort((self.rows, log.anchors(self.rows), which))
        last = self.rows[in_time[np.searchsorted(which[in_time], np.arange(len(ids)), side="right") - 1]]
        order = np.argsort(first)
        return ids[order], grouped_mean(which, self.mixed, len(ids))[order], last[order]
