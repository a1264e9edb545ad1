"""Figures that must not get worse: who meets what is wanted, and what is said of who does not."""

import json
from pathlib import Path

import pytest

from recllm.errors import StageError
from recllm.evaluation.results import ResultRow, write
from recllm.evaluation.thresholds import Threshold, hold, read_thresholds
from stages import report

REPOSITORY = Path(__file__).parents[2]
WANTED = {
    "dataset": "demo",
    "task": "ctr",
    "system": "sim",
    "row_set": "test/all",
    "metric": "auc",
    "value": 0.76,
    "tolerance": 0.01,
    "seeds": [0, 1],
}


def measured(*figures, metric="auc", **keys):
    seeds = [{"seed": seed, "metrics": {metric: figure}} for seed, figure in enumerate(figures)]
    own = {"system": "sim", "stage": "stage1", "task": "ctr", "row_set": "test/all"} | keys
    return ResultRow(**own, rows=10, metrics={metric: 0.0}, seeds=seeds)


def wanted(**keys):
    return Threshold(**WANTED | {"seeds": (0, 1)} | keys)


def test_of_lines_that_differ_by_k_or_lm_the_one_that_is_said_counts():
    rows = [measured(0.9, 0.9, k=1, lm="a"), measured(0.5, 0.5, k=4, lm="a"), measured(0.7, 0.7, k=4, lm="b")]
    with pytest.raises(StageError, match=r"means 3 lines .*; wanted one: say k or lm too"):
        hold(wanted(), rows)
    assert wanted(k=1).row(rows) is rows[0]
    assert wanted(lm="b").row(rows) is rows[2]
    assert wanted(k=4, lm="a").row(rows) is rows[1]
    assert wanted(k=2).row(rows) is None


@pytest.mark.parametrize(
    ("figures", "is_met"),
    [
        ((0.75, 0.75), True),  # the mean is .75, just .76 - .01
        ((0.74, 0.76), True),  # as good on average
        ((0.74, 0.758), False),  # .749
        ((0.9, 0.9), True),  # better is no fault
    ],
)
def test_a_mean_over_seeds_may_be_worse_by_the_tolerance(figures, is_met):
    met, line = hold(wanted(value=0.76, tolerance=0.0100001), [measured(*figures)])
    assert met == is_met
    assert line == f"ctr test/all sim auc: {sum(figures) / 2:.4f}, wanted at least 0.7500"


def test_of_a_cost_more_is_worse():
    threshold = wanted(metric="logloss", value=0.5, tolerance=0.01, seeds=(0,))
    assert hold(threshold, [measured(0.509, metric="logloss")])[0]
    assert hold(threshold, [measured(0.4, metric="logloss")])[0]
    met, line = hold(threshold, [measured(0.511, metric="logloss")])
    assert not met
    assert line.endswith("0.5110, wanted at most 0.5100")


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [measured(0.9)],  # seed 1 is missing
        [measured(0.9, 0.9, system="din")],
        [measured(0.9, 0.9, variant="quick")],
        [measured(0.9, 0.9, row_set="test/uniform100")],
        [measured(0.9, None)],
    ],
)
def test_what_was_not_measured_is_not_met(rows):
    met, line = hold(wanted(), rows)
    assert not met
    assert "not measured for seed" in line


def test_an_entry_with_a_wrong_key_is_one_line(tmp_path):
    path = tmp_path / "thresholds.json"
    for broken, key in (
        ({**WANTED, "metrik": "auc"}, "metrik"),
        ({name: value for name, value in WANTED.items() if name != "seeds"}, "seeds"),
    ):
        path.write_text(json.dumps([WANTED, broken]))
        with pytest.raises(StageError, match=f"entry 1: the key '{key}' is missing or not known"):
            read_thresholds(path, "demo")
    path.write_text(json.dumps([WANTED]))
    with pytest.raises(StageError, match="says nothing of ml-1m; wanted one of demo"):
        read_thresholds(path, "ml-1m")


def test_the_command_ends_with_an_error_where_a_figure_is_worse(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thresholds.json").write_text(json.dumps([WANTED, {**WANTED, "value": 0.9}]))
    monkeypatch.setattr(report, "repository", lambda: tmp_path)
    root = tmp_path / "artifacts" / "demo"
    root.mkdir(parents=True)
    write(root / "results.json", [measured(0.76, 0.78)])
    with pytest.raises(SystemExit, match=r"1 of 2 figures of .* are worse than"):
        report.quality(root)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "ok    ctr test/all sim auc: 0.7700, wanted at least 0.7500",
        "WORSE ctr test/all sim auc: 0.7700, wanted at least 0.8900",
    ]


@pytest.mark.parametrize("dataset", ["demo", "ml-1m"])
def test_what_is_tracked_meets_what_is_wanted(dataset):
    """Nobody tightens a threshold beyond what was ever measured, nor tracks figures that fall short."""
    rows = report.read(REPOSITORY / "results" / dataset / "table.json")
    for threshold in read_thresholds(REPOSITORY / "results" / "thresholds.json", dataset):
        met, line = hold(threshold, rows)
        assert met, line
