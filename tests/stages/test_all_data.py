"""Stages on all data: they train once more, on more rows, as far as validation chose."""

import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from recllm import paths
from recllm.crm import load
from recllm.eventlog.all_data import write_all_data
from recllm.eventlog.log import EventLog
from recllm.pipeline.finished import Finished
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.systems.crm import crm_inputs
from stages import retriever, stage2, stage3
from tests.stages.test_retriever import configured
from tests.systems.finished_demo import FinishedDemo


@pytest.fixture
def train(make_stage, monkeypatch):
    """`train(log, name, parents)` -> the metrics of a retriever of that log."""

    def start(log, name, parents):
        monkeypatch.setattr(retriever, "data", lambda run: crm_inputs(log, run.config.stage1.inputs, None))
        config = {"stage1": asdict(configured(**{"fit.lr": 3e-3}))["stage1"], "seed": 0}
        run = Run.start([str(make_stage(name, config, parents)), "trainer.accelerator=cpu"])
        retriever.work(run)
        run.close()
        return run

    return start


def metrics(run):
    return Finished.open(run.folder).manifest.metrics


@pytest.fixture
def demo(tmp_path, monkeypatch, demo_log, demo_config, tiny_lm):
    """Finished stages of a cascade and of all that `ALL_DATA=1` makes once more."""
    monkeypatch.setenv("RECLLM_ARTIFACTS", str(tmp_path / "artifacts"))
    words = ("cascade", "CRM=sim", "SYSTEM=s-dpo", "ALL_DATA=1", "cascade.first=popularity", "subsample=0.1",
             "stage3.rows=24", "stage3.fit.batch_size=8", "stage3.fit.validations=1")  # fmt: skip
    return FinishedDemo(tmp_path / "artifacts" / "demo", demo_log, demo_config, tiny_lm, words)


def make_again(demo, stage, work):
    """Make a stage on all data by its own code: what validation chose in the plain one is given."""
    (folder,) = (folder for folder in (demo.root / stage).iterdir() if folder.name.endswith("all-data"))
    (folder / paths.MANIFEST).unlink()
    shutil.rmtree(folder / paths.ADAPTER)
    run = Run.start([str(folder), "trainer.accelerator=cpu"])
    work(run)
    run.close()
    return folder


def test_stages_2_and_3_train_once_more_on_all_samples(demo, demo_log):
    folder = make_again(demo, "stage2", stage2.work)
    finished = Finished.open(folder)
    figures = finished.manifest.metrics
    whole = EventLog.open(finished.parent(Role.LOG).folder)
    assert figures["rows"] == len(whole.rows("train", "0.1")) > len(demo_log.rows("train", "0.1"))
    # Half of the steps for Yes, all of them for titles: two adapters, nothing validated.
    assert figures["step"] == round(figures["steps"] / 2) < figures["ranking"]["step"] == figures["steps"]
    assert not any(name.startswith(("valid/", "crm_auc_on_valid")) for name in figures)
    one, other = (
        load_file(folder / name / "adapter_model.safetensors")
        for name in (paths.ADAPTER, paths.RANKING_ADAPTER)
    )
    assert any(not torch.equal(one[name], other[name]) for name in one)
    aligned = Finished.open(make_again(demo, "stage3", stage3.work)).manifest.metrics
    assert aligned["step"] == round(aligned["steps"] / 2)
    assert aligned["gained"]


def test_a_retriever_trains_once_more_on_all_events(train, demo_log, demo_config, tmp_path):
    write_all_data(demo_log, tmp_path / "whole", demo_config.prepare)
    whole = EventLog.open(tmp_path / "whole")
    chosen = train(demo_log, "stage1/retriever", {})
    again = train(whole, "stage1/retriever+all-data", {"chosen": "stage1/retriever"})
    of_chosen, of_again = metrics(chosen), metrics(again)
    # Every event but a user's first one is to be found.
    users = len(set(whole.user[: whole.n_events].tolist()))
    assert of_again["rows"] == whole.n_events - users > of_chosen["rows"]
    assert of_again["items"] == (whole.item_count > 0).sum() > of_chosen["items"]
    share = of_chosen["step"] / of_chosen["steps"]
    assert of_again["step"] == round(share * of_again["steps"])
    assert "valid/ndcg@10" in of_chosen
    assert not any(name.startswith("valid/") for name in of_again)
    assert load(again.export).config.name == "retriever"
