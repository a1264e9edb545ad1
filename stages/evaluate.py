"""Evaluation: every system on the test split, on the same rows, against every baseline, with intervals.

Scores of LMs are kept under the identity of what made them, so that an interrupted or extended evaluation
computes only what is missing. Validation rows serve the stacking control; nothing is selected here.
"""

from __future__ import annotations

from recllm.evaluation.context import ROWS, Evaluation
from recllm.evaluation.results import write
from recllm.pipeline.run import Run


def work(run: Run) -> None:
    """Score everything, write the rows of the table."""
    evaluation = Evaluation(run)
    evaluation.ctr()
    if evaluation.aligned:
        evaluation.alignment_cost()
    if evaluation.config.candidates:
        evaluation.ranking()
    write(run.folder / ROWS, evaluation.rows)
    run.finish([run.folder / ROWS], dict(row.headline for row in evaluation.rows))
