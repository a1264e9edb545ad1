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
    def of(cls, sequences: Sequence[Sequence[int]]) -> Ragged:
        """From lists of token ids."""
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
    mask, position = np.zeros_like(ids), np.zeros_like(ids)
    ids[row, column], mask[row, column], position[row, column] = prompts.tokens, 1, place
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "position_ids": torch.from_numpy(position),
    }


def shared_prefix(prompts: Ragged, completions: Ragged, per_prompt: int, pad_id: int = 0) -> dict[str, Any]:
    """One row a prompt: the prompt once, then its completions, each of which sees the prompt and itself only.

    The last token of a completion (its EOS) is a target only: nothing is predicted from it, so it is not fed.

    Args:
        prompts: B prompts, none empty.
        completions: B x C completions, those of prompt 0 first, none empty.
        per_prompt: C.
        pad_id: Token at padding (right).

    Returns:
        `input_ids` and `position_ids` i64 [B, L] (every completion's positions go on behind the prompt),
        `attention_mask` bool [B, 1, L, L] (true = seen), and for the M tokens of all completions, i64 [M]:
        `predict_row`, `predict_position` (where the hidden state that predicts the token is), `target`,
        `candidate`; `per_prompt` is C.

    Raises:
        ValueError: The numbers do not fit, or a prompt or completion is empty.
    """
    count = len(prompts)
    if len(completions) != count * per_prompt:
        raise ValueError(
            f"got {len(completions)} completions for {count} prompts, want {per_prompt} each: pass them all"
        )
    if count and (prompts.lengths.min() < 1 or completions.lengths.min() < 1):
        raise ValueError(
            "got an empty prompt or completion, every one needs a token: check the items' titles"
        )
    fed = (completions.lengths - 1).reshape(count, per_prompt)
    start = (prompts.lengths[:, None] + np.cumsum(fed, 1) - fed).ravel()
    width = int((prompts.lengths + fed.sum(1)).max(initial=0))
    ids = np.full((count, width), pad_id, np.int64)
    position, segment = np.zeros_like(ids), np.full_like(ids, -1)
    row, place = prompts.place()
    ids[row, place], position[row, place], segment[row, place] = prompts.tokens, place, 0
    owner, place = completions.place()
    row = owner // per_prompt
    kept = place < completions.lengths[owner] - 1
    at = (row[kept], (start[owner] + place)[kept])
    ids[at], segment[at] = completions.tokens[kept], owner[kept] % per_prompt + 1
    position[at] = (prompts.lengths[row] + place)[kept]
    segments = torch.from_numpy(segment)
    seen = (segments[:, None, :] == 0) | (segments[:, :, None] == segments[:, None, :])
    # Padding sees the prompt and itself: a row of the mask without any true would give NaN.
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(position),
        "attention_mask": (seen & torch.ones(width, width, dtype=torch.bool).tril())[:, None],
        "predict_row": torch.from_numpy(row),
        "predict_position": torch.from_numpy(
            np.where(place == 0, prompts.lengths[row], start[owner] + place) - 1
        ),
        "target": torch.from_numpy(completions.tokens.astype(np.int64)),
        "candidate": torch.from_numpy(owner % per_prompt),
        "per_prompt": per_prompt,
    }
