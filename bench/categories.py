"""What the start of stage 1 costs where every title is a category of its own: `python -m bench.categories`.

A log like MovieLens-25M, with the 59,000 titles as categories: 162,000 users x 59,000 categories are 9.6e9
pairs, of which 25 million have an event. Measured are the running statistics and the search for events of a
target's category, made and asked once for a batch; the log is generated and lies in memory before.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.log import EventLog
from recllm.eventlog.statistics import Statistics
from recllm.retrieval.category import SameCategory

USERS, TITLES = 162_000, 59_000
BATCH = 4096


def generated(events: int) -> EventLog:
    """A log of that many events of `USERS` users and `TITLES` items, each with a category of its own."""
    rng = np.random.default_rng(0)
    n_users, n_items = FIRST_ID + USERS, FIRST_ID + TITLES
    length = rng.multinomial(events, np.full(USERS, 1 / USERS))
    ids = np.arange(n_items, dtype=np.int32)
    item = FIRST_ID + (TITLES * rng.random(events, dtype=np.float32) ** 3).astype(np.int32)
    item = np.minimum(item, n_items - 1)
    label = (rng.random(events, dtype=np.float32) < 0.5).astype(np.int8)
    arrays: dict[str, NDArray[Any]] = {
        "user": np.repeat(FIRST_ID + np.arange(USERS, dtype=np.int32), length),
        "item": item,
        "rating": np.ones(events, np.int16),
        "label": label,
        "timestamp": rng.integers(0, 10**9, events),  # in no order, which nothing here asks for
        "split": np.zeros(events, np.int8),
        "training": np.ones(events, bool),
        "offsets": np.concatenate([np.zeros(FIRST_ID, np.int64), [0], np.cumsum(length)]),
        "user_fields": np.zeros((n_users, 1), np.int32),
        "item_fields": np.stack([ids, ids], 1),
        "item_count": np.bincount(item, minlength=n_items).astype(np.int32),
        "item_likes": np.bincount(item, label, n_items).astype(np.int32),
    }
    meta = {"n_users": n_users, "n_items": n_items, "category_field": 1, "timed": True, "rating_levels": []}
    return EventLog(Path(), arrays, meta)


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=25_000_000)
    events = parser.parse_args().events
    log = generated(events)
    figures: dict[str, Any] = {"events": events, "categories": TITLES, "peak_gb of the log": _peak()}
    rows = np.random.default_rng(1).integers(0, events, BATCH)
    for name, make in (("statistics", Statistics), ("same category", SameCategory)):
        begin, own = time.perf_counter(), time.process_time()
        made = make(log)
        figures[f"{name}: seconds"] = round(time.perf_counter() - begin, 1)
        figures[f"{name}: cpu_seconds"] = round(time.process_time() - own, 1)
        begin = time.perf_counter()
        if isinstance(made, Statistics):
            made(rows)
        else:
            made.search(rows, None, 10)
        figures[f"{name}: seconds of {BATCH} rows"] = round(time.perf_counter() - begin, 3)
        figures[f"{name}: peak_gb"] = _peak()
    print(json.dumps(figures, indent=1))


def _peak() -> float:
    """The most memory that this process has had so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


if __name__ == "__main__":
    main()
