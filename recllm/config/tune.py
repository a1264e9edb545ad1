"""What `make tune` searches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recllm.errors import check


@dataclass(frozen=True)
class Range:
    """The values that one configuration key may take: from `low` to `high`, or one of `choices`."""

    key: str = ""
    """The configuration key, of stage 1."""
    unit: str = ""
    """What the value is, as a comment beside the chosen one."""
    low: float = 0.0
    """Least value."""
    high: float = 0.0
    """Largest value."""
    log: bool = False
    """Whether all magnitudes between are equally likely at first, instead of all values."""
    choices: list[Any] = field(default_factory=list)
    """Numbers or words; `low`, `high` and `log` are then not read."""

    def __post_init__(self) -> None:
        """Refuse a range that is none."""
        if self.choices:
            return
        in_order = self.low < self.high
        check(in_order, f"tune.space: {self.key}: low", self.low, f"less than high, which is {self.high}")
        check(self.low > 0 or not self.log, f"tune.space: {self.key}: low", self.low, "more than 0 with log")


@dataclass(frozen=True)
class TuneConfig:
    """A search over stage 1's settings. The space and the budget are the same for every CRM."""

    trials: int = 20
    """Trainings of a study in all, those cut short among them, over all processes and restarts."""
    random: int = 6
    """Trials before the sampler learns from the others, and before one that is worse is cut short."""
    space: list[Range] = field(
        default_factory=lambda: [
            Range("stage1.fit.lr", "peak learning rate", low=5e-4, high=5e-3, log=True),
            Range("stage1.fit.epochs", "passes over all training samples", low=0.3, high=1.2),
            Range("stage1.crm.embedding_dim", "width of a field's embedding", choices=[16, 32, 64]),
            Range("stage1.crm.embedding_dropout", "dropout on the MLP's input", low=0.0, high=0.4),
            Range("stage1.crm.dropout", "dropout after each hidden layer", low=0.0, high=0.5),
            Range("stage1.crm.mask_users", "share of samples whose user reads as unknown", low=0.0, high=0.7),
            Range("stage1.crm.l2", "weight of the embeddings' squared norm", low=0.03, high=3.0, log=True),
        ]
    )
    """What is searched."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check(self.trials >= 1, "tune.trials", self.trials, "at least 1")
        check(self.random >= 1, "tune.random", self.random, "at least 1")
