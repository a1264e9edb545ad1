"""Writes logs of any size in the layout of MovieLens-25M, for measurements where no such data may lie.

`python -m bench.logs 25000000 FOLDER` writes `ratings.csv` and `movies.csv`. What a pipeline's speed and
memory depend on is like the source: 154 ratings a user on average, at least 20, with a long tail (a few users
of tens of thousands); 59,047 films with a long-tailed popularity; nobody rates a film twice; sessions of
about 17 ratings with a sixth of them in the second of the one before; half stars. Users lean towards one of
the genres, so that co-occurrence has something to find; nothing else about the data is meant to be real.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

Array = NDArray[Any]

FILMS = 59_047  # with ratings, in MovieLens-25M
MEAN_LENGTH = 153.8  # ratings a user, in MovieLens-25M
SHORTEST = 20  # ratings a user, at least: the rule of the source
SESSION = 17  # ratings in one visit, mean
BEGIN, END = 820_000_000, 1_574_000_000  # first and last start of a user, seconds: end of 1995, end of 2019
# fmt: off
GENRES = [
    "Drama", "Comedy", "Thriller", "Romance", "Action", "Horror", "Documentary", "Crime", "Adventure",
    "Sci-Fi", "Animation", "Children", "Mystery", "Fantasy", "War", "Western", "Musical", "Film-Noir", "IMAX",
]
# fmt: on


def draw(events: int, films: int = FILMS, seed: int = 0) -> dict[str, Array]:
    """A log as columns `[events]`: `user`, `film` (from 0, best known first), `rating`, `seconds`.

    Args:
        events: at least 20.
        films: films with a chance to be rated; a user rates half of them at most.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    length = _lengths(rng, events, films)
    taste = rng.integers(0, len(GENRES), len(length))
    user, film = _pairs(rng, length, taste, films)
    quality = rng.normal(0.0, 0.5, films).astype(np.float32)
    mood = rng.normal(0.0, 0.4, len(length)).astype(np.float32)
    stars = quality[film] + mood[user] + 0.4 * (film % len(GENRES) == taste[user])
    stars += rng.normal(3.35, 0.85, events).astype(np.float32)
    rating = np.clip(np.rint(2 * stars), 1, 10).astype(np.float32) / 2
    return {"user": user, "film": film, "rating": rating, "seconds": _seconds(rng, length, user)}


def write(folder: Path, events: int, seed: int = 0, films: int = FILMS) -> None:
    """Write `ratings.csv` (sorted by user and film, as the source is) and `movies.csv`.

    Args:
        folder: made if absent; the files appear under their names when complete.
        events: rows of `ratings.csv`.
        seed: of everything.
        films: see `draw`.
    """
    log = draw(events, films, seed)
    rng = np.random.default_rng([seed, 1])
    # Ids with gaps, as films without ratings leave them, and in no order of popularity.
    ids = rng.permutation(np.sort(rng.choice(3 * films, films, replace=False) + 1))
    columns = {"userId": log.pop("user").astype(np.int32) + 1, "movieId": ids[log.pop("film")]}
    table = pl.DataFrame(columns | {"rating": log.pop("rating"), "timestamp": log.pop("seconds")})
    folder.mkdir(parents=True, exist_ok=True)
    _publish(table.sort("userId", "movieId"), folder / "ratings.csv")
    _publish(_films(rng, ids), folder / "movies.csv")


def _lengths(rng: np.random.Generator, events: int, films: int) -> Array:
    """Ratings of each user `[users]`: at least 20, a log-normal excess, half the films at most, exact sum."""
    users = max(1, round(events / MEAN_LENGTH))
    most = max(films // 2, SHORTEST)
    if not SHORTEST * users <= events <= most * users:
        raise ValueError(
            f"got {events} events of {films} films; wanted 20 events at least and films for them"
        )
    excess = rng.lognormal(3.95, 1.376, users)
    excess *= (events - SHORTEST * users) / excess.sum()
    length = np.minimum(SHORTEST + excess.astype(np.int64), most)
    while missing := events - int(length.sum()):
        free = np.flatnonzero(length < most)
        length[rng.permutation(free)[:missing]] += 1
    return length


def _pairs(rng: np.random.Generator, length: Array, taste: Array, films: int) -> tuple[Array, Array]:
    """User and film of each event, int64 `[events]`: users ascend, a user's films are distinct, shuffled."""
    # The best known film then has a third of a percent of all events.
    weight = (np.arange(films) + 90.0) ** -1.3
    cumulative = np.cumsum(weight / weight.sum())
    keys = np.empty(0, np.int64)  # user * films + film, ascending
    missing, turn = length, 0
    while missing.any():
        # What is missing, again and again; the longest histories miss so often that they draw more and more.
        user = np.repeat(np.arange(len(length)), missing * max(1, turn - 4))
        film = np.minimum(np.searchsorted(cumulative, rng.random(len(user))), films - 1)
        own = film - film % len(GENRES) + taste[user]
        film = np.where((rng.random(len(user)) < 0.4) & (own < films), own, film)
        keys = np.sort(np.concatenate([keys, user * films + film]))
        keys = keys[np.diff(keys, prepend=-1) > 0]
        missing = np.maximum(length - np.bincount(keys // films, minlength=len(length)), 0)
        turn += 1
    # One sort shuffles every user's films: user, noise and film in one number.
    keys = np.sort((keys // films << 44) + (rng.integers(0, 1 << 24, len(keys)) << 20) + keys % films)
    user = keys >> 44
    first = np.searchsorted(user, np.arange(len(length)))
    keys = keys[np.arange(len(keys)) - first[user] < length[user]]
    return keys >> 44, keys & ((1 << 20) - 1)


def _seconds(rng: np.random.Generator, length: Array, user: Array) -> Array:
    """Seconds since 1970 of each event, ascending within a user: sessions, in which seconds repeat."""
    start = rng.integers(BEGIN, END, len(length))
    span = np.minimum(rng.exponential(250 * 86_400, len(length)), END - start)
    pause = span * SESSION / length  # mean seconds between two sessions
    size = len(user)
    gap = np.where(rng.random(size) < 0.18, 0, 1 + rng.exponential(25, size)).astype(np.int64)
    fresh = rng.random(size) < 1 / SESSION
    gap[fresh] += (rng.exponential(1, int(fresh.sum())) * pause[user[fresh]]).astype(np.int64)
    elapsed = np.cumsum(gap)
    first = np.concatenate([[0], np.cumsum(length)[:-1]])
    # A few would go on for decades.
    return np.minimum(elapsed - (elapsed[first] - start)[user], END + 31_536_000)


def _films(rng: np.random.Generator, ids: Array) -> pl.DataFrame:
    """Titles with a year, some with comma, quote or accent; a genre of their own and up to two more."""
    place = np.arange(len(ids))
    year = rng.integers(1920, 2020, len(ids))
    forms = ("Film {}", "Film, The {}", 'The "Film" {}', "Le Filmé {}")
    titles = [f"{forms[n % 4].format(n)} ({y})" for n, y in zip(place.tolist(), year.tolist(), strict=True)]
    more = rng.integers(0, len(GENRES), (len(ids), 2))
    count = rng.integers(1, 4, len(ids))
    genres = [
        "|".join(dict.fromkeys(GENRES[g] for g in (n % len(GENRES), *others)[:c]))
        for n, others, c in zip(place.tolist(), more.tolist(), count.tolist(), strict=True)
    ]
    return pl.DataFrame({"movieId": ids, "title": titles, "genres": genres}).sort("movieId")


def _publish(table: pl.DataFrame, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    table.write_csv(partial)
    partial.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("events", type=int, help="rows of ratings.csv")
    parser.add_argument("folder", type=Path, help="where ratings.csv and movies.csv go")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    given = parser.parse_args()
    write(given.folder, given.events, given.seed)
