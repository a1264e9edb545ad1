"""Generated logs: exact size, the source's layout, and what a measurement relies on."""

import numpy as np
import polars as pl

from bench import logs


def test_a_log_is_as_large_as_asked_and_like_its_source():
    log = logs.draw(30_000, films=3_000, seed=1)
    user, film, seconds = log["user"], log["film"], log["seconds"]
    assert len(user) == 30_000
    lengths = np.bincount(user)
    assert len(lengths) == 195  # 30,000 / 153.8
    assert lengths.min() >= 20
    assert lengths.max() > 4 * np.median(lengths)  # a long tail of users
    assert np.bincount(film, minlength=3_000)[:300].sum() > 0.3 * 30_000  # and of films
    assert len(np.unique(user * 3_000 + film)) == 30_000  # nobody rates a film twice
    assert set(np.unique(2 * log["rating"])) <= set(range(1, 11))
    same = user[1:] == user[:-1]
    gap = np.diff(seconds)[same]
    assert (gap >= 0).all()
    assert 0.1 < (gap == 0).mean() < 0.25
    assert 0.02 < (gap > 3_600).mean() < 0.12  # sessions


def test_draws_are_functions_of_the_seed():
    first, again, other = (logs.draw(2_000, films=500, seed=seed) for seed in (3, 3, 4))
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["film"] != other["film"]).any()


def test_files_have_the_layout_of_movielens(tmp_path):
    logs.write(tmp_path / "raw", 2_000, films=500)
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["movies.csv", "ratings.csv"]
    ratings, movies = (pl.read_csv(tmp_path / "raw" / f"{name}.csv") for name in ("ratings", "movies"))
    assert ratings.columns == ["userId", "movieId", "rating", "timestamp"]
    assert movies.columns == ["movieId", "title", "genres"]
    assert ratings.height == 2_000
    assert ratings.equals(ratings.sort("userId", "movieId"))
    assert ratings["userId"].min() == 1
    assert set(ratings["movieId"]) <= set(movies["movieId"])
    assert movies["title"].str.contains(r" \(\d{4}\)$").all()
