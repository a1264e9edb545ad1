"""The tasks that an LM is given, as functions from row indices to batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recllm.eventlog.log import EventLog, Rows
from recllm.lm.layout import SHARED, title_batch
from recllm.text.collate import pad_left, pad_right
from recllm.text.prompts import Prompts

Batch = dict[str, Any]


class YesNoPrompts:
    """The question whether the user will like an item: one prompt a row, answered Yes or No.

    Args:
        prompts: builds the text.
        rows: int64 `[n]` rows of the log.
        history: int64 `[n, k]` events that each prompt shows, in time order.
        representation: float32 `[n, d_c]` for the gate, or None for an LM without one.
    """

    def __init__(self, prompts: Prompts, rows: Rows, history: Rows, representation: Tensor | None) -> None:
        """See the class."""
        self.prompts = prompts
        self.rows = rows
        self.history = history
        self.representation = representation
        self.label = torch.from_numpy(prompts.log.label[rows].astype(np.float32))

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row's prompt `[n]`."""
        return self.prompts.ctr_lengths(self.rows, self.history)

    def count_cut(self) -> int:
        """How many prompts lose their oldest events, as they are longer than the context."""
        return int(self.prompts.ctr_matrix(self.rows, self.history)[1].sum())

    def __call__(self, indices: Rows) -> Batch:
        """`prompt` (left padded), `label` and `row` `[B]`, `representation` `[B, d_c]` or None."""
        representation = None if self.representation is None else self.representation[indices]
        return {
            "prompt": pad_left(self.prompts.ctr(self.rows[indices], self.history[indices])),
            "label": self.label[indices],
            "row": torch.from_numpy(np.asarray(self.rows[indices])),
            "representation": representation,
        }


class TowerPairs:
    """What two towers read: the user's text a row, and the text of each distinct item of a batch once.

    Args:
        prompts: builds the text.
        rows: int64 `[n]` rows of the log.
        history: int64 `[n, k]` events that a user's text shows, in time order; a function of the row's past.
        pad_id: token at padding.
    """

    def __init__(self, prompts: Prompts, rows: Rows, history: Rows, pad_id: int) -> None:
        """See the class."""
        self.prompts = prompts
        self.rows = rows
        self.history = history
        self.pad_id = pad_id
        self.label = torch.from_numpy(prompts.log.label[rows].astype(np.float32))

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row's user text `[n]`."""
        return self.prompts.user_lengths(self.rows, self.history)

    def item_lengths(self) -> NDArray[np.int64]:
        """Tokens of each row's item text `[n]`, which a forward reads once for all its rows of the item."""
        distinct, item = np.unique(self.prompts.log.item[self.rows], return_inverse=True)
        return self.prompts.item_lengths(distinct)[item]

    def count_cut(self) -> int:
        """How many user texts lose their oldest events, as they are longer than the context."""
        return int(self.prompts.user_matrix(self.rows, self.history)[1].sum())

    def __call__(self, indices: Rows) -> Batch:
        """Batch of the rows, int64 `[B]`.

        Returns:
            `user`: the rows' user texts; `item`: the texts of their distinct items (both right padded);
            `pair` int64 `[B]`, the place in `item` of each row's item; `label` and `row` `[B]`.
        """
        rows = self.rows[indices]
        distinct, pair = np.unique(self.prompts.log.item[rows], return_inverse=True)
        return {
            "user": pad_right(self.prompts.users(rows, self.history[indices]), self.pad_id),
            "item": pad_right(self.prompts.items(distinct), self.pad_id),
            "pair": torch.from_numpy(pair),
            "label": self.label[indices],
            "row": torch.from_numpy(np.asarray(rows)),
        }


class NextTitleLists:
    """The question which title comes next: one prompt a row with all its candidates behind it.

    The prompt, the gate's input and the candidates' order do not depend on which candidate is the chosen one.

    Args:
        prompts: builds the text.
        log: the event log.
        rows: int64 `[n]` liked rows of the log; the row's own item is the chosen one.
        history: int64 `[n, k]` most recent events.
        candidates: int32 `[n, C]` dense items, the chosen one among them.
        representation: float32 `[n, d_c]`, the mean over all candidates; or `[n, C, d_c]`, each candidate's
            own: then a title's tokens are gated by its own, and the prompt's, which predict every title's
            first token, by the mean; or None for an LM without a gate.
        lists_candidates: whether the prompt lists the candidates.
        layout: how the LM is given several titles, see `recllm.lm.layout`.
        has_chosen: false: the rows' own items are not looked for, and need not be there: `chosen` is 0.
    """

    def __init__(
        self,
        prompts: Prompts,
        log: EventLog,
        rows: Rows,
        history: Rows,
        candidates: NDArray[np.int32],
        representation: Tensor | None,
        lists_candidates: bool = False,
        layout: str = SHARED,
        has_chosen: bool = True,
    ) -> None:
        """See the class.

        Raises:
            ValueError: where a row's chosen item is not exactly once among its candidates.
        """
        self.prompts = prompts
        self.rows = rows
        self.history = history
        self.candidates = candidates
        self.representation = representation
        self.lists_candidates = lists_candidates
        self.layout = layout
        self.has_chosen = has_chosen
        self.chosen = _places(log, rows, candidates) if has_chosen else np.zeros(len(rows), np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self, scored: bool = True) -> NDArray[np.int64]:
        """Tokens of each row `[n]`: its prompt, and all its candidates' titles where `scored`."""
        lengths = self.prompts.pieces.count_tokens(self._matrix()[0])
        if scored:
            pieces = self.prompts.pieces
            lengths = lengths + pieces.lengths[pieces.item[self.candidates]].sum(1)
        return lengths

    def forward_lengths(self, count: int) -> NDArray[np.int64]:
        """Tokens of a forward that scores so many candidates of each row `[n]`, at most."""
        return self.lengths(scored=False) + count * self.prompts.pieces.longest_completion

    def count_cut(self) -> int:
        """How many prompts lose their oldest events, as they are longer than the context."""
        return int(self._matrix()[1].sum())

    def _matrix(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Piece ids of all prompts, and which of them were cut, bool `[n]`."""
        listed = self.candidates if self.lists_candidates else None
        room = self.prompts.room(self.candidates)
        return self.prompts.ranking_matrix(self.rows, self.history, listed, room)

    @property
    def texts(self) -> NDArray[np.int32]:
        """`[n, C]`, equal where candidates read the same, 0 where a candidate has no text."""
        return self.prompts.pieces.item[self.candidates]

    def keep(self, rows: NDArray[np.bool_]) -> NextTitleLists:
        """The task on some of its rows."""
        return NextTitleLists(
            self.prompts,
            self.prompts.log,
            self.rows[rows],
            self.history[rows],
            self.candidates[rows],
            None if self.representation is None else self.representation[torch.from_numpy(rows)],
            self.lists_candidates,
            self.layout,
            self.has_chosen,
        )

    def __call__(
        self,
        indices: Rows,
        columns: NDArray[np.int64] | None = None,
        present: NDArray[np.bool_] | None = None,
    ) -> Batch:
        """Batch of the rows.

        Args:
            indices: int64 `[B]`.
            columns: int64 `[B, c]` candidates to score, by their place; all of them by default.
            present: bool `[B, c]`, which of the columns are scored, from the left; all of them by default.

        Returns:
            `prompt` (`title_batch`), `lengths` `[B, c]` tokens of each title and its EOS (0 where it is not
            scored), `chosen` `[B]` place of the chosen among the scored, `index` `[B]`, `row` `[B]` in the
            log, `representation` as `title_logps` takes it.
        """
        candidates = self.candidates[indices]
        items = candidates if columns is None else np.take_along_axis(candidates, columns, 1)
        listed = candidates if self.lists_candidates else None
        # Room for all of the row's candidates, whichever are scored: the prompt tells nothing of the chosen.
        room = self.prompts.room(candidates)
        prompts = self.prompts.ranking(self.rows[indices], self.history[indices], listed, room)
        place = self.chosen[indices]
        if columns is not None:
            place = (columns == place[:, None]).argmax(1)
        if present is None:
            present = np.ones(items.shape, bool)
        titles = self.prompts.completions(items[present])
        lengths = np.zeros(items.shape, np.int64)
        lengths[present] = titles.lengths
        return {
            "prompt": title_batch(prompts, titles, present.sum(1), self.layout),
            "lengths": torch.from_numpy(lengths),
            "chosen": torch.from_numpy(place),
            "index": torch.from_numpy(np.asarray(indices)),
            "row": torch.from_numpy(np.asarray(self.rows[indices])),
            "representation": self._title_representation(indices, columns),
        }

    def prompt_representation(self, indices: Rows) -> Tensor | None:
        """What gates the prompts of some rows, `[B, d_c]`, or None for an LM without a gate."""
        if self.representation is None:
            return None
        representation = self.representation[indices]
        return representation if representation.dim() == 2 else representation.mean(1)

    def _title_representation(self, indices: Rows, columns: NDArray[np.int64] | None) -> Tensor | None:
        """As `title_logps` takes it: `[B, d_c]`, or `[B, 1 + c, d_c]` where each title has a gate of its own.

        Args:
            indices: int64 `[B]`.
            columns: int64 `[B, c]`, the scored candidates; None: all.
        """
        of_prompts = self.prompt_representation(indices)
        if of_prompts is None or self.representation is None or self.representation.dim() == 2:
            return of_prompts
        of_titles = self.representation[indices]
        if columns is not None:
            of_titles = of_titles[np.arange(len(of_titles))[:, None], columns]
        return torch.cat([of_prompts[:, None], of_titles], 1)


class YesNoCandidates:
    """The Yes/No question of `YesNoPrompts`, asked of every candidate of a row: point-wise preferences.

    Each candidate has a prompt and a gate of its own, both functions of the history and of this candidate
    only: neither they nor their order depend on which candidate is the chosen one.

    Args:
        prompts: builds the text.
        log: the event log.
        rows: int64 `[n]` liked rows of the log; the row's own item is the chosen one.
        history: int64 `[n, C, k]` events that each candidate's prompt shows, in time order.
        candidates: int32 `[n, C]` dense items, the chosen one among them.
        representation: float32 `[n, C, d_c]`, each candidate's own, or None for an LM without a gate.
        has_chosen: as of `NextTitleLists`.
    """

    lists_candidates = False

    def __init__(
        self,
        prompts: Prompts,
        log: EventLog,
        rows: Rows,
        history: Rows,
        candidates: NDArray[np.int32],
        representation: Tensor | None,
        has_chosen: bool = True,
    ) -> None:
        """See the class.

        Raises:
            ValueError: where a row's chosen item is not exactly once among its candidates.
        """
        self.prompts = prompts
        self.rows = rows
        self.history = history
        self.candidates = candidates
        self.representation = representation
        self.has_chosen = has_chosen
        self.chosen = _places(log, rows, candidates) if has_chosen else np.zeros(len(rows), np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self, scored: bool = True) -> NDArray[np.int64]:
        """Tokens of each row `[n]`: of all its candidates' prompts where `scored`, else of the longest."""
        tokens = self.prompts.pieces.count_tokens(self._matrix()[0]).reshape(self.candidates.shape)
        return tokens.sum(1) if scored else tokens.max(1, initial=0)

    def forward_lengths(self, count: int) -> NDArray[np.int64]:
        """Tokens of a forward that scores so many candidates of each row `[n]`, at most."""
        return count * self.lengths(scored=False)

    def count_cut(self) -> int:
        """How many of all candidates' prompts lose their oldest events, as they exceed the context."""
        return int(self._matrix()[1].sum())

    def _matrix(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Piece ids of all candidates' prompts, and which of them were cut, bool `[n * C]`."""
        row = np.repeat(np.arange(len(self)), self.candidates.shape[1])
        history = self.history.reshape(len(row), -1)
        return self.prompts.ctr_matrix(self.rows[row], history, self.candidates.ravel())

    @property
    def texts(self) -> NDArray[np.int32]:
        """`[n, C]`, equal where candidates read the same, 0 where a candidate has no text."""
        return self.prompts.pieces.item[self.candidates]

    def keep(self, rows: NDArray[np.bool_]) -> YesNoCandidates:
        """The task on some of its rows."""
        return YesNoCandidates(
            self.prompts,
            self.prompts.log,
            self.rows[rows],
            self.history[rows],
            self.candidates[rows],
            None if self.representation is None else self.representation[torch.from_numpy(rows)],
            self.has_chosen,
        )

    def __call__(
        self,
        indices: Rows,
        columns: NDArray[np.int64] | None = None,
        present: NDArray[np.bool_] | None = None,
    ) -> Batch:
        """Batch of the rows.

        Args:
            indices: int64 `[B]`.
            columns: as of `NextTitleLists`.
            present: as of `NextTitleLists`.

        Returns:
            As of `NextTitleLists`, but `prompt` holds the M prompts of the scored candidates, left padded,
            bool `present` `[B, c]`, which candidates these are, and `answers`, the tokens of yes and no;
            `representation` is `[M, d_c]`, one a prompt; `lengths` are 1.
        """
        place = self.chosen[indices]
        if columns is None:
            columns = np.tile(np.arange(self.candidates.shape[1]), (len(indices), 1))
        else:
            place = (columns == place[:, None]).argmax(1)
        if present is None:
            present = np.ones(columns.shape, bool)
        row = np.repeat(indices, present.sum(1))
        column = columns[present]
        prompts = self.prompts.ctr(self.rows[row], self.history[row, column], self.candidates[row, column])
        prompt: Batch = dict(pad_left(prompts))
        prompt["present"] = torch.from_numpy(present)
        prompt["answers"] = self.prompts.pieces.yes_id, self.prompts.pieces.no_id
        return {
            "prompt": prompt,
            "lengths": torch.from_numpy(present.astype(np.int64)),
            "chosen": torch.from_numpy(place),
            "index": torch.from_numpy(np.asarray(indices)),
            "row": torch.from_numpy(np.asarray(self.rows[indices])),
            "representation": None if self.representation is None else self.representation[row, column],
        }


def _places(log: EventLog, rows: Rows, candidates: NDArray[np.int32]) -> NDArray[np.int64]:
    """Place of each row's own item among its candidates, `[n]`; a ValueError where it is not there once."""
    if not len(rows):
        return np.zeros(0, np.int64)
    is_own = candidates == log.item[rows][:, None]
    wrong = np.flatnonzero(is_own.sum(1) != 1)
    if wrong.size:
        raise ValueError(
            f"row {rows[wrong[0]]} has its own item {is_own[wrong[0]].sum()} times as a candidate, not once; "
            "run `make prepare` again"
        )
    return is_own.argmax(1)


def sort_by_length(
    task: YesNoPrompts | TowerPairs | NextTitleLists | YesNoCandidates,
) -> tuple[Callable[[Rows], Batch], int]:
    """A task as a validation loader takes it: a maker of batches, rows sorted by length, and their number."""
    order = np.argsort(task.lengths(), kind="stable")
    return lambda indices: task(order[indices]), len(task)
