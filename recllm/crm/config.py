"""What a conventional recommendation model (CRM) is built from: fields and settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recllm.errors import check, check_choices

CrmName = Literal["deepfm", "autoint", "dcnv2", "gru4rec", "caser", "sasrec", "din", "sim", "retriever"]

READS_TEXTS = ("din", "sim", "retriever")
"""Models that may read vectors of items' texts (`text_dim`)."""


@dataclass(frozen=True)
class Fields:
    """Sizes of the id tables, as `prepare` counted them; sizes count ids 0 (padding) and 1 (unknown)."""

    user_sizes: tuple[int, ...]
    """Ids of each user field; field 0 is the user itself."""
    item_sizes: tuple[int, ...]
    """Ids of each item field; field 0 is the item itself."""
    rating_levels: int
    """Rating codes are 1 to this (ratings, and labels where the log shows them); 0 means none."""
    category: int
    """Which of the item fields is the category (genre): the one that history events carry beside the item."""

    def __post_init__(self) -> None:
        """Refuses what no table could be made of."""
        # Lists (from JSON or OmegaConf) are welcome, but equality and hashing want tuples.
        object.__setattr__(self, "user_sizes", tuple(int(size) for size in self.user_sizes))
        object.__setattr__(self, "item_sizes", tuple(int(size) for size in self.item_sizes))
        if not self.user_sizes or not self.item_sizes or min(self.user_sizes + self.item_sizes) < 2:
            raise ValueError(
                f"got user_sizes={self.user_sizes}, item_sizes={self.item_sizes}; wanted a field each, "
                "every size >= 2 (ids 0 and 1); run `make prepare` again"
            )
        if not 0 <= self.category < len(self.item_sizes):
            raise ValueError(
                f"got category={self.category}; wanted an index of the {len(self.item_sizes)} item fields; "
                "run `make prepare` again"
            )


@dataclass(frozen=True)
class CrmConfig:
    """Settings of one CRM. Defaults were chosen on the validation split of MovieLens-1M."""

    name: CrmName = "din"
    """Which model."""
    embedding_dim: int = 32
    """Width of a field's embedding row (units)."""
    event_dim: int = 16
    """Width of a history event's rating embedding, and of its time interval's (units)."""
    mlp: list[int] = field(default_factory=lambda: [256, 256, 256])
    """Widths of the prediction MLP's hidden layers (units); the last one is the representation's d_c."""
    dropout: float = 0.2
    """Dropout after each hidden layer of the prediction MLP, and in sequential models (probability)."""
    embedding_dropout: float = 0.1
    """Dropout on the prediction MLP's input, which is all embeddings (probability)."""
    interval: bool = True
    """Whether events carry an embedding of the time between them and the sample (true or false)."""
    statistics: bool = False
    """Whether a sample carries running counts and shares of likes of its user, its item, and its user in its
    category (`recllm.eventlog.statistics`; true or false). The papers' models read none."""
    l2: float = 0.3
    """Weight of the squared norm of a sample's identifying embedding rows (user, item ...) in the loss."""
    mask_users: float = 0.5
    """Share of training samples whose user reads as 1 = unknown, as new users do (probability)."""
    mask_items: float = 0.02
    """Share of training samples whose target item reads as 1 = unknown, as new items do (probability)."""
    embedding_std: float = 0.01
    """Standard deviation of the embeddings' normal start (units of the embedding)."""
    attention_mlp: list[int] = field(default_factory=lambda: [64])
    """din, sim: widths of the attention unit's hidden layers (units)."""
    hidden: int = 64
    """gru4rec, caser, sasrec: width of the history's state; retriever: of all vectors; autoint: of a field,
    all heads (units)."""
    layers: int = 2
    """Layers of gru4rec (GRU), sasrec and retriever (blocks), autoint (interacting layers), dcnv2 (cross
    layers)."""
    heads: int = 2
    """sasrec, retriever, autoint: attention heads, each of width hidden / heads."""
    block: Literal["gated", "hstu"] = "gated"
    """retriever: `gated`: softmax attention and SwiGLU, each behind a gate; `hstu`: HSTU's block."""
    query_time: bool = True
    """retriever: whether it reads the second at which it is asked, as requests have one (true or false)."""
    text_dim: int = 0
    """retriever, din, sim: dimensions of the frozen LM's item vectors (`retrieval`) that items are read by
    beside their ids, so that an item without any event is more than unknown: a retriever adds them to its
    item vectors, the others have them as a further field; `retrieval.pca_dim` at most (0: ids alone)."""
    heights: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    """caser: heights of the horizontal filters (events in a row)."""
    filters: int = 16
    """caser: horizontal filters of each height."""
    vertical: int = 4
    """caser: vertical filters, weighted sums over the history."""
    retrieval: Literal["semantic", "hard", "soft"] = "semantic"
    """sim: how events are found, in the whole history: `semantic` (nearest to the target by item vectors) or
    `hard` (same category as the target, latest first); or in the model: `soft` (largest inner product)."""
    soft_k: int = 30
    """sim with soft retrieval: events kept of the `stage1.recent` ones."""
    soft_recent: int = 30
    """sim with soft retrieval: latest events that are attended to besides."""

    def __post_init__(self) -> None:
        """Refuse a model that does not exist before anything is trained for it."""
        check_choices("stage1.crm", self)
        for name in ("hidden", "layers", "heads", "filters", "vertical", "soft_k", "soft_recent"):
            value = getattr(self, name)
            check(value >= 1, f"stage1.crm.{name}", value, "at least 1")
        check(self.text_dim >= 0, "stage1.crm.text_dim", self.text_dim, "0 or more dimensions")
        reads_texts = self.name in READS_TEXTS and not (self.name == "sim" and self.retrieval == "soft")
        wanted = f"0, as this model ({self.name}, retrieval={self.retrieval}) reads none, or CRM=sim-lm"
        check(reads_texts or self.text_dim == 0, "stage1.crm.text_dim", self.text_dim, wanted)
        heights = bool(self.heights) and min(self.heights) >= 1
        check(heights, "stage1.crm.heights", self.heights, "heights >= 1, e.g. [1,2,3,4]")
        columns = 2 if self.name == "retriever" else 1  # whose columns turn in pairs
        wanted = f"a multiple of {'twice ' if columns == 2 else ''}stage1.crm.heads={self.heads}"
        check(self.hidden % (columns * self.heads) == 0, "stage1.crm.hidden", self.hidden, wanted)

    @property
    def reads_vectors(self) -> bool:
        """Whether it depends on the LM's item vectors."""
        return self.search == "semantic" or self.text_dim > 0

    @property
    def search(self) -> str | None:
        """How retrieved events are found before the model sees a batch; None where it reads none."""
        return self.retrieval if self.name == "sim" and self.retrieval != "soft" else None
