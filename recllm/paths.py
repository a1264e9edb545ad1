"""Every folder and file name on disk, once."""

from __future__ import annotations

import os
from pathlib import Path

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
METRICS = "metrics.json"
FORMATS = "formats.yaml"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
LOGS = "logs"
EXPORT = "export"
ADAPTER = "adapter"
RANKING_ADAPTER = "adapter-ranking"
GATE = "gate.npz"
SINGULAR_VECTORS = "singular-vectors"
ROWS = "rows.json"
RESULTS = "results.json"
REPORT = "report.html"
DESCRIPTION = "describe.html"
CASCADE = "cascade.json"
ITEM_INDEX = "index"
PIECES = "pieces"
"""Folder of tokenized texts in a cascade's export."""
BUNDLE = "bundle.json"
BUNDLES = "bundle"
"""Folder of a data set's bundles."""
ONNX = "onnx"


def artifacts() -> Path:
    """The root of everything that is written: `artifacts/`, or where RECLLM_ARTIFACTS points."""
    return Path(os.environ.get("RECLLM_ARTIFACTS") or "artifacts")


def roots(root: Path) -> list[Path]:
    """Where finished stages of a data set are looked for.

    Args:
        root: `artifacts/<dataset>`, or any folder of that name that holds what is at work.

    Returns:
        The root itself, and behind it `<dataset>` where RECLLM_PARENTS points: artifacts that are only read.
    """
    elsewhere = os.environ.get("RECLLM_PARENTS")
    return [root, Path(elsewhere) / root.name] if elsewhere else [root]


def stage(root: Path, name: str) -> Path:
    """Folder of a stage that something is made from: in the first root that holds it finished, else its own.

    Args:
        root: see `roots`.
        name: the folder within, e.g. `stage2/reclora+din`.
    """
    folders = [place / name for place in roots(root)]
    return next((folder for folder in folders if (folder / MANIFEST).exists()), folders[0])


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
