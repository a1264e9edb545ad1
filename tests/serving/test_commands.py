"""`make recommend`, `make score` and `make bundle`, as far as the words behind them go."""

import polars as pl
import pytest

from recllm.errors import ConfigError
from recllm.serving.bundle import put_in_place, write_bundle
from stages.recommend import items, main, options


def test_words_become_options(tmp_path):
    pl.DataFrame({"item": [5, 7]}).write_parquet(tmp_path / "items.parquet")
    asked = options(
        {
            "K": "20",
            "KEEP_SEEN": "1",
            "ITEMS": str(tmp_path / "items.parquet"),
            "EXCLUDE": "3, 4",
            "TIME": "2020-01-01",
            "ON_UNKNOWN": "skip",
        }
    )
    assert (asked.k, asked.filter_viewed, asked.on_unknown, asked.time) == (20, False, "skip", "2020-01-01")
    assert (asked.items_to_recommend, asked.exclude) == (["5", "7"], ["3", "4"])
    assert items({}, "ITEMS") is None


def test_items_of_a_file(tmp_path):
    (tmp_path / "seen.jsonl").write_text('{"item": 5}\n{"item": 7}\n')
    (tmp_path / "seen.csv").write_text("item\n05\n")
    (tmp_path / "names.csv").write_text("name\n5\n")
    (tmp_path / "seen.txt").write_text("5\n")
    assert items({"EXCLUDE": str(tmp_path / "seen.jsonl")}, "EXCLUDE") == ["5", "7"]
    assert items({"EXCLUDE": str(tmp_path / "seen.csv")}, "EXCLUDE") == ["05"]
    with pytest.raises(ValueError, match="columns name; wanted one named item"):
        items({"EXCLUDE": str(tmp_path / "names.csv")}, "EXCLUDE")
    with pytest.raises(ValueError, match=r"ends with '\.txt'"):
        items({"EXCLUDE": str(tmp_path / "seen.txt")}, "EXCLUDE")


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"K": "ten"}, "K=ten"),
        ({"KEEP_SEEN": "yes"}, "KEEP_SEEN=yes"),
        ({"ON_UNKNOWN": "guess"}, "ON_UNKNOWN"),
    ],
)
def test_words_that_mean_nothing(asked, line):
    with pytest.raises(ConfigError, match=line):
        options(asked)


def test_a_bundle_answers_files(cascades, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    write_bundle(cascades["reclora"], bundle)
    (tmp_path / "users.csv").write_text("user\n1\n2\n")
    words = [f"BUNDLE={bundle}", f"USERS={tmp_path / 'users.csv'}", f"OUT={tmp_path / 'out.csv'}", "K=3"]
    assert main(["recommend", *words]) == 0
    assert pl.read_csv(tmp_path / "out.csv")["rank"].to_list() == [1, 2, 3, 1, 2, 3]
    assert "known_users 2" in capsys.readouterr().out
    assert main(["recommend", *words[:2]]) == 2
    assert "no OUT is given" in capsys.readouterr().err
    (tmp_path / "pairs.csv").write_text("user,item\n1,5\n")
    pairs = [words[0], f"PAIRS={tmp_path / 'pairs.csv'}", f"OUT={tmp_path / 'scores.parquet'}"]
    assert main(["score", *pairs]) == 0
    assert pl.read_parquet(tmp_path / "scores.parquet")["score"].null_count() == 0
    (bundle / "log" / "item.npy").unlink()
    assert main(["recommend", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_bundle_that_was_there_outlives_errors_and_kills(tmp_path):
    folder = tmp_path / "sim"
    folder.mkdir()
    (folder / "version").write_text("first")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "not made", folder)
    assert (folder / "version").read_text() == "first"
    folder.replace(tmp_path / ".sim.old")  # as a kill between the two moves leaves it
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "not made", folder)
    assert (folder / "version").read_text() == "first"
    made = tmp_path / "made"
    made.mkdir()
    (made / "version").write_text("second")
    put_in_place(made, folder)
    assert (folder / "version").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["sim"]


def test_where_a_cascade_lies(capsys):
    assert main(["folder", "DATASET=demo", "SYSTEM=reclora"]) == 0
    assert capsys.readouterr().out == "artifacts/demo/cascade/reclora\n"
