"""A log that holds nothing out: every sample trains, every event counts.

It is for production: what is trained on it has read the test split, and nothing may be measured by it. Rows,
histories and drawn negatives are those of the log that held samples out, so that a row is the same row in
both; what differs is what training may read: split, order of the training samples, counts, and which ids have
a training event. The rows and lists of `valid` and `test` stay where they were, as rows that training reads
too: who sets a training up finds them, and an evaluation refuses such a log (`check_holds_out`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recllm.errors import StageError
from recllm.eventlog import draws
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.fields import trained_fields
from recllm.eventlog.ids import FIRST_ID, SPLITS, TRAIN, UNUSED
from recllm.eventlog.log import EventLog, Rows
from recllm.files import write_array, write_text

TABLES = ("items.parquet", "users.parquet")


def write_all_data(log: EventLog, folder: Path, config: PrepareConfig) -> dict[str, Any]:
    """Write the log in which every sample of another one trains.

    Args:
        log: a finished log that holds samples out.
        folder: where the new one is to lie; arrays of an earlier one are removed.
        config: that made `log`.

    Returns:
        `events`, `samples`, `users`, `items` and `sampled_negatives`; `train`: all samples, `valid` and
        `test`: 0.

    Raises:
        StageError: the log holds whole items out.
    """
    if log.item_split is not None:
        raise StageError(
            f"prepare.split=items, and {len(log.held_rows):,} events of held-out items are in no history of "
            "this log; wanted another split for ALL_DATA=1, e.g. ARGS=prepare.split=time"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.npy"):
        stale.unlink()
    training = np.arange(len(log.user)) < log.n_events
    items = pl.read_parquet(log.folder / "items.parquet")[FIRST_ID:]
    users = pl.read_parquet(log.folder / "users.parquet")[FIRST_ID:]
    changed = {
        "split": np.where(log.split == UNUSED, UNUSED, TRAIN).astype(np.int8),
        "training": training,
        **trained_fields(log.user, log.item, log.label, training, users, items, config),
    }
    order = all_samples(log)
    changed["order_train"] = order
    changed["permutation_train"] = draws.permutation(draws.derive(config.seed, "permutation", "train"), order)
    for name, values in changed.items():
        write_array(folder / f"{name}.npy", values)
    for path in sorted(log.folder.glob("*.npy")):
        if path.stem not in changed:
            shutil.copyfile(path, folder / path.name)
    for name in TABLES:
        shutil.copyfile(log.folder / name, folder / name)
    # Last, as a folder without it is no log.
    meta = {**log.meta, "holds_nothing_out": True}
    write_text(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    return {
        "samples": len(order),
        "train": len(order),
        "valid": 0,
        "test": 0,
        "users": log.n_users - FIRST_ID,
        "items": log.n_items - FIRST_ID,
        "events": log.n_events,
        "sampled_negatives": len(log.user) - log.n_events,
    }


def all_samples(log: EventLog) -> Rows:
    """The samples of all splits in the order of the training ones: by time, then as they stand in the log.

    A drawn negative stands behind the event that it was drawn for.
    """
    rows = np.concatenate([log.rows(split, "all") for split in SPLITS])
    anchor = log.anchors(rows)
    return rows[np.lexsort((rows, anchor, log.timestamp[anchor]))]


def check_holds_out(log: EventLog) -> None:
    """Refuse a log that holds nothing out, where something is to be measured.

    Raises:
        StageError: in a line.
    """
    if log.meta.get("holds_nothing_out"):
        raise StageError(
            f"{log.folder} trains on its test split, too (ALL_DATA=1), and figures by it would mean nothing; "
            "wanted the log that holds samples out: leave ALL_DATA away"
        )
