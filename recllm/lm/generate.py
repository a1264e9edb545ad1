"""Decoding of titles: free, to see how often an LM names a candidate unheld, and held to the candidates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from numpy.typing import NDArray
from torch import Tensor

from recllm.lm.tasks import NextTitleLists
from recllm.text.collate import pad_left


def normalize(title: str) -> str:
    """Case and runs of white space do not matter."""
    return re.sub(r"\s+", " ", title).strip().casefold()


def constrained(batch: Mapping[str, Any], logps: Tensor) -> Tensor:
    """Where greedy decoding ends that may only spell a candidate of its prompt (a walk down their trie).

    Exactly what a decoder with a mask over the vocabulary does, but without decoding: candidates that begin
    alike have the same probabilities there, so all that it would meet has been scored.

    Args:
        batch: `recllm.lm.layout.title_batch`.
        logps: [M], log-probability of every token of every completion.

    Returns:
        [B, C] in the dtype of `logps`: 1 at the candidate (shared evenly among those that read the same).
    """
    present, cell, target = batch["present"], batch["cell"], batch["target"]
    count, most = present.shape
    lengths = torch.bincount(cell, minlength=count * most)
    place = torch.arange(len(cell), device=cell.device) - (lengths.cumsum(0) - lengths)[cell]
    longest = int(lengths.max())
    tokens = target.new_full((count * most, longest), -1)
    tokens[cell, place] = target
    scores = logps.new_full(tokens.shape, -torch.inf)
    scores[cell, place] = logps
    tokens, scores = tokens.view(count, most, longest), scores.view(count, most, longest)
    alive = present.clone()
    for step in range(longest):
        now = scores[:, :, step].masked_fill(~alive, -torch.inf)
        going = now.amax(1, keepdim=True) > -torch.inf  # the others have ended
        best = tokens[:, :, step].gather(1, now.argmax(1, keepdim=True))
        alive &= ~going | (tokens[:, :, step] == best)
    return alive.to(logps.dtype) / alive.sum(1, keepdim=True)


@torch.inference_mode()
def valid_ratio(model: Any, tokenizer: Any, task: NextTitleLists, size: int = 64) -> NDArray[np.float32]:
    """Generate each row's title greedily and compare it, normalized, with the row's candidates.

    Args:
        model: the LM, with or without an adapter.
        tokenizer: its tokenizer.
        task: rows, candidates, gate input.
        size: rows of a batch.

    Returns:
        float32 `[n, 2]`: 1 where the text is exactly a candidate's title; 1 where it is the chosen one's.
    """
    prompts, pieces = task.prompts, task.prompts.pieces
    items, place = np.unique(task.candidates, return_inverse=True)
    spelled = tokenizer.batch_decode([pieces.table[piece].tolist() for piece in pieces.item[items]])
    titles = np.array([normalize(title) for title in spelled], object)[place.reshape(task.candidates.shape)]
    device = next(model.parameters()).device
    said: list[str] = []
    for start in range(0, len(task), size):
        chosen = np.arange(start, min(start + size, len(task)))
        listed = task.candidates[chosen] if task.listed else None
        batch = move_data_to_device(
            pad_left(prompts.ranking(task.rows[chosen], task.history[chosen], listed)), device
        )
        representation = task.of_prompts(chosen)
        extra = {} if representation is None else {"representation": representation.to(device)}
        made = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=pieces.longest_completion,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **extra,
        )[:, batch["input_ids"].shape[1] :]
        said += [normalize(text) for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
    hits = titles == np.array(said, object)[:, None]
    own = np.take_along_axis(hits, task.chosen[:, None], 1)[:, 0]
    return np.stack([hits.any(1), own], 1).astype(np.float32)
