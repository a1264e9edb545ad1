"""Every folder and file name on disk, once."""

from __future__ import annotations

import os
from pathlib import Path

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
METRICS = "metrics.json"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
LOGS = "logs"
EXPORT = "export"
ADAPTER = "adapter"
RANKING_ADAPTER = "adapter-ranking"
GATE = "gate.npz"
SINGULAR_VECTORS = "singular-vectors"
RESULTS = "results.json"
REPORT = "report.html"
DESCRIPTION = "describe.html"


def artifacts() -> Path:
    """The root of everything that is written: `artifacts/`, or where RECLLM_ARTIFACTS points."""
    return Path(os.environ.get("RECLLM_ARTIFACTS") or "artifacts")


def cache(root: Path) -> Path:
    """What can be computed again: `artifacts/<dataset>/cache`, or `<dataset>` where RECLLM_CACHE points."""
    elsewhere = os.environ.get("RECLLM_CACHE")
    return Path(elsewhere) / root.name if elsewhere else root / "cache"


def repository() -> Path:
    """The folder that holds `conf/`, `data/` and `stages/`."""
    return Path(__file__).resolve().parent.parent


OWN = "own"
"""Folder in `data/` of the recipe for every data set that its configuration describes."""


def recipe_folder(dataset: str) -> str:
    """Name of a data set's folder in `data/`: hyphens become underscores, nothing else changes."""
    return dataset.replace("-", "_")


NEIGHBORS = "neighbors.npy"

VECTORS = "vectors.npy"

FOLDS = "folds.npy"
