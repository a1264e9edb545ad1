"""An evaluation of everything: who stands in which table, under what name, beside whom."""

import dataclasses

import pytest

from recllm.evaluation.context import Evaluation
from recllm.evaluation.ctr import alignment_cost, ctr
from recllm.evaluation.ranking import ranking
from recllm.pipeline.stage_file import Group, Role
from recllm.systems.system import Kind
from tests.systems.finished_demo import CRMS_ALONE, SWEEP, FinishedDemo


@pytest.fixture
def make_evaluation(demo_log, demo_config, tiny_lm, tmp_path, monkeypatch):
    """`make_evaluation(words)` -> the evaluation that a command asks for, of stages made for it."""

    def make(words):
        monkeypatch.setenv("RECLLM_ARTIFACTS", str(tmp_path))
        demo = FinishedDemo(tmp_path / "demo", demo_log, demo_config, tiny_lm, words)
        return Evaluation.open(demo.run())

    return make


def lines(rows):
    """Of each row what tells it from others, and what it is compared with first."""
    return [(row.system, row.stage, row.k, row.lm, row.paired_with) for row in rows]


def test_every_system_stands_where_it_belongs(new_run):
    evaluation = Evaluation.open(new_run())
    rows = ctr(evaluation)
    everywhere = [row for row in rows if row.row_set == "test/all"]
    assert lines(everywhere) == [
        ("popularity", "none", None, None, None),
        ("din", "stage1", None, None, "popularity"),
        ("sim", "stage1", None, None, "din"),
        ("sim-heldout", "stage1", None, None, "popularity"),
    ]
    beside = rows[len(everywhere) :]
    assert {row.row_set for row in beside} == {"test/uniform60"}
    assert lines(beside[4:]) == [
        ("lm", "lm", None, "tiny", "sim"),
        ("lora", "stage2", None, "tiny", "sim"),
        ("reclora", "stage2", None, "tiny", "lora"),
        ("ctr-bert", "stage2", None, "tiny", "sim"),
        ("refit", "none", None, None, "sim"),
        ("blend", "none", None, "tiny", "sim"),
        ("blend-refit", "none", None, "tiny", "sim"),
    ]
    sim = beside[2]
    assert [row.crm_auc_same_rows for row in beside] == [None] * 4 + [sim.metrics["auc"]] * 7
    read = {row.system: row.metrics.get("ratings_as_text") for row in beside}
    assert {name: count for name, count in read.items() if count is not None} == {
        "lm": 600.0, "lora": 600.0, "reclora": 600.0, "ctr-bert": 700.0,
    }  # fmt: skip
    tuned = [row.system for row in beside if "tuning_rows" in row.metrics]
    assert tuned == ["lora", "reclora", "ctr-bert"]
    assert [row.system for row in beside if "text_loss" in row.metrics] == ["lm", "lora", "reclora"]

    cost = alignment_cost(evaluation)
    assert lines(cost) == [
        ("sft", "stage2", None, "tiny", None),
        ("sft-pointwise", "stage2", None, "tiny", None),
        ("sft-continued", "stage3", None, "tiny", "sft"),
        ("s-dpo", "stage3", 7, "tiny", "sft"),
        ("s-dpo-pointwise", "stage3", 3, "tiny", "sft-pointwise"),
    ]
    assert all(row.against == {} for row in cost)

    ranked = ranking(evaluation)
    assert [row.candidates for row in ranked] == ["uniform20"] * 13 + ["popular20"] * 13
    assert lines(ranked[:13]) == [
        ("popularity", "none", None, None, None),
        ("cooccurrence", "none", None, None, "popularity"),
        ("cooccurrence-directed", "none", None, None, "popularity"),
        ("sim", "stage1", None, None, "popularity"),
        ("ctr-bert", "stage2", None, "tiny", "popularity"),
        ("crm-ranker", "stage1", None, None, "popularity"),
        ("lm", "lm", None, "tiny", "popularity"),
        ("lora", "stage2", None, "tiny", "lm"),
        ("sft", "stage2", None, "tiny", "lm"),
        ("sft-continued", "stage3", None, "tiny", "sft"),
        ("s-dpo", "stage3", 7, "tiny", "sft"),
        ("s-dpo-pointwise", "stage3", 3, "tiny", "sft-pointwise"),
        ("sft-pointwise", "stage2", None, "tiny", "lm"),
    ]
    writing = [row.system for row in ranked[:13] if "valid_ratio" in row.metrics]
    assert writing == ["lm", "lora", "sft", "sft-continued", "s-dpo"]


def test_where_nothing_is_aligned_no_system_is_called_by_what_starts_there(new_run):
    run = new_run()
    del run.parents[Role.START]
    run.systems[Group.ALIGNED] = {}
    evaluation = Evaluation.open(run)
    assert evaluation.lms.start is evaluation.lms.tuned[0]
    assert [system.name for system in evaluation.lms.ranking[:2]] == ["lm", evaluation.lms.start.name]
    assert "sft" not in [system.name for system in evaluation.lms.ranking]
    assert alignment_cost(evaluation) == []


def test_what_is_aligned_is_compared_with_its_own_start(new_run):
    """A file of stage 3 may name another start than the table's."""
    run = new_run()
    lora = run.systems[Group.TUNED]["lora"].name
    for name in ("s-dpo-k7", "s-dpo-pointwise"):
        finished = run.systems[Group.ALIGNED][name]
        parents = {**finished.file.parents, Role.START: lora}
        file = dataclasses.replace(finished.file, parents=parents)
        run.systems[Group.ALIGNED][name] = dataclasses.replace(finished, file=file)
    evaluation = Evaluation.open(run)
    assert lines(alignment_cost(evaluation)) == [
        ("sft", "stage2", None, "tiny", None),
        ("sft-lora", "stage2", None, "tiny", None),
        ("sft-pointwise-lora", "stage2", None, "tiny", None),
        ("sft-continued", "stage3", None, "tiny", "sft"),
        ("s-dpo", "stage3", 7, "tiny", "sft-lora"),
        ("s-dpo-pointwise", "stage3", 3, "tiny", "sft-pointwise-lora"),
    ]
    assert lines(ranking(evaluation))[7:13] == [
        ("sft-lora", "stage2", None, "tiny", "lm"),
        ("sft", "stage2", None, "tiny", "lm"),
        ("sft-continued", "stage3", None, "tiny", "sft"),
        ("s-dpo", "stage3", 7, "tiny", "sft-lora"),
        ("s-dpo-pointwise", "stage3", 3, "tiny", "sft-pointwise-lora"),
        ("sft-pointwise-lora", "stage2", None, "tiny", "lm"),
    ]
    made_by = {system.name: system.finished.name for system in evaluation.lms.starts}
    assert made_by == {
        "sft": evaluation.lms.start.finished.name,
        "sft-lora": lora,
        "sft-pointwise-lora": lora,
    }


def test_each_lm_is_opened_once_a_task(new_run, monkeypatch):
    evaluation = Evaluation.open(new_run())
    open_lm = evaluation.lms.untuned.open_lm
    loaded = []
    load, load_untuned = open_lm._load, open_lm._load_untuned

    def loads(stage, adapter):
        loaded.append(f"{stage.name.partition('/')[2]} {adapter}")
        return load(stage, adapter)

    def loads_untuned():
        loaded.append("lm")
        return load_untuned()

    monkeypatch.setattr(open_lm, "_load", loads)
    monkeypatch.setattr(open_lm, "_load_untuned", loads_untuned)
    ranking(evaluation)
    aligned = ["sft-continued adapter", "s-dpo-k7 adapter", "s-dpo-pointwise adapter", "reclora adapter"]
    assert loaded == ["lm", "lora adapter-ranking", "reclora adapter-ranking", *aligned]
    ranking(evaluation)
    assert len(loaded) == 7  # all is kept


def test_at_a_value_of_a_sweep_nothing_is_measured_that_is_the_same_at_all(make_evaluation):
    evaluation = make_evaluation(SWEEP)
    rows = ctr(evaluation)
    assert {row.row_set for row in rows} == {"test/uniform60"}
    assert [(row.system, row.paired_with) for row in rows] == [
        ("popularity", None),
        ("sim", "popularity"),
        ("sim-heldout", "popularity"),
        ("lora+num_meta-2", "sim"),
        ("reclora+num_meta-2", "lora+num_meta-2"),
        ("refit+num_meta-2", "sim"),
        ("blend+num_meta-2", "sim"),
        ("blend-refit+num_meta-2", "sim"),
    ]
    assert list(evaluation.config.candidates) == []
    assert not evaluation.aligned
    tuned = [row.metrics for row in rows if "forgotten" in row.metrics]
    assert len(tuned) == 2  # against the untuned LM, which has no row here


def test_logs_with_repeats_have_a_row_of_what_was_met_before(make_evaluation, monkeypatch):
    evaluation = make_evaluation(CRMS_ALONE)
    monkeypatch.setitem(evaluation.log.meta, "repeats", 1)
    for table in (ctr(evaluation), ranking(evaluation)):
        assert [row.system for row in table][:2] == ["popularity", "met-before"]


def test_crms_are_compared_without_any_lm(make_evaluation):
    evaluation = make_evaluation(CRMS_ALONE)
    assert (evaluation.lms, evaluation.towers, evaluation.stacked) == (None, [], [])
    rows = [*ctr(evaluation), *ranking(evaluation)]
    assert {row.system for row in rows if row.task == "ctr"} == {"popularity", "din", "sim"}
    counted = {"popularity", "cooccurrence", "cooccurrence-directed"}
    assert {row.system for row in rows if row.task == "ranking"} == {*counted, "sim"}
    assert all(row.lm is None and row.crm_auc_same_rows is None for row in rows)


def test_lms_stand_beside_a_crm_that_answers(new_run):
    """The one that gates, but for a ranker: then the last that is none."""
    evaluation = Evaluation.open(new_run())
    assert evaluation.beside is evaluation.gate_crm
    assert evaluation.gate_crm.name == "sim"
    assert evaluation.gate_crm.kind is Kind.CRM
    rankers = [system for system in evaluation.crms if system.crm.ranks]
    others = [system for system in evaluation.crms if not system.crm.ranks]
    fields = {"log": None, "lms": None, "towers": [], "run": evaluation.run, "gate_crm": rankers[0]}
    assert Evaluation(crms=evaluation.crms, **fields).beside is others[-1]
    assert Evaluation(crms=rankers, **fields).beside is None
