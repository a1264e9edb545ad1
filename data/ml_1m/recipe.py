"""MovieLens-1M: `::`-separated Latin-1 files to canonical tables."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recllm.pipeline import run
from recllm.tables import archive, canonical, download, titles
from recllm.tables.columns import Column, Known, Layout
from recllm.tables.delimited import Dialect
from recllm.tables.parse import LATEST

URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
CHECKSUM = "md5:c4d9eecfca2ab87c1945afe126590906"
TERMS = (
    "research use only, no redistribution without permission; cite Harper and Konstan (ACM TiiS 2015): "
    "https://files.grouplens.org/datasets/movielens/ml-1m-README.txt"
)
COUNTS = {"ratings": 1_000_209, "users": 6_040, "movies": 3_883}
HISTOGRAM = {1: 56_174, 2: 107_557, 3: 261_197, 4: 348_971, 5: 226_310}  # ratings of each number of stars

GENDERS = {"F": "woman", "M": "man"}
AGES = {
    1: "under 18",
    18: "18 to 24",
    25: "25 to 34",
    35: "35 to 44",
    45: "45 to 49",
    50: "50 to 55",
    56: "56 or more",
}
OCCUPATIONS = [  # by code; each reads on after "The user is a woman aged 25 to 34, "
    "of another occupation",
    "an academic or educator",
    "an artist",
    "a clerk or administrator",
    "a college or graduate student",
    "in customer service",
    "a doctor or health care worker",
    "an executive or manager",
    "a farmer",
    "a homemaker",
    "a school student",
    "a lawyer",
    "a programmer",
    "retired",
    "in sales or marketing",
    "a scientist",
    "self-employed",
    "a technician or engineer",
    "a tradesperson or craftsperson",
    "unemployed",
    "a writer",
]


def _layout(**columns: Column) -> Layout:
    return Layout(columns, Dialect("\t", "", columns=tuple(columns), section=""))


ID, NUMBER, TEXT = Column(pl.Int64(), unique=True), Column(pl.Int64()), Column(pl.String())
RATINGS = _layout(
    user=NUMBER,
    item=NUMBER,
    rating=Column(pl.Int64(), 1, 5),
    timestamp=Column(pl.Int64(), 0, LATEST - 1),
)
MOVIES = _layout(item=ID, title=TEXT, genres=TEXT)
USERS = _layout(user=ID, gender=TEXT, age=NUMBER, occupation=NUMBER, zip=TEXT)


@dataclass(frozen=True)
class RecipeConfig:
    """What the recipe may be told."""

    label_threshold: float = 3.0
    """Liked = rating > threshold, in stars."""


def make(out: Path, raw: Path | None = None, config: RecipeConfig = RecipeConfig()) -> dict[str, int | float]:
    """Writes the tables of MovieLens-1M.

    Args:
        out: folder of the tables, e.g. `artifacts/ml-1m/tables`; a download goes to `raw/` beside it.
        raw: folder or zip that holds ratings.dat, movies.dat and users.dat; None downloads the official
            archive.
        config: see `RecipeConfig`.

    Returns:
        Counts of ratings, users and movies; `published`: whether they, and how often each number of stars was
        given, are the published ones.

    Raises:
        ValueError: one line: a file is missing, empty or corrupt, a row cannot be, or what has the published
            checksum has other counts.
    """
    cache = out.parent / "raw"
    archive.show_licence(cache, "MovieLens-1M", TERMS)
    given = raw or download.fetch(URL, cache, CHECKSUM)
    files = archive.find(given, cache, ["ratings.dat", "movies.dat", "users.dat"])
    people = _read(
        files["users.dat"],
        USERS,
        {
            "gender": ("F or M", pl.Series(list(GENDERS))),
            "age": (f"one of {', '.join(map(str, AGES))}", pl.Series(list(AGES))),
            "occupation": (f"0 to {len(OCCUPATIONS) - 1}", pl.Series(range(len(OCCUPATIONS)))),
        },
    )
    movies = _read(files["movies.dat"], MOVIES)
    known = {
        "user": ("a user of users.dat", people["user"]),
        "item": ("a movie of movies.dat", movies["item"]),
    }
    ratings = _read(files["ratings.dat"], RATINGS, known)
    counts = {"ratings": ratings.height, "users": people.height, "movies": movies.height}
    stars = dict(ratings.group_by("rating").len().iter_rows())
    found = counts | {f"ratings of {number}": stars.get(number, 0) for number in HISTOGRAM}
    wanted = COUNTS | {f"ratings of {number}": count for number, count in HISTOGRAM.items()}
    published = archive.is_published(given, CHECKSUM, found, wanted)
    events = ratings.lazy().with_columns(
        rating=pl.col("rating").cast(pl.Float32),
        label=(pl.col("rating") > config.label_threshold).cast(pl.Int8),
    )
    items = movies.select(
        "item",
        title=titles.natural(pl.col("title")),
        genre=pl.col("genres").str.split("|").list.first(),
        year=titles.year(pl.col("title")),
        genres=pl.col("genres").str.replace_all("|", ", ", literal=True),
    )
    users = people.with_columns(
        gender=pl.col("gender").replace_strict(GENDERS),
        age=pl.col("age").replace_strict(AGES, return_dtype=pl.String),
        occupation=pl.col("occupation").replace_strict(dict(enumerate(OCCUPATIONS)), return_dtype=pl.String),
    )
    canonical.write(out, events, items, users, scale=(1, 5))
    return {**counts, "published": published}


def _read(path: Path, layout: Layout, known: Known | None = None) -> pl.DataFrame:
    # polars takes separators of one byte; no field holds a tab, and titles hold single colons only
    text = path.read_bytes().replace(b"::", b"\t").decode("latin-1").encode("utf-8")
    return layout.read(path, text, known)[0]


def work(task: run.Run) -> None:
    """Write the tables as a stage of the pipeline."""
    counts = make(task.folder, task.raw)
    task.finish(task.folder.glob("*.parquet"), dict(counts))
