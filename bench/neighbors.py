"""What neighbors of a large log cost: vectors of all groups of users, and the search, as the stage does it.

`make bench-neighbors` takes a generated log (`bench/logs.py`) of 25 million events; ARGS=5000000 another one.
The LM's part of the vectors is random, as the time depends on its width alone; nothing else differs from
`stages/retrieve.py`. Parts are measured in CPU seconds, in which other work on the machine does not count.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from bench import logs
from bench.clock import REPOSITORY, cost, keep
from bench.scale import PLACE, prepare
from recllm.eventlog.ids import UNUSED
from recllm.eventlog.log import EventLog
from recllm.retrieval.config import RetrievalConfig
from recllm.retrieval.neighbors import Neighbors, write_neighbors
from recllm.retrieval.vectors import normalize, user_folds, vectors_of_folds

EVENTS = 25_000_000
PARTS = "neighbors.json"


def work(log_folder: Path) -> None:
    """Make the vectors and the file of neighbors; write CPU seconds of both beside the log."""
    log = EventLog.open(log_folder)
    config = RetrievalConfig()
    folds = config.num_folds(int(np.count_nonzero(log.training)))
    fold = user_folds(log.n_users, folds, config.seed)
    text = np.random.default_rng(0).standard_normal((log.n_items, config.pca_dim)).astype(np.float32)
    begin = time.process_time()
    vectors = vectors_of_folds(log, config, fold, normalize(text))
    between = time.process_time()
    path = log_folder.parent / "neighbors.npy"
    write_neighbors(Neighbors(log, vectors, fold), log.split != UNUSED, config.k, path)
    figures = {
        "k": config.k,
        "groups of users": folds,
        "dimensions": vectors.shape[2],
        "cpu_seconds of vectors": round(between - begin, 1),
        "cpu_seconds of the search": round(time.process_time() - between, 1),
    }
    (log_folder.parent / PARTS).write_text(json.dumps(figures), encoding="utf-8")


def main(events: int) -> None:
    """Prepare a log of so many events where there is none, and measure."""
    artifacts = PLACE / "scale" / str(events)
    log_folder = artifacts / "ml-25m" / "log"
    if not (log_folder / "meta.json").exists():
        raw = PLACE / "logs" / str(events)
        if not (raw / "movies.csv").exists():
            logs.write(raw, events)
        prepare("ml-25m", raw, artifacts)
    whole = cost([sys.executable, "-m", "bench.neighbors", "work", str(log_folder)])
    figures = json.loads((log_folder.parent / PARTS).read_text(encoding="utf-8"))
    path = keep("neighbors", {"events": events} | figures | {"whole process": whole})
    print(path.read_text(encoding="utf-8"))
    print(f"figures: {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else EVENTS)
