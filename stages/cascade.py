"""A cascade over the whole catalog: retrieve, rank, re-rank. Fits the steps' weights on validation queries.

Each liked sample of the validation split that the user had not met before is a query, built as a request
would be: its history, its second. Where its item is among those that the first step hands on, the order of
the list says how much each step's score tells of what came next; one weight a step is all that is learned.
"""

from __future__ import annotations

from typing import Any

from recllm.console import say
from recllm.errors import StageError
from recllm.eventlog.candidates import met_before
from recllm.eventlog.log import EventLog, Rows
from recllm.paths import CASCADE, ITEM_INDEX
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.serving.fitting import fit_weights
from recllm.serving.indexed import build_index
from recllm.serving.opening import Fitted, open_parts


def valid_rows(log: EventLog, count: int, keep_seen: bool) -> Rows:
    """Liked validation samples, drawn by the stored permutation; without items met before, unless kept.

    Raises:
        StageError: there are none.
    """
    rows = log.rows("valid", "1.0")
    rows = rows[log.label[rows] == 1]
    if not keep_seen and len(rows):
        rows = rows[~met_before(log, rows)]
    if not len(rows):
        raise StageError(
            "no liked validation sample is of an item that is new to its user, so that no weights can be "
            "fitted; wanted ARGS=cascade.seen=kept, or another prepare.split"
        )
    return rows[:count]


def work(run: Run) -> None:
    """Open the steps, fit their weights one after the other, and say what each adds.

    A cascade of models that were trained on all data has nothing left to fit weights on: it takes those of
    the cascade that it repeats, and measures nothing.
    """
    config = run.config.cascade
    parts = open_parts(run.config, run.parents)
    steps = " -> ".join(parts.cascade.names)
    figures: dict[str, Any] = {}
    if Role.CHOSEN in run.parents:
        chosen = run.parents[Role.CHOSEN]
        fitted = Fitted.read(chosen.export / CASCADE)
        rows = parts.log.rows("train", f"uniform{config.valid_rows}")
        say(f"steps: {steps}; weights as {chosen.name} fitted them on validation queries")
    else:
        rows = valid_rows(parts.log, config.valid_rows, config.seen == "kept")
        say(f"{len(rows):,} validation queries; steps: {steps}")
        fitted = fit_weights(parts.cascade, parts.log, rows, config.seen == "removed", say)
        figures = {"queries": len(rows), **fitted.measured}
    if parts.retriever is not None:
        index = build_index(
            parts.retriever, parts.log, rows, config.index, config.retrieved, config.exact_items
        )
        index.save(run.export / ITEM_INDEX)
        facts = index.facts
        say(f"index: {facts.kind}, {facts.items:,} items, recall {facts.recall:.4f}")
        if len(parts.retriever.by_text):
            say(f"retriever: {parts.retriever.by_text_sentence}")
        figures |= {"index": facts.kind, "index/items": facts.items, "index/recall": facts.recall}
        figures["index/by_text"] = len(parts.retriever.by_text)
    fitted.write(run.export / CASCADE)
    run.finish([run.export], figures)
