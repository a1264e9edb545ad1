"""Which sample trains, validates or tests.

The split follows the protocol of ReLLa and RecLoRA: samples sorted globally by (timestamp, user, item), the
first n * 8 // 10 train, the next n // 10 validate, the rest test.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from recllm.columns import SPLITS, UNUSED

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PrepareConfig:
    """What turns tables into an event log."""

    seed: int = 0
    """Seed of the permutations (row sets) and of the candidate lists."""
    min_history: int = 5
    """Earlier events that an event needs to be a sample (the paper: 5)."""
    ties: str = "rows"
    """`rows`: the history is all rows above (the paper); `strict`: rows of the same second are left out."""
    label_threshold: float | None = None
    """Liked = rating > threshold, in stars; null keeps the labels that the recipe wrote."""
    user_fields: list[str] = field(default_factory=list)
    """Columns of the users table that a CRM reads, beside the user itself."""
    item_fields: list[str] = field(default_factory=lambda: ["title", "genre"])
    """Columns of the items table that a CRM reads, beside the item itself."""
    category: str = "genre"
    """The one of `item_fields` that events of a history carry, and that hard retrieval goes by."""
    ranking_valid_rows: int = 2000
    """Liked validation samples that carry the ranking task, at most."""
    ranking_test_rows: int = 2000
    """Liked test samples that carry the ranking task, at most."""
    candidates: int = 20
    """Items in a ranking row's list, the target included."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for key, wanted, right in (
            ("ties", "rows or strict", self.ties in ("rows", "strict")),
            ("category", f"one of item_fields {self.item_fields}", self.category in self.item_fields),
            ("min_history", "0 or more events", self.min_history >= 0),
            ("candidates", "2 or more items", self.candidates >= 2),
            ("ranking_valid_rows", "0 or more rows", self.ranking_valid_rows >= 0),
            ("ranking_test_rows", "0 or more rows", self.ranking_test_rows >= 0),
        ):
            if not right:
                raise ValueError(f"prepare.{key} is {getattr(self, key)!r}, wanted {wanted}")


def split_by_time(timestamp: Array, sample: Array) -> tuple[Array, dict[str, Array]]:
    """Splits the samples 80 : 10 : 10 by global time.

    Args:
        timestamp: seconds `[N]` of a log that is sorted by (user, timestamp, item).
        sample: bool `[N]`, the rows that are samples.

    Returns:
        split int8 `[N]` (0 train, 1 valid, 2 test, -1 no sample), and the rows of each split, int64, sorted
        globally by (timestamp, user, item).
    """
    rows = np.flatnonzero(sample)
    # Rows ascend by (user, ..., item), so a stable sort by time alone breaks its ties by user, then item.
    rows = rows[np.argsort(timestamp[rows], kind="stable")]
    n = len(rows)
    train, valid = n * 8 // 10, n // 10
    order = {"train": rows[:train], "valid": rows[train : train + valid], "test": rows[train + valid :]}
    split = np.full(len(timestamp), UNUSED, dtype=np.int8)
    for name, part in order.items():
        split[part] = SPLITS[name]
    return split, order
