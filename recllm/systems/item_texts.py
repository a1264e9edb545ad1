"""The frozen LM's vectors of items' texts, as the neighbors' stage left them: for models that read texts."""

from __future__ import annotations

import torch
from torch import Tensor

from recllm.errors import StageError
from recllm.files import load_array
from recllm.paths import VECTORS
from recllm.pipeline.finished import Finished
from recllm.retrieval.vectors import normalize


def text_dimensions(neighbors: Finished) -> int:
    """How many dimensions the text vectors of finished neighbors have; 0: `retrieval.vectors` has none."""
    config = neighbors.config.retrieval
    if config.vectors == "cooccurrence":
        return 0
    width = int(load_array(neighbors.folder / VECTORS).shape[2])
    return width - (2 * config.svd_dim if config.vectors == "both" else 0)


def text_vectors(neighbors: Finished, dimensions: int) -> Tensor:
    """The first dimensions of the LM's item vectors, float32 `[n_items, dimensions]`, of length 1.

    Raises:
        StageError: there are fewer.
    """
    there = text_dimensions(neighbors)
    if there < dimensions:
        raise StageError(
            f"retrieval.vectors={neighbors.config.retrieval.vectors} has {there} dimensions of texts, "
            f"stage1.crm.text_dim={dimensions} are wanted; lower it, or set retrieval.vectors=both"
        )
    vectors = load_array(neighbors.folder / VECTORS)[0]  # the LM's part is the same in all folds
    return torch.from_numpy(normalize(vectors[:, :dimensions]))
