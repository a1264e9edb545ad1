"""Bands of rows: how much training has seen of a row's user and item."""

from __future__ import annotations

from dataclasses import dataclass

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
"""Band -> how tables name it. Events are training events."""


@dataclass(frozen=True)
class Slices:
    """Bands of a row set.

    Attributes:
        masks: band -> bool `[n]`.
        upto: the largest count of training events in the bands that have an upper edge.
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
        masks: dict[str, Bools] = {}
        upto: dict[str, int] = {}
        for name, counts in (("users", active[log.user[rows]]), ("items", log.item_count[log.item[rows]])):
            seen = counts > 0
            masks[f"{name}_unseen"], masks[f"{name}_seen"] = ~seen, seen
            low, mid = np.quantile(counts[seen], (1 / 3, 2 / 3), method="lower") if seen.any() else (0, 0)
            masks[f"{name}_low"] = seen & (counts <= low)
            masks[f"{name}_mid"] = (counts > low) & (counts <= mid)
            masks[f"{name}_high"] = counts > mid
            upto |= {f"{name}_low": int(low), f"{name}_mid": int(mid)}
        return cls({band: masks[band] for band in SLICES}, upto)

    def metrics(self, logits: NDArray[np.floating], labels: NDArray[np.integer]) -> dict[str, float]:
        """`auc/<band>`, `logloss/<band>`, `rows/<band>`, and `upto/<band>`: the band's largest count.

        Args:
            logits: `[n]` log-odds of a like.
            labels: `[n]` in {0, 1}.

        Returns:
            Metric name to value; NaN where a band holds no row, or (AUC) a single label.
        """
        figures = {f"upto/{band}": float(count) for band, count in self.upto.items()}
        for band, mask in self.masks.items():
            figures[f"rows/{band}"] = float(mask.sum())
            figures[f"auc/{band}"] = auc(logits[mask], labels[mask])
            figures[f"logloss/{band}"] = log_loss(logits[mask], labels[mask])
        return figures
