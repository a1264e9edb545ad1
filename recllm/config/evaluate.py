"""What is measured on the test split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recllm.errors import check, check_choices
from recllm.eventlog.names import check_candidates, check_rows, check_sized_rows

CATALOG_BASELINES = ("popularity", "popularity-7-days", "transitions", "item-knn", "ease", "als")
"""What is counted or solved for over the whole catalog."""


@dataclass(frozen=True)
class NextConfig:
    """What is measured over the whole catalog (`TASK=next`)."""

    rows: str = "all"
    """Row set of the test split on which baselines and retrievers recommend."""
    targets: Literal["any", "liked"] = "any"
    """Which rows of it count: `any`, or those whose event was `liked`."""
    seen: Literal["removed", "kept"] = "removed"
    """Whether items of a row's history may be recommended again."""
    baselines: list[str] = field(default_factory=lambda: list(CATALOG_BASELINES))
    """Baselines: `popularity`, `popularity-7-days`, `transitions`, `item-knn`, `ease`, `als`. One that cannot
    be had here (no times, too many items, no library) is left out, and it is said."""
    retrieved: int = 500
    """Items that a system recommends, and that a CRM orders anew, a row."""
    reranked: int = 50
    """The first of them that an LM orders anew."""
    cascade_rows: str = "uniform2000"
    """Row set of the test split on which CRMs and LMs order anew what was retrieved; all else is measured
    there, too."""
    joined_rows: str = "uniform2000"
    """Row set of the validation split on which it is fitted how much the score of each step weighs."""
    item_knn_neighbors: int = 20
    """Nearest items of an item that `item-knn` keeps."""
    ease_l2: float = 300.0
    """Penalty of `ease`."""
    als_factors: int = 128
    """Length of the vectors of `als`."""
    als_alpha: float = 1.0
    """How much more an event weighs in `als` than its absence."""
    als_l2: float = 0.01
    """Penalty of `als`."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_choices("evaluate.next", self)
        check_rows("evaluate.next.rows", self.rows)
        check_rows("evaluate.next.cascade_rows", self.cascade_rows)
        check_rows("evaluate.next.joined_rows", self.joined_rows)
        unknown = [name for name in self.baselines if name not in CATALOG_BASELINES]
        check(not unknown, "evaluate.next.baselines", unknown, f"some of {', '.join(CATALOG_BASELINES)}")
        check(self.retrieved >= 20, "evaluate.next.retrieved", self.retrieved, "20 or more items")
        wanted = f"from 1 to evaluate.next.retrieved={self.retrieved}"
        check(1 <= self.reranked <= self.retrieved, "evaluate.next.reranked", self.reranked, wanted)
        check(self.ease_l2 > 0, "evaluate.next.ease_l2", self.ease_l2, "more than 0")
        check(self.als_factors >= 1, "evaluate.next.als_factors", self.als_factors, "1 or more")
        neighbors = self.item_knn_neighbors
        check(neighbors >= 1, "evaluate.next.item_knn_neighbors", neighbors, "1 or more items")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on the test split."""

    ctr_rows: str = "auto"
    """Row set of the test split on which LM systems answer Yes/No; CRMs are measured on it and on all
    rows. `auto`: all rows, but of a split of more than 200,000 so many, drawn: an AUC is known to .002 by
    them."""
    aligned_rows: str = "uniform4000"
    """Row set of the test split on which stage 3 and what it starts from answer Yes/No, too: what alignment
    costs there."""
    blend_rows: str = "uniform6000"
    """Row set of the validation split on which the stacking control is fitted."""
    candidates: list[str] = field(default_factory=lambda: ["uniform20", "popular20"])
    """Kinds of candidate lists: `uniform20`, `popular20`, `hard20` (items that are alike), `given20`
    (the data set's own)."""
    ranking_rows: int = 2000
    """Rows of the ranking task, at most those stored by `prepare`."""
    generate_rows: int = 200
    """Rows on which titles are generated greedily for the valid ratio (0: none)."""
    bootstrap: int = 1000
    """Draws of the paired bootstrap clustered by user."""
    batch_size: int = 256
    """Most Yes/No prompts of one forward pass of the LM; a quarter as many where all titles of a list stand
    behind one, a sixteenth as many rows where each of their candidates has a prompt. A CPU is given 4,096
    tokens at most."""
    next: NextConfig = field(default_factory=NextConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        check_sized_rows("evaluate.ctr_rows", self.ctr_rows)
        check_rows("evaluate.aligned_rows", self.aligned_rows)
        check_rows("evaluate.blend_rows", self.blend_rows)
        for kind in self.candidates:
            check_candidates("evaluate.candidates", kind)
