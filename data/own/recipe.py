"""A data set of one's own: files, as `source` in conf/dataset/<name>.yaml describes them, to tables."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from recllm.console import say
from recllm.pipeline import run
from recllm.tables import canonical, faults, joins, parse, sequences, stored_events
from recllm.tables.config import (
    ISO,
    TIME_UNITS,
    EventsSource,
    ItemsSource,
    LabelSource,
    SourceConfig,
    UsersSource,
)
from recllm.tables.faults import FAULT, Fault
from recllm.tables.readers import AT, File, open_files
from recllm.tables.stored_events import STORED_LABEL

RESERVED = ("item", "user", "title", "external")  # names that the tables use themselves


def make(out: Path, raw: Path | None, config: SourceConfig) -> dict[str, int | float]:
    """Writes the tables of a data set of one's own; docs/own-data.md tells what is taken and what is not.

    Args:
        out: folder of the tables, e.g. `artifacts/corner-shop/tables`.
        raw: folder that relative paths start at; None: the working directory.
        config: where the files lie and what they hold.

    Returns:
        Counts of what was read, of what was left out by reason, and of what was written.

    Raises:
        ValueError: one line that names file, line or column, what was found and what was wanted.
    """
    if not config.given:
        raise ValueError("source.events.path is empty, wanted the file of the events; see docs/own-data.md")
    if raw is not None and not raw.is_dir():
        raise ValueError(f"RAW={raw} is no folder, wanted the one that the paths under source start at")
    parse.check_format(config.events.time_unit)
    base = raw or Path()
    drop = config.faulty == "drop"
    with canonical.staging(out) as scratch:
        items, counts = _items(config.items, base, scratch, drop)
        items.write_parquet(scratch / "items.parquet")
        counts |= _events(config, base, scratch, items, drop)
        events = pl.scan_parquet(scratch / "events.parquet")
        met = events.group_by("user").agg(events=pl.len()).collect(engine="streaming").sort("user")
        users, user_counts = _users(config.users, base, scratch, met, drop)
        users.write_parquet(scratch / "users.parquet")
        label = pl.col("label")
        rows, unlabeled, lowest, highest = (
            events.select(pl.len(), label.null_count(), low=label.min(), high=label.max()).collect().row(0)
        )
        if lowest is not None and lowest == highest and config.label.rule != "clicks":
            raise ValueError(
                f"{config.events.name}: all {rows - unlabeled} labels are {lowest}, wanted both 0 and 1; "
                "change what source.label says is liked"
            )
        counts |= user_counts | {"events": rows, "events_without_label": unlabeled}
    return dict(counts | {"items": items.height, "users": users.height})


def _items(source: ItemsSource, base: Path, scratch: Path, drop: bool) -> tuple[pl.DataFrame, dict[str, int]]:
    roles = {"item": ("source.items.item", source.item), "title": ("source.items.title", source.title)}
    files = open_files("items", source, base, roles, scratch, rest=True, drop=drop)
    frame = _attributes("items", files, dict.fromkeys(source.lists, source.list_separator))
    if not source.title:
        frame = frame.with_columns(title=pl.lit(None, pl.String))
    if source.untitled:
        named = pl.format(
            source.untitled.replace("{item}", "{}"), *["item"] * source.untitled.count("{item}")
        )
        frame = frame.with_columns(pl.col("title").fill_null(named))
    no_title = pl.col("title").is_null()
    wanted = "a title, or source.items.untitled to make one of, e.g. 'Item {item}'"
    return _once("items", frame, files, [Fault("no_title", "title", no_title, wanted)], drop)


def _users(
    source: UsersSource, base: Path, scratch: Path, met: pl.DataFrame, drop: bool
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The users of the file and, without attributes, the others that have events.

    Args:
        source: the file, if there is one.
        base: where its path starts.
        scratch: a folder for copies.
        met: the users that have events, ascending, and how many.
        drop: whether faulty rows are left out.

    Raises:
        ValueError: the file is at fault, or has none of the users that have events.
    """
    if not source.path:
        return met.select("user"), {}
    files = open_files(
        "users", source, base, {"user": ("source.users.user", source.user)}, scratch, rest=True, drop=drop
    )
    users, counts = _once("users", _attributes("users", files, {}), files, [], drop)
    strangers = met.join(users, on="user", how="anti", maintain_order="left")
    if strangers.height:
        _tell_strangers(strangers, met, users["user"], f"{source.path}, column {source.user!r}")
    users = pl.concat([users, strangers.select("user")], how="diagonal")
    return users, counts | {"users_without_attributes": strangers.height}


def _tell_strangers(strangers: pl.DataFrame, met: pl.DataFrame, users: pl.Series, place: str) -> None:
    """Says how many users of the events are not in the users file, which has `users`.

    Raises:
        ValueError: all of them.
    """
    others = users.filter(~users.is_in(met["user"].implode()))
    example = f"{strangers['user'][0]!r}, in the file {(others if len(others) else users)[0]!r}"
    hint = joins.unlike(strangers["user"], users)
    if strangers.height == met.height:
        raise ValueError(
            f"{place}: none of the {met.height:,} users of the events is there, wanted the same ids; in the "
            f"events {example}{hint}; write them alike, or leave the file out with source.users.path: ''"
        )
    share = int(strangers["events"].sum()) / int(met["events"].sum())
    say(
        f"{place}: {strangers.height:,} of {met.height:,} users, with {share:.1%} of the events, are not "
        f"there and have no attributes; in the events {example}{hint}"
    )


def _attributes(table: str, files: list[File], lists: dict[str, str]) -> pl.LazyFrame:
    """Place, id, title and every other column of items or users."""
    frames = []
    left_out: dict[str, str] = {}
    for file in files:
        schema = file.frame.collect_schema()
        if missing := [column for column in lists if column not in schema]:
            others = ", ".join(column for column in schema if not column.startswith("@"))
            raise ValueError(
                f"{file.display_name} has other columns {others}, wanted {missing[0]!r} "
                f"(source.{table}.lists)"
            )
        chosen = [pl.col(AT)]
        for column, dtype in schema.items():
            if column in ("@item", "@user"):
                chosen.append(parse.text(column, dtype).alias(column[1:]))
            elif column == "@title":
                chosen.append(parse.clean(pl.col(column)).alias("title"))
            elif column in RESERVED:
                left_out[column] = "the name has another meaning; rename it"
            elif column != AT:
                values = parse.attribute(column, dtype, lists.get(column))
                chosen += values
                if not values:
                    left_out[column] = f"it holds {dtype}"
        frames.append(file.frame.select(chosen))
    for column, reason in left_out.items():
        say(f"{table}: column {column!r} of {files[0].display_name} is left out: {reason}")
    return pl.concat(frames, how="diagonal_relaxed")


def _once(
    table: str, frame: pl.LazyFrame, files: list[File], others: Sequence[Fault], drop: bool
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Items or users with one row an id: like rows are one, different ones of the same id are faults."""
    key = table.removesuffix("s")
    values = pl.exclude(AT)
    usable = ~pl.any_horizontal(pl.col(key).is_null(), *(fault.condition for fault in others))
    causes = [
        Fault("no_id", key, pl.col(key).is_null(), "an id"),
        *others,
        Fault(
            "second_row_of_an_id",
            key,
            usable.cum_sum().over(key) > 1,
            "one row an id; an earlier row differs",
        ),
    ]
    repeated = ~pl.struct(values).is_first_distinct()
    flagged = faults.flag(frame, causes, pl.all_horizontal(values.is_null()), repeated).collect()
    counts = faults.settle(table, files, causes, faults.summarize(flagged.lazy()).collect(), drop)
    return flagged.filter(pl.col(FAULT) == 0).drop(AT, FAULT), counts


def _events(
    config: SourceConfig, base: Path, scratch: Path, catalog_items: pl.DataFrame, drop: bool
) -> dict[str, int]:
    """Writes events.parquet, in the files' order and then the store's; counts what is read and left out."""
    source = config.events
    label = config.label
    items = catalog_items["item"]
    files: list[File] = []
    lists: dict[str, int] = {}
    if source.path:
        files, lists = sequences.open_events(config, base, scratch, catalog_items)
    frames = [_typed(file, source) for file in files]
    if source.store:
        stored = stored_events.open_stored(config, scratch, len(files))
        frames.append(_typed(stored, stored_events.as_stored(source)))
        files.append(stored)
        lists["stored_events"] = stored.rows
    causes = _causes(config, items)
    catalog = pl.LazyFrame({"item": items, "@in_catalog": pl.repeat(True, len(items), eager=True)})
    frame = pl.concat(frames, how="diagonal")
    frame = frame.join(catalog, on="item", how="left", maintain_order="left")
    empty = pl.all_horizontal(
        pl.col("user", "item", "@label").is_null(), ~pl.col("@rated"), ~pl.col("@timed")
    )
    frame = faults.flag(frame, causes, empty)
    good = _with_given(frame.filter(pl.col(FAULT) == 0).with_columns(label=_label(label)), config)
    queries = [canonical.sink(good, scratch), faults.summarize(frame)]
    _, summary = pl.collect_all(queries, engine="streaming")
    misses = _unknown_items(config, files, causes, summary, items)
    counts = faults.settle("events", files, causes, summary, drop, explanation=misses)
    if misses:
        say(misses)
    latest = pl.scan_parquet(scratch / "events.parquet").select(pl.col("timestamp").max()).collect().item()
    if TIME_UNITS.get(source.time_unit, 1) > 1 and latest is not None and latest < parse.EARLIEST_CLOCK:
        raise ValueError(
            f"{files[0].display_name}, column {source.timestamp!r}: the latest time is of "
            f"{datetime.fromtimestamp(latest, UTC):%Y}, wanted {source.time_unit} since 1970; "
            "it looks like source.events.time_unit: seconds"
        )
    return counts | lists


def _with_given(good: pl.LazyFrame, config: SourceConfig) -> pl.LazyFrame:
    """Good events with what files say beside their own columns: who is history only, splits, candidates."""
    columns = good.collect_schema().names()
    if "@history" in columns:
        good = good.with_columns(label=pl.when(~pl.col("@history")).then(pl.col("label")))
    if "@split" in columns:
        texts = canonical.SPLITS if config.valid.path else config.events.split_texts
        codes = dict(zip(texts, range(len(texts)), strict=True))
        split = pl.col("@split").replace_strict(codes, default=None, return_dtype=pl.Int8)
        good = good.with_columns(split=split)
    if STORED_LABEL in columns:
        stored = pl.col(STORED_LABEL)
        label = pl.coalesce(stored, "label")
        if config.label.rule == "clicks":  # which know no dislike
            label = pl.when(stored.fill_null(1) == 1).then(label)
        good = good.with_columns(label=label)
    if "@candidates" in columns:
        good = good.rename({"@candidates": "candidates"})
    return good


def _typed(file: File, source: EventsSource) -> pl.LazyFrame:
    """The events of one file, typed; `@rated`, `@timed`: whether there is anything; `@rating`: unrounded."""
    schema = file.frame.collect_schema()

    def text(role: str) -> pl.Expr:
        column = f"@{role}"
        return parse.text(column, schema[column]) if column in schema else pl.lit(None, pl.String)

    stars = pl.lit(None, pl.Float64)
    moment = pl.lit(None, pl.Int64)
    if "@rating" in schema:
        stars = parse.number("@rating", schema["@rating"], source.decimal_comma)
    if "@timestamp" in schema:
        moment = parse.seconds("@timestamp", schema["@timestamp"], source.time_unit)
    rating = stars if source.not_rated is None else pl.when(stars != source.not_rated).then(stars)
    if source.rating_step:
        rating = (rating / source.rating_step).round() * source.rating_step
    rated = text("rating").is_not_null()
    if source.not_rated is not None:
        rated = rated & (stars.is_null() | (stars != source.not_rated))
    beside = {
        column: pl.col(column) for column in ("@history", "@candidates", STORED_LABEL) if column in schema
    }
    if "@split" in schema:
        beside["@split"] = text("split")
    return file.frame.select(
        AT,
        user=text("user"),
        item=text("item"),
        rating=rating,
        timestamp=moment,
        **{
            "@rated": rated,
            "@rating": stars,
            "@timed": text("timestamp").is_not_null(),
            "@label": text("label"),
            **beside,
        },
    )


def _unknown_items(
    config: SourceConfig, files: list[File], causes: list[Fault], summary: pl.DataFrame, items: pl.Series
) -> str:
    """In words that most events are of no item of the items file, which has `items`; else nothing."""
    code = 1 + next(number for number, fault in enumerate(causes) if fault.reason == "unknown_item")
    rows = dict(summary.select(FAULT, "rows").iter_rows())
    total = sum(file.rows for file in files) - rows.get(faults.EMPTY, 0)
    if 2 * rows.get(code, 0) <= total:
        return ""
    first = summary.filter(pl.col(FAULT) == code)["first"][0]
    value = str(faults.file_of(files, first).value(first, "item"))
    return (
        f"{config.events.name}, column {config.events.item!r}: {rows[code]:,} of {total:,} events "
        f"({rows[code] / total:.1%}) are of no item of {config.items.path}: in the events {value!r}, there "
        f"{items[0]!r}{joins.unlike(pl.Series([value]), items)}"
    )


def _causes(config: SourceConfig, items: pl.Series) -> list[Fault]:
    """Why an event cannot be used, in the order in which it is asked; `items` are those of the catalog."""
    source = config.events
    label = config.label
    rated = pl.col("@rated")
    stars = pl.col("@rating")
    moment = pl.col("timestamp")
    causes = [
        Fault("no_user", "user", pl.col("user").is_null(), "an id"),
        Fault("no_item", "item", pl.col("item").is_null(), "an id"),
        Fault(
            "unknown_item",
            "item",
            pl.col("@in_catalog").is_null(),
            lambda value: f"an item of {config.items.path}{joins.unlike(pl.Series([value]), items)}",
        ),
    ]
    if source.rating:
        low, high = source.rating_scale
        wanted = f"a number from {low:g} to {high:g} (source.events.rating_scale), or nothing if not rated"
        causes += [
            Fault("rating_no_number", "rating", rated & stars.is_null(), wanted),
            Fault("rating_not_finite", "rating", rated & ~stars.is_finite(), wanted),
            Fault("rating_out_of_scale", "rating", rated & ~stars.is_between(low, high), wanted),
        ]
    if label.rule == "column":
        text = pl.col("@label")
        texts = [*label.liked, *label.disliked, *label.history]
        wanted = f"one of {', '.join(map(str, texts))} (source.label: liked, disliked, history), or nothing"
        causes.append(Fault("label_unknown", "label", text.is_not_null() & ~text.is_in(texts), wanted))
    if source.split:
        text = pl.col("@split")
        wanted = f"one of {', '.join(source.split_texts)} (source.events.split_texts), or nothing"
        is_unknown = text.is_not_null() & ~text.is_in(source.split_texts)
        causes.append(Fault("split_unknown", "split", is_unknown, wanted))
    if source.timestamp:
        unit = source.time_unit
        causes += [
            Fault("no_time", "timestamp", ~pl.col("@timed"), f"a time ({unit})"),
            Fault("time_unreadable", "timestamp", moment.is_null(), lambda value: _readable(value, unit)),
            Fault(
                "time_out_of_range",
                "timestamp",
                ~moment.is_between(0, parse.LATEST - 1),
                lambda value: _in_range(value, unit),
            ),
        ]
    return causes


def _readable(value: object, unit: str) -> str:
    """What is wanted of a time that cannot be read, with the unit that it seems to have."""
    if unit in TIME_UNITS:
        wanted = f"{unit} since 1970"
    elif unit == ISO:
        wanted = "a time such as 2024-03-01T12:00:00Z"
    else:
        wanted = f"a time of the form {unit}"
    looks_like = ""
    if _as_number(value) is not None:
        looks_like = "seconds or milliseconds"
    elif "-" in str(value):
        looks_like = "iso"
    if looks_like in ("", unit):
        return wanted
    return f"{wanted}; it looks like source.events.time_unit: {looks_like}"


def _in_range(value: object, unit: str) -> str:
    wanted = "a time from 1970 to 2100"
    number = _as_number(value)
    if number is None or number < 0 or unit not in TIME_UNITS:
        return wanted
    wanted = f"{wanted} in {unit}"
    fitting = [name for name, parts in TIME_UNITS.items() if number / parts < parse.LATEST]
    return f"{wanted}; it looks like source.events.time_unit: {fitting[0]}" if fitting else wanted


def _as_number(value: object) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None


def _label(label: LabelSource) -> pl.Expr:
    """1 liked, 0 not, null for an event that is history only."""
    if label.rule == "clicks":
        return pl.lit(1, pl.Int8)
    if label.rule == "rating":
        # The number of the file, not the level that it is rounded to.
        return pl.when(pl.col("@rated")).then(pl.col("@rating") > label.threshold).cast(pl.Int8)
    text = pl.col("@label")
    return pl.when(text.is_in(label.liked)).then(1).when(text.is_in(label.disliked)).then(0).cast(pl.Int8)


def work(task: run.Run) -> None:
    """Write the tables as a stage of the pipeline, and say what was left out."""
    counts = make(task.folder, task.raw, task.config.source)
    for table in ("events", "items", "users"):
        dropped = {name: rows for name, rows in counts.items() if name.startswith(f"dropped_{table}_")}
        reasons = ", ".join(
            f"{rows:,} {name.removeprefix(f'dropped_{table}_')}" for name, rows in dropped.items()
        )
        read = f", {counts[f'read_{table}']:,} rows read" if f"read_{table}" in counts else ""
        say(f"{counts[table]:,} {table}{read}; left out: {reasons or 'none'}")
    task.finish(task.folder.glob("*.parquet"), dict(counts))
