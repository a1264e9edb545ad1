"""Rejected titles: which are allowed, which are drawn, and on what that depends."""

import numpy as np
import pytest

from recllm.eventlog.rejected import KINDS, draw, usable

ROWS = np.arange(100, 160)
TEXTS = np.tile(np.arange(1, 21), (60, 1))


def drawn(kind, chosen, count=4, seed=3, allowed=None, scores=None):
    chosen = np.full(len(ROWS), chosen)
    allowed = usable(TEXTS, chosen) if allowed is None else allowed
    return draw(ROWS, chosen, allowed, count, seed, kind, scores)


@pytest.fixture
def scores():
    return np.random.default_rng(0).normal(size=TEXTS.shape)


def test_titles_that_teach_nothing_are_not_rejected():
    # Places: 0 another title; 1 the chosen one's text; 2 chosen; 3 and 5 the same text; 4 none; 6 another.
    texts = np.array([[7, 5, 5, 8, 0, 8, 9]])
    assert usable(texts, np.array([2])).tolist() == [[True, False, False, True, False, False, True]]
    # Everything is the chosen one's text, or none.
    assert not usable(np.array([[5, 5, 0]]), np.array([0])).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_one_comes_first_and_no_other_comes_twice(kind, scores):
    places, present = drawn(kind, 6, count=5, scores=scores)
    assert places.shape == present.shape == (60, 6)
    assert (places[:, 0] == 6).all()
    assert present.all()
    assert all(len(set(row)) == 6 for row in places.tolist())


def test_hard_ones_are_the_highest_in_order(scores):
    places, _ = drawn("reference", 6, scores=scores)
    without = np.where(np.arange(20) == 6, -np.inf, scores)
    np.testing.assert_array_equal(places[:, 1:], np.argsort(-without, 1)[:, :4])
    crm, _ = drawn("crm", 6, seed=99, scores=scores)
    np.testing.assert_array_equal(crm, places)  # no chance is in it


def test_half_are_the_highest_and_the_others_random(scores):
    hard, _ = drawn("reference", 6, count=3, scores=scores)
    one, _ = drawn("half", 6, count=5, scores=scores)
    two, _ = drawn("half", 6, count=5, seed=4, scores=scores)
    np.testing.assert_array_equal(one[:, :4], hard)  # 3 of 5
    np.testing.assert_array_equal(two[:, :4], hard)
    assert (one[:, 4:] != two[:, 4:]).any()


def test_rows_of_two_passes_draw_each_by_its_own_seed():
    seeds = np.where(np.arange(60) < 23, 5, 6)
    together, present = drawn("random", 2, seed=seeds)
    for seed in (5, 6):
        alone, alone_present = drawn("random", 2, seed=seed)
        np.testing.assert_array_equal(together[seeds == seed], alone[seeds == seed])
        np.testing.assert_array_equal(present[seeds == seed], alone_present[seeds == seed])


def test_a_pass_draws_anew_and_a_row_alone_draws_as_in_a_batch():
    one, _ = drawn("random", 2, seed=1)
    assert (drawn("random", 2, seed=2)[0] != one).any()
    allowed = usable(TEXTS, np.full(60, 2))
    alone, _ = draw(ROWS[7:8], np.array([2]), allowed[7:8], 4, 1)
    np.testing.assert_array_equal(alone[0], one[7])
    few, _ = drawn("random", 2, count=1, seed=1)
    np.testing.assert_array_equal(few, one[:, :2])  # a smaller K lies in a larger one


def test_random_draws_are_even():
    rows = np.arange(20_000)
    chosen = np.zeros(len(rows), int)
    allowed = np.ones((len(rows), 6), bool)
    allowed[:, 0] = False
    places, _ = draw(rows, chosen, allowed, 2, 0)
    share = np.bincount(places[:, 1:].ravel(), minlength=6)[1:] / (2 * len(rows))
    np.testing.assert_allclose(share, 0.2, atol=0.01)


def test_rows_with_few_others_have_them_first_and_then_nothing(scores):
    allowed = np.zeros(TEXTS.shape, bool)
    allowed[:, [4, 9]] = True
    for kind in KINDS:
        places, present = drawn(kind, 6, count=3, allowed=allowed, scores=scores)
        np.testing.assert_array_equal(present, np.tile([True, True, True, False], (60, 1)))
        assert {frozenset(row) for row in places[:, 1:3].tolist()} == {frozenset({4, 9})}


@pytest.mark.parametrize("kind", ["random", "reference", "crm"])
def test_making_another_one_the_chosen_changes_no_order_among_the_others(kind, scores):
    """What is rejected does not tell why the chosen one was chosen: only it itself is taken out."""
    one, _ = drawn(kind, 6, count=19, scores=scores)
    two, _ = drawn(kind, 11, count=19, scores=scores)
    for row in range(len(ROWS)):
        others = [[place for place in drawn[row].tolist() if place not in (6, 11)] for drawn in (one, two)]
        assert others[0] == others[1]


def test_half_and_half_another_chosen_one_makes_room_for_one_hard_one(scores):
    order = np.argsort(-scores, 1)
    for place in (6, 11):
        places, _ = drawn("half", place, count=4, scores=scores)
        hard = [[p for p in row if p != place][:2] for row in order.tolist()]
        assert places[:, 1:3].tolist() == hard


def test_unknown_kinds_and_missing_scores_are_refused(scores):
    with pytest.raises(ValueError, match=r"'easy'.*wanted one of random"):
        drawn("easy", 0, scores=scores)
    with pytest.raises(ValueError, match="without scores"):
        drawn("crm", 0)
