"""What RecBole is told of the rows of `bench/loader.py`, by the benches of its loader and of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def common(folder: Path, about: dict[str, Any], group_by: str | None = "none") -> dict[str, Any]:
    """Settings that both benches share.

    Args:
        folder: where the rows lie.
        about: what `bench/loader.py` says of them: `about.json`.
        group_by: how RecBole groups its evaluation; None for models without a sequence.
    """
    return {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "recbole"),
        "use_gpu": False,
        "seed": 0,
        "worker": 0,
        "show_progress": False,
        "state": "ERROR",
        "load_col": {
            "inter": ["user_id", "item_id", "label", "timestamp"],
            "user": ["user_id", *about["user_fields"]],
            "item": ["item_id", *about["item_fields"]],
        },
        "LABEL_FIELD": "label",
        "TIME_FIELD": "timestamp",
        "MAX_ITEM_LIST_LENGTH": about["history"],
        "ITEM_LIST_LENGTH_FIELD": "item_length",
        "train_neg_sample_args": None,
        "train_batch_size": about["batch_size"],
        "eval_args": {
            "split": {"RS": [0.8, 0.1, 0.1]},
            "order": "TO",
            "group_by": group_by,
            "mode": "labeled",
        },
        "metrics": ["AUC"],
        "valid_metric": "AUC",
        "embedding_size": 16,
        "epochs": 1,
    }
