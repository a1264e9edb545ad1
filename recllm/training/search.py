"""A study of one CRM: trials that several processes share, resume, and cut short."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lightning
import optuna
from lightning.pytorch.callbacks import Callback
from optuna.trial import FrozenTrial, Trial, TrialState

from recllm import paths
from recllm.config.tune import Range
from recllm.console import say
from recllm.errors import Busy
from recllm.files import digest, now, write_text
from recllm.pipeline.manifest import commit
from recllm.pipeline.run import Run
from recllm.training.callbacks import NotFinite
from recllm.training.checkpoints import best_scores

Inputs = TypeVar("Inputs")

DATABASE = "study.db"
BEST = "best.yaml"
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class Pruning(Callback):
    """Tells the study every validation's score, and ends a training that the study gives up."""

    def __init__(self, trial: Trial, monitor: str) -> None:
        """Report `monitor`; the n-th validation is the study's step n - 1."""
        self.trial = trial
        self.monitor = monitor
        self.pruned = False

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Report, but for a score that a resumed training computes again: the study has it."""
        assert isinstance(trainer.val_check_interval, int)  # of batches, which are parts of steps
        interval = trainer.val_check_interval // trainer.accumulate_grad_batches
        step = math.ceil(trainer.global_step / interval) - 1  # the last validation may come earlier
        reported = self.trial.study.get_trials(deepcopy=False)[self.trial.number].intermediate_values
        if step not in reported:
            self.trial.report(float(trainer.callback_metrics[self.monitor]), step)
        self.pruned = self.trial.should_prune()
        trainer.should_stop = trainer.should_stop or self.pruned


@dataclass(frozen=True)
class Search:
    """The study at work in the folder of a run of stage `tune`.

    Any number of processes may work at it: a trial is claimed under a lock of the folder, and is held by the
    lock of its own folder. Both are the system's: a killed process holds none, and its trial goes on from its
    last checkpoint in whichever process asks next.
    """

    run: Run
    study: optuna.Study

    @classmethod
    def open(cls, run: Run) -> Search:
        """Open the study of the run's configuration, or begin it with the values that are configured now.

        Its name is a digest of all that must be equal for two scores to be comparable: parents, space, and
        the settings but for those that are searched.
        """
        trainer = run.config.trainer
        if trainer.processes > 1:
            raise ValueError(
                f"trainer.devices={trainer.devices}, trainer.num_nodes={trainer.num_nodes}: a trial trains "
                "in one process; wanted 1 (run the same command twice to have two trials side by side)"
            )
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        tune = run.config.tune
        fixed = copy.deepcopy(run.file.config)
        space = fixed.pop("tune")["space"]
        configured = {range_.key: _pop(fixed, range_.key) for range_ in tune.space}
        name = digest([fixed, space, run.identities])[:8]
        with _lock(run.folder):
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{run.folder / DATABASE}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            exists = name in {study.study_name for study in optuna.get_all_study_summaries(storage)}
            study = optuna.create_study(
                storage=storage,
                study_name=name,
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=tune.random),
            )
            if not exists:
                _enqueue_configured(study, tune.space, configured)
        num_ended = sum(trial.state in ENDED for trial in study.get_trials(deepcopy=False))
        say(f"study {name}: " + (f"{num_ended} of {tune.trials} trials done" if exists else "begins"))
        return cls(run, study)

    def _folder(self, number: int) -> Path:
        return self.run.folder / f"{self.study.study_name}-{number}"

    def claim(self) -> tuple[Trial, Run] | None:
        """A trial that nobody works at, and its run: an interrupted one, else a new one within the budget."""
        with _lock(self.run.folder):
            trials = self.study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state in ENDED:
                    shutil.rmtree(self._folder(trial.number), ignore_errors=True)
                if trial.state == TrialState.RUNNING:
                    try:
                        return self._start(Trial(self.study, trial._trial_id))
                    except Busy:
                        continue  # another process is at it
            begun = sum(trial.state != TrialState.WAITING for trial in trials)
            if begun >= self.run.config.tune.trials:
                return None
            return self._start(self.study.ask())

    def _start(self, trial: Trial) -> tuple[Trial, Run]:
        """Draw what was not drawn yet, and take the trial's folder."""
        # What a trial draws is a function of those before it, whichever process asks.
        self.study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=self.run.config.tune.random, seed=self.run.config.seed * 10_007 + trial.number
        )
        values = {range_.key: _draw(trial, range_) for range_ in self.run.config.tune.space}
        config = copy.deepcopy(self.run.file.config)
        del config["tune"]
        for key, value in values.items():
            _set(config, key, value)
        folder = self._folder(trial.number)
        folder.mkdir(exist_ok=True)
        name = f"{self.run.name}/{folder.name}"
        file = dataclasses.replace(self.run.file, stage="stage1", folder=name, config=config)
        write_text(folder / paths.CONFIG, file.text())
        try:
            run = Run.start([str(folder)])
        except Busy:
            raise
        except ValueError:
            self.study.tell(trial, state=TrialState.FAIL)  # a range that holds what cannot be configured
            raise
        run.config = dataclasses.replace(run.config, trainer=self.run.config.trainer)
        say(", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in values.items()))
        return trial, run

    @contextmanager
    def watch(self, trial: Trial, run: Run) -> Iterator[Pruning]:
        """Watch a trial's training, then tell the study how it ended, and remove what it wrote.

        A loss that is not finite fails the trial. What ends in another error, or is killed, stays as it is
        and goes on the next time.
        """
        pruning = Pruning(trial, self.monitor)
        state = TrialState.FAIL
        score = None
        try:
            yield pruning
            scores = best_scores(run, self.monitor)
            trial.set_user_attr("step", scores["step"])
            trial.set_user_attr("seconds", round(run.seconds, 1))
            if pruning.pruned:
                state = TrialState.PRUNED
            else:
                state = TrialState.COMPLETE
                score = scores[self.monitor]
            say(f"{self.monitor} {scores[self.monitor]:.4f}" + (", cut short" if pruning.pruned else ""))
        except NotFinite as error:
            say(f"failed: {error}")
        except BaseException:
            run.close()
            raise
        with _lock(self.run.folder):
            self.study.tell(trial, score, state)
            run.close()
            shutil.rmtree(run.folder, ignore_errors=True)

    @property
    def monitor(self) -> str:
        """The validation score that is searched for."""
        return self.run.config.stage1.monitor

    def report(self) -> None:
        """Print the study and write its best values: `best.yaml`, for `conf/stage1/<dataset>/<crm>.yaml`."""
        trials = self.study.get_trials(deepcopy=False)
        count = {state: sum(trial.state == state for trial in trials) for state in TrialState}
        say(
            f"{count[TrialState.COMPLETE]} trials trained, {count[TrialState.PRUNED]} cut "
            f"short, {count[TrialState.FAIL]} failed, {count[TrialState.RUNNING]} at work elsewhere"
        )
        scored = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        if not scored:
            say("no trial has a score")
            return
        best = max(scored, key=_value)
        first_is_configured = trials[0] in scored and trials[0].user_attrs["configured"]
        first = f"; as configured before: {_value(trials[0]):.4f}" if first_is_configured else ""
        text = (
            f"# {self.run.dataset}, {now()[:10]}, {commit()}: {self.monitor} {_value(best):.4f} at step "
            f"{best.user_attrs['step']:.0f}, trial {best.number} of {len(trials)}{first}.\n"
            f"{as_yaml(self.run.config.tune.space, best.params)}"
        )
        path = self.run.folder / BEST
        write_text(path, text)
        say(f"{text}  -> {path}")


def search(
    run: Run, data: Callable[[Run], Inputs], train: Callable[[Run, Inputs, list[Pruning]], Any]
) -> None:
    """Train trial after trial of a study until its budget is spent; what reads alike is read once.

    Args:
        run: of stage `tune`.
        data: what a trial's batches are made of.
        train: trains a trial, watched by these callbacks.
    """
    study = Search.open(run)
    read_with: dict[str, Any] | None = None
    while claimed := study.claim():
        trial, one = claimed
        with study.watch(trial, one) as pruning:
            if one.config.stage1.inputs != read_with:
                read_with = one.config.stage1.inputs
                inputs = data(one)
            train(one, inputs, [pruning])
    study.report()


def _enqueue_configured(study: optuna.Study, space: list[Range], configured: dict[str, Any]) -> None:
    """Make the configured values the first trial; those that are no choice of the space are drawn."""
    values = {}
    for range_ in space:
        value = configured[range_.key]
        if not range_.choices or value in range_.choices:
            values[range_.key] = value
    study.enqueue_trial(values, user_attrs={"configured": values == configured})


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep other processes of the same study waiting."""
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None  # complete trials have one
    return trial.value


def _draw(trial: Trial, range_: Range) -> Any:
    if range_.choices:
        return trial.suggest_categorical(range_.key, range_.choices)
    return _rounded(trial.suggest_float(range_.key, range_.low, range_.high, log=range_.log))


def _rounded(value: Any) -> Any:
    """Three digits: what is trained is what is printed."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _pop(nested: dict[str, Any], dotted: str) -> Any:
    """Take a value out of nested sections by its dotted key."""
    *sections, last = dotted.split(".")
    for section in sections:
        nested = nested[section]
    return nested.pop(last)


def _set(nested: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a value in nested sections by its dotted key."""
    *sections, last = dotted.split(".")
    for section in sections:
        nested = nested[section]
    nested[last] = value


def as_yaml(space: list[Range], values: Mapping[str, Any]) -> str:
    """Dotted keys and their values as the lines of a configuration file, each with its unit."""
    lines: list[str] = []
    previous: list[str] = []
    for range_ in sorted(space, key=lambda range_: range_.key):
        *sections, last = range_.key.split(".")
        same = 0
        while same < min(len(previous), len(sections)) and previous[same] == sections[same]:
            same += 1
        for depth in range(same, len(sections)):
            lines.append("  " * depth + f"{sections[depth]}:")
        previous = sections
        value = "  " * len(sections) + f"{last}: {_rounded(values[range_.key])}"
        lines.append(f"{value:<29} # {range_.unit}")
    return "\n".join(lines) + "\n"
