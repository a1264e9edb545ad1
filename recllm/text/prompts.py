"""Prompts of rows of an event log, one path for tuning, preference and evaluation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recllm.eventlog.statistics import Statistics
from recllm.text.collate import Ragged
from recllm.text.pieces import Ints, Pieces, Wording, fill, resolve_answers

if TYPE_CHECKING:
    from recllm.eventlog.log import EventLog
    from recllm.eventlog.queries import Queries

__all__ = ["Pieces", "Prompts", "Ragged", "Wording", "fill", "resolve_answers"]


class Prompts:
    """Prompts of rows of an event log.

    Args:
        log: The event log; its columns `user`, `item` and `rating` are read.
        pieces: The text pieces.
        max_length: Most tokens of a prompt. Longer ones lose their oldest events; `Ragged.cut` says which.
    """

    def __init__(self, log: EventLog, pieces: Pieces, max_length: int) -> None:
        """Keep what is needed; nothing is copied."""
        self.log = log
        self.pieces = pieces
        self.max_length = max_length
        self.statistics = Statistics(log) if pieces.statistics_sentence else None

    def for_queries(self, queries: Queries) -> Prompts:
        """The same of queries; a user that the log does not know has no profile."""
        other = copy.copy(self)
        other.log = queries.log
        other.pieces = replace(self.pieces, profile=queries.of_users(self.pieces.profile))
        if self.statistics is not None:
            other.statistics = self.statistics.for_queries(queries)
        return other

    def ctr(self, rows: Ints, history: Ints, targets: Ints | None = None) -> Ragged:
        """Yes/No prompts up to where the answer is scored.

        Args:
            rows: [B], rows of the log.
            history: [B, k], the rows that the prompt shows, in chronological order; -1 is padding, anywhere.
            targets: [B], dense items to ask about; None: the rows' own.

        Raises:
            ValueError: A prompt without any history is longer than `max_length`.
        """
        matrix, cut = self.ctr_matrix(rows, history, targets)
        return replace(self.pieces.assemble(matrix), cut=cut)

    def ranking(
        self, rows: Ints, history: Ints, candidates: Ints | None = None, reserve: Ints | int | None = None
    ) -> Ragged:
        """Next-title prompts, up to where the title begins.

        Args:
            rows: [B], rows of the log; only their users are read, and without `reserve` their items.
            history: [B, k] as in `ctr`.
            candidates: [B, C], dense items to list in the prompt; None: no list.
            reserve: Tokens that are kept free for the title, for all rows or [B], see `room`; None: those of
                the row's own title and EOS.

        Raises:
            ValueError: A prompt without any history is longer than `max_length` less the reserve.
        """
        matrix, cut = self.ranking_matrix(rows, history, candidates, reserve)
        return replace(self.pieces.assemble(matrix), cut=cut)

    def room(self, items: Ints) -> NDArray[np.int64]:
        """Tokens of the longest title of each row's items [B, C], and of its EOS, [B]."""
        return self.pieces.lengths[self.pieces.item[np.asarray(items)]].max(1, initial=0) + 1

    def completions(self, items: Ints) -> Ragged:
        """Title and EOS of dense items [n]."""
        item = np.asarray(items).ravel()
        return self.pieces.assemble(
            np.stack([self.pieces.item[item], np.full(len(item), self.pieces.eos)], 1)
        )

    def users(self, rows: Ints, history: Ints) -> Ragged:
        """What a user's tower reads: profile and history, and EOS; nothing of the target.

        Args:
            rows: [B], rows of the log; only their users are read.
            history: [B, k] as in `ctr`.

        Raises:
            ValueError: A text without any history is longer than `max_length`.
        """
        matrix, cut = self.user_matrix(rows, history)
        return replace(self.pieces.assemble(matrix), cut=cut)

    def items(self, items: Ints) -> Ragged:
        """What an item's tower reads: names and descriptions of dense items [n], and EOS.

        Raises:
            ValueError: One is longer than `max_length`.
        """
        return self.pieces.assemble(self.item_matrix(items))

    def ctr_lengths(self, rows: Ints, history: Ints, targets: Ints | None = None) -> NDArray[np.int64]:
        """Tokens of each prompt of `ctr`, i64 [B], of which none is gathered."""
        return self.pieces.count_tokens(self.ctr_matrix(rows, history, targets)[0])

    def ranking_lengths(
        self, rows: Ints, history: Ints, candidates: Ints | None = None, reserve: Ints | int | None = None
    ) -> NDArray[np.int64]:
        """Tokens of each prompt of `ranking`, i64 [B], of which none is gathered."""
        return self.pieces.count_tokens(self.ranking_matrix(rows, history, candidates, reserve)[0])

    def user_lengths(self, rows: Ints, history: Ints) -> NDArray[np.int64]:
        """Tokens of each text of `users`, i64 [B], of which none is gathered."""
        return self.pieces.count_tokens(self.user_matrix(rows, history)[0])

    def item_lengths(self, items: Ints) -> NDArray[np.int64]:
        """Tokens of each text of `items`, i64 [n], of which none is gathered."""
        return self.pieces.count_tokens(self.item_matrix(items))

    def ctr_matrix(
        self, rows: Ints, history: Ints, targets: Ints | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Piece ids [B, 2 k + 8] of the Yes/No prompts, and which of them were cut, bool [B].

        With statistics, as many more as their sentence has parts.
        """
        pieces = self.pieces
        target = self.log.item[np.asarray(rows)] if targets is None else np.asarray(targets)
        after: list[int | NDArray[np.int32]] = [
            pieces.question,
            pieces.item[target][:, None],
            self.statistics_sentence(rows, target),
            pieces.ask,
            pieces.suffix,
            pieces.answer,
        ]
        return self._fit(rows, history, after, self.max_length)

    def ranking_matrix(
        self, rows: Ints, history: Ints, candidates: Ints | None = None, reserve: Ints | int | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Piece ids of the next-title prompts, and which of them were cut, bool [B]."""
        pieces = self.pieces
        after: list[int | NDArray[np.int32]] = [pieces.next, pieces.suffix]
        if candidates is not None:
            titles = pieces.item[np.asarray(candidates)]
            listed = np.stack([titles, np.full_like(titles, pieces.newline)], 2).reshape(
                len(titles), 2 * titles.shape[1]
            )
            after = [pieces.choose, listed, *after]
        if reserve is None:
            reserve = self.room(self.log.item[np.asarray(rows)][:, None])
        return self._fit(rows, history, after, self.max_length - np.asarray(reserve))

    def user_matrix(self, rows: Ints, history: Ints) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Piece ids [B, 2 k + 4] of what a user's tower reads, and which of the texts were cut, bool [B]."""
        return self._fit(rows, history, [self.pieces.eos], self.max_length)

    def item_matrix(self, items: Ints) -> NDArray[np.int32]:
        """Piece ids [n, 4] of what an item's tower reads; refuses as `items` does."""
        pieces = self.pieces
        item = np.asarray(items)
        head = np.full(len(item), pieces.head, np.int32)
        eos = np.full(len(item), pieces.eos, np.int32)
        matrix = np.stack([head, pieces.item[item], pieces.description[item], eos], 1)
        lengths = pieces.count_tokens(matrix)
        if len(item) and lengths.max() > self.max_length:
            longest = int(item[np.argmax(lengths)])
            external = pl.read_parquet(self.log.folder / "items.parquet")["external"][longest]
            raise ValueError(
                f"the text of item {external} has {lengths.max()} tokens, {self.max_length} are free: "
                "shorten dataset.description or the item's texts, or raise the encoder's context"
            )
        return matrix

    def statistics_sentence(self, rows: Ints, targets: Ints) -> NDArray[np.int32]:
        """Piece ids [B, parts] of the sentence about the rows' statistics; without one no columns.

        Args:
            rows: [B], rows of the log.
            targets: [B], dense items.
        """
        if self.statistics is None:
            return np.zeros((len(rows), 0), np.int32)
        codes = self.statistics(np.asarray(rows, np.int64), np.asarray(targets, np.int32))
        return np.stack([part[codes[:, column]] for column, part in self.pieces.statistics_sentence], 1)

    def events(self, history: Ints) -> NDArray[np.int32]:
        """Piece ids [B, 2 k] of events: title, rating, title, rating, ...; padding (-1) is the empty one."""
        history = np.asarray(history)
        title = self.pieces.item[self.log.item[history]]
        rating = self.pieces.rating[self.log.rating[history]]
        events = np.where(history[:, :, None] >= 0, np.stack([title, rating], 2), 0)
        return events.reshape(len(history), 2 * history.shape[1]).astype(np.int32)

    def _fit(
        self, rows: Ints, history: Ints, after: Sequence[int | NDArray[np.int32]], limit: Ints | int
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Prompts of `limit` tokens at most that end in `after`, and which of them lost events, bool [B].

        The limit is one for all, or [B].
        """
        pieces = self.pieces
        count = len(rows)
        limit = np.broadcast_to(np.asarray(limit, np.int64), count)
        profile = pieces.profile[self.log.user[np.asarray(rows)]][:, None]

        def columns(parts: Sequence[int | NDArray[np.int32]]) -> NDArray[np.int32]:
            return np.concatenate(
                [np.full((count, 1), part, np.int32) if isinstance(part, int) else part for part in parts], 1
            )

        before = columns([pieces.head, profile, pieces.intro])
        behind = columns(after)
        events = self.events(history)
        fixed = pieces.lengths[before].sum(1) + pieces.lengths[behind].sum(1)
        if (fixed > limit).any():
            worst = int(np.argmax(fixed - limit))
            row = int(np.asarray(rows)[worst])
            title = pieces.lengths[pieces.item[self.log.item[row]]]
            raise ValueError(
                f"the prompt of row {row} of the log, without history, has {fixed[worst]} tokens, "
                f"{limit[worst]} are free (the title of its item has {title}): raise the LM's context"
            )
        length = pieces.lengths[events].reshape(count, events.shape[1] // 2, 2).sum(2)
        excess = fixed + length.sum(1) - limit
        # An event goes when all older ones together do not yet free enough.
        gone = (np.cumsum(length, 1) - length < excess[:, None]) & (excess > 0)[:, None]
        events[np.repeat(gone, 2, axis=1)] = 0
        return np.concatenate([before, events, behind], 1), excess > 0
