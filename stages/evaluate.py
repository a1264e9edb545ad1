"""Evaluation: every system on the test split, on the same rows, against every baseline, with intervals.

Scores of LMs are kept under the identity of what made them, so that an interrupted or extended evaluation
computes only what is missing, which is dealt over all processes. Validation rows serve the stacking control;
nothing is selected here.
"""

from __future__ import annotations

from recllm.console import is_first_process
from recllm.evaluation.context import Evaluation
from recllm.evaluation.ctr import alignment_cost, ctr
from recllm.evaluation.ranking import ranking
from recllm.evaluation.results import write
from recllm.paths import ROWS
from recllm.pipeline.run import Run
from recllm.training.launch import start_processes


def work(run: Run) -> None:
    """Ask every system, write the rows of the table."""
    start_processes(run.config.trainer)
    evaluation = Evaluation.open(run)
    rows = ctr(evaluation)
    if evaluation.aligned:
        rows += alignment_cost(evaluation)
    if evaluation.config.candidates:
        rows += ranking(evaluation)
    if not is_first_process():
        return
    write(run.folder / ROWS, rows)
    run.finish([run.folder / ROWS], dict(row.headline for row in rows))
