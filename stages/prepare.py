"""Prepare: canonical tables -> event log, splits, ids, candidates, row sets."""

from __future__ import annotations

import sys

from recllm.data.build import build_log
from recllm.paths import METRICS
from recllm.run import Run, main


def work(run: Run) -> None:
    """Build the event log; see `recllm.data.build.build_log`."""
    metrics = build_log(run.parent("tables"), run.folder, run.config.prepare)
    arrays = [path for suffix in ("npy", "parquet", "json") for path in run.folder.glob(f"*.{suffix}")]
    run.finish([path for path in arrays if path.name != METRICS], dict(metrics))


if __name__ == "__main__":
    sys.exit(main(work, sys.argv[1:]))
