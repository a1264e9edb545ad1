"""Fills the page with what a data set's artifacts hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recllm.evaluation import results, tables
from recllm.evaluation.results import ResultRow
from recllm.paths import LOGS, RESULTS
from recllm.pipeline.finished import Finished
from recllm.report.calibration import calibration_sections
from recllm.report.costs import cost_tables
from recllm.report.curves import Series, draw, read_series
from recllm.report.forgetting import forgetting_tables
from recllm.report.gate import gate_sections
from recllm.report.html import write_page
from recllm.report.rewards import is_reward, reward_section
from recllm.report.stages import files, finished_stages, reported
from recllm.report.sweeps import sweeps
from recllm.report.verdict import verdicts

TASKS = {
    "ctr": "Will this user like this item (CTR)",
    "ranking": "Which item comes next (ranking)",
    "next": "Which item of the whole catalog comes next",
}


def write_report(folder: Path, out: Path) -> list[str]:
    """Write the report of a data set: one HTML file that needs nothing else, no network either.

    It opens with what came out, in words and in one picture, and ends with facts about the run. Parts that
    are missing (no results yet, a stage without a finished run, a log that cannot be read) are listed at its
    end, and the top says how many there are. They are no errors: a report may be asked for at any time.

    Args:
        folder: `artifacts/<dataset>`.
        out: the file to write; replaced atomically.

    Returns:
        What is missing, one line each, as the page lists it.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist, want a data set's artifacts; run `make stage1` first"
        )
    missing: list[str] = []
    rows = results.read(folder / RESULTS)
    if not rows:
        missing.append(f"No results: {RESULTS} is missing or empty; `make evaluate` writes it.")
    stages = finished_stages(folder, missing)
    curves = _curves(folder, missing)
    gates = gate_sections(stages.values(), missing)
    found_sweeps = sweeps(folder, missing)  # like all above it adds to what the page lists first
    write_page(
        out,
        "page.html.j2",
        dataset=folder.resolve().name,
        missing=missing,
        verdicts=[(TASKS[verdict.task], verdict) for verdict in verdicts(rows)],
        results=[(TASKS[task], tables.result_tables(rows, task)) for task in TASKS],
        differences=tables.difference_tables(rows),
        sweeps=found_sweeps,
        curves=_training_images(curves),
        calibration=calibration_sections(rows),
        slices=tables.slice_tables(rows),
        forgetting=forgetting_tables(rows),
        gates=gates,
        rewards=reward_section(curves),
        costs=cost_tables(rows, stages.values()),
        facts=_facts(rows, stages),
        stages=[_line(stage) for stage in stages.values()],
    )
    return missing


def _facts(rows: Iterable[ResultRow], stages: Mapping[str, Finished]) -> list[tuple[str, list[str]]]:
    """What, by whom, on what: name and distinct values."""
    manifests = [stage.manifest for stage in stages.values()]
    everything = [*manifests, *rows]
    versions = {f"{name} {number}" for made in manifests for name, number in made.versions.items()}
    log = _known(stages["log"]) if "log" in stages else {}
    dates = sorted({*_distinct(manifests, "finished"), *_distinct(rows, "date")})
    return [
        ("samples", [", ".join(_numbers(log))] if _numbers(log) else []),
        ("the split", log.get("notes", [])),
        ("language models", _distinct(rows, "lm")),
        ("commits", _distinct(everything, "commit")),
        ("hardware", _distinct(everything, "hardware")),
        ("commands", _distinct(rows, "command")),
        ("dates", [f"{dates[0]} to {dates[-1]}"] if len(dates) > 1 else dates),
        ("versions", [", ".join(sorted(versions))] if versions else []),
    ]


def _distinct(entries: Iterable[Any], name: str) -> list[str]:
    """Values of an attribute, each once; empty ones left out."""
    return sorted({str(getattr(entry, name)) for entry in entries if getattr(entry, name, None)})


def _numbers(metrics: Mapping[str, Any]) -> list[str]:
    """`samples 970,009`: figures in words."""
    words = []
    for name, value in metrics.items():
        if isinstance(value, float):
            words.append(f"{name} {value:.4g}")
        elif isinstance(value, int):
            words.append(f"{name} {value:,}")
    return words


def _known(stage: Finished) -> dict[str, Any]:
    """A stage's figures, but for those that it could not tell."""
    return {name: value for name, value in stage.manifest.metrics.items() if value is not None}


def _curves(folder: Path, missing: list[str]) -> dict[str, dict[str, Series]]:
    """Curves by run; the name is the folder that holds `logs/`."""
    logs: dict[str, Path] = {}
    for top in reported():
        for place, path in files(folder, top, "metrics.csv").items():
            logs[place.replace(f"/{LOGS}", "")] = path
    curves = {}
    for name, path in sorted(logs.items()):
        series = read_series(path)
        if series:
            curves[name] = series
        else:
            missing.append(f"{name}/{LOGS}/{path.name} holds no curve.")
    return curves


def _training_images(curves: Mapping[str, Mapping[str, Series]]) -> list[tuple[str, str]]:
    """Images by run, without the curves of rewards, which have a section of their own."""
    images = []
    for name, series in curves.items():
        shown = {metric: curve for metric, curve in series.items() if not is_reward(metric)}
        if shown:
            images.append((name, draw(shown)))
    return images


def _line(stage: Finished) -> dict[str, str]:
    """A stage's line in the last table."""
    made = stage.manifest
    figures = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in _known(stage).items()
        if isinstance(value, int | float | str)
    ]
    return {
        "folder": stage.name,
        "seed": str(made.seed),
        "finished": made.finished,
        "commit": made.commit,
        "metrics": ", ".join(figures),
    }
