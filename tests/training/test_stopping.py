"""SIGTERM anywhere in the real `fit`: it ends soon, with a checkpoint, and what is resumed ends the same."""

import os
import signal

import lightning
import pytest

from recllm.training.callbacks import at_once_at_sigterm
from tests.training import test_fit as whole
from tests.training.test_micro_batches import Adapted, micro_batched

TOKENS = 12


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


class Stopped(whole.Small):
    """Gets SIGTERM in a step, or in a validation."""

    def __init__(self, step=None, validation=None):
        super().__init__()
        self.step, self.validation = step, validation

    def training_step(self, batch, index):
        if self.trainer.global_step == self.step:
            stop()
        return super().training_step(batch, index)

    def validation_step(self, batch, index):
        if self.trainer.global_step == self.validation and index == 0:
            stop()
        super().validation_step(batch, index)


class StoppedBetween(Adapted):
    """Gets SIGTERM in a micro-batch."""

    def __init__(self, at=None):
        super().__init__()
        self.at = at
        self.computed = []

    def loss(self, batch):
        self.computed.append((self.global_step, batch["place"]))
        if self.at == (self.global_step, batch["place"]):
            stop()
        return super().loss(batch)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return whole.uninterrupted.__wrapped__(tmp_path_factory)


# Where it stops -> the step at which it goes on: the present one is done to its end, a validation is not.
PLACES = [
    ({"step": 0}, 1),
    ({"step": 9}, 10),
    ({"step": 11}, 12),  # the last one before a validation
    ({"step": 12}, 13),  # the first one behind it
    ({"validation": 12}, 12),
    ({"step": 22}, 23),
]


@pytest.mark.parametrize(("place", "step"), PLACES)
def test_what_is_stopped_goes_on_where_it_was(make_stage, capsys, uninterrupted, place, step):
    folder = make_stage("stage1/sim")
    with pytest.raises(SystemExit) as stopped:
        whole.train(folder, Stopped(**place), checkpoint_every=50)
    assert stopped.value.code == 143
    assert f"stopped by SIGTERM, {step} of {whole.STEPS} steps are done" in capsys.readouterr().out
    module = whole.Small()
    run = whole.train(folder, module)
    assert f"resumes at step {step}\n" in capsys.readouterr().out
    assert module.steps_done == list(range(step, whole.STEPS))
    got = whole.ended(run, module)
    for name, value in uninterrupted[False].items():
        assert whole.same(got[name], value), name


def test_in_the_last_validation_the_checkpoint_before_stays(make_stage, uninterrupted):
    folder = make_stage("stage1/sim")
    with pytest.raises(SystemExit):
        whole.train(folder, Stopped(validation=24), checkpoint_minutes=1e-9)
    module = whole.Small()
    run = whole.train(folder, module)
    assert module.steps_done == [23]
    got = whole.ended(run, module)
    for name, value in uninterrupted[False].items():
        assert whole.same(got[name], value), name


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("step", [9, 12, 23])
def test_a_step_that_was_cut_short_is_done_again(make_stage, monkeypatch, capsys, parts, step):
    monkeypatch.setattr(whole, "loaders", lambda: micro_batched(TOKENS))

    def train(name, module):
        run = whole.train(make_stage(name), module, accumulate=parts, checkpoint_every=50)
        return whole.ended(run, module)

    wanted = train("stage2/whole", StoppedBetween())
    module = StoppedBetween((step, 0))
    with pytest.raises(SystemExit):
        train("stage2/stopped", module)
    assert module.computed[-1] == (step, 0)  # not one micro-batch more
    capsys.readouterr()
    module = StoppedBetween()
    got = train("stage2/stopped", module)
    assert f"resumes at step {step}\n" in capsys.readouterr().out
    assert module.computed[0] == (step, 0)
    for name, value in wanted.items():
        assert whole.same(got[name], value), name


def test_a_validation_that_comes_late_is_saved_before(make_stage, monkeypatch, uninterrupted):
    """A kill in the middle of it loses nothing of the training."""
    folder = make_stage("stage1/sim")
    with pytest.raises(whole.Killed):
        whole.train(folder, whole.Small(kill_validation=18), checkpoint_every=50, checkpoint_minutes=1e-9)
    module = whole.Small()
    run = whole.train(folder, module)
    assert module.steps_done == list(range(18, whole.STEPS))
    got = whole.ended(run, module)
    for name, value in uninterrupted[False].items():
        assert whole.same(got[name], value), name


def test_processes_that_train_together_keep_what_they_wrote_last(make_stage, monkeypatch):
    """Only one of them may have got the signal, and a checkpoint is written by all."""
    monkeypatch.setattr(lightning.Trainer, "world_size", 2)
    folder = make_stage("stage1/sim")
    with pytest.raises(SystemExit):
        whole.train(folder, Stopped(step=9), checkpoint_every=50)
    assert whole.load(folder / "checkpoints" / "last.ckpt")["global_step"] == 6


def test_where_there_is_nothing_to_keep_a_process_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with at_once_at_sigterm():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before
