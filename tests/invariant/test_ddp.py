"""One process and two: the same scores to the bit, the same training, every row once, one writer."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tests.children import environment
from tests.plain_folders import plain_folders

pytestmark = pytest.mark.slow

EVALUATION = "evaluate/sim,reclora,s-dpo"
REPOSITORY = Path(__file__).parents[2]
# 20 steps of each stage, validated after each; no dropout; 301 validation rows cannot be dealt to two evenly.
SIZES = """
    stage1.crm.statistics=true
    lm.tiny.hidden=32 lm.tiny.layers=2 lm.tiny.heads=2 lm.tiny.intermediate=64 lm.tiny.vocabulary=1024
    lm.training.text_tokens=71680 lm.training.prompt_tokens=20000 retrieval.pca_dim=16 retrieval.svd_dim=16
    prepare.ranking_valid_rows=31 prepare.ranking_test_rows=31
    stage1.fit.epochs=0.13 stage1.fit.batch_size=256 stage1.fit.validations=20 stage1.fit.patience=100
    stage1.fit.valid_rows=uniform301 stage1.crm.dropout=0 stage1.crm.embedding_dropout=0
    stage1.crm.mask_users=0 stage1.crm.mask_items=0
    subsample=uniform480 stage2.fit.epochs=2 stage2.fit.batch_size=64 stage2.title_share=0.25
    stage2.fit.validations=20 stage2.fit.patience=100 stage2.fit.valid_rows=uniform301
    stage2.adapter.target_modules=[q_proj,v_proj,lm_head] stage2.gate_first=2
    stage3.rows=160 stage3.fit.batch_size=8 stage3.fit.validations=20 stage3.fit.patience=100
    trainer.accelerator=cpu trainer.threads=1
"""


def started_in(artifacts):
    """How a program is started that works there."""
    own = environment(RECLLM_ARTIFACTS=str(artifacts))
    return {"cwd": REPOSITORY, "env": own, "text": True, "capture_output": True}


def folder_of(plain):
    """Folder of a stage, by its name without the sizes."""
    return plain_folders(["stage3", "evaluate", "SYSTEM=reclora s-dpo", "CRM=sim"], SIZES.split())[plain]


def copied(single, artifacts, folder):
    """All artifacts but what a stage made and what is cached; the stage's folder."""
    shutil.copytree(single, artifacts, ignore=shutil.ignore_patterns("cache"))
    stage = artifacts / "demo" / folder
    for path in stage.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return stage


def check_cached(single, artifacts):
    """What was computed and kept is the same to the bit; how many arrays these are."""
    cached = list((artifacts / "demo" / "cache").glob("*.npy"))
    for path in cached:
        assert path.read_bytes() == (single / "demo" / "cache" / path.name).read_bytes(), path.name
    return len(cached)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Stages 1 to 3 and their evaluation, each by one process."""
    artifacts = tmp_path_factory.mktemp("single")
    words = ["SYSTEM=reclora s-dpo", "CRM=sim", "ARGS=" + " ".join(SIZES.split())]
    plan = [sys.executable, "-m", "stages.plan", "write", "stage3", "evaluate", *words[:2], *SIZES.split()]
    options = started_in(artifacts)
    planned = subprocess.run(plan, **options)
    assert planned.returncode == 0, planned.stderr
    target = artifacts / "demo" / folder_of(EVALUATION) / "manifest.json"
    make = ["make", "-f", planned.stdout.strip(), f"PYTHON={sys.executable}", str(target)]
    done = subprocess.run(make, **options, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return artifacts


def curve(folder):
    """The validation scores by step."""
    with (folder / "logs" / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = [name for name in rows[0] if name.startswith("valid/")]
    scored = [row for row in rows if row[names[0]]]
    return [int(row["step"]) for row in scored], torch.tensor(
        [[float(row[n]) for n in names] for row in scored]
    )


@pytest.mark.parametrize(
    ("folder", "strategy", "parts", "tokens"),
    [
        ("lm/tiny/text", "ddp", 1, 0),
        ("stage1/sim+heldout-0.1", "ddp", 1, 0),
        ("stage2/reclora", "ddp", 1, 0),
        ("stage3/s-dpo", "ddp", 1, 0),
        ("stage2/reclora", "sharded", 1, 0),
        ("stage3/s-dpo", "sharded", 1, 0),
        ("lm/tiny/text", "ddp", 3, 0),
        ("stage1/sim+heldout-0.1", "ddp", 3, 0),
        ("stage2/reclora", "sharded", 3, 0),
        ("stage2/reclora", "ddp", 1, 200),
        ("stage3/s-dpo", "sharded", 1, 200),
    ],
)
def test_two_processes_train_as_one(single, tmp_path, folder, strategy, parts, tokens):
    artifacts = tmp_path / "artifacts"
    kind = folder.partition("/")[0]
    folder = folder_of(folder)
    stage = copied(single, artifacts, folder)
    before = single / "demo" / folder
    keys = [
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        f"trainer.strategy={strategy}",
        f"trainer.accumulate={parts}",
        f"trainer.tokens_per_forward={tokens}",
        "trainer.threads=1",
    ]
    line = [sys.executable, "-m", "stages", str(stage), *keys]
    done = subprocess.run(line, **started_in(artifacts), timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    # One process speaks and writes.
    assert done.stdout.count(f"[{folder}] starts") == 1
    assert done.stdout.count(f"[{folder}] done") == 1
    assert done.stdout.count("2 layers sharded over 2 processes") == (strategy == "sharded")
    assert ("is cut into forwards of 200 at most" in done.stdout) == (tokens > 0)
    assert not list(stage.rglob("*.tmp*")) + list(stage.rglob("*.partial"))
    # Representations of 3 and 2 sets of rows, logits beside them; states of answers, references of 2 sets.
    assert check_cached(single, artifacts) >= {"stage2": 7, "stage3": 6}.get(kind, 0)
    one, two = (json.loads((f / "manifest.json").read_text()) for f in (before, stage))
    assert [output["path"] for output in one["outputs"]] == [output["path"] for output in two["outputs"]]
    # Scores after every step: a row counted twice, or a gradient that is no mean over the batch, would show.
    # (An untrained CRM scores ties but for rounding, which decides its AUC: its first steps are left out.)
    steps, wanted = curve(before)
    got_steps, got = curve(stage)
    assert got_steps == steps
    assert steps[-1] >= 20
    late = [place for place, step in enumerate(steps) if step > 4 or kind != "stage1"]
    torch.testing.assert_close(got[late], wanted[late], rtol=1e-4, atol=1e-4)
    # And the weights at the end.
    weights = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (before, stage)]
    assert weights[0]["global_step"] == weights[1]["global_step"]
    for name, value in weights[0]["state_dict"].items():
        torch.testing.assert_close(weights[1]["state_dict"][name], value, rtol=1e-4, atol=1e-4, msg=name)
    for path in before.glob("adapter/*.safetensors"):
        for name, value in load_file(path).items():
            got = load_file(stage / "adapter" / path.name)[name]
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4, msg=name)


def test_sharded_processes_with_unequal_validation_rows_wait_for_none(single, tmp_path):
    """257 rows are 129 and 128: two batches of one process, and the other's must be as many."""
    name = folder_of("stage2/reclora")
    curves = []
    for devices in (1, 2):
        artifacts = tmp_path / f"artifacts-{devices}"
        shutil.copytree(single, artifacts)
        stage = artifacts / "demo" / name
        content = OmegaConf.load(stage / "config.yaml")
        content.config.stage2.fit.valid_rows = "uniform257"
        content.config.stage2.fit.validations = 2
        content.config.stage2.fit.epochs = 0.3
        for path in stage.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        OmegaConf.save(content, stage / "config.yaml")
        keys = ["trainer.accelerator=cpu", f"trainer.devices={devices}", "trainer.threads=1"]
        if devices == 2:
            keys.append("trainer.strategy=sharded")
        line = [sys.executable, "-m", "stages", str(stage), *keys]
        options = started_in(artifacts)
        done = subprocess.run(line, **options, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        curves.append(curve(stage))
    (steps, wanted), (got_steps, got) = curves
    assert steps == got_steps
    assert len(steps) == 3
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_two_processes_evaluate_as_one(single, tmp_path):
    artifacts = tmp_path / "artifacts"
    stage = copied(single, artifacts, folder_of(EVALUATION))
    keys = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.threads=1"]
    line = [sys.executable, "-m", "stages", str(stage), *keys]
    options = started_in(artifacts)
    done = subprocess.run(line, **options, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("done in") == 1
    assert check_cached(single, artifacts) > 30
    one, two = (
        json.loads((root / "demo" / folder_of(EVALUATION) / "rows.json").read_text())
        for root in (single, artifacts)
    )
    for row in (*one, *two):
        del row["date"]
    assert one == two


@pytest.mark.parametrize("starter", ["torchrun", "environment"])
def test_two_machines_train_as_one(single, tmp_path, starter):
    """Both are this one: the stage is started twice, and what it says is said by the first."""
    artifacts = tmp_path / "artifacts"
    folder = folder_of("stage2/reclora")
    stage = copied(single, artifacts, folder)
    words = [str(stage), "trainer.accelerator=cpu", "trainer.num_nodes=2", "trainer.threads=1"]
    port = str(find_free_network_port())
    started = []
    for node in range(2):
        own = environment(RECLLM_ARTIFACTS=str(artifacts))
        line = [sys.executable, "-m", "stages", *words]
        if starter == "torchrun":
            meeting = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}"]
            meeting += ["--master-addr=127.0.0.1", f"--master-port={port}"]
            line = [sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "stages", *words]
        else:
            own |= {"NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(line, cwd=REPOSITORY, env=own, **pipes))
    said = [process.communicate(timeout=900) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert said[0][0].count(f"[{folder}] done") == 1
    assert f"[{folder}]" not in said[1][0]
    assert check_cached(single, artifacts) >= 7
    steps, wanted = curve(single / "demo" / folder)
    got_steps, got = curve(stage)
    assert got_steps == steps
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    manifests = [json.loads((f / "manifest.json").read_text()) for f in (single / "demo" / folder, stage)]
    assert manifests[0]["config_sha256"] == manifests[1]["config_sha256"]
