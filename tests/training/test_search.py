"""A study: what its trials are, that killed ones go on, and that processes share one budget."""

import csv
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState

from recllm.config.merge import load_yaml, merge
from recllm.pipeline.run import Run
from recllm.training.callbacks import NotFinite
from recllm.training.search import BEST, Search

SPACE = [
    {"key": "stage1.fit.lr", "low": 1e-4, "high": 1e-2, "log": True, "unit": "rate"},
    {"key": "stage1.crm.embedding_dim", "choices": [8, 16], "unit": "width"},
    {"key": "stage1.crm.dropout", "low": 0.0, "high": 0.5, "unit": "dropout"},
]
CONFIGURED = {"stage1.fit.lr": 0.002, "stage1.crm.embedding_dim": 16, "stage1.crm.dropout": 0.2}


@pytest.fixture
def start(make_stage):
    """`start("tune/din", trials=4, **{"stage1.recent": 5})` -> a search as one process opens it."""

    def open_one(name="tune/din", trials=4, random=2, **keys):
        layers = [("here", {"tune": {"space": SPACE, "trials": trials, "random": random}})]
        config = asdict(merge(layers, {**CONFIGURED, **keys}))
        sections = {section: config[section] for section in ("stage1", "tune", "seed")}
        return Search.open(Run.start([str(make_stage(name, sections))]))

    return open_one


def trained(search, scores):
    """Claim a trial and validate it with these scores, one every 10 steps, until the study gives it up."""
    trial, run = search.claim()
    rows = []
    with search.watch(trial, run) as pruning:
        (run.folder / "logs").mkdir(exist_ok=True)
        for number, score in enumerate(scores, start=1):
            if score is KeyboardInterrupt:
                raise score
            scored = {"valid/auc": score}
            trainer = SimpleNamespace(global_step=10 * number, callback_metrics=scored)
            parts = 1 + trial.number % 3  # a step's parts are batches to Lightning
            trainer.accumulate_grad_batches = parts
            trainer.val_check_interval = 10 * parts
            trainer.should_stop = False
            pruning.on_validation_end(trainer, None)
            rows.append({"step": 10 * number, "valid/auc": score})
            with (run.folder / "logs" / "metrics.csv").open("w", newline="") as stream:
                writer = csv.DictWriter(stream, ["step", "valid/auc"])
                writer.writeheader()
                writer.writerows(rows)
            if trainer.should_stop:
                break
    return run, rows


def settings(run):
    """What the trial of this run trains with."""
    stage1 = run.config.stage1
    return {
        "stage1.fit.lr": stage1.fit.lr,
        "stage1.crm.embedding_dim": stage1.crm.embedding_dim,
        "stage1.crm.dropout": stage1.crm.dropout,
    }


def test_the_first_trial_is_what_is_configured_and_the_others_lie_in_the_space(start):
    search = start()
    assert settings(trained(search, [0.7])[0]) == CONFIGURED
    for _ in range(3):
        drawn = settings(trained(search, [0.7])[0])
        assert drawn != CONFIGURED
        assert 1e-4 <= drawn["stage1.fit.lr"] <= 1e-2
        assert drawn["stage1.crm.embedding_dim"] in (8, 16)
        assert 0 <= drawn["stage1.crm.dropout"] <= 0.5
        for value in drawn.values():
            assert value == float(f"{value:.3g}")
    assert search.claim() is None


def test_the_value_is_the_best_validation_and_a_trial_leaves_nothing_behind(start):
    search = start(trials=2)
    run, _ = trained(search, [0.6, 0.8, 0.7])
    trained(search, [0.7, 0.75])
    assert [trial.value for trial in search.study.trials] == [0.8, 0.75]
    assert search.study.trials[0].user_attrs["step"] == 20
    assert search.study.trials[0].intermediate_values == {0: 0.6, 1: 0.8, 2: 0.7}
    assert {path.name for path in run.folder.parent.iterdir()} == {"config.yaml", "study.db", ".lock"}


def test_two_processes_share_the_trials_and_the_budget(start):
    one, two = start(trials=3), start(trials=3)
    first, second = one.claim(), two.claim()
    assert {first[0].number, second[0].number} == {0, 1}
    third = one.claim()
    assert third[0].number == 2
    assert one.claim() is two.claim() is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_trial_goes_on_elsewhere_with_its_settings(start, error):
    search = start(trials=3)
    trained(search, [0.7])
    trial, run = search.claim()
    (run.folder / "checkpoint").touch()
    with pytest.raises(error), search.watch(trial, run):
        raise error
    again, resumed = start(trials=3).claim()
    assert again.number == trial.number == 1
    assert settings(resumed) == settings(run)
    assert (resumed.folder / "checkpoint").exists()
    other = search.claim()
    assert other[0].number == 2
    assert search.claim() is None


def test_a_score_that_a_resumed_trial_computes_again_is_told_once(start):
    search = start()
    with pytest.raises(KeyboardInterrupt):
        trained(search, [0.6, KeyboardInterrupt])
    trained(search, [0.6, 0.7])
    assert search.study.trials[0].intermediate_values == {0: 0.6, 1: 0.7}


def test_a_loss_that_is_not_finite_fails_the_trial_and_spends_its_budget(start):
    search = start(trials=2)
    trial, run = search.claim()
    with search.watch(trial, run):
        raise NotFinite("train/loss is nan")
    trained(search, [0.6])
    assert [trial.state for trial in search.study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert search.claim() is None
    assert not run.folder.exists()


def test_a_trial_below_the_median_of_the_others_is_cut_short(start):
    search = start(trials=4)
    trained(search, [0.60, 0.70])
    trained(search, [0.64, 0.80])  # medians after the first validation .62, after the second .75
    _, rows = trained(search, [0.63, 0.74, 0.9])
    assert [row["valid/auc"] for row in rows] == [0.63, 0.74]
    _, rows = trained(search, [0.66, 0.81, 0.82])  # nobody has a third validation to compare with
    assert len(rows) == 3
    states = [trial.state for trial in search.study.trials]
    assert states == [TrialState.COMPLETE] * 2 + [TrialState.PRUNED, TrialState.COMPLETE]


def test_what_is_drawn_depends_on_the_trials_before_and_not_on_who_asks(start):
    def drawn(name, opened_anew):
        search, values = start(name, trials=6), []
        for number in range(6):
            search = start(name, trials=6) if opened_anew else search
            values.append(settings(trained(search, [0.6 + math.sin(number) / 10])[0]))
        return values

    assert drawn("tune/din", False) == drawn("tune/sim", True)


def test_a_setting_outside_the_space_begins_another_study_and_one_inside_does_not(start):
    search = start()
    assert start(**{"stage1.fit.lr": 0.005}).study.study_name == search.study.study_name
    assert start(trials=9).study.study_name == search.study.study_name
    assert start(**{"stage1.recent": 7}).study.study_name != search.study.study_name


def test_the_best_values_are_printed_and_can_be_pasted_into_the_configuration(start, capsys):
    search = start(trials=3)
    trained(search, [0.70])
    best, _ = trained(search, [0.80])
    trained(search, [0.75])
    capsys.readouterr()
    search.report()
    out = capsys.readouterr().out
    path = search.run.folder / BEST
    assert path.read_text() in out
    assert "3 trials trained, 0 cut short, 0 failed" in out
    assert "valid/auc 0.8000 at step 10, trial 1 of 3; as configured before: 0.7000" in out
    config = merge([("best", load_yaml(Path(path)))], {})
    assert settings(SimpleNamespace(config=config)) == settings(best)
    assert all("  # " in line for line in path.read_text().splitlines()[1:] if line.rstrip()[-1] != ":")


def test_several_devices_are_refused(start, make_stage):
    search = start()
    with pytest.raises(ValueError, match=r"trainer\.devices=2.*twice"):
        Search.open(Run.start([str(search.run.folder), "trainer.devices=2"]))
