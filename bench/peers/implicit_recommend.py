"""implicit's `recommend` on given vectors: `implicit_recommend als FOLDER THREADS K`, in its environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from implicit.cpu.als import AlternatingLeastSquares
from scipy import sparse

from bench.clock import fastest


def main(folder: Path, threads: int, k: int) -> None:
    """Print the users a second as JSON."""
    users = np.load(folder / "users.npy")
    items = np.load(folder / "items.npy")
    indices = np.load(folder / "seen_items.npy")
    ends = np.load(folder / "seen_ends.npy")
    seen = sparse.csr_matrix((np.ones(len(indices), np.float32), indices, ends), (len(users), len(items)))
    seen.sort_indices()
    model = AlternatingLeastSquares(factors=users.shape[1], num_threads=threads)
    model.user_factors = users
    model.item_factors = items
    ids = np.arange(len(users))
    figures = fastest(lambda: model.recommend(ids, seen, N=k, filter_already_liked_items=True), len(users))
    lists, _ = model.recommend(ids, seen, N=k, filter_already_liked_items=True)
    np.save(folder / "lists_implicit_als.npy", lists)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
