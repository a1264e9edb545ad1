"""MovieLens-25M, and any newer MovieLens release of its layout: CSV files to canonical tables."""

import sys
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recllm import run
from recllm.data import archive, tables, titles

URL = "https://files.grouplens.org/datasets/movielens/ml-25m.zip"
CHECKSUM = "md5:6b51fb2759a8657d3bfcbfc42b592ada"
COUNTS = {"ratings": 25_000_095, "users": 162_541, "movies": 62_423}


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
            the official archive and checks its MD5 and its published counts.
        config: see `RecipeConfig`.

    Returns:
        Counts of ratings, users and movies.

    Raises:
        ValueError: files are missing, or the download's counts are not the published ones.
    """
    files = archive.raw_files(raw, out.parent / "raw", ["ratings.csv", "movies.csv"], URL, CHECKSUM)
    schema = {"userId": pl.Int64, "movieId": pl.Int64, "rating": pl.Float32, "timestamp": pl.Int64}
    ratings = pl.scan_csv(files["ratings.csv"], schema=schema)
    movies = pl.read_csv(
        files["movies.csv"], schema={"movieId": pl.Int64, "title": pl.String, "genres": pl.String}
    )
    events = ratings.select(
        user="userId",
        item="movieId",
        rating="rating",
        label=(pl.col("rating") > config.label_threshold).cast(pl.Int8),
        timestamp="timestamp",
    )
    items = movies.select(
        item="movieId",
        title=titles.natural(pl.col("title")),
        genre=pl.col("genres").str.split("|").list.first(),
        year=titles.year(pl.col("title")),
        genres=pl.col("genres").str.replace_all("|", ", ", literal=True),
    )
    users = ratings.select(user=pl.col("userId").unique()).collect(engine="streaming").sort("user")
    tables.write(out, events, items, users)
    rows = pl.scan_parquet(out / "events.parquet").select(pl.len()).collect().item()
    counts = {"ratings": rows, "users": users.height, "movies": movies.height}
    if raw is None and counts != COUNTS:
        raise ValueError(f"{URL} has {counts}, wanted {COUNTS}; remove {out.parent / 'raw'} and run again")
    return dict(counts)


def work(task: run.Run) -> None:
    """Write the tables as a stage of the pipeline."""
    counts = make(task.folder, task.raw)
    task.finish(task.folder.glob("*.parquet"), dict(counts))


if __name__ == "__main__":
    sys.exit(run.main(work, sys.argv[1:]))
