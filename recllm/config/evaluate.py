"""What is measured on the test split."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from recllm.errors import check
from recllm.eventlog.names import check_rows


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on the test split."""

    ctr_rows: str = "all"
    """Row set of the test split on which LM systems answer Yes/No; CRMs are measured on it and on all
    rows."""
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
    """Yes/No prompts of one forward pass of the LM; a quarter as many where all titles of a list stand behind
    one, a sixteenth as many rows where each of their candidates has a prompt."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_rows("evaluate.ctr_rows", self.ctr_rows)
        check_rows("evaluate.aligned_rows", self.aligned_rows)
        check_rows("evaluate.blend_rows", self.blend_rows)
        lists = [
            kind for kind in self.candidates if not re.fullmatch(r"(uniform|popular|hard|given)\d+", kind)
        ]
        check(not lists, "evaluate.candidates", lists, "uniform20, popular20 or hard20, or given20")
