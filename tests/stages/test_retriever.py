"""Stage 1, the retriever: its losses by hand, what validation counts, what is to be found, and resuming."""

import csv
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from recllm.config.merge import load_yaml, merge
from recllm.crm import CrmConfig, Fields, build, load
from recllm.errors import ConfigError, StageError
from recllm.pipeline.run import Run
from recllm.systems.crm import crm_inputs
from stages import retriever
from stages.retriever import RetrieverModule, findable_rows, target_events
from tests.conftest import REPOSITORY

SMALL = {
    "stage1.crm.hidden": 16, "stage1.crm.layers": 1, "stage1.recent": 20, "stage1.fit.batch_size": 16,
    "stage1.fit.epochs": 2, "stage1.fit.validations": 3, "stage1.fit.valid_rows": "uniform200",
    "stage1.fit.patience": 100,
}  # fmt: skip
CANDIDATES = torch.tensor([2, 3, 5, 6])
COUNTS = torch.tensor([0, 0, 6, 1, 0, 2, 1, 0])


def configured(**keys):
    layers = [("retriever", load_yaml(REPOSITORY / "conf" / "stage1" / "retriever.yaml"))]
    return merge(layers, {**SMALL, **{f"stage1.{key}": value for key, value in keys.items()}})


@pytest.fixture
def module():
    """A retriever of eight items, four of them with a training event."""

    def make(**keys):
        torch.manual_seed(0)
        config = configured(**keys).stage1
        crm = CrmConfig(**{**asdict(config.crm), "embedding_std": 1.0})
        model = build(Fields((3,), (8,), 5, 0), crm)
        return RetrieverModule(model, config, 10, CANDIDATES, COUNTS, CANDIDATES)

    return make


@pytest.fixture
def run(make_stage, demo_log):
    """`run(name, **keys)` -> the run of a retriever on the demo's log, not trained yet."""

    def start(name="stage1/retriever", **keys):
        config = asdict(configured(**keys))
        folder = make_stage(name, {"stage1": config["stage1"], "seed": 0})
        return Run.start([str(folder), "trainer.accelerator=cpu", "trainer.checkpoint_every=2"])

    return start


def test_the_full_softmax_is_over_what_has_a_training_event(module):
    one = module()
    users = torch.randn(3, 16)
    target = torch.tensor([2, 6, 5])
    wanted = 0.0
    for n in range(3):
        scores = {int(item): (users[n] @ one.model.item.weight[item]).item() for item in CANDIDATES}
        total = sum(math.exp(score) for score in scores.values())
        wanted += math.log(total) - scores[int(target[n])]
    assert one._full(users, target).item() == pytest.approx(wanted, rel=1e-5)


def test_the_sampled_softmax_estimates_the_full_one(module):
    one = module(**{"next.full_softmax": 0, "next.sampled": 400_000})
    assert one.samples
    users = torch.randn(3, 16) / 2
    target = torch.tensor([2, 6, 5])
    # The sum has 400,000 terms: its relative error is of the order of 1 / sqrt(400,000).
    torch.testing.assert_close(one._sampled(users, target), one._full(users, target), rtol=0.02, atol=0.02)


def test_what_is_drawn_is_half_uniform_and_half_by_how_often_it_is_found(module):
    one = module(**{"next.full_softmax": 0})
    # (6, 1, 2, 1) of 10, half of it, and an eighth each.
    assert one.log_drawn.exp().tolist() == pytest.approx([0.425, 0.175, 0.225, 0.175])


@pytest.mark.parametrize(("seen", "rank"), [("removed", 1), ("kept", 2)])
def test_validation_counts_ranks_over_the_catalog(module, monkeypatch, seen, rank):
    """Scores of the candidates 2, 3, 5 and 6 are 4, 3, 2 and 1; item 5 is asked for, item 2 was seen."""
    one = module(**{"next.seen": seen})
    vectors = torch.zeros(8, 16)
    vectors[CANDIDATES, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    monkeypatch.setattr(one.model, "item_vectors", lambda ids=None: vectors if ids is None else vectors[ids])
    monkeypatch.setattr(one.model, "user_vectors", lambda batch: torch.eye(16)[:1])
    monkeypatch.setattr(one, "log", lambda *_: None)
    batch = {"dense": torch.tensor([5]), "seen": torch.tensor([[0, 2, 2]])}
    one.validation_step(batch, 0)
    assert one.ndcg.compute().item() == pytest.approx(1 / math.log2(rank + 2))
    # An item that was seen is asked for all the same; one without a training event is never found.
    one.validation_step({"dense": torch.tensor([2]), "seen": torch.tensor([[0, 2, 2]])}, 1)
    one.validation_step({"dense": torch.tensor([1]), "seen": torch.tensor([[0, 2, 2]])}, 2)
    assert one.ndcg.compute().item() == pytest.approx((1 / math.log2(rank + 2) + 1 + 0) / 3)


def test_held_out_samples_and_other_splits_are_not_to_be_found(demo_log):
    config = configured(hold_out="uniform300").stage1
    found = target_events(demo_log, config)
    held = demo_log.rows("train", "uniform300")
    assert not found[held].any()
    assert not found[demo_log.rows("valid", "all")].any()
    assert found.sum() == demo_log.train_events().sum() - 300
    liked = target_events(demo_log, configured(**{"next.targets": "liked"}).stage1)
    assert (demo_log.label[np.flatnonzero(liked)] == 1).all()


def test_a_log_without_likes_has_nothing_to_find(demo_log, monkeypatch):
    monkeypatch.setattr(demo_log, "label", np.zeros_like(demo_log.label))
    config = configured(**{"next.targets": "liked"}).stage1
    with pytest.raises(StageError, match=r"no training event is to be found \(stage1.next.targets=liked\)"):
        target_events(demo_log, config)
    with pytest.raises(StageError, match=r"stage1\.fit\.valid_rows=all"):
        findable_rows(demo_log, config)


def test_only_a_retriever_is_trained_to_find_the_next_item():
    with pytest.raises(ConfigError, match=r"stage1.objective=ctr .* next with stage1.crm.name=retriever"):
        configured(objective="ctr")
    with pytest.raises(ConfigError, match=r"stage1.objective=next"):
        merge([], {"stage1.objective": "next"})


@pytest.mark.parametrize("keys", [{}, {"next.full_softmax": 0, "next.sampled": 64, "sparse_tables": True}])
def test_it_learns_and_is_exported(run, demo_log, keys, monkeypatch):
    monkeypatch.setattr(retriever, "data", lambda run: crm_inputs(demo_log, run.config.stage1.inputs, None))
    one = run(**{**keys, "fit.epochs": 8, "fit.lr": 3e-3})
    retriever.work(one)
    with (one.folder / "logs" / "metrics.csv").open(newline="") as stream:
        scores = [float(row["valid/ndcg@10"]) for row in csv.DictReader(stream) if row["valid/ndcg@10"]]
    assert max(scores) > scores[0]
    model = load(one.export)
    assert model.config.name == "retriever"
    inputs = crm_inputs(demo_log, one.config.stage1.inputs, None)
    rows = demo_log.rows("valid", "first5")
    with torch.no_grad():
        logit, users = model(inputs(rows))
        fields = torch.from_numpy(demo_log.item_fields[demo_log.item[rows], 0]).long()
        torch.testing.assert_close(logit, (users * model.item_vectors(fields)).sum(1))


class Killed(BaseException):
    """As a kill does, it passes by everything that catches exceptions."""


def test_killed_it_resumes_to_the_bit(run, demo_log, monkeypatch):
    def inputs(one):
        return crm_inputs(demo_log, one.config.stage1.inputs, None)

    whole = run("stage1/whole")
    wanted, _, _ = retriever.train(whole, inputs(whole))
    started = run("stage1/killed")

    def kill(module, batch, index):
        if module.trainer.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RetrieverModule, "on_train_batch_start", kill)
        with pytest.raises(Killed):
            retriever.train(started, inputs(started))
    started.close()
    resumed = run("stage1/killed")
    got, trainer, _ = retriever.train(resumed, inputs(resumed))
    assert trainer.global_step > 5
    for name, value in wanted.state_dict().items():
        assert torch.equal(value, got.state_dict()[name]), name
