"""Free generation of titles: how often an LM names one of the candidates when nothing holds it to them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from numpy.typing import NDArray

from recllm.data.collate import pad_left
from recllm.lm.tasks import Titles


def normalize(title: str) -> str:
    """Case and runs of white space do not matter."""
    return re.sub(r"\s+", " ", title).strip().casefold()


@torch.inference_mode()
def valid_ratio(model: Any, tokenizer: Any, task: Titles, size: int = 64) -> NDArray[np.float32]:
    """Generate each row's title greedily and compare it, normalised, with the row's candidates.

    Args:
        model: the LM, with or without an adapter.
        tokenizer: its tokenizer.
        task: rows, candidates, gate input.
        size: rows of a batch.

    Returns:
        float32 `[n, 2]`: 1 where the text is exactly a candidate's title; 1 where it is the chosen one's.
    """
    prompts, pieces = task.prompts, task.prompts.pieces
    out = np.zeros((len(task), 2), np.float32)
    for start in range(0, len(task), size):
        chosen = np.arange(start, min(start + size, len(task)))
        listed = task.candidates[chosen] if task.listed else None
        device = next(model.parameters()).device
        batch = move_data_to_device(
            pad_left(prompts.ranking(task.rows[chosen], task.history[chosen], listed)), device
        )
        extra = (
            {} if task.representation is None else {"representation": task.representation[chosen].to(device)}
        )
        made = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=pieces.longest_completion,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **extra,
        )[:, batch["input_ids"].shape[1] :]
        texts = [normalize(text) for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
        for place, text in enumerate(texts):
            items = task.candidates[chosen[place]]
            titles = [normalize(tokenizer.decode(pieces.table[pieces.item[item]])) for item in items]
            out[chosen[place]] = text in titles, text == titles[task.chosen[chosen[place]]]
    return out
