"""How items are retrieved, ranked and re-ranked over the whole catalog."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recllm.errors import check, check_choices


@dataclass(frozen=True)
class CascadeConfig:
    """A cascade: a first step over the whole catalog, then steps over ever shorter lists."""

    first: Literal["retriever", "popularity"] = "retriever"
    """What scores the whole catalog: the retriever of stage 1, or how popular an item is."""
    retrieved: int = 500
    """Items that the first step hands on."""
    crm: bool = True
    """Whether the CRM (the last one of `CRM=`) ranks what is retrieved."""
    ranked: int = 50
    """Items that the language model ranks anew; it takes part if `SYSTEM=` names one."""
    seen: Literal["removed", "kept"] = "removed"
    """Whether items of a query's own history are left out where the weights are fitted."""
    valid_rows: int = 1000
    """Liked validation samples on which the weights of the steps are fitted, at most."""
    index: Literal["auto", "exact", "ivf", "hnsw"] = "auto"
    """How item vectors are searched: exactly, by inverted lists or by a graph; `auto`: exactly up to
    `exact_items`, by inverted lists beyond."""
    exact_items: int = 50_000
    """See `index` (items)."""
    batch_size: int = 16
    """Lists of one forward pass of the language model."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_choices("cascade", self)
        for name in ("retrieved", "ranked", "valid_rows", "batch_size"):
            value = getattr(self, name)
            check(value >= 1, f"cascade.{name}", value, "at least 1")
        wanted = f"at most cascade.retrieved={self.retrieved}"
        check(self.ranked <= self.retrieved, "cascade.ranked", self.ranked, wanted)
