"""Evaluation over the whole catalog: figures by hand, and all systems of the demo side by side."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from recllm.errors import StageError
from recllm.evaluation import next as evaluation_next
from recllm.evaluation.next import GAINS, HITS, NextEvaluation, by_ties, is_tied, next_items
from recllm.evaluation.tables import result_tables
from recllm.eventlog.ids import FIRST_ID
from recllm.metrics import values_by_place
from recllm.systems.catalog import NO_ITEM
from tests.systems.finished_demo import FinishedDemo
from tests.systems.test_counting import EVENTS, make_log

BASELINES = ["popularity", "popularity-7-days", "transitions", "item-knn", "ease"]
SMALL = {
    "rows": "uniform60",
    "cascade_rows": "uniform20",
    "joined_rows": "uniform40",
    "retrieved": 30,
    "reranked": 6,
    "baselines": BASELINES,
}
WITH_LMS = ("evaluate", "TASK=next", "CRM=retriever sim", "SYSTEM=lora reclora s-dpo-k7")


@pytest.mark.parametrize(
    ("lists", "rows", "timed"),
    [
        ([[5, 6, 7], [5, NO_ITEM, NO_ITEM], [8, 9, 5]], [10, 12], [[5, 6], [8, 9]]),
        ([[5, NO_ITEM, NO_ITEM], [6, NO_ITEM, NO_ITEM]], [10, 11], [[5], [6]]),
    ],
)
def test_an_lm_is_timed_on_items_alone(lists, rows, timed):
    asked = []
    system = SimpleNamespace(milliseconds=lambda *given: asked.extend(given) or 1.0)
    cascade = SimpleNamespace(reranker=SimpleNamespace(depth=2), system=system)
    before = SimpleNamespace(items=np.array(lists, np.int32))
    assert evaluation_next._milliseconds(cascade, np.arange(10, 10 + len(lists)), before) == 1.0
    assert [part.tolist() for part in asked] == [rows, timed]


@pytest.fixture(scope="module")
def make_evaluation(tmp_path_factory, demo_log, demo_config, tiny_lm):
    """`make_evaluation(words, **keys of evaluate.next)` -> an evaluation of finished stages."""
    made = {}
    root = tmp_path_factory.mktemp("next")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLLM_CACHE", str(root / "cache"))

        def make(words, **measured):
            if words not in made:
                folder = root / str(len(made))
                patch.setenv("RECLLM_ARTIFACTS", str(folder))
                made[words] = FinishedDemo(folder / "demo", demo_log, demo_config, tiny_lm, words)
            return NextEvaluation.open(made[words].run(next={**SMALL, **measured}, bootstrap=20))

        yield make


def test_figures_of_places_by_hand():
    values = values_by_place(np.array([0, 4, 9, 10, 99, 100, -1]), HITS, GAINS)
    assert values["hr@1"].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert values["hr@5"].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert values["hr@10"].tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert values["hr@20"].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert values["hr@100"].tolist() == [1, 1, 1, 1, 1, 0, 0]
    gains = [1, 1 / math.log2(6), 1 / math.log2(11), 0, 0, 0, 0]
    np.testing.assert_allclose(values["ndcg@10"], gains)
    assert values["ndcg@100"][3] == pytest.approx(1 / math.log2(12))
    np.testing.assert_allclose(values["mrr"], [1, 1 / 5, 1 / 10, 1 / 11, 1 / 100, 1 / 101, 0])


def test_tied_targets_share_user_and_second_with_a_neighbor():
    log = make_log(EVENTS, 5, 7)
    log.meta["timed"] = True
    # Users 2 2 2 2 2 3 3 3 4 4: rows 1 and 2 tie, row 4 and 5 are of different users.
    log.timestamp = np.array([1, 2, 2, 3, 4, 4, 5, 6, 6, 7])
    assert [is_tied(log, np.array([row])).sum() for row in range(10)] == [0, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert np.flatnonzero(is_tied(log, np.arange(10))).tolist() == [1, 2]
    log.meta["timed"] = False
    assert not is_tied(log, np.arange(10)).any()


def test_rows_that_no_order_of_ties_could_change_have_figures_of_their_own():
    values = {"hr@10": np.array([1.0, 1, 0, 0]), "ndcg@10": np.array([1.0, 0.5, 0, 0]), "mrr": np.ones(4)}
    assert by_ties(values, np.array([True, False, False, True])) == {
        "hr@10/untied": 0.5,
        "ndcg@10/untied": 0.25,
        "rows/untied": 2.0,
        "tied_targets": 2.0,
    }


def test_coverage_and_popularity_bias_by_hand():
    log = make_log(EVENTS, 5, 7)  # five items; training events of 2 to 6: 3 2 1 1 0
    figures = evaluation_next.of_lists(log, np.array([[2, 3], [2, 6], [2, NO_ITEM]]))
    assert figures["coverage@10"] == pytest.approx(3 / 5)
    assert figures["popularity_bias@10"] == pytest.approx((3 * math.log(4) + math.log(3) + 0) / 5)


def test_baselines_alone(make_evaluation):
    evaluation = make_evaluation(("evaluate", "TASK=next", "CRM=none"))
    rows = next_items(evaluation)
    assert [row.system for row in rows] == BASELINES
    assert {(row.task, row.row_set, row.candidates, row.split) for row in rows} == {
        ("next", "test/uniform60/any", "unseen", "time")
    }
    assert [row.paired_with for row in rows] == [None, *["popularity"] * 4]
    for row in rows:
        assert 0 <= row.metrics["hr@1"] <= row.metrics["hr@10"] <= row.metrics["recall@30"] <= 1
        cold, warm = (row.metrics[f"rows/{name}"] for name in ("cold", "warm"))
        assert cold + warm == row.rows == 60
        assert "ndcg@10/found" not in row.metrics
        assert row.metrics["milliseconds"] > 0
    (table,) = result_tables(rows, "next")
    assert table.title == (
        "Next item of the whole catalog, items new to the user, split time, rows test/uniform60/any"
    )


def test_a_row_that_is_looked_up_by_hand(make_evaluation):
    """HR@10 of popularity is the share of targets among the ten most popular items new to the user."""
    evaluation = make_evaluation(("evaluate", "TASK=next", "CRM=none"), baselines=["popularity"])
    log = evaluation.log
    hits = []
    for row in evaluation.rows("test", "uniform60"):
        seen = set(log.item[log.offsets[log.user[row]] : row].tolist())
        order = sorted(np.flatnonzero(log.item_count), key=lambda item: (-log.item_count[item], item))
        top = [item for item in order if item not in seen][:10]
        hits.append(log.item[row] in top)
    (result,) = next_items(evaluation)
    assert result.metrics["hr@10"] == pytest.approx(np.mean(hits))


def test_lists_of_a_few_rows_at_once_change_nothing(make_evaluation, monkeypatch):
    words = ("evaluate", "TASK=next", "CRM=retriever")
    whole = next_items(make_evaluation(words))
    monkeypatch.setattr(evaluation_next, "ROWS_AT_ONCE", 7)
    parts = next_items(make_evaluation(words))
    for one, other in zip(whole, parts, strict=True):
        for name in one.metrics.keys() - {"milliseconds"}:
            assert one.metrics[name] == pytest.approx(other.metrics[name], nan_ok=True), name


def test_liked_targets_and_seen_items_are_said_by_the_row_set(make_evaluation):
    evaluation = make_evaluation(
        ("evaluate", "TASK=next", "CRM=none"), targets="liked", seen="kept", baselines=["popularity"]
    )
    (row,) = next_items(evaluation)
    log = evaluation.log
    rows = log.rows("test", "uniform60")
    assert (row.row_set, row.candidates) == ("test/uniform60/liked", "catalog")
    assert row.rows == int((log.label[rows] == 1).sum()) < 60
    top = np.argsort(-log.item_count, kind="stable")[:10]
    assert row.metrics["hr@10"] == pytest.approx(np.isin(log.item[rows[log.label[rows] == 1]], top).mean())


def test_what_cannot_be_had_is_left_out_and_said(make_evaluation, monkeypatch, capsys):
    monkeypatch.setattr("recllm.systems.catalog_counting.has_implicit", lambda: False)
    evaluation = make_evaluation(("evaluate", "TASK=next", "CRM=none"), baselines=["popularity", "als"])
    assert [row.system for row in next_items(evaluation)] == ["popularity"]
    assert "without als: the library implicit is not installed" in capsys.readouterr().out
    nothing = make_evaluation(("evaluate", "TASK=next", "CRM=none"), baselines=[])
    with pytest.raises(StageError, match="no system recommends anything"):
        next_items(nothing)


def test_a_retriever_crms_and_lms_in_a_cascade(make_evaluation):
    evaluation = make_evaluation(WITH_LMS)
    rows = next_items(evaluation)
    alone = [row for row in rows if row.row_set == "test/uniform60/any"]
    assert [row.system for row in alone] == [*BASELINES, "retriever"]
    fewer = {row.system: row for row in rows if row.row_set == "test/uniform20/any"}
    lms = ["lm", "lora", "sft", "s-dpo-k7"]
    assert list(fewer) == [*BASELINES, "retriever", "retriever+sim", *(f"retriever+sim+{lm}" for lm in lms)]
    retriever = fewer["retriever"]
    for name, row in fewer.items():
        # What is found is the retriever's to find: steps only order it.
        if name.startswith("retriever"):
            assert row.metrics["recall@30"] == retriever.metrics["recall@30"]
            assert row.metrics["gain_ndcg@10/found"] == pytest.approx(
                row.metrics["ndcg@10/found"] - retriever.metrics["ndcg@10/found"], nan_ok=True
            )
        if "+" in name:
            assert row.paired_with == name.rpartition("+")[0]
            assert {"popularity", "ease"} <= row.against.keys()
            assert row.metrics["milliseconds"] > fewer[row.paired_with].metrics["milliseconds"]
    steps = {name for name in fewer["retriever+sim+sft"].metrics if name.startswith("weight/")}
    assert steps == {"weight/retriever", "weight/sim", "weight/sft"}
    assert fewer["retriever+sim+s-dpo-k7"].k == 7
    assert fewer["retriever+sim+lm"].lm == "tiny"
    assert (fewer["retriever"].stage, fewer["retriever+sim"].stage) == ("stage1", "stage1")
    assert fewer["retriever+sim+s-dpo-k7"].stage == "stage3"


def test_crms_without_a_retriever_order_nothing(make_evaluation):
    evaluation = make_evaluation(("evaluate", "TASK=next", "CRM=din"))
    assert {row.system for row in next_items(evaluation)} == set(BASELINES)
    assert evaluation.cascades == []


def test_a_retriever_recommends_what_its_logits_order(make_evaluation):
    evaluation = make_evaluation(("evaluate", "TASK=next", "CRM=retriever"))
    log = evaluation.log
    (retriever,) = evaluation.retrievers
    rows = evaluation.rows("test", "uniform60")[:5]
    scores = retriever.scores(log, rows)
    known = np.flatnonzero(log.item_count)
    lists = np.tile(known.astype(np.int32), (len(rows), 1))
    np.testing.assert_allclose(scores[:, known], retriever.crm.logits(rows, lists), rtol=1e-4, atol=1e-5)
    others = np.setdiff1d(np.arange(log.n_items), known)
    assert np.isneginf(scores[:, others]).all()
    assert (known >= FIRST_ID).all()


def test_a_retriever_with_texts_finds_items_without_a_training_event(make_evaluation, capsys):
    words = ("evaluate", "TASK=next", "CRM=retriever", "stage1.crm.text_dim=4")
    evaluation = make_evaluation(words, rows="all", retrieved=10_000, cascade_rows="uniform20", baselines=[])
    log = evaluation.log
    (retriever,) = evaluation.retrievers
    cold = np.flatnonzero(log.item_count[FIRST_ID:] == 0) + FIRST_ID
    assert len(cold)
    assert retriever.by_text.tolist() == cold.tolist()
    assert f"retriever: {len(cold)} of {log.n_items - FIRST_ID} items" in capsys.readouterr().out
    targets = log.item[evaluation.rows("test", "all")]
    (row,) = next_items(evaluation)
    assert row.metrics["rows/cold"] == (log.item_count[targets] == 0).sum() > 0
    # The list is as long as the catalog: whatever is new to its user is in it.
    assert row.metrics["recall@10000"] == row.metrics["recall@10000/cold"] == 1.0
    plain = make_evaluation(
        ("evaluate", "TASK=next", "CRM=retriever"), rows="all", retrieved=10_000, baselines=[]
    )
    (row,) = next_items(plain)
    assert row.metrics["recall@10000/cold"] == 0.0
