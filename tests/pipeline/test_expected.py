"""What a command is expected to take: work by hand arithmetic, rates by what finished on such a processor."""

import json

import pytest

from recllm.config.request import parse
from recllm.pipeline.expected import Expected, ahead, rates, told
from recllm.pipeline.graph import Plan
from recllm.pipeline.makefile import write
from recllm.pipeline.manifest import processor
from recllm.pipeline.stage_file import Group
from recllm.pipeline.workload import Workload, workload
from tests.stages.plans import finish

LOG = {"train": 1000, "test": 200}
LM = {"model": {"name": "tiny"}, "training": {"text_tokens": 700, "prompt_tokens": 900}}


@pytest.mark.parametrize(
    ("stage", "config", "wanted"),
    [
        (
            "stage1",
            {"stage1": {"crm": {"name": "din"}, "newest": {"share": 0.25}, "fit": {"epochs": 1.5}}},
            ("stage1 din", 1750),
        ),
        (
            "tune",
            {
                "stage1": {"crm": {"name": "din"}, "newest": {"share": 0.0}, "fit": {"epochs": 2.0}},
                "tune": {"trials": 3},
            },
            ("tune din", 6000),
        ),
        (
            "stage2",
            {
                "lm": LM,
                "subsample": "last200",
                "stage2": {"adapter": {"kind": "lora"}, "mixed_prompts": True, "fit": {"epochs": 3.0}},
            },
            ("stage2 tiny lora", 2 * 3 * 200),
        ),
        ("stage3", {"lm": LM, "stage3": {"rows": 40, "fit": {"epochs": 2.0}}}, ("stage3 tiny", 80)),
        ("evaluate", {"lm": LM, "evaluate": {"ctr_rows": "uniform50"}}, ("evaluate tiny", 50 * 4)),
        # `auto` is all of a small log.
        ("evaluate", {"lm": LM, "evaluate": {"ctr_rows": "auto"}}, ("evaluate tiny", 200 * 4)),
        ("lm-text", {"lm": LM}, ("lm-text tiny", 700)),
        ("lm-prompts", {"lm": LM}, ("lm-prompts tiny", 900)),
        ("neighbors", {"lm": LM}, ("neighbors tiny", 1000)),
        ("log", {}, ("log", 1000)),
    ],
)
def test_what_a_stage_has_to_do(stage, config, wanted):
    assert workload(
        stage, config, LOG, {Group.CRMS: ["sim"], Group.TUNED: ["a", "b"], Group.ALIGNED: "cd"}
    ) == (Workload(*wanted))


def test_what_a_download_takes_nobody_knows():
    assert workload("tables", {}, LOG) is None
    # CRMs alone are asked of all rows, and in no time beside LMs: a kind of its own.
    crms = {Group.CRMS: ["din", "sim"], Group.TUNED: []}
    config = {"lm": LM, "evaluate": {"ctr_rows": "uniform50"}}
    assert workload("evaluate", config, LOG, crms) == Workload("evaluate", 2 * 200)
    assert workload("stage1", {"stage1": {}}, {}) is None


def manifest(folder, **figures):
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(figures))


def test_the_last_one_of_a_kind_on_such_a_processor_says_the_rate(tmp_path):
    own = {"kind": "stage1 din", "amount": 100.0, "hardware": f"{processor()}, some GPU"}
    manifest(tmp_path / "a" / "stage1" / "din", **own, seconds=50.0, finished="2024-01-01")
    manifest(tmp_path / "b" / "stage1" / "din", **own, seconds=20.0, finished="2024-02-01")
    elsewhere = own | {"hardware": "another processor"}
    manifest(tmp_path / "c" / "stage1" / "din", **elsewhere, seconds=1.0, finished="2024-03-01")
    manifest(tmp_path / "d" / "stage1" / "sim", hardware=processor(), seconds=1.0, finished="2024-03-01")
    assert rates(tmp_path) == {"stage1 din": 0.2}


def test_what_is_told():
    lines = told([Expected("stage1/din", 65.0), Expected("stage2/reclora", 7200.0), Expected("log", None)], 2)
    assert lines == [
        "3 stages to run, 2 are done, about 2 h 01 min one after another "
        "and 1 of which nothing like it has run here yet",
        "  stage1/din      about 65 s",
        "  stage2/reclora  about 2 h 00 min",
        "  log             ?",
    ]
    assert told([], 5) == []


def test_a_plan_knows_what_is_ahead(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLLM_ARTIFACTS", str(tmp_path))
    first = Plan(parse(["stage1", "CRM=din"]))
    write(first)
    expected, done = ahead(first)
    assert {stage.seconds for stage in expected} == {None}
    assert done == 0
    finish(first)
    assert ahead(Plan(parse(["stage1", "CRM=din"]))) == ([], 3)

    def finished(folder, **figures):
        path = tmp_path / "demo" / folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hardware": processor()} | figures))

    finished("log", metrics={"train": 1000})
    passes = Plan(parse(["stage1", "CRM=din"])).nodes["stage1/din"].config["stage1"]["fit"]["epochs"]
    finished("stage1/din", kind="stage1 din", amount=1000.0 * passes, seconds=30.0)
    # A second seed is as much work as the first.
    expected, done = ahead(Plan(parse(["stage1", "CRM=din", "SEED=1"])))
    assert expected == [Expected("stage1/din+s1", pytest.approx(30.0))]
    assert done == 2
