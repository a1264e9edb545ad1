"""The weights of a cascade's steps, and what each step adds, on validation queries."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.queries import queries_of_rows
from recllm.metrics import means, values_by_place
from recllm.serving.opening import Fitted
from recllm.systems.cascade import Cascade, fit, scored
from recllm.systems.catalog import Excluded

HITS = (1, 10, 50)
"""Lengths of lists at which hit rates are measured."""
GAINS = (10,)
"""Lengths of lists at which NDCG is measured."""


def fit_weights(
    cascade: Cascade,
    log: EventLog,
    rows: Rows,
    remove_seen: bool,
    on_step: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Fit the weights of each step behind the first, in order.

    A step's weights, one for each step up to it, maximize the likelihood of the items that came next over the
    lists that it orders (`recllm.systems.joining`); the next step sees lists in that order.

    Args:
        cascade: its steps, without weights.
        log: the trained log.
        rows: int64 `[n]`, liked validation rows; each one's own item is what came next.
        remove_seen: whether items of a row's history are left out.
        on_step: is told what a step reached.

    Returns:
        The weights and, measured on the same queries: `recall@<n>`, how often the first step hands the item
        on; and of each step, `<step>/hr@1`, `hr@10`, `hr@50` and `ndcg@10` of the whole order behind it, and
        `<step>/ms`, milliseconds a query.
    """
    queries = queries_of_rows(log, rows)
    target = log.item[rows]
    exclude = Excluded.seen(queries.log, queries.rows) if remove_seen else None
    start = time.perf_counter()
    lists = cascade.retrieve(queries, 1, exclude)
    seconds = time.perf_counter() - start
    places = lists.places(target)
    measured = {f"recall@{cascade.retrieved}": float((places >= 0).mean())}
    measured |= _figures(cascade.first.name, places, seconds)
    on_step(_line(cascade.first.name, measured))
    weights: dict[str, list[float]] = {}
    for reranker in cascade.rerankers:
        start = time.perf_counter()
        steps = scored(queries, lists, reranker)
        seconds = time.perf_counter() - start
        fitted, lists = fit(lists, steps, reranker, target)
        assert fitted.weights is not None
        name = reranker.step.name
        weights[name] = fitted.weights.tolist()
        measured |= _figures(name, lists.places(target), seconds)
        on_step(_line(name, measured) + ", weights " + ", ".join(f"{weight:.2f}" for weight in weights[name]))
    return Fitted(weights, measured)


def _figures(step: str, places: NDArray[np.int64], seconds: float) -> dict[str, float]:
    measured = means(values_by_place(places, HITS, GAINS))
    figures = {f"{step}/{name}": value for name, value in measured.items() if name != "mrr"}
    figures[f"{step}/ms"] = 1000 * seconds / max(1, len(places))
    return figures


def _line(step: str, measured: dict[str, float]) -> str:
    names = ("hr@1", "hr@10", "ndcg@10")
    return f"{step}: " + ", ".join(f"{name} {measured[f'{step}/{name}']:.4f}" for name in names)
