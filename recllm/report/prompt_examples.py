"""Prompts of a log as an LM will read them: how many tokens, and a few in full."""

from __future__ import annotations

from typing import Any

import numpy as np

from recllm.config.schema import Config
from recllm.eventlog.ids import SPLITS
from recllm.eventlog.log import EventLog, Rows, chronological
from recllm.lm.load import context_length, load_tokenizer
from recllm.report.describe import NO_LIMIT, Example, PromptLengths, answer_lengths, title_lengths
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
            self.tokenizer = tiny_tokenizer(config, log, config.lm.tiny)
            self.limit = config.lm.tiny.context
        else:
            self.tokenizer, shape = load_tokenizer(model)
            self.limit = context_length(model, shape)
        self.config = config
        self.log = log
        self.stored = stored
        self.pieces = build_pieces(config, log, self.tokenizer)

    def history(self, rows: Rows) -> Rows:
        """The history that a Yes/No prompt shows, `[n, k]`."""
        k = self.config.prompt.history
        if self.stored is None:
            return self.log.recent(rows, k)
        return chronological(self.stored[rows, :k])

    def titles(self, split: str) -> tuple[Rows, Rows, Any]:
        """Rows of next-title prompts, the history they show, and what they list."""
        rows = self.log.rows(split, SAMPLE)
        listed = None
        if self.config.prompt.list_candidates and split != "train":
            rows, listed = self.log.ranking(split, f"uniform{self.log.meta['candidates']}")
        return rows, self.log.recent(rows, self.config.prompt.history), listed

    def lengths(self) -> list[PromptLengths]:
        """Tokens of both questions in every split."""
        prompts = Prompts(self.log, self.pieces, NO_LIMIT)
        counted = []
        for split in SPLITS:
            rows = self.log.rows(split, SAMPLE)
            counted.append(answer_lengths(prompts, split, rows, self.history(rows), self.limit))
        for split in SPLITS:
            rows, history, listed = self.titles(split)
            if len(rows):
                counted.append(title_lengths(prompts, split, rows, history, self.limit, listed))
        return counted

    def examples(self) -> list[Example]:
        """A liked and a disliked test row, and the next title of a liked one."""
        rows = self.log.rows("test", SAMPLE)
        wording = self.config.wording
        prompts = Prompts(self.log, self.pieces, self.limit)
        examples = []
        for label, name, answer in ((1, "liked", wording.yes), (0, "not liked", wording.no)):
            chosen = rows[self.log.label[rows] == label][:1]
            if len(chosen):
                tokens = prompts.ctr(chosen, self.history(chosen)).tokens
                examples.append(self._example(f"Yes or no, {name}", tokens, answer))
        rows, history, listed = self.titles("test")
        chosen = np.flatnonzero(self.log.label[rows] == 1)[:1]
        if len(chosen):
            lists = None if listed is None else listed[chosen]
            tokens = prompts.ranking(rows[chosen], history[chosen], lists).tokens
            title = prompts.completions(self.log.item[rows[chosen]]).tokens
            examples.append(self._example("Next title", tokens, self.tokenizer.decode(title.tolist())))
        return examples

    def _example(self, title: str, tokens: Any, answer: str) -> Example:
        return Example(title, self.tokenizer.decode(tokens.tolist()), answer, len(tokens))
