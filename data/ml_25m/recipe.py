"""MovieLens-25M, and any newer MovieLens release of its layout: CSV files to canonical tables."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recllm.pipeline import run
from recllm.tables import archive, canonical, download, titles
from recllm.tables.columns import Column, Layout
from recllm.tables.parse import LATEST

URL = "https://files.grouplens.org/datasets/movielens/ml-25m.zip"
CHECKSUM = "md5:6b51fb2759a8657d3bfcbfc42b592ada"
TERMS = (
    "research use only, no redistribution without permission; cite Harper and Konstan (ACM TiiS 2015): "
    "https://files.grouplens.org/datasets/movielens/ml-25m-README.html"
)
COUNTS = {"ratings": 25_000_095, "users": 162_541, "movies": 62_423, "rated movies": 59_047}
RATINGS = Layout(
    {
        "userId": Column(pl.Int64()),
        "movieId": Column(pl.Int64()),
        "rating": Column(pl.Float32(), 0.5, 5),
        "timestamp": Column(pl.Int64(), 0, LATEST - 1),
    }
)
MOVIES = Layout(
    {"movieId": Column(pl.Int64(), unique=True), "title": Column(pl.String()), "genres": Column(pl.String())},
)


@dataclass(frozen=True)
class RecipeConfig:
    """What the recipe may be told."""

    label_threshold: float = 3.0
    """Liked = rating > threshold, in stars."""


def make(out: Path, raw: Path | None = None, config: RecipeConfig = RecipeConfig()) -> dict[str, int | float]:
    """Writes the tables of MovieLens-25M.

    Args:
        out: folder of the tables, e.g. `artifacts/ml-25m/tables`; a download goes to `raw/` beside it.
        raw: folder or zip that holds ratings.csv and movies.csv, of this or another release; None downloads
            the official archive.
        config: see `RecipeConfig`.

    Returns:
        Counts of ratings, users and movies; `published`: whether they are the published ones.

    Raises:
        ValueError: one line: a file is missing, empty or corrupt, a row cannot be, or what has the published
            checksum has other counts.
    """
    cache = out.parent / "raw"
    archive.show_licence(cache, "MovieLens-25M", TERMS)
    given = raw or download.fetch(URL, cache, CHECKSUM)
    files = archive.find(given, cache, ["ratings.csv", "movies.csv"])
    with canonical.staging(out, scale=(0.5, 5)) as scratch:

        def write(ratings: pl.LazyFrame) -> pl.LazyFrame:
            events = ratings.select(
                user="userId",
                item="movieId",
                rating="rating",
                label=(pl.col("rating") > config.label_threshold).cast(pl.Int8),
                timestamp="timestamp",
            )
            return canonical.sink(events, scratch)

        movies, _ = MOVIES.read(files["movies.csv"])
        known = {"movieId": ("a movie of movies.csv", movies["movieId"])}
        _, met = RATINGS.read(files["ratings.csv"], known=known, distinct=["userId"], then=write)
        items = movies.select(
            item="movieId",
            title=titles.natural(pl.col("title")),
            genre=pl.col("genres").str.split("|").list.first(),
            year=titles.year(pl.col("title")),
            genres=pl.col("genres").str.replace_all("|", ", ", literal=True),
        )
        users = met["userId"].rename("user").to_frame()
        items.write_parquet(scratch / "items.parquet")
        users.write_parquet(scratch / "users.parquet")
    written = pl.scan_parquet(out / "events.parquet").select(pl.len()).collect().item()
    counts = {"ratings": written, "users": users.height, "movies": movies.height}
    published = archive.is_published(given, CHECKSUM, {**counts, "rated movies": len(met["movieId"])}, COUNTS)
    return {**counts, "published": published}


def work(task: run.Run) -> None:
    """Write the tables as a stage of the pipeline."""
    counts = make(task.folder, task.raw)
    task.finish(task.folder.glob("*.parquet"), dict(counts))
