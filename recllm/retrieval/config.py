"""What the item vectors are made of, and how many neighbors are stored."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("lm", "cooccurrence", "both")
POOLINGS = ("mean", "last")
METRICS = ("cosine", "inner")


@dataclass(frozen=True)
class RetrievalConfig:
    """What the item vectors are made of, and how many neighbors are stored."""

    vectors: str = "both"
    """`lm` (the paper), `cooccurrence` (SVD of the training events) or `both` joined."""
    pca_dim: int = 64
    """Dimensions kept of the LM's hidden state; fewer where the LM or the item count has fewer."""
    pooling: str = "mean"
    """Of the LM's last hidden layer over an item's tokens: their `mean` (the paper), or the `last` token."""
    svd_dim: int = 64
    """Dimensions of each of the two co-occurrence parts."""
    content_weight: float = 0.7
    """Length of the LM part in `both`; each of the two co-occurrence parts has length 1."""
    metric: str = "cosine"
    """`cosine` (the paper), or `inner` product, which finds items with long vectors (popular ones) more."""
    k: int = 30
    """Neighbors stored per sample, most similar first, so that fewer are a prefix."""
    hard: int = 50
    """Nearest items out of which hard candidates are drawn; fewer are harder (0: no such lists)."""
    embed_batch: int = 64
    """Item texts in one forward pass of the LM."""
    folds: int = 5
    """Groups of users; a user's vectors come from the co-occurrence of the other groups (1: of everybody)."""
    seed: int = 0
    """Seed of the SVD's start vector and of the users' groups."""

    def __post_init__(self) -> None:
        """Refuse values that no run can mean.

        Raises:
            ValueError: naming the key, the value got and the value wanted.
        """
        check_kind(self.vectors)
        for name, wanted in (("pooling", POOLINGS), ("metric", METRICS)):
            if getattr(self, name) not in wanted:
                raise ValueError(
                    f"retrieval.{name} is {getattr(self, name)!r}; wanted one of {', '.join(wanted)}"
                )
        for name in ("pca_dim", "svd_dim", "k", "embed_batch", "folds"):
            if getattr(self, name) < 1:
                raise ValueError(f"retrieval.{name} is {getattr(self, name)}; wanted at least 1")
        if self.hard < 0:
            raise ValueError(f"retrieval.hard is {self.hard}; wanted 0 or more items")
        if self.content_weight <= 0:
            raise ValueError(f"retrieval.content_weight is {self.content_weight}; wanted more than 0")


def check_kind(kind: str) -> None:
    """Refuse vectors that do not exist."""
    if kind not in KINDS:
        raise ValueError(f"retrieval.vectors is {kind!r}; wanted one of {', '.join(KINDS)}")
