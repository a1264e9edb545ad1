"""Prepare: canonical tables -> event log, splits, ids, candidates, row sets."""

from __future__ import annotations

from recllm.console import say
from recllm.eventlog.build import build_log
from recllm.eventlog.ids import SPLITS
from recllm.paths import METRICS
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role


def work(run: Run) -> None:
    """Build the event log; see `recllm.eventlog.build.build_log`."""
    metrics = build_log(run.parents[Role.TABLES].folder, run.folder, run.config.prepare)
    arrays = [path for suffix in ("npy", "parquet", "json") for path in run.folder.glob(f"*.{suffix}")]
    shown = ", ".join(f"{metrics[name]:,} {name}" for name in SPLITS)
    say(f"{metrics['samples']:,} samples of {metrics['events']:,} events: {shown}")
    for name in ("valid", "test"):
        cold = (f"{kind}s {metrics[f'cold_{kind}_share_{name}']:.1%}" for kind in ("user", "item"))
        say(f"{name} samples that are cold in training: {', '.join(cold)}")
    for note in metrics["notes"]:
        say(f"{note}")
    run.finish([path for path in arrays if path.name != METRICS], metrics)
