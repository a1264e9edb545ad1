"""Log-probabilities of answers and titles; the LM head computes only the positions that are scored."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recllm.lm.layout import attention_mask

CHUNK = 1 << 26
"""Most float32 logits that are normalized at a time (256 MiB)."""


def answer_logits(model: nn.Module, batch: Mapping[str, Any], representation: Tensor | None = None) -> Tensor:
    """Logits over the vocabulary behind each prompt.

    Args:
        model: A causal LM of transformers, or a PEFT model around one.
        batch: `recllm.text.collate.pad_left` of B prompts.
        representation: `[B, d_c]`, passed on to the model; None: not passed.

    Returns:
        `[B, V]` in the model's dtype.
    """
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
    if representation is not None:
        inputs["representation"] = representation
    logits: Tensor = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
    return logits


def answer_loss(logits: Tensor, labels: Tensor, yes_id: int, no_id: int) -> Tensor:
    """Cross-entropy of the answer's token over the full vocabulary, mean over the batch.

    Args:
        logits: `[B, V]`.
        labels: `[B]`, 1 where the answer is yes.
        yes_id: Token of yes.
        no_id: Token of no.

    Returns:
        A scalar in nats, float32 or wider.
    """
    target = torch.where(labels > 0.5, yes_id, no_id)
    return F.cross_entropy(_wide(logits), target)


def answer_score(logits: Tensor, yes_id: int, no_id: int) -> Tensor:
    """Probability of yes, softmax over the two answers' logits only: `[B, V]` -> `[B]`, float32 or wider."""
    return torch.sigmoid(_wide(logits[:, yes_id]) - _wide(logits[:, no_id]))


def title_logps(model: nn.Module, batch: Mapping[str, Any], representation: Tensor | None = None) -> Tensor:
    """Log-probability of every completion behind its prompt, summed over its tokens (EOS among them).

    Args:
        model: A causal LM of transformers, or a PEFT model around one.
        batch: `recllm.lm.layout.title_batch` of B prompts with up to C completions each.
        representation: Passed on to the model. `[B, d_c]`: one for all tokens of a prompt and its
            completions; `[B, 1 + C, d_c]`: the first for the tokens of the prompt, the one at 1 + c for those
            of completion c; None: not passed.

    Returns:
        `[B, C]`, float32 or wider; NaN where a prompt has fewer completions.
    """
    return title_sums(batch, token_logps(model, batch, representation))


def candidate_logps(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Log-probability of every candidate of a batch: of `NextTitleLists`, or of `YesNoCandidates`.

    Args:
        model: as for `title_logps`.
        batch: `prompt` and `representation`, as the task makes them.

    Returns:
        `[B, C]`, float32 or wider; NaN where a row has fewer candidates.
    """
    prompt = batch["prompt"]
    if "answers" not in prompt:
        return title_logps(model, prompt, batch["representation"])
    yes_id, no_id = prompt["answers"]
    logits = answer_logits(model, prompt, batch["representation"])
    logps = F.logsigmoid(_wide(logits[:, yes_id]) - _wide(logits[:, no_id]))
    present: Tensor = prompt["present"]
    return logps.new_full(present.shape, torch.nan).masked_scatter(present, logps)


def title_sums(batch: Mapping[str, Any], logps: Tensor) -> Tensor:
    """Sums `[B, C]` of the tokens' log-probabilities `[M]` of a batch of titles; NaN where no title is."""
    present = batch["present"]
    sums = logps.new_zeros(present.numel()).index_add(0, batch["cell"], logps).view(present.shape)
    return sums.masked_fill(~present, torch.nan)


def token_logps(model: nn.Module, batch: Mapping[str, Any], representation: Tensor | None = None) -> Tensor:
    """Log-probability of every token of every completion, in the order of `batch["target"]`.

    Args:
        model: as for `title_logps`.
        batch: as for `title_logps`.
        representation: as for `title_logps`.

    Returns:
        `[M]`, float32 or wider.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": attention_mask(model, batch)}
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"]
    rows = batch["predict_row"]
    positions = batch["predict_position"]
    if representation is not None:
        inputs["scored"] = rows, positions
        inputs |= _gate_inputs(batch, representation)

    own = threading.local()  # other threads' forwards of the same model pass by this hook too
    own.forward = True

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not hasattr(own, "forward"):
            return None
        # `logits_to_keep` picks the same positions in all rows; these differ by row. The head runs inside the
        # model's own forward, so that adapters, sharding and autocast treat it as they always do.
        return (args[0][rows, positions][:, None], *args[1:])  # `[M, 1, width]`

    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(gather, prepend=True)  # an adapter's own hooks see what it is given
    try:
        logits = model(**inputs, logits_to_keep=0, use_cache=False).logits[:, 0]
    finally:
        hook.remove()
    return _token_logps(logits, batch["target"])


def _gate_inputs(batch: Mapping[str, Any], representation: Tensor) -> dict[str, Tensor]:
    """What a gated model reads of a batch of titles.

    Args:
        batch: as for `title_logps`, laid out in R rows of L tokens with up to S samples each.
        representation: as for `title_logps`.

    Returns:
        `representation` `[R, d_c]`, one a row; or `[R, segments, d_c]` and `segments` int64 `[R, L]`, which
        of its row's a token is gated by.
    """
    of_samples = representation[batch["sample"]]  # [R, S, d_c] or [R, S, 1 + C, d_c]
    if of_samples.dim() == 4:
        # A row of separate titles holds one sample, and its batch no slots.
        slot = batch.get("slot", torch.zeros_like(batch["branch"])).clamp(min=0)
        segments = slot * of_samples.shape[2] + batch["branch"].clamp(min=0)
        return {"representation": of_samples.flatten(1, 2), "segments": segments}
    if of_samples.shape[1] == 1:
        return {"representation": of_samples[:, 0]}
    return {"representation": of_samples, "segments": batch["slot"].clamp(min=0)}


def _wide(logits: Tensor) -> Tensor:
    """The logits in at least float32, which a softmax over a vocabulary needs."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _logps(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probability of each target, `[M]` of logits `[M, V]`, all at once."""
    return -F.cross_entropy(_wide(logits), target, reduction="none")


def _token_logps(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probability of each target, `[M]` of logits `[M, V]`; float32 copies exist of a chunk at a time."""
    size = max(1, CHUNK // logits.shape[-1])
    if len(target) <= size:
        return _logps(logits, target)
    chunks = []
    for chunk_logits, chunk_target in zip(logits.split(size), target.split(size), strict=True):
        if chunk_logits.requires_grad:  # the copy is made again in the backward, not held until then
            chunks.append(checkpoint(_logps, chunk_logits, chunk_target, use_reentrant=False))
        else:
            chunks.append(_logps(chunk_logits, chunk_target))
    return torch.cat(chunks)
