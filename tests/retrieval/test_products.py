"""The best inner products are those of a sorted catalog, ties and what was met included."""

from __future__ import annotations

import numpy as np
import pytest

from recllm.retrieval.products import Products


def sorted_catalog(users, items, k, ends, met):
    scores = users @ items.T
    for user in range(len(users)):
        scores[user, met[ends[user] : ends[user + 1]]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


@pytest.mark.parametrize("n_items", [1, 7, 128, 500, 9_000])
@pytest.mark.parametrize("k", [1, 10, 200])
@pytest.mark.parametrize("coarse", [False, True])
def test_lists_are_those_of_a_sorted_catalog(n_items, k, coarse):
    rng = np.random.default_rng(n_items + k)
    # Coarse vectors are whole numbers: their products are exact, and many are equal.
    draw = (lambda *shape: rng.integers(-1, 2, shape)) if coarse else (lambda *shape: rng.normal(size=shape))
    users, items = draw(70, 6).astype(np.float32), draw(n_items, 6).astype(np.float32)
    sizes = rng.integers(0, n_items + 1, 70)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    met = np.concatenate([rng.choice(n_items, size, replace=False) for size in sizes])
    places, scores = Products(items).best(users, k, ends, met)
    wanted, wanted_scores = sorted_catalog(users, items, k, ends, met)
    width = wanted.shape[1]
    np.testing.assert_allclose(scores[:, :width], wanted_scores, rtol=1e-5, atol=1e-5)
    wanted[np.isneginf(wanted_scores)] = -1
    if coarse:
        np.testing.assert_array_equal(places[:, :width], wanted)
    else:
        assert (places[:, :width] == wanted).mean() > 0.999
    assert (places[:, width:] == -1).all()


def test_a_list_holds_no_item_twice_and_none_that_was_met():
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(9, 4)).astype(np.float32), rng.normal(size=(300, 4)).astype(np.float32)
    met = np.tile(np.arange(290), 9)
    places, _ = Products(items).best(users, 20, 290 * np.arange(10), met)
    for row in places:
        assert sorted(row[:10]) == list(range(290, 300))
        assert (row[10:] == -1).all()
