"""The canonical tables that every dataset's recipe writes: events, items and users, parquet in one folder.

`events` (user, item, rating, label, timestamp), `items` (item, title, attributes ...), `users` (user,
attributes ...). External ids are int64 or strings. `rating` is float32 and may be null; `label` is int8, 1
liked, 0 not, null for an event that is history but no sample; `timestamp` is int64 seconds since 1970, null
in all rows of a log without time: there a user's events happened in the order of their rows.

Where the data set says them itself, events have two more columns: `split` is int8, the code of the split that
an event is of (`SPLITS`), null for none; `candidates` is a list of external item ids, the event's own among
them, null for none.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from recllm.tables.parse import LATEST

EVENTS = {"rating": pl.Float32, "label": pl.Int8, "timestamp": pl.Int64}
SPLITS = ("train", "valid", "test")
"""The splits of the column `split`, by their codes 0, 1 and 2."""
GIVEN = ("split", "candidates")
"""Columns of the events that only some data sets have."""
EXTERNAL_IDS = (pl.Int64, pl.String)
NAMES = ("events", "items", "users")
MEND = "mend the raw file, its description in conf/dataset/, or the dataset's recipe.py"


@contextmanager
def staging(folder: Path, scale: tuple[float, float] | None = None) -> Iterator[Path]:
    """A scratch folder for events.parquet, items.parquet and users.parquet, which go to `folder` at the end.

    Other files there are for the writer's own use, and removed. Where an error is raised, or the tables are
    not what `read` and `check` take, nothing is left behind.

    Args:
        folder: where the tables go, created where absent.
        scale: see `check`.

    Raises:
        ValueError: see `read` and `check`.
    """
    is_new = not folder.exists()
    scratch = folder / ".writing"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir(parents=True)
    try:
        yield scratch
        check(read(scratch)[0], scale)
        for name in NAMES:
            (scratch / f"{name}.parquet").replace(folder / f"{name}.parquet")
    except pl.exceptions.PolarsError as error:
        line = " ".join(str(error).strip().splitlines()[:1])
        raise ValueError(f"the raw data cannot be read: {line}; {MEND}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def write(
    folder: Path,
    events: pl.LazyFrame,
    items: pl.DataFrame,
    users: pl.DataFrame,
    scale: tuple[float, float] | None = None,
) -> None:
    """Writes the three tables and checks them; where they are wrong, nothing is left behind.

    Args:
        folder: created where absent, e.g. `artifacts/demo/tables`.
        events: user, item, rating, label, timestamp; streamed to disk, in any order.
        items: item, title and attribute columns, one row an item.
        users: user and attribute columns, one row a user.
        scale: see `check`.

    Raises:
        ValueError: what was written is not what `read` and `check` take, or the raw data cannot be read.
    """
    with staging(folder, scale) as scratch:
        sink(events, scratch).collect(engine="streaming")
        items.write_parquet(scratch / "items.parquet")
        users.write_parquet(scratch / "users.parquet")


def sink(events: pl.LazyFrame, folder: Path) -> pl.LazyFrame:
    """The events on their way to events.parquet, in their order, with the types of `EVENTS`; not run yet."""
    given = [column for column in GIVEN if column in events.collect_schema()]
    columns = events.select("user", "item", *EVENTS, *given).cast(EVENTS)  # type: ignore[arg-type]
    return columns.sink_parquet(folder / "events.parquet", lazy=True)


def read(folder: Path) -> tuple[pl.LazyFrame, pl.DataFrame, pl.DataFrame]:
    """Opens the tables of a folder and checks their form.

    Args:
        folder: e.g. `artifacts/demo/tables`.

    Returns:
        events (lazy, not read yet), items, users.

    Raises:
        ValueError: a file or column is missing, a type is wrong, an id is null or twice there, a title is
            empty.
    """
    for name in ("events", "items", "users"):
        if not (folder / f"{name}.parquet").is_file():
            raise ValueError(
                f"{folder / name}.parquet is missing; write the tables first: make prepare DATASET=<name>"
            )
    events = pl.scan_parquet(folder / "events.parquet")
    items = pl.read_parquet(folder / "items.parquet")
    users = pl.read_parquet(folder / "users.parquet")

    schema = dict(events.collect_schema())
    _check_columns("events", schema, ["user", "item", *EVENTS])
    for column, wanted in EVENTS.items():
        if schema[column] != wanted:
            raise ValueError(
                f"events.{column} is {schema[column]}, wanted {wanted}; cast it in the dataset's recipe.py"
            )
    for column, kind in (("split", pl.Int8()), ("candidates", pl.List(schema["item"]))):
        if schema.get(column, kind) != kind:
            raise ValueError(
                f"events.{column} is {schema[column]}, wanted {kind}; cast it in the dataset's recipe.py"
            )
    for name, table in (("item", items), ("user", users)):
        _check_columns(f"{name}s", dict(table.schema), ["item", "title"] if name == "item" else ["user"])
        if table.schema[name] not in EXTERNAL_IDS or table.schema[name] != schema[name]:
            raise ValueError(
                f"{name} is {schema[name]} in events and {table.schema[name]} in {name}s, "
                "wanted Int64 or String in both; cast it in the dataset's recipe.py"
            )
        if table[name].null_count():
            raise ValueError(
                f"{name}s.{name} has {table[name].null_count()} nulls, wanted none; mend recipe.py"
            )
        if twice := table.height - table[name].n_unique():
            raise ValueError(
                f"{name}s has {twice} rows too many for its ids, wanted one an id; mend recipe.py"
            )
    untitled = items.filter(
        pl.col("title").is_null() | (pl.col("title").cast(pl.String).str.strip_chars() == "")
    )
    if untitled.height:
        raise ValueError(
            f"{untitled.height} items have no title (first: {untitled['item'][0]}), wanted one each; "
            "mend recipe.py"
        )
    return events, items, users


def _check_columns(table: str, schema: dict[str, pl.DataType], wanted: list[str]) -> None:
    missing = [column for column in wanted if column not in schema]
    if missing:
        raise ValueError(
            f"{table}.parquet has columns {list(schema)}, wanted also {missing}; mend the dataset's recipe.py"
        )


def check(events: pl.LazyFrame, scale: tuple[float, float] | None = None) -> None:
    """Refuses events that nothing can be learned from, in one pass.

    Args:
        events: the table, as `read` opens it.
        scale: the lowest and the highest rating that can be; None: any.

    Raises:
        ValueError: no event, an id that is null, one user only, a rating that is NaN, infinite or out of
            scale, more than 100 distinct ratings, no label or others than 0 and 1, a time before 1970 or
            after 2100. Labels that are all alike are taken: `prepare` may set another threshold,
            or draw negatives.
    """
    for is_wrong, problem in _problems(_figures(events), scale):
        if is_wrong:
            raise ValueError(f"{problem}; {MEND}")


def _figures(events: pl.LazyFrame) -> dict[str, Any]:
    """What `check` goes by, each a number or a user's id, in one pass over the events."""
    rating = pl.col("rating")
    label = pl.col("label")
    time = pl.col("timestamp")
    figures = events.select(
        rows=pl.len(),
        no_user=pl.col("user").null_count(),
        no_item=pl.col("item").null_count(),
        first_user=pl.col("user").min(),
        last_user=pl.col("user").max(),
        rated=rating.count(),
        not_finite=(~rating.is_finite()).sum(),
        levels=rating.n_unique(),
        poorest=rating.min(),
        best=rating.max(),
        labeled=label.count(),
        lowest=label.min(),
        highest=label.max(),
        earliest=time.min(),
        latest=time.max(),
    )
    return figures.collect(engine="streaming").row(0, named=True)


def _problems(figures: dict[str, Any], scale: tuple[float, float] | None) -> list[tuple[Any, str]]:
    """All that can be wrong: whether it is (what is true where it is), and what to say then."""
    rows = figures["rows"]
    rated = figures["rated"]
    levels = figures["levels"] - (rated < rows)  # null is no level
    low, high = scale or (-float("inf"), float("inf"))
    poorest = figures["poorest"]
    best = figures["best"]
    lowest = figures["lowest"]
    highest = figures["highest"]
    earliest = figures["earliest"]
    latest = figures["latest"]
    return [
        (not rows, "events has no rows, wanted some"),
        (figures["no_user"], f"events.user is null in {figures['no_user']} rows, wanted none"),
        (figures["no_item"], f"events.item is null in {figures['no_item']} rows, wanted none"),
        (
            figures["first_user"] == figures["last_user"],
            f"all {rows} events are of the user {figures['first_user']!r}, wanted two users at least",
        ),
        (
            figures["not_finite"],
            f"events.rating is NaN or infinite in {figures['not_finite']} rows, wanted numbers",
        ),
        (
            rated and not low <= poorest <= best <= high,
            f"events.rating is {poorest} to {best}, wanted {low:g} to {high:g}",
        ),
        (
            levels > 100,
            f"events.rating has {levels} levels, wanted at most 100 (source.events.rating_step rounds)",
        ),
        (not figures["labeled"], f"none of {rows} events has a label, wanted 0 and 1"),
        (
            figures["labeled"] and not 0 <= lowest <= highest <= 1,
            f"events.label is {lowest} to {highest}, wanted 0 and 1",
        ),
        (
            earliest is not None and not 0 <= earliest <= latest < LATEST,
            f"events.timestamp is {earliest} to {latest}, wanted seconds from 1970 to 2100",
        ),
    ]
