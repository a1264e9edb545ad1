"""Events as other people's files hold them: lists of items, windows over them, a file a split, items by name.

A file of sequences has a row a user, with all items in order. A file of windows has a row an event: the item,
and the items before it, at most as many as the longest such list. A window goes on from the one before if its
list is that one's with that one's item behind it, cut to the same length: then the item alone is new. Where
it does not, the items of its list are events too, as history and no samples.

What is read here is held in memory; plain rows are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recllm.console import say
from recllm.tables import parse
from recllm.tables.config import EventsSource, HeldOutSource, SourceConfig
from recllm.tables.readers import AT, SHIFT, File, file_of, open_files

Roles = dict[str, tuple[str, str]]
"""Role -> its configuration key and the name of its column; empty where there is none."""

OF_AN_EVENT = ("rating", "timestamp", "label", "candidates")
"""Roles that say something of a row's own item, and nothing of those before it."""
_LINE = (1 << SHIFT) - 1


@dataclass(frozen=True)
class _Lists(File):
    """A file whose frame has several rows for one of the file.

    Attributes:
        row: of each row of the frame the one of the file that it is of, int64 `[rows]`.
    """

    row: NDArray[np.int64]

    def place(self, at: int) -> str:
        """`windows.csv line 7` of the row at this place."""
        return super().place(int(self.row[at & _LINE]))


def open_events(
    config: SourceConfig, base: Path, scratch: Path, items: pl.DataFrame
) -> tuple[list[File], dict[str, int]]:
    """Opens the files of the events, those of given splits too, with a row an event.

    Args:
        config: where they lie and what they hold.
        base: where relative paths start.
        scratch: a folder for copies.
        items: the catalog: `item` (the id), `title` and the other columns of the items file.

    Returns:
        The files, with columns `@role` as `readers.open_files` makes them; and, where they are there,
        `@history` (whether an event stands in the list of a window alone), `@split` (what says the split, one
        of `SPLITS` where files say it) and `@candidates` (list of ids). Counts of rows that are lists, and of
        windows that begin a user.

    Raises:
        ValueError: a file cannot be opened, a window does not go on from the one before, lists that belong
            together differ in length, a name is that of several items, or a list of candidates is faulty.
    """
    events = config.events
    files: list[File] = []
    named_by: dict[int, str] = {}
    roles = {}
    for name, part in _parts(config):
        roles[name] = _roles(config, name, part)
        opened = open_files(
            name,
            part or events,
            base,
            roles[name],
            scratch,
            rest=False,
            drop=config.faulty == "drop",
            first=len(files),
        )
        for number, file in enumerate(opened, start=len(files)):
            named_by[number] = (part.named_by if part else "") or events.named_by
            split = "train" if name == "events" else name
            files.append(_with_split(file, split) if config.valid.path else file)
    has_lists = events.layout != "rows" or any(of_part["candidates"][1] for of_part in roles.values())
    if not (has_lists or any(named_by.values()) or config.items.aliases):
        return files, {}
    frame = pl.concat([_texts(file, events) for file in files], how="diagonal")
    if any(named_by.values()) or config.items.aliases:
        for column in ("@item", "@history", "@candidates"):
            if column in frame.columns:
                frame = _with_ids(frame, column, named_by, config, items)
    counts = {}
    if events.layout != "rows":
        counts[f"read_{events.layout}"] = frame.height
    if events.layout == "sequences":
        frame = _sequences(frame, files)
    if events.layout == "windows":
        frame, counts["windows_that_begin_a_user"] = _windows(frame, files, events)
        told = f"{counts['windows_that_begin_a_user']:,} of which begin a user"
        say(f"{counts['read_windows']:,} windows, {told}: {frame.height:,} events")
    if "@candidates" in frame.columns:
        frame = _checked_candidates(frame, config, items, files)
    return _apart(frame, files), counts


def _parts(config: SourceConfig) -> list[tuple[str, HeldOutSource | None]]:
    """The sections that name files of events, in the order of time; None for `events` itself."""
    parts: list[tuple[str, HeldOutSource | None]] = [("events", None)]
    if config.valid.path:
        parts += [("valid", config.valid), ("test", config.test)]
    return parts


def _roles(config: SourceConfig, name: str, part: HeldOutSource | None) -> Roles:
    events = config.events
    roles = {
        role: (f"source.events.{role}", getattr(events, role))
        for role in ("user", "item", "rating", "timestamp", "history", "split", "candidates")
    }
    if config.label.rule == "column":
        roles["label"] = ("source.label.column", config.label.column)
    for role in ("user", "item", "history", "candidates"):
        if column := getattr(part, role, ""):
            roles[role] = (f"source.{name}.{role}", column)
    return roles


def _with_split(file: File, split: str) -> File:
    """The file with its split in a column, in the words of `SPLITS`."""
    frame = file.frame.with_columns(pl.lit(split).alias("@split"))
    return File(file.display_name, file.rows, file.names, frame, file.delimited)


def _texts(file: File, events: EventsSource) -> pl.DataFrame:
    """A file's columns as text, or lists of text; null where there is nothing.

    Columns that say something of several items are lists; of ratings, times and labels no value is left out,
    so that the lists of one row belong together.
    """
    schema = file.frame.collect_schema()
    whole = {"history", "candidates"}
    if events.layout == "sequences":
        whole |= {"item", "rating", "timestamp", "label"}
    chosen = [pl.col(AT)]
    for column, dtype in schema.items():
        role = column.removeprefix("@")
        if column == AT:
            continue
        if role in whole:
            chosen.append(_values(column, dtype, events.list_separator, role in OF_AN_EVENT[:3]))
        elif role == "user" and file.names.get("item") == file.names["user"]:
            chosen.append(_values("@item", dtype, events.list_separator, False).list.first().alias(column))
        elif dtype.is_temporal():
            chosen.append(pl.col(column))
        else:
            chosen.append(parse.text(column, dtype).alias(column))
    texts = file.frame.select(chosen).collect()
    if "user" in file.names and file.names["user"] == file.names["item"]:
        texts = texts.with_columns(pl.col("@item").list.slice(1))
    return texts


def _values(column: str, dtype: pl.DataType, separator: str, keep: bool) -> pl.Expr:
    """A list of texts under the column's name; `keep`: with null for what is empty."""
    value = pl.col(column)
    inner: Any = pl.String()
    if isinstance(dtype, pl.List):
        inner = dtype.inner
    else:
        value = value.cast(pl.String).str.strip_chars().str.split(separator)
    value = value.list.eval(parse.text("", inner))
    return (value if keep else value.list.drop_nulls()).alias(column)


def _sequences(frame: pl.DataFrame, files: list[File]) -> pl.DataFrame:
    """A row an item of each list.

    Raises:
        ValueError: lists of one row differ in length.
    """
    if "@user" not in frame.columns:
        number = pl.int_range(1, 1 + pl.len(), dtype=pl.Int64).cast(pl.String)
        frame = frame.with_columns(pl.when(pl.col("@item").list.len() > 0).then(number).alias("@user"))
    lists = [column for column, dtype in frame.schema.items() if isinstance(dtype, pl.List)]
    exploded = [column for column in lists if column != "@candidates"]
    for column in exploded:
        other = frame.filter(pl.col(column).list.len() != pl.col("@item").list.len())
        if other.height:
            at = other[AT][0]
            file = file_of(files, at)
            raise ValueError(
                f"{file.place(at)} has {len(other[column][0])} values in column "
                f"{file.names[column[1:]]!r} for {len(other['@item'][0])} items, wanted as many; mend the row"
            )
    return frame.explode(exploded)


def _windows(frame: pl.DataFrame, files: list[File], events: EventsSource) -> tuple[pl.DataFrame, int]:
    """A row an event: a window's item, and before it what stands in its list where it begins a user.

    Raises:
        ValueError: no window has a list, or one goes on from none where it must.
    """
    has_user = "@user" in frame.columns
    if not has_user:
        frame = frame.with_columns(pl.lit("").alias("@user"))
    frame = frame.with_columns(pl.col("@history").fill_null([]))
    usable = frame.filter(pl.col("@item").is_not_null() & pl.col("@user").is_not_null())
    rows = usable.sort("@user", AT).select(AT, "@user", "@item", "@history")
    longest = max(rows["@history"].list.len().to_list(), default=0)
    if not longest:
        raise ValueError(
            f"{files[0].display_name}, column {files[0].names['history']!r}: no row has an item there, "
            "wanted those before the row's own in some; name the column with source.events.history"
        )
    before = pl.concat_list(pl.col("@history").shift(1), pl.col("@item").shift(1)).list.tail(longest)
    rows = rows.with_columns(
        same=(pl.col("@user") == pl.col("@user").shift(1)).fill_null(False),
        goes_on=(before == pl.col("@history")).fill_null(False),
    )
    if events.windows == "continue":
        torn = rows.filter(pl.col("same") & ~pl.col("goes_on"))
        if torn.height:
            raise ValueError(_torn(torn, rows, files))
    begins = pl.lit(events.windows == "alone") | ~(pl.col("same") & pl.col("goes_on"))
    rows = rows.select(AT, begins=begins, number=begins.cum_sum().over("@user"))
    frame = frame.join(rows, on=AT, how="left", maintain_order="left")
    number = pl.col("number").cast(pl.String)
    if has_user:
        user = pl.when(pl.col("number") > 1).then(pl.col("@user") + "#" + number).otherwise(pl.col("@user"))
    else:
        is_empty = pl.col("@item").is_null() & (pl.col("@history").list.len() == 0)
        user = pl.when(~is_empty).then(number.fill_null("0"))
    begins = pl.col("begins").fill_null(False)
    item = pl.concat_list(pl.col("@item"))
    frame = frame.with_columns(
        user.alias("@user"),
        pl.when(begins).then(pl.concat_list("@history", "@item")).otherwise(item).alias("@item"),
    )
    last = pl.col("@item").list.len() - 1
    frame = frame.with_columns(pl.int_ranges(0, last + 1).alias("place"), last.alias("last"))
    frame = frame.explode("@item", "place").with_columns(
        (pl.col("place") < pl.col("last")).fill_null(False).alias("@history")
    )
    own = [f"@{role}" for role in OF_AN_EVENT if f"@{role}" in frame.columns]
    frame = frame.with_columns(pl.when(~pl.col("@history")).then(pl.col(own)).name.keep())
    return frame.drop("begins", "number", "place", "last"), int(rows["begins"].sum())


def _torn(torn: pl.DataFrame, rows: pl.DataFrame, files: list[File]) -> str:
    """What to say of windows that go on from none of their user, where each must."""
    at = torn[AT].min()
    assert isinstance(at, int)
    user, history = torn.filter(pl.col(AT) == at).select("@user", "@history").row(0)
    earlier = rows.filter((pl.col("@user") == user) & (pl.col(AT) < at))
    wanted = [*earlier["@history"][-1], earlier["@item"][-1]]
    file = file_of(files, at)
    return (
        f"{file.place(at)}, column {file.names['history']!r}: the list ends with "
        f"{' '.join(history[-3:]) or 'nothing'!r}, wanted {' '.join(wanted[-3:])!r}, the end of the "
        f"row before of user {user!r} ({torn.height - 1} more such rows); mend the order of the rows, or set "
        "source.events.windows: begin, which makes another user of what follows"
    )


def _with_ids(
    frame: pl.DataFrame, column: str, named_by: Mapping[int, str], config: SourceConfig, items: pl.DataFrame
) -> pl.DataFrame:
    """The frame with ids in place of names in a column of texts, or of lists of them."""
    if not isinstance(frame.schema[column], pl.List):
        return frame.with_columns(_ids(frame.select(AT, column), named_by, config, items))
    long = frame.select(AT, column).filter(pl.col(column).list.len() > 0).explode(column)
    lists = long.with_columns(_ids(long, named_by, config, items)).group_by(AT).agg(column)
    return frame.drop(column).join(lists, on=AT, how="left", maintain_order="left")


def _ids(
    named: pl.DataFrame, named_by: Mapping[int, str], config: SourceConfig, items: pl.DataFrame
) -> pl.Series:
    """Ids of the items that the second column names, by the file that the first one says.

    A name that no item has stays what it is, with the column before it, so that it is no id by chance.

    Raises:
        ValueError: a name is that of several items.
    """
    column = named.columns[1]
    texts = named[column]
    if config.items.aliases:
        texts = texts.replace(dict(config.items.aliases))
    number = named[AT] // (1 << SHIFT)
    for name in sorted(set(named_by.values()) - {"", config.items.item}):
        own = "title" if name == config.items.title else name
        if own not in items.columns:
            raise ValueError(
                f"source.events.named_by={name!r} is no column of {config.items.path}, wanted one of "
                f"{', '.join(items.columns)}"
            )
        catalog = items.select(pl.col("item"), name=parse.clean(pl.col(own))).drop_nulls()
        chosen = number.is_in([of_file for of_file, by in named_by.items() if by == name])
        names = pl.DataFrame({"text": texts, "chosen": chosen})
        names = names.with_columns(pl.when("chosen").then(parse.clean(pl.col("text"))).alias("name"))
        shared = catalog.filter(pl.col("name").is_duplicated())
        several = shared.filter(pl.col("name").is_in(names["name"].unique().implode()))
        if several.height:
            raise ValueError(
                f"{config.items.path}, column {name!r}: {several['name'][0]!r} is the name of "
                f"{several.filter(pl.col('name') == several['name'][0]).height} items, wanted one, as "
                "source.events.named_by names them so"
            )
        found = names.join(catalog, on="name", how="left", maintain_order="left")
        missing = pl.format("{} {}", pl.lit(name), pl.col("name"))
        by_name = pl.coalesce(pl.col("item"), pl.when(pl.col("name").is_not_null()).then(missing))
        texts = found.select(pl.when("chosen").then(by_name).otherwise(pl.col("text"))).to_series()
    return texts.alias(column)


def _checked_candidates(
    frame: pl.DataFrame, config: SourceConfig, items: pl.DataFrame, files: list[File]
) -> pl.DataFrame:
    """The frame, whose lists of candidates are null where there is none.

    Raises:
        ValueError: the first list that lacks its row's item, holds one twice, or one that is none of the
            catalog; or lists of different lengths.
    """
    has_list = pl.col("@candidates").list.len() > 0
    frame = frame.with_columns(pl.when(has_list).then(pl.col("@candidates")))
    long = frame.with_row_index("event").filter(has_list).select(AT, "event", "@item", "@candidates")
    if not long.height:
        return frame
    length = long["@candidates"].list.len().to_list()[0]
    long = long.explode("@candidates")
    candidate = pl.col("@candidates")
    is_unknown = ~candidate.is_in(items["item"].implode())
    lists = long.group_by("event", maintain_order=True).agg(
        pl.col(AT).first(),
        own=(candidate == pl.col("@item")).any(),
        twice=candidate.is_duplicated().any(),
        unknown=candidate.filter(is_unknown).first(),
        length=pl.len(),
    )
    causes = [
        ("unknown", pl.col("unknown").is_not_null(), f"items of {config.items.path}"),
        ("own", ~pl.col("own"), "the row's own item among them"),
        ("twice", pl.col("twice"), "each of them once"),
        ("length", pl.col("length") != length, f"{length} items, as in the first list"),
    ]
    for name, condition, wanted in causes:
        faulty = lists.filter(condition)
        if faulty.height:
            at = faulty[AT][0]
            file = file_of(files, at)
            found = {"unknown": faulty["unknown"][0], "length": faulty["length"][0]}.get(name)
            shown = "" if found is None else f"{found!r} in "
            raise ValueError(
                f"{file.place(at)}, column {file.names['candidates']!r}: found {shown}a list of candidates, "
                f"wanted {wanted} ({faulty.height - 1} more such rows); mend the row"
            )
    return frame


def _apart(frame: pl.DataFrame, files: list[File]) -> list[File]:
    """The files again, each with its rows of the frame, numbered anew."""
    apart: list[File] = []
    number = frame[AT] // (1 << SHIFT)
    for place, file in enumerate(files):
        own = frame.filter(number == place)
        row = (own[AT] % (1 << SHIFT)).to_numpy()
        own = own.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias(AT) + (place << SHIFT))
        names = dict(file.names)
        if "history" in names:
            names["item"] = f"{names['history']}, {names['item']}"
        apart.append(_Lists(file.display_name, own.height, names, own.lazy(), file.delimited, row))
    return apart
