"""In which layout an LM scores titles right, found by a small example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recllm.lm.layout import ADDITIVE, SEPARATE, SHARED, title_batch
from recllm.lm.logprobs import title_logps
from recllm.text.collate import Ragged

LARGEST_ERROR = {torch.float64: 0.01, torch.float32: 0.01}
"""Largest error by the weights' dtype, as a fraction of what a wrong mask changes; others: the next one."""
LARGEST_ERROR_16_BIT = 0.3


def find_layout(model: Any, context: int) -> str:
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
    if any(window < context for window in attention_windows(model.config)):
        return SEPARATE  # the mask would replace the LM's own, which hides what is further away
    prompts, titles = _example(int(model.get_input_embeddings().weight.shape[0]))
    expected = _example_logps(model, title_batch(prompts, titles, 3, layout=SEPARATE))
    # All tokens of one slot and one branch: the mask is the ordinary causal one.
    causal = title_batch(prompts, titles, 3)
    causal["branch"] = torch.zeros_like(causal["branch"])
    causal["slot"] = torch.zeros_like(causal["slot"])
    tolerance = LARGEST_ERROR.get(next(model.parameters()).dtype, LARGEST_ERROR_16_BIT)
    for layout in (SHARED, ADDITIVE):
        try:
            wrong = _example_logps(model, causal | {"additive": layout == ADDITIVE})
            logps = _example_logps(model, title_batch(prompts, titles, 3, layout=layout))
        except Exception:  # LMs refuse a mask that they cannot use with errors of many types
            continue
        if (logps - expected).abs().max() < tolerance * (wrong - expected).abs().max():
            return layout
    return SEPARATE


def _example(vocabulary: int) -> tuple[Ragged, Ragged]:
    """Two prompts and three titles behind each, of tokens below `vocabulary`."""
    prompts = []
    for start in (0, 40):
        prompts.append([(7 * place + 3) % vocabulary for place in range(start, start + 9)])
    titles = []
    for title in ([1, 2], [1, 2, 3, 4], [5, 6, 7], [2, 8, 9, 1], [1, 2, 3], [9]):
        titles.append([token % vocabulary for token in title])
    return Ragged.from_lists(prompts), Ragged.from_lists(titles)


@torch.inference_mode()
def _example_logps(model: Any, batch: dict[str, Any]) -> Tensor:
    """`title_logps` of a batch that is moved to the model's device, float32 `[2, 3]`."""
    device = next(model.parameters()).device
    inputs = {}
    for name, value in batch.items():
        inputs[name] = value.to(device) if isinstance(value, Tensor) else value
    return title_logps(model, inputs).float()


def attention_windows(config: Any) -> list[int]:
    """Tokens that an LM's layers look back at most, where they are limited (sliding or local attention)."""
    windows = []
    for name in ("sliding_window", "window_size", "attention_chunk_size", "attention_window_size"):
        window = getattr(config, name, None)
        if isinstance(window, int) and window > 0:
            windows.append(window)
    return windows
