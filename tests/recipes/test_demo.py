import numpy as np
import polars as pl
import pytest

from recllm.eventlog.build import build_log
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.log import EventLog
from recllm.metrics import auc
from tests.recipes.contract import RecipeContract, load_recipe

recipe = load_recipe("demo")


class TestDemo(RecipeContract):
    recipe = recipe
    configured = "demo"
    reads_raw = False

    def make(self, out, raw):
        return recipe.make(out, raw, recipe.RecipeConfig(users=30))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    metrics = recipe.make(folder / "tables")
    fields = ["gender", "age", "occupation", "zip"]
    build_log(folder / "tables", folder / "log", PrepareConfig(user_fields=fields))
    return folder, metrics


@pytest.fixture(scope="module")
def simulated():
    config = recipe.RecipeConfig()
    films, people = recipe.catalog(config), recipe.population(config)
    return films, people, recipe.simulate(films, people, config)


def test_counts_and_titles(demo):
    folder, metrics = demo
    assert (metrics["users"], metrics["movies"]) == (400, 300)
    assert 45_000 <= metrics["ratings"] <= 60_000
    items = pl.read_parquet(folder / "tables" / "items.parquet")
    assert items["title"].n_unique() == 300
    assert items["genre"].n_unique() == 10
    assert (items["title"].str.extract(r"\((\d{4})\)$").cast(pl.Int32) == items["year"]).all()
    assert items["title"].str.contains(r" 5 \(").sum() == 40  # 4 franchises a genre, each has a fifth part
    events = pl.read_parquet(folder / "tables" / "events.parquet")
    assert events.select(pl.struct("user", "item").n_unique()).item() == events.height  # nobody watches twice


def test_split_has_new_users_and_balanced_labels(demo):
    log = EventLog.open(demo[0] / "log")
    rows = {name: log.rows(name, "all") for name in ("train", "valid", "test")}
    for name in rows:
        assert 0.45 <= log.label[rows[name]].mean() <= 0.60
    cold = ~np.isin(log.user[rows["test"]], log.user[rows["train"]])
    assert 0.1 <= cold.mean() <= 0.3


def test_same_seed_same_bits_and_another_seed_another_world(tmp_path):
    small = recipe.RecipeConfig(users=30)
    recipe.make(tmp_path / "a", config=small)
    recipe.make(tmp_path / "b", config=small)
    recipe.make(tmp_path / "c", config=recipe.RecipeConfig(users=30, seed=1))
    for name in ("events", "items", "users"):
        first, second, other = (pl.read_parquet(tmp_path / run / f"{name}.parquet") for run in "abc")
        assert first.equals(second)
        assert not first.equals(other)


def test_popularity_is_above_chance_and_far_below_the_oracle(demo, simulated):
    log = EventLog.open(demo[0] / "log")
    test = log.rows("test", "all")
    label, item = log.label[test], log.item[test]
    rate = (log.item_likes[item] + 5) / (log.item_count[item] + 10)
    assert 0.60 < auc(rate, label) < 0.69
    _, _, events = simulated
    liked = (events["rating"] > 3).to_numpy()
    oracle = auc(events["score"].to_numpy(), liked)
    assert 0.82 < oracle < 0.88
    assert demo[1]["oracle_auc"] == pytest.approx(oracle, abs=1e-9)  # ranks without ties, two ways


def test_the_same_recent_run_means_opposite_things_to_the_two_types(simulated):
    films, people, events = simulated
    user, genre = events["user"].to_numpy(), films.genre[events["item"].to_numpy()]
    liked = (events["rating"] > 3).to_numpy()
    same = np.zeros(len(user))  # how many of the last 3 films were of the genre
    for back in (1, 2, 3):
        same[back:] += (user[back:] == user[:-back]) & (genre[back:] == genre[:-back])
    for loyal, sign in ((1, 1), (-1, -1)):
        mine = people.loyal[user] == loyal
        gain = liked[mine & (same == 3)].mean() - liked[mine & (same == 0)].mean()
        assert sign * gain > 0.15


def test_a_liked_earlier_part_tells_of_the_sequel_even_when_it_is_long_ago(simulated):
    films, _, events = simulated
    user, item = events["user"].to_numpy(), events["item"].to_numpy()
    liked = (events["rating"] > 3).to_numpy()
    row = {pair: at for at, pair in enumerate(zip(user.tolist(), item.tolist(), strict=True))}
    first = {film: film - films.part[film] for film in np.flatnonzero(films.part > 0)}
    old = {True: [], False: []}
    for (person, film), at in row.items():
        if film in first:
            parts = [row.get((person, part)) for part in range(first[film], film)]
            parts = [part for part in parts if part is not None and part < at]
            if parts and at - max(parts) > 60:
                old[bool(liked[max(parts)])].append(liked[at])
    assert min(map(len, old.values())) > 300
    assert np.mean(old[True]) - np.mean(old[False]) > 0.2


def test_followers_follow_in_one_direction(simulated):
    films, _, events = simulated
    user, item = events["user"].to_numpy(), events["item"].to_numpy()
    same = user[1:] == user[:-1]
    before, after = item[:-1][same], item[1:][same]
    has = films.follower[before] >= 0
    forward = (films.follower[before[has]] == after[has]).mean()
    has = films.follower[after] >= 0
    backward = (films.follower[after[has]] == before[has]).mean()
    assert forward > 0.1
    assert forward > 5 * backward
