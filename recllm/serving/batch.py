"""Recommendations and scores of files: one line an input, errors in their own lines, resumable.

Input and output are Parquet, CSV or JSON lines, by the ending of their names. Inputs are read, answered and
written a part at a time, so that memory does not grow with their number. A part appears whole or not at all
in `<OUT>.parts/`; the same command, run again, goes on behind the last one, and at the end the parts become
one file. JSON lines hold one line an input, `{"input": ..., "output": [...], "error": null}`; tables hold a
line an item, with a column `error`, and one line without an item for an input that could not be answered.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time as clock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recllm.files import digest, publish, write_json
from recllm.serving.recommender import Asked, OnUnknown, Recommender, Time, second_of

PART = 10_000
"""Inputs of a part."""
ENDINGS = (".parquet", ".csv", ".jsonl")
FACTS = "parts.json"


@dataclass(frozen=True)
class Options:
    """What is asked of all inputs; as of `Recommender.recommend`."""

    k: int = 10
    filter_viewed: bool = True
    items_to_recommend: list[Any] | None = None
    exclude: list[Any] | None = None
    time: Time | None = None
    on_unknown: OnUnknown = "popular"


@dataclass(frozen=True)
class Part:
    """Some inputs that stand side by side.

    Attributes:
        table: `user`, and `item` where pairs are asked about; `time` in seconds where there are times.
        problems: place -> why an input cannot be answered.
        histories: events of JSON lines, as of `Recommender.recommend`, with `query`, their input's place.
        given: the inputs themselves, to be repeated beside their answers; of tables None.
    """

    table: pl.DataFrame
    problems: dict[int, str] = field(default_factory=dict)
    histories: pl.DataFrame | None = None
    given: list[Any] | None = None


def recommend_file(
    recommender: Recommender,
    users: Path,
    out: Path,
    options: Options,
    histories: Path | None = None,
    on_progress: Callable[[str], None] = print,
    part_size: int = PART,
) -> int:
    """Recommend to the users of a file; returns how many could not be answered.

    Args:
        recommender: answers.
        users: a column `user`, and `time` where each has his own; JSON lines may bring `history`, a list of
            events.
        out: what is written.
        options: asked of all users.
        histories: events of users, as of `Recommender.recommend`; None: none.
        on_progress: is told how far it is.
        part_size: inputs of a part.

    Raises:
        ValueError: an option or a file cannot be used at all, in a line.
        OSError: nothing can be written any more; parts that are done stay.
    """
    empty = Asked(pl.Series("user", [], dtype=pl.String), None, None, {})
    recommender.check_k(options.k)
    recommender.filters(empty, True, options.items_to_recommend, options.exclude)

    def answer(part: Part) -> tuple[pl.DataFrame, dict[int, str]]:
        asked = _asked(recommender, part, options.time, histories)
        filters = recommender.filters(
            asked, options.filter_viewed, options.items_to_recommend, options.exclude
        )
        tables = []
        for of_lines, table in recommender.blocks(asked, options.k, filters, options.on_unknown):
            tables.append(table.with_columns(query=pl.Series(of_lines, dtype=pl.Int64)))
        return pl.concat(tables), asked.problems

    return _answer_file(
        users, out, ("user",), options, recommender, histories, answer, on_progress, part_size
    )


def score_file(
    recommender: Recommender,
    pairs: Path,
    out: Path,
    time: Time | None = None,
    histories: Path | None = None,
    on_progress: Callable[[str], None] = print,
    part_size: int = PART,
) -> int:
    """Score the pairs of a file; arguments, errors and result as of `recommend_file`.

    An item that the log does not know is an error of its own line.
    """

    def answer(part: Part) -> tuple[pl.DataFrame, dict[int, str]]:
        asked = _asked(recommender, part, time, histories)
        names = part.table["item"]
        items = recommender.maker.items.dense(names)
        for place in np.flatnonzero(items < 2).tolist():
            asked.problems.setdefault(
                place, f"item {names[place]!r} is not in the log; wanted one of its items"
            )
        tables = []
        for of_lines, table in recommender.score_blocks(asked, names, items):
            tables.append(table.with_columns(query=pl.Series(of_lines, dtype=pl.Int64)))
        answered = pl.concat(tables)
        return answered.filter(~pl.col("query").is_in(list(asked.problems))), asked.problems

    options = Options(time=time)
    wanted = ("user", "item")
    return _answer_file(pairs, out, wanted, options, recommender, histories, answer, on_progress, part_size)


def _asked(recommender: Recommender, part: Part, time: Time | None, histories: Path | None) -> Asked:
    """What a part asks; problems of its inputs are told beside it."""
    own = part.histories
    problems = dict(part.problems)
    if histories is not None:
        if own is not None:
            wanted = "the line has a history, and a file of histories is given; wanted one of the two"
            for place in own["query"].unique().to_list():
                problems.setdefault(place, wanted)
        users = part.table["user"]
        events = scan(histories)
        names = pl.LazyFrame({"user": users.cast(pl.String)}).unique()
        events = events.with_columns(pl.col("user").cast(pl.String))
        with reading(histories):
            own = events.join(names, on="user", how="semi").collect()
    table = part.table
    if time is not None and "time" in table.columns:
        raise ValueError("time is given, and a column time as well; wanted one of the two")
    if own is not None and "query" in own.columns:
        asked = recommender.ask(table, time, None, distinct=False)
        asked = Asked(asked.users, asked.seconds, own.sort("query", maintain_order=True), asked.problems)
    else:
        asked = recommender.ask(table, time, own, distinct=False)
    asked.problems.update(problems)
    return asked


def _answer_file(
    source: Path,
    out: Path,
    columns: tuple[str, ...],
    options: Options,
    recommender: Recommender,
    histories: Path | None,
    answer: Callable[[Part], tuple[pl.DataFrame, dict[int, str]]],
    on_progress: Callable[[str], None],
    part_size: int,
) -> int:
    """Answer a file part by part, each of which is written before the next one is read."""
    for path in (source, *([histories] if histories else [])):
        if not path.is_file():
            raise ValueError(f"{path} is not there; wanted a file with {', '.join(columns)}")
    for path in (source, out):
        if path.suffix not in ENDINGS:
            raise ValueError(f"{path} ends with {path.suffix!r}; wanted one of {', '.join(ENDINGS)}")
    total = count_inputs(source)
    if not total:
        raise ValueError(f"{source} has no line to answer; wanted one with {', '.join(columns)}")
    folder = out.with_name(f"{out.name}.parts")
    read = [_stamp(path) for path in (source, histories) if path is not None]
    facts = {"made_of": digest([recommender.version, columns, vars(options), read, part_size])}
    failed = _resume(folder, facts)
    recommender.counts.clear()
    start = clock.monotonic()
    done = answered = sum(part["inputs"] for part in failed.values())
    for number, part in enumerate(_parts(source, columns, part_size)):
        if number in failed:
            continue
        table, problems = answer(part)
        path = folder / f"part-{number:06d}{out.suffix}"
        _write(path, table, problems, part)
        count = part.table.height
        failed[number] = {"inputs": count, "errors": len(problems)}
        write_json(folder / FACTS, {**facts, "parts": {str(key): value for key, value in failed.items()}})
        done += count
        seconds = clock.monotonic() - start
        left = seconds / max(1, done - answered) * (total - done)
        on_progress(
            f"{done:,} of {total:,} inputs, {(done - answered) / seconds:.3g} a second, {left:.0f} s left"
        )
    errors = sum(part["errors"] for part in failed.values())
    _join(folder, out, len(failed))
    on_progress(f"{out}: {total:,} inputs, {errors:,} of them with an error in their line")
    return errors


def _resume(folder: Path, facts: dict[str, str]) -> dict[int, dict[str, int]]:
    """Parts that an earlier run of the same command left; those of another one are removed."""
    path = folder / FACTS
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["made_of"] == facts["made_of"]:
            return {int(number): part for number, part in before["parts"].items()}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return {}


def _stamp(path: Path) -> list[Any]:
    """What tells a file from another one without reading it."""
    facts = path.stat()
    return [path.name, facts.st_size, facts.st_mtime_ns]


# ---- reading


def scan(path: Path) -> pl.LazyFrame:
    """A table of events or users; of CSV everything is text, as ids may be."""
    if path.suffix == ".parquet":
        return pl.scan_parquet(path)
    if path.suffix == ".csv":
        return pl.scan_csv(path, infer_schema=False)
    if path.suffix == ".jsonl":
        return pl.scan_ndjson(path)
    raise ValueError(f"{path} ends with {path.suffix!r}; wanted one of {', '.join(ENDINGS)}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tell which file cannot be read.

    Raises:
        ValueError: within, a file's content is not what its name says.
    """
    try:
        yield
    except pl.exceptions.PolarsError as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read ({why}); wanted a whole {path.suffix} file") from error


def count_inputs(path: Path) -> int:
    """Lines of a table, or of JSON."""
    if path.suffix == ".jsonl":
        with path.open("rb") as stream:
            return sum(1 for line in stream if line.strip())
    with reading(path):
        return int(scan(path).select(pl.len()).collect().item())


def _parts(path: Path, columns: tuple[str, ...], size: int) -> Iterator[Part]:
    """The inputs of a file; of users who stand there more than once all but the first have a problem."""
    if path.suffix == ".jsonl":
        yield from _json_parts(path, columns, size)
        return
    table = scan(path)
    names = table.collect_schema().names()
    for name in columns:
        if name not in names:
            raise ValueError(f"{path} has columns {', '.join(names)}; wanted one named {name}")
    wanted = [*columns, "time"] if "time" in names else list(columns)
    table = table.select(wanted)
    repeated = np.zeros(0, np.bool_)
    if columns == ("user",):
        repeated = ~table.select(pl.col("user").is_first_distinct()).collect()["user"].to_numpy()
    for low in itertools.count(0, size):
        part = table.slice(low, size).collect()
        if not part.height:
            return
        part, problems = _with_seconds(part)
        for place in np.flatnonzero(repeated[low : low + size]).tolist():
            problems[place] = "the user stands there more than once; wanted each once"
        yield Part(part, problems)


def _with_seconds(table: pl.DataFrame) -> tuple[pl.DataFrame, dict[int, str]]:
    """The table with times as seconds; a time that cannot be read is a problem of its own line."""
    if "time" not in table.columns:
        return table, {}
    problems = {}
    seconds: list[int | None] = []
    for place, value in enumerate(table["time"].to_list()):
        try:
            seconds.append(None if value is None or value == "" else second_of(value))
        except ValueError as error:
            seconds.append(None)
            problems[place] = str(error)
    return table.with_columns(time=pl.Series(seconds, dtype=pl.Int64)), problems


def _json_parts(path: Path, columns: tuple[str, ...], size: int) -> Iterator[Part]:
    seen: set[str] = set()
    with path.open(encoding="utf-8") as stream:
        lines = (line for line in stream if line.strip())
        while chunk := list(itertools.islice(lines, size)):
            yield _json_part(chunk, columns, seen)


def _json_part(lines: list[str], columns: tuple[str, ...], seen: set[str]) -> Part:
    """Inputs of JSON lines; a line that is none, or lacks something, is a problem of its own."""
    problems: dict[int, str] = {}
    given: list[Any] = []
    values: dict[str, list[str | None]] = {name: [] for name in columns}
    times: list[Any] = []
    events: list[dict[str, Any]] = []
    for place, line in enumerate(lines):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            content = line.rstrip("\n")
            problems[place] = f"the line is no JSON ({error})"
        given.append(content)
        asks = content if isinstance(content, dict) else {}
        if place not in problems and not isinstance(content, dict):
            problems[place] = 'the line is no JSON object; wanted e.g. {"user": 1}'
        for name in columns:
            value = asks.get(name)
            if value is None or isinstance(value, dict | list):
                problems.setdefault(place, f"the line has no {name}; wanted one")
                value = None
            values[name].append(None if value is None else str(value))
        user = values["user"][-1]
        if columns == ("user",) and user is not None:
            if user in seen:
                problems.setdefault(place, "the user stands there more than once; wanted each once")
            seen.add(user)
        times.append(asks.get("time"))
        events += _json_events(asks.get("history"), place, problems)
    table = pl.DataFrame({name: pl.Series(column, dtype=pl.String) for name, column in values.items()})
    if any(time is not None for time in times):
        timed, late = _with_seconds(table.with_columns(time=pl.Series(times, dtype=pl.Object)))
        table = timed
        problems.update(late)
    histories = None
    if events:
        schema = {"query": pl.Int64, "item": pl.String, "rating": pl.Float64, "label": pl.Int8}
        histories = pl.DataFrame(events, schema={**schema, "timestamp": pl.Int64})
    return Part(table, problems, histories, given)


def _json_events(history: Any, place: int, problems: dict[int, str]) -> list[dict[str, Any]]:
    """Events of one input; items alone, or objects with `item`, `rating`, `label` and `timestamp`."""
    if history is None:
        return []
    if not isinstance(history, list):
        problems.setdefault(place, "history is no list; wanted a list of events")
        return []
    events = []
    for event in history:
        content = event if isinstance(event, dict) else {"item": event}
        try:
            rating = content.get("rating")
            label = content.get("label")
            at = content.get("timestamp")
            events.append(
                {
                    "query": place,
                    "item": str(content["item"]),
                    "rating": None if rating is None else float(rating),
                    "label": None if label is None else int(bool(label)),
                    "timestamp": None if at is None else second_of(at),
                }
            )
        except (KeyError, TypeError, ValueError, OverflowError):  # the last: more digits than a float has
            problems.setdefault(place, f"event {json.dumps(event)} of the history cannot be read")
            return []
    return events


# ---- writing


def _write(path: Path, table: pl.DataFrame, problems: dict[int, str], part: Part) -> None:
    """Write the answers of a part, in the order of its inputs."""
    if path.suffix == ".jsonl":
        with publish(path) as temporary:
            temporary.write_text("".join(_json_lines(table, problems, part)), encoding="utf-8")
        return
    lines = table.with_columns(error=pl.lit(None, pl.String))
    if problems:
        places = sorted(problems)
        names = [name for name in ("user", "item") if name in part.table.columns]
        errors = part.table.select(names)[places].with_columns(
            error=pl.Series([problems[place] for place in places], dtype=pl.String),
            query=pl.Series(places, dtype=pl.Int64),
        )
        errors = errors.with_columns(pl.col(name).cast(lines.schema[name], strict=False) for name in names)
        lines = pl.concat([lines, errors], how="diagonal").sort("query", maintain_order=True)
    lines = lines.drop("query")
    with publish(path) as temporary:
        if path.suffix == ".csv":
            lines.write_csv(temporary)
        else:
            lines.write_parquet(temporary)


def _json_lines(table: pl.DataFrame, problems: dict[int, str], part: Part) -> Iterator[str]:
    """A line for each input: itself, what is recommended or its score, its error."""
    height = part.table.height
    given = part.given
    if given is None:
        given = part.table.to_dicts()
    answers = table.drop("query", "user").to_dicts()
    bounds = np.searchsorted(table["query"].to_numpy(), np.arange(height + 1))
    for place in range(height):
        output = answers[bounds[place] : bounds[place + 1]]
        line = {
            "input": given[place],
            "output": None if place in problems else output,
            "error": problems.get(place),
        }
        yield json.dumps(line, ensure_ascii=False, default=str) + "\n"


def _join(folder: Path, out: Path, count: int) -> None:
    """Make one file of all parts, and remove them."""
    parts = [folder / f"part-{number:06d}{out.suffix}" for number in range(count)]
    with publish(out) as temporary:
        if out.suffix == ".parquet" and parts:
            pl.scan_parquet(parts, missing_columns="insert").sink_parquet(temporary)
        else:
            with temporary.open("wb") as stream:
                for number, part in enumerate(parts):
                    with part.open("rb") as lines:
                        if number and out.suffix == ".csv":
                            lines.readline()
                        shutil.copyfileobj(lines, stream)
    shutil.rmtree(folder)
