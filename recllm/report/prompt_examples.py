"""Prompts of a log as an LM will read them: how many tokens, and a few in full."""

from __future__ import annotations

from typing import Any

import numpy as np

from recllm.config.schema import Config
from recllm.eventlog.ids import SPLITS
from recllm.eventlog.log import EventLog, Rows, chronological
from recllm.lm.load import context_length, load_tokenizer
from recllm.report.describe import NO_LIMIT, Asked, Example, ask_answers, ask_titles
from recllm.systems.texts import build_pieces, tiny_tokenizer
from recllm.text.prompts import Prompts

SAMPLE = "uniform20000"
"""Rows of each split whose prompts are counted in tokens."""


class Reader:
    """Prompts of a log as an LM will read them."""

    def __init__(self, config: Config, log: EventLog, stored: Any) -> None:
        """Tokenize the data set's texts; `stored` are the neighbors of the log's rows, or None."""
        model = config.lm.model
        if model.path is None:
            self.tokenizer, self.limit = (
                tiny_tokenizer(config, log, config.lm.tiny),
                config.lm.tiny.context,
            )
        else:
            self.tokenizer, shape = load_tokenizer(model)
            self.limit = context_length(model, shape)
        self.config, self.log, self.stored = config, log, stored
        self.pieces = build_pieces(config, log, self.tokenizer)

    def shown(self, rows: Rows) -> Rows:
        """The history that a Yes/No prompt shows, `[n, k]`."""
        k = self.config.prompt.history
        if self.stored is None:
            return self.log.recent(rows, k)
        return chronological(self.stored[rows, :k])

    def titles(self, split: str) -> tuple[Rows, Rows, Any]:
        """Rows of next-title prompts, the history they show, and what they list."""
        rows, listed = self.log.rows(split, SAMPLE), None
        if self.config.prompt.list_candidates and split != "train":
            rows, listed = self.log.ranking(split, f"uniform{self.log.meta['candidates']}")
        return rows, self.log.recent(rows, self.config.prompt.history), listed

    def asked(self) -> list[Asked]:
        """Tokens of both questions in every split."""
        prompts = Prompts(self.log, self.pieces, NO_LIMIT)
        found = []
        for split in SPLITS:
            rows = self.log.rows(split, SAMPLE)
            found.append(ask_answers(prompts, split, rows, self.shown(rows), self.limit))
        for split in SPLITS:
            rows, shown, listed = self.titles(split)
            if len(rows):
                found.append(ask_titles(prompts, split, rows, shown, self.limit, listed))
        return found

    def examples(self) -> list[Example]:
        """A liked and a disliked test row, and the next title of a liked one."""
        rows, wording = self.log.rows("test", SAMPLE), self.config.wording
        prompts = Prompts(self.log, self.pieces, self.limit)
        found = []
        for label, name, answer in ((1, "liked", wording.yes), (0, "not liked", wording.no)):
            chosen = rows[self.log.label[rows] == label][:1]
            if len(chosen):
                tokens = prompts.ctr(chosen, self.shown(chosen)).tokens
                found.append(self._example(f"Yes or no, {name}", tokens, answer))
        rows, shown, listed = self.titles("test")
        chosen = np.flatnonzero(self.log.label[rows] == 1)[:1]
        if len(chosen):
            lists = None if listed is None else listed[chosen]
            tokens = prompts.ranking(rows[chosen], shown[chosen], lists).tokens
            title = prompts.completions(self.log.item[rows[chosen]]).tokens
            found.append(self._example("Next title", tokens, self.tokenizer.decode(title.tolist())))
        return found

    def _example(self, title: str, tokens: Any, answer: str) -> Example:
        return Example(title, self.tokenizer.decode(tokens.tolist()), answer, len(tokens))
