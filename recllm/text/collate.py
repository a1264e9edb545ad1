"""Token sequences of unequal length, and the padded batches that a language model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ragged:
    """Token sequences of unequal length.

    Attributes:
        tokens: i32 [sum of lengths].
        offsets: i64 [B + 1]; sequence b is `tokens[offsets[b]:offsets[b + 1]]`.
        cut: bool [B], true where a prompt lost history to fit; None where nothing could be lost.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    cut: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        """Tokens of one sequence."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """i64 [B], tokens of each sequence."""
        return np.diff(self.offsets)

    def place(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For every token its sequence and its place in it, i64 [sum of lengths] each."""
        owner = np.repeat(np.arange(len(self)), self.lengths)
        return owner, np.arange(len(self.tokens)) - self.offsets[owner]

    @classmethod
    def from_lists(cls, sequences: Sequence[Sequence[int]]) -> Ragged:
        """The same sequences, given as lists of token ids."""
        offsets = np.zeros(len(sequences) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, sequences), np.int64, len(sequences)), out=offsets[1:])
        flat = np.fromiter((token for tokens in sequences for token in tokens), np.int32, int(offsets[-1]))
        return cls(flat, offsets)


def pad_left(prompts: Ragged, pad_id: int = 0) -> dict[str, torch.Tensor]:
    """One row a prompt, padded on the left, so that the last position is the one that is scored.

    Returns:
        `input_ids`, `attention_mask` (1 = real), `position_ids` (0 at padding), all i64 [B, L].
    """
    row, place = prompts.place()
    width = int(prompts.lengths.max(initial=0))
    column = place + (width - prompts.lengths)[row]
    ids = np.full((len(prompts), width), pad_id, np.int64)
    mask = np.zeros_like(ids)
    position = np.zeros_like(ids)
    ids[row, column] = prompts.tokens
    mask[row, column] = 1
    position[row, column] = place
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "position_ids": torch.from_numpy(position),
    }


def pad_right(texts: Ragged, pad_id: int = 0) -> dict[str, torch.Tensor]:
    """One row a text, padded on the right: `input_ids`, `attention_mask` (1 = real), i64 [B, L] each."""
    row, place = texts.place()
    ids = np.full((len(texts), int(texts.lengths.max(initial=0))), pad_id, np.int64)
    mask = np.zeros_like(ids)
    ids[row, place] = texts.tokens
    mask[row, place] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def shared_prefix(
    prompts: Ragged, completions: Ragged, counts: NDArray[np.int64] | int, pad_id: int = 0
) -> dict[str, Any]:
    """Each prompt once, with its completions behind it, each of which sees the prompt and itself only.

    Short samples (a prompt and its completions) share a row with others, none longer than the longest sample;
    none sees another. The last token of a completion (its EOS) is a target only: nothing is predicted from
    it, so it is not fed.

    Args:
        prompts: B prompts, none empty.
        completions: the completions, those of prompt 0 first, none empty.
        counts: i64 [B], completions of each prompt, or one number for all.
        pad_id: Token at padding (right).

    Returns:
        i64 [R, L] `input_ids`, `position_ids` (every completion's positions go on behind its prompt), `slot`
        (which of its row's samples a token belongs to, -1 at padding) and `branch` (0 prompt, c + 1 its
        completion c, -1 padding); what `_targets` says; and `sample` i64 [R, S], the sample in each slot of a
        row (0 where there is none).

    Raises:
        ValueError: The numbers do not fit, or a prompt or completion is empty.
    """
    counts, first = _completions_of_prompts(prompts, completions, counts)
    fed = completions.lengths - 1
    fed_before = np.concatenate([[0], np.cumsum(fed)])
    # Where in its sample a completion stands: behind the prompt and the completions before it.
    prompt = np.repeat(np.arange(len(prompts)), counts)
    within = prompts.lengths[prompt] + fed_before[:-1] - fed_before[first[prompt]]
    total = prompts.lengths + fed_before[first + counts] - fed_before[first]
    row, start, slot = _pack_samples(total)

    height = int(row.max(initial=-1)) + 1
    ids = np.full((height, int(total.max(initial=0))), pad_id, np.int64)
    position = np.zeros_like(ids)
    slots = np.full_like(ids, -1)
    branch = np.full_like(ids, -1)
    owner, place = prompts.place()
    cell = (row[owner], start[owner] + place)
    ids[cell] = prompts.tokens
    position[cell] = place
    slots[cell] = slot[owner]
    branch[cell] = 0

    completion, place = completions.place()
    owner = prompt[completion]
    column = start[owner] + within[completion] + place
    is_fed = place < fed[completion]
    cell = (row[owner][is_fed], column[is_fed])
    ids[cell] = completions.tokens[is_fed]
    position[cell] = (prompts.lengths[owner] + place)[is_fed]
    slots[cell] = slot[owner][is_fed]
    branch[cell] = (completion - first[owner] + 1)[is_fed]

    sample = np.zeros((height, int(slot.max(initial=0)) + 1), np.int64)
    sample[row, slot] = np.arange(len(prompts))
    predict = np.where(place == 0, start[owner] + prompts.lengths[owner] - 1, column - 1)
    tensors = {"input_ids": ids, "position_ids": position, "slot": slots, "branch": branch, "sample": sample}
    return {
        **{name: torch.from_numpy(value) for name, value in tensors.items()},
        **_targets(completions, counts, first, row[owner], predict),
    }


def separate(
    prompts: Ragged, completions: Ragged, counts: NDArray[np.int64] | int, pad_id: int = 0
) -> dict[str, Any]:
    """A row for each completion, the prompt anew in each: for LMs that take no mask of their own.

    Arguments and errors as for `shared_prefix`.

    Returns:
        i64 [N, L], padded on the right: `input_ids` and `attention_mask` (1 = real), no positions, as those
        of unpadded text are what every LM assumes, and `branch` (0 prompt and padding, c + 1 its completion
        c); what `_targets` says; and `sample` i64 [N, 1].
    """
    counts, first = _completions_of_prompts(prompts, completions, counts)
    prompt = np.repeat(np.arange(len(prompts)), counts)
    prompt_length = prompts.lengths[prompt]
    fed = completions.lengths - 1
    ids = np.full((len(prompt), int((prompt_length + fed).max(initial=0))), pad_id, np.int64)
    mask = np.zeros_like(ids)
    branch = np.zeros_like(ids)

    row = np.repeat(np.arange(len(prompt)), prompt_length)
    place = np.arange(len(row)) - np.repeat(np.cumsum(prompt_length) - prompt_length, prompt_length)
    ids[row, place] = prompts.tokens[prompts.offsets[prompt[row]] + place]

    row, place = completions.place()
    column = prompt_length[row] + place
    is_fed = place < fed[row]
    cell = (row[is_fed], column[is_fed])
    ids[cell] = completions.tokens[is_fed]
    branch[cell] = (row - first[prompt[row]] + 1)[is_fed]
    mask[:] = np.arange(ids.shape[1]) < (prompt_length + fed)[:, None]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "branch": torch.from_numpy(branch),
        "sample": torch.from_numpy(prompt[:, None]),
        **_targets(completions, counts, first, row, column - 1),
    }


def _completions_of_prompts(
    prompts: Ragged, completions: Ragged, counts: NDArray[np.int64] | int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Completions of each prompt and the first of them, i64 [B] each."""
    counts = np.broadcast_to(np.asarray(counts, np.int64), len(prompts))
    if counts.sum() != len(completions):
        raise ValueError(
            f"got {len(completions)} completions of {len(prompts)} prompts, want {counts.sum()}: pass all"
        )
    if len(completions) and (prompts.lengths.min() < 1 or completions.lengths.min() < 1):
        raise ValueError(
            "got an empty prompt or completion, every one needs a token: check the items' titles"
        )
    return counts, np.cumsum(counts) - counts


def _pack_samples(
    lengths: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row, start in it and number in it of each sample, i64 [B]; no row is longer than the longest sample.

    First fit, longest first. Where no two samples fit into a row, samples keep their order.
    """
    width = lengths.max(initial=0)
    row = np.arange(len(lengths))
    start = np.zeros_like(lengths)
    slot = np.zeros_like(lengths)
    if len(lengths) < 2 or np.partition(lengths, 1)[:2].sum() > width:
        return row, start, slot
    free = np.full(len(lengths), width)
    used = np.zeros_like(lengths)
    for sample in np.argsort(-lengths, kind="stable"):  # some dozens: the samples of one batch
        place = int(np.argmax(free >= lengths[sample]))
        row[sample] = place
        start[sample] = width - free[place]
        slot[sample] = used[place]
        free[place] -= lengths[sample]
        used[place] += 1
    return row, start, slot


def _targets(
    completions: Ragged,
    counts: NDArray[np.int64],
    first: NDArray[np.int64],
    row: NDArray[np.int64],
    position: NDArray[np.int64],
) -> dict[str, Any]:
    """What is scored, the same for every layout.

    Returns:
        For the M tokens of all completions, i64 [M]: `predict_row` and `predict_position` (where the hidden
        state that predicts the token is), `target`, `cell` (b * C + c for completion c of prompt b); and
        `present` bool [B, C], where there is a completion (C is the most of any prompt).
    """
    owner, _ = completions.place()
    most = int(counts.max(initial=0))
    prompt = np.repeat(np.arange(len(counts)), counts)
    cell = prompt * most + np.arange(len(prompt)) - first[prompt]
    return {
        "predict_row": torch.from_numpy(row),
        "predict_position": torch.from_numpy(position),
        "target": torch.from_numpy(completions.tokens.astype(np.int64)),
        "cell": torch.from_numpy(cell[owner]),
        "present": torch.from_numpy(np.arange(most) < counts[:, None]),
    }
