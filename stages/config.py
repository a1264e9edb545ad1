"""The configuration of a command: every key with value, meaning and origin; and docs/configuration.md.

    python -m stages.config show DATASET=demo CRM=sim SYSTEM=reclora KEY=stage2 key=value ...
    python -m stages.config write

`show` prints what one CRM and one system are configured with (`KEY=`: the keys that begin so); `write` writes
docs/configuration.md from the docstrings of the configuration's dataclasses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recllm import paths
from recllm.config.documentation import Key, all_keys, as_text, document
from recllm.config.merge import merge, nearest_key, nest, origins
from recllm.config.request import NOTHING, Words, parse, sort_words
from recllm.errors import ConfigError, StageError
from recllm.files import write_text
from recllm.pipeline.graph import Plan
from recllm.pipeline.stages import STAGES

Row = tuple[str, str, str, str]
"""Key, value, meaning, and where the value comes from."""


def readers(key: str) -> list[str]:
    """The stages that a key reaches."""
    return [name for name, stage in STAGES.items() if stage.reached_by(key)]


def show(arguments: Sequence[str]) -> None:
    """Print the keys that begin with `KEY=`, all where it is empty."""
    words = sort_words(arguments)
    keys = matching(words.values["KEY"])
    files = system_files(words)
    rows = resolve([word for word in arguments if not word.startswith("KEY=")], words, files, keys)
    print_table(rows)
    for variable, folders in (("CRM", "conf/stage1"), ("SYSTEM", "conf/stage2 or conf/stage3")):
        if not words.values[variable]:
            print(f"Without {variable}= no file of {folders} is in it.")


def matching(prefix: str) -> list[Key]:
    """The keys that begin so."""
    keys = [key for key in all_keys() if key.name.startswith(prefix)]
    if not keys:
        raise ConfigError(f"KEY={prefix} begins no configuration key; the nearest is {nearest_key(prefix)}")
    return keys


def system_files(words: Words) -> list[str]:
    """The files in `conf` of the CRM and of the system that are named."""
    files = []
    for variable, folders in (("CRM", ("stage1",)), ("SYSTEM", ("stage2", "stage3"))):
        names = words.values[variable].split()
        if len(names) > 1:
            raise ConfigError(
                f"{variable}='{' '.join(names)}' names {len(names)}; wanted one: each has its own"
            )
        for name in names:
            for folder in folders:
                if name != NOTHING and (paths.repository() / "conf" / folder / f"{name}.yaml").exists():
                    files.append(f"{folder}/{name}.yaml")
    return files


def resolve(arguments: Sequence[str], words: Words, files: Sequence[str], keys: Sequence[Key]) -> list[Row]:
    """The keys with their values, and where these come from."""
    request = parse(arguments)
    layers = Plan(request).layers(*files)
    typed = [("ARGS", nest(request.overrides))]
    if words.values["SEED"]:
        typed.append((f"SEED={request.seeds[0]}", {"seed": request.seeds[0]}))
    config = merge([*layers, *typed], {})
    origin = origins([*layers, *typed])
    rows = []
    for key in keys:
        value = config
        for part in key.name.split("."):
            value = getattr(value, part)
        rows.append((key.name, as_text(value), key.meaning, origin[key.name]))
    return rows


def print_table(rows: Sequence[Row]) -> None:
    """Print a table that fits the terminal; 120 columns wide where it is piped."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold", max_width=28)
    table.add_column("meaning", ratio=1)
    table.add_column("from", overflow="fold", max_width=24)
    for cells in rows:
        table.add_row(*map(Text, cells))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def main(arguments: Sequence[str]) -> int:
    """Run `show` or `write`; a configuration that cannot be used is one line and status 2."""
    try:
        if arguments[0] == "write":
            path = paths.repository() / "docs" / "configuration.md"
            write_text(path, document(readers))
            print(path)
        else:
            show(arguments[1:])
    except (ConfigError, StageError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
