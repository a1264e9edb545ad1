"""Scores of whole tasks without gradients, on the device where the model is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from numpy.typing import NDArray
from torch import Tensor

from recllm.lm.generate import constrained
from recllm.lm.logprobs import answer_logits, candidate_logps, title_sums, token_logps
from recllm.lm.tasks import Batch, NextTitleLists, YesNoCandidates, YesNoPrompts

Scores = NDArray[np.float32]


@torch.inference_mode()
def answer_scores(model: Any, task: YesNoPrompts, size: int = 256) -> Scores:
    """Logit of Yes against No `[n]` of every row; rows of like length go through the LM together."""
    pieces = task.prompts.pieces

    def score(batch: Batch) -> Tensor:
        logits = answer_logits(model, batch["prompt"], batch["representation"]).float()
        return logits[:, pieces.yes_id] - logits[:, pieces.no_id]

    return _scores(model, task, size, score)


@torch.no_grad()  # and not `inference_mode`: a sharded LM keeps its buffers for training
def answer_states(model: Any, task: YesNoPrompts, size: int = 256) -> Scores:
    """What the LM head reads behind each prompt, float32 `[n, width]`."""
    read: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: read.append(args[0][:, -1]), prepend=True)

    def score(batch: Batch) -> Tensor:
        read.clear()
        answer_logits(model, batch["prompt"], batch["representation"])
        return read[-1]

    try:
        return _scores(model, task, size, score)
    finally:
        handle.remove()


@torch.inference_mode()
def candidate_scores(model: Any, task: NextTitleLists | YesNoCandidates, size: int = 64) -> Scores:
    """Log-probabilities `[n, C]` of all candidates of every row, or of Yes to each; `size` rows a batch."""
    return _scores(model, task, size, lambda batch: candidate_logps(model, batch))


@torch.inference_mode()
def title_choices(model: Any, task: NextTitleLists, size: int = 64) -> Scores:
    """What an LM makes of all candidates of every row, from one pass over each prompt.

    Args:
        model: the LM, with or without an adapter.
        task: rows, candidates, gate input.
        size: rows of a batch.

    Returns:
        `[n, C, 2]`: the log-probability summed over the title's tokens; and where greedy decoding ends that
        may only spell candidates: 1 there (shared evenly among candidates that read the same), 0 elsewhere.
    """

    def score(batch: Batch) -> Tensor:
        logps = token_logps(model, batch["prompt"], batch["representation"])
        return torch.stack([title_sums(batch["prompt"], logps), constrained(batch["prompt"], logps)], 2)

    return _scores(model, task, size, score)


def _scores(
    model: Any,
    task: YesNoPrompts | NextTitleLists | YesNoCandidates,
    size: int,
    score: Callable[[Batch], Tensor],
) -> Scores:
    device = next(model.parameters()).device
    order = np.argsort(task.lengths(), kind="stable")
    parts = [
        score(move_data_to_device(task(order[start : start + size]), device)).float().cpu().numpy()
        for start in range(0, len(order), size)
    ]
    scores = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    out = np.empty_like(scores)
    out[order] = scores
    return out
