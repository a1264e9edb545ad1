"""What the item vectors are made of, and how many neighbors are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from recllm.errors import check, check_choices

Vectors = Literal["lm", "cooccurrence", "both"]

MANY_EVENTS = 10_000_000
"""Training events beyond which there are `FEW_FOLDS` groups of users: two halves of such a log have each more
than six times as many as MovieLens-1M has in four fifths, and take a quarter of the time."""
MANY_FOLDS = 5
FEW_FOLDS = 2


@dataclass(frozen=True)
class RetrievalConfig:
    """What the item vectors are made of, and how many neighbors are stored."""

    vectors: Vectors = "both"
    """`lm` (the paper), `cooccurrence` (SVD of the training events) or `both` joined."""
    pca_dim: int = 64
    """Dimensions kept of the LM's hidden state; fewer where the LM or the item count has fewer."""
    pooling: Literal["mean", "last"] = "mean"
    """Of the LM's last hidden layer over an item's tokens: their `mean` (the paper), or the `last` token."""
    svd_dim: int = 64
    """Dimensions of each of the two co-occurrence parts."""
    content_weight: float = 0.7
    """Length of the LM part in `both`; each of the two co-occurrence parts has length 1."""
    metric: Literal["cosine", "inner"] = "cosine"
    """`cosine` (the paper), or `inner` product, which finds items with long vectors (popular ones) more."""
    k: int = 30
    """Neighbors stored per sample, most similar first, so that fewer are a prefix."""
    hard: int = 50
    """Nearest items out of which hard candidates are drawn; fewer are harder (0: no such lists)."""
    embed_batch: int = 64
    """Item texts in one forward pass of the LM."""
    folds: int = 0
    """Groups of users; a user's vectors come from the co-occurrence of the other groups (1: of everybody).
    0: five, and two of a log of more than ten million training events, half of which say enough."""
    seed: int = 0
    """Seed of the SVD's start vector and of the users' groups."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_choices("retrieval", self)
        for name in ("pca_dim", "svd_dim", "k", "embed_batch"):
            value = getattr(self, name)
            check(value >= 1, f"retrieval.{name}", value, "at least 1")
        check(self.folds >= 0, "retrieval.folds", self.folds, "1 or more, or 0 for what fits the log")
        check(self.hard >= 0, "retrieval.hard", self.hard, "0 or more items")
        check(self.content_weight > 0, "retrieval.content_weight", self.content_weight, "more than 0")

    def num_folds(self, training_events: int) -> int:
        """Groups of users of a log with so many training events; 1 where vectors know of no user."""
        if self.vectors == "lm":
            return 1
        if self.folds:
            return self.folds
        return FEW_FOLDS if training_events > MANY_EVENTS else MANY_FOLDS


def check_kind(kind: str) -> None:
    """Refuse vectors that do not exist."""
    kinds = get_args(Vectors)
    check(kind in kinds, "retrieval.vectors", kind, f"one of {', '.join(kinds)}")
