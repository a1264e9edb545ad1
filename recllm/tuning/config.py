"""What `make tune` searches, and how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
        if not self.choices and not self.low < self.high:
            raise ValueError(f"tune.space: {self.key} goes from {self.low} to {self.high}; wanted low < high")
        if not self.choices and self.log and self.low <= 0:
            raise ValueError(f"tune.space: {self.key} starts at {self.low}; wanted more than 0 with log")


@dataclass(frozen=True)
class TuneConfig:
    """A search over stage 1's settings. The space and the budget are the same for every CRM."""

    trials: int = 20
    """Trainings of a study in all, those cut short among them, over all processes and restarts."""
    random: int = 6
    """Trials before the sampler learns from the others, and before one that is worse is cut short."""
    space: list[Range] = field(default_factory=list)
    """What is searched."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.trials < 1 or self.random < 1:
            raise ValueError(f"tune.trials={self.trials}, tune.random={self.random}; wanted at least 1 each")
