"""Slices of rows: how much training has seen of a row's user and item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog.log import EventLog, Rows
from recllm.metrics import auc, log_loss

Bools = NDArray[np.bool_]

SLICES = {
    "users_unseen": "user unseen",
    "users_seen": "user seen",
    "users_low": "user: few events",
    "users_mid": "user: some",
    "users_high": "user: many",
    "items_unseen": "item unseen",
    "items_low": "item: few events",
    "items_mid": "item: some",
    "items_high": "item: many",
}
"""Slice -> how tables name it. Events are training events."""


@dataclass(frozen=True)
class Slices:
    """Slices of a row set.

    Attributes:
        masks: slice -> bool `[n]`.
        upto: the largest count of training events in the slices that have an upper edge.
    """

    masks: dict[str, Bools]
    upto: dict[str, int]

    @classmethod
    def of(cls, log: EventLog, rows: Rows) -> Slices:
        """Rows by the training events of their user (activity) and of their item (popularity).

        `unseen` has none. The rows that are seen are cut into thirds of (nearly) equal size by the count, so
        that the edges fit the data set; rows of equal count stay together, in the lower third.

        Args:
            log: the event log.
            rows: int64 `[n]`.
        """
        active = np.bincount(log.user[log.train_events()], minlength=log.n_users)
        counts_of: dict[str, NDArray[Any]] = {
            "users": active[log.user[rows]],
            "items": log.item_count[log.item[rows]],
        }
        masks: dict[str, Bools] = {}
        upto: dict[str, int] = {}
        for kind, counts in counts_of.items():
            seen = counts > 0
            low, mid = np.quantile(counts[seen], (1 / 3, 2 / 3), method="lower") if seen.any() else (0, 0)
            masks[f"{kind}_unseen"] = ~seen
            masks[f"{kind}_seen"] = seen
            masks[f"{kind}_low"] = seen & (counts <= low)
            masks[f"{kind}_mid"] = (counts > low) & (counts <= mid)
            masks[f"{kind}_high"] = counts > mid
            upto |= {f"{kind}_low": int(low), f"{kind}_mid": int(mid)}
        return cls({name: masks[name] for name in SLICES}, upto)

    def metrics(self, logits: NDArray[np.floating], labels: NDArray[np.integer]) -> dict[str, float]:
        """`auc/<slice>`, `logloss/<slice>`, `rows/<slice>`, and `upto/<slice>`: the slice's largest count.

        Args:
            logits: `[n]` log-odds of a like.
            labels: `[n]` in {0, 1}.

        Returns:
            Metric name to value; NaN where a slice holds no row, or (AUC) a single label.
        """
        figures = {f"upto/{name}": float(count) for name, count in self.upto.items()}
        for name, mask in self.masks.items():
            figures[f"rows/{name}"] = float(mask.sum())
            figures[f"auc/{name}"] = auc(logits[mask], labels[mask])
            figures[f"logloss/{name}"] = log_loss(logits[mask], labels[mask])
        return figures
