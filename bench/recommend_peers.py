"""Lists for users beside implicit's `recommend` and RecTools', for the same users, histories and vectors.

`make bench-lists` searches generated vectors of 64 dimensions in 3,700 and in a million items, and leaves out
what each user has met: this project's index, exact and by inverted lists, and its search of a whole catalog
by groups of items (`recllm/retrieval/products.py`), which nothing else calls yet; implicit's ALS with
the same vectors in the place of fitted ones; RecTools' wrapper of ALS with the same; and RecTools' SASRec,
which reads the histories besides. With the folder of a finished cascade (`make cascade`) it asks for lists of
known users, with the cascade's histories and vectors: all of `Recommender.recommend` beside all of RecTools'.

The systems take turns, each in a process and an environment of its own; of each the best of the rounds. Of
generated vectors `lists_found` says how much of the exact lists a system's lists hold, so that nobody is fast
by finding other things; SASRec has vectors of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.clock import REPOSITORY, fastest, keep
from recllm.eventlog.log import EventLog, Rows
from recllm.retrieval.index import IndexKind, ItemIndex, Vectors
from recllm.retrieval.products import Products
from recllm.serving.indexed import IndexedRetriever
from recllm.serving.recommender import Recommender
from recllm.systems.catalog import Excluded

PLACE = REPOSITORY / ".bench"
PEERS = {
    "implicit als": ("implicit", "bench.peers.implicit_recommend", "als"),
    "rectools als": ("rectools", "bench.peers.rectools_recommend", "als"),
    "rectools sasrec": ("rectools", "bench.peers.rectools_recommend", "sasrec"),
}
"""System -> its environment, the module that runs there, and which model of it."""
EXACT = "recllm exact"
IVF = "recllm ivf"
PRODUCTS = "recllm products"
CASCADE = "recllm recommend"
CLOCKS = ("wall", "cpu")
WIDTH = 64
CLUSTERS = 2_000
MET = 165
"""Items that a generated user has met: MovieLens-1M's mean."""
SIZES = {"3,700 items": (3_700, 2_048), "1,000,000 items": (1_000_000, 256)}
"""Name -> items and users."""

Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Asked:
    """Users for whom lists are wanted, and what is known of them.

    Attributes:
        users: float32 `[U, d]`, their vectors.
        items: float32 `[I, d]`, item vectors.
        seen_ends: int64 `[U + 1]`; user u has met `seen_items[seen_ends[u]:seen_ends[u + 1]]`.
        seen_items: int32, places in `items`, in time order.
    """

    users: Vectors
    items: Vectors
    seen_ends: Rows
    seen_items: NDArray[np.int32]

    @classmethod
    def drawn(cls, n_items: int, n_users: int) -> Asked:
        """Vectors near some centers, as those of items are; every user has met some items near his own."""
        rng = np.random.default_rng(0)
        centers = rng.normal(size=(CLUSTERS, WIDTH)).astype(np.float32)
        sides = {}
        for side, count in (("items", n_items), ("users", n_users)):
            near = centers[rng.integers(0, CLUSTERS, count)]
            sides[side] = near + 0.5 * rng.normal(size=(count, WIDTH)).astype(np.float32)
        met = [rng.choice(n_items, MET, replace=False) for _ in range(n_users)]
        ends = MET * np.arange(n_users + 1)
        return cls(sides["users"], sides["items"], ends, np.concatenate(met).astype(np.int32))

    @classmethod
    def of(cls, recommender: Recommender, count: int) -> Asked:
        """The first known users of a cascade that begins with a retriever, after all that they did."""
        retriever = recommender.cascade.first.retriever  # type: ignore[attr-defined]
        queries = recommender.maker.make(known_users(recommender, count))
        start, end = queries.log.history(queries.rows)
        known = np.flatnonzero(retriever.is_known)
        place = np.full(len(retriever.is_known), -1)
        place[known] = np.arange(len(known))
        lists = [place[queries.log.item[low:high]] for low, high in zip(start, end, strict=True)]
        lists = [seen[seen >= 0] for seen in lists]
        ends = np.concatenate([[0], np.cumsum([len(seen) for seen in lists])])
        users = retriever.users(queries.log, queries.rows)
        return cls(users, retriever.item_vectors[known], ends, np.concatenate(lists).astype(np.int32))

    def write(self, folder: Path) -> None:
        """Write the arrays, an `.npy` each."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("users", "items", "seen_ends", "seen_items"):
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def read(cls, folder: Path) -> Asked:
        """What `write` wrote."""
        names = ("users", "items", "seen_ends", "seen_items")
        return cls(*(np.load(folder / f"{name}.npy") for name in names))

    def excluded(self) -> Excluded:
        """What each user has met, by the ids of `GivenUsers`' index."""
        place = np.repeat(np.arange(len(self.users)), np.diff(self.seen_ends))
        return Excluded(place, self.seen_items)


@dataclass(frozen=True)
class GivenUsers:
    """Stands for a retriever that has made the users' vectors already."""

    vectors: Vectors
    name: str = "given"
    made_by: Any = None

    def users(self, log: EventLog | None, rows: Rows) -> Vectors:
        """Vectors of users by place."""
        return self.vectors[rows]


def known_users(recommender: Recommender, count: int) -> Any:
    """External ids of the first known users."""
    return recommender.maker.users.by_dense_id[2 : count + 2]


def search(folder: Path, threads: int, k: int, kind: IndexKind) -> None:
    """Print the users a second of this project's index as JSON, and keep the lists."""
    torch.set_num_threads(threads)
    asked = Asked.read(folder)
    # Dense ids of an index are above 0, and these are places: they are one apart.
    ids = np.arange(1, len(asked.items) + 1, dtype=np.int32)
    index = ItemIndex.build(asked.items, ids, kind, queries=asked.users[:100], k=k)
    given = IndexedRetriever(GivenUsers(asked.users), index)  # type: ignore[arg-type]
    rows = np.arange(len(asked.users))

    def recommend() -> NDArray[np.int32]:
        met = asked.excluded()
        return given.best(None, rows, k, Excluded(met.place, met.item + 1))[0]  # type: ignore[arg-type]

    figures = fastest(recommend, len(rows))
    np.save(folder / f"lists_recllm_{kind}.npy", recommend() - 1)
    print(json.dumps(figures))


def multiply(folder: Path, threads: int, k: int) -> None:
    """Print the users a second of a search without an index as JSON, and keep the lists."""
    torch.set_num_threads(threads)
    asked = Asked.read(folder)
    products = Products(asked.items)

    def recommend() -> NDArray[np.int64]:
        return products.best(asked.users, k, asked.seen_ends, asked.seen_items)[0]

    figures = fastest(recommend, len(asked.users))
    np.save(folder / "lists_recllm_products.npy", recommend())
    print(json.dumps(figures))


def recommend(folder: Path, threads: int, k: int, cascade: Path) -> None:
    """Print the users a second of all of `Recommender.recommend` as JSON."""
    torch.set_num_threads(threads)
    recommender = Recommender.load(cascade)
    users = known_users(recommender, len(Asked.read(folder).users))
    print(json.dumps(fastest(lambda: recommender.recommend(users, k), len(users))))


def commands(cascade: Path | None = None) -> dict[str, list[str]]:
    """Every system's command; the folder, the threads and k follow."""
    this = [sys.executable, "-m", "bench.recommend_peers", "--ours"]
    by_system = {EXACT: [*this, "exact"], PRODUCTS: [*this, "products"], IVF: [*this, "ivf"]}
    if cascade is not None:
        by_system = {CASCADE: [*this, str(cascade.resolve())], EXACT: [*this, "exact"]}
    for system, (environment, module, model) in PEERS.items():
        python = PLACE / environment / "bin" / "python"
        if not python.exists():
            raise SystemExit(
                f"error: no {environment} at {python}; run `make .bench/{environment}/.installed`"
            )
        by_system[system] = [str(python), "-m", module, model]
    return by_system


def measure(folder: Path, k: int, threads: int, rounds: int, cascade: Path | None = None) -> Figures:
    """Users a second of every system, in turns; of each the best of the rounds.

    Args:
        folder: what `Asked.write` wrote.
        k: items of a list.
        threads: of each system.
        rounds: turns.
        cascade: a finished cascade whose users `folder` holds; None: the vectors alone.
    """
    figures: Figures = {}
    # Threads wait as their library has it by default, not as the Makefile asks of them for shared cores.
    outside = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    outside |= {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
    for _ in range(rounds):
        for system, command in commands(cascade).items():
            words = [str(folder), str(threads), str(k)]
            done = subprocess.run(
                [*command, *words], cwd=REPOSITORY, env=outside, capture_output=True, text=True
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no word"])[-1]
                raise SystemExit(f"error: {' '.join(command)}: {last}")
            got = json.loads(done.stdout.strip().splitlines()[-1])
            best = figures.setdefault(system, got)
            for clock in CLOCKS:
                best[clock] = max(best[clock], got[clock])
            best["peak_gb"] = max(best["peak_gb"], got["peak_gb"])
            print(f"{system:18} {got['wall']:12,.0f} users a second", flush=True)
    add_found(folder, figures)
    return figures


def add_found(folder: Path, figures: Figures) -> None:
    """How much of the exact lists each system's hold, where its vectors are the given ones."""
    exact = np.load(folder / "lists_recllm_exact.npy")
    for system in (EXACT, PRODUCTS, IVF, "implicit als", "rectools als"):
        if system in figures:
            lists = np.load(folder / f"lists_{system.replace(' ', '_')}.npy")
            same = [np.isin(own, other).mean() for own, other in zip(exact, lists, strict=True)]
            figures[system]["lists_found"] = round(float(np.mean(same)), 4)


def over_fastest_peer(figures: Figures) -> Figures:
    """The rates of ours over those of the fastest of the peers."""
    peers = [rates for system, rates in figures.items() if system in PEERS]
    fast = {clock: max(rates[clock] for rates in peers) for clock in CLOCKS}
    ours = {system: rates for system, rates in figures.items() if system not in PEERS}
    return {
        system: {clock: round(rates[clock] / fast[clock], 2) for clock in CLOCKS}
        for system, rates in ours.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cascade", type=Path, nargs="?", help="a finished cascade's folder, or a bundle")
    parser.add_argument("--users", type=int, default=1_024, help="of the cascade")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--k", type=int, default=10)
    given = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    drawn = {} if given.cascade else {name: SIZES[name] for name in given.sizes}
    for name, (n_items, n_users) in drawn.items():
        folder = PLACE / "recommend" / str(n_items)
        Asked.drawn(n_items, n_users).write(folder)
        print(f"{name}, {n_users:,} users", flush=True)
        results[name] = measure(folder, given.k, given.threads, given.rounds)
    if given.cascade:
        folder = PLACE / "recommend" / "cascade"
        Asked.of(Recommender.load(given.cascade), given.users).write(folder)
        results["cascade"] = measure(folder, given.k, given.threads, given.rounds, given.cascade)
    ratios = {name: over_fastest_peer(figures) for name, figures in results.items()}
    settings = {"k": given.k, "threads": given.threads, "rounds": given.rounds, "width": WIDTH}
    path = keep("recommend_peers", {**settings, "users_a_second": results, "times_fastest_peer": ratios})
    print(json.dumps(ratios, indent=1))
    print(f"figures: {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    if "--ours" in sys.argv:
        what, place, count, length = sys.argv[2:]
        if what in ("exact", "ivf"):
            search(Path(place), int(count), int(length), what)  # type: ignore[arg-type]
        elif what == "products":
            multiply(Path(place), int(count), int(length))
        else:
            recommend(Path(place), int(count), int(length), Path(what))
    else:
        main()
