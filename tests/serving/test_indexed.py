"""A retriever behind an index: what it finds is what a pass over the catalog finds."""

import numpy as np
import polars as pl
import pytest

from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.queries import queries_of_rows
from recllm.retrieval.index import ItemIndex
from recllm.serving.indexed import IndexedRetriever
from recllm.systems.cascade import Cascade
from recllm.systems.catalog import Excluded


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_the_best_are_those_of_the_whole_catalog(retrieving, kind):
    log = retrieving.log
    retriever = retrieving.parts.retriever
    known = np.flatnonzero(retriever.is_known).astype(np.int32)
    index = ItemIndex.build(retriever.item_vectors[known], known, kind)
    rows = log.rows("test", "all")[:30]
    queries = queries_of_rows(log, rows)
    seen = Excluded.seen(queries.log, queries.rows)
    wanted, scores = retriever.best(log, rows, 15, Excluded.seen(log, rows))
    found, found_scores = IndexedRetriever(retriever, index).best(queries.log, queries.rows, 15, seen)
    np.testing.assert_allclose(found_scores, scores, rtol=1e-4, atol=1e-5)
    assert (found == wanted).mean() > 0.99


def test_a_query_has_its_rows_vector_to_the_bit(retrieving):
    log = retrieving.log
    rows = log.rows("test", "all")[:40]
    queries = queries_of_rows(log, rows)
    retriever = retrieving.parts.retriever
    assert (retriever.users(log, rows) == retriever.users(queries.log, queries.rows)).all()


def test_nothing_is_left_of_a_small_catalog(retrieving):
    log = retrieving.log
    rows = log.rows("test", "all")[:2]
    queries = queries_of_rows(log, rows)
    every = np.flatnonzero(retrieving.parts.retriever.is_known)
    first = retrieving.cascade.first
    items, scores = first.best(queries.log, queries.rows, 5, Excluded.of([every[:-2], []]))
    assert (items[0] > 0).sum() == 2
    assert np.isneginf(scores[0, 2:]).all()
    assert (items[1] > 0).all()


def test_it_recommends(retrieving):
    table = retrieving.recommend([1, 2, 900], k=5, histories=pl.DataFrame({"user": [900], "item": [5]}))
    assert table.columns == ["user", "item", "score", "rank", "title", "retriever", "crm"]
    assert table.height == 15
    assert table["retriever"].null_count() == 0
    scored = retrieving.score(table.select("user", "item").head(5))
    np.testing.assert_allclose(scored["crm"], table["crm"][:5], rtol=1e-5)
    np.testing.assert_allclose(scored["retriever"], table["retriever"][:5], rtol=1e-4)
    only = retrieving.recommend([1], k=3, items_to_recommend=table["item"][5:10].to_list())
    assert set(only["item"]) <= set(table["item"][5:10])
    assert retrieving.similar_items([5], k=2).height == 2


def test_a_step_may_be_left_out(retrieving):
    alone = Cascade(retrieving.cascade.first, 10)
    queries = retrieving.maker.make(pl.Series([1, 2]))
    lists = alone.lists(queries, 4)
    assert list(lists.steps) == ["retriever"]
    assert (np.diff(lists.score, axis=1) <= 0).all()


def test_items_without_a_training_event_are_recommended_by_their_text(reading_texts, retrieving):
    log = reading_texts.log
    cold = np.flatnonzero(log.item_count == 0)[FIRST_ID:].astype(np.int32)
    assert reading_texts.cascade.first.index.facts.items == log.n_items - FIRST_ID
    names = reading_texts.maker.items.external(cold).to_list()
    table = reading_texts.recommend([1, 2], k=3, items_to_recommend=names)
    assert set(table["item"]) <= set(names)
    assert table.height == reading_texts.counts["recommended_by_text_alone"] == 2 * min(3, len(cold))
    # To whoever has no history the most popular items are recommended, and these are none.
    assert reading_texts.recommend([900], k=3, items_to_recommend=names).height == 0
    scored = reading_texts.score(table.select("user", "item"))
    np.testing.assert_allclose(scored["retriever"], table["retriever"], rtol=1e-4, atol=1e-6)
    assert reading_texts.similar_items(names[:1], k=2).height == 2
    most = log.n_items - FIRST_ID
    with pytest.raises(ValueError, match=f"wanted 1 to {most:,}"):
        reading_texts.recommend([1], k=most + 1)
    # Without texts they are no choice.
    with pytest.raises(ValueError, match=r"none of the .* can be recommended"):
        retrieving.recommend([1], items_to_recommend=names)
    retrieving.recommend([1, 2], k=20)
    assert retrieving.counts["recommended_by_text_alone"] == 0
