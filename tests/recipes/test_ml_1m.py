import zipfile
from pathlib import Path

import polars as pl
import pytest

from recllm.eventlog.build import build_log
from recllm.eventlog.config import PrepareConfig
from tests.recipes.contract import RecipeContract, load_recipe

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "datasets" / "ml-1m"
recipe = load_recipe("ml_1m")

FILES = {
    "ratings.dat": "1::10::5::100\n1::20::3::101\n2::10::4::90\n",
    "movies.dat": "10::Invented, The (1999)::Drama|War\n20::Café of Nobody (1950)::Comedy\n",
    "users.dat": "1::F::1::10::48067\n2::M::56::0::02115-1234\n",
}


def write_raw(folder):
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="latin-1")


class TestMovieLens1M(RecipeContract):
    recipe = recipe
    configured = "ml-1m"

    def write_raw(self, folder):
        write_raw(folder)


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    write_raw(folder)
    return folder


def test_invented_files_in_the_raw_layout(raw, tmp_path):
    counts = recipe.make(tmp_path / "tables", raw)
    assert counts == {"ratings": 3, "users": 2, "movies": 2, "published": False}
    events, items, users = (
        pl.read_parquet(tmp_path / "tables" / f"{n}.parquet") for n in ("events", "items", "users")
    )
    assert events.sort("user", "item").rows() == [
        (1, 10, 5.0, 1, 100),
        (1, 20, 3.0, 0, 101),
        (2, 10, 4.0, 1, 90),
    ]
    assert items.rows() == [
        (10, "The Invented (1999)", "Drama", 1999, "Drama, War"),
        (20, "Café of Nobody (1950)", "Comedy", 1950, "Comedy"),
    ]
    assert users.rows() == [
        (1, "woman", "under 18", "a school student", "48067"),
        (2, "man", "56 or more", "of another occupation", "02115-1234"),
    ]


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_other_line_ends_give_the_same_tables(raw, tmp_path, end):
    recipe.make(tmp_path / "one" / "tables", raw)
    for name, text in FILES.items():
        (raw / name).write_bytes(text.replace("\n", end).encode("latin-1"))
    recipe.make(tmp_path / "two" / "tables", raw)
    for name in ("events", "items", "users"):
        one, two = (pl.read_parquet(tmp_path / run / "tables" / f"{name}.parquet") for run in ("one", "two"))
        assert one.equals(two)


def test_a_zip_gives_the_same_tables(raw, tmp_path):
    archive = tmp_path / "any.zip"
    with zipfile.ZipFile(archive, "w") as content:
        for name in FILES:
            content.write(raw / name, f"ml-1m/{name}")
    recipe.make(tmp_path / "one" / "tables", raw)
    recipe.make(tmp_path / "two" / "tables", archive)
    for name in ("events", "items", "users"):
        one, two = (pl.read_parquet(tmp_path / run / "tables" / f"{name}.parquet") for run in ("one", "two"))
        assert one.equals(two)


def test_other_counts_are_said_and_missing_files_refused(raw, tmp_path, capsys):
    recipe.make(tmp_path / "tables", raw)
    said = capsys.readouterr().out
    assert "MovieLens-1M: research use only" in said
    assert "given is not the published data set: 3 ratings (published: 1,000,209), 2 users" in said
    assert "1 ratings of 5 (published: 226,310)" in said
    (raw / "users.dat").unlink()
    with pytest.raises(ValueError, match=r"has no users.dat, wanted ratings.dat, movies.dat, users.dat"):
        recipe.make(tmp_path / "tables", raw)
    with pytest.raises(ValueError, match=r"nowhere does not exist, wanted a folder or zip with ratings\.dat"):
        recipe.make(tmp_path / "tables", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        (
            "ratings",
            "2::20::x::91",
            " line 4, column 'rating': found 'x', wanted a whole number from 1 to 5; mend the",
        ),
        (
            "ratings",
            "2::20::6::91",
            " line 4, column 'rating': found '6', wanted a whole number from 1 to 5; mend the",
        ),
        (
            "ratings",
            "2::20::3.5::91",
            " line 4, column 'rating': found '3.5', wanted a whole number from 1 to 5",
        ),
        ("ratings", "2::20::4", " line 4 has 3 fields, wanted 4 fields; mend the line"),
        ("ratings", "2::20::4::91::7", " line 4 has 5 fields, wanted 4 fields; mend the line"),
        ("ratings", "3::20::4::91", " line 4, column 'user': found '3', wanted a user of users.dat; "),
        ("ratings", "2::30::4::91", " line 4, column 'item': found '30', wanted a movie of movies.dat; "),
        ("users", "3::X::1::10::1", " line 3, column 'gender': found 'X', wanted F or M; "),
        (
            "users",
            "3::F::2::10::1",
            " line 3, column 'age': found '2', wanted one of 1, 18, 25, 35, 45, 50, 56; ",
        ),
        ("users", "3::F::1::21::1", " line 3, column 'occupation': found '21', wanted 0 to 20; "),
        ("movies", "30::::War", " line 3, column 'title': found nothing, wanted text; "),
        (
            "movies",
            "10::Other (2000)::War",
            " line 3, column 'item': found '10', wanted one that no earlier line has (line 1 has it); mend",
        ),
        (
            "users",
            "2::F::1::10::1",
            " line 3, column 'user': found '2', wanted one that no earlier line has (line 2 has it); mend",
        ),
    ],
)
def test_a_row_that_cannot_be_is_named_and_nothing_is_left(raw, tmp_path, name, line, problem):
    path = raw / f"{name}.dat"
    path.write_text(FILES[f"{name}.dat"] + line, encoding="latin-1")
    with pytest.raises(ValueError, match="wanted") as error:
        recipe.make(tmp_path / "tables", raw)
    assert str(error.value).startswith(f"{path}{problem}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tables").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="MovieLens-1M is not at ../shared/datasets/ml-1m")
def test_counts_of_the_paper(tmp_path):
    counts = recipe.make(tmp_path / "tables", SHARED)
    assert counts == {"ratings": 1_000_209, "users": 6_040, "movies": 3_883, "published": True}
    fields = ["gender", "age", "occupation", "zip"]
    metrics = build_log(tmp_path / "tables", tmp_path / "log", PrepareConfig(user_fields=fields))
    split = [metrics[name] for name in ("samples", "train", "valid", "test")]
    assert split == [970_009, 776_007, 97_000, 97_002]
    assert (metrics["users"], metrics["items"]) == (6_040, 3_706)
    assert metrics["cold_user_share_test"] == pytest.approx(0.198, abs=0.0005)
    assert metrics["shared_second_share"] == pytest.approx(0.439, abs=0.0005)
