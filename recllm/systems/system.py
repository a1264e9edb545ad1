"""What scores items for users: one interface for counting baselines, CRMs, LMs, towers and stacks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from recllm import processes
from recllm.eventlog.log import Rows
from recllm.pipeline.finished import Finished
from recllm.pipeline.manifest import Manifest

Scores = NDArray[np.floating]


class Kind(StrEnum):
    """What a system is."""

    COUNTING = "counting"
    """Counts of training events."""
    CRM = "crm"
    """A conventional recommendation model."""
    LM = "lm"
    """The language model, untuned."""
    TUNED = "tuned"
    """The language model with an adapter of stage 2."""
    ALIGNED = "aligned"
    """The language model with an adapter of stage 3."""
    TOWERS = "towers"
    """Two towers over an encoder of texts."""
    STACKED = "stacked"
    """A regression on what other systems give."""

    @property
    def stage(self) -> str:
        """The stage that trains such systems, as tables say it; `none` of what none does."""
        return _STAGES[self]


_STAGES = {
    Kind.COUNTING: "none",
    Kind.CRM: "stage1",
    Kind.LM: "lm",
    Kind.TUNED: "stage2",
    Kind.ALIGNED: "stage3",
    Kind.TOWERS: "stage2",
    Kind.STACKED: "none",
}


class Task(StrEnum):
    """What a system can be asked."""

    CTR = "ctr"
    """Whether a user will like an item."""
    RANKING = "ranking"
    """Which of several items a user will like next."""
    NEXT = "next"
    """Which item of the whole catalog comes next."""


class System:
    """Something that is evaluated: a line of the table, whatever it is made of.

    Systems are compared as objects and stand in dictionaries as keys: two of them are never equal.

    Args:
        name: what comparisons call it; no two systems of an evaluation share it.
        made_by: the finished stage that trained it; None: nothing was trained for it alone.
        lm: name of the language model that it is, or that has a part in it; None: there is none.
        k: rejected candidates of a row in preference training; None of all others.
    """

    kind: ClassVar[Kind]
    tasks: tuple[Task, ...] = (Task.CTR, Task.RANKING)
    """What it answers."""

    def __init__(
        self, name: str, *, made_by: Finished | None = None, lm: str | None = None, k: int | None = None
    ) -> None:
        """See the class."""
        self.name = name
        self.made_by = made_by
        self.lm = lm
        self.k = k

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def stage(self) -> str:
        """The stage that trained it, as tables say it; `none` where none did."""
        return self.kind.stage

    @property
    def table_name(self) -> str:
        """What tables call it, where K and LM have columns of their own."""
        return self.name

    @property
    def mixes_loras(self) -> bool:
        """Whether it is an LM with a mixture of LoRAs (RecLoRA), beside which plain LoRA stands."""
        return False

    @property
    def start(self) -> System | None:
        """The system that its training started from; None: from nothing that is in the table."""
        return None

    def ctr(self, rows: Rows) -> Scores:
        """Log-odds that each row's user likes the row's own item.

        Args:
            rows: int64 `[n]`, rows of the log; of each, what lies above it is read.

        Returns:
            `[n]`, in the rows' order.
        """
        raise self._unanswered(Task.CTR)

    def rank(self, rows: Rows, lists: NDArray[np.int32]) -> Scores:
        """Scores of each row's candidates, larger is better; they compare within a row only.

        Args:
            rows: int64 `[n]`, rows of the log.
            lists: int32 `[n, C]`, dense items; each row's own item is among them, or is not looked for.

        Returns:
            `[n, C]`, in the order of rows and candidates.
        """
        raise self._unanswered(Task.RANKING)

    def milliseconds(self, rows: Rows, lists: NDArray[np.int32]) -> float:
        """Time that `rank` takes one process a row where nothing is kept.

        Args:
            rows: as of `rank`.
            lists: as of `rank`.
        """
        with processes.alone():
            started = time.monotonic()
            self.rank(rows, lists)
            return 1000 * (time.monotonic() - started) / len(rows)

    def decoding(self, rows: Rows, lists: NDArray[np.int32], generated: int) -> dict[str, float]:
        """Figures of titles that are decoded instead of scored; none of what writes no titles.

        Args:
            rows: as of `rank`.
            lists: as of `rank`.
            generated: how many of the first rows are decoded freely; 0: none.
        """
        return {}

    def forgetting(self) -> dict[str, float]:
        """Figures of what tuning changed in the LM; none of what is no LM, or was not tuned on answers."""
        return {}

    def cost(self) -> dict[str, float]:
        """Figures of what its tuning took; none of what was not tuned."""
        return {}

    def labels_read(self) -> dict[str, float]:
        """How many labels of training rows its LM may have read as text before tuning; none of others."""
        return {}

    def stands_at(self, sweep: Mapping[str, str]) -> bool:
        """Whether it is made anew for a value of a sweep.

        Args:
            sweep: `key` and `value`.
        """
        return self.made_by is not None and self.made_by.file.sweep == dict(sweep)

    def _unanswered(self, task: Task) -> NotImplementedError:
        answers = ", ".join(self.tasks)
        return NotImplementedError(f"{self.name} was asked for {task}; wanted one of its tasks: {answers}")


def tuning_cost(manifest: Manifest) -> dict[str, float]:
    """What tuning took: rows, weights that train, tokens of Yes/No prompts, seconds over all attempts."""
    measured = {f"tuning_{name}": manifest.metrics.get(name) for name in ("rows", "trainable", "tokens")}
    figures = {name: float(value) for name, value in measured.items() if value is not None}
    figures["tuning_seconds"] = float(manifest.seconds)
    return figures


def labels_as_text(metrics: Mapping[str, Any]) -> dict[str, float]:
    """How many answers and ratings of training rows were in the text that an LM or encoder was trained on.

    Args:
        metrics: of the stage that trained it; what it does not say is 0.
    """
    return {name: float(metrics.get(name, 0)) for name in ("answers_as_text", "ratings_as_text")}
