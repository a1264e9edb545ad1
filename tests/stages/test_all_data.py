"""Stage 1 on all data: the retriever trains once more, over more events, as far as validation chose."""

from dataclasses import asdict

import pytest

from recllm.crm import load
from recllm.eventlog.all_data import write_all_data
from recllm.eventlog.log import EventLog
from recllm.pipeline.run import Run
from recllm.systems.crm import crm_inputs
from stages import retriever
from tests.stages.test_retriever import configured


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
    from recllm.pipeline.finished import Finished

    return Finished.open(run.folder).manifest.metrics


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
