"""A cascade of systems that score by rule: what is ordered, what is fitted, what stays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.queries import LogRows
from recllm.systems.cascade import CascadeSystem, Lists, retrieve
from recllm.systems.catalog import CatalogScorer, Excluded
from recllm.systems.catalog_counting import CatalogPopularity
from recllm.systems.system import Kind, System
from tests.systems.test_counting import EVENTS, make_log

ROWS = np.arange(4)
NEVER = -np.inf


class Named(System):
    kind = Kind.CRM


class Nothing(CatalogScorer):
    kind = Kind.COUNTING


def lists(items, scores):
    return Lists.of_first("retriever", np.array(items, np.int32), np.array(scores, np.float32))


class ById:
    """Larger ids are better, or smaller ones."""

    def __init__(self, name, sign=1):
        self.name = name
        self.sign = sign

    def scores(self, requests, items):
        return np.where(items >= FIRST_ID, self.sign * items.astype(np.float64), -np.inf)


def as_lists(values):
    """Where a step gave no score there is none."""
    return np.nan_to_num(values, nan=NEVER).tolist()


def fix(system, *weights):
    system.reranker = replace(system.reranker, weights=np.array(weights))


@pytest.fixture
def cascade():
    return CascadeSystem(Nothing("retriever"), ById("sim"), Named("sim", k=3, lm="tiny"), depth=3)


def test_the_first_items_are_ordered_anew_and_the_others_stay(cascade):
    before = lists([[4, 9, 6, 12, 5]], [[5, 4, 3, 2, 1]])
    fix(cascade, 0.0, 1.0)
    after = cascade.order(ROWS[:1], before)
    assert after.items.tolist() == [[9, 6, 4, 12, 5]]
    assert as_lists(after.steps["retriever"]) == [[4, 3, 5, 2, 1]]
    assert as_lists(after.steps["sim"]) == [[9, 6, 4, NEVER, NEVER]]
    assert after.places(np.array([12])).tolist() == [3]
    assert after.places(np.array([7])).tolist() == [-1]
    assert (cascade.name, cascade.k, cascade.lm, cascade.stage) == ("retriever+sim", 3, "tiny", "stage1")


def test_shorter_lists_keep_their_end(cascade):
    before = lists([[4, 9, 0, 0]], [[5, 4, NEVER, NEVER]])
    fix(cascade, 0.0, 1.0)
    after = cascade.order(ROWS[:1], before)
    assert after.items.tolist() == [[9, 4, 0, 0]]
    assert np.isnan(after.steps["sim"][0, 2:]).all()


def test_fitted_weights_follow_the_step_that_finds_what_came_next(cascade):
    """The larger id comes next in 9 of 10 lists, whatever the retriever says; where it is below the cut,
    or not there, a list says nothing."""
    random = np.random.default_rng(0)
    items = np.stack([random.permutation(np.arange(2, 8)) for _ in range(400)])
    scores = np.tile([6, 5, 4, 3, 2, 1], (400, 1))
    own = items[:, :3].max(axis=1)
    own[::10] = items[::10, :3].min(axis=1)
    own[1::10] = 100
    own[2::10] = items[2::10, 5]
    before = lists(items, scores)
    after = cascade.fit(np.arange(400), before, own)
    assert cascade.weights["sim"] > 1 > 0.3 > abs(cascade.weights["retriever"])
    assert (after.items == cascade.order(np.arange(400), before).items).all()


def test_a_third_step_is_joined_with_the_two_before(cascade):
    third = CascadeSystem(cascade, ById("lm", -1), Named("lm"), depth=2)
    assert third.name == "retriever+sim+lm"
    assert third.retriever.name == "retriever"
    fix(cascade, 0.0, 1.0)
    fix(third, 0.0, 0.0, 1.0)
    before = cascade.order(ROWS[:1], lists([[4, 9, 6, 12, 5]], [[5, 4, 3, 2, 1]]))
    after = third.order(ROWS[:1], before)
    assert after.items.tolist() == [[6, 9, 4, 12, 5]]
    assert [len(step[0]) for step in after.steps.values()] == [5, 5, 5]


def test_seen_items_are_left_out_or_kept():
    log = make_log(EVENTS, 5, 7)
    system = CatalogPopularity(log)
    rows = LogRows(log, np.array([9, 4]))
    seen = Excluded.seen(log, rows.rows)
    assert retrieve(system, rows, 4).items.tolist() == [[2, 3, 4, 5]] * 2
    assert retrieve(system, rows, 4, seen).items.tolist() == [[3, 4, 5, 0], [0] * 4]
