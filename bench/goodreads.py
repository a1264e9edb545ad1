"""Writes files in the layout of the UCSD Book Graph (GoodReads), for tests and measurements without it.

`python -m bench.goodreads 2000000 FOLDER` writes interactions, books, authors and genres as gzipped JSON
lines, key by key as in the source (`--reviews`: reviews instead of interactions; `--subset poetry`: named as
that subset). Of 100 rows 54 are shelved and unread, and 3 read but not rated. What the source or any scrape
may hold is there: dates with an offset, empty dates, numbers as strings, rows that come again, books that the
books file lacks, empty titles, titles in other scripts, with quotes and line breaks, authors that the authors
file lacks, books without genre, series, publisher or shelves. Users lean towards a genre, so that there is
something to find; nothing else is meant to be real.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 250_000  # rows that are text at a time
BEGIN, END = 1_180_000_000, 1_508_000_000  # first and last shelving, seconds: May 2007, October 2017
UNREAD, UNRATED = 0.541, 0.033  # shares of rows in the source: shelved only; read, but not rated
NO_UPDATE, NO_DATE = 0.004, 0.001  # shares of rows without date_updated; without any date
AGAIN, UNKNOWN = 0.002, 0.003  # shares of rows that come again; whose book is not in the books file
# fmt: off
GENRES = [
    "children", "comics, graphic", "fantasy, paranormal", "fiction", "history, historical fiction, biography",
    "mystery, thriller, crime", "non-fiction", "poetry", "romance", "young-adult",
]
FORMS = [
    "The Book of {}", "{}", 'The "Quoted" {}', "{} (A Series, #2)", "Two\nLines of {}", "{}: A Novel",
    "  {}  ", "Caf\u00e9 {}",
    "\u05e9\u05dc\u05d5\u05dd {}", "\u0627\u0644\u0643\u062a\u0627\u0628 {}", "{} \U0001f4da",
]
REVIEWS = [
    "", "", "", "", "Loved it!", 'She said "no".\nThen left...',
    "\u0631\u0627\u0626\u0639 \U0001f4da", "a\\b\tc",
]
# fmt: on
PUBLISHERS = ["Penguin", "Vintage", "\u00c9ditions Gallimard", "Back\\slash & Sons", "", ""]
FORMATS = ["Paperback", "Hardcover", "ebook", "Kindle Edition", "Audio CD", ""]
LANGUAGES = ["eng", "en-US", "spa", "ara", ""]
YEARS = ["", "2007", "1999", "2015", "65535", "-300"]
SHELVES = ["to-read", "currently-reading", "owned", "favorites", "books-i-own", "to-buy", "default"]


def write(
    folder: Path, rows: int, books: int = 0, subset: str = "", reviews: bool = False, seed: int = 0
) -> dict[str, int]:
    """Write the four files.

    Args:
        folder: made if absent; the files appear under their names when complete.
        rows: interactions or reviews, those that come again included; at least 10.
        books: lines of the books file; 0: one for 60 rows, at least 100.
        subset: end of the names of a single genre's files, e.g. `poetry`; empty: the whole.
        reviews: reviews (no `is_read`; text and votes) instead of interactions.
        seed: of everything.

    Returns:
        `rows`, and how many of them are, each counted once and in this order: `unread`, `unrated`, of an
        `unknown_book`, without a date (`no_time`), `repeated` (all but one of a user and book); `events`: the
        others.
    """
    rng = np.random.default_rng(seed)
    books = books or max(100, rows // 60)
    ids = 1 + np.sort(rng.choice(20 * books, books, replace=False))
    end = f"_{subset}.json.gz" if subset else ".json.gz"
    folder.mkdir(parents=True, exist_ok=True)
    _publish(_books(rng, ids), folder / f"goodreads_books{end}")
    _publish(_authors(rng, len(ids)), folder / "goodreads_book_authors.json.gz")
    _publish(_genres(rng, ids), folder / "goodreads_book_genres_initial.json.gz")
    events = _events(rng, ids, rows, reviews)
    kind = "reviews" if reviews else "interactions"
    _publish(_event_lines(events, kind), folder / f"goodreads_{kind}{end if subset else '_dedup.json.gz'}")
    return _counts(events)


def _events(rng: np.random.Generator, ids: Array, rows: int, reviews: bool) -> pl.DataFrame:
    """All rows: user, book (ids), known, read, rating, added, updated (seconds, null), review (a number)."""
    size = rows - round(AGAIN * rows)
    users = max(3, size // 120)
    tail = rng.lognormal(0, 1.2, users)
    user = np.sort(np.concatenate([np.arange(users), rng.choice(users, size - users, p=tail / tail.sum())]))
    # A user's books are distinct: one that is drawn twice moves on to the next, or beyond the books file.
    book = (len(ids) * rng.random(size) ** 2.5).astype(np.int64)
    book = book[np.lexsort((book, user))]
    base = user * (len(ids) + size) - (np.arange(size) - np.searchsorted(user, user))
    book = np.maximum.accumulate(book + base) - base
    is_known = (rng.random(size) >= UNKNOWN) & (book < len(ids))
    place = np.minimum(book, len(ids) - 1)
    liking = rng.normal(3.6, 0.8, size) + rng.normal(0, 0.6, len(ids))[place]
    liking += 0.8 * (place % len(GENRES) == rng.integers(0, len(GENRES), users)[user])
    state = np.where(reviews, 1 - 0.45 * rng.random(size), rng.random(size))
    dates = rng.random(size)
    added = rng.integers(BEGIN, END, size)
    names = np.array([rng.bytes(16).hex() for _ in range(users)])
    events = pl.DataFrame(
        {
            "user": names[user],
            "book": np.where(is_known, ids[place], 21 * len(ids) + book),
            "known": is_known,
            "read": state >= UNREAD,
            "rating": np.where(state < UNREAD + UNRATED, 0, np.clip(np.rint(liking), 1, 5)).astype(np.int64),
            "added": pl.Series(added).set(pl.Series(dates < NO_DATE), None),
            "updated": pl.Series(added + rng.exponential(40 * 86_400, size).astype(np.int64)).set(
                pl.Series(dates < NO_UPDATE), None
            ),
            "review": rng.permutation(size),
        }
    )
    again = events.sample(rows - size, seed=int(rng.integers(1 << 31)))
    # Every second one is the same row, the others were updated a day later.
    return pl.concat([events, again.with_columns(pl.col("updated") + 86_400 * (pl.int_range(pl.len()) % 2))])


def _counts(events: pl.DataFrame) -> dict[str, int]:
    counts, left = {"rows": events.height}, events
    for kind, those in (
        ("unread", ~pl.col("read") & (pl.col("rating") == 0)),
        ("unrated", pl.col("rating") == 0),
        ("unknown_book", ~pl.col("known")),
        ("no_time", pl.col("updated").is_null() & pl.col("added").is_null()),
    ):
        counts[kind] = left.filter(those).height
        left = left.filter(~those)
    counts["events"] = left.select(pl.struct("user", "book").n_unique()).item()
    return counts | {"repeated": left.height - counts["events"]}


def _event_lines(events: pl.DataFrame, kind: str) -> pl.LazyFrame:
    def date(seconds: pl.Expr) -> pl.Expr:
        local = pl.from_epoch(seconds).dt.replace_time_zone("UTC").dt.convert_time_zone("America/Los_Angeles")
        return local.dt.strftime("%a %b %d %H:%M:%S %z %Y").fill_null("")

    number = pl.col("review")
    text = _one_of(REVIEWS, number)
    read = date(pl.when((pl.col("rating") > 0) & (number % 3 == 0)).then(pl.col("updated")))
    values = {
        "user_id": _quoted(pl.col("user")),
        "book_id": _quoted(pl.col("book")),
        "review_id": _quoted(number.cast(pl.String).str.zfill(32)),
        "is_read": pl.col("read").cast(pl.String),
        "rating": pl.col("rating"),
        "review_text" if kind == "reviews" else "review_text_incomplete": text,
        "date_added": _quoted(date(pl.col("added"))),
        "date_updated": _quoted(date(pl.col("updated"))),
        "read_at": _quoted(read),
        "started_at": _quoted(pl.when(number % 6 == 0).then(read).otherwise(pl.lit(""))),
    }
    if kind == "reviews":
        del values["is_read"]
        values |= {"n_votes": number % 7, "n_comments": number % 3}
    return events.lazy().select(_line(values))


def _books(rng: np.random.Generator, ids: Array) -> pl.LazyFrame:
    size = len(ids)
    number = pl.col("number")
    drawn = {name: rng.integers(0, 1 << 30, size) for name in ("a", "b", "c", "d", "e", "f")}
    frame = pl.LazyFrame({"id": ids, "number": np.arange(size), **drawn})
    titles = pl.concat_str([pl.lit(""), pl.when(number % 97 != 0).then(_title(number)).otherwise(pl.lit(""))])
    shelves = [
        json.dumps(
            [
                {"count": str(max(1, 900 // (place + 1))), "name": name}
                for place, name in enumerate(
                    [*SHELVES[:first], genre.split(",")[0], "fiction", *SHELVES[first:]]
                )
            ][: 9 * (first > 0)]
        )
        for genre in GENRES
        for first in range(6)
    ]
    first, second = (pl.col(name) % (size // 3 + 5) for name in "ab")
    second = pl.when(number % 5 == 0).then(_join(', {"author_id": "', second, '", "role": "Illustrator"}'))
    authors = _join('[{"author_id": "', first, '", "role": ""}', second.otherwise(pl.lit("")), "]")
    url = _join('"https://www.goodreads.com/book/show/', pl.col("id"), '"')
    string = {name: _quoted((pl.col(name) % 5000).cast(pl.String)) for name in drawn}
    return frame.select(
        _line(
            {
                "isbn": string["a"],
                "text_reviews_count": string["b"],
                "series": pl.when(number % 4 == 0)
                .then(_join('["', pl.col("c") % 5000, '"]'))
                .otherwise(pl.lit("[]")),
                "country_code": pl.lit('"US"'),
                "language_code": _one_of(LANGUAGES, pl.col("d")),
                "popular_shelves": _one_of(shelves, number % 10 * 6 + pl.col("e") % 6, encode=False),
                "asin": pl.lit('""'),
                "is_ebook": pl.lit('"false"'),
                "average_rating": pl.lit('"3.87"'),
                "kindle_asin": pl.lit('""'),
                "similar_books": _join('["', pl.col("a"), '", "', pl.col("b"), '"]'),
                "description": _one_of([25 * f"{review} Plot. " for review in REVIEWS], pl.col("f")),
                "format": _one_of(FORMATS, pl.col("e")),
                "link": url,
                "authors": pl.when(number % 89 == 0).then(pl.lit("[]")).otherwise(authors),
                "publisher": _one_of(PUBLISHERS, pl.col("f")),
                "num_pages": pl.when(number % 9 == 0)
                .then(pl.lit('""'))
                .otherwise(_quoted(pl.col("c") % 900)),
                "publication_day": pl.lit('""'),
                "isbn13": string["d"],
                "publication_month": pl.lit('""'),
                "edition_information": pl.lit('""'),
                "publication_year": _one_of(YEARS, pl.col("a")),
                "url": url,
                "image_url": pl.lit('"https://images.gr-assets.com/books/1m/1.jpg"'),
                "book_id": _quoted(pl.col("id")),
                "ratings_count": string["e"],
                "work_id": pl.when(number % 50 == 0).then(pl.lit('""')).otherwise(string["f"]),
                "title": _quoted(titles),
                "title_without_series": _quoted(
                    pl.when(number % 194 == 0).then(pl.lit(" ")).otherwise(_join("Plain ", number))
                ),
            }
        )
    )


def _title(number: pl.Expr) -> pl.Expr:
    """Titles as JSON text without its quotes, in turn of every form."""
    parts = [json.dumps(form)[1:-1].split("{}") for form in FORMS]
    before, after = (_one_of([part[side] for part in parts], number, encode=False) for side in (0, 1))
    return _join(before, number, after)


def _authors(rng: np.random.Generator, books: int) -> pl.LazyFrame:
    """One for three books; the last few that books name are lacking, and a few have no name."""
    number = pl.col("number")
    first = _one_of(["Ann", "J\\u00f3n", "\\u0639\\u0644\\u064a", 'O\\"Neil'], number, encode=False)
    name = pl.when(number % 41 == 0).then(pl.lit("")).otherwise(_join(first, " ", number))
    return pl.LazyFrame({"number": rng.permutation(books // 3)}).select(
        _line(
            {
                "average_rating": pl.lit('"3.98"'),
                "author_id": _quoted(number),
                "text_reviews_count": pl.lit('"7"'),
                "name": _quoted(name),
                "ratings_count": pl.lit('"49"'),
            }
        )
    )


def _genres(rng: np.random.Generator, ids: Array) -> pl.LazyFrame:
    """A genre and up to two more of smaller count, or as many votes; none for one book in 30."""
    texts = []
    for place in range(len(GENRES)):
        for votes in ({place: 40}, {place: 40, (place + 3) % 10: 8}, {(place + 1) % 10: 9, place: 9}):
            texts.append(json.dumps({GENRES[genre]: count for genre, count in votes.items()}))
    number = np.arange(len(ids))
    choice = number % 10 * 3 + rng.integers(0, 3, len(ids))
    choice = np.where(rng.random(len(ids)) < 1 / 30, len(texts), choice)
    frame = pl.LazyFrame({"id": ids, "choice": choice})
    votes = _one_of([*texts, "{}"], pl.col("choice"), encode=False)
    return frame.select(_line({"book_id": _quoted(pl.col("id")), "genres": votes}))


def _line(values: dict[str, pl.Expr]) -> pl.Expr:
    """A JSON object as `json.dumps` writes it, of values that are JSON already."""
    parts: list[str | pl.Expr] = []
    for place, (name, value) in enumerate(values.items()):
        parts += [f'{", " if place else "{"}"{name}": ', value]
    return _join(*parts, "}").alias("line")


def _join(*parts: str | pl.Expr) -> pl.Expr:
    return pl.concat_str([pl.lit(part) if isinstance(part, str) else part for part in parts])


def _quoted(value: pl.Expr) -> pl.Expr:
    return _join('"', value, '"')


def _one_of(texts: Sequence[str], place: pl.Expr, encode: bool = True) -> pl.Expr:
    """The text of a place, turning over; choices as JSON, in ASCII as in the source."""
    choices = [json.dumps(text) for text in texts] if encode else list(texts)
    return (place % len(choices)).replace_strict(list(range(len(choices))), choices, return_dtype=pl.String)


def _publish(lines: pl.LazyFrame, path: Path) -> None:
    """Compress block after block; the file gets its name when it is complete."""
    partial = path.with_name(path.name + ".partial")
    with gzip.open(partial, "wb", compresslevel=1) as sink:
        start = 0
        while (block := lines.slice(start, BLOCK).collect()["line"]).len():
            sink.write(("\n".join(block.to_list()) + "\n").encode("ascii"))
            start += BLOCK
    partial.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=int, help="interactions, or reviews")
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--books", type=int, default=0, help="lines of the books file (0: one for 60 rows)")
    parser.add_argument("--subset", default="", help="name the files as a single genre's, e.g. poetry")
    parser.add_argument("--reviews", action="store_true", help="reviews instead of interactions")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    given = parser.parse_args()
    print(write(given.folder, given.rows, given.books, given.subset, given.reviews, given.seed))
