"""An event log written to a temporary folder, for the tests of retrieval."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recllm.eventlog.log import ARRAYS, EventLog


@pytest.fixture
def write_log(tmp_path: Path) -> Callable[..., EventLog]:
    """`write_log([[items of user 2], [items of user 3], ...], n_items, **arrays)` -> the opened log.

    Times count up over the whole log; ratings, labels and splits (all training) may be given as arrays `[N]`.
    """

    def write(histories: list[list[int]], n_items: int, **arrays: np.ndarray) -> EventLog:
        lengths = [0, 0, *map(len, histories)]
        n = sum(lengths)
        values = {
            "user": np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
            "item": np.array([item for history in histories for item in history], np.int32),
            "rating": np.ones(n, np.int16),
            "label": np.ones(n, np.int8),
            "timestamp": np.arange(n, dtype=np.int64),
            "split": np.zeros(n, np.int8),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "user_fields": np.zeros((len(lengths), 1), np.int32),
            "item_fields": np.zeros((n_items, 1), np.int32),
            "item_count": np.zeros(n_items, np.int32),
            "item_likes": np.zeros(n_items, np.int32),
            **arrays,
        }
        last = values["timestamp"][values["split"] == 0].max(initial=-1)
        trains = (values["split"] == 0) | ((values["split"] < 0) & (values["timestamp"] <= last))
        values.setdefault("training", trains)
        assert set(ARRAYS) <= set(values)
        folder = tmp_path / f"log{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, value in values.items():
            np.save(folder / f"{name}.npy", value)
        (folder / "meta.json").write_text(
            json.dumps({"n_items": n_items, "n_users": len(lengths), "timed": True})
        )
        return EventLog.open(folder)

    return write
