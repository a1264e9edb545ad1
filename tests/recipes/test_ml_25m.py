import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path

import polars as pl
import pytest

from recllm.data.build import build_log
from recllm.data.config import PrepareConfig
from recllm.data.log import EventLog

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "datasets" / "ml-latest-slice"
SPEC = importlib.util.spec_from_file_location("ml_25m_recipe", REPOSITORY / "data" / "ml_25m" / "recipe.py")
recipe = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = recipe
SPEC.loader.exec_module(recipe)


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
