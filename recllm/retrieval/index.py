"""An index of item vectors: the items with the largest inner products with a user's vector.

Up to a stated number of items the search is exact (FAISS's flat index). Beyond it, it is approximate, by
inverted lists (IVF: Jégou et al. 2011) or a graph (HNSW: Malkov and Yashunin 2018, arXiv 1603.09320), and how
many of the exact results it finds is measured when it is built, and kept beside it.

What FAISS finds is scored once more, pair by pair, and ordered by score and then by the smaller dense id: so
a user's list does not depend on who else is in the batch, as FAISS's own products do in the last digits.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from recllm.files import load_array, publish, write_array, write_json
from recllm.retrieval.products import Products

IndexKind = Literal["auto", "exact", "ivf", "hnsw"]
Vectors = NDArray[np.float32]
Items = NDArray[np.int32]

EXACT_ITEMS = 50_000
"""`auto` searches up to so many items exactly, and by inverted lists beyond."""
SAMPLE = 500
"""Queries over which recall is measured."""
LINKS = 32
"""HNSW: links of a node."""
BREADTH = 200
"""HNSW: nodes that are kept open while it is built, and at least while it is searched."""
POINTS = 64
"""IVF: vectors that a list's center is learned from, at most."""
LEAST_PROBED = 8
"""IVF: lists that a query looks through; twice as many until it finds"""
WANTED_RECALL = 0.95
"""so much of the exact results, in the mean over the queries that recall is measured with."""
INDEX = "index.faiss"
ITEMS = "items.npy"
VECTORS = "vectors.npy"
FACTS = "index.json"


@dataclass(frozen=True)
class IndexFacts:
    """What is known of an index.

    Attributes:
        kind: `exact`, `ivf` or `hnsw`.
        items: how many it holds.
        width: of a vector.
        recall: of the exact `recall_at` best items of a query it finds so many, in the mean; 1 if exact.
        recall_at: see `recall`.
        queries: over how many queries that was measured.
        probed: `ivf`: lists that a query looks through.
    """

    kind: Literal["exact", "ivf", "hnsw"]
    items: int
    width: int
    recall: float = 1.0
    recall_at: int = 0
    queries: int = 0
    probed: int = LEAST_PROBED


class ItemIndex:
    """An index of item vectors; made by `build`, or opened from a folder.

    Args:
        index: FAISS's.
        items: int32 `[n]`, dense id of each vector of the index, ascending.
        vectors: float32 `[n, d]`.
        facts: what is known of it.
    """

    def __init__(self, index: Any, items: Items, vectors: Vectors, facts: IndexFacts) -> None:
        """See the class."""
        self.index = index
        self.items = items
        self.vectors = vectors
        self.facts = facts

    @classmethod
    def build(
        cls,
        vectors: Vectors,
        items: Items,
        kind: IndexKind = "auto",
        queries: Vectors | None = None,
        k: int = 500,
        exact_items: int = EXACT_ITEMS,
    ) -> ItemIndex:
        """Build an index, and measure what it finds.

        Args:
            vectors: float32 `[n, d]`.
            items: int32 `[n]`, dense id of each.
            kind: `exact`, `ivf`, `hnsw`; `auto`: `exact` up to `exact_items` items, `ivf` beyond.
            queries: float32 `[q, d]`, user vectors that recall is measured with; None: of the items' own.
            k: recall is measured at so many results.
            exact_items: see `kind`.

        Raises:
            ValueError: there is no vector, or one is not finite.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        if not len(vectors) or not np.isfinite(vectors).all():
            raise ValueError(
                f"{len(vectors)} item vectors, {np.isfinite(vectors).all(1).sum()} of them finite; wanted at "
                "least one, and finite numbers: train the retriever anew"
            )
        if kind == "auto":
            kind = "exact" if len(vectors) <= exact_items else "ivf"
        width = vectors.shape[1]
        if kind == "exact":
            index: Any = faiss.IndexFlatIP(width)
        elif kind == "hnsw":
            index = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = BREADTH
        else:
            lists = max(1, int(4 * np.sqrt(len(vectors))))
            lists = min(lists, max(1, len(vectors) // 40))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.seed = 0
            index.cp.max_points_per_centroid = POINTS
            index.train(vectors)
        index.add(vectors)
        made = cls(index, np.asarray(items, np.int32), vectors, IndexFacts(kind, len(vectors), width))
        made._set_breadth(k)
        if kind == "exact":
            return made
        if queries is None:
            queries = vectors[np.random.default_rng(0).permutation(len(vectors))[:SAMPLE]]
        at = min(k, len(vectors))
        queries = queries[:SAMPLE]
        wanted = made.exact_places(queries, at)
        probed = LEAST_PROBED
        while True:
            made.facts = IndexFacts(kind, len(vectors), width, 1.0, at, len(queries), probed)
            recall = made.measure_recall(queries, at, wanted)
            made.facts = replace(made.facts, recall=recall)
            if kind != "ivf" or recall >= WANTED_RECALL or probed >= index.nlist:
                return made
            probed *= 2

    def save(self, folder: Path) -> None:
        """Write the index, its items, its vectors, and what is known of it; each file whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.facts.kind != "exact":  # an exact one is its vectors
            with publish(folder / INDEX) as temporary:
                faiss.write_index(self.index, str(temporary))
        write_array(folder / VECTORS, self.vectors)
        write_array(folder / ITEMS, self.items)
        write_json(folder / FACTS, asdict(self.facts))

    @classmethod
    def open(cls, folder: Path) -> ItemIndex:
        """Map an index that `save` wrote.

        Raises:
            ValueError: there is none.
        """
        if not (folder / FACTS).exists():
            raise ValueError(f"no index in {folder}; wanted {FACTS} there, as `make cascade` writes it")
        facts = IndexFacts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
        vectors = load_array(folder / VECTORS)
        if facts.kind == "exact":
            index: Any = faiss.IndexFlatIP(facts.width)
            index.add(np.ascontiguousarray(vectors))
        else:
            flag = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
            index = faiss.read_index(str(folder / INDEX), flag)
        return cls(index, load_array(folder / ITEMS, mapped=False), vectors, facts)

    def search(self, queries: Vectors, k: int, met: NDArray[np.int64] | None = None) -> tuple[Items, Vectors]:
        """The k best items of each query, best first; of equal scores the smaller dense id comes first.

        Args:
            queries: float32 `[B, d]`.
            k: length of the lists, 1 or more.
            met: int64 `[B]`, how many more results of each query are wanted, as the caller is going to leave
                that many out; the lists are as long as the longest of them.

        Returns:
            Dense items int32 `[B, K]` and scores float32 `[B, K]`, K = k and the most of `met`; item 0 with
            -inf where there are no more.
        """
        wanted = k if met is None or not len(met) else k + int(met.max())
        size = min(wanted, len(self.items))
        # A few more than wanted, so that rounding in FAISS moves nothing over the cut.
        reach = min(size + 8 + size // 16, len(self.items))
        self._set_breadth(reach)
        queries = np.ascontiguousarray(queries, np.float32)
        _, found = self.index.search(queries, reach)
        return self._ordered(queries, found, size, wanted)

    @cached_property
    def _products(self) -> Products:
        return Products(self.vectors)

    def best(self, queries: Vectors, k: int, ends: NDArray[np.int64], met: Items) -> tuple[Items, Vectors]:
        """The k best items of each query but for those it has met: exactly, whatever the index.

        Args:
            queries: float32 `[B, d]`.
            k: length of the lists, 1 or more.
            ends: int64 `[B + 1]`; query q is not given the dense items `met[ends[q]:ends[q + 1]]`.
            met: dense items; those that the index lacks are passed over.

        Returns:
            As `search`, K = k.
        """
        place = np.minimum(np.searchsorted(self.items, met), len(self.items) - 1)
        is_there = self.items[place] == met
        ends = np.concatenate([[0], np.cumsum(is_there)])[ends]
        # A few more than wanted, so that rounding in a product of whole blocks moves nothing over the cut.
        reach = min(k + 8 + k // 16, len(self.items))
        queries = np.ascontiguousarray(queries, np.float32)
        found, _ = self._products.best(queries, reach, ends, place[is_there])
        return self._ordered(queries, found, k, k)

    def _ordered(
        self, queries: Vectors, found: NDArray[np.int64], kept: int, length: int
    ) -> tuple[Items, Vectors]:
        """Lists of what was found, as `search` returns them.

        Args:
            queries: float32 `[B, d]`.
            found: places of vectors `[B, n]`, -1 where there is none.
            kept: how many of the best stand in a list.
            length: of the lists.
        """
        scores = self._score(queries, found)
        items = self.items[np.maximum(found, 0)]
        order = np.lexsort((items, -scores), axis=1)[:, :kept]
        best_items = np.zeros((len(queries), length), np.int32)
        best_scores = np.full((len(queries), length), -np.inf, np.float32)
        best_scores[:, : order.shape[1]] = np.take_along_axis(scores, order, axis=1)
        best_items[:, : order.shape[1]] = np.take_along_axis(items, order, axis=1)
        best_items[np.isneginf(best_scores)] = 0
        return best_items, best_scores

    def _score(self, queries: Vectors, found: NDArray[np.int64]) -> Vectors:
        """Inner products `[B, n]` of each query with its own results, in one order of sums; -inf where -1."""
        scores = np.empty(found.shape, np.float32)
        size = max(1, (1 << 22) // max(1, found.shape[1] * self.facts.width))
        for low in range(0, len(found), size):
            part = slice(low, low + size)
            near = self.vectors[np.maximum(found[part], 0)]
            scores[part] = np.einsum("bd,bnd->bn", queries[part], near, optimize=False)
        scores[found < 0] = -np.inf
        return scores

    def exact_places(self, queries: Vectors, k: int) -> NDArray[np.int64]:
        """Places of the exact k best vectors of each query, `[q, k]`."""
        exact = faiss.IndexFlatIP(self.facts.width)
        exact.add(np.ascontiguousarray(self.vectors))
        places: NDArray[np.int64] = exact.search(np.ascontiguousarray(queries, np.float32), k)[1]
        return places

    def measure_recall(self, queries: Vectors, k: int, wanted: NDArray[np.int64] | None = None) -> float:
        """Of the exact k best items of each query, the fraction that the index finds, in the mean.

        Args:
            queries: float32 `[q, d]`.
            k: see above.
            wanted: what `exact_places` says of them; None: it is computed.
        """
        if wanted is None:
            wanted = self.exact_places(queries, k)
        self._set_breadth(k)
        _, found = self.index.search(np.ascontiguousarray(queries, np.float32), k)
        hits = [np.isin(found[place], wanted[place]).sum() for place in range(len(queries))]
        return float(np.mean(hits) / k)

    def _set_breadth(self, k: int) -> None:
        """How far an approximate search looks around."""
        if self.facts.kind == "hnsw":
            self.index.hnsw.efSearch = max(BREADTH, 2 * k)
        elif self.facts.kind == "ivf":
            self.index.nprobe = self.facts.probed
