"""The canonical tables that every dataset's recipe writes: events, items and users, parquet in one folder.

`events` (user, item, rating, label, timestamp), `items` (item, title, attributes ...), `users` (user,
attributes ...). External ids are int64 or strings. `rating` is float32 and may be null; `label` is int8, 1
liked, 0 not, null for an event that is history but no sample; `timestamp` is int64 seconds since 1970.
"""

from pathlib import Path

import polars as pl

EVENTS = {"rating": pl.Float32, "label": pl.Int8, "timestamp": pl.Int64}
EXTERNAL_IDS = (pl.Int64, pl.String)


def write(folder: Path, events: pl.LazyFrame, items: pl.DataFrame, users: pl.DataFrame) -> None:
    """Writes the three tables and checks them.

    Args:
        folder: created where absent, e.g. `artifacts/demo/tables`.
        events: user, item, rating, label, timestamp; streamed to disk, in any order.
        items: item, title and attribute columns, one row an item.
        users: user and attribute columns, one row a user.

    Raises:
        ValueError: what was written is not what `read` takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["user", "item", *EVENTS]
    events.select(columns).cast(EVENTS).sink_parquet(folder / "events.parquet")  # type: ignore[arg-type]
    items.write_parquet(folder / "items.parquet")
    users.write_parquet(folder / "users.parquet")
    read(folder)


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
    _check_columns(folder / "events.parquet", schema, ["user", "item", *EVENTS])
    for column, wanted in EVENTS.items():
        if schema[column] != wanted:
            raise ValueError(
                f"events.{column} is {schema[column]}, wanted {wanted}; cast it in the dataset's recipe.py"
            )
    for name, table in (("item", items), ("user", users)):
        _check_columns(
            folder / f"{name}s.parquet", dict(table.schema), ["item", "title"] if name == "item" else ["user"]
        )
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


def _check_columns(path: Path, schema: dict[str, pl.DataType], wanted: list[str]) -> None:
    missing = [column for column in wanted if column not in schema]
    if missing:
        raise ValueError(
            f"{path} has columns {list(schema)}, wanted also {missing}; mend the dataset's recipe.py"
        )
