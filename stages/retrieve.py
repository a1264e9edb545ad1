"""Retrieval: item texts -> LM -> PCA, joined with training co-occurrence -> nearest earlier events."""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from recllm import parents
from recllm.columns import UNUSED
from recllm.data.log import EventLog
from recllm.retrieval.neighbours import Neighbours, write_neighbours
from recllm.retrieval.vectors import (
    Vectors,
    cooccurrence_vectors,
    embed_items,
    item_vectors,
    lm_vectors,
    user_folds,
)
from recllm.run import Run, main


def work(run: Run) -> None:
    """Write `vectors.npy` [folds, n_items, D], `folds.npy` [n_users] and `neighbours.npy` [N, k]."""
    config = run.config.retrieval
    log = parents.event_log(run)
    text = None
    if config.vectors in ("lm", "both"):
        model, tokenizer = parents.causal_lm(run)
        pieces = parents.build_pieces(run.config, log, tokenizer)
        tokens = pieces.assemble(np.stack([pieces.item, pieces.card], 1))
        text = lm_vectors(
            embed_items(model, tokens.tokens, tokens.offsets, config.embed_batch), config.pca_dim
        )
    folds = config.folds if config.vectors != "lm" else 1
    fold = user_folds(log.n_users, folds, config.seed)
    vectors = np.stack(
        [_fold_vectors(run, log, text, fold == left if folds > 1 else None) for left in range(folds)]
    )
    np.save(run.folder / parents.VECTORS, vectors)
    np.save(run.folder / parents.FOLDS, fold)
    samples = np.flatnonzero(np.asarray(log.split) != UNUSED)
    write_neighbours(Neighbours(log, vectors, fold), samples, config.k, run.folder / parents.NEIGHBOURS)
    outputs = [run.folder / name for name in (parents.VECTORS, parents.FOLDS, parents.NEIGHBOURS)]
    run.finish(outputs, {"rows": len(samples), "k": config.k, "dimensions": vectors.shape[2]})


def _fold_vectors(
    run: Run, log: EventLog, text: Vectors | None, without: NDArray[np.bool_] | None
) -> Vectors:
    config = run.config.retrieval
    cooccurrence = None
    if config.vectors in ("cooccurrence", "both"):
        cooccurrence = cooccurrence_vectors(log, config.svd_dim, config.seed, without)
    return item_vectors(config.vectors, text, cooccurrence, config.content_weight)


if __name__ == "__main__":
    sys.exit(main(work, sys.argv[1:]))
