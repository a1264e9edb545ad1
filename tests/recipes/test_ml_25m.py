import hashlib
import re
import zipfile
from pathlib import Path

import polars as pl
import pytest

from recllm.eventlog.build import build_log
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.log import EventLog
from tests.recipes.contract import RecipeContract, load_recipe

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "datasets" / "ml-latest-slice"
recipe = load_recipe("ml_25m")


class TestMovieLens25M(RecipeContract):
    recipe = recipe
    configured = "ml-25m"

    def write_raw(self, folder):
        ratings = "userId,movieId,rating,timestamp\n1,10,3.5,100\n1,20,3.0,101\n2,10,0.5,90\n"
        (folder / "ratings.csv").write_text(ratings)
        movies = "movieId,title,genres\n10,Invented (1999),Drama|War\n20,Other (1950),(no genres listed)\n"
        (folder / "movies.csv").write_text(movies)


def test_invented_files_in_the_raw_layout(tmp_path):
    raw = tmp_path / "given" / "ml-25m"
    raw.mkdir(parents=True)
    (raw / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,10,3.5,100\n1,20,3.0,101\n2,10,0.5,90\n"
    )
    (raw / "movies.csv").write_text(
        'movieId,title,genres\n10,"Invented, The ""Quoted"" (1999)",Drama|War\n'
        "20,Café (1950),(no genres listed)\n",
        encoding="utf-8",
    )
    counts = recipe.make(tmp_path / "tables", raw.parent)  # one folder above is found as well
    assert counts == {"ratings": 3, "users": 2, "movies": 2, "published": False}
    events, items, users = (
        pl.read_parquet(tmp_path / "tables" / f"{n}.parquet") for n in ("events", "items", "users")
    )
    assert events.sort("user", "item").rows() == [
        (1, 10, 3.5, 1, 100),
        (1, 20, 3.0, 0, 101),
        (2, 10, 0.5, 0, 90),
    ]
    assert items.rows() == [
        (10, 'Invented, The "Quoted" (1999)', "Drama", 1999, "Drama, War"),
        (20, "Café (1950)", "(no genres listed)", 1950, "(no genres listed)"),
    ]
    assert users.rows() == [(1,), (2,)]


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,10,3.5,100\n2,10,2,7\n")
    (folder / "movies.csv").write_text("movieId,title,genres\n10,Invented (1999),Drama\n")
    return folder


HEAD = "userId,movieId,rating,timestamp"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("ratings", "2,10,x,101\n", " line 4, column 'rating': found 'x', wanted a number from 0.5 to 5; "),
        (
            "ratings",
            "2,10,5.5,101\n",
            " line 4, column 'rating': found '5.5', wanted a number from 0.5 to 5; ",
        ),
        (
            "ratings",
            "2,10,0,1\n2,10,-1,1\n",
            " line 4, column 'rating': found '0', wanted a number from 0.5 to",
        ),
        (
            "ratings",
            "2,10,nan,101\n",
            " line 4, column 'rating': found 'nan', wanted a number from 0.5 to 5; ",
        ),
        (
            "ratings",
            "2,10,inf,101\n",
            " line 4, column 'rating': found 'inf', wanted a number from 0.5 to 5; ",
        ),
        (
            "ratings",
            "2,10,,101\n",
            " line 4, column 'rating': found nothing, wanted a number from 0.5 to 5; ",
        ),
        (
            "ratings",
            "2,10,4,-1\n",
            " line 4, column 'timestamp': found '-1', wanted a whole number from 0 to ",
        ),
        (
            "ratings",
            "2,10,4,1700000000000\n",
            " line 4, column 'timestamp': found '1700000000000', wanted a whole",
        ),
        ("ratings", "\nu2,10,4,1\n", " line 5, column 'userId': found 'u2', wanted a whole number; "),
        (
            "ratings",
            "2,99999999999999999999,4,1\n",
            " line 4, column 'movieId': found '99999999999999999999', wa",
        ),
        ("ratings", "2,11,4,1\n", " line 4, column 'movieId': found '11', wanted a movie of movies.csv; "),
        ("ratings", f"{HEAD}\n", " line 4, column 'userId': found 'userId', wanted a whole number; "),
        ("ratings", "2,10,4\n", " line 4 has 3 fields, wanted 4 fields as in line 1; mend the line"),
        ("ratings", "2,10,4.", " line 4 has 3 fields, wanted 4 fields as in line 1; mend the line"),
        ("ratings", "2,10,4,1,5\n", " line 4 has 5 fields, wanted 4 fields as in line 1; mend the line"),
        ("ratings", '2,10,"4,1\n', " line 4 opens a quote that is never closed, wanted 4 fields"),
        ("ratings", "2,10,4,\x001\n", " line 4 holds a zero byte, wanted text in utf-8; get the file again"),
        ("movies", "11,Caf\xe9 (2000),War\n", " line 3 is not in utf-8 (byte 0xe9); get the file again"),
        (
            "movies",
            '11,5" Pipe (2000),War\n',
            " line 3 has a quote within a field, wanted quotes around whole",
        ),
        ("movies", "x,Number (2000),War\n", " line 3, column 'movieId': found 'x', wanted a whole number; "),
        ("movies", "11,,War\n", " line 3, column 'title': found nothing, wanted text; "),
        (
            "movies",
            "11,Other,War\n010,Twice,War\n",
            " line 4, column 'movieId': found '010', wanted one that no earlier line has (line 2 has it); ",
        ),
        ("movies", '11,a"b,x\n' + "12,x,War\n" * 99, " line 3 has a quote within a field, wanted quotes"),
    ],
)
def test_a_row_that_cannot_be_is_named_and_nothing_is_left(raw, tmp_path, recwarn, name, content, problem):
    path = raw / f"{name}.csv"
    path.write_bytes(path.read_bytes() + content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"wanted|get") as error:
        recipe.make(tmp_path / "tables", raw)
    assert str(error.value).startswith(f"{path}{problem}")
    assert "\n" not in str(error.value)
    assert not recwarn.list  # polars' own words
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "ratings.csv is empty (0 bytes), wanted its data"),
        (f"{HEAD}\n", "ratings.csv has no usable row of 0"),
        ("userId,movie,rating,timestamp\n1,10,4,1\n", "wanted also 'movieId'; the nearest is 'movie'"),
        (f"{HEAD}\n1,10,4,1\n1,10,2,2\n", "all 2 events are of the user 1, wanted two users at least"),
    ],
)
def test_a_file_that_cannot_be_is_refused_and_nothing_is_left(raw, tmp_path, content, problem):
    (raw / "ratings.csv").write_bytes(content.encode())
    with pytest.raises(ValueError, match=re.escape(problem)) as error:
        recipe.make(tmp_path / "tables", raw)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tables").exists()


def test_what_may_be_odd_is_read(raw, tmp_path):
    """Other order and more columns, CR LF beside LF, empty lines, great ids, scripts, quotes, line breaks."""
    big = 2**40
    (raw / "ratings.csv").write_bytes(
        f"\ufefftimestamp,userId,rating,movieId,note\r\n7,{big},5,10,x\r\n\n8,2,0.5,{big},\n".encode()
    )
    title = 'שלום "x",\n🎉 (1999)'
    quoted = title.replace('"', '""')
    (raw / "movies.csv").write_text(f'movieId,title,genres\n10,Plain,War\n{big},"{quoted}",Drama|War\n')
    recipe.make(tmp_path / "tables", raw)
    events, items = (pl.read_parquet(tmp_path / "tables" / f"{n}.parquet") for n in ("events", "items"))
    assert events.rows() == [(big, 10, 5.0, 1, 7), (2, big, 0.5, 0, 8)]
    assert items.row(1) == (big, 'שלום "x", 🎉 (1999)', "Drama", 1999, "Drama, War")


@pytest.mark.parametrize("ends", ["\r", "\r\n", "\n\r", "\r\n\r\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_end_with_lf_cr_lf_or_cr(tmp_path, ends, mark):
    """One kind of line end, several in turn, empty lines among them: the same tables."""
    files = {
        "ratings": [HEAD, "1,10,3.5,100", "2,20,0.5,7", "3,10,4,8"],
        "movies": ["movieId,title,genres", "10,Invented (1999),Drama|War", '20,"Two, lines",War', "30,x,y"],
    }
    kinds = ends.replace("\r\n", "b").replace("\r", "r").replace("\n", "n")
    ends = [{"b": "\r\n", "r": "\r", "n": "\n"}[kind] for kind in kinds]
    found = []
    for folder, chosen in (("odd", ends), ("plain", ["\n"])):
        (tmp_path / folder).mkdir()
        for name, lines in files.items():
            text = mark + "".join(line + chosen[place % len(chosen)] for place, line in enumerate(lines))
            (tmp_path / folder / f"{name}.csv").write_bytes(text.encode())
        recipe.make(tmp_path / "out" / folder, tmp_path / folder)
        names = ("events", "items", "users")
        found.append(
            [pl.read_parquet(tmp_path / "out" / folder / f"{name}.parquet").rows() for name in names]
        )
    assert found[0] == found[1]
    assert len(found[0][0]) == len(found[0][1]) == 3


def test_a_published_zip_is_known_by_its_checksum(raw, tmp_path, monkeypatch):
    path = tmp_path / "ml.zip"
    with zipfile.ZipFile(path, "w") as content:
        for name in ("ratings.csv", "movies.csv"):
            content.write(raw / name, f"ml-25m/{name}")
    monkeypatch.setattr(recipe, "COUNTS", {"ratings": 2, "users": 2, "movies": 1, "rated movies": 1})
    monkeypatch.setattr(recipe, "CHECKSUM", "md5:" + hashlib.md5(path.read_bytes()).hexdigest())
    assert recipe.make(tmp_path / "tables", path)["published"] is True
    monkeypatch.setattr(recipe, "COUNTS", {"ratings": 3, "users": 2, "movies": 1, "rated movies": 1})
    with pytest.raises(
        ValueError, match=r"ml.zip has the published checksum and yet 2 ratings \(published: 3\)"
    ):
        recipe.make(tmp_path / "tables", path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no MovieLens files at ../shared/datasets/ml-latest-slice")
def test_half_stars_of_a_real_slice(tmp_path, capsys):
    counts = recipe.make(tmp_path / "tables", SHARED)
    assert counts == {"ratings": 206_585, "users": 2_149, "movies": 86_537, "published": False}
    said = "206,585 ratings (published: 25,000,095), 2,149 users (published: 162,541), 86,537 movies"
    assert f"ml-latest-slice is not the published data set: {said}" in capsys.readouterr().out
    metrics = build_log(tmp_path / "tables", tmp_path / "log", PrepareConfig())
    # every user has 5 ratings or more here, so 5 rows of each are no samples, unless a user has fewer
    lengths = (
        pl.read_parquet(tmp_path / "tables" / "events.parquet").group_by("user").len()["len"].cast(pl.Int64)
    )
    samples = int((lengths - 5).clip(0).sum())
    assert metrics["samples"] == samples
    assert (metrics["train"], metrics["valid"]) == (samples * 8 // 10, samples // 10)
    assert metrics["items"] == 13_049
    log = EventLog.open(tmp_path / "log")
    assert log.meta["rating_levels"] == ["0.5", "1", "1.5", "2", "2.5", "3", "3.5", "4", "4.5", "5"]
    assert ((log.rating >= 7) == (log.label == 1)).all()  # code 7 is 3.5 stars
