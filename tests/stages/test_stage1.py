"""Stage 1: which samples it trains on, and its ways of training."""

import csv
import importlib.util
from dataclasses import asdict

import numpy as np
import pytest
import torch

from recllm.config.merge import merge
from recllm.crm import build
from recllm.crm.inputs import table_sizes
from recllm.errors import ConfigError, StageError
from recllm.eventlog.candidates import negatives
from recllm.pipeline.run import Run
from recllm.systems.crm import crm_inputs
from recllm.training.checkpoints import best_scores
from recllm.training.fit import fit
from recllm.training.loaders import Stream, plan_steps
from stages.stage1 import CrmModule, ctr_loaders, rank_loaders, training_rows


class Killed(BaseException):
    """As a kill does, it passes by everything that catches exceptions."""


SMALL = {
    "stage1.crm.embedding_dim": 4, "stage1.crm.event_dim": 2, "stage1.crm.mlp": [8], "stage1.recent": 5,
    "stage1.crm.attention_mlp": [4], "stage1.fit.batch_size": 64, "stage1.fit.epochs": 0.3,
    "stage1.fit.validations": 3, "stage1.fit.valid_rows": "uniform200", "stage1.fit.patience": 100,
}  # fmt: skip
UNDRAWN = {f"crm.{key}": 0.0 for key in ("dropout", "embedding_dropout", "mask_users", "mask_items")}


@pytest.fixture
def train(make_stage, demo_log):
    """`train(kill=7, trainer={...}, **keys)` -> the module and its run, trained on the demo's log."""

    def run_one(kill=None, trainer=None, name="stage1/din", **keys):
        config = merge([], {**SMALL, **{f"stage1.{key}": value for key, value in keys.items()}})
        folder = make_stage(name, {"stage1": asdict(config)["stage1"], "seed": 0})
        words = {"accelerator": "cpu", "checkpoint_every": 3, **(trainer or {})}
        run = Run.start([str(folder), *(f"trainer.{key}={value}" for key, value in words.items())])
        try:
            stage1 = run.config.stage1
            rows = training_rows(demo_log, "all", "none")
            size = (stage1.fit.batch_size, stage1.fit.epochs, stage1.fit.validations)
            steps, interval = plan_steps(len(rows), *size)
            torch.manual_seed(0)
            inputs = crm_inputs(demo_log, stage1.inputs, None)
            module = CrmModule(
                build(table_sizes(demo_log), stage1.crm), stage1, steps, run.config.trainer.compile
            )
            if kill is not None:
                module.on_train_batch_start = lambda batch, index: _killed(module, kill)
            fit(run, module, ctr_loaders(run, inputs, rows, steps), stage1.fit, interval, ["valid/auc"])
        finally:
            run._lock.close()
        return module, run

    return run_one


def _killed(module, step):
    if module.trainer.global_step == step:
        raise Killed


def weights(module):
    return {name: value.clone() for name, value in module.model.state_dict().items()}


def curve(run):
    with (run.folder / "logs" / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_held_out_rows_are_left_out_and_the_order_is_kept(demo_log):
    every, held = demo_log.rows("train", "all"), demo_log.rows("train", "uniform300")
    rows = training_rows(demo_log, "all", "uniform300")
    assert len(rows) == len(every) - 300
    assert not set(rows.tolist()) & set(held.tolist())
    np.testing.assert_array_equal(rows, [row for row in every if row not in set(held.tolist())])
    np.testing.assert_array_equal(training_rows(demo_log, "all", "none"), every)
    assert set(training_rows(demo_log, "1.0", "uniform300").tolist()) == set(rows.tolist())
    with pytest.raises(
        StageError, match=r"hold_out=last\d+ leaves none of [\d,]+ training rows; wanted fewer"
    ):
        training_rows(demo_log, "all", f"last{len(every)}")


def test_validation_rows_of_one_label_are_refused(train, demo_log, monkeypatch):
    label = demo_log.label.copy()
    label[demo_log.rows("valid", "uniform200")] = 0
    monkeypatch.setattr(demo_log, "label", label)
    wanted = r"all 200 validation rows \(stage1.fit.valid_rows=uniform200\) have label 0, .*valid_rows=all"
    with pytest.raises(StageError, match=wanted):
        train()


@pytest.mark.parametrize(("clip", "name"), [(0, "din"), (0.01, "din"), (0.01, "deepfm")])
def test_the_first_step_by_rows_is_the_dense_one(train, clip, name):
    one = {"fit.epochs": 0.001, "fit.validations": 1, "fit.clip": clip, "fit.warmup": 0, "fit.lr": 0.1}
    one["crm.name"] = name
    dense, _ = train(**one)
    sparse, _ = train(name="stage1/sparse", sparse_tables=True, **one)
    for name, value in weights(dense).items():
        torch.testing.assert_close(weights(sparse)[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_by_rows_it_learns_and_resumes_to_the_bit(train):
    keys = {"sparse_tables": True, "fit.lr": 0.02, "fit.epochs": 1, "crm.l2": 0.0}
    whole, run = train(**keys)
    with pytest.raises(Killed):
        train(kill=25, name="stage1/killed", **keys)
    resumed, again = train(name="stage1/killed", **keys)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert curve(run) == curve(again)
    assert best_scores(run, "valid/auc")["valid/auc"] > 0.58


def test_mixed_precision_trains_wide_weights_to_a_like_score(train):
    # Trained beyond chance, and without draws, so that precision is all that differs.
    keys = {**UNDRAWN, "fit.lr": 0.02, "fit.epochs": 1}
    scores = []
    for number, precision in enumerate(("32-true", "bf16-mixed")):
        module, run = train(name=f"stage1/p{number}", **{"fit.precision": precision}, **keys)
        assert all(value.dtype == torch.float32 for value in module.model.parameters())
        scores.append(best_scores(run, "valid/auc")["valid/auc"])
    assert scores[0] > 0.6
    assert scores[1] == pytest.approx(scores[0], abs=0.03)


def test_deterministic_mode_changes_nothing_on_a_cpu(train):
    plain, _ = train()
    module, _ = train(name="stage1/deterministic", trainer={"deterministic": True})
    torch.use_deterministic_algorithms(False)
    for name, value in weights(plain).items():
        assert torch.equal(weights(module)[name], value), name


def test_where_nothing_compiles_it_says_so_and_trains(train, monkeypatch, capsys):
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    plain, _ = train()
    capsys.readouterr()
    module, _ = train(name="stage1/compiled", trainer={"compile": True})
    out = capsys.readouterr().out
    assert out.count("not compiled, ") == 1
    assert "compiler" in out
    for name, value in weights(plain).items():
        assert torch.equal(weights(module)[name], value), name


@pytest.mark.slow
def test_compiled_it_ends_as_it_would_uncompiled(train, capsys):
    # Without draws: the compiler's random numbers are others.
    plain, _ = train(**UNDRAWN)
    module, _ = train(name="stage1/compiled", trainer={"compile": True}, **UNDRAWN)
    if "not compiled" in (out := capsys.readouterr().out):
        print(out)
        pytest.skip("no compiler here")
    assert module.model._compiled_call_impl is not None
    for name, value in weights(plain).items():
        assert torch.allclose(weights(module)[name], value, rtol=1e-3, atol=1e-4), name


def test_tensorboard_gets_losses_and_scores(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run = train(trainer={"tensorboard": True})
    events = EventAccumulator(str(run.folder / "logs"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    for row in curve(run):
        assert losses[int(row["step"])] == pytest.approx(float(row["train/loss"]), rel=1e-5)
    assert len(events.Scalars("valid/auc")) == 3


def test_a_missing_library_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        merge([], {"trainer.wandb": True})


def test_a_batch_of_the_ranker_that_reaches_into_the_next_pass_draws_there_anew(demo_log, make_stage):
    """50 liked rows in batches of 16: the fourth one has 2 rows of the first pass and 14 of the second."""
    config = merge([], {**SMALL, "stage1.objective": "rank", "stage1.fit.batch_size": 128})
    folder = make_stage("stage1/ranker", {"stage1": asdict(config)["stage1"], "seed": 0})
    run = Run.start([str(folder)])
    liked = demo_log.rows("train", "all")
    liked = liked[demo_log.label[liked] == 1][:50]
    inputs = crm_inputs(demo_log, run.config.stage1.inputs, None)
    draw = rank_loaders(run, inputs, liked, 10).train
    stream = Stream(50, 16, 0)
    items = draw(3, 0, 1)["dense"].numpy().reshape(16, 8)
    rows = liked[stream.indices(3)]
    for number, part in ((0, slice(2)), (1, slice(2, 16))):
        uniform = negatives(demo_log, rows[part], "uniform", 3, number)
        popular = negatives(demo_log, rows[part], "popular", 4, number)
        wanted = np.concatenate([demo_log.item[rows[part], None], uniform, popular], 1)
        np.testing.assert_array_equal(items[part], wanted)
