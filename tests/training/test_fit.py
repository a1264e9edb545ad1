"""The real `fit` with a small module: killed anywhere and resumed, it ends as if nothing had happened."""

import csv
import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from torch import nn

from recllm import console
from recllm.config.stages import FitConfig
from recllm.errors import StageError
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import StageFile
from recllm.training import callbacks
from recllm.training.adapter_module import AdapterModule
from recllm.training.checkpoints import best, best_scores
from recllm.training.fit import fit
from recllm.training.loaders import Loaders, Stream
from recllm.training.optimizer import optimizer

STEPS, INTERVAL, ROWS = 24, 6, 50
FIT = FitConfig(batch_size=8, lr=0.05, patience=100, validations=4)
CONFIG = {"seed": 0}
LAST = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
TRAINER = {"accelerator": "cpu", "checkpoint_every": 2}


class Killed(BaseException):
    """As a kill does, it passes by everything that catches exceptions."""


def data():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(ROWS, 6, generator=generator), torch.randn(ROWS, generator=generator)


class Small(lightning.LightningModule):
    """A regression with dropout, so that the generator's state matters."""

    def __init__(self, kill_step=None, kill_validation=None, scores=None, nan_from=None):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))
        self.kill_step, self.kill_validation = kill_step, kill_validation
        self.scores, self.nan_from = scores, nan_from
        self.steps_done = []

    def training_step(self, batch, index):
        if self.trainer.global_step == self.kill_step:
            raise Killed
        self.steps_done.append(self.trainer.global_step)
        self.net.train()
        loss = ((self.net(batch["x"])[:, 0] - batch["y"]) ** 2).mean()
        if self.nan_from is not None and self.trainer.global_step >= self.nan_from:
            loss = loss * float("nan")
        return {"loss": loss, "data": loss.detach()}

    def validation_step(self, batch, index):
        if self.trainer.global_step == self.kill_validation:
            raise Killed
        number = self.trainer.global_step // INTERVAL
        if self.scores:
            score = torch.tensor(self.scores[min(number, len(self.scores) - 1)])
        else:
            score = -((self.net(batch["x"])[:, 0] - batch["y"]) ** 2).mean()
        self.log("valid/auc", score, batch_size=len(batch["y"]))
        self.log("valid/hr@1", -score, batch_size=len(batch["y"]))

    def configure_optimizers(self):
        return optimizer(self, FIT, STEPS)


def loaders():
    x, y = data()
    stream = Stream(ROWS, FIT.batch_size, 0)

    def rows(indices):
        return {"x": x[indices], "y": y[indices]}

    train = lambda step, rank, world: rows(stream.indices(step, rank, world))  # noqa: E731
    return Loaders(train=train, steps=STEPS, valid=[(rows, ROWS)], valid_batch=16)


def start(folder, **trainer):
    words = [f"trainer.{key}={value}" for key, value in {**TRAINER, **trainer}.items()]
    return Run.start([str(folder), *words])


def train(folder, module, first=False, settings=FIT, **trainer):
    """One attempt; the lock goes with the process, here with the attempt."""
    run = start(folder, **trainer)
    try:
        fit(run, module, loaders(), settings, INTERVAL, ["valid/auc", "valid/hr@1"], first=first)
    finally:
        run._lock.close()
    return run


def load(path):
    return torch.load(path, weights_only=True)


def same(one, two):
    """Equal to the bit, whatever is nested in what."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def ended(run, module):
    """All that a finished training leaves."""
    folder = run.folder / "checkpoints"
    last = load(folder / "last.ckpt")
    found = {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "curve": (run.folder / "logs" / "metrics.csv").read_text(),
        "last": {name: last[name] for name in LAST},
        "files": sorted(path.name for path in folder.iterdir()),
    }
    for monitor in ("valid/auc", "valid/hr@1"):
        checkpoint = load(best(run, monitor))
        found[monitor] = [checkpoint["state_dict"], checkpoint["global_step"], best_scores(run, monitor)]
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """By `first`: what training ends with when nothing happens."""
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        for first in (False, True):
            root = tmp_path_factory.mktemp("whole")
            patch.setenv("RECLLM_ARTIFACTS", str(root))
            folder = root / "demo" / "stage1" / "sim"
            folder.mkdir(parents=True)
            file = StageFile("stage1", "demo", "stage1/sim", "stages.stage1", {}, CONFIG)
            (folder / "config.yaml").write_text(file.text())
            module = Small()
            results[first] = ended(train(folder, module, first), module)
    return results


def test_the_whole_run_has_the_curve_that_it_should(uninterrupted):
    whole = uninterrupted[False]
    rows = list(csv.DictReader(whole["curve"].splitlines()))
    assert [int(row["step"]) for row in rows if row["valid/auc"]] == [6, 12, 18, 24]
    steps = [int(row["step"]) for row in rows]
    assert steps == list(range(1, 25))  # a row of every step, none twice: losses and scores stand together
    assert all(float(row["train/loss"]) > 0 for row in rows)
    with_first = list(csv.DictReader(uninterrupted[True]["curve"].splitlines()))
    assert [int(row["step"]) for row in with_first if row["valid/auc"]] == [0, 6, 12, 18, 24]
    assert whole["files"] == ["best-auc.ckpt", "best-hr1.ckpt", "last.ckpt", "made-for.json"]
    # The monitors pull in opposite directions, so they keep different steps.
    assert whole["valid/auc"][1] != whole["valid/hr@1"][1]
    assert whole["valid/auc"][1] == whole["valid/auc"][2]["step"]


KILLS = {
    "before the first checkpoint": {"kill_step": 1},
    "between validations": {"kill_step": 9},
    "right after a checkpoint": {"kill_step": 8},
    "right after a validation": {"kill_step": 6},
    "in a validation": {"kill_validation": 12},
    "right after the last but one validation": {"kill_step": 18},
    "in the last validation": {"kill_validation": 24},
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kill", KILLS)
def test_resumed_equals_uninterrupted_to_the_bit(make_stage, capsys, uninterrupted, kill, first):
    folder = make_stage("stage1/sim")
    with pytest.raises(Killed):
        train(folder, Small(**KILLS[kill]), first)
    capsys.readouterr()
    module = Small()
    run = train(folder, module, first)
    out = capsys.readouterr().out
    place = next(iter(KILLS[kill].values()))
    if kill != "before the first checkpoint":
        at = {9: 8, 12: 10, 24: 22}.get(place, place)
        assert f"resumes at step {at}\n" in out
        assert module.steps_done == list(range(at, STEPS))
    got = ended(run, module)
    for name, value in uninterrupted[first].items():
        assert same(got[name], value), name


def test_killed_again_and_again(make_stage, uninterrupted):
    folder = make_stage("stage1/sim")
    for step in (3, 7, 7, 13, 19):
        with pytest.raises(Killed):
            train(folder, Small(kill_step=step), True)
    module = Small()
    run = train(folder, module, True)
    got = ended(run, module)
    for name, value in uninterrupted[True].items():
        assert same(got[name], value), name


def test_killed_between_the_best_checkpoint_and_the_last_one(make_stage, monkeypatch, uninterrupted):
    folder = make_stage("stage1/sim")
    save = callbacks.Last._save

    def dies(self, trainer):
        if trainer.global_step == 12:
            raise Killed
        save(self, trainer)

    monkeypatch.setattr(callbacks.Last, "_save", dies)
    with pytest.raises(Killed):
        train(folder, Small())
    monkeypatch.setattr(callbacks.Last, "_save", save)
    module = Small()
    run = train(folder, module)
    got = ended(run, module)
    for name, value in uninterrupted[False].items():
        assert same(got[name], value), name


def test_killed_while_last_is_written_leaves_the_one_before(make_stage, monkeypatch, uninterrupted):
    """Half a file under the name would make the stage unable to go on."""
    folder = make_stage("stage1/sim")
    save = lightning.Trainer.save_checkpoint

    def dies(self, path, *arguments, **options):
        if self.global_step == 8 and "best" not in Path(path).name:
            Path(path).write_bytes(b"PK\x03\x04 half of it")
            raise Killed
        save(self, path, *arguments, **options)

    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", dies)
    with pytest.raises(Killed):
        train(folder, Small())
    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", save)
    module = Small()
    got = ended(train(folder, module), module)
    assert module.steps_done[0] == 6
    for name, value in uninterrupted[False].items():
        assert same(got[name], value), name


def test_killed_while_the_mark_of_the_checkpoints_is_written(make_stage, monkeypatch, uninterrupted):
    """Half a mark would end every later start."""
    folder = make_stage("stage1/sim")
    write_text = Path.write_text

    def dies(self, *arguments, **options):
        if "made-for" in self.name:
            write_text(self, "{")
            raise Killed
        return write_text(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", dies)
    with pytest.raises(Killed):
        train(folder, Small())
    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(Killed):
        train(folder, Small(kill_step=9))
    monkeypatch.setattr(Path, "write_text", dies)  # a resumed training has nothing else to mark
    module = Small()
    got = ended(train(folder, module), module)
    assert module.steps_done[0] == 8
    for name, value in uninterrupted[False].items():
        assert same(got[name], value), name


def test_killed_while_the_curve_is_written_leaves_the_one_before(make_stage, monkeypatch):
    folder = make_stage("stage1/sim")
    writerows = csv.DictWriter.writerows

    def dies(self, rows):
        if rows[-1]["step"] == 12:
            raise Killed
        writerows(self, rows)

    monkeypatch.setattr(csv.DictWriter, "writerows", dies)
    with pytest.raises(Killed):
        train(folder, Small())
    with (folder / "logs" / "metrics.csv").open(newline="") as stream:
        assert [int(row["step"]) for row in csv.DictReader(stream)] == list(range(1, 7))


def test_a_process_that_is_gone_at_once_resumes_too(make_stage, uninterrupted):
    """As a kill -9: no exception handler, no exit hook runs."""
    folder = make_stage("stage1/sim")
    code = f"""
import importlib.util, os, sys, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("training_of_a_child", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
class Gone(module.Small):
    def training_step(self, batch, index):
        if self.trainer.global_step == 15:
            os._exit(9)
        return super().training_step(batch, index)
from pathlib import Path
module.train(Path({str(folder)!r}), Gone())
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, cwd=Path(__file__).parents[2])
    assert done.returncode == 9
    module = Small()
    run = train(folder, module)
    assert module.steps_done[0] == 14
    got = ended(run, module)
    for name, value in uninterrupted[False].items():
        assert same(got[name], value), name


def test_wall_time_adds_up_over_the_attempts_that_a_checkpoint_comes_from(make_stage):
    begun = time.monotonic()
    folder = make_stage("stage1/sim")
    run = start(folder)
    run._clock -= 100  # it began 100 seconds ago
    with pytest.raises(Killed):
        fit(run, Small(kill_step=9), loaders(), FIT, INTERVAL, ["valid/auc", "valid/hr@1"])
    run._lock.close()
    resumed = train(folder, Small())
    assert 100 <= resumed.seconds <= 100 + time.monotonic() - begun
    # One that is finished is taken up again where only what is made of it has to be made anew.
    module = Small()
    assert 100 <= train(folder, module).seconds <= 100 + time.monotonic() - begun
    assert not module.steps_done


def test_another_configuration_starts_anew(make_stage, capsys):
    folder = make_stage("stage1/sim")
    with pytest.raises(Killed):
        train(folder, Small(kill_step=9))
    make_stage("stage1/sim", {"seed": 1})
    module = Small(kill_step=3)
    capsys.readouterr()
    with pytest.raises(Killed):
        train(folder, module)
    assert module.steps_done == [0, 1, 2]
    assert "resumes" not in capsys.readouterr().out
    assert not (folder / "checkpoints" / "best-auc.ckpt").exists()


def test_a_checkpoint_of_another_configuration_is_put_aside_and_taken_up_again(
    make_stage, capsys, uninterrupted
):
    one, other = {"seed": 0}, {"seed": 1, "stage1": {"fit": {"batch_size": 64}}}
    folder = make_stage("stage1/sim", one)
    with pytest.raises(Killed):
        train(folder, Small(kill_step=9))
    make_stage("stage1/sim", other)
    capsys.readouterr()
    with pytest.raises(Killed):
        train(folder, Small(kill_step=5))
    said = capsys.readouterr().out
    assert (
        "cannot go on from the checkpoint at step 8: seed was 0, is 1; stage1.fit.batch_size was None" in said
    )
    assert "resumes" not in said
    # Back again, and it goes on to the bit; the other one is put aside in turn, and removed at the end.
    make_stage("stage1/sim", one)
    module = Small()
    got = ended(train(folder, module), module)
    said = capsys.readouterr().out
    assert "cannot go on from the checkpoint at step 4: seed was 1, is 0;" in said
    assert "resumes at step 8\n" in said
    for name, value in uninterrupted[False].items():
        assert same(got[name], value), name
    assert [path.name for path in folder.glob("checkpoints*")] == ["checkpoints"]


def test_what_is_put_aside_stays_until_there_is_more_to_lose(make_stage, capsys):
    folder = make_stage("stage1/sim", {"seed": 0})
    with pytest.raises(Killed):
        train(folder, Small(kill_step=9))
    for seed, kill in ((1, 1), (2, 3), (3, 3)):
        make_stage("stage1/sim", {"seed": seed})
        capsys.readouterr()
        with pytest.raises(Killed):
            train(folder, Small(kill_step=kill))
        said = capsys.readouterr().out
        # Seed 1 had no checkpoint to lose; seed 2 has, and of two that lie aside the older one goes.
        assert ("removes the checkpoint at step 8 that was put aside earlier (seed was 0, is 3)" in said) == (
            seed == 3
        )
    assert load(folder / "checkpoints-before" / "last.ckpt")["global_step"] == 2


@pytest.mark.parametrize("killed_with", [(), ("checkpoints",)])
def test_a_kill_while_it_is_put_aside_loses_nothing(make_stage, killed_with):
    folder = make_stage("stage1/sim")
    with pytest.raises(Killed):
        train(folder, Small(kill_step=9))
    (folder / "checkpoints").rename(folder / "checkpoints-swap")
    if killed_with:
        make_stage("stage1/sim", {"seed": 1})
        (folder / "checkpoints").mkdir()
    with pytest.raises(Killed):
        train(folder, Small(kill_step=9))
    kept = folder / ("checkpoints-before" if killed_with else "checkpoints") / "last.ckpt"
    assert load(kept)["global_step"] == 8


def test_execution_keys_do_not_keep_a_run_from_resuming(make_stage, uninterrupted):
    folder = make_stage("stage1/sim")
    with pytest.raises(Killed):
        train(folder, Small(kill_step=9))
    module = Small()
    got = ended(train(folder, module, checkpoint_every=5), module)
    assert module.steps_done[0] == 8
    assert same(got["weights"], uninterrupted[False]["weights"])
    assert got["curve"] == uninterrupted[False]["curve"]


def test_early_stopping_is_remembered(make_stage):
    """Best at the first validation, patience 2: it stops at the third, step 18."""
    scores = [0.0, 0.9, 0.5, 0.5, 0.95]
    settings = FitConfig(batch_size=8, lr=0.05, patience=2)
    whole, resumed = make_stage("stage1/whole"), make_stage("stage1/resumed")
    module = Small(scores=scores)
    wanted = ended(train(whole, module, settings=settings), module)
    assert wanted["last"]["global_step"] == 18
    with pytest.raises(Killed):
        train(resumed, Small(scores=scores, kill_step=14), settings=settings)
    module = Small(scores=scores)
    got = ended(train(resumed, module, settings=settings), module)
    for name, value in wanted.items():
        if name != "files":
            assert same(got[name], value), name
    # Killed after it had decided to stop: started again, it trains no step more.
    module = Small(scores=scores)
    again = ended(train(resumed, module, settings=settings), module)
    assert module.steps_done == []
    assert same(again["last"], wanted["last"])
    assert again["curve"] == wanted["curve"]


@pytest.mark.parametrize("killed", [None, 5, 8])
def test_with_a_validation_after_each_step_the_best_is_kept_and_patience_ends_it(
    make_stage, monkeypatch, killed
):
    """Lightning takes an interval of 1 for one of a whole epoch, and selected at the end only."""
    monkeypatch.setattr(sys.modules[__name__], "INTERVAL", 1)
    scores = [0.0, 0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.8, 0.6, 0.7, 0.95]
    settings = FitConfig(batch_size=8, lr=0.05, patience=6)
    folder = make_stage("stage1/each")
    if killed is not None:
        with pytest.raises(Killed):
            train(folder, Small(scores=scores, kill_step=killed), settings=settings)
    module = Small(scores=scores)
    run = train(folder, module, settings=settings)
    assert load(folder / "checkpoints" / "last.ckpt")["global_step"] == 9
    for monitor in ("valid/auc", "valid/hr@1"):
        step = best_scores(run, monitor)["step"]
        assert load(best(run, monitor))["global_step"] == step
    assert best_scores(run, "valid/auc")["step"] == 3


@pytest.mark.parametrize("score", [float("nan"), float("-inf")])
def test_a_score_that_is_none_selects_nothing(make_stage, score):
    folder = make_stage("stage1/no-score")
    with pytest.raises(StageError, match=rf"valid/auc is {score} at step 12; lower the learning rate"):
        train(folder, Small(scores=[0.5, 0.6, score, 0.7]))
    kept = load(folder / "checkpoints" / "best-auc.ckpt")
    assert kept["global_step"] == INTERVAL  # of the score before; nothing was selected or stopped by none


def test_a_loss_that_is_not_finite_stops_with_a_line(make_stage):
    folder = make_stage("stage1/sim")
    with pytest.raises(StageError, match=r"^train/loss is nan at step \d+; lower the learning rate[^\n]*$"):
        train(folder, Small(nan_from=4))
    assert not (folder / "manifest.json").exists()


def test_where_steps_are_long_the_clock_says_when_to_write(make_stage, monkeypatch):
    """Validations lie 6 steps apart, and 50 steps between writes: what is written else is written by time."""
    written = []
    save = lightning.Trainer.save_checkpoint

    def remember(self, path, *rest, **options):
        if str(path).endswith(".partial"):
            written.append(self.global_step)
        save(self, path, *rest, **options)

    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", remember)
    train(make_stage("stage1/rare"), Small(), checkpoint_every=50)
    assert written == list(range(INTERVAL, STEPS + 1, INTERVAL))
    written.clear()
    train(make_stage("stage1/often"), Small(), checkpoint_every=50, checkpoint_minutes=1e-9)
    before_validations = range(INTERVAL, STEPS, INTERVAL)  # and behind them, as behind all others
    assert written == sorted([*range(1, STEPS + 1), *before_validations])


def test_a_long_training_says_how_far_it_is(make_stage, monkeypatch, capsys):
    monkeypatch.setattr(console, "SILENCE", 0.0)
    train(make_stage("stage1/sim"), Small())
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if re.search(r"\d of \d+ steps, train/loss \d", line)]
    assert len(steps) == STEPS - 1
    assert re.search(rf"\] 1 of {STEPS} steps, train/loss [\d.]+, .*, .* left$", steps[0])
    assert any(re.search(r"1 of \d+ validation batches, .* left$", line) for line in lines)


class Adapted(AdapterModule):
    """A frozen base and a small part that trains."""

    def __init__(self, dropout=0.3, width=3):
        torch.manual_seed(2)
        super().__init__(nn.ModuleDict({"base": nn.Linear(6, 6), "adapter": nn.Linear(6, width)}))
        self.model["base"].requires_grad_(False)
        self.dropout = nn.Dropout(dropout)

    def training_step(self, batch, index):
        out = self.model["adapter"](self.dropout(self.model["base"](batch["x"]))).sum(-1)
        return {"loss": ((out - batch["y"]) ** 2).mean()}

    def validation_step(self, batch, index):
        out = self.model["adapter"](self.model["base"](batch["x"])).sum(-1)
        score = -((out - batch["y"]) ** 2).mean()
        self.log("valid/auc", score, batch_size=len(out))
        self.log("valid/hr@1", -score, batch_size=len(out))

    def configure_optimizers(self):
        return optimizer(self, FIT, STEPS)


def test_frozen_weights_are_in_no_checkpoint(make_stage):
    folder = make_stage("stage2/lora")
    module = Adapted()
    base = module.model["base"].weight.clone()
    run = train(folder, module, first=True)
    for path in (folder / "checkpoints").glob("*.ckpt"):
        assert sorted(load(path)["state_dict"]) == ["model.adapter.bias", "model.adapter.weight"]
    assert torch.equal(module.model["base"].weight, base)
    fresh = Adapted()
    fresh.load_best(run, "valid/auc")
    stored = load(best(run, "valid/auc"))["state_dict"]["model.adapter.weight"]
    assert torch.equal(fresh.model["adapter"].weight, stored)
    assert torch.equal(fresh.model["base"].weight, base)


def test_an_adapter_resumes_to_the_bit(make_stage):
    whole, resumed = make_stage("stage2/whole"), make_stage("stage2/resumed")
    module = Adapted()
    wanted = ended(train(whole, module), module)
    killed = Adapted()
    killed.on_train_batch_start = lambda batch, index: _kill(killed, 15)
    with pytest.raises(Killed):
        train(resumed, killed)
    module = Adapted()
    got = ended(train(resumed, module), module)
    for name, value in wanted.items():
        assert same(got[name], value), name


def _kill(module, step):
    if module.trainer.global_step == step:
        raise Killed


def test_a_checkpoint_of_another_adapter_is_refused(make_stage):
    run = train(make_stage("stage2/lora"), Adapted())
    other = Adapted()
    other.model["base"].requires_grad_(True)
    with pytest.raises(StageError, match=r"differs from this model in model\.base"):
        other.load_best(run, "valid/auc")


def test_the_learning_rate_rises_and_falls_linearly():
    made = optimizer(nn.Linear(3, 3), FitConfig(lr=1.0, warmup=0.2, weight_decay=0.5), 10)
    adam, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(10):
        rates.append(adam.param_groups[0]["lr"])
        adam.step()
        schedule.step()
    # Two steps of rise: 1/2, 2/2; then (10 - step) / 8.
    np.testing.assert_allclose(rates, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    decays = [(group["weight_decay"], len(group["params"])) for group in adam.param_groups]
    assert decays == [(0.5, 1), (0.0, 1)]


def test_a_batch_that_cannot_be_dealt_to_the_devices_is_refused(make_stage):
    with pytest.raises(StageError, match="batch_size=8 cannot be dealt to 3 devices"):
        train(make_stage("stage1/sim"), Small(), devices=3)


@pytest.mark.parametrize(("after", "steps"), [(0, 12), (6, 18), (12, 24)])
def test_nothing_stops_up_to_a_step(make_stage, after, steps):
    """Scores fall from step 6 on; without patience the second of those that count ends the training."""
    module = Small(scores=[0.0, 0.9, 0.8, 0.7, 0.6])
    run = start(make_stage("stage1/sim"))
    try:
        settings = dataclasses.replace(FIT, patience=1)
        fit(run, module, loaders(), settings, INTERVAL, ["valid/auc", "valid/hr@1"], stops_after=after)
    finally:
        run._lock.close()
    assert module.steps_done == list(range(steps))
