"""Retrieval: item texts -> LM -> PCA, joined with training co-occurrence -> nearest earlier events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recllm.console import Progress, say
from recllm.eventlog.candidates import hard_lists
from recllm.eventlog.ids import UNUSED
from recllm.eventlog.log import EventLog
from recllm.files import load_array, write_array, write_text
from recllm.paths import FOLDS, NEIGHBORS, VECTORS
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.retrieval.neighbors import Neighbors, write_neighbors
from recllm.retrieval.vectors import (
    Vectors,
    embed_items,
    lm_vectors,
    user_folds,
    vectors_of_folds,
)
from recllm.systems.lm import causal_lm
from recllm.systems.texts import build_pieces
from recllm.training.precision import device_of

BLOCK = 1 << 16  # rows of the log that a thread searches at once, and that are safe on disk then


def text_vectors(run: Run, log: EventLog) -> Vectors:
    """Vectors of the items' texts [n_items, p], from the LM."""
    config = run.config.retrieval
    model, tokenizer = causal_lm(run.config.lm.model, run.parents[Role.LM])
    model = model.to(device_of(run.config.trainer))
    pieces = build_pieces(run.config, log, tokenizer)
    tokens = pieces.assemble(np.stack([pieces.item, pieces.description], 1))
    hidden = embed_items(model, tokens.tokens, tokens.offsets, config.embed_batch, config.pooling)
    return lm_vectors(hidden, config.pca_dim, config.metric)


def write_vectors(run: Run, log: EventLog) -> None:
    """Write `folds.npy` [n_users] and `vectors.npy` [folds, n_items, D]."""
    config = run.config.retrieval
    text = text_vectors(run, log) if config.vectors in ("lm", "both") else None
    training_events = int(np.count_nonzero(log.training))
    folds = config.num_folds(training_events)
    if not config.folds:
        say(f"{folds} groups of users for {training_events:,} training events (retrieval.folds says others)")
    fold = user_folds(log.n_users, folds, config.seed)
    write_array(run.folder / FOLDS, fold)

    def report(done: int) -> None:
        run.tick()
        say(f"vectors of {done} of {folds} groups")

    write_array(run.folder / VECTORS, vectors_of_folds(log, config, fold, text, report))


def write_hard_candidates(run: Run, log: EventLog, vectors: Vectors, fold: NDArray[np.integer]) -> list[Path]:
    """Write the hard candidates of the ranking rows, in the form of the lists that `prepare` writes."""
    config, size = run.config.retrieval, log.meta["candidates"]
    paths = []
    for split in ("valid", "test"):
        rows, _ = log.ranking(split, f"uniform{size}")
        paths.append(run.folder / f"candidates_{split}_hard{size}.npy")
        write_array(paths[-1], hard_lists(log, rows, vectors, fold, config.hard, size, config.seed))
    return paths


def work(run: Run) -> None:
    """Write the item vectors, `neighbors.npy` [N, k] and hard candidates; goes on where it was killed."""
    config = run.config.retrieval
    log = EventLog.open(run.parents[Role.LOG].folder)
    mark = run.folder / ".vectors"  # which run's vectors lie there, complete
    if not (mark.exists() and mark.read_text() == run.fingerprint):
        write_vectors(run, log)
        write_text(mark, run.fingerprint)
    vectors = load_array(run.folder / VECTORS)
    fold = load_array(run.folder / FOLDS, mapped=False)
    neighbors = Neighbors(log, vectors, fold)
    is_sample = log.split != UNUSED
    progress: list[Progress] = []

    def report(row: int) -> None:
        run.tick()
        if not progress:
            progress.append(Progress("rows searched", len(is_sample), row))
        progress[0].reached(row)

    path = run.folder / NEIGHBORS
    write_neighbors(neighbors, is_sample, config.k, path, run.fingerprint, BLOCK, report)
    say(f"neighbors of {len(is_sample):,} rows")
    outputs = [run.folder / name for name in (VECTORS, FOLDS, NEIGHBORS)]
    if config.hard:
        outputs += write_hard_candidates(run, log, vectors, fold)
    mark.unlink()
    run.finish(outputs, {"rows": int(is_sample.sum()), "k": config.k, "dimensions": vectors.shape[2]})
