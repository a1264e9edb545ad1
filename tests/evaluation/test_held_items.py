"""Evaluations of items that nobody has rated: every kind of system is asked about them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from recllm.evaluation.context import Evaluation
from recllm.evaluation.ctr import ctr
from recllm.evaluation.next import NextEvaluation, next_items
from recllm.evaluation.ranking import ranking
from recllm.eventlog.build import build_log
from recllm.eventlog.log import EventLog
from tests.systems.finished_demo import FinishedDemo

SPLIT = ("prepare.split=items", "prepare.held_items=[0.2,0.2]", "retrieval.vectors=lm")
"""What holds items out; and all dimensions of the finished demo's vectors are of texts."""


@pytest.fixture(scope="module")
def log(tmp_path_factory, demo_log, demo_config):
    """The demo's log, a fifth of whose items validates and another one tests."""
    folder = tmp_path_factory.mktemp("items")
    config = dataclasses.replace(demo_config.prepare, split="items", held_items=[0.2, 0.2])
    build_log(demo_log.folder.parent / "tables", folder / "log", config)
    return EventLog.open(folder / "log")


@pytest.fixture
def make_run(log, demo_config, tiny_lm, tmp_path, monkeypatch):
    """`make_run(*words, **keys of evaluate)` -> an evaluation of finished stages at work."""
    monkeypatch.setenv("RECLLM_ARTIFACTS", str(tmp_path))

    def make(*words, **measured):
        demo = FinishedDemo(tmp_path / "demo", log, demo_config, tiny_lm, ("evaluate", *words, *SPLIT))
        return demo.run(**measured)

    return make


def test_every_system_answers_and_ranks_items_that_nobody_rated(log, make_run):
    evaluation = Evaluation.open(make_run("CRM=din din-lm sim", "SYSTEM=lora s-dpo"))
    rows = [row for row in ctr(evaluation) if row.row_set == "test/uniform60"]
    systems = ["popularity", "popularity-by-category", "text-knn", "din", "din-lm", "sim"]
    assert [row.system for row in rows][:6] == systems
    assert {"lm", "lora"} <= {row.system for row in rows}
    for row in rows:
        assert row.metrics["rows/items_unseen"] == row.rows == 60  # all of them are cold
    auc = {row.system: row.metrics["auc"] for row in rows}
    assert auc["popularity"] == 0.5  # it knows nothing of any of them
    assert np.isfinite(list(auc.values())).all()
    ranked = ranking(evaluation)
    assert {row.candidates for row in ranked} == {"uniform20", "popular20"}
    names = [row.system for row in ranked if row.candidates == "uniform20"]
    assert names[:2] == ["popularity", "cooccurrence"]
    assert {*systems, "lm", "sft", "s-dpo"} <= set(names)
    by_chance = {row.metrics["hr@1"] for row in ranked if row.system in ("popularity", "cooccurrence")}
    assert by_chance == {pytest.approx(1 / 20)}  # all tie: expected rank


def test_they_are_looked_for_in_the_whole_catalog(log, make_run):
    small = {"rows": "uniform60", "cascade_rows": "uniform20", "joined_rows": "uniform40", "retrieved": 60}
    run = make_run(
        "TASK=next",
        "CRM=retriever-lm din-lm",
        "SYSTEM=none",
        next={**small, "baselines": ["popularity", "ease"]},
        bootstrap=20,
    )
    evaluation = NextEvaluation.open(run)
    rows = next_items(evaluation)
    alone = ["popularity", "ease", "popularity-by-category", "text-knn", "retriever-lm"]
    assert [row.system for row in rows][:5] == alone
    assert [row.system for row in rows][5:] == [*alone, "retriever-lm+din-lm"]
    for row in rows:
        assert row.metrics["rows/cold"] == row.rows
        assert row.split == "items"
    recall = {row.system: row.metrics["recall@60"] for row in rows[:5]}
    assert recall["popularity"] == recall["ease"] == 0.0  # an item without an event is not recommended
    assert recall["text-knn"] > 0
    assert recall["retriever-lm"] > 0
