"""Finds out, by a small example, in which layout an LM scores titles right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recllm.lm.layout import ADDITIVE, SEPARATE, SHARED, title_batch
from recllm.lm.logprobs import title_logps
from recllm.text.collate import Ragged

NEAR = {torch.float64: 0.01, torch.float32: 0.01}
"""Largest error, as a share of what a wrong mask changes; 16-bit weights: `NEAR_16_BIT`."""
NEAR_16_BIT = 0.3


def layout_of(model: Any, context: int) -> str:
    """The cheapest layout in which an LM scores titles as it would one by one.

    A small example is scored in every layout and compared with whole sequences, against what an ordinary
    causal mask would have changed. So it does not matter why an LM fails: no attention (Mamba), distances
    in place of positions (ALiBi), a mask of its own.

    Args:
        model: a causal LM without an adapter, in eval mode.
        context: most tokens of a prompt and title (`lm.model.context`).

    Returns:
        `SHARED`, `ADDITIVE` or `SEPARATE`.
    """
    if any(window < context for window in windows(model.config)):
        return SEPARATE  # the mask would replace the LM's own, which hides what is further away
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    tokens = [[(7 * place + 3) % vocabulary for place in range(start, start + 9)] for start in (0, 40)]
    titles = [[1, 2], [1, 2, 3, 4], [5, 6, 7], [2, 8, 9, 1], [1, 2, 3], [9]]
    example = (
        Ragged.from_lists(tokens),
        Ragged.from_lists([[t % vocabulary for t in title] for title in titles]),
        3,
    )

    def scores(batch: dict[str, Any]) -> Tensor:
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()
        }
        with torch.inference_mode():
            return title_logps(model, moved).float()

    wanted = scores(title_batch(*example, layout=SEPARATE))
    plain = title_batch(*example)
    plain["branch"], plain["slot"] = torch.zeros_like(plain["branch"]), torch.zeros_like(plain["slot"])
    for layout in (SHARED, ADDITIVE):
        try:
            changed = (scores(plain | {"additive": layout == ADDITIVE}) - wanted).abs().max()
            error = (scores(title_batch(*example, layout=layout)) - wanted).abs().max()
        except Exception:
            continue
        if error < NEAR.get(dtype, NEAR_16_BIT) * changed:
            return layout
    return SEPARATE


def windows(config: Any) -> list[int]:
    """Tokens that an LM's layers look back at most, where they are limited (sliding or local attention)."""
    names = ("sliding_window", "window_size", "attention_chunk_size", "attention_window_size")
    found = [getattr(config, name, None) for name in names]
    return [window for window in found if isinstance(window, int) and window > 0]
