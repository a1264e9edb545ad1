"""A cascade over the whole catalog: a first step, and steps that order ever shorter lists anew.

retriever -> top N -> CRM -> top M -> LM. One cascade serves all who ask: an evaluation asks with rows of the
trained log as they stand (`LogRows`), a recommender with queries of anybody (`Queries`), which are rows of a
log of their own.

Every step's scores are kept. A later step joins its own with those of the steps before it by the weights that
were fitted on validation rows (`recllm.systems.joining`); items below its cut keep the order of the step
before, behind those above it.

The joined score of an item below a cut is that of the step before, less a constant for each list, so that the
best below the cut lies 1 below the worst above it: a list's scores always fall.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recllm.crm.features import score
from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.log import Rows
from recllm.eventlog.queries import LogRows, Queries
from recllm.systems import joining
from recllm.systems.catalog import NO_ITEM, CatalogScorer, Excluded, Items
from recllm.systems.crm import Crm
from recllm.systems.system import Kind, System, Task

Requests = LogRows | Queries
"""Whose lists are asked for: a log and rows of it."""
Scores = NDArray[np.float64]

PAIRS = 32 * 4096
"""Pairs of a request and an item that a CRM scores before anything of them is handed on; bounds memory. Whole
batches of it, so that how pairs are cut changes no score."""


class Step(Protocol):
    """What scores lists of items."""

    name: str

    def scores(self, requests: Any, items: Items) -> NDArray[np.floating[Any]]:
        """Scores `[Q, C]` of each request's items, larger is better; -inf where there is no item."""
        ...


class CrmStep:
    """A CRM: its logit. Nothing is kept, as lists of hundreds of items are asked of once.

    Args:
        crm: of the trained log.
        name: of the step.
    """

    def __init__(self, crm: Crm, name: str) -> None:
        """See the class."""
        self.crm = crm
        self.name = name

    def scores(self, requests: Requests, items: Items) -> NDArray[np.float32]:
        """See `Step`."""
        crm = self.crm.for_queries(requests) if isinstance(requests, Queries) else self.crm
        scores = np.full(items.shape, -np.inf, np.float32)
        place, column = np.nonzero(items >= FIRST_ID)
        for low in range(0, len(place), PAIRS):
            part = slice(low, low + PAIRS)
            cells = (place[part], column[part])
            scores[cells] = score(crm.model, crm.cache.inputs, requests.rows[cells[0]], items[cells])
        return scores


class SystemStep:
    """A system of an evaluation, which ranks lists of rows of the trained log and keeps what it answered.

    Args:
        system: it ranks.
    """

    def __init__(self, system: System) -> None:
        """See the class."""
        self.system = system
        self.name = system.name

    def scores(self, requests: LogRows, items: Items) -> NDArray[np.float32]:
        """See `Step`."""
        return score_by_length(items, lambda which, lists: self.system.rank(requests.rows[which], lists))


def score_by_length(
    items: Items, score: Callable[[Rows, Items], NDArray[np.floating[Any]]]
) -> NDArray[np.float32]:
    """Scores `[Q, C]` of lists of unlike length, those of one length together.

    A language model's prompt and gate read all of a list, and nothing that fills the line up.

    Args:
        items: int32 `[Q, C]`, `NO_ITEM` behind the end of a shorter list.
        score: places int64 `[n]` and their lists `[n, c]`, all of one length, -> scores `[n, c]`.
    """
    scores = np.full(items.shape, -np.inf, np.float32)
    lengths = (items >= FIRST_ID).sum(1)
    for length in np.unique(lengths[lengths > 0]):
        which = np.flatnonzero(lengths == length)
        scores[which, :length] = score(which, items[which, :length])
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

    @classmethod
    def of_first(cls, name: str, items: Items, scores: NDArray[np.float32]) -> Lists:
        """Lists in the order of the first step's scores."""
        own = np.where(items == NO_ITEM, np.nan, scores).astype(np.float32)
        return cls(items, scores.astype(np.float64), {name: own})

    def head(self, k: int) -> Lists:
        """The first k of each list."""
        return Lists(
            self.items[:, :k], self.score[:, :k], {name: step[:, :k] for name, step in self.steps.items()}
        )

    def places(self, target: NDArray[np.integer]) -> Rows:
        """Place of each target `[Q]` in its list, from 0, int64 `[Q]`; -1: it is not there."""
        return places_in(self.items, target)


def places_in(items: Items, target: NDArray[np.integer]) -> Rows:
    """Place of each target `[Q]` in its list `[Q, C]`, from 0, int64 `[Q]`; -1: it is not there."""
    hits = items == np.asarray(target)[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1), -1)


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

    def lists(self, requests: Requests, k: int, exclude: Excluded | None = None) -> Lists:
        """The k best items of each request, k the number that the first step hands on or more.

        Args:
            requests: a batch, some hundreds.
            k: length of the lists.
            exclude: items that are left out.
        """
        return self.reranked(requests, self.retrieve(requests, k, exclude)).head(k)

    def retrieve(self, requests: Requests, k: int, exclude: Excluded | None = None) -> Lists:
        """What the first step finds: as many items as it hands on, or k where that is more."""
        return retrieve(self.first, requests, min(max(self.retrieved, k), requests.log.n_items), exclude)

    def reranked(self, requests: Requests, lists: Lists) -> Lists:
        """The same items, ordered anew by every step."""
        for reranker in self.rerankers:
            lists = rerank(requests, lists, reranker)
        return lists


def retrieve(first: CatalogScorer, requests: Requests, k: int, exclude: Excluded | None = None) -> Lists:
    """The best k items of a catalog for each request.

    Args:
        first: scores the catalog.
        requests: any number of them.
        k: length of the lists.
        exclude: items that are left out.
    """
    return Lists.of_first(first.name, *first.best(requests.log, requests.rows, k, exclude))


def rerank(requests: Requests, lists: Lists, reranker: Reranker) -> Lists:
    """Lists whose first items a step has ordered anew.

    Without weights, the step's own scores order them.
    """
    return _ordered(lists, scored(requests, lists, reranker), reranker)


def fit(
    lists: Lists, steps: Mapping[str, NDArray[np.float32]], reranker: Reranker, target: NDArray[np.integer]
) -> tuple[Reranker, Lists]:
    """Fit how much the score of each step up to a reranker weighs.

    Args:
        lists: what the steps before recommend for validation requests `[Q]`.
        steps: scores of all steps, as of `scored`.
        reranker: the step; its weights are not read.
        target: dense items `[Q]`, the one that came next for each request.

    Returns:
        The same step with the weights that maximize the likelihood of these items
        (`recllm.systems.joining`), and the lists in its order.

    Raises:
        ValueError: in none of the lists is that item above the cut.
    """
    above = above_cut(steps, lists.items, _width(lists, reranker))
    place = lists.places(target)
    weights = joining.fit(above, np.where(place < reranker.depth, place, -1))
    fitted = replace(reranker, weights=weights)
    return fitted, _ordered(lists, steps, fitted)


def _width(lists: Lists, reranker: Reranker) -> int:
    """How many columns of lists a step looks at: no list is longer, or it is cut there."""
    head = lists.items[:, : reranker.depth]
    return max(1, int((head != NO_ITEM).any(axis=0).sum()))


def scored(requests: Requests, lists: Lists, reranker: Reranker) -> dict[str, NDArray[np.float32]]:
    """Scores of all steps up to a reranker, its own among them, for items in the order of the lists."""
    items = lists.items[:, : _width(lists, reranker)]
    own = reranker.step.scores(requests, items)
    steps: dict[str, NDArray[np.float32]] = dict(lists.steps)
    steps[reranker.step.name] = np.full(lists.items.shape, np.nan, np.float32)
    steps[reranker.step.name][:, : items.shape[1]] = np.where(items != NO_ITEM, own, np.nan)
    return steps


def _ordered(lists: Lists, steps: Mapping[str, NDArray[np.float32]], reranker: Reranker) -> Lists:
    """Lists in the order of the joined scores of all steps; ties go to the smaller dense id."""
    width = _width(lists, reranker)
    items = lists.items[:, :width]
    there = items != NO_ITEM
    if reranker.weights is None:
        own = steps[reranker.step.name][:, :width]
        joined: Scores = np.where(there, own, -np.inf).astype(np.float64)
    else:
        joined = joining.join(above_cut(steps, lists.items, width), reranker.weights)
    score = lists.score.copy()
    score[:, :width] = joined
    below = lists.score[:, width:]
    if below.shape[1]:
        worst = np.where(there, joined, np.inf).min(axis=1, keepdims=True)
        shift = lists.score[:, width, None] - worst + 1
        score[:, width:] = below - np.where(np.isfinite(shift), shift, 0.0)
    places = joining.reorder(joined, lists.items.shape[1], items)
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


def _names(before: CatalogScorer | CascadeSystem, step: Step) -> list[str]:
    """Name of each step of a cascade that ends with `step`."""
    first = before.names if isinstance(before, CascadeSystem) else [before.name]
    return [*first, step.name]


class CascadeSystem(System):
    """A cascade up to one of its steps, as a line of the table.

    Args:
        before: what recommends: a retriever, or a cascade.
        step: what orders anew the first items of what that recommends.
        system: the system that the step is.
        depth: how many items it orders.
    """

    kind = Kind.STACKED
    tasks = (Task.NEXT,)

    def __init__(self, before: CatalogScorer | CascadeSystem, step: Step, system: System, depth: int) -> None:
        """See the class; it is fitted before it is asked."""
        super().__init__("+".join(_names(before, step)), made_by=system.made_by, lm=system.lm, k=system.k)
        self.before = before
        self.system = system
        self.reranker = Reranker(step, depth)

    @property
    def stage(self) -> str:
        """See `System`: the last step's."""
        return self.system.stage

    @property
    def retriever(self) -> CatalogScorer:
        """What the cascade begins with."""
        return self.before.retriever if isinstance(self.before, CascadeSystem) else self.before

    @property
    def names(self) -> list[str]:
        """Name of each step, the first one first."""
        return _names(self.before, self.reranker.step)

    @property
    def weights(self) -> dict[str, float]:
        """Name of each step -> how much its score weighs; empty before it is fitted."""
        if self.reranker.weights is None:
            return {}
        return dict(zip(self.names, self.reranker.weights.tolist(), strict=True))

    def fit(self, rows: LogRows, before: Lists, own: NDArray[np.integer]) -> Lists:
        """Fit the weights; what the cascade recommends for these rows.

        Args:
            rows: of the validation split.
            before: what `before` recommends for them.
            own: dense items, the one that came next for each row.
        """
        steps = scored(rows, before, self.reranker)
        self.reranker, lists = fit(before, steps, self.reranker, own)
        return lists

    def order(self, rows: LogRows, before: Lists) -> Lists:
        """What the cascade makes of what `before` recommends."""
        return rerank(rows, before, self.reranker)
