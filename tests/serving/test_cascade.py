"""The cascade: its order by hand, and a query's scores against those of the row that it stands for."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recllm.cache import Cache
from recllm.config.evaluate import EvaluateConfig
from recllm.eventlog.queries import LogRows, queries_of_rows
from recllm.lm.predict import candidate_scores
from recllm.pipeline.stage_file import Role
from recllm.serving.fitting import fit_weights
from recllm.systems.cascade import (
    Cascade,
    CascadeSystem,
    CrmStep,
    Lists,
    Reranker,
    SystemStep,
    fit,
    rerank,
    retrieve,
    scored,
)
from recllm.systems.catalog import Excluded
from recllm.systems.catalog_counting import CatalogPopularity
from recllm.systems.crm import Crm, CrmSystem
from recllm.systems.lm_systems import OpenLm, TunedLm, UntunedLm
from stages.cascade import valid_rows


class Given:
    """A step whose score of each item is given, the same for everybody."""

    def __init__(self, name, score):
        self.name = name
        self.score = np.asarray(score, np.float32)

    def scores(self, queries, items):
        return np.where(items >= 2, self.score[items], -np.inf).astype(np.float32)


def lists_of(items, scores):
    items = np.array(items, np.int32)
    scores = np.array(scores, np.float32)
    return Lists(items, scores.astype(np.float64), {"first": np.where(items > 0, scores, np.nan)})


def test_a_step_orders_what_is_above_its_cut():
    lists = lists_of([[5, 4, 3, 2]], [[9, 8, 7, 4]])
    found = rerank(None, lists, Reranker(Given("second", [0, 0, 50, 6, 7, 5]), 3))
    assert found.items.tolist() == [[4, 3, 5, 2]]
    assert found.steps["second"][0, :3].tolist() == [7, 6, 5]
    assert np.isnan(found.steps["second"][0, 3])
    assert found.steps["first"].tolist() == [[8, 7, 9, 4]]
    # Those below keep their distance to each other, and the best of them lies 1 below the worst above.
    assert found.score.tolist() == [[7, 6, 5, 4]]


def test_weights_join_standardized_scores():
    lists = lists_of([[2, 3]], [[3, 1]])
    step = Given("second", [0, 0, 10, 30])
    first_wins = rerank(None, lists, Reranker(step, 2, np.array([2.0, 1.0])))
    assert first_wins.items.tolist() == [[2, 3]]
    assert first_wins.score.tolist() == [[1.0, -1.0]]  # 2 (1) + 1 (-1), and the other way round
    second_wins = rerank(None, lists, Reranker(step, 2, np.array([1.0, 2.0])))
    assert second_wins.items.tolist() == [[3, 2]]


def test_ties_go_to_the_smaller_id_and_short_lists_end_with_nothing():
    lists = lists_of([[5, 3, 4, 0]], [[9, 9, 9, -np.inf]])
    found = rerank(None, lists, Reranker(Given("second", np.zeros(6)), 4))
    assert found.items.tolist() == [[3, 4, 5, 0]]
    assert np.isneginf(found.score[0, 3])
    assert np.isnan(found.steps["second"][0, 3])


def test_popular_items_first_and_none_that_nobody_met():
    log = SimpleNamespace(item_count=np.array([0, 0, 3, 0, 5, 5], np.int32), n_items=6)
    items, scores = CatalogPopularity(log).best(log, np.arange(2), 4, Excluded.of([[], [4]]))
    assert items.tolist() == [[4, 5, 2, 0], [5, 2, 0, 0]]
    assert scores[0, :3].tolist() == [5, 5, 3]


def test_what_is_fitted_orders_as_what_was_fitted_before():
    """The lists that a fit returns are those that its weights make, without asking the step again."""
    random = np.random.default_rng(0)
    items = np.stack([random.permutation(np.arange(2, 8)) for _ in range(50)])
    lists = lists_of(items, np.sort(random.normal(size=(50, 6)))[:, ::-1])
    reranker = Reranker(Given("second", random.normal(size=8)), 4)
    fitted, ordered = fit(lists, scored(None, lists, reranker), reranker, items[:, 1])
    again = rerank(None, lists, fitted)
    assert (again.items == ordered.items).all()
    assert (again.score == ordered.score).all()


def test_a_step_that_knows_gets_the_weight(demo_log):
    rows = demo_log.rows("valid", "all")[:60]
    score = np.random.default_rng(0).normal(size=demo_log.n_items)
    exact = Cascade(
        CatalogPopularity(demo_log), demo_log.n_items, [Reranker(Given("noise", score), demo_log.n_items)]
    )
    fitted = fit_weights(exact, demo_log, rows, remove_seen=False)
    popularity, noise = fitted.weights["noise"]
    assert abs(noise) < 0.4
    assert fitted.measured[f"recall@{demo_log.n_items}"] == 1.0
    assert set(fitted.weights) == {"noise"}
    assert 0 <= fitted.measured["noise/hr@10"] <= 1
    assert popularity == popularity


def test_a_querys_scores_are_the_rows_to_the_bit(recommender, cascades):
    """CRM and LM, asked of queries that stand where rows stand, answer what they answer of the rows."""
    torch.set_num_threads(1)
    parts = recommender.parts
    log = parts.log
    rows = log.ranking("test", "popular20")[0][:8]
    lists = log.ranking("test", "popular20")[1][:8, :6].copy()
    lists[:, 0] = np.where((lists == log.item[rows][:, None]).any(1), lists[:, 0], log.item[rows])
    queries = queries_of_rows(log, rows)
    wanted = parts.crm.logits(rows, lists)
    crm_step = parts.cascade.rerankers[0].step
    assert (crm_step.scores(queries, lists) == wanted).all()
    opened = parts.lm._open(parts.lm._ranking)
    task = opened.lm.titles(rows, lists, opened.crm, parts.lm.own_gates)
    by_rows = candidate_scores(opened.model, task, parts.lm.batch_size)
    assert (parts.lm.scores(queries, lists) == by_rows).all()
    assert np.isfinite(by_rows).all()
    # Each user's own gate: without it the scores are others.
    ungated = opened.lm.titles(rows, lists, replace(opened.crm, gate_input="user"), False)
    assert not (candidate_scores(opened.model, ungated, 16) == by_rows).all()


def test_lists_of_unlike_length_are_scored_alone(recommender):
    """A shorter list's titles and gate are those of its own items, not of what fills the line."""
    log = recommender.log
    rows = log.rows("test", "all")[:3]
    queries = queries_of_rows(log, rows)
    items = np.array([[2, 3, 4, 5], [6, 7, 0, 0], [0, 0, 0, 0]], np.int32)
    scores = recommender.parts.lm.scores(queries, items)
    alone = recommender.parts.lm.scores(queries.some(np.array([1])), items[1:2, :2])
    assert (scores[1, :2] == alone[0]).all()
    assert np.isfinite(scores[0]).all()
    assert np.isneginf(scores[1, 2:]).all()
    assert np.isneginf(scores[2]).all()


@pytest.fixture
def evaluated(recommender, cascades, tmp_path):
    """The steps of the same cascade as an evaluation has them, and what each is as a system."""
    parts = recommender.parts
    stage = cascades["reclora"]
    run = SimpleNamespace(
        config=replace(stage.config, evaluate=EvaluateConfig(batch_size=32)),
        parents={role: stage.parent(role) for role in (Role.LM, Role.NEIGHBORS, Role.LOG)},
        file=stage.file,
        cache=Cache(tmp_path),
    )
    tuned = stage.parent(Role.SYSTEM)
    gate = Crm.open(tuned.parent(Role.CRM), parts.log, parts.retrieval, run.cache)
    open_lm = OpenLm(run, parts.log, parts.retrieval, [CrmSystem("gate", gate)])
    lm = TunedLm("lm", UntunedLm(open_lm), tuned)
    sim = Crm.open(stage.parent(Role.CRM), parts.log, parts.retrieval, run.cache)
    return [(CrmStep(sim, "crm"), CrmSystem("sim", sim)), (SystemStep(lm), lm)]


def test_rows_and_queries_have_the_same_lists_and_scores(recommender, evaluated):
    """What an evaluation measures is what a recommender recommends."""
    log = recommender.log
    cascade = recommender.cascade
    rows = log.rows("test", "all")[:12]
    seen = Excluded.seen(log, rows)
    rerankers = [
        replace(reranker, step=step) for reranker, (step, _) in zip(cascade.rerankers, evaluated, strict=True)
    ]
    of_rows = replace(cascade, rerankers=rerankers).lists(LogRows(log, rows), 10, seen)
    queries = queries_of_rows(log, rows)
    of_queries = cascade.lists(queries, 10, Excluded.seen(queries.log, queries.rows))
    assert (of_rows.items == of_queries.items).all()
    np.testing.assert_allclose(of_rows.score, of_queries.score, rtol=1e-4, atol=1e-4)
    assert list(of_rows.steps) == list(of_queries.steps) == ["popularity", "crm", "lm"]
    for name, scores in of_rows.steps.items():
        np.testing.assert_allclose(scores, of_queries.steps[name], rtol=1e-4, atol=1e-4)


def test_both_fit_the_same_weights(recommender, evaluated):
    log = recommender.log
    rows = valid_rows(log, 20, keep_seen=False)
    cascade = recommender.cascade
    bare = [replace(reranker, weights=None) for reranker in cascade.rerankers]
    wanted = fit_weights(replace(cascade, rerankers=bare), log, rows, remove_seen=True).weights
    asked = LogRows(log, rows)
    before = cascade.first
    lists = retrieve(before, asked, cascade.retrieved, Excluded.seen(log, rows))
    for reranker, (step, system) in zip(cascade.rerankers, evaluated, strict=True):
        before = CascadeSystem(before, step, system, reranker.depth)
        lists = before.fit(asked, lists, log.item[rows])
        np.testing.assert_allclose(list(before.weights.values()), wanted[step.name], rtol=1e-3, atol=1e-4)
    assert before.name == "popularity+crm+lm"
    assert list(before.weights) == ["popularity", "crm", "lm"]
