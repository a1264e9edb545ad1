"""Users a second of a cascade, step by step, and of batches with many gates: `make bench-recommend`.

With `DATASET` and `SYSTEM` it measures the finished cascade of `make cascade`: the first step alone, with the
CRM, with the LM; and the LM with several users a forward pass against one user at a time. Beside it, on
generated vectors of 64 dimensions, how many users a second are searched for in 3,700 and in a million items,
exactly and by inverted lists, with the recall that these have. Each figure is users a second of wall time;
peak memory is that of the process.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import torch

from bench.clock import fastest, keep
from recllm.eventlog.queries import Queries
from recllm.retrieval.index import ItemIndex, Vectors
from recllm.serving.recommender import Recommender
from recllm.systems.cascade import Cascade
from recllm.systems.catalog import Excluded
from stages.recommend import cascade_folder

USERS = 256
"""Users of the measured batch; of the LM a quarter."""
ITEMS = (3_700, 1_000_000)
CLUSTERS = 2_000
WIDTH = 64
K = 500


def users_a_second(ask: Callable[[], Any], users: int, rounds: int = 3) -> float:
    """Of wall time, in the fastest of some rounds."""
    return fastest(ask, users, rounds)["wall"]


def peak_memory() -> float:
    """Of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def steps(recommender: Recommender) -> dict[str, float]:
    """Users a second of the cascade's first step, with the next one, and so on."""
    known = recommender.maker.users.by_dense_id[2:]
    users = known[np.arange(USERS) % len(known)]
    whole = recommender.cascade
    figures = {}
    for count in range(len(whole.rerankers) + 1):
        cascade = Cascade(whole.first, whole.retrieved, whole.rerankers[:count])
        size = USERS // 4 if count == 2 else USERS

        def ask(cascade: Cascade = cascade, size: int = size) -> None:
            queries = recommender.maker.make(users[:size])
            cascade.lists(queries, 10, Excluded.seen(queries.log, queries.rows))

        figures["+".join(cascade.names)] = users_a_second(ask, size)
    return figures


def gates(recommender: Recommender) -> dict[str, float]:
    """Users a second of the LM's step: several users a forward pass, and one user at a time."""
    lm = recommender.parts.lm
    if lm is None:
        return {}
    known = recommender.maker.users.by_dense_id[2:]
    count = min(32, len(known))
    queries = recommender.maker.make(known[:count])
    before = replace(recommender.cascade, rerankers=recommender.cascade.rerankers[:-1])
    items = before.lists(queries, recommender.cascade.rerankers[-1].depth).items

    def one_by_one() -> None:
        for place in range(count):
            alone: Queries = queries.some(np.array([place]))
            lm.scores(alone, items[place : place + 1])

    return {
        "lm, 32 users at once": users_a_second(lambda: lm.scores(queries, items), count, 2),
        "lm, one user at a time": users_a_second(one_by_one, count, 2),
    }


def clustered(count: int, seed: int) -> Vectors:
    """Vectors near some centers, as those of items are."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(0).normal(size=(CLUSTERS, WIDTH)).astype(np.float32)
    near = centers[rng.integers(0, CLUSTERS, count)]
    return near + 0.5 * rng.normal(size=(count, WIDTH)).astype(np.float32)


def searches() -> dict[str, float]:
    """Users a second and recall of searches in generated item vectors."""
    figures = {}
    queries = clustered(USERS, 1)
    for count in ITEMS:
        vectors = clustered(count, 2)
        items = np.arange(2, count + 2, dtype=np.int32)
        for kind in ("exact", "ivf"):
            start = time.perf_counter()
            index = ItemIndex.build(vectors, items, kind, queries=queries[:100], k=K)  # type: ignore[arg-type]
            name = f"{count:,} items, {kind}"
            figures[f"{name}: seconds to build"] = time.perf_counter() - start
            figures[name] = users_a_second(lambda index=index: index.search(queries, K), USERS)  # type: ignore[misc]
            figures[f"{name}: recall@{K}"] = index.facts.recall
    return figures


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and keep the figures."""
    figures = searches()
    figures["peak MiB of the searches"] = peak_memory()
    if arguments:
        recommender = Recommender.load(cascade_folder(arguments))
        figures |= steps(recommender)
        figures |= gates(recommender)
        figures["peak MiB"] = peak_memory()
    for name, value in figures.items():
        print(f"{name:44} {value:12,.3f}")
    keep("recommend", {"figures": figures, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    pl.Config.set_tbl_hide_dataframe_shape(True)
    main(sys.argv[1:])
