"""The search of a CRM's settings: trial after trial on validation, until the study's budget is spent."""

from __future__ import annotations

from typing import Any

from recllm.pipeline.run import Run
from recllm.training.search import Search
from stages import retriever, stage1


def work(run: Run) -> None:
    """Train trial after trial of a study; data are read once for all that read alike."""
    trains = retriever if run.config.stage1.objective == "next" else stage1
    search = Search.open(run)
    read_with: dict[str, Any] | None = None
    while claimed := search.claim():
        trial, one = claimed
        with search.watch(trial, one) as pruning:
            if one.config.stage1.inputs != read_with:
                read_with = one.config.stage1.inputs
                inputs = trains.data(one)
            trains.train(one, inputs, [pruning])
    search.report()
