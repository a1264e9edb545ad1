"""Scores of whole tasks without gradients, on the device where the model is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor

from recllm import processes
from recllm.console import Progress, say
from recllm.lm.forwards import Places, cut_for_scoring, is_out_of_memory
from recllm.lm.generate import decode_constrained
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

    return _score_task(model, task, size, score)


@torch.no_grad()  # and not `inference_mode`: a sharded LM keeps its buffers for training
def answer_states(model: Any, task: YesNoPrompts, size: int = 256) -> Scores:
    """The state that the LM head reads behind each prompt, float32 `[n, width]`."""
    states: list[Tensor] = []
    own = threading.local()  # other threads' forwards of the same model pass by this hook too
    own.forward = True

    def remember(_: Any, args: tuple[Tensor, ...]) -> None:
        if hasattr(own, "forward"):
            states.append(args[0][:, -1])

    def score(batch: Batch) -> Tensor:
        states.clear()
        answer_logits(model, batch["prompt"], batch["representation"])
        return states[-1]

    handle = model.get_output_embeddings().register_forward_pre_hook(remember, prepend=True)
    try:
        return _score_task(model, task, size, score)
    finally:
        handle.remove()


@torch.inference_mode()
def candidate_scores(model: Any, task: NextTitleLists | YesNoCandidates, size: int = 64) -> Scores:
    """Log-probabilities `[n, C]` of all candidates of every row, or of Yes to each; `size` rows a batch."""
    return _score_task(model, task, size, lambda batch: candidate_logps(model, batch))


@torch.inference_mode()
def title_choices(model: Any, task: NextTitleLists, size: int = 64) -> Scores:
    """Log-probability of every candidate, and where constrained decoding ends, by one pass over each prompt.

    Args:
        model: the LM, with or without an adapter.
        task: rows, candidates, gate input.
        size: rows of a batch.

    Returns:
        `[n, C, 2]`: the log-probability summed over the title's tokens; and where greedy decoding ends that
        may only spell candidates: 1 there (shared evenly among candidates that read the same), 0 elsewhere.
    """

    def score(batch: Batch) -> Tensor:
        prompt = batch["prompt"]
        logps = token_logps(model, prompt, batch["representation"])
        return torch.stack([title_sums(prompt, logps), decode_constrained(prompt, logps)], 2)

    return _score_task(model, task, size, score)


def _score_task(
    model: Any,
    task: YesNoPrompts | NextTitleLists | YesNoCandidates,
    size: int,
    score: Callable[[Batch], Tensor],
) -> Scores:
    """Scores float32 `[n, ...]` of all rows, in the task's order; rows of like length go side by side.

    Forwards are dealt over the processes of a stage, all of which get all scores.

    Args:
        model: the LM, on its device.
        task: makes the batches.
        size: most rows of a forward.
        score: what is computed of a batch, `[B, ...]`.
    """
    device = next(model.parameters()).device
    forwards = cut_for_scoring(task.lengths(), size, device.type)
    done = np.cumsum([len(rows) for rows in forwards])
    scores = np.zeros(0, np.float32)
    progress = Progress("rows scored", len(task))
    for number, is_own in processes.dealt(len(forwards)):
        rows = forwards[number]
        batch_scores = _score_rows(task, rows, device, score)
        if not len(scores):
            scores = np.zeros((len(task), *batch_scores.shape[1:]), np.float32)
        if is_own:
            scores[rows] = batch_scores
        progress.reached(int(done[number]))
    processes.complete(scores)
    return scores


def _score_rows(
    task: YesNoPrompts | NextTitleLists | YesNoCandidates,
    rows: Places,
    device: torch.device,
    score: Callable[[Batch], Tensor],
) -> Scores:
    """Scores float32 `[B, ...]` of a forward's rows; where memory does not do for them, of either half apart.

    Args:
        task: as of `_score_task`.
        rows: places of the rows.
        device: where the model is.
        score: as of `_score_task`.

    Raises:
        RuntimeError: memory does not do for a single row, or other processes wait in this forward.
    """
    try:
        return np.asarray(score(send_to_device(task(rows), device)).float().cpu().numpy())
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(rows) == 1 or processes.world() > 1:
            raise
    # Outside of the handler, which would keep what the failed forward holds.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    say(f"out of memory: {len(rows)} rows are scored in two halves")
    half = len(rows) // 2
    return np.concatenate([_score_rows(task, part, device, score) for part in (rows[:half], rows[half:])])
