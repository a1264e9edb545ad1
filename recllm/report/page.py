"""Gathers what a data set's artifacts hold and fills the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recllm.evaluation import results, tables
from recllm.paths import CHECKPOINTS, LOGS, MANIFEST, RESULTS
from recllm.pipeline.stages import STAGES
from recllm.report.curves import draw, read_series
from recllm.report.forgetting import forgetting_tables
from recllm.report.gate import gate_sections
from recllm.report.html import write_page
from recllm.report.sweeps import sweeps

TASKS = {"ctr": "Will this user like this item (CTR)", "ranking": "Which item comes next (ranking)"}


def write_report(folder: Path, out: Path) -> list[str]:
    """Write the report of a data set: one HTML file that needs nothing else, no network either.

    Parts that are missing (no results yet, a stage without a finished run, a log that cannot be read) are
    listed on top of the page. They are no errors: a report may be asked for at any time.

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
    manifests = _manifests(folder, missing)
    curves = _curves(folder, missing)  # adds to `missing`, which the page lists first
    write_page(
        out,
        "page.html.j2",
        dataset=folder.resolve().name,
        missing=missing,
        facts=_facts(rows, manifests),
        results=[(TASKS[task], tables.result_tables(rows, task)) for task in TASKS],
        differences=tables.difference_tables(rows),
        bands=tables.slice_tables(rows),
        changes=forgetting_tables(rows),
        sweeps=sweeps(folder),
        gates=gate_sections(folder),
        curves=curves,
        stages=[_stage(name, manifest) for name, manifest in manifests.items()],
    )
    return missing


def _reported() -> dict[str, str]:
    """First part of the folders that the report tells of -> the make target that fills them."""
    return {stage.folder: stage.goal for stage in STAGES.values() if stage.reported}


def _below(folder: Path, top: str, name: str) -> Iterator[Path]:
    """Files or folders of this name in a stage's folders, those that say something besides among them."""
    for place in (folder / top, *folder.glob(f"{top}+*")):
        yield from place.rglob(name)


def _manifests(folder: Path, missing: list[str]) -> dict[str, dict[str, Any]]:
    """Manifests by folder in pipeline order; stages without one, and unfinished runs, go to `missing`."""
    found: dict[str, dict[str, Any]] = {}
    for top, target in _reported().items():
        paths = sorted(_below(folder, top, MANIFEST))
        for path in paths:
            try:
                found[path.parent.relative_to(folder).as_posix()] = json.loads(path.read_text())
            except ValueError:
                missing.append(f"{path.relative_to(folder)} is not readable JSON.")
        if not paths:
            missing.append(f"Nothing finished in {top}/: no {MANIFEST}; `make {target}` writes it.")
        begun = {p.parent for name in (CHECKPOINTS, LOGS) for p in _below(folder, top, name) if p.is_dir()}
        for run in sorted(begun - {path.parent for path in paths}):
            missing.append(f"{run.relative_to(folder).as_posix()} was begun and is not finished.")
    return found


def _facts(
    rows: list[results.ResultRow], manifests: dict[str, dict[str, Any]]
) -> list[tuple[str, list[str]]]:
    """What, by whom, on what: name and distinct values."""
    everything = [*manifests.values(), *(vars(row) for row in rows)]

    def distinct(key: str) -> list[str]:
        return sorted({str(entry[key]) for entry in everything if entry.get(key)})

    versions = {
        f"{name} {number}" for manifest in manifests.values() for name, number in _dict(manifest, "versions")
    }
    counts = _dict(manifests.get("log", {}), "metrics")
    samples = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value:,}"
        for name, value in counts
        if isinstance(value, int | float)
    ]
    notes = [note for name, value in counts if name == "notes" for note in value]
    dates = sorted(str(entry[key]) for entry in everything for key in ("finished", "date") if entry.get(key))
    return [
        ("samples", [", ".join(samples)] if samples else []),
        ("the split", notes),
        ("language models", sorted({row.lm for row in rows if row.lm})),
        ("commits", distinct("commit")),
        ("hardware", distinct("hardware")),
        ("commands", distinct("command")),
        ("dates", dates if len(dates) < 2 else [f"{dates[0]} to {dates[-1]}"]),
        ("versions", [", ".join(sorted(versions))] if versions else []),
    ]


def _dict(manifest: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    value = manifest.get(key)
    return (
        [(name, inner) for name, inner in value.items() if inner is not None]
        if isinstance(value, dict)
        else []
    )


def _curves(folder: Path, missing: list[str]) -> list[tuple[str, str]]:
    """Images by run; the name is the folder that holds `logs/`."""
    images = []
    for path in sorted(path for top in _reported() for path in _below(folder, top, "metrics.csv")):
        name = path.parent.relative_to(folder).as_posix().replace(f"/{LOGS}", "")
        series = read_series(path)
        if series:
            images.append((name, draw(series)))
        else:
            missing.append(f"{path.relative_to(folder).as_posix()} holds no curve.")
    return images


def _stage(name: str, manifest: dict[str, Any]) -> dict[str, str]:
    seconds = manifest.get("seconds")
    size = sum(int(output.get("bytes", 0)) for output in manifest.get("outputs", []))
    shown = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in _dict(manifest, "metrics")
        if isinstance(value, int | float | str)
    ]
    return {
        "folder": name,
        "seed": str(manifest.get("seed", "")),
        "finished": str(manifest.get("finished", "")),
        "seconds": f"{seconds:,.0f}" if isinstance(seconds, int | float) else "",
        "commit": str(manifest.get("commit", "")),
        "size": f"{size / 1e6:,.1f} MB",
        "metrics": ", ".join(shown),
    }
