"""A retriever as a system: which items it may recommend, and by which vector, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recllm.crm import CrmConfig, Fields, build
from recllm.systems.retriever import Retriever
from tests.systems.test_counting import EVENTS, make_log

ROWS = np.array([4])
WIDTH = 4


@pytest.fixture
def make_retriever(monkeypatch):
    """`make_retriever(text_dim)` over items 2 to 6, of which 6 has no training event; users are (1, 2, 0, 0).

    Rows of the item table are (id, 1, 0, 0). With texts, W t is (0, 10 t, 0, 0), and item 2 has no text.
    """

    def make(text_dim):
        log = make_log(EVENTS, 5, 7)
        log.item_fields = np.where(log.item_count > 0, np.arange(7), 1).astype(np.int32)[:, None]
        fields = Fields((5,), (7,), 5, 0)
        model = build(fields, CrmConfig(name="retriever", hidden=WIDTH, heads=1, layers=1, text_dim=text_dim))
        with torch.no_grad():
            model.item.weight.zero_()
            model.item.weight[:, 0] = torch.arange(7)
            model.item.weight[:, 1] = 1.0
            if text_dim:
                model.text.weight.zero_()
                model.text.weight[1, 0] = 10.0
                texts = torch.tensor([[0.0], [0.0], [0.0], [0.1], [0.2], [0.3], [0.4]])
                model.set_texts(texts, torch.from_numpy(log.item_count > 0))
        retriever = Retriever("retriever", SimpleNamespace(model=model.eval(), made_by=None), log)
        monkeypatch.setattr(retriever, "users", lambda log, rows: np.array([[1, 2, 0, 0]], np.float32))
        return retriever, log

    return make


def test_without_texts_an_item_without_a_training_event_is_not_recommended(make_retriever):
    retriever, log = make_retriever(0)
    scores = retriever.scores(log, ROWS)
    # Products of (1, 2) and (id, 1).
    assert scores[0, 2:6].tolist() == [4, 5, 6, 7]
    assert np.isneginf(scores[0, [0, 1, 6]]).all()
    assert retriever.is_known.tolist() == [False, False, True, True, True, True, False]
    assert retriever.by_text.tolist() == []


def test_with_texts_it_is_by_the_unknown_items_vector_and_its_text(make_retriever):
    retriever, log = make_retriever(1)
    scores = retriever.scores(log, ROWS)
    # (1, 2) times (id, 1 + 10 t); item 6 has the row of the unknown item, 1 + 2 (1 + 4).
    np.testing.assert_allclose(scores[0, 2:], [2 + 2, 3 + 4, 4 + 6, 5 + 8, 1 + 10], rtol=1e-6)
    assert np.isneginf(scores[0, :2]).all()
    assert retriever.by_text.tolist() == [6]
    assert retriever.by_text_sentence.startswith("1 of 5 items that it may recommend")
    items, _ = retriever.best(log, ROWS, 3)
    assert items.tolist() == [[5, 6, 4]]


def test_an_item_with_neither_event_nor_text_is_not_recommended(make_retriever):
    retriever, log = make_retriever(1)
    model = retriever.crm.model
    model.texts[6] = 0.0
    again = Retriever("retriever", retriever.crm, log)
    assert again.by_text.tolist() == []
    assert again.is_known.tolist() == [False, False, True, True, True, True, False]
