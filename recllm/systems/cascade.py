"""A cascade: items that one system retrieved, whose first ones another orders anew.

retriever -> top N -> CRM -> top M -> LM. Each step scores the first items of the list before it; the scores
of all steps so far are joined within these (`recllm.systems.joining`), and what stands below the cut keeps
its order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from recllm.crm.features import representations
from recllm.eventlog.ids import UNKNOWN
from recllm.eventlog.log import EventLog, Rows
from recllm.systems import joining
from recllm.systems.catalog import NO_ITEM, CatalogScorer, Excluded, Items, block_size
from recllm.systems.crm import Crm
from recllm.systems.system import Kind, System, Task

Scores = NDArray[np.float32]

ScoreLists = Callable[[Rows, Items], NDArray[np.floating]]
"""Scores `[B, C]` of lists of items `[B, C]` for rows `[B]`."""

_PAIRS_AT_ONCE = 200_000


@dataclass(frozen=True)
class Recommended:
    """Lists of items, and what each step says of them.

    Attributes:
        items: int32 `[R, K]`, best first, `NO_ITEM` behind the last one that there is.
        steps: of each step float32 `[R, K]`, its scores of these items; -inf where there is none, or where
            the step did not look.
    """

    items: Items
    steps: list[Scores]

    def columns(self, items: NDArray[np.integer]) -> Rows:
        """Where each row's item `[R]` stands in its list, int64 `[R]`; -1: it is not there."""
        found = self.items == np.asarray(items)[:, None]
        return np.where(found.any(axis=1), found.argmax(axis=1), -1)


def retrieve(scorer: CatalogScorer, log: EventLog, rows: Rows, k: int, seen: bool) -> Recommended:
    """The best k items of a catalog for each row.

    Args:
        scorer: of the catalog.
        log: the event log.
        rows: int64 `[R]`.
        k: length of the lists.
        seen: whether items of a row's history are among them.
    """
    items = np.full((len(rows), k), NO_ITEM, np.int32)
    scores = np.full((len(rows), k), -np.inf, np.float32)
    size = block_size(log.n_items)
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        exclude = None if seen else Excluded.seen(log, part)
        items[first : first + size], scores[first : first + size] = scorer.best(log, part, k, exclude)
    return Recommended(items, [scores])


class Cascade(System):
    """A system that orders anew the first items of what another recommends.

    Args:
        before: what recommends: a retriever, or a cascade.
        name: of the step, as the table says it behind the name of `before`.
        step: the system that the step is.
        score: its scores of lists; items that are not there are given as `UNKNOWN`.
        cut: how many items it orders.
    """

    kind = Kind.STACKED
    tasks = (Task.NEXT,)

    def __init__(
        self, before: CatalogScorer | Cascade, name: str, step: System, score: ScoreLists, cut: int
    ) -> None:
        """See the class; it is fitted before it is asked."""
        super().__init__(f"{before.name}+{name}", made_by=step.made_by, lm=step.lm, k=step.k)
        self.before = before
        self.step = step
        self.cut = cut
        self.weights: joining.Floats | None = None
        self._score = score

    @property
    def stage(self) -> str:
        """See `System`: the last step's."""
        return self.step.stage

    @property
    def retriever(self) -> CatalogScorer:
        """What the cascade begins with."""
        return self.before.retriever if isinstance(self.before, Cascade) else self.before

    def fit(self, rows: Rows, before: Recommended, own: NDArray[np.integer]) -> Recommended:
        """Fit how much the score of each step weighs.

        Args:
            rows: int64 `[R]`, of the validation split.
            before: what `before` recommends for them.
            own: int32 `[R]`, the item that came next.

        Returns:
            What the cascade recommends for these rows.

        Raises:
            ValueError: in none of the lists is that item above the cut.
        """
        steps = self._steps(rows, before)
        column = before.columns(own)
        self.weights = joining.fit(steps, np.where(column < self.cut, column, -1))
        return self._joined(before, steps)

    def order(self, rows: Rows, before: Recommended) -> Recommended:
        """What the cascade makes of what `before` recommends.

        Args:
            rows: int64 `[R]`.
            before: their lists.
        """
        return self._joined(before, self._steps(rows, before))

    def _steps(self, rows: Rows, before: Recommended) -> list[Scores]:
        """Scores of all steps, of the items above the cut."""
        items = before.items[:, : self.cut]
        there = items != NO_ITEM
        own = self._score(rows, np.where(there, items, np.int32(UNKNOWN)).astype(np.int32))
        own = np.where(there, own, -np.inf).astype(np.float32)
        return [*(step[:, : self.cut] for step in before.steps), own]

    def _joined(self, before: Recommended, steps: list[Scores]) -> Recommended:
        assert self.weights is not None
        length = before.items.shape[1]
        places = joining.reorder(joining.join(steps, self.weights), length)
        below = np.full((len(places), length - steps[-1].shape[1]), -np.inf, np.float32)
        whole = [*before.steps, np.concatenate([steps[-1], below], axis=1)]
        return Recommended(
            np.take_along_axis(before.items, places, axis=1),
            [np.take_along_axis(step, places, axis=1) for step in whole],
        )


def crm_scores(crm: Crm) -> ScoreLists:
    """Logits of lists of items by a CRM; nothing is kept, as lists of hundreds of items are asked of once."""

    def score(rows: Rows, items: Items) -> NDArray[np.floating]:
        logits = np.empty(items.shape, np.float32)
        size = max(1, _PAIRS_AT_ONCE // max(1, items.shape[1]))
        for first in range(0, len(rows), size):
            part = items[first : first + size]
            pairs = np.repeat(rows[first : first + size], part.shape[1])
            flat, _ = representations(crm.model, crm.cache.inputs, pairs, part.ravel())
            logits[first : first + size] = flat.reshape(part.shape)
        return cast(NDArray[np.floating], logits)

    return score
