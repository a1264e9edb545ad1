"""Decoding of titles: free, to see how often an LM names a candidate, and constrained to the candidates."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor

from recllm import processes
from recllm.console import Progress
from recllm.eventlog.log import Rows
from recllm.lm.tasks import NextTitleLists
from recllm.text.collate import Ragged, pad_left


def normalize(title: str) -> str:
    """A title as titles are compared: case folded, each run of white space one space."""
    return re.sub(r"\s+", " ", title).strip().casefold()


def decode_constrained(batch: Mapping[str, Any], logps: Tensor) -> Tensor:
    """Where greedy decoding ends that may only spell a candidate of its prompt (a walk down their trie).

    Exactly what a decoder with a mask over the vocabulary does, but without decoding: candidates that begin
    alike have the same probabilities there, so all that it would meet has been scored.

    Args:
        batch: `recllm.lm.layout.title_batch` of B prompts with up to C completions each.
        logps: `[M]`, log-probability of every token of every completion.

    Returns:
        `[B, C]` in the dtype of `logps`: 1 at the candidate (shared evenly among those that read the same).
    """
    tokens, scores = _title_tables(batch, logps)
    alive = batch["present"].clone()
    for step in range(tokens.shape[2]):
        step_scores = scores[:, :, step].masked_fill(~alive, -torch.inf)
        unfinished = step_scores.amax(1, keepdim=True) > -torch.inf
        best = tokens[:, :, step].gather(1, step_scores.argmax(1, keepdim=True))
        alive &= ~unfinished | (tokens[:, :, step] == best)
    return alive.to(logps.dtype) / alive.sum(1, keepdim=True)


def _title_tables(batch: Mapping[str, Any], logps: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities of all titles, `[B, C, T]` each; -1 and -inf behind a title's end.

    Args:
        batch: as of `decode_constrained`.
        logps: as of `decode_constrained`, `[M]`.
    """
    cell = batch["cell"]
    num_prompts, num_candidates = batch["present"].shape
    lengths = torch.bincount(cell, minlength=num_prompts * num_candidates)
    first = lengths.cumsum(0) - lengths
    place = torch.arange(len(cell), device=cell.device) - first[cell]
    shape = num_prompts, num_candidates, int(lengths.max())
    tokens = batch["target"].new_full((num_prompts * num_candidates, shape[2]), -1)
    tokens[cell, place] = batch["target"]
    scores = logps.new_full(tokens.shape, -torch.inf)
    scores[cell, place] = logps
    return tokens.view(shape), scores.view(shape)


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
    titles = _candidate_titles(tokenizer, task)
    outcomes = np.zeros((len(task), 2), np.float32)
    progress = Progress("titles generated", len(task))
    for number, is_own in processes.dealt(math.ceil(len(task) / size)):
        if not is_own:
            continue
        rows = np.arange(number * size, min((number + 1) * size, len(task)))
        generated = np.array(_generate_within_context(model, tokenizer, task, rows), object)
        hits = titles[rows] == generated[:, None]
        outcomes[rows, 0] = hits.any(1)
        outcomes[rows, 1] = hits[np.arange(len(rows)), task.chosen[rows]]
        progress.reached(rows[-1] + 1)
    processes.complete(outcomes)
    return outcomes


def _candidate_titles(tokenizer: Any, task: NextTitleLists) -> NDArray[np.object_]:
    """Normalized title of every candidate, `[n, C]`; each distinct item is decoded once."""
    pieces = task.prompts.pieces
    items, place = np.unique(task.candidates, return_inverse=True)
    texts = tokenizer.batch_decode([pieces.table[piece].tolist() for piece in pieces.item[items]])
    titles = np.array([normalize(text) for text in texts], object)
    return titles[place.reshape(task.candidates.shape)]


def _generate_within_context(model: Any, tokenizer: Any, task: NextTitleLists, indices: Rows) -> list[str]:
    """`_generate_titles` of some rows, int64 `[B]`: together where the context has room for it.

    A row has room for its own longest candidate at least. Where that is less than another row needs, the rows
    that have less are decoded apart.
    """
    prompts = task.prompts
    need = prompts.room(task.candidates[indices])
    left = prompts.max_length - _title_prompts(task, indices).lengths
    tokens = min(prompts.pieces.longest_completion, int(left[left >= need.max()].min()))
    together = left >= tokens
    texts = np.empty(len(indices), object)
    texts[together] = _generate_titles(model, tokenizer, task, indices[together], tokens)
    if not together.all():
        texts[~together] = _generate_within_context(model, tokenizer, task, indices[~together])
    return list(texts)


def _title_prompts(task: NextTitleLists, indices: Rows) -> Ragged:
    """The prompts of some rows, int64 `[B]`, as they are where their candidates are scored."""
    candidates = task.candidates[indices]
    listed = candidates if task.lists_candidates else None
    room = task.prompts.room(candidates)
    return task.prompts.ranking(task.rows[indices], task.history[indices], listed, room)


def _generate_titles(model: Any, tokenizer: Any, task: NextTitleLists, indices: Rows, most: int) -> list[str]:
    """The normalized text of `most` tokens that greedy decoding puts behind prompts of rows, int64 `[B]`."""
    device = next(model.parameters()).device
    prompts = _title_prompts(task, indices)
    batch = send_to_device(pad_left(prompts), device)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    representation = task.prompt_representation(indices)
    if representation is not None:
        inputs["representation"] = representation.to(device)
    tokens = model.generate(
        **inputs,
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    completions = tokens[:, batch["input_ids"].shape[1] :]
    return [normalize(text) for text in tokenizer.batch_decode(completions, skip_special_tokens=True)]
