"""Describe: a look at the data of a prepared log, as a page and in the terminal.

    python -m stages.describe DATASET=demo LM=tiny key=value ...

It needs the event log alone. Prompts are worded and counted with the LM's tokenizer, which needs no weights
(the tiny LM's is made of the data set's texts); they show the nearest events where these are there already.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from recllm import parents, paths
from recllm.checks import ConfigError
from recllm.columns import SPLITS
from recllm.dag import Plan
from recllm.data.batches import chronological
from recllm.data.log import EventLog, Rows
from recllm.data.prompts import Prompts
from recllm.lm.load import context_length, load_tokenizer
from recllm.report.describe import (
    NO_LIMIT,
    Asked,
    Example,
    Table,
    ask_answers,
    ask_titles,
    write_description,
)
from recllm.request import parse
from recllm.run import load_sections
from recllm.schema import Config

SAMPLE = "uniform20000"
"""Rows of each split whose prompts are counted in tokens."""


class Reader:
    """Prompts of a log as an LM will read them."""

    def __init__(self, config: Config, log: EventLog, stored: Any) -> None:
        """Tokenize the data set's texts; `stored` are the neighbours of the log's rows, or None."""
        model = config.lm.model
        if model.path is None:
            self.tokenizer, self.limit = (
                parents.tiny_tokenizer(config, log, config.lm.tiny),
                config.lm.tiny.context,
            )
        else:
            self.tokenizer, shape = load_tokenizer(model)
            self.limit = context_length(model, shape)
        self.config, self.log, self.stored = config, log, stored
        self.pieces = parents.build_pieces(config, log, self.tokenizer)

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


def describe(plan: Plan) -> None:
    """Write `describe.html` of a plan's data set, and print its tables."""
    states = {node.stage: (node, state, manifest) for node, state, manifest in plan.states()}
    node, _, made = states["log"]
    if made is None:
        raise FileNotFoundError(f"no event log in {plan.root / node.folder}; run `make describe`")
    log = EventLog.open(plan.root / node.folder)
    split = node.config["prepare"]["split"]
    config = load_sections(states["lm-text"][0].content)
    missing, stored = [], None
    if config.prompt.retrieved:
        node, state, _ = states["neighbours"]
        if state == "done":
            stored = np.load(plan.root / node.folder / parents.NEIGHBOURS, mmap_mode="r")
        else:
            missing.append(
                "Prompts show the most recent events: neighbours are not there yet; `make stage1`."
            )
    asked: list[Asked] = []
    examples: list[Example] = []
    try:
        reader = Reader(config, log, stored)
        asked = reader.asked()
        examples = reader.examples()
    except ValueError as error:  # no tokenizer, or prompts that do not fit it: the rest can be told
        missing.append(f"Prompts: {error}")
    out = plan.root / paths.DESCRIPTION
    read = states["tables"][2]
    raw = read.metrics if read else None
    tables = write_description(
        log, made.metrics, out, plan.request.dataset, split, asked, examples, missing, raw
    )
    show(tables, [*made.metrics["notes"], *missing])
    print(out)


def show(tables: Sequence[tuple[str, Table]], notes: Sequence[str]) -> None:
    """Print the tables, and then what there is to know."""
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console()
    console = console if console.is_terminal else Console(width=120)
    for title, (heading, lines) in tables:
        grid = Grid(title=title, title_justify="left", box=None, show_header=bool(heading))
        for place, name in enumerate(heading or lines[0] if lines else []):
            grid.add_column(name if heading else "", justify="right" if heading and place else "left")
        for cells in lines:
            grid.add_row(*cells)
        console.print(grid)
    for note in notes:
        console.print(f"- {note}", highlight=False)


def main(arguments: Sequence[str]) -> int:
    """Describe; what cannot be done is one line and status 2."""
    try:
        # Of the plan of stage 2 a description reads the log, the LM's configuration and the neighbours.
        describe(Plan(parse(["stage2", *arguments])))
    except (ConfigError, ValueError, FileNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
