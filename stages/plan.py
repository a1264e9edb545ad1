"""The plan: what Make follows.

    python -m stages.plan write GOAL... DATASET=demo CRM="din sim" SYSTEM="lora reclora" ... key=value ...

`write` validates the configuration of every stage before anything runs, writes `config.yaml` where it
changed, and the rules to `artifacts/<dataset>/plans/`, and prints their path (`python -m stages.follow` runs
them); `status` shows what is done, stale or missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import OmegaConf

from recllm.config.request import parse
from recllm.errors import ConfigError, StageError
from recllm.eventlog.statistics import STATISTICS
from recllm.files import write_text
from recllm.paths import FORMATS
from recllm.pipeline.expected import ahead, keep, told
from recllm.pipeline.graph import Plan
from recllm.pipeline.makefile import write
from recllm.text.formats import DESCRIPTION, PROFILE, check_formats, parse_format


def show(plan: Plan) -> None:
    """Print the state of every stage."""
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "state", "commit", "finished (UTC)", "seconds", box=None)
    table.columns[0].overflow = "fold"  # an evaluation's name may be longer than a line
    for column in table.columns[1:]:
        column.no_wrap = True
    for node, state, manifest in plan.states():
        details = (
            (manifest.commit, manifest.finished[:19].replace("T", " "), f"{manifest.seconds:.0f}")
            if manifest
            else ("", "", "")
        )
        table.add_row(node.folder, state, *details)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def check_texts(plan: Plan) -> None:
    """Refuse format strings over columns that are not there; of a log to be made, leave them to `prepare`.

    Raises:
        ConfigError: the first one.
    """
    config = plan.configured
    parse_format(config.wording.known, STATISTICS, "wording.known")
    templates = {DESCRIPTION: config.dataset.description, PROFILE: config.wording.profile}
    logs = [node for node in plan.needed() if node.stage.name == "log"]
    for node, state, _ in plan.states(logs):
        if node.stage.name != "log":
            continue
        folder = plan.root / node.folder
        if state != "done":
            write_text(folder / FORMATS, OmegaConf.to_yaml(OmegaConf.create(templates)))
        elif (folder / "items.parquet").exists():  # an output that is gone is told by the stage that reads it
            check_formats(templates, folder)


def main(arguments: Sequence[str]) -> int:
    """Run `write` or `status`; a configuration that cannot be used is one line and status 2."""
    try:
        plan = Plan(parse(arguments[1:]))
        if arguments[0] == "status":
            show(plan)
        else:
            check_texts(plan)
            rules = write(plan)
            expected, done = ahead(plan)
            keep(rules, expected)
            for line in told(expected, done):
                print(line, file=sys.stderr)
            print(rules)
    except (ConfigError, StageError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
