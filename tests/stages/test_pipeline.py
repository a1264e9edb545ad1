"""The whole pipeline on the demo, tiny, by `make`: done once, it is done; killed anywhere, it goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recllm.evaluation.stacking import CONTROLS
from tests.children import environment
from tests.plain_folders import plain_folders

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
STORIES = REPOSITORY.parent / "shared" / "models" / "stories260k"
SIZES = """
    stage1.crm.statistics=true
    lm.tiny.hidden=32 lm.tiny.layers=2 lm.tiny.heads=2 lm.tiny.intermediate=64 lm.tiny.vocabulary=1024
    lm.training.text_tokens=30000 lm.training.prompt_tokens=30000 retrieval.pca_dim=16 retrieval.svd_dim=16
    stage1.fit.epochs=0.3 stage1.rank_rows=640 stage1.fit.validations=2 stage1.fit.valid_rows=uniform300
    stage2.adapter.target_modules=[q_proj,v_proj,lm_head] stage2.gate_first=1
    stage2.fit.epochs=1 stage2.fit.validations=2 stage2.fit.valid_rows=uniform100 subsample=0.02
    stage3.rows=160 stage3.fit.batch_size=8 stage3.fit.validations=2
    prepare.ranking_valid_rows=30 prepare.ranking_test_rows=30
    evaluate.ctr_rows=uniform300 evaluate.aligned_rows=uniform300 evaluate.ranking_rows=30
    evaluate.generate_rows=5 evaluate.bootstrap=50
    evaluate.blend_rows=uniform100 evaluate.candidates=[uniform20,popular20,hard20]
    trainer.threads=1 trainer.accelerator=cpu trainer.checkpoint_every=1
"""
ARGS = "ARGS=" + " ".join(SIZES.split())


def command(artifacts, *words):
    own = environment(RECLLM_ARTIFACTS=str(artifacts))
    line = ["make", f"PYTHON={sys.executable}", *words, ARGS]
    options = {"cwd": REPOSITORY, "env": own, "text": True, "stderr": subprocess.STDOUT}
    return line, options


def make(artifacts, *words):
    line, options = command(artifacts, *words)
    done = subprocess.run(line, stdout=subprocess.PIPE, timeout=1500, **options)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def metrics(artifacts):
    root = artifacts / "demo"
    return {str(p.parent.relative_to(root)): json.loads(p.read_text()) for p in root.rglob("metrics.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Artifacts of an uninterrupted run of the plain command."""
    artifacts = tmp_path_factory.mktemp("whole")
    make(artifacts, "stage1", "stage2", "stage3")
    return artifacts


def test_every_stage_is_finished_and_the_table_holds_every_system(finished):
    root = finished / "demo"
    made = {str(path.parent.relative_to(root)) for path in root.rglob("manifest.json")}
    folders = plain_folders(["stage1", "stage2", "stage3"], SIZES.split())
    assert set(folders) == {
        "tables", "log", "lm/tiny/text", "lm/tiny/prompts", "neighbors/both",
        "stage1/din", "stage1/sim", "stage1/sim+heldout-0.1", "stage1/ranker",
        "stage2/lora", "stage2/reclora",
        "stage3/sft-continued", "stage3/dpo", "stage3/s-dpo", "evaluate/all",
    }  # fmt: skip
    assert made == set(folders.values())
    rows = json.loads((root / "results.json").read_text())
    rows = rows["rows"] if isinstance(rows, dict) else rows
    systems = {task: {row["system"] for row in rows if row["task"] == task} for task in ("ctr", "ranking")}
    assert systems["ctr"] >= {"popularity", "din", "sim", "lm", "lora", "reclora", *CONTROLS}
    controls = {row["system"]: row for row in rows if row["system"] in CONTROLS}
    assert {(row["stage"], row["paired_with"], row["row_set"]) for row in controls.values()} == {
        ("none", "sim", "test/uniform300")
    }
    assert {name: row["lm"] for name, row in controls.items()} == {
        "refit": None, "blend": "tiny", "blend-refit": "tiny"
    }  # fmt: skip
    changed = {row["system"]: row["metrics"] for row in rows if "text_loss" in row["metrics"]}
    assert set(changed) == {"lm", "lora", "reclora"}
    for system in ("lora", "reclora"):
        rise = changed[system]["text_loss"] - changed["lm"]["text_loss"]
        assert changed[system]["forgotten"] == pytest.approx(rise, abs=1e-12)
        assert changed[system]["update"] > 0
    counted = {"popularity", "cooccurrence", "cooccurrence-directed"}
    assert systems["ranking"] >= counted | {"sim", "crm-ranker", "lm", "sft", "sft-continued", "dpo", "s-dpo"}
    lists = {row["candidates"] for row in rows if row["task"] == "ranking"}
    assert lists == {"uniform20", "popular20", "hard20"}
    assert (root / "report.html").stat().st_size > 1000


def test_the_same_command_again_does_nothing(finished):
    root = finished / "demo"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("manifest.json")}
    out = make(finished, "stage1", "stage2", "stage3")
    assert "starts" not in out
    assert {path: path.stat().st_mtime_ns for path in root.rglob("manifest.json")} == before


def test_execution_keys_remake_nothing(finished):
    root = finished / "demo"
    before = {path: path.read_text() for path in root.rglob("manifest.json")}
    line, options = command(finished, "stage1", "stage2")
    line[-1] += " trainer.checkpoint_every=7"
    out = subprocess.run(line, stdout=subprocess.PIPE, timeout=600, **options).stdout
    assert "starts" not in out
    assert {path: path.read_text() for path in root.rglob("manifest.json")} == before


@pytest.mark.parametrize(
    ("folder", "goal"),
    [
        ("lm/tiny/text", "stage1"),
        ("stage1/sim", "stage1"),
        ("stage2/reclora", "stage2"),
        ("stage3/s-dpo", "stage3"),
    ],
)
def test_killed_in_training_it_resumes_and_ends_the_same(finished, tmp_path, folder, goal):
    artifacts = tmp_path / "artifacts"
    shutil.copytree(finished, artifacts)
    folder = plain_folders(["stage1", "stage2", "stage3"], SIZES.split())[folder]
    stage = artifacts / "demo" / folder
    shutil.rmtree(stage)
    line, options = command(artifacts, goal)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        deadline = time.monotonic() + 300
        while not (stage / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None, "the stage ended without a checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (stage / "manifest.json").exists()
    out = make(artifacts, goal)
    assert f"[{folder}] resumes at step " in out
    assert metrics(artifacts)[folder] == metrics(finished)[folder]
    name = "logs/metrics.csv"
    assert (stage / name).read_text() == (finished / "demo" / folder / name).read_text()
    # The same weights (PEFT's own files beside them name the folder of the LM, which is another one here).
    made = []
    for root in (artifacts, finished):
        manifest = json.loads((root / "demo" / folder / "manifest.json").read_text())
        made.append([o for o in manifest["outputs"] if o["path"].endswith((".safetensors", "metrics.json"))])
    assert made[0] == made[1]
    assert len(made[0]) >= 2


def test_points_of_a_sweep_stand_beside_one_another_and_are_made_once(finished, tmp_path):
    artifacts = tmp_path / "artifacts"
    shutil.copytree(finished, artifacts)
    words = ("sweep", "KEY=stage2.adapter.num_meta", "VALUES=2 3", "SYSTEM=reclora")
    out = make(artifacts, *words)
    started = [line.split()[0].strip("[]") for line in out.splitlines() if line.endswith(" starts")]
    made = [re.sub(r"\+(args|measure)-\w+", "", folder) for folder in started]
    points = [f"{stage}/reclora+num_meta-{count}" for stage in ("stage2", "evaluate") for count in (2, 3)]
    assert sorted(made) == sorted(points)
    assert " starts" not in make(artifacts, *words)
    rows = json.loads((artifacts / "demo/results.json").read_text())
    assert {row["row_set"] for row in rows} == {"test/uniform300"}
    metrics = {row["system"]: row["metrics"] for row in rows}
    assert (
        metrics["reclora+num_meta-3"]["tuning_trainable"] > metrics["reclora+num_meta-2"]["tuning_trainable"]
    )
    assert metrics["reclora+num_meta-3"]["tuning_tokens"] > 0
    assert "<h2>Sweeps</h2>" in (artifacts / "demo/report.html").read_text()
    # The plain command's folders are as they were.
    assert " starts" not in make(artifacts, "stage1", "stage2", "stage3")


def test_another_lm_by_path_goes_through_all_stages(finished, tmp_path):
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there")
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    shutil.copytree(
        finished / "demo", artifacts / "demo", ignore=shutil.ignore_patterns("stage*", "evaluate")
    )
    make(artifacts, "stage3", f"LM={STORIES}", "CRM=sim", "SYSTEM=reclora s-dpo")
    done = metrics(artifacts)
    tuned = [folder for folder in done if folder.startswith("stage2/reclora+stories260k-")]
    aligned = [folder for folder in done if folder.startswith("stage3/s-dpo+stories260k-")]
    assert len(tuned) == len(aligned) == 1
    assert 0 < done[tuned[0]]["valid/auc"] < 1
    rows = json.loads((artifacts / "demo" / "results.json").read_text())
    rows = rows["rows"] if isinstance(rows, dict) else rows
    assert {row["lm"] for row in rows if row["system"] == "s-dpo"} == {tuned[0].split("+")[1]}


def test_a_bundle_of_models_that_were_trained_on_all_data(finished, tmp_path):
    artifacts = tmp_path / "artifacts"
    shutil.copytree(finished, artifacts)
    line, options = command(artifacts, "bundle", "SYSTEM=s-dpo", "ALL_DATA=1")
    line[-1] += " cascade.retrieved=40 cascade.ranked=6 cascade.valid_rows=200"
    done = subprocess.run(line, stdout=subprocess.PIPE, timeout=1500, **options)
    assert done.returncode == 0, done.stdout[-3000:]
    (bundle,) = (artifacts / "demo" / "bundle").iterdir()
    assert bundle.name.endswith("+all-data")
    made = metrics(artifacts)
    again = {folder: figures for folder, figures in made.items() if folder.endswith("+all-data")}
    repeated = [folder for folder in again if folder.startswith("stage")]
    assert {folder.partition("/")[0] for folder in repeated} == {"stage1", "stage2", "stage3"}
    for folder in repeated:
        chosen = made[folder.removesuffix("+all-data")]
        share = chosen["step"] / chosen["steps"]
        assert again[folder]["step"] == (max(1, round(share * again[folder]["steps"])) if share else 0)
        if folder.startswith("stage1"):
            assert again[folder]["rows"] > chosen["rows"]
        assert not any(name.startswith("valid/") for name in again[folder])
    assert "No test figure is of these models" in (bundle / "README.md").read_text()
