"""The index of item vectors: exact against a plain product, approximate by its measured recall, on disk."""

import numpy as np
import pytest

from recllm.retrieval.index import ItemIndex


def drawn(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def test_exact_search_is_the_plain_product():
    vectors, queries = drawn(300, 8), drawn(40, 8, 1)
    index = ItemIndex.build(vectors, np.arange(2, 302, dtype=np.int32))
    assert index.facts.kind == "exact"
    items, scores = index.search(queries, 10)
    plain = queries.astype(np.float64) @ vectors.T
    wanted = np.argsort(-plain, axis=1)[:, :10]
    assert (items == wanted + 2).all()
    np.testing.assert_allclose(scores, np.take_along_axis(plain, wanted, 1), rtol=1e-5)


def test_ties_go_to_the_smaller_id_and_lists_end_with_no_item():
    vectors = np.repeat(drawn(3, 4), 2, axis=0)  # items 2 and 3 are alike, 4 and 5, 6 and 7
    index = ItemIndex.build(vectors, np.array([3, 2, 5, 4, 7, 6], np.int32))
    items, scores = index.search(vectors[[0, 2]], 8)
    assert sorted(items[0, :6].tolist()) == [2, 3, 4, 5, 6, 7]
    assert (np.diff(items[:, :6].reshape(2, 3, 2), axis=2) == 1).all()
    assert (items[:, 6:] == 0).all()
    assert np.isneginf(scores[:, 6:]).all()


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_a_list_does_not_depend_on_the_batch(kind):
    vectors, queries = drawn(2000, 16), drawn(64, 16, 1)
    index = ItemIndex.build(vectors, np.arange(2, 2002, dtype=np.int32), kind)
    together = index.search(queries, 20)
    for place in (0, 7, 63):
        alone = index.search(queries[place : place + 1], 20)
        assert (alone[0][0] == together[0][place]).all()
        assert (alone[1][0] == together[1][place]).all()


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_recall_is_measured_and_survives_the_disk(tmp_path, kind):
    centers = drawn(50, 16)
    near = centers[np.random.default_rng(2).integers(0, 50, 5000)]
    vectors = near + 0.3 * drawn(5000, 16, 3)
    index = ItemIndex.build(
        vectors, np.arange(2, 5002, dtype=np.int32), kind, queries=drawn(100, 16, 4), k=50
    )
    assert (0.95 if kind == "ivf" else 0.5) <= index.facts.recall <= 1
    assert (index.facts.recall_at, index.facts.queries) == (50, 100)
    index.save(tmp_path / "index")
    again = ItemIndex.open(tmp_path / "index")
    assert again.facts == index.facts
    assert again.measure_recall(drawn(100, 16, 4), 50) == pytest.approx(index.facts.recall, abs=0.02)
    items, _ = again.search(drawn(5, 16, 5), 3)
    assert (items == index.search(drawn(5, 16, 5), 3)[0]).all()


def test_auto_is_approximate_beyond_a_size():
    vectors = drawn(900, 4)
    items = np.arange(2, 902, dtype=np.int32)
    assert ItemIndex.build(vectors, items, exact_items=900).facts.kind == "exact"
    assert ItemIndex.build(vectors, items, exact_items=899).facts.kind == "ivf"


def test_what_cannot_be_indexed_is_said(tmp_path):
    with pytest.raises(ValueError, match="finite"):
        ItemIndex.build(np.full((3, 2), np.nan, np.float32), np.arange(3, dtype=np.int32))
    with pytest.raises(ValueError, match="no index"):
        ItemIndex.open(tmp_path)


def test_more_are_found_where_some_will_be_left_out():
    vectors = drawn(100, 4)
    index = ItemIndex.build(vectors, np.arange(2, 102, dtype=np.int32))
    items, _ = index.search(drawn(2, 4, 1), 5, met=np.array([0, 7]))
    assert items.shape == (2, 12)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_best_but_for_what_was_met_are_exact(k):
    """30 items, ids 2 to 31, with ties; what was met may be of no item of the index, and is named twice."""
    rng = np.random.default_rng(3)
    vectors = rng.integers(-3, 4, (30, 4)).astype(np.float32)  # whole numbers: products are exact, many tie
    index = ItemIndex.build(vectors, np.arange(2, 32), "exact")
    queries = rng.integers(-3, 4, (6, 4)).astype(np.float32)
    met = [[], [9, 9, 500], list(range(2, 32)), [2], [0, 1], [31, 3, 17]]
    ends = np.concatenate([[0], np.cumsum([len(items) for items in met])])
    items, scores = index.best(queries, k, ends, np.concatenate([np.array(m, np.int32) for m in met]))
    assert items.shape == scores.shape == (6, k)
    for query in range(6):
        left = [item for item in range(2, 32) if item not in met[query]]
        product = {item: float(np.float32(queries[query] @ vectors[item - 2])) for item in left}
        wanted = sorted(left, key=lambda item: (-product[item], item))[:k]
        assert items[query, : len(wanted)].tolist() == wanted
        np.testing.assert_allclose(
            scores[query, : len(wanted)], [product[item] for item in wanted], rtol=1e-5, atol=1e-5
        )
        assert not items[query, len(wanted) :].any()
        assert np.isneginf(scores[query, len(wanted) :]).all()
