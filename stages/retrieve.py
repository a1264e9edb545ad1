"""Retrieval: item texts -> LM -> PCA, joined with training co-occurrence -> nearest earlier events."""

from __future__ import annotations

import sys

import numpy as np

from recllm import parents
from recllm.columns import UNUSED
from recllm.retrieval.neighbours import Neighbours, write_neighbours
from recllm.retrieval.vectors import cooccurrence_vectors, embed_items, item_vectors, lm_vectors
from recllm.run import Run, main


def work(run: Run) -> None:
    """Write `vectors.npy` [n_items, D] and `neighbours.npy` [N, k]."""
    config = run.config.retrieval
    log = parents.event_log(run)
    text = cooccurrence = None
    if config.vectors in ("lm", "both"):
        model, tokenizer = parents.causal_lm(run)
        pieces = parents.build_pieces(run.config, log, tokenizer)
        tokens = pieces.assemble(np.stack([pieces.item, pieces.card], 1))
        text = lm_vectors(
            embed_items(model, tokens.tokens, tokens.offsets, config.embed_batch), config.pca_dim
        )
    if config.vectors in ("cooccurrence", "both"):
        cooccurrence = cooccurrence_vectors(log, config.svd_dim, config.seed)
    vectors = item_vectors(config.vectors, text, cooccurrence, config.content_weight)
    np.save(run.folder / parents.VECTORS, vectors)
    samples = np.flatnonzero(np.asarray(log.split) != UNUSED)
    write_neighbours(Neighbours(log, vectors), samples, config.k, run.folder / parents.NEIGHBOURS)
    outputs = [run.folder / parents.VECTORS, run.folder / parents.NEIGHBOURS]
    run.finish(outputs, {"rows": len(samples), "k": config.k, "dimensions": vectors.shape[1]})


if __name__ == "__main__":
    sys.exit(main(work, sys.argv[1:]))
