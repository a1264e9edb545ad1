"""The recipe of files of one's own, and its configuration."""

import importlib.util
import sys
from pathlib import Path

from omegaconf import OmegaConf

from recllm.tables.config import SourceConfig

REPOSITORY = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("own_recipe", REPOSITORY / "data" / "own" / "recipe.py")
recipe = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = recipe
SPEC.loader.exec_module(recipe)

SOURCE = {
    "events": {
        "path": "events.csv", "user": "who", "item": "sku", "rating": "stars", "rating_scale": [1, 5],
        "timestamp": "at",
    },
    "items": {"path": "items.csv", "item": "sku", "title": "name"},
    "label": {"threshold": 3},
}  # fmt: skip


def config_of(sections):
    """The section `source` alone: merging the whole configuration takes longer than reading a small shop."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), sections))
