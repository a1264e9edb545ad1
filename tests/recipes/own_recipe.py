"""The recipe of files of one's own, and its configuration."""

from omegaconf import OmegaConf

from recllm.tables.config import SourceConfig
from tests.recipes.contract import load_recipe

recipe = load_recipe("own")

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
