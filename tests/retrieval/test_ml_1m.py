"""Neighbors on MovieLens-1M, against a search of one row at a time."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from recllm.eventlog.build import build_log
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.ids import UNUSED
from recllm.eventlog.log import EventLog
from recllm.retrieval.neighbors import Neighbors
from recllm.retrieval.vectors import cooccurrence_vectors, item_vectors

SHARED = Path(__file__).parents[3] / "shared" / "datasets" / "ml-1m"


@pytest.mark.skipif(
    not SHARED.exists(), reason="MovieLens-1M is not at hand; its license keeps it out of here"
)
def test_a_thousand_random_samples_have_the_neighbors_of_a_naive_search(tmp_path):
    importlib.import_module("data.ml_1m.recipe").make(tmp_path / "tables", SHARED)
    build_log(tmp_path / "tables", tmp_path / "log", PrepareConfig(user_fields=["gender"]))
    log = EventLog.open(tmp_path / "log")
    vectors = item_vectors("cooccurrence", cooccurrence=cooccurrence_vectors(log, 16))
    rows = np.random.default_rng(0).choice(np.flatnonzero(log.split != UNUSED), 1000, replace=False)
    found = Neighbors(log, vectors).search(rows, k=10)
    exact = vectors.astype(np.float64)
    clear = 0
    for row, got in zip(rows, found, strict=True):
        start, end = (int(edge[0]) for edge in log.history(np.array([row])))
        score = exact[log.item[start:end]] @ exact[log.item[row]]
        order = np.argsort(-score)
        got = got[got >= 0] - start
        assert len(got) == len(set(got.tolist())) == min(10, end - start)
        assert 0 <= got.min()
        np.testing.assert_allclose(score[got], score[order[:10]], atol=1e-5)
        if len(order) > 10 and score[order[9]] - score[order[10]] > 1e-5:
            assert set(got.tolist()) == set(order[:10].tolist())
            clear += 1
    assert clear > 900
