"""A log that holds nothing out, for production: `make bundle ALL_DATA=1` trains once more on all samples."""

from __future__ import annotations

from recllm.console import say
from recllm.eventlog.all_data import write_all_data
from recllm.eventlog.log import EventLog
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role


def work(run: Run) -> None:
    """Write it from the log that holds samples out."""
    log = EventLog.open(run.parents[Role.LOG].folder)
    metrics = write_all_data(log, run.folder, run.config.prepare)
    say(f"{metrics['samples']:,} samples of {metrics['events']:,} events train; none is held out")
    arrays = [path for suffix in ("npy", "parquet", "json") for path in run.folder.glob(f"*.{suffix}")]
    run.finish(arrays, metrics)
