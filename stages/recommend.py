"""Recommendations, scores and bundles of a finished cascade.

    python -m stages.recommend recommend DATASET=demo SYSTEM=reclora USERS=users.parquet K=20 OUT=recs.parquet
    python -m stages.recommend score     DATASET=demo SYSTEM=reclora PAIRS=pairs.csv OUT=scores.csv
    python -m stages.recommend bundle    DATASET=demo SYSTEM=reclora
    python -m stages.recommend folder    DATASET=demo SYSTEM=reclora

`make recommend`, `make score` and `make bundle` make the cascade first. With `BUNDLE=folder` the first two
ask a bundle instead. The last one prints where the cascade lies, for `make serve`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from recllm import paths
from recllm.config.request import parse
from recllm.errors import ConfigError, StageError
from recllm.eventlog.ids import FIRST_ID
from recllm.pipeline.finished import Finished
from recllm.pipeline.graph import Plan
from recllm.serving.batch import ENDINGS, Options, reading, recommend_file, scan, score_file
from recllm.serving.bundle import write_bundle
from recllm.serving.recommender import Recommender

ASKED = (
    *("USERS", "PAIRS", "OUT", "K", "HISTORIES", "TIME", "ON_UNKNOWN", "ITEMS", "EXCLUDE", "KEEP_SEEN"),
    "BUNDLE",
)
"""Words of these commands; all others say which cascade."""


def cascade_folder(words: Sequence[str]) -> Path:
    """Folder of the cascade that a make command asks for.

    Raises:
        ConfigError: it asks for several.
    """
    plan = Plan(parse(["cascade", *words]))
    nodes = plan.goals["cascade"]
    if len(nodes) != 1:
        raise ConfigError(f"{len(nodes)} cascades are asked for; wanted one SYSTEM and one SEED")
    return plan.root / nodes[0].folder


def options(asked: dict[str, str]) -> Options:
    """What the words ask of all inputs.

    Raises:
        ConfigError: K is no number, or KEEP_SEEN neither 0 nor 1.
    """
    k = asked.get("K", "10")
    if not k.lstrip("-").isdigit():
        raise ConfigError(f"K={k} is no whole number; e.g. K=20")
    keep = asked.get("KEEP_SEEN", "0")
    if keep not in ("0", "1"):
        raise ConfigError(f"KEEP_SEEN={keep}; wanted 0 (items of the history are left out) or 1")
    on_unknown: Any = asked.get("ON_UNKNOWN", "popular")
    if on_unknown not in ("popular", "error", "skip"):
        raise ConfigError(f"ON_UNKNOWN={on_unknown}; wanted popular, error or skip")
    return Options(
        k=int(k),
        filter_viewed=keep == "0",
        items_to_recommend=items(asked, "ITEMS"),
        exclude=items(asked, "EXCLUDE"),
        time=asked.get("TIME"),
        on_unknown=on_unknown,
    )


def items(asked: dict[str, str], name: str) -> list[str] | None:
    """Item ids: of a file with a column `item`, or separated by commas; None where none are given."""
    text = asked.get(name)
    if text is None:
        return None
    path = Path(text)
    if path.suffix not in ENDINGS and not path.is_file():
        return [part.strip() for part in text.split(",")]
    with reading(path):
        table = scan(path)
        columns = table.collect_schema().names()
        if "item" not in columns:
            raise ValueError(f"{name}={text} has columns {', '.join(columns)}; wanted one named item")
        return table.select(pl.col("item").cast(pl.String)).collect()["item"].to_list()


def say_unknown(recommender: Recommender, name: str, given: list[str] | None) -> None:
    """Say how many of the items that were given are none of the log: they change nothing."""
    unknown = int((recommender.maker.items.dense(given or []) < FIRST_ID).sum())
    if unknown:
        print(f"{name}: {unknown:,} of {len(given or []):,} items are not in the log")


def main(arguments: Sequence[str]) -> int:
    """Run a command; what cannot be done is one line and status 2."""
    command, *words = arguments
    asked = {}
    choice = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in ASKED:
            if value.strip():
                asked[name] = value.strip()
        else:
            choice.append(word)
    try:
        if command == "bundle":
            bundle(Finished.open(cascade_folder(choice)))
            return 0
        if command == "folder":
            print(cascade_folder(choice))
            return 0
        wanted = "USERS" if command == "recommend" else "PAIRS"
        for name in (wanted, "OUT"):
            if name not in asked:
                raise ConfigError(f"no {name} is given; wanted e.g. {wanted}=in.parquet OUT=out.parquet")
        settings = options(asked)
        folder = Path(asked["BUNDLE"]) if "BUNDLE" in asked else cascade_folder(choice)
        recommender = Recommender.load(folder)
        say_unknown(recommender, "ITEMS", settings.items_to_recommend)
        say_unknown(recommender, "EXCLUDE", settings.exclude)
        source, out = Path(asked[wanted]), Path(asked["OUT"])
        histories = Path(asked["HISTORIES"]) if "HISTORIES" in asked else None
        if command == "recommend":
            recommend_file(recommender, source, out, settings, histories)
        else:
            score_file(recommender, source, out, settings.time, histories)
        counted = ", ".join(f"{name} {count:,}" for name, count in recommender.counts.items() if count)
        print(counted)
    except (ConfigError, StageError, ValueError, OSError, pl.exceptions.PolarsError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def bundle(cascade: Finished) -> None:
    """Write the bundle of a cascade beside its data set's other artifacts."""
    folder = cascade.root / paths.BUNDLES / cascade.file.choice
    facts = write_bundle(cascade, folder)
    size = sum(file["bytes"] for file in facts["files"].values())
    print(f"{folder}: {len(facts['files'])} files, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
