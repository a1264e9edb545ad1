"""How an LM is given several titles behind one prompt: the batch, and the mask that goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recllm.text.collate import Ragged, separate, shared_prefix

SHARED, ADDITIVE, SEPARATE = "shared", "shared-additive", "separate"
"""One row a prompt with a mask of true and false; the same with a mask that is added; one row a title."""


def title_batch(
    prompts: Ragged, completions: Ragged, counts: NDArray[np.int64] | int, layout: str = SHARED
) -> dict[str, Any]:
    """What `recllm.lm.logprobs.title_logps` takes: B prompts and the completions of each.

    Args:
        prompts: B prompts, none empty.
        completions: the completions, those of prompt 0 first, none empty.
        counts: i64 [B], completions of each prompt, or one number for all.
        layout: as `layout_of` says.
    """
    if layout == SEPARATE:
        return separate(prompts, completions, counts)
    batch = shared_prefix(prompts, completions, counts)
    return batch | {"additive": True} if layout == ADDITIVE else batch


def attention(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """The mask of a batch of titles, made where the batch is.

    A token sees the tokens up to itself of its own sample's prompt and of its own completion. Padding sees
    padding: a row of the mask without anything seen would give NaN.

    Returns:
        Separate titles: i64 [N, L]. A shared prefix: bool [R, 1, L, L], true = seen; or the same as a float
        that is added; or FlexAttention's block mask, where that is the model's implementation.
    """
    if "attention_mask" in batch:
        return batch["attention_mask"]
    slot, branch = batch["slot"], batch["branch"]
    if _implementation(model) == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (branch[row, key] == 0) | (branch[row, key] == branch[row, query])
            return (key <= query) & (slot[row, key] == slot[row, query]) & own

        height, width = slot.shape
        return create_block_mask(seen, height, None, width, width, device=slot.device.type)
    query, key = (slot[:, :, None], branch[:, :, None]), (slot[:, None], branch[:, None])
    mask = (query[0] == key[0]) & ((key[1] == 0) | (query[1] == key[1]))
    mask = mask.tril()[:, None]
    if not batch.get("additive"):
        return mask
    dtype = next(model.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _implementation(model: nn.Module) -> str | None:
    return getattr(model.config, "_attn_implementation", None)
