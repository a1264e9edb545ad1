"""Models of finished stages, or of anywhere else, for a notebook."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recllm import paths
from recllm.lm.config import Dtype, LmConfig
from recllm.pipeline.finished import Finished

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recllm.crm.layers import Model


def load_crm(folder: str | Path) -> Model:
    """The CRM that a finished stage 1 exported, on the CPU, in eval mode.

    Args:
        folder: the stage's, e.g. `artifacts/demo/stage1/sim`, or an `export/` folder copied from there.

    Returns:
        `model(batch) -> (logit [batch], representation [batch, d_c])`; `recllm.crm.inputs.CrmInputs` makes
        batches of rows of the event log.

    Raises:
        StageError: the stage is not finished, or its artifacts are of another layout.
        ValueError: a file is missing, or the weights do not fit the configuration.
    """
    from recllm.crm import load

    folder = Path(folder)
    return load(Finished.open(folder).export if (folder / paths.CONFIG).exists() else folder)


def load_lm(source: str | Path, *, dtype: Dtype = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM with frozen weights, in eval mode, and its tokenizer.

    Args:
        source: a finished stage, e.g. `artifacts/demo/lm/tiny/prompts`; or a folder in the hub's form; or a
            hub id, e.g. `Qwen/Qwen3-0.6B-Base`.
        dtype: of the weights: `auto` (as stored), `float32`, `bfloat16` or `float16`. A finished stage's own
            is used where it says one.

    Raises:
        StageError: the stage is not finished, or its artifacts are of another layout.
        ValueError: weights or tokenizer cannot be had.
    """
    from recllm.lm.load import load_lm as load

    folder = Path(source)
    if (folder / paths.CONFIG).exists():
        stage = Finished.open(folder)
        config = stage.config.lm.model
        return load(config, stage.export if config.is_exported else None)
    return load(LmConfig(name=folder.name, path=str(source), dtype=dtype))
