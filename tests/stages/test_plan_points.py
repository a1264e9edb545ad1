"""The plan of a sweep: which folders its points have, and which they share."""

import os
import subprocess
from pathlib import Path

import pytest

from stages import plan
from tests.stages.plans import needed

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("root")
FEW = ("KEY=subsample", "VALUES=0.001 0.01 0.1")


def test_few2many_shares_the_lm_the_gate_and_the_test_rows():
    nodes = needed("report", *FEW)
    plain = needed("report")["evaluate/all"].config["evaluate"]
    points = ("subsample-0.001", "subsample-0.01", "subsample-0.1")
    assert set(nodes) == {
        "tables", "log", "lm/tiny/text", "neighbors/both", "lm/tiny+answers-0.001/text",
        "lm/tiny+answers-0.001/prompts", "stage1/sim", "stage1/sim+heldout-0.1",
        *(f"stage2/{system}+{point}" for system in ("lora", "reclora") for point in points),
        *(f"evaluate/lora,reclora+{point}" for point in points),
    }  # fmt: skip
    for share, point in zip(("0.001", "0.01", "0.1"), points, strict=True):
        lora, reclora = nodes[f"stage2/lora+{point}"], nodes[f"stage2/reclora+{point}"]
        assert lora.config["subsample"] == reclora.config["subsample"] == share
        assert lora.config["stage2"]["adapter"]["kind"] == "lora"
        # One CRM that left out the largest subsample; the smaller ones lie in it.
        assert reclora.parents["stage1"].folder == "stage1/sim+heldout-0.1"
        assert reclora.parents["stage1"].config["stage1"]["hold_out"] == "0.1"
        assert lora.parents["lm"] is reclora.parents["lm"] is nodes["lm/tiny+answers-0.001/prompts"]
        evaluate = nodes[f"evaluate/lora,reclora+{point}"]
        assert evaluate.systems["tuned"]["lora"] is lora
        assert evaluate.systems["crms"]["sim"].folder == "stage1/sim"
        assert evaluate.file.sweep == {"key": "subsample", "value": share}
        rest = {key: value for key, value in evaluate.config["evaluate"].items() if key != "candidates"}
        assert rest == {key: value for key, value in plain.items() if key != "candidates"}
        assert evaluate.config["evaluate"]["candidates"] == []
    # The LM has read the answers of the smallest subsample only, and is else that of every other run.
    few, whole = (nodes[f"lm/tiny{name}/text"].config for name in ("+answers-0.001", ""))
    assert few["subsample"] == "0.001"
    assert few["lm"]["training"].pop("question_share") == 0
    assert whole["lm"]["training"].pop("question_share") > 0
    assert few["lm"] == whole["lm"]


def test_a_plain_run_knows_no_point():
    assert not any(node.file.sweep for node in needed("report").values())


def test_an_lm_that_has_read_no_answer_serves_all_points(tmp_path):
    (tmp_path / "model").mkdir()
    nodes = needed("stage2", *FEW, f"LM={tmp_path / 'model'}", "SYSTEM=lora")
    assert len([folder for folder in nodes if folder.startswith("lm/")]) == 1


@pytest.mark.parametrize(
    ("held", "own"),
    [("last30000", False), ("last8000", False), ("last7000", True), ("none", True), ("0.1", True)],
)
def test_an_lm_that_holds_out_every_point_serves_them_as_it_is(held, own):
    nodes = needed(
        "stage2", "KEY=subsample", "VALUES=last800 last8000", "SYSTEM=lora", f"lm.training.hold_out={held}"
    )
    said = "" if held == "none" else f"+training.hold_out-{held}"
    lm = f"lm/tiny+answers-last800{said}/prompts" if own else f"lm/tiny{said}/prompts"
    tuned = [nodes[f"stage2/lora{said}+subsample-last{n}"] for n in (800, 8000)]
    assert {node.parents["lm"].folder for node in tuned} == {lm}
    assert (f"lm/tiny{said}/prompts" in nodes) is not own


def test_a_larger_configured_subsample_keeps_its_gate():
    nodes = needed(
        "stage2", "SYSTEM=reclora", "KEY=subsample", "VALUES=uniform5 uniform10", "EXPERIMENT=quick"
    )
    gates = {folder for folder in nodes if folder.startswith("stage1/sim+")}
    assert gates == {"stage1/sim+heldout-uniform20000+quick"}
    assert "stage2/reclora+quick+subsample-uniform5" in nodes


def test_a_sweep_of_stage_2_makes_nothing_else_anew():
    words = ("SYSTEM=reclora", "KEY=stage2.adapter.num_meta", "VALUES=4 8", "SEED=0 1")
    nodes, plain = needed("evaluate", *words), needed("evaluate", "SEED=0 1")
    assert set(nodes) - set(plain) == {
        f"{stage}/reclora+num_meta-{count}{seed}"
        for stage in ("stage2", "evaluate") for count in (4, 8) for seed in ("", "+s1")
    }  # fmt: skip
    assert nodes["stage2/reclora+num_meta-8+s1"].config["stage2"]["adapter"]["num_meta"] == 8
    assert nodes["stage2/reclora+num_meta-8+s1"].parents["stage1"].folder == "stage1/sim+heldout-0.1+s1"


def test_a_sweep_of_the_prompt_reaches_stage_2_and_evaluation_but_not_the_lm():
    nodes = needed("evaluate", "KEY=prompt.history", "VALUES=3", "SYSTEM=tallrec")
    assert nodes["stage2/tallrec+history-3"].config["prompt"] == {
        **nodes["lm/tiny/prompts"].config["prompt"], "history": 3, "retrieved": False,
    }  # fmt: skip
    assert nodes["evaluate/tallrec+history-3"].config["prompt"]["history"] == 3
    assert nodes["lm/tiny/prompts"].config["prompt"]["history"] == 10


def test_a_sweep_of_stage_1_trains_the_gate_anew_at_each_point():
    nodes = needed("evaluate", "KEY=stage1.retrieved", "VALUES=5 9", "SYSTEM=reclora")
    tuned = nodes["stage2/reclora+stage1.retrieved-5"]
    assert tuned.parents["stage1"].folder == "stage1/sim+heldout-0.1+stage1.retrieved-5"
    assert tuned.parents["stage1"].config["stage1"]["retrieved"] == 5
    evaluate = nodes["evaluate/reclora+stage1.retrieved-9"]
    assert evaluate.parents["stage1"].folder == "stage1/sim+stage1.retrieved-9"
    assert evaluate.parents["stage1"].config["stage1"]["retrieved"] == 9


def test_a_value_out_of_range_is_refused_before_anything_is_written(root, capsys):
    assert plan.main(["write", "stage2", "KEY=stage2.adapter.num_meta", "VALUES=4 0"]) == 2
    assert "num_meta=0" in capsys.readouterr().err
    assert plan.main(["write", "stage3", "KEY=stage2.adapter.num_meta", "VALUES=4"]) == 2
    assert "make stage3" in capsys.readouterr().err
    assert plan.main(["write", "report", "KEY=stage2.adapter.num_meta", "VALUES=4", "SYSTEM=none"]) == 2
    assert "SYSTEM=none" in capsys.readouterr().err
    assert not root.parent.exists()


@pytest.mark.parametrize(
    ("words", "key", "values"),
    [
        (["few2many"], "subsample", "0.001 0.01 0.05 0.1"),
        (["few2many", "VALUES=uniform100 uniform200"], "subsample", "uniform100 uniform200"),
        (["sweep", "KEY=stage2.adapter.r", "VALUES=2 4"], "stage2.adapter.r", "2 4"),
    ],
)
def test_the_targets_are_a_report_of_points(words, key, values):
    environment = {**os.environ, "MAKEFLAGS": ""}
    command = ["make", "-n", "PYTHON=python", "SEED=0 1", *words]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY).stdout
    line = next(line for line in out.splitlines() if "stages.plan write" in line)
    for word in ("write report ", f'KEY="{key}"', f'VALUES="{values}"', 'SEED="0 1"'):
        assert word in line


def test_half_a_sweep_is_one_line():
    environment = {**os.environ, "MAKEFLAGS": ""}
    command = ["make", "PYTHON=python", "sweep", "KEY=stage2.adapter.r"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    assert done.returncode != 0
    assert "wanted KEY and VALUES" in done.stderr
