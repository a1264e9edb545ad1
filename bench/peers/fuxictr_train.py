"""FuxiCTR's training on the log of `bench/stage1.py`: `fuxictr_train MODEL FOLDER THREADS [--whole]`.

The wheel holds its long-sequence models only; DIN and DeepFM are read from `.bench/fuxictr/zoo`, which
`make bench-stage1` takes from the repository.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader
from fuxictr.pytorch.torch_utils import seed_everything

from bench.clock import REPOSITORY, rate

ZOO = REPOSITORY / ".bench" / "fuxictr" / "zoo"
MODULES = {"DIN": "DIN.src", "DeepFM": "DeepFM.DeepFM_torch.src"}
LONG, KEPT, SECONDS = 100, 20, 6.0


def features(folder: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Flat fields, and the history's items and categories, which share the fields' tables."""
    with np.load(folder / "train.npz") as train, np.load(folder / "valid.npz") as valid:
        sizes = {name: int(max(train[name].max(), valid[name].max())) + 1 for name in train.files}
    shared = {"history_item": "item_id", "history_genre": "genre"}
    described: list[dict[str, Any]] = []
    for name, size in sizes.items():
        if name == "label":
            continue
        if name in shared:
            size = sizes[shared[name]]
            own = {"type": "sequence", "max_len": about["history"], "share_embedding": shared[name]}
        else:
            own = {"type": "categorical"}
        described.append({name: {**own, "source": "", "padding_idx": 0, "vocab_size": size}})
    return described


def long_features(folder: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the layout of its long-sequence models: a row's place in its user's history, kept once a user."""
    flat = {name: next(iter(one.values())) for one in features(folder, about) for name in one}
    users, items = ["user_id", *about["user_fields"]], ["item_id", *about["item_fields"]]
    described = [
        {name: {"source": "user", "type": "categorical", "vocab_size": flat[name]["vocab_size"]}}
        for name in users
    ]
    described += [{name: {"type": "meta"}} for name in ("user_index", "seq_len", "item_index")]
    return described + [
        {name: {"source": "item", "type": "categorical", "vocab_size": flat[name]["vocab_size"]}}
        for name in items
    ]


def main(name: str, folder: Path, threads: int, whole: bool) -> None:
    """Print the rates of its training steps as JSON; `whole`: the AUC after one pass instead."""
    torch.set_num_threads(threads)
    seed_everything(0)
    about = json.loads((folder / "about.json").read_text())
    described = long_features(folder, about) if name == "SIM" else features(folder, about)
    pooling = None if name == "DIN" else "layers.MaskedAveragePooling()"  # DIN pools by its attention
    for one in described:
        for feature in one.values():
            feature |= {"feature_encoder": pooling} if feature["type"] == "sequence" else {}
    kinds = {"dataset_id": "bench", "features": described, "labels": ["label"], "num_fields": len(described)}
    path = folder / f"feature_map_{name}.json"
    path.write_text(json.dumps(kinds | {"total_features": 0, "input_length": 0}))
    settings: dict[str, Any] = {
        "model_id": name, "dataset_id": "bench", "model_root": str(folder / "fuxictr"), "gpu": -1,
        "verbose": 0, "optimizer": "adam", "loss": "binary_crossentropy", "metrics": ["AUC"],
        "task": "binary_classification", "learning_rate": 1e-3, "embedding_dim": 16,
        "dnn_hidden_units": [128, 64], "hidden_units": [128, 64], "attention_hidden_units": [64],
        "din_target_field": [("item_id", "genre")], "din_sequence_field": [("history_item", "history_genre")],
        "num_heads": 2, "attention_dim": 32, "topk": KEPT, "short_seq_len": about["history"],
        "embedding_regularizer": 0, "net_regularizer": 0,
    }  # fmt: skip
    feature_map = FeatureMap("bench", str(folder))
    feature_map.load(str(path), settings)
    size = about["batch_size"]
    if name == "SIM":
        import model_zoo.LongCTR as long_models

        sys.path.insert(0, str(Path(long_models.__file__).parent))
        loader = importlib.import_module("longctr_dataloader").LongCTRDataLoader
        kind = importlib.import_module("model_zoo.LongCTR.SIM.SIM").SIM
        more = {
            "user_info": str(folder / "user_info.parquet"),
            "item_info": str(folder / "item_info.parquet"),
        }
        paths = {split: str(folder / f"long_{split}") for split in ("train", "valid")}
        options: dict[str, Any] = {**more, "max_len": LONG}
    else:
        sys.path.insert(0, str(ZOO))
        kind = getattr(importlib.import_module(MODULES[name]), name)
        loader, options = NpzDataLoader, {}
        paths = {split: str(folder / f"{split}.npz") for split in ("train", "valid")}
    train = loader(feature_map, paths["train"], batch_size=size, shuffle=True, num_workers=0, **options)
    model = kind(feature_map, **settings)
    model._max_gradient_norm, model._batch_index = 10.0, 0
    model.train()
    if not whole:
        batches = itertools.chain.from_iterable(itertools.repeat(train))
        print(json.dumps(rate((model.train_step(batch).item() for batch in batches), size, SECONDS)))
        return
    for batch in train:
        model.train_step(batch)
    valid = loader(feature_map, paths["valid"], batch_size=size, shuffle=False, num_workers=0, **options)
    print(json.dumps({"auc": float(model.evaluate(valid, metrics=["AUC"])["AUC"])}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), "--whole" in sys.argv)
