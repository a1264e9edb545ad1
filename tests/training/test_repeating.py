"""A training that goes as far as validation chose in another one, and selects nothing itself."""

import csv

import pytest
import torch

from recllm.errors import StageError
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import StageFile
from recllm.training.checkpoints import Selected, best, best_scores
from recllm.training.fit import fit
from tests.training.test_fit import FIT, INTERVAL, STEPS, Killed, Small, load, loaders, same

MONITORS = ["valid/auc", "valid/hr@1"]
TRAINER = ["trainer.accelerator=cpu", "trainer.checkpoint_every=2"]


def folder_of(root, name, parents):
    folder = root / "demo" / name
    folder.mkdir(parents=True, exist_ok=True)
    file = StageFile("stage1", "demo", name, "stages.stage1", parents, {"seed": 0})
    (folder / "config.yaml").write_text(file.text())
    return folder


def start(root, name, parents=None):
    return Run.start([str(folder_of(root, name, parents or {})), *TRAINER])


def train(run, module):
    try:
        return fit(run, module, loaders(), FIT, INTERVAL, MONITORS, first=True)
    finally:
        run.close()


@pytest.fixture
def chosen(tmp_path):
    """A finished training whose Yes is best at step 12 of 24, and whose order is best at step 24 or 6."""
    run = start(tmp_path, "stage1/sim")
    train(run, Small(scores=[0.1, 0.6, 0.7, 0.65, 0.5]))
    of_yes, of_order = (best_scores(run, monitor) for monitor in MONITORS)
    assert (of_yes["step"], of_order["step"]) == (12, 24)
    run.finish([best(run, monitor) for monitor in MONITORS], {"steps": STEPS, "ranking": of_order, **of_yes})
    return run


def again(root, **killed):
    run = start(root, "stage1/sim+all-data", {"chosen": "stage1/sim"})
    module = Small(**killed)
    trainer = train(run, module)
    return run, module, trainer


def test_over_the_same_rows_it_is_the_same_to_the_bit(chosen, tmp_path, capsys):
    run, module, trainer = again(tmp_path, kill_validation=0)  # nothing is validated, not even before
    assert trainer.global_step == 24
    out = capsys.readouterr().out
    assert "ends at step 12 (valid/auc) and 24 (valid/hr@1) of 24, as far as stage1/sim" in out
    for monitor, step in zip(MONITORS, (12, 24), strict=True):
        wanted = load(best(chosen, monitor))
        got = load(best(run, monitor))
        assert same(got["state_dict"], wanted["state_dict"])
        assert got["global_step"] == step
        assert best_scores(run, monitor) == {"step": step}
    with (run.folder / "logs" / "metrics.csv").open(newline="") as stream:
        curve = list(csv.DictReader(stream))
    assert not any(name.startswith("valid/") for name in curve[0])
    assert curve[-1]["step"] == "24"
    assert module.steps_done == list(range(24))


def test_killed_it_resumes_to_the_bit(chosen, tmp_path):
    with pytest.raises(Killed):
        again(tmp_path, kill_step=15)
    run, module, _ = again(tmp_path)
    assert module.steps_done[0] == 14
    for monitor in MONITORS:
        assert same(load(best(run, monitor))["state_dict"], load(best(chosen, monitor))["state_dict"])


def test_as_far_is_the_same_share_of_the_steps():
    selected = Selected(steps=24, best={"valid/auc": 12, "valid/hr@1": 24})
    assert selected.repeated(31) == {"valid/auc": 16, "valid/hr@1": 31}
    assert Selected(24, {"valid/auc": 0}).repeated(31) == {"valid/auc": 0}
    assert Selected(1000, {"valid/auc": 1}).repeated(31) == {"valid/auc": 1}


def test_where_no_update_was_better_none_is_made(chosen, tmp_path):
    chosen = start(tmp_path, "stage1/sim+other")
    chosen.finish([], {"steps": STEPS, "step": 0.0, "ranking": {"step": 0.0}})
    chosen.close()
    run = start(tmp_path, "stage1/sim+all-data", {"chosen": "stage1/sim+other"})
    module = Small()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    train(run, module)
    assert module.steps_done == []
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert best_scores(run, "valid/auc") == {"step": 0.0}


def test_what_says_nothing_of_its_steps_cannot_be_repeated(tmp_path):
    chosen = start(tmp_path, "stage1/sim")
    chosen.finish([], {"step": 3.0})
    chosen.close()
    run = start(tmp_path, "stage1/sim+all-data", {"chosen": "stage1/sim"})
    with pytest.raises(StageError, match="stage1/sim says nothing of its s"):
        train(run, Small())
