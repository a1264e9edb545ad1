"""Evaluation over the whole catalog: what every system recommends on the test split, with intervals.

Validation rows fit how the scores of a cascade's steps are joined; nothing else is selected here.
"""

from __future__ import annotations

from recllm.console import is_first_process
from recllm.evaluation.next import NextEvaluation, next_items
from recllm.evaluation.results import write
from recllm.paths import ROWS
from recllm.pipeline.run import Run
from recllm.training.launch import start_processes


def work(run: Run) -> None:
    """Ask every system, write the rows of the table."""
    start_processes(run.config.trainer)
    rows = next_items(NextEvaluation.open(run))
    if not is_first_process():
        return
    write(run.folder / ROWS, rows)
    run.finish([run.folder / ROWS], dict(row.headline for row in rows))
