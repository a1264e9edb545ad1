"""Stage 1: which samples it trains on, and its ways of training."""

import csv
import dataclasses
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
from recllm.training.loaders import Stream
from stages.stage1 import (
    CrmModule,
    age_weights,
    check_timed,
    count_newest,
    ctr_loaders,
    plan_course,
    rank_loaders,
    training_rows,
)


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
            rows = training_rows(demo_log, "all", stage1.hold_out)
            course = plan_course(demo_log, stage1, rows)
            torch.manual_seed(0)
            inputs = crm_inputs(demo_log, stage1.inputs, None)
            model = build(table_sizes(demo_log), stage1.crm)
            compiles = run.config.trainer.compile
            module = CrmModule(model, stage1, course.steps, compiles, course.newest_steps)
            if kill is not None:
                module.on_train_batch_start = lambda batch, index: _killed(module, kill)
            loaders = ctr_loaders(run, inputs, rows, course.steps, course.newest_steps)
            after = course.stops_after
            fit(run, module, loaders, stage1.fit, course.interval, ["valid/auc"], stops_after=after)
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


def rows_of_steps(inputs, loaders, monkeypatch):
    """The training rows of each step's batch."""
    asked = []
    gather = inputs.gather
    monkeypatch.setattr(inputs, "gather", lambda rows: asked.append(rows) or gather(rows))
    for step in range(loaders.steps):
        loaders.train(step, 0, 1)
    return asked


@pytest.mark.parametrize("hold_out", ["none", "last500", "uniform500"])
def test_the_last_pass_is_over_the_newest_of_the_rows_that_train(demo_log, make_stage, monkeypatch, hold_out):
    keys = {"newest.share": 0.25, "hold_out": hold_out, "fit.epochs": 1.0}
    config = merge([], {**SMALL, **{f"stage1.{key}": value for key, value in keys.items()}})
    run = Run.start([str(make_stage("stage1/din", {"stage1": asdict(config)["stage1"], "seed": 0}))])
    stage1 = run.config.stage1
    rows = training_rows(demo_log, "all", hold_out)
    course = plan_course(demo_log, stage1, rows)
    inputs = crm_inputs(demo_log, stage1.inputs, None)
    loaders = ctr_loaders(run, inputs, rows, course.steps, course.newest_steps)
    batches = rows_of_steps(inputs, loaders, monkeypatch)
    # By hand: a quarter of the rows, in batches of 64.
    count = round(len(rows) / 4)
    assert course.newest_steps == -(-count // 64)
    newest = rows[-count:]
    in_time = demo_log.timestamp[rows]
    assert demo_log.timestamp[newest].min() >= np.sort(in_time)[-count]
    first, last = batches[: -course.newest_steps], batches[-course.newest_steps :]
    together = np.concatenate(last)
    assert len(together) == 64 * course.newest_steps
    assert sorted(together[:count]) == sorted(newest.tolist())
    assert set(np.concatenate(first).tolist()) == set(rows.tolist())
    # In no step a row of validation or test, or one that is held out.
    every = np.concatenate(batches)
    assert (demo_log.split[every] == 0).all()
    if hold_out != "none":
        held = demo_log.rows("train", hold_out)
        assert not np.isin(every, held).any()
        if hold_out == "last500":
            assert demo_log.timestamp[newest].max() <= demo_log.timestamp[held].min()


NEWEST = {"newest.share": 0.3, "newest.lr": 0.5, "fit.lr": 0.02, "fit.epochs": 0.5}


def test_labels_of_validation_and_test_train_nothing(train, demo_log, monkeypatch):
    """The weights behind the last step are the same to the bit, whatever was liked later."""
    wanted, _ = train(**NEWEST)
    label = demo_log.label.copy()
    label[demo_log.split > 0] = 1 - label[demo_log.split > 0]
    monkeypatch.setattr(demo_log, "label", label)
    module, _ = train(name="stage1/flipped", **NEWEST)
    for name, value in weights(wanted).items():
        assert torch.equal(weights(module)[name], value), name


@pytest.mark.parametrize("kill", [10, 40])  # before the newest rows, and among them
def test_with_a_last_pass_it_resumes_to_the_bit(train, kill, demo_log):
    whole, run = train(**NEWEST)
    rows = training_rows(demo_log, "all", "none")
    course = plan_course(demo_log, run.config.stage1, rows)
    assert (kill > course.stops_after) == (kill == 40)
    with pytest.raises(Killed):
        train(kill=kill, name="stage1/killed", **NEWEST)
    resumed, again = train(name="stage1/killed", **NEWEST)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert curve(run) == curve(again)


def test_without_times_no_row_is_the_newest(demo_log, monkeypatch):
    rows = training_rows(demo_log, "all", "none")
    assert count_newest(demo_log, merge([], {}).stage1.newest, rows) == 0
    monkeypatch.setitem(demo_log.meta, "timed", False)
    config = merge([], {"stage1.newest.share": 0.25}).stage1
    with pytest.raises(StageError, match=r"^stage1.newest.share=0.25, but .* no times .*wanted 0"):
        count_newest(demo_log, config.newest, rows)


def test_weights_by_age_by_hand():
    """Of 4 rows the newest is 0 old, the oldest 3 quarters: 1.5 halvings where a half halves."""
    raw = np.array([0.5**1.5, 0.5, 0.5**0.5, 1.0])
    np.testing.assert_allclose(age_weights(4, 0.5).numpy(), raw / raw.mean(), rtol=1e-6)
    assert float(age_weights(1000, 0.25).mean()) == pytest.approx(1.0, abs=1e-6)


def test_a_step_weighs_its_rows_by_age(demo_log, make_stage):
    """The loss of a batch is the mean of weight times loss of a row, computed here row by row."""
    config = merge([], {**SMALL, **{f"stage1.{key}": value for key, value in UNDRAWN.items()}})
    config = dataclasses.replace(config.stage1, half_life=0.25)
    folder = make_stage("stage1/din", {"stage1": asdict(config), "seed": 0})
    run = Run.start([str(folder)])
    rows = training_rows(demo_log, "all", "none")
    inputs = crm_inputs(demo_log, config.inputs, None)
    torch.manual_seed(0)
    module = CrmModule(build(table_sizes(demo_log), config.crm), config, 10)
    batch = inputs.expand(ctr_loaders(run, inputs, rows, 10).train(2, 0, 1))
    indices = Stream(len(rows), 64, 0).indices(2)
    torch.testing.assert_close(batch["weight"], age_weights(len(rows), 0.25)[indices])
    loss = module.training_step(batch, 0)["data"]
    with torch.no_grad():
        probability = torch.sigmoid(module.model(batch)[0]).double().numpy()
    label = demo_log.label[rows[indices]]
    of_rows = -np.log(np.where(label == 1, probability, 1 - probability))
    assert float(loss) == pytest.approx(float((batch["weight"].numpy() * of_rows).mean()), rel=1e-5)


def test_without_times_no_row_has_an_age(demo_log, monkeypatch):
    monkeypatch.setitem(demo_log.meta, "timed", False)
    check_timed(demo_log, "stage1.half_life", 0.0)
    with pytest.raises(StageError, match=r"^stage1.half_life=0.25, but .* no times .*wanted 0"):
        check_timed(demo_log, "stage1.half_life", 0.25)
