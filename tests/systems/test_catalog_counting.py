"""Baselines over a whole catalog, on a log small enough to count by hand, and against dense formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import sparse

from recllm.errors import StageError
from recllm.systems import catalog_counting
from recllm.systems.catalog import CatalogScorer
from recllm.systems.catalog_counting import (
    DAY,
    Als,
    CatalogPopularity,
    Ease,
    ItemKnn,
    Transitions,
    has_implicit,
    histories,
    training_matrix,
)
from tests.systems.test_counting import EVENTS, make_log

NEVER = -np.inf
AT = np.array([9])
"""The test row of user 4, whose history is item 2 alone."""


@pytest.fixture
def log():
    # Training: user 2 has 2 5 3 4, user 3 has 2 3, user 4 has 2; items 0, 1 and 6 have no training event.
    return make_log(EVENTS, 5, 7)


def random_log(events=400, users=20, items=30, seed=0):
    random = np.random.default_rng(seed)
    columns = [np.sort(random.integers(2, users, events)), random.integers(2, items, events)]
    columns += [random.integers(0, 2, events), random.choice([0, 0, 0, 2], events)]
    return make_log(list(zip(*columns, strict=True)), users, items)


def test_popularity_is_the_number_of_training_events(log):
    scores = CatalogPopularity(log).scores(log, np.array([4, 9]))
    assert scores.dtype == np.float32
    assert scores.tolist() == [[NEVER, NEVER, 3, 2, 1, 1, NEVER]] * 2


def test_popularity_of_the_last_days_counts_from_the_last_training_event(log):
    log.meta["timed"] = True
    log.timestamp = np.array([0, 1, 2, 3, 4, 5, 6, 7, 7 * DAY + 5, 8]) + 10  # the last one is row 8's
    scores = CatalogPopularity(log, days=7).scores(log, AT)[0]
    # In the window: rows 6 and 8 (5 is just outside, 7 and 9 are no training events).
    assert scores[[2, 3]].tolist() == pytest.approx([1 + 3 / 4, 1 + 2 / 4])
    assert scores[[4, 5]].tolist() == pytest.approx([1 / 4, 1 / 4])
    assert np.isneginf(scores[[0, 1, 6]]).all()
    log.meta["timed"] = False
    with pytest.raises(StageError, match="popularity-7-days: the log has no times"):
        CatalogPopularity(log, days=7)


def test_transitions_by_hand(log):
    system = Transitions(log, window=2, decay=0.5)
    # After item 2 (3 training events): 5 and 3 one step on, 3 also two steps on.
    assert system.scores(log, AT)[0].tolist() == pytest.approx(
        [NEVER, NEVER, 0, 1.5 / 3, 0, 1 / 3, NEVER], rel=1e-6
    )
    # Row 4 looks back to 4 (nothing comes after it) and, at half the weight, to 3 (two events; 4 came after).
    assert system.scores(log, np.array([4]))[0, 2:6].tolist() == pytest.approx([0, 0, 0.5 / 2, 0])


def test_item_knn_by_hand(log):
    scores = ItemKnn(log).scores(log, AT)[0]
    # Users of 2: three, of 3: two of them, of 4 and of 5: one of them.
    near = [2 / math.sqrt(3 * 2), 1 / math.sqrt(3), 1 / math.sqrt(3)]
    assert scores.tolist() == pytest.approx([NEVER, NEVER, 0, *near, NEVER], rel=1e-6)


def test_item_knn_and_transitions_in_blocks_keep_the_largest(monkeypatch):
    log = random_log()
    rows = np.flatnonzero(log.split == 2)
    whole = ItemKnn(log).scores(log, rows), Transitions(log).scores(log, rows)
    monkeypatch.setattr(catalog_counting, "_PAIRS_AT_ONCE", 90)
    np.testing.assert_allclose(ItemKnn(log).scores(log, rows), whole[0], rtol=1e-5)
    np.testing.assert_allclose(Transitions(log).scores(log, rows), whole[1], rtol=1e-5)
    x = training_matrix(log).toarray()
    length = np.linalg.norm(x, axis=0)
    cosine = x.T @ x / np.maximum(np.outer(length, length), 1e-9)
    np.fill_diagonal(cosine, 0)
    order = np.argsort(-cosine, axis=1, kind="stable")
    np.put_along_axis(cosine, order[:, 5:], 0, axis=1)
    expected = histories(log, rows).toarray() @ cosine
    found = ItemKnn(log, neighbors=5).scores(log, rows)
    known = ~np.isneginf(found)
    # Cosines that tie may differ in their last digit: what is kept of them then differs, not how near it is.
    assert np.isclose(found[known], expected[known], rtol=1e-4).mean() > 0.95
    assert found[known].sum() == pytest.approx(expected[known].sum(), rel=1e-3)


def test_transitions_count_like_a_slow_loop():
    log = random_log(seed=3)
    table = np.zeros((log.n_items, log.n_items))
    training = [row for row in range(len(log.user)) if log.training[row]]
    for place, row in enumerate(training):
        for step in range(1, 4):
            if place + step < len(training) and log.user[training[place + step]] == log.user[row]:
                table[log.item[row], log.item[training[place + step]]] += 0.7 ** (step - 1)
    table /= np.maximum(log.item_count, 1)[:, None]
    system = Transitions(log, window=3, decay=0.7)
    for row in np.flatnonzero(log.split == 2):
        above = log.item[log.offsets[log.user[row]] : row][::-1][:3]
        expected = sum((0.7**step * table[item] for step, item in enumerate(above)), np.zeros(log.n_items))
        found = system.scores(log, np.array([row]))[0]
        known = ~np.isneginf(found)
        np.testing.assert_allclose(found[known], expected[known], rtol=1e-5)


def test_the_largest_entries_of_a_row_and_of_equal_ones_the_first():
    matrix = sparse.csr_matrix(np.array([[0, 3, 3, 3, 5], [0, 0, 1, 0, 2], [0, 0, 0, 0, 0]], np.float32))
    kept = catalog_counting._largest(matrix, 2).toarray()
    assert kept.tolist() == [[0, 3, 0, 0, 5], [0, 0, 1, 0, 2], [0, 0, 0, 0, 0]]


def test_ease_solves_its_own_problem():
    """B is the minimum of |X - X B|^2 + l2 |B|^2 with a diagonal of 0: the gradient is 0 off the diagonal."""
    log = random_log(seed=1)
    system = Ease(log, l2=7.0)
    known = np.flatnonzero(log.item_count)
    x = training_matrix(log).toarray()[:, known].astype(np.float64)
    weights = system._weights.astype(np.float64)
    gradient = -x.T @ (x - x @ weights) + 7.0 * weights
    assert (np.diag(weights) == 0).all()
    assert np.abs(gradient[~np.eye(len(known), dtype=bool)]).max() < 1e-4
    rows = np.flatnonzero(log.split == 2)
    scores = system.scores(log, rows)
    np.testing.assert_allclose(
        scores[:, known], histories(log, rows).toarray()[:, known] @ weights, atol=1e-5
    )
    assert np.isneginf(scores[:, :2]).all()


def test_ease_refuses_a_catalog_that_is_too_large(log, monkeypatch):
    monkeypatch.setattr(catalog_counting, "MOST_EASE_ITEMS", 3)
    with pytest.raises(StageError, match=r"ease: 4 items .* wanted 3 or fewer"):
        Ease(log)


def test_als_without_its_library_says_how_to_get_it(log, monkeypatch):
    monkeypatch.setattr(catalog_counting, "has_implicit", lambda: False)
    with pytest.raises(StageError, match="pip install"):
        Als(log)


@pytest.mark.skipif(not has_implicit(), reason="implicit is not installed")
def test_als_scores_by_vectors_solved_for_from_histories():
    log = random_log(seed=2)
    rows = np.flatnonzero(log.split == 2)
    system = Als(log, seed=5, factors=4, alpha=3.0)
    scores = system.scores(log, rows)
    assert (scores == Als(log, seed=5, factors=4, alpha=3.0).scores(log, rows)).all()
    items = system._model.item_factors.astype(np.float64)
    seen = histories(log, rows).toarray() > 0
    for place in range(3):
        # Y^T Y + (alpha - 1) Y_u^T Y_u + l2 I, and alpha times the sum of the history's vectors.
        own = items[seen[place]]
        left = items.T @ items + 2.0 * own.T @ own + 0.01 * np.eye(4)
        vector = np.linalg.solve(left, 3.0 * own.sum(axis=0))
        known = ~np.isneginf(scores[place])
        np.testing.assert_allclose(scores[place, known], (items @ vector)[known], rtol=1e-2, atol=1e-3)


def test_history_weights_go_back_from_the_last_event(log):
    matrix = histories(log, np.array([0, 4, 9]), recent=3, decay=0.5).toarray()
    assert matrix[0].tolist() == [0] * 7
    assert matrix[1].tolist() == [0, 0, 0, 0.5, 1, 0.25, 0]
    assert matrix[2].tolist() == [0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("build", [CatalogPopularity, Transitions, ItemKnn, Ease])
def test_neither_the_row_nor_what_comes_after_it_is_read(build):
    log = random_log(seed=4)
    rows = np.flatnonzero(log.split == 2)[:10]
    system: CatalogScorer = build(log)
    before = system.scores(log, rows)
    for place, row in enumerate(rows):
        items = log.item.copy()
        items[row:] = 2
        other = random_log(seed=4)
        other.item = items
        assert (system.scores(other, rows[place : place + 1]) == before[place]).all()
