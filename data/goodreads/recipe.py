"""GoodReads (UCSD Book Graph): gzipped JSON lines to canonical tables, streamed.

What is kept, dropped and counted, and why, is in README.md beside this file.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recllm.console import say
from recllm.pipeline import run
from recllm.tables import archive, canonical, download, jsonl, parse

URL = "https://mcauleylab.ucsd.edu/public_datasets/gdrive/goodreads/"
TERMS = (
    "for academic use only, no redistribution, no commercial use; cite Wan and McAuley (RecSys 2018) and "
    "Wan et al. (ACL 2019): https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html"
)
# subset: books, interactions, reviews, as published
COUNTS = {
    "all": (2_360_655, 228_648_342, 15_739_967),
    "children": (124_082, 10_059_349, 734_640),
    "comics_graphic": (89_411, 7_347_630, 542_338),
    "fantasy_paranormal": (258_585, 55_397_550, 3_424_641),
    "history_biography": (302_935, 31_479_229, 2_066_193),
    "mystery_thriller_crime": (219_235, 24_799_896, 1_849_236),
    "poetry": (36_514, 2_734_350, 154_555),
    "romance": (335_449, 42_792_856, 3_565_378),
    "young_adult": (93_398, 34_919_254, 2_389_900),
}
FEEDBACK = ("interactions", "reviews")
DROPPED = ("unread", "unrated", "no_id", "unknown_book", "no_time", "repeated")
GENRES = (
    "children",
    "comics, graphic",
    "fantasy, paranormal",
    "fiction",
    "history, historical fiction, biography",
    "mystery, thriller, crime",
    "non-fiction",
    "poetry",
    "romance",
    "young-adult",
)
# Shelves that tell what somebody does with a book, not what it is.
STATUS = (
    r"^(to-.*|currently-.*|read|read-.*|re-?reads?|.*own(ed)?|own(ed)?-.*|books?|books-i-.*|my-.*|favou?rites?.*"
    r"|wish-?list|default|library.*|.*library|kindle.*|e-?books?.*|audio-?books?.*|audible|\d{4}.*|abandoned|dnf"
    r"|did-not-.*|maybe|have)$"
)
DATE = "%a %b %d %H:%M:%S %z %Y"  # Wed Mar 22 11:37:04 -0700 2017
LIKED = 4
"""Stars from which on a book is liked, in the tables; `prepare.label_threshold` decides for the log."""
BUCKET = 1 << 27
"""Bytes of gzip whose events are looked through for repetitions at a time."""

EVENTS = {
    "user_id": pl.String(),
    "book_id": pl.String(),
    "is_read": pl.Boolean(),
    "rating": pl.Int64(),
    "date_added": pl.String(),
    "date_updated": pl.String(),
}
BOOKS = {
    "book_id": pl.String(),
    "work_id": pl.String(),
    "title": pl.String(),
    "title_without_series": pl.String(),
    "authors": pl.List(pl.Struct({"author_id": pl.String()})),
    "publisher": pl.String(),
    "format": pl.String(),
    "language_code": pl.String(),
    "series": pl.List(pl.String()),
    "publication_year": pl.String(),
    "num_pages": pl.String(),
    "popular_shelves": pl.List(pl.Struct({"name": pl.String()})),
}
AUTHORS = {"author_id": pl.String(), "name": pl.String()}
TAGS = {"book_id": pl.String(), "genres": pl.Struct({genre: pl.Int64() for genre in GENRES})}


@dataclass(frozen=True)
class RecipeConfig:
    """What the recipe may be told."""

    subset: str = "all"
    """A genre's own files, e.g. `poetry`; `all`: the whole."""
    feedback: str = FEEDBACK[0]
    """`interactions`: all shelves; `reviews`: only ratings that came with a review."""

    def __post_init__(self) -> None:
        """Check names."""
        for key, wanted in (("subset", tuple(COUNTS)), ("feedback", FEEDBACK)):
            if (got := getattr(self, key)) not in wanted:
                raise ValueError(
                    f"source.{key} is {got!r}, wanted one of {', '.join(wanted)}; ARGS=source.{key}=..."
                )


def make(out: Path, raw: Path | None = None, config: RecipeConfig = RecipeConfig()) -> dict[str, int | float]:
    """Writes the tables of GoodReads.

    Args:
        out: folder of the tables, e.g. `artifacts/goodreads/tables`; downloads go to `raw/` beside it.
        raw: folder or zip with the four files (README.md); None downloads them.
        config: see `RecipeConfig`.

    Returns:
        `interactions` or `reviews`: rows read; `books`, `users`, `events`; `dropped_events_...`: the rows
        dropped, each counted once: `unread`, `unrated`, `no_id`, `unknown_book`, `no_time`, `repeated`;
        `untitled`: books that got a stand-in; `published`: whether rows and books are as many as the
        publisher tells.

    Raises:
        ValueError: one line: a file is missing, empty, truncated, corrupt or of another layout, a rating is
            out of range, or no row is left.
    """
    part = f"_{config.subset}" if config.subset != "all" else ""
    names = (
        f"goodreads_{config.feedback}{part or '_dedup'}.json.gz",
        f"goodreads_books{part}.json.gz",
        "goodreads_book_authors.json.gz",
        "goodreads_book_genres_initial.json.gz",
    )
    cache = out.parent / "raw"
    archive.show_licence(cache, "GoodReads", TERMS)
    if raw:
        found = archive.find(raw, cache, names)
    else:
        folders = ["byGenre/"] * 2 if part else [""] * 2
        found = {
            name: download.fetch(f"{URL}{folder}{name}", cache)
            for name, folder in zip(names, [*folders, "", ""], strict=True)
        }
    rows, books, authors, genres = (found[name] for name in names)

    with canonical.staging(out, scale=(1, 5)) as scratch:
        items, untitled = _books(books, _authors(authors), _genres(genres), scratch)
        counts = _rated(rows, scratch / "rated")
        events, users, more = _distinct(sorted((scratch / "rated").glob("*")), items["item"], scratch)
        counts |= more
        if not counts["events"]:
            raise ValueError(
                f"{rows} has no row with stars, book and date ({counts}), wanted some; another RAW="
            )
        log = pl.scan_parquet(events, glob=False).with_columns(label=pl.col("rating") >= LIKED)
        canonical.sink(log, scratch).collect(engine="streaming")
        items.write_parquet(scratch / "items.parquet")
        users.write_parquet(scratch / "users.parquet")
    dropped = {f"dropped_events_{kind}": counts[kind] for kind in DROPPED}
    counts = {
        config.feedback: counts["rows"],
        "books": items.height,
        "users": users.height,
        "events": counts["events"],
        **dropped,
    }
    published = dict(zip(("books", *FEEDBACK), COUNTS[config.subset], strict=True))
    wanted = {key: published[key] for key in ("books", config.feedback)}
    is_published = archive.is_published(raw or cache, "", counts, wanted)
    return {**counts, "untitled": untitled, "published": is_published}


def _rated(path: Path, folder: Path) -> dict[str, int]:
    """Writes the rows with stars to `folder/*/*.parquet`, all of a user in one folder; counts the others."""
    schema = {key: kind for key, kind in EVENTS.items() if key != "is_read" or "_reviews" not in path.name}
    events = jsonl.scan(path, schema)
    if "is_read" not in schema:
        events = events.with_columns(is_read=pl.lit(True))
    rated = events.filter(pl.col("rating") > 0).select(
        user="user_id",
        item=pl.col("book_id").cast(pl.Int64, strict=False),
        rating=pl.col("rating").cast(pl.Float32),
        timestamp=pl.coalesce(_seconds("date_updated"), _seconds("date_added")),
    )
    bucket = (pl.col("user").hash() % (1 + path.stat().st_size // BUCKET)).alias("bucket")
    sink = rated.sink_parquet(pl.PartitionBy(folder, key=bucket, include_key=False), mkdir=True, lazy=True)
    with jsonl.faults(path, schema):
        # Together: the file is read once.
        _, kinds = pl.collect_all([sink, events.group_by("is_read", "rating").len()], engine="streaming")
        out_of_range = ~pl.col("rating").is_between(0, 5)
        if wrong := kinds.filter(out_of_range)["len"].sum():
            first = jsonl.scan(path, schema, number="line").filter(out_of_range).select("line", "rating")
            line, rating = first.head(1).collect(engine="streaming").row(0)
            raise ValueError(
                f"{path} line {line}, column 'rating': found {rating}, wanted 0 to 5 ({wrong - 1} more so); "
                "get the file again, or give another RAW=<folder>"
            )
    without = kinds.filter(pl.col("rating").fill_null(0) == 0)
    rows, unrated, unread = (
        int(frame["len"].sum()) for frame in (kinds, without, without.filter(~pl.col("is_read")))
    )
    return {"rows": rows, "unread": unread, "unrated": unrated - unread}


def _distinct(
    buckets: list[Path], books: pl.Series, parts: Path
) -> tuple[list[Path], pl.DataFrame, dict[str, int]]:
    """Events on known books with a date, one of a user and book: files, users, and what was dropped."""
    counts = dict.fromkeys(("no_id", "unknown_book", "no_time", "repeated", "events"), 0)
    files: list[Path] = []
    users = [pl.Series("user", [], pl.String)]
    for bucket in buckets:
        left = pl.read_parquet(sorted(bucket.glob("*")), glob=False)
        for kind, keep in (
            ("no_id", pl.col("user").is_not_null() & pl.col("item").is_not_null()),
            ("unknown_book", pl.col("item").is_in(books.implode())),
            ("no_time", pl.col("timestamp").is_not_null()),
        ):
            kept = left.filter(keep)
            counts[kind] += left.height - kept.height
            left = kept
        # The last word of a user on a book: an earlier one would stand in the history as the answer.
        left = left.sort("user", "item", "timestamp", "rating")
        last = left.unique(["user", "item"], keep="last", maintain_order=True)
        counts["repeated"] += left.height - last.height
        counts["events"] += last.height
        users.append(last["user"].unique())
        files.append(parts / f"events-{len(files):04d}.parquet")
        last.write_parquet(files[-1])
        shutil.rmtree(bucket)
    return files, pl.concat(users).sort().to_frame(), counts


def _authors(path: Path) -> pl.DataFrame:
    """author_id (string) and author: a name, or null."""
    with jsonl.faults(path, AUTHORS):
        names = jsonl.scan(path, AUTHORS).select("author_id", author=_text("name"))
        return names.unique("author_id", keep="first", maintain_order=True).collect(engine="streaming")


def _genres(path: Path) -> pl.DataFrame:
    """book_id (string) and genre: the one with most votes, the first of those by name; null without any."""
    votes = pl.concat_list(pl.col("genres").struct.field(genre).fill_null(0) for genre in GENRES)
    most = votes.list.arg_max().replace_strict(dict(enumerate(GENRES)), return_dtype=pl.String)
    with jsonl.faults(path, TAGS):
        tags = jsonl.scan(path, TAGS).select("book_id", genre=pl.when(votes.list.max() > 0).then(most))
        return tags.unique("book_id", keep="first", maintain_order=True).collect(engine="streaming")


def _books(path: Path, authors: pl.DataFrame, genres: pl.DataFrame, parts: Path) -> tuple[pl.DataFrame, int]:
    """The items table, and how many books have no title."""
    shelf = pl.element().struct.field("name")
    year, pages = (pl.col(name).cast(pl.Int32, strict=False) for name in ("publication_year", "num_pages"))
    with jsonl.faults(path, BOOKS):
        books = jsonl.scan(path, BOOKS).select(
            "book_id",
            item=pl.col("book_id").cast(pl.Int64, strict=False),
            title=pl.coalesce(_text("title"), _text("title_without_series")),
            author_id=pl.col("authors").list.first().struct.field("author_id"),
            publisher=_text("publisher"),
            shelf=pl.col("popular_shelves").list.agg(shelf.filter(~shelf.str.contains(STATUS)).first()),
            format=_text("format"),
            language=_text("language_code").str.replace(r"^en(-.*)?$", "eng"),
            series=pl.col("series").list.first(),
            work=_text("work_id"),
            year=pl.when(year.is_between(1000, 2020)).then(year),
            pages=(pages // 100 * 100).clip(0, 2000),
        )
        # By way of a file: in memory each shelf would keep the text of all that were read with it.
        books.drop_nulls("item").sink_parquet(parts / "books.parquet")
    frame = pl.read_parquet(parts / "books.parquet", glob=False)
    frame = frame.unique("item", keep="first", maintain_order=True).sort("item")
    frame = frame.join(authors, "author_id", "left", maintain_order="left")
    frame = frame.join(genres, "book_id", "left", maintain_order="left")
    items = frame.select(
        "item",
        pl.col("title").fill_null("Untitled"),
        pl.col("author").fill_null("unknown author"),
        pl.col("genre").fill_null("no genre listed"),
        *("shelf", "publisher", "format", "language", "series", "work", "year", "pages"),
    )
    return items, frame["title"].null_count()


def _text(column: str) -> pl.Expr:
    """On one line, without blanks around it; null where nothing is left."""
    text = pl.col(column).str.replace_all(r"\s+", " ").str.strip_chars()
    return pl.when(text != "").then(text)


def _seconds(column: str) -> pl.Expr:
    """Seconds since 1970; null where there is no date, or none that can be."""
    seconds = pl.col(column).str.to_datetime(DATE, strict=False).dt.epoch("s")
    return pl.when(seconds.is_between(0, parse.LATEST - 1)).then(seconds)


def work(task: run.Run) -> None:
    """Write the tables as a stage of the pipeline."""
    source = task.config.source
    counts = make(task.folder, task.raw, RecipeConfig(source.subset, source.feedback or FEEDBACK[0]))
    feedback = next(kind for kind in FEEDBACK if kind in counts)
    left_out = ", ".join(f"{counts[f'dropped_events_{kind}']:,} {kind}" for kind in DROPPED)
    say(f"{counts['events']:,} events of {counts[feedback]:,} {feedback}; left out: {left_out}")
    say(f"{counts['users']:,} users, {counts['books']:,} books, {counts['untitled']:,} untitled")
    task.finish(task.folder.glob("*.parquet"), dict(counts))
