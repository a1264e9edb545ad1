"""A cascade of systems that score by rule: what is ordered, what is fitted, what stays."""

from __future__ import annotations

import numpy as np
import pytest

from recllm.eventlog.ids import UNKNOWN
from recllm.systems.cascade import Cascade, Recommended, retrieve
from recllm.systems.catalog import CatalogScorer
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
    return Recommended(np.array(items, np.int32), [np.array(scores, np.float32)])


def by_id(rows, items):
    """Larger ids are better."""
    assert (items >= UNKNOWN).all()
    return items.astype(np.float64)


@pytest.fixture
def cascade():
    return Cascade(Nothing("retriever"), "sim", Named("sim", k=3, lm="tiny"), by_id, cut=3)


def test_the_first_items_are_ordered_anew_and_the_others_stay(cascade):
    before = lists([[4, 9, 6, 12, 5]], [[5, 4, 3, 2, 1]])
    cascade.weights = np.array([0.0, 1.0])
    after = cascade.order(ROWS[:1], before)
    assert after.items.tolist() == [[9, 6, 4, 12, 5]]
    assert after.steps[0].tolist() == [[4, 3, 5, 2, 1]]
    assert after.steps[1].tolist() == [[9, 6, 4, NEVER, NEVER]]
    assert after.columns(np.array([12])).tolist() == [3]
    assert after.columns(np.array([7])).tolist() == [-1]
    assert (cascade.name, cascade.k, cascade.lm, cascade.stage) == ("retriever+sim", 3, "tiny", "stage1")


def test_shorter_lists_keep_their_end(cascade):
    before = lists([[4, 9, 0, 0]], [[5, 4, NEVER, NEVER]])
    cascade.weights = np.array([0.0, 1.0])
    after = cascade.order(ROWS[:1], before)
    assert after.items.tolist() == [[9, 4, 0, 0]]
    assert np.isneginf(after.steps[1][0, 2:]).all()


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
    assert cascade.weights[1] > 1 > 0.3 > abs(cascade.weights[0])
    assert (after.items == cascade.order(np.arange(400), before).items).all()


def test_a_third_step_is_joined_with_the_two_before(cascade):
    third = Cascade(cascade, "lm", Named("lm"), lambda rows, items: -items.astype(float), cut=2)
    assert third.name == "retriever+sim+lm"
    assert third.retriever.name == "retriever"
    cascade.weights = np.array([0.0, 1.0])
    third.weights = np.array([0.0, 0.0, 1.0])
    before = cascade.order(ROWS[:1], lists([[4, 9, 6, 12, 5]], [[5, 4, 3, 2, 1]]))
    after = third.order(ROWS[:1], before)
    assert after.items.tolist() == [[6, 9, 4, 12, 5]]
    assert [len(step[0]) for step in after.steps] == [5, 5, 5]


def test_seen_items_are_left_out_or_kept():
    log = make_log(EVENTS, 5, 7)
    system = CatalogPopularity(log)
    assert retrieve(system, log, np.array([9, 4]), 4, seen=True).items.tolist() == [[2, 3, 4, 5]] * 2
    assert retrieve(system, log, np.array([9, 4]), 4, seen=False).items.tolist() == [[3, 4, 5, 0], [0] * 4]
