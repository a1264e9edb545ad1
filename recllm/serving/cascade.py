"""A cascade over the whole catalog: a first step, and steps that order ever shorter lists anew.

Every step's scores are kept. A later step joins its own with those of the steps before it by the weights that
were fitted on validation queries (`recllm.systems.joining`); items below its cut keep the order of the step
before, behind those above it.

The joined score of an item below a cut is that of the step before, less a constant for each list, so that the
best below the cut lies 1 below the worst above it: a list's scores always fall.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.queries import Queries
from recllm.systems.catalog import NO_ITEM, CatalogScorer, Excluded
from recllm.systems.crm import Crm
from recllm.systems.joining import join, reorder

Items = NDArray[np.int32]
Scores = NDArray[np.float64]

PAIRS = 1 << 17
"""Pairs of a query and an item that a CRM scores before anything of them is handed on; bounds memory."""


class Step(Protocol):
    """What scores lists of items for queries."""

    name: str

    def scores(self, queries: Queries, items: Items) -> NDArray[np.float32]:
        """Scores `[Q, C]` of each query's items, larger is better; -inf where there is no item."""
        ...


class CrmStep:
    """A CRM: its logit.

    Args:
        crm: of the trained log.
    """

    name = "crm"

    def __init__(self, crm: Crm) -> None:
        """See the class."""
        self.crm = crm

    def scores(self, queries: Queries, items: Items) -> NDArray[np.float32]:
        """See `Step`."""
        crm = self.crm.for_queries(queries)
        scores = np.full(items.shape, -np.inf, np.float32)
        place, column = np.nonzero(items >= FIRST_ID)
        for low in range(0, len(place), PAIRS):
            part = slice(low, low + PAIRS)
            cells = (place[part], column[part])
            scores[cells] = crm.logits(queries.rows[cells[0]], items[cells])
        return scores


@dataclass(frozen=True)
class Lists:
    """Lists of items, best first.

    Attributes:
        items: int32 `[Q, C]` dense; `NO_ITEM` behind the end of a shorter list.
        score: float64 `[Q, C]`, falling; -inf where there is no item.
        steps: name of a step -> its own scores float32 `[Q, C]`; NaN where it gave none.
    """

    items: Items
    score: Scores
    steps: Mapping[str, NDArray[np.float32]]

    def head(self, k: int) -> Lists:
        """The first k of each list."""
        return Lists(
            self.items[:, :k], self.score[:, :k], {name: step[:, :k] for name, step in self.steps.items()}
        )


@dataclass(frozen=True)
class Reranker:
    """A step behind the first.

    Attributes:
        step: what scores.
        depth: how many items of each list it scores.
        weights: of all steps up to it, in order; None: not fitted yet.
    """

    step: Step
    depth: int
    weights: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Cascade:
    """A first step over the whole catalog, and steps behind it.

    Attributes:
        first: scores the catalog.
        retrieved: items that it hands on.
        rerankers: the steps behind it, in order.
    """

    first: CatalogScorer
    retrieved: int
    rerankers: Sequence[Reranker] = ()

    @property
    def names(self) -> list[str]:
        """Names of the steps, in order."""
        return [self.first.name, *(reranker.step.name for reranker in self.rerankers)]

    def lists(self, queries: Queries, k: int, exclude: Excluded | None = None) -> Lists:
        """The k best items of each query, k the number that the first step hands on or more.

        Args:
            queries: a batch, some hundreds.
            k: length of the lists.
            exclude: items that are left out.
        """
        return self.reranked(queries, self.retrieve(queries, k, exclude)).head(k)

    def retrieve(self, queries: Queries, k: int, exclude: Excluded | None = None) -> Lists:
        """What the first step finds: as many items as it hands on, or k where that is more."""
        wanted = min(max(self.retrieved, k), queries.log.n_items)
        items, scores = self.first.best(queries.log, queries.rows, wanted, exclude)
        return self.as_lists(items, scores)

    def as_lists(self, items: Items, scores: NDArray[np.float32]) -> Lists:
        """Lists in the order of the first step's scores."""
        own = np.where(items == NO_ITEM, np.nan, scores).astype(np.float32)
        return Lists(items, scores.astype(np.float64), {self.first.name: own})

    def reranked(self, queries: Queries, lists: Lists) -> Lists:
        """The same items, ordered anew by every step."""
        for reranker in self.rerankers:
            lists = rerank(queries, lists, reranker)
        return lists


def rerank(queries: Queries, lists: Lists, reranker: Reranker) -> Lists:
    """Lists whose first items a step has ordered anew.

    Without weights, the step's own scores order them.
    """
    items = lists.items[:, : reranker.depth]
    own = reranker.step.scores(queries, items)
    there = items != NO_ITEM
    steps: dict[str, NDArray[np.float32]] = dict(lists.steps)
    steps[reranker.step.name] = np.full(lists.items.shape, np.nan, np.float32)
    steps[reranker.step.name][:, : reranker.depth] = np.where(there, own, np.nan)
    if reranker.weights is None:
        joined: Scores = np.where(there, own, -np.inf).astype(np.float64)
    else:
        joined = join(above_cut(steps, lists.items, reranker.depth), reranker.weights)
    score = lists.score.copy()
    score[:, : reranker.depth] = joined
    below = lists.score[:, reranker.depth :]
    if below.shape[1]:
        worst = np.where(there, joined, np.inf).min(axis=1, keepdims=True)
        shift = lists.score[:, reranker.depth, None] - worst + 1
        score[:, reranker.depth :] = below - np.where(np.isfinite(shift), shift, 0.0)
    # A step orders by what its own scores say, but ties go to the smaller dense id, whatever came before.
    order = np.lexsort((items, -joined), axis=1)
    places = reorder(joined, lists.items.shape[1])
    places[:, : reranker.depth] = order
    return Lists(
        np.take_along_axis(lists.items, places, 1),
        np.take_along_axis(score, places, 1),
        {name: np.take_along_axis(step, places, 1) for name, step in steps.items()},
    )


def above_cut(
    steps: Mapping[str, NDArray[np.float32]], items: Items, depth: int
) -> list[NDArray[np.floating[Any]]]:
    """Scores of all steps for the first items of lists, as `recllm.systems.joining` takes them."""
    there = items[:, :depth] != NO_ITEM
    return [np.where(there, step[:, :depth], -np.inf) for step in steps.values()]
