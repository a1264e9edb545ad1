"""Why a user is recommended what: what is known of him, what each step does, and what one event changes.

Everything is plain data: numbers, texts and external ids, ready to be written as JSON. The lists are those of
`Recommender.recommend`, to the bit: the same queries go through the same steps, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from recllm.eventlog.ids import FIRST_ID, UNKNOWN
from recllm.eventlog.queries import Queries, without_events
from recllm.reclora.model import RecLoraModel
from recllm.serving.recommender import Recommender, seen
from recllm.systems.cascade import Lists
from recllm.systems.catalog import NO_ITEM

NEAREST = 10
"""Events that are shown as the nearest to an item, where no language model says how many it reads."""


@dataclass(frozen=True)
class Event:
    """One event of a history.

    Attributes:
        place: in the whole history before anything was removed, from 0, the oldest.
        item: external id.
        title: of the item; None: it has none.
        rating: as in the log; None: none.
        liked: whether the user liked the item; None: it is not known.
        second: Unix seconds; None: the log has no times.
        similarity: cosine of its item and the one that is asked about; None: nobody asked.
    """

    place: int
    item: Any
    title: str | None
    rating: float | None
    liked: bool | None
    second: int | None
    similarity: float | None = None


@dataclass(frozen=True)
class ListedItem:
    """A place of a list.

    Attributes:
        item: external id.
        title: of the item; None: it has none.
        rank: from 1.
        before: its rank in the list of the step before; None: this is the first step.
        score: by which the list is ordered.
        steps: each step's own score so far; None: it gave none.
    """

    item: Any
    title: str | None
    rank: int
    before: int | None
    score: float
    steps: dict[str, float | None]


@dataclass(frozen=True)
class Step:
    """The list after one step of the cascade.

    Attributes:
        name: of the step.
        scored: how many items it scored; of the first step, how many it handed on.
        weights: of all steps up to this one, by which their scores are joined; None: its own scores order.
        items: the head of the list.
    """

    name: str
    scored: int
    weights: dict[str, float] | None
    items: list[ListedItem]


@dataclass(frozen=True)
class Prompt:
    """What the language model reads.

    Attributes:
        question: `next title`, behind which the titles of a list are scored; or `yes or no`, about the item
            that is asked about.
        text: as the model's tokens spell it.
        tokens: how many.
        is_cut: whether its oldest events were left out, since it would be longer than the model's context.
        is_of_list: whether the cascade's lists are ordered by it; else only scores of pairs are made of it.
    """

    question: Literal["next title", "yes or no"]
    text: str
    tokens: int
    is_cut: bool
    is_of_list: bool


@dataclass(frozen=True)
class GateWeights:
    """How a gate mixes the meta-LoRAs.

    Attributes:
        alpha: the weight of each meta-LoRA; they sum to 1. The mean over modules, where each has its own.
        mean: those at the mean of the representations that the adapter was tuned with.
        distance: half the sum of absolute differences: 0 for equal weights, 1 for disjoint ones.
    """

    alpha: list[float]
    mean: list[float]
    distance: float


@dataclass(frozen=True)
class Move:
    """What became of an item of either list.

    Attributes:
        item: external id.
        title: of the item; None: it has none.
        before: rank in the list before the change; None: it was not among the first k.
        after: rank behind it; None: likewise.
    """

    item: Any
    title: str | None
    before: int | None
    after: int | None


@dataclass(frozen=True)
class Effect:
    """What one event changes.

    Attributes:
        event: the one that was removed or added; None: it was not read, as its item is not known.
        moves: of all items that are among the first k before or after, in the order of the list behind the
            change; those that left come last.
        gate_before: the gate before the change.
    """

    event: Event | None
    moves: list[Move]
    gate_before: GateWeights | None


@dataclass(frozen=True)
class Explanation:
    """Why a user is recommended what.

    Attributes:
        user: external id; None: nobody that is known.
        is_known: whether the log knows the user.
        source: `popularity` where nothing is known of the user.
        history: the long history, the oldest event first: the last ones of all that is known.
        length: events of all that is known.
        read: how many of the last of them models read at most.
        recent: the short history, the latest events, which a prompt for the next title shows; by place.
        target: the item that is asked about, a `ListedItem`'s id; by default the first of the list.
        target_title: its title.
        retrieved: the events of the history that are most like the target, nearest first; None: no step of
            this cascade retrieves.
        prompts: what the language model reads; none without one.
        gate: of the list, or of the target where every item has its own; None: nothing is gated.
        steps: the list after each step; the last one is what is recommended.
        effect: what the change did, if one was asked for.
    """

    user: Any
    is_known: bool
    source: Literal["cascade", "popularity"]
    history: list[Event]
    length: int
    read: int
    recent: list[int]
    target: Any
    target_title: str | None
    retrieved: list[Event] | None
    prompts: list[Prompt]
    gate: GateWeights | None
    steps: list[Step]
    effect: Effect | None


@dataclass(frozen=True)
class Change:
    """One event more or less.

    Attributes:
        remove: place of the event that is left out; None: none is.
        add: a table with one line, as of `histories`; None: no event.
    """

    remove: int | None = None
    add: pl.DataFrame | None = None


def explain(
    recommender: Recommender,
    user: Any = None,
    history: pl.DataFrame | None = None,
    *,
    time: int | None = None,
    removed: Sequence[int] = (),
    change: Change | None = None,
    k: int = 10,
    target: Any = None,
    most: int = 500,
) -> Explanation:
    """Why a user is recommended what, and what a change of one event does.

    Args:
        recommender: answers.
        user: external id; None, or one that the log does not know: a stranger.
        history: events that join what the log knows of the user, as `histories` of `Recommender.recommend`
            without `user`.
        time: Unix seconds that the user is asked about as of; None: after everything.
        removed: places of events of the history that are left out from the start.
        change: an event that is removed or added; the explanation is of what is then, and its `effect` says
            what that changed.
        k: items of a list.
        target: external id of the item that retrieval and the Yes/No prompt are about; None: the first one of
            the list.
        most: events of the history that are told of.

    Raises:
        ValueError: a value that cannot be used, in a line.
    """
    recommender.check_k(k)
    asked = _Asked(recommender, user, history, time, removed)
    before = None
    if change is not None:
        before = _Walk(recommender, asked, k)
        asked = asked.changed(change)
    walk = _Walk(recommender, asked, k)
    dense = walk.target(target)
    effect = None
    if change is not None and before is not None:
        event = _changed_event(change, before.asked, asked)
        gate = before.gate(before.target(target))
        effect = Effect(event, moves(before.steps()[-1].items, walk.steps()[-1].items), gate)
    titles = recommender.item_titles
    return Explanation(
        user=user,
        is_known=bool(asked.queries.user[0] != UNKNOWN),
        source="popularity" if walk.is_popular else "cascade",
        history=asked.events(np.arange(max(asked.start, asked.end - most), asked.end)),
        length=asked.end - asked.start,
        read=int(asked.queries.lengths[0]),
        recent=walk.recent(),
        target=recommender.maker.items.external(np.array([dense]))[0],
        target_title=None if titles is None else titles[dense],
        retrieved=walk.retrieved(dense),
        prompts=walk.prompts(dense),
        gate=walk.gate(dense),
        steps=walk.steps(),
        effect=effect,
    )


def moves(before: Sequence[ListedItem], after: Sequence[ListedItem]) -> list[Move]:
    """What became of the items of two lists, in the order of the second one; those that left come last."""
    old = {listed.item: listed.rank for listed in before}
    new = {listed.item: listed.rank for listed in after}
    there = [Move(listed.item, listed.title, old.get(listed.item), listed.rank) for listed in after]
    gone = [Move(listed.item, listed.title, listed.rank, None) for listed in before if listed.item not in new]
    return there + gone


class _Asked:
    """One query with its history, and the place of each of its events before any was removed."""

    def __init__(
        self,
        recommender: Recommender,
        user: Any,
        history: pl.DataFrame | None,
        time: int | None,
        removed: Sequence[int],
    ) -> None:
        self.recommender = recommender
        self.user = user
        self.history = history
        self.time = time
        self.removed = list(removed)
        maker = recommender.maker
        own = None
        if history is not None and history.height:
            own = history.with_columns(query=pl.lit(0, pl.Int64))
        seconds = None
        if time is not None:
            if not recommender.log.timed:
                raise ValueError(f"time is given, but no event of {recommender.dataset} has one; wanted none")
            seconds = pl.Series("time", [time], dtype=pl.Int64)
        whole = maker.make(maker.users.series([user]), seconds, own)
        if whole.problems:
            raise ValueError(whole.problems[0])
        start, end = (int(bound[0]) for bound in whole.all_events())
        log = whole.log
        columns = [column[start:end] for column in (log.item, log.timestamp, log.rating, log.label)]
        self.whole = np.stack([np.asarray(column, np.int64) for column in columns], 1)
        for place in self.removed:
            if not 0 <= place < end - start:
                raise ValueError(f"event {place} is removed; wanted 0 to {end - start - 1}, the history's")
        self.places = np.setdiff1d(np.arange(end - start), self.removed)
        self.queries: Queries = without_events(whole, start + np.array(self.removed, np.int64))
        self.start, self.end = (int(bound[0]) for bound in self.queries.all_events())

    def changed(self, change: Change) -> _Asked:
        """The same with one event more or less."""
        history = self.history
        removed = self.removed
        if change.add is not None:
            history = change.add if history is None else pl.concat([history, change.add], how="diagonal")
            removed = self._removed_of(history)
        if change.remove is not None:
            if change.remove in removed:
                raise ValueError(f"event {change.remove} is removed already; wanted another")
            removed = [*removed, change.remove]
        return _Asked(self.recommender, self.user, history, self.time, removed)

    def _removed_of(self, history: pl.DataFrame) -> list[int]:
        """The removed places in a history with one event more, which may be dated and stand before them."""
        if not self.removed:
            return []
        added = _added_place(self, _Asked(self.recommender, self.user, history, self.time, []))
        if added is None:
            return self.removed
        return [place + (place >= added) for place in self.removed]

    def events(
        self, rows: NDArray[np.integer], similarity: NDArray[np.floating] | None = None
    ) -> list[Event]:
        """Rows of the query's log, in words."""
        log = self.queries.log
        levels = log.meta["rating_levels"]
        items = self.recommender.maker.items.external(log.item[rows]).to_list()
        events = []
        for number, row in enumerate(np.asarray(rows).tolist()):
            code = int(log.rating[row])
            label = int(log.label[row])
            events.append(
                Event(
                    place=int(self.places[row - self.start]),
                    item=items[number],
                    title=_title(self.recommender, int(log.item[row])),
                    rating=float(levels[code - 1]) if 0 < code <= len(levels) else None,
                    liked=None if label < 0 else label == 1,
                    second=int(log.timestamp[row]) if log.timed else None,
                    similarity=None if similarity is None else float(similarity[number]),
                )
            )
        return events


class _Walk:
    """A query's way through the cascade, with the list after each step."""

    def __init__(self, recommender: Recommender, asked: _Asked, k: int) -> None:
        self.recommender = recommender
        self.asked = asked
        self.k = k
        queries = asked.queries
        self.is_popular = bool(queries.lengths[0] == 0)
        exclude = seen(queries)
        cascade = recommender.cascade
        if self.is_popular:
            items, scores = recommender.popularity.best(queries.log, queries.rows, k, exclude)
            self.lists = [Lists(items, scores.astype(np.float64), {})]
            self.names = ["popularity"]
            return
        self.names = cascade.names
        self.lists = [cascade.retrieve(queries, k, exclude)]
        for reranker in cascade.rerankers:
            alone = replace(cascade, rerankers=[reranker])
            self.lists.append(alone.reranked(queries, self.lists[-1]))

    def steps(self) -> list[Step]:
        """The list after each step."""
        steps = []
        for place, (name, lists) in enumerate(zip(self.names, self.lists, strict=True)):
            scored = int((lists.items[0] >= FIRST_ID).sum())
            weights = None
            ranks = None
            if place:
                reranker = self.recommender.cascade.rerankers[place - 1]
                scored = min(scored, reranker.depth)
                if reranker.weights is not None:
                    weights = dict(zip(self.names, reranker.weights.tolist(), strict=False))
                items = self.lists[place - 1].items[0].tolist()
                ranks = {item: rank for rank, item in enumerate(items, 1) if item != NO_ITEM}
            steps.append(Step(name, scored, weights, self._listed(lists, ranks)))
        return steps

    def _listed(self, lists: Lists, ranks: dict[int, int] | None) -> list[ListedItem]:
        """The first k items of a list; `ranks` are those of the list before."""
        head = lists.head(self.k)
        dense = [item for item in head.items[0].tolist() if item >= FIRST_ID]
        external = self.recommender.maker.items.external(np.array(dense, np.int64)).to_list()
        listed = []
        for place, item in enumerate(dense):
            own = {name: _number(values[0, place]) for name, values in head.steps.items()}
            listed.append(
                ListedItem(
                    item=external[place],
                    title=_title(self.recommender, item),
                    rank=place + 1,
                    before=None if ranks is None else ranks[item],
                    score=float(head.score[0, place]),
                    steps=own,
                )
            )
        return listed

    def target(self, target: Any) -> int:
        """Dense id of the item that is asked about; the first of the list by default."""
        if target is None:
            return int(self.lists[-1].items[0, 0])
        dense = int(self.recommender.maker.items.dense([target])[0])
        if dense < FIRST_ID:
            raise ValueError(f"item {target!r} is not in the log; wanted one of its items")
        return dense

    def recent(self) -> list[int]:
        """Places of the events that a prompt for the next title shows."""
        lm = self.recommender.parts.lm
        k = NEAREST if lm is None else lm.config.prompt.history
        rows = self.asked.queries.log.recent(self.asked.queries.rows, k)[0]
        return [int(self.asked.places[row - self.asked.start]) for row in rows.tolist() if row >= 0]

    def retrieved(self, target: int) -> list[Event] | None:
        """The events that are most like an item, nearest first."""
        retrieval = self.recommender.parts.retrieval
        if retrieval is None:
            return None
        queries = self.asked.queries
        lm = self.recommender.parts.lm
        k = NEAREST if lm is None else lm.config.prompt.history
        searcher = retrieval.for_queries(queries).searcher
        rows = searcher.search(queries.rows, np.array([target]), k, "similarity")[0]
        rows = rows[rows >= 0]
        offset = int(searcher.fold[0]) * queries.log.n_items
        similarity = searcher.vectors[offset + queries.log.item[rows]] @ searcher.vectors[offset + target]
        return self.asked.events(rows, similarity)

    def prompts(self, target: int) -> list[Prompt]:
        """What the language model reads."""
        step = self.recommender.parts.lm
        if step is None or self.is_popular:
            return []
        lm = step.opened.lm.for_queries(self.asked.queries)
        rows = self.asked.queries.rows
        prompts = []
        if not step.pointwise:
            candidates = self._candidates()[None]
            listed = candidates if lm.config.prompt.list_candidates else None
            history = lm.log.recent(rows, lm.config.prompt.history)
            text = lm.prompts.ranking(rows, history, listed, lm.prompts.room(candidates))
            prompts.append(self._prompt("next title", text, lm.tokenizer, is_of_list=True))
        asked = lm.verdicts(
            rows, np.array([[target]], np.int32), None, step.opened.retrieved, has_chosen=False
        )
        text = lm.prompts.ctr(rows, asked.history[:, 0], np.array([target]))
        prompts.append(self._prompt("yes or no", text, lm.tokenizer, is_of_list=step.pointwise))
        return prompts

    def _prompt(
        self, question: Literal["next title", "yes or no"], text: Any, tokenizer: Any, is_of_list: bool
    ) -> Prompt:
        """The only prompt of a batch, in words."""
        tokens = text[0].tolist()
        return Prompt(question, tokenizer.decode(tokens), len(tokens), bool(text.cut[0]), is_of_list)

    def gate(self, target: int) -> GateWeights | None:
        """The gate of the list; where each item has its own, that of the item that is asked about."""
        step = self.recommender.parts.lm
        if step is None or self.is_popular:
            return None
        opened = step.opened
        tuner = getattr(opened.model, "base_model", None)
        if opened.crm is None or not isinstance(tuner, RecLoraModel):
            return None
        mean = tuner.mean_alpha()
        if mean is None:
            return None
        crm = opened.crm.for_queries(self.asked.queries)
        items = np.array([target], np.int32) if step.pointwise else self._candidates()
        with torch.no_grad():
            alpha = tuner.alpha(crm.representations(self.asked.queries.rows, items[None]))[0]
        own = _over_modules(alpha)
        of_mean = _over_modules(mean)
        return GateWeights(own.tolist(), of_mean.tolist(), float(np.abs(own - of_mean).sum() / 2))

    def _candidates(self) -> NDArray[np.int32]:
        """The items that the language model orders, in the order that it is given them."""
        place = self.names.index("lm")
        items = self.lists[place - 1].items[0, : self.recommender.cascade.rerankers[place - 1].depth]
        return items[items >= FIRST_ID]


def _changed_event(change: Change, before: _Asked, after: _Asked) -> Event | None:
    """The event that is there on one side of a change only."""
    if change.remove is not None:
        place = int(np.searchsorted(before.places, change.remove))
        return before.events(np.array([before.start + place]))[0]
    added = _added_place(before, after)
    if added is None:
        return None
    return after.events(np.array([after.start + int(np.searchsorted(after.places, added))]))[0]


def _added_place(before: _Asked, after: _Asked) -> int | None:
    """Place of the event that `before` lacks among all events of `after`; None: it lacks none."""
    length = len(before.whole)
    if len(after.whole) == length:
        return None
    differs = np.flatnonzero((after.whole[:length] != before.whole).any(1))
    return int(differs[0]) if len(differs) else length


def _over_modules(alpha: torch.Tensor) -> NDArray[np.float64]:
    """Alpha `[N_m]` of a shared gate, or the mean of the modules' `[modules, N_m]`."""
    values = alpha.detach().cpu().numpy().astype(np.float64)
    return np.asarray(values if values.ndim == 1 else values.mean(0))


def _number(value: np.floating) -> float | None:
    return None if np.isnan(value) else float(value)


def _title(recommender: Recommender, dense: int) -> str | None:
    return None if recommender.item_titles is None else recommender.item_titles[dense]
