"""FuxiCTR's loader on rows of `bench/loader.py`: `python -m bench.peers.fuxictr_loader FOLDER`."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader

from bench.clock import rate


def main(folder: Path) -> None:
    """Describe the columns as FuxiCTR wants it, read them with its loader, and print the rates as JSON."""
    torch.set_num_threads(1)
    about = json.loads((folder / "about.json").read_text())
    with np.load(folder / "train.npz") as arrays:
        names = {name: arrays[name].ndim for name in arrays.files if name != "label"}
    features = [
        {name: {"type": "categorical" if dimensions == 1 else "sequence", "max_len": about["history"]}}
        for name, dimensions in names.items()
    ]
    description = {
        "dataset_id": "bench",
        "features": features,
        "labels": ["label"],
        "num_fields": len(features),
    }
    (folder / "feature_map.json").write_text(json.dumps(description))
    feature_map = FeatureMap("bench", str(folder))
    feature_map.load(str(folder / "feature_map.json"), {"embedding_dim": 16})
    size = about["batch_size"]
    loader = NpzDataLoader(
        feature_map, str(folder / "train.npz"), batch_size=size, shuffle=True, num_workers=0
    )
    batch = next(iter(loader))
    shapes = {name: list(value.shape) for name, value in batch.items()}
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    print(json.dumps(rate(batches, size) | {"batch": shapes, "rows": loader.num_samples}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
