"""What the model's thread does: questions of several requests, answered in one call of the recommender.

A question is one user of one request. It has been checked before, so that what can go wrong here (a history
that reaches beyond its own time) is told in its own answer, and no other one suffers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from recllm.eventlog.ids import FIRST_ID
from recllm.serving.recommender import Asked, Filter, Filters, OnUnknown, Recommender
from recllm.serving.server.messages import Event

_EVENTS = {
    "query": pl.Int64,
    "item": pl.String,
    "rating": pl.Float64,
    "label": pl.Int8,
    "timestamp": pl.Int64,
}


@dataclass(frozen=True)
class Question:
    """One user who is asked about.

    Attributes:
        user: external id, as it was given.
        history: events beside those that the log knows.
        second: as of when; None: after everything.
    """

    user: int | str
    history: Sequence[Event]
    second: int | None


@dataclass(frozen=True)
class ListQuestion(Question):
    """Which items a user is recommended.

    Attributes:
        k: items of the list.
        filter: what may be recommended.
        on_unknown: what is done about a stranger without a history.
    """

    k: int
    filter: Filter
    on_unknown: OnUnknown


@dataclass(frozen=True)
class PairQuestion(Question):
    """How likely a user is to like an item.

    Attributes:
        item: external id, as it was given.
    """

    item: int | str


Answer = dict[str, Any]
"""What `recllm.serving.server.messages` says of a user's list, or of an item's score."""


def answer_lists(recommender: Recommender, questions: Sequence[ListQuestion]) -> list[Answer]:
    """A `UserAnswer` for each question."""
    asked = ask(recommender, questions)
    lengths = np.array([question.k for question in questions])
    filters = Filters.together([question.filter for question in questions])
    rules = [question.on_unknown for question in questions]
    first = recommender.cascade.names[0]
    answers: list[Answer] = [
        {"user": question.user, "items": [], "source": None, "error": None} for question in questions
    ]
    for of_lines, table in recommender.blocks(asked, lengths, filters, rules):
        for place, line in zip(of_lines.tolist(), table.to_dicts(), strict=True):
            steps = {name: line[name] for name in recommender.cascade.names}
            answers[place]["source"] = "popularity" if steps[first] is None else "cascade"
            answers[place]["items"].append(
                {
                    "item": line["item"],
                    "score": line["score"],
                    "rank": line["rank"],
                    "title": line.get("title"),
                    "steps": steps,
                }
            )
    for place, problem in asked.problems.items():
        answers[place].update(items=[], source=None, error=problem)
    return answers


def answer_pairs(recommender: Recommender, questions: Sequence[PairQuestion]) -> list[Answer]:
    """A `ScoredItem` for each question."""
    asked = ask(recommender, questions)
    names = pl.Series("item", [str(question.item) for question in questions], dtype=pl.String)
    items = recommender.maker.items.dense(names)
    answers: list[Answer] = []
    for _, table in recommender.score_blocks(asked, names, items):
        for line in table.to_dicts():
            place = len(answers)
            steps = {name: line[name] for name in recommender.cascade.names}
            error = asked.problems.get(place)
            if error is None and items[place] < FIRST_ID:
                error = "the item is not in the log; wanted one of its items"
            score = line["score"]
            if error is not None or (score is not None and not math.isfinite(score)):
                score = None
                steps = dict.fromkeys(steps)
            answers.append(
                {
                    "item": questions[place].item,
                    "score": score,
                    "title": line.get("title") if error is None else None,
                    "steps": steps,
                    "error": error,
                }
            )
    return answers


def ask(recommender: Recommender, questions: Sequence[Question]) -> Asked:
    """Questions as the recommender takes them: a user may be asked about in several of them."""
    users = pl.Series("user", [str(question.user) for question in questions], dtype=pl.String)
    seconds = None
    if recommender.log.timed:
        seconds = pl.Series("time", [question.second for question in questions], dtype=pl.Int64)
    events = [
        {
            "query": place,
            "item": str(event.item),
            "rating": event.rating,
            "label": event.label,
            "timestamp": event.timestamp,
        }
        for place, question in enumerate(questions)
        for event in question.history
    ]
    own = pl.DataFrame(events, schema=_EVENTS) if events else None
    return Asked(users, seconds, own, {})
