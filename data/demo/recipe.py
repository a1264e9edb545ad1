"""The demo: 400 invented users who watch and rate 300 invented films. Generated, seeded, no network.

What is planted, and why, is in README.md beside this file. Every number is a function of (seed, user, step)
by `recllm.eventlog.draws`, so the tables do not depend on batches, order or a generator's version.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.eventlog import draws
from recllm.pipeline import run
from recllm.tables import canonical

Array = npt.NDArray[Any]

# Words that go with a genre: an adjective and a noun make a title.
WORDS = {
    "Action": (
        "Blazing Deadly Final Furious Iron Lethal Maximum Savage",
        "Bullet Chase Commando Convoy Force Impact Strike Vendetta",
    ),
    "Animation": (
        "Brave Clever Fluffy Giggling Jolly Little Magic Tiny",
        "Bear Bunny Dragon Duckling Kitten Mouse Penguin Puppy",
    ),
    "Comedy": (
        "Awkward Clumsy Crazy Goofy Lucky Silly Wacky Wild",
        "Butler Cousins Dentist Family Neighbors Roommates Vacation Wedding",
    ),
    "Crime": (
        "Broken Crooked Dirty Double Guilty Silent Stolen Wrong",
        "Alibi Badge Detective Heist Informer Jury Ransom Witness",
    ),
    "Horror": (
        "Bloody Creeping Cursed Dark Haunted Rotten Screaming Undead",
        "Cellar Crypt Doll Grave Mansion Nightmare Scarecrow Swamp",
    ),
    "Musical": (
        "Dancing Dazzling Golden Singing Sparkling Swinging Tapping Velvet",
        "Ballroom Cabaret Chorus Encore Melody Orchestra Rhapsody Serenade",
    ),
    "Romance": (
        "Autumn Eternal First Gentle Moonlit Secret Sweet Tender",
        "Bouquet Embrace Farewell Heart Kiss Letter Promise Whisper",
    ),
    "Sci-Fi": (
        "Atomic Cosmic Cyber Galactic Lunar Quantum Robot Solar",
        "Android Asteroid Colony Galaxy Planet Signal Starship Void",
    ),
    "War": (
        "Burning Distant Fallen Forgotten Frozen Heroic Last Northern",
        "Airborne Battalion Bridge Bunker Frontier Platoon Regiment Trench",
    ),
    "Western": (
        "Bitter Dusty Lonesome Outlaw Ragged Rattlesnake Thirsty Wanted",
        "Canyon Cowboy Gunslinger Marshal Prairie Saddle Saloon Stagecoach",
    ),
}
GENRES = list(WORDS)

# What people of a kind lean to. The words read on as in the prompt: "The user is a woman aged 25 to 34, a
# lawyer."
GENDERS = {"woman": "Musical", "man": "War"}
AGES = {
    "under 18": "Animation",
    "18 to 24": "Horror",
    "25 to 34": "Sci-Fi",
    "35 to 44": "Comedy",
    "45 to 49": "Crime",
    "50 to 55": "Romance",
    "56 or more": "Western",
}
OCCUPATIONS = {
    "a school student": "Animation",
    "a programmer": "Sci-Fi",
    "a lawyer": "Crime",
    "a farmer": "Western",
    "an artist": "Musical",
    "a writer": "Romance",
    "a scientist": "Sci-Fi",
    "a homemaker": "Comedy",
    "a technician or engineer": "Action",
    "retired": "War",
}

FILMS_A_GENRE = 30
FRANCHISES_A_GENRE = 4
PARTS = 5  # films of a franchise; the other 10 of a genre stand alone
FIRST_YEAR, LAST_YEAR = 1965, 2004
START = 1_000_000_000  # September 2001, the first possible second
SPAN = 3 * 365 * 86_400  # seconds from the first to the last possible event
RECENT = 6  # events that make the mood

# Weights of the choice of what to watch, in log odds.
SESSION = 1.8  # films of the session's genre
DOUBLE_BILL = 5.0  # the film that is shown after the last one
SEQUEL = 2.5  # the next part of the last film's franchise
SKIPPED = -1.2  # a later part without any earlier one

# Weights of the liking, in logits.
QUALITY = 1.05
USER_BIAS = 0.35
TASTE = 0.7
DECADE = 0.35
FRANCHISE = 2.3
MOOD = 4.2
NOISE = 1.35  # scale of the logistic noise
STARS = (-3.0, -1.3, 0.0, 1.7)  # edges between 1, 2, 3, 4 and 5 stars


@dataclass(frozen=True)
class RecipeConfig:
    """What the recipe may be told."""

    label_threshold: float = 3.0
    """Liked = rating > threshold, in stars."""
    seed: int = 0
    """Seed of everything that is drawn."""
    users: int = 400
    """Number of people."""
    new_users: float = 0.08
    """Share of them who arrive when most of the log is over."""


class Films(NamedTuple):
    """The catalog; film f is row f of every array."""

    title: list[str]
    genre: Array  # int [F]
    year: Array  # int [F]
    franchise: Array  # int [F], -1 where the film stands alone
    part: Array  # int [F], 0 the first
    follower: Array  # int [F], the film that tends to be watched next, -1 for the last part
    quality: Array  # float [F], standard normal
    appeal: Array  # float [F], log weight of being watched


class People(NamedTuple):
    """The users; user u is row u of every array."""

    gender: Array  # int [U]
    age: Array
    occupation: Array
    zip: Array
    taste: Array  # float [U, G]
    decade: Array  # float [U, D]
    bias: Array  # float [U]
    loyal: Array  # float [U], +1 loyalist, -1 explorer
    events: Array  # int [U]


def make(out: Path, raw: Path | None = None, config: RecipeConfig = RecipeConfig()) -> dict[str, int | float]:
    """Writes the tables of the demo.

    Args:
        out: folder of the tables, e.g. `artifacts/demo/tables`.
        raw: not used, as nothing is read; here so that all recipes are called alike.
        config: see `RecipeConfig`.

    Returns:
        Counts of ratings, users and movies, and `oracle_auc`: the AUC of the chance of liking that the
        simulation drew from, which no model can beat on average.
    """
    films, people = catalog(config), population(config)
    events = simulate(films, people, config)
    label = (events["rating"] > config.label_threshold).cast(pl.Int8)
    # External ids are shuffled, as neither a franchise nor an age may be read off them.
    item_ids = 1 + np.argsort(
        draws.uniform(draws.derive(config.seed, "item ids"), np.arange(len(films.title)), 1)[:, 0]
    )
    items = pl.DataFrame(
        {
            "item": item_ids,
            "title": films.title,
            "genre": [GENRES[genre] for genre in films.genre],
            "year": films.year.astype(np.int32),
        }
    ).sort("item")
    users = pl.DataFrame(
        {
            "user": np.arange(1, config.users + 1),
            "gender": np.array(list(GENDERS))[people.gender],
            "age": np.array(list(AGES))[people.age],
            "occupation": np.array(list(OCCUPATIONS))[people.occupation],
            "zip": [f"{zip_code:05d}" for zip_code in people.zip],
        }
    )
    log = events.with_columns(user=pl.col("user") + 1, item=item_ids[events["item"].to_numpy()], label=label)
    canonical.write(out, log.lazy(), items, users)
    chance, liked = events["score"].rank().to_numpy(), label.to_numpy() == 1
    auc = (chance[liked].mean() - (liked.sum() + 1) / 2) / (~liked).sum()
    return {"ratings": events.height, "users": users.height, "movies": items.height, "oracle_auc": float(auc)}


def catalog(config: RecipeConfig) -> Films:
    """Invents the films: titles whose words tell the genre, franchises with numbered parts."""
    count = len(GENRES) * FILMS_A_GENRE
    index = np.arange(count)
    genre, place = index // FILMS_A_GENRE, index % FILMS_A_GENRE
    in_franchise = place < FRANCHISES_A_GENRE * PARTS
    franchise = np.where(in_franchise, genre * FRANCHISES_A_GENRE + place // PARTS, -1)
    part = np.where(in_franchise, place % PARTS, 0)
    uniform = draws.uniform(draws.derive(config.seed, "films"), index, 2)
    first = index - part  # the film that gives the name and the first year
    year = FIRST_YEAR + (uniform[first, 0] * (LAST_YEAR - FIRST_YEAR - 2 * PARTS)).astype(np.int64) + 2 * part
    names = []
    for name, (adjectives, nouns) in WORDS.items():
        pairs = [f"{adjective} {noun}" for adjective in adjectives.split() for noun in nouns.split()]
        key = draws.uniform(draws.derive(config.seed, "titles", name), np.arange(len(pairs)), 1)[:, 0]
        names += [pairs[at] for at in np.argsort(key)[:FILMS_A_GENRE]]
    title = [f"{names[first[f]]}{f' {part[f] + 1}' if part[f] else ''} ({year[f]})" for f in index]
    # A franchise is followed part by part; films that stand alone are shown as a round of double bills.
    alone = FILMS_A_GENRE - FRANCHISES_A_GENRE * PARTS
    round_trip = index - place + FRANCHISES_A_GENRE * PARTS + (place - FRANCHISES_A_GENRE * PARTS + 1) % alone
    follower = np.where(in_franchise, np.where(part < PARTS - 1, index + 1, -1), round_trip)
    normal = _normal(draws.derive(config.seed, "quality"), index, 2)
    quality = 0.6 * normal[:, 0] + 0.8 * _normal(draws.derive(config.seed, "first part"), first, 1)[:, 0]
    return Films(title, genre, year, franchise, part, follower, quality, 0.3 * quality + 1.1 * normal[:, 1])


def population(config: RecipeConfig) -> People:
    """Invents the users: demographics that lean to a genre, tastes, biases, and the hidden type."""
    index = np.arange(config.users)
    uniform = draws.uniform(draws.derive(config.seed, "people"), index, 6)
    gender, age = (uniform[:, 0] * len(GENDERS)).astype(int), (uniform[:, 1] * len(AGES)).astype(int)
    occupation = (uniform[:, 2] * len(OCCUPATIONS)).astype(int)
    decades = (LAST_YEAR - FIRST_YEAR) // 10 + 1
    normal = _normal(draws.derive(config.seed, "tastes"), index, len(GENRES) + decades + 2)
    taste = normal[:, : len(GENRES)].copy()
    for leaning, kind in ((GENDERS, gender), (AGES, age), (OCCUPATIONS, occupation)):
        taste[index, np.array([GENRES.index(genre) for genre in leaning.values()])[kind]] += 0.8
    events = np.exp(4.85 + 0.45 * normal[:, -2]).clip(30, 215).astype(int)
    events = np.where(
        index >= config.users * (1 - config.new_users), (events * 0.3).astype(int).clip(20), events
    )
    return People(
        gender,
        age,
        occupation,
        zip=10_000 + 617 * (uniform[:, 3] * 60).astype(int),
        taste=taste,
        decade=normal[:, len(GENRES) : len(GENRES) + decades],
        bias=normal[:, -1],
        loyal=np.where(uniform[:, 4] < np.where(age < 3, 0.3, 0.65), 1.0, -1.0),  # the young explore
        events=events,
    )


def simulate(films: Films, people: People, config: RecipeConfig) -> pl.DataFrame:
    """Lets everybody watch and rate, all users at once, one film a step.

    Returns:
        user and item (row numbers), rating (stars), timestamp (seconds), score (logit of being liked).
    """
    users, count = config.users, len(films.title)
    timestamp, session = _calendar(people, config)
    seen = np.zeros((users, count), dtype=bool)
    verdict = np.zeros((users, count))  # +1 liked, -1 not, 0 not seen
    recent = np.full((users, RECENT), -1)  # genres of the last films, newest first
    last = np.full(users, -1)
    session_genre = np.zeros(users, dtype=int)
    fade = 0.8 ** np.arange(RECENT)
    fade /= fade.sum()
    decade = (films.year - FIRST_YEAR) // 10
    static = films.appeal + 0.5 * people.taste[:, films.genre]
    earlier = (films.franchise[:, None] == films.franchise) & (films.franchise >= 0)
    earlier &= films.part[None, :] < films.part[:, None]  # [film, its earlier parts]

    watched: dict[str, list[Array]] = {name: [] for name in ("user", "item", "rating", "timestamp", "score")}
    for step in range(people.events.max()):
        who = np.flatnonzero(people.events > step)
        key = who * 100_000 + step
        # A session has a genre, drawn from the taste.
        mood = people.taste[who] + _gumbel(
            draws.derive(config.seed, "session"), who * 100_000 + session[who, step], len(GENRES)
        )
        session_genre[who] = mood.argmax(axis=1)
        weight = static[who] + SESSION * (films.genre == session_genre[who, None])
        weight += SKIPPED * ((films.part > 0) & ~(seen[who] @ earlier.T))
        has_follower = np.flatnonzero(np.where(last[who] >= 0, films.follower[last[who]], -1) >= 0)
        following = films.follower[last[who[has_follower]]]
        weight[has_follower, following] += np.where(films.franchise[following] < 0, DOUBLE_BILL, SEQUEL)
        weight[seen[who]] = -np.inf
        item = (weight + _gumbel(draws.derive(config.seed, "choice"), key, count)).argmax(axis=1)

        genre = films.genre[item]
        parts = (verdict[who] * earlier[item]).sum(axis=1) / np.maximum(
            (seen[who] & earlier[item]).sum(axis=1), 1
        )
        run = ((recent[who] == genre[:, None]) * fade).sum(axis=1)
        score = (
            QUALITY * films.quality[item]
            + USER_BIAS * people.bias[who]
            + TASTE
            * (people.taste[who, genre] - 0.7)  # sessions are of loved genres: without it nearly all is liked
            + DECADE * people.decade[who, decade[item]]
            + FRANCHISE * parts
            + MOOD * people.loyal[who] * (run - 0.4)
        )
        uniform = draws.uniform(draws.derive(config.seed, "rating"), key, 1)[:, 0].clip(1e-12)
        felt = score + NOISE * np.log(uniform / (1 - uniform))
        stars = 1 + np.searchsorted(STARS, felt)

        seen[who, item] = True
        verdict[who, item] = np.where(felt > 0, 1.0, -1.0)
        recent[who] = np.concatenate([genre[:, None], recent[who, :-1]], axis=1)
        last[who] = item
        for name, values in {
            "user": who,
            "item": item,
            "rating": stars,
            "timestamp": timestamp[who, step],
            "score": score,
        }.items():
            watched[name].append(values)
    return pl.DataFrame({name: np.concatenate(parts) for name, parts in watched.items()}).sort(
        "user", "timestamp", maintain_order=True
    )


def _calendar(people: People, config: RecipeConfig) -> tuple[Array, Array]:
    """Timestamps [U, steps] and session numbers [U, steps]: some films in a row, then days without any."""
    index, steps = np.arange(config.users), people.events.max()
    bounds = draws.uniform(draws.derive(config.seed, "span"), index, 2)
    new = index >= config.users * (1 - config.new_users)
    begin = np.where(new, 0.86 + 0.08 * bounds[:, 0], 0.4 * bounds[:, 0]) * SPAN
    end = np.where(new, 1.0, 0.8 + 0.2 * bounds[:, 1]) * SPAN
    breaks = (
        draws.uniform(draws.derive(config.seed, "breaks"), index, steps) < 1 / 7
    )  # a session has 7 films on average
    session = np.cumsum(breaks, axis=1)
    moment = np.sort(draws.uniform(draws.derive(config.seed, "moments"), index, steps + 1), axis=1)
    # Of the sorted moments, the sessions that a user really has are spread over the whole span.
    sessions = session[index, people.events - 1] + 1
    stretch = (
        np.take_along_axis(moment, np.minimum(session, steps), axis=1) / moment[index, sessions - 1, None]
    )
    gap = draws.uniform(draws.derive(config.seed, "gaps"), index, steps)
    seconds = np.where(
        gap < 0.08, 0, (20 * 40**gap).astype(np.int64)
    )  # 8 % share the second of the one before
    elapsed = np.cumsum(seconds, axis=1)
    at_start = np.take_along_axis(
        elapsed, np.maximum.accumulate(np.where(breaks, np.arange(steps), 0), axis=1), axis=1
    )
    start = (begin[:, None] + stretch * (end - begin)[:, None]).astype(np.int64)
    timestamp = START + start + elapsed - at_start
    return np.maximum.accumulate(timestamp, axis=1), session


def _normal(seed: int, index: Array, n: int) -> Array:
    """Standard normal draws [B, n], by Box and Muller."""
    uniform = draws.uniform(seed, index, 2 * n)
    return np.sqrt(-2 * np.log1p(-uniform[:, :n])) * np.cos(2 * np.pi * uniform[:, n:])


def _gumbel(seed: int, index: Array, n: int) -> Array:
    """Standard Gumbel draws [B, n]: the argmax of log weight + Gumbel draws in proportion to the weights."""
    return -np.log(-np.log(draws.uniform(seed, index, n).clip(1e-300)))


def work(task: run.Run) -> None:
    """Write the tables as a stage of the pipeline."""
    counts = make(task.folder, task.raw)
    task.finish(task.folder.glob("*.parquet"), dict(counts))
