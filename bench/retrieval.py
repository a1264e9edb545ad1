"""Ways to find the k nearest earlier events of a row, measured side by side: `make bench-retrieval`.

On two loads, one thread, 192 dimensions, k = 10: all rows of 300 random users of a generated log, and 1,024
rows at the end of a history of 28,000 events. Each way is timed by its CPU time, the best of three rounds
that take turns, and its lists are compared with those of a search of one query at a time in float64. The way
that the package takes is
`batched` (`recllm.retrieval.neighbors`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from bench import logs
from bench.clock import REPOSITORY, keep
from recllm.eventlog.log import EventLog
from recllm.retrieval.neighbors import Neighbors

K, DIMENSIONS, FILMS, EVENTS, USERS, BLOCK, ROUNDS = 10, 192, 20_000, 1_000_000, 300, 256, 3
LONG, LAST = 29_000, 1_024
Rows = NDArray[np.int64]
Histories = list[tuple[int, Rows]]  # first row of a user, and rows to answer, ascending


def make_log(lengths: Rows) -> EventLog:
    """A log of users with these many events of random films."""
    items = np.random.default_rng(0).integers(2, FILMS, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    size = len(items)
    arrays: dict[str, NDArray[Any]] = {name: np.zeros(size, np.int8) for name in ("rating", "label", "split")}
    arrays |= {"user": np.repeat(np.arange(len(lengths)), lengths).astype(np.int32), "item": items}
    arrays |= {"timestamp": np.arange(size), "training": np.ones(size, bool), "offsets": offsets}
    arrays |= {name: np.zeros((2, 1), np.int32) for name in ("user_fields", "item_fields")}
    arrays |= {name: np.zeros(FILMS, np.int32) for name in ("item_count", "item_likes")}
    return EventLog(Path(), arrays, {"n_items": FILMS, "n_users": len(lengths), "timed": True})


def one_by_one(log: EventLog, table: NDArray[Any], load: Histories) -> Rows:
    """NumPy, a query at a time."""
    lists = []
    for first, rows in load:
        history = table[log.item[first : rows[-1]]]
        for row in rows.tolist():
            score = history[: row - first] @ table[log.item[row]]
            best = np.argpartition(-score, K - 1)[:K] if len(score) > K else np.arange(len(score))
            lists.append(
                np.pad(first + best[np.argsort(-score[best])], (0, K - len(best)), constant_values=-1)
            )
    return np.stack(lists)


def topk(log: EventLog, table: NDArray[Any], load: Histories) -> Rows:
    """For each block of a user's queries a product with the history, -inf above the diagonal, torch.topk."""
    lists = []
    for first, rows in load:
        history = torch.from_numpy(table[log.item[first : rows[-1]]])
        for low in range(0, len(rows), BLOCK):
            part = rows[low : low + BLOCK]
            score = torch.from_numpy(table[log.item[part]]) @ history[: part[-1] - first].T
            later = torch.arange(score.shape[1]) >= torch.from_numpy(part - first)[:, None]
            lists.append(_top(score.masked_fill_(later, -torch.inf), first))
    return np.concatenate(lists)


def _top(score: torch.Tensor, first: int) -> Rows:
    value, place = score.topk(min(K, score.shape[1]))
    rows = np.where(np.isneginf(value.numpy()), -1, first + place.numpy())
    return np.pad(rows, ((0, 0), (0, K - rows.shape[1])), constant_values=-1)


def faiss_merged(log: EventLog, table: NDArray[Any], load: Histories) -> Rows:
    """FAISS over the rows before a block, all of them allowed; a masked product inside; both merged."""
    faiss.cvar.distance_compute_blas_threshold = 20  # as it comes (128,000), no BLAS is used for such sizes
    lists = []
    for first, rows in load:
        for low in range(0, len(rows), BLOCK):
            part = rows[low : low + BLOCK]
            query = table[log.item[part]]
            inside = torch.from_numpy(query) @ torch.from_numpy(table[log.item[part[0] : part[-1] + 1]]).T
            later = torch.arange(inside.shape[1]) >= torch.from_numpy(part - part[0])[:, None]
            score = [inside.masked_fill_(later, -torch.inf).numpy()]
            place = [np.broadcast_to(np.arange(part[0], part[-1] + 1), score[0].shape)]
            if past := min(K, int(part[0]) - first):
                before = table[log.item[first : part[0]]]
                value, index = faiss.knn(query, before, past, metric=faiss.METRIC_INNER_PRODUCT)
                score, place = [value, *score], [first + index, *place]
            values, places = np.hstack(score), np.hstack(place)
            order = np.argsort(-values, axis=1, kind="stable")[:, :K]
            values, places = (np.take_along_axis(x, order, 1) for x in (values, places))
            places = np.where(np.isneginf(values), -1, places)
            lists.append(np.pad(places, ((0, 0), (0, K - places.shape[1])), constant_values=-1))
    return np.concatenate(lists)


def faiss_ranges(log: EventLog, table: NDArray[Any], load: Histories) -> Rows:
    """A flat FAISS index of a user's events; each query may see the range before it."""
    lists = []
    for first, rows in load:
        index = faiss.IndexFlatIP(DIMENSIONS)
        index.add(table[log.item[first : rows[-1]]])
        for row in rows.tolist():
            allowed = faiss.SearchParameters(sel=faiss.IDSelectorRange(0, row - first))
            _, place = index.search(table[log.item[[row]]], K, params=allowed)
            lists.append(np.where(place[0] < 0, -1, first + place[0]))
    return np.stack(lists)


def batched(log: EventLog, table: NDArray[Any], load: Histories) -> Rows:
    """Ours."""
    return Neighbors(log, table).search(np.concatenate([rows for _, rows in load]), k=K)


WAYS: dict[str, Callable[[EventLog, NDArray[Any], Histories], Rows]] = {
    "batched": batched,
    "product and torch.topk": topk,
    "faiss.knn before the block, merged": faiss_merged,
    "faiss.IndexFlatIP with IDSelectorRange": faiss_ranges,
    "numpy, one by one": one_by_one,
}


def measure(log: EventLog, load: Histories) -> dict[str, Any]:
    """Microseconds of CPU a query, and the share of lists whose scores are the float64 search's, to 1e-5."""
    table = np.random.default_rng(1).standard_normal((FILMS, DIMENSIONS)).astype(np.float32)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    double = table.astype(np.float64)
    target = double[log.item[np.concatenate([rows for _, rows in load])]]

    def scores(neighbors: Rows) -> NDArray[np.float64]:
        products = np.einsum("qd,qkd->qk", target, double[log.item[np.maximum(neighbors, 0)]])
        return np.sort(np.where(neighbors >= 0, products, -np.inf), axis=1)

    exact = scores(one_by_one(log, double, load))
    seconds: dict[str, float] = {}
    same = {}
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            begin = time.process_time()
            neighbors = way(log, table, load)
            seconds[name] = min(time.process_time() - begin, seconds.get(name, np.inf))
            same[name] = float(np.isclose(scores(neighbors), exact, rtol=0, atol=1e-5).all(1).mean())
    return {
        name: {"us_a_query": round(1e6 * seconds[name] / len(exact), 2), "same_scores": round(same[name], 6)}
        for name in WAYS
    }


def main() -> None:
    """Measure both loads, keep and print the figures."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    lengths = np.bincount(logs.draw(EVENTS, FILMS)["user"])
    chosen = np.random.default_rng(2).choice(lengths, USERS, replace=False)
    log = make_log(chosen)
    typical = [
        (int(first), np.arange(first + 5, first + n)) for first, n in zip(log.offsets, chosen, strict=False)
    ]
    long = [(0, np.arange(LONG - LAST, LONG))]
    figures = {
        "histories of 300 users": {"mean_length": float(chosen.mean()), "ways": measure(log, typical)},
        "one history of 28,000 events": {"ways": measure(make_log(np.array([LONG])), long)},
    }
    path = keep("retrieval", {"k": K, "dimensions": DIMENSIONS, "threads": 1} | figures)
    print(json.dumps(figures, indent=1))
    print(f"figures: {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
