"""Prepare: canonical tables -> event log, splits, ids, candidates, row sets."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from omegaconf import OmegaConf

from recllm.console import say
from recllm.eventlog.build import build_log
from recllm.eventlog.ids import SPLITS
from recllm.paths import FORMATS
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.text.formats import check_formats, shortened


def work(run: Run) -> None:
    """Build the event log; see `recllm.eventlog.build.build_log`."""
    tables = run.parents[Role.TABLES].folder
    templates = {}
    if (path := run.folder / FORMATS).exists():  # what the plan knows of the texts that will be made
        templates = {str(key): str(value) for key, value in OmegaConf.load(path).items()}
        check_formats(templates, tables)
    metrics = build_log(tables, run.folder, run.config.prepare)
    arrays = [path for suffix in ("npy", "parquet", "json") for path in run.folder.glob(f"*.{suffix}")]
    counts = ", ".join(f"{metrics[name]:,} {name}" for name in SPLITS)
    say(f"{metrics['samples']:,} samples of {metrics['events']:,} events: {counts}")
    if "first_second_train" in metrics:
        spans = (f"{name} {_day(metrics, 'first', name)} to {_day(metrics, 'last', name)}" for name in SPLITS)
        say(f"days (UTC) of the samples: {', '.join(spans)}")
    for name in ("valid", "test"):
        cold = (f"{kind}s {metrics[f'cold_{kind}_share_{name}']:.1%}" for kind in ("user", "item"))
        say(f"{name} samples that are cold in training: {', '.join(cold)}")
    for key, count, total in shortened(templates, run.folder) if templates else []:
        say(f"{key}: {count:,} of {total:,} texts lack an empty column's line, or read 'unknown' there")
    for note in metrics["notes"]:
        say(f"{note}")
    run.finish(arrays, metrics)


def _day(metrics: dict[str, Any], end: str, split: str) -> str:
    return f"{datetime.fromtimestamp(metrics[f'{end}_second_{split}'], UTC):%Y-%m-%d}"
