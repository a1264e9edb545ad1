"""How an LM is given several titles behind one prompt: the batch, and the mask that goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recllm.text.collate import Ragged, separate, shared_prefix

SHARED = "shared"
"""A row holds a prompt and all its titles, under a mask of true and false."""
ADDITIVE = "shared-additive"
"""As `SHARED`, under a mask that is added to the attention's scores."""
SEPARATE = "separate"
"""A row holds a prompt and one title, under the LM's own causal mask."""


def title_batch(
    prompts: Ragged, completions: Ragged, counts: NDArray[np.int64] | int, layout: str = SHARED
) -> dict[str, Any]:
    """What `recllm.lm.logprobs.title_logps` takes: B prompts and the completions of each.

    Args:
        prompts: B prompts, none empty.
        completions: the completions, those of prompt 0 first, none empty.
        counts: int64 `[B]`, completions of each prompt, or one number for all.
        layout: as `find_layout` says.
    """
    if layout == SEPARATE:
        return separate(prompts, completions, counts)
    batch = shared_prefix(prompts, completions, counts)
    return batch | {"additive": True} if layout == ADDITIVE else batch


def attention_mask(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """The mask of a batch of titles, made where the batch is.

    A token sees the tokens up to itself of its own sample's prompt and of its own completion. Padding sees
    padding: a row of the mask without anything seen would give NaN.

    Returns:
        Separate titles: int64 `[N, L]`, 1 = real. A shared prefix: bool `[R, 1, L, L]`, true = seen; or the
        same as a float that is added; or FlexAttention's block mask, where that is the model's
        implementation.
    """
    if "attention_mask" in batch:
        return batch["attention_mask"]
    slot: Tensor = batch["slot"]  # which sample of its row a token belongs to, `[R, L]`
    branch: Tensor = batch["branch"]  # 0 in the prompt, c + 1 in completion c, `[R, L]`
    if getattr(model.config, "_attn_implementation", None) == "flex_attention":
        return _block_mask(slot, branch)
    same_sample = slot[:, :, None] == slot[:, None]
    in_prompt = branch[:, None] == 0
    same_branch = branch[:, :, None] == branch[:, None]
    mask = (same_sample & (in_prompt | same_branch)).tril()[:, None]
    if not batch.get("additive"):
        return mask
    dtype = next(model.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _block_mask(slot: Tensor, branch: Tensor) -> Any:
    """The same mask for FlexAttention, which asks for it entry by entry; arguments int64 `[R, L]`."""
    from torch.nn.attention.flex_attention import create_block_mask

    def is_seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prompt = branch[row, key] == 0
        same_branch = branch[row, key] == branch[row, query]
        return (key <= query) & (slot[row, key] == slot[row, query]) & (in_prompt | same_branch)

    num_rows, length = slot.shape
    return create_block_mask(is_seen, num_rows, None, length, length, device=slot.device.type)
