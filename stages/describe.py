"""Describe: a look at the data of a prepared log, as a page and in the terminal.

    python -m stages.describe DATASET=demo LM=tiny key=value ...

It needs the event log alone. Prompts are worded and counted with the LM's tokenizer, which needs no weights
(the tiny LM's is made of the data set's texts); they show the nearest events where these are there already.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recllm import paths
from recllm.config.request import parse
from recllm.errors import ConfigError, StageError
from recllm.eventlog.log import EventLog
from recllm.files import load_array
from recllm.paths import NEIGHBORS
from recllm.pipeline.graph import Plan
from recllm.report.describe import Example, PromptLengths, Table, write_description
from recllm.report.prompt_examples import Reader
from recllm.text.formats import DESCRIPTION, PROFILE, shortened


def describe(plan: Plan) -> None:
    """Write `describe.html` of a plan's data set, and print its tables."""
    states = {node.stage.name: (node, state, manifest) for node, state, manifest in plan.states()}
    node, _, made = states["log"]
    if made is None:
        raise FileNotFoundError(f"no event log in {plan.root / node.folder}; run `make describe`")
    log = EventLog.open(plan.root / node.folder)
    split = node.config["prepare"]["split"]
    config = plan.configured
    missing, stored = [], None
    if config.prompt.retrieved:
        node, state, _ = states["neighbors"]
        if state == "done":
            stored = load_array(plan.root / node.folder / NEIGHBORS)
        else:
            missing.append("Prompts show the most recent events: neighbors are not there yet; `make stage1`.")
    lengths: list[PromptLengths] = []
    examples: list[Example] = []
    try:
        reader = Reader(config, log, stored)
        lengths = reader.lengths()
        examples = reader.examples()
    except ValueError as error:  # no tokenizer, or prompts that do not fit it: the rest can be told
        missing.append(f"Prompts: {error}")
    templates = {DESCRIPTION: config.dataset.description, PROFILE: config.wording.profile}
    try:
        texts = [
            [f"shortened by an empty column ({key})", f"{count:,} of {total:,}"]
            for key, count, total in shortened(templates, log.folder)
        ]
    except ConfigError as error:
        texts = []
        missing.append(f"Texts: {error}")
    out = plan.root / paths.DESCRIPTION
    read = states["tables"][2]
    raw = read.metrics if read else None
    tables = write_description(
        log, made.metrics, out, plan.request.dataset, split, lengths, examples, missing, raw, texts
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
        # Of the plan of stage 2 a description reads the log, the LM's configuration and the neighbors.
        describe(Plan(parse(["stage2", *arguments])))
    except (ConfigError, StageError, ValueError, FileNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
