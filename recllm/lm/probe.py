"""In which layout an LM scores titles right, found by a small example."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from recllm.lm.hub import text_config
from recllm.lm.layout import ADDITIVE, SEPARATE, SHARED, attention_mask, title_batch
from recllm.lm.logprobs import title_logps
from recllm.text.collate import Ragged

WINDOW = re.compile(
    r"(sliding|local|attention|keep|local_attention)?_?windows?(_size|_sizes|_len)?|attention_chunk_size"
)
"""Names under which configurations of transformers state how far back a layer looks."""
OTHER_SENSES = re.compile("vision|audio|image|speech|video")
"""In the name of a part of a configuration: it is not about text."""
LARGEST_ERROR = {torch.float64: 0.01, torch.float32: 0.01}
"""Largest error by the weights' dtype, as a fraction of what a wrong mask changes; others: the next one."""
LARGEST_ERROR_16_BIT = 0.3
TITLES = 3
"""Titles behind each prompt of the example."""
MOST_NOISE = 4.0
"""What a title may move by another one's tokens, in parts of what other rows move, which is rounding."""


def find_layout(model: Any, context: int) -> str:
    """The cheapest layout in which an LM scores titles as it would one by one.

    A small example is scored in every layout and compared with whole sequences, against what an ordinary
    causal mask would have changed: that tells an LM that does not heed the mask at all. Rounding hides what
    is smaller, so two things are asked to the bit: logits must not move with the tokens of a title that they
    do not belong to (a state or a convolution reaches across titles), and must move with the positions that
    are given (distances of ALiBi are read off the row).

    Args:
        model: a causal LM without an adapter, in eval mode.
        context: most tokens of a prompt and title (`lm.model.context`).

    Returns:
        `SHARED`, `ADDITIVE` or `SEPARATE`.
    """
    if any(window < context for window in attention_windows(model.config)):
        return SEPARATE  # the mask would replace the LM's own, which hides what is further away
    prompts, titles = _example(int(model.get_input_embeddings().weight.shape[0]))
    expected = _example_logps(model, title_batch(prompts, titles, TITLES, layout=SEPARATE))
    # All tokens of one slot and one branch: the mask is the ordinary causal one.
    causal = title_batch(prompts, titles, TITLES)
    causal["branch"] = torch.zeros_like(causal["branch"])
    causal["slot"] = torch.zeros_like(causal["slot"])
    tolerance = LARGEST_ERROR.get(next(model.parameters()).dtype, LARGEST_ERROR_16_BIT)
    for layout in (SHARED, ADDITIVE):
        batch = title_batch(prompts, titles, TITLES, layout=layout)
        try:
            wrong = _example_logps(model, causal | {"additive": layout == ADDITIVE})
            logps = _example_logps(model, batch)
            close = (logps - expected).abs().max() < tolerance * (wrong - expected).abs().max()
            if close and _keeps_titles_apart(model, batch) and _reads_positions(model, batch):
                return layout
        except Exception:  # LMs refuse a mask that they cannot use with errors of many types
            continue
    return SEPARATE


def _keeps_titles_apart(model: Any, batch: dict[str, Any]) -> bool:
    """Whether all else of a row stays the same, to the bit, when the tokens of one of its titles change.

    Where experts are chosen by token, even other rows move by rounding, as other tokens share their products;
    a row may then move by no more than a few times that.

    Args:
        model: as for `find_layout`.
        batch: the example in a layout that shares prompts, a prompt a row.
    """
    branch = batch["branch"]
    logits = _example_logits(model, batch)
    leak = noise = 0.0
    for row in range(len(branch)):
        in_row = torch.zeros_like(branch, dtype=torch.bool)
        in_row[row] = branch[row] >= 0
        noise = max(noise, _change(model, batch, logits, ~in_row, in_row))
        for title in range(TITLES):
            changing = in_row & (branch == title + 1)
            leak = max(leak, _change(model, batch, logits, changing, in_row & ~changing))
    return leak <= MOST_NOISE * noise


def _change(model: Any, batch: dict[str, Any], logits: Tensor, changing: Tensor, watched: Tensor) -> float:
    """Largest change of logits at some places of an example when the tokens at others change.

    Args:
        model: as for `find_layout`.
        batch: the example in a layout that shares prompts.
        logits: what the LM gives for it, `[R, L, V]`.
        changing: bool `[R, L]`, where tokens change.
        watched: bool `[R, L]`, where logits are compared.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    largest = 0.0
    for shift in (11, 23):
        ids = torch.where(changing, (batch["input_ids"] + shift) % vocabulary, batch["input_ids"])
        moved = (_example_logits(model, batch | {"input_ids": ids}) - logits)[watched].abs().max()
        largest = max(largest, float(moved) if moved.isfinite() else float("inf"))
    return largest


def _reads_positions(model: Any, batch: dict[str, Any]) -> bool:
    """Whether what a title's tokens predict changes when they are put further away from their prompt.

    Args:
        model: as for `find_layout`.
        batch: the example in a layout that shares prompts.
    """
    in_title = batch["branch"] > 0
    near = _example_logits(model, batch)
    far = _example_logits(model, batch | {"position_ids": batch["position_ids"] + 2 * in_title})
    return not torch.equal(near[in_title], far[in_title])


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
    return title_logps(model, _on_device(model, batch)).float()


@torch.inference_mode()
def _example_logits(model: Any, batch: dict[str, Any]) -> Tensor:
    """Logits behind every token of a batch that shares prompts, float64 `[R, L, V]` on the CPU."""
    inputs = _on_device(model, batch)
    mask = attention_mask(model, inputs)
    positions = inputs["position_ids"]
    outputs = model(
        input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False
    )
    logits: Tensor = outputs.logits.double().cpu()
    return logits


def _on_device(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its tensors on the model's device."""
    device = next(model.parameters()).device
    inputs = {}
    for name, value in batch.items():
        inputs[name] = value.to(device) if isinstance(value, Tensor) else value
    return inputs


def attention_windows(config: Any) -> list[int]:
    """Tokens that an LM's layers look back at most, where they are limited (sliding or local attention).

    Args:
        config: the LM's own (`model.config`). Of one that sees or hears too, the part that reads text counts.
    """
    config = text_config(config)
    windows = []
    for name, value in vars(config).items():
        if hasattr(value, "get_text_config"):  # a part of the LM with a configuration of its own
            windows += [] if OTHER_SENSES.search(name) else attention_windows(value)
        elif WINDOW.fullmatch(name):
            sizes = value if isinstance(value, (list, tuple)) else [value]
            windows += [size for size in sizes if type(size) is int and size > 0]
    return windows
