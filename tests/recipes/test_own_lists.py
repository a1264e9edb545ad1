"""Files whose rows are lists, a file a split, given candidates: to tables, one form after the other."""

import json

import polars as pl
import pytest
from omegaconf import OmegaConf

from recllm.errors import ConfigError
from recllm.tables.config import SourceConfig
from tests.recipes.own_recipe import recipe

ITEMS = "id,name,kind\n1,One,odd\n2,Two,even\n3,Three,odd\n4,Four,even\n5,Five,odd\n"
CLICKS = {"rule": "clicks"}


def make(folder, events, files, **sections):
    """Counts and events (user, item, label, split) of a data set in which every event is liked."""
    for name, content in {"items.csv": ITEMS, **files}.items():
        (folder / name).write_text(content)
    items = {"path": "items.csv", "item": "id", "title": "name", **sections.pop("items", {})}
    source = {"events": events, "items": items, "label": CLICKS, **sections}
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), source))
    counts = recipe.make(folder / "tables", folder, config)
    return counts, pl.read_parquet(folder / "tables" / "events.parquet")


SEQUENCES = {"path": "log.csv", "layout": "sequences", "user": "u", "item": "list"}


def test_a_row_is_a_user_s_whole_list(tmp_path):
    counts, events = make(tmp_path, SEQUENCES, {"log.csv": "u,list,gaps\nb,3 1 2,0 4 9\na,2 5,0 0\n"})
    assert events.select("user", "item", "label").rows() == [
        ("b", "3", 1), ("b", "1", 1), ("b", "2", 1), ("a", "2", 1), ("a", "5", 1),
    ]  # fmt: skip
    assert events["timestamp"].null_count() == 5
    assert (counts["read_sequences"], counts["read_events"]) == (2, 5)


@pytest.mark.parametrize(
    ("changes", "text", "users"),
    [
        ({"user": "", "columns": ["list"]}, "3 1 2\n\n2 5\n", ["1", "1", "1", "3", "3"]),
        ({"user": "list", "columns": ["list"]}, "bob 3 1 2\nann 2 5\n", ["bob"] * 3 + ["ann"] * 2),
        ({"list_separator": "|"}, "u,list\nb, 3|1||2 \na,2|5\n", ["b"] * 3 + ["a"] * 2),
    ],
)
def test_forms_of_sequences(tmp_path, changes, text, users):
    """No user, a user as the first value of the list, another separator."""
    _, events = make(tmp_path, SEQUENCES | changes, {"log.csv": text})
    assert events["user"].to_list() == users
    assert events["item"].to_list() == ["3", "1", "2", "2", "5"]


def test_lists_in_json_lines_and_parquet(tmp_path):
    rows = [{"u": "b", "list": [3, 1, 2]}, {"u": "a", "list": [2, 5]}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    _, of_json = make(tmp_path, SEQUENCES | {"path": "log.jsonl"}, {"log.jsonl": lines})
    pl.DataFrame(rows).write_parquet(tmp_path / "log.parquet")
    _, of_parquet = make(tmp_path, SEQUENCES | {"path": "log.parquet"}, {})
    assert of_json.equals(of_parquet)
    assert of_json["item"].to_list() == ["3", "1", "2", "2", "5"]


def test_lists_of_times_and_ratings_go_with_the_items(tmp_path):
    events = SEQUENCES | {"rating": "stars", "rating_scale": [1, 5], "timestamp": "at"}
    label = {"rule": "rating", "threshold": 3}
    rows = "u,list,stars,at\nb,3 1,5 2,7 9\na,2,4,8\n"
    _, made = make(tmp_path, events, {"log.csv": rows}, label=label)
    assert made.select("item", "rating", "label", "timestamp").rows() == [
        ("3", 5.0, 1, 7), ("1", 2.0, 0, 9), ("2", 4.0, 1, 8),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"log\.csv line 2 has 1 values in column 'stars' for 2 items"):
        make(tmp_path, events, {"log.csv": rows.replace("5 2", "5")}, label=label)


def test_a_held_out_file_without_rows_is_told(tmp_path):
    parts = {"valid": {"path": "v.csv"}, "test": {"path": "t.csv"}}
    files = {"log.csv": "u,list\nb,3 1 2\n", "v.csv": "u,list\na,2 5\n", "t.csv": "u,list\n"}
    with pytest.raises(ValueError, match=r"^t\.csv has no rows, wanted the events of test$"):
        make(tmp_path, SEQUENCES, files, **parts)


def test_a_faulty_item_of_a_list_is_named_by_its_line(tmp_path):
    text = "u,list\nb,3 1 2\na,2 9 5\n"
    message = r"^log\.csv line 3, column 'list': found '9', wanted an item of items\.csv; mend"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, SEQUENCES, {"log.csv": text})
    counts, events = make(tmp_path, SEQUENCES, {"log.csv": text}, faulty="drop")
    assert counts["dropped_events_unknown_item"] == 1
    assert events["item"].to_list() == ["3", "1", "2", "2", "5"]


WINDOWS = {"path": "log.csv", "layout": "windows", "user": "u", "history": "before", "item": "next"}
TWO_USERS = "u,before,next\na,1,2\nb,,4\na,1 2,3\nb,4,1\na,2 3,5\nb,4 1,2\n"
"""At most two items before; a: 1 2 3 5, b: 4 1 2, row by row."""


def test_windows_become_the_events_that_they_were_cut_from(tmp_path):
    counts, events = make(tmp_path, WINDOWS, {"log.csv": TWO_USERS})
    of_user = {user: rows for (user,), rows in events.group_by("user")}
    assert of_user["a"]["item"].to_list() == ["1", "2", "3", "5"]
    assert of_user["a"]["label"].to_list() == [None, 1, 1, 1]  # what no row asks for is history only
    assert of_user["b"]["item"].to_list() == ["4", "1", "2"]
    assert of_user["b"]["label"].to_list() == [1, 1, 1]
    assert (counts["read_windows"], counts["windows_that_begin_a_user"]) == (6, 2)


def test_a_window_that_goes_on_from_no_other_is_told(tmp_path):
    torn = TWO_USERS.replace("a,2 3,5", "a,1 3,5")
    with pytest.raises(ValueError, match="the list ends") as error:
        make(tmp_path, WINDOWS, {"log.csv": torn})
    assert str(error.value) == (
        "log.csv line 6, column 'before': the list ends with '1 3', wanted '1 2 3', the end of the row "
        "before of user 'a' (0 more such rows); mend the order of the rows, or set "
        "source.events.windows: begin, which makes another user of what follows"
    )
    counts, events = make(tmp_path, WINDOWS | {"windows": "begin"}, {"log.csv": torn})
    assert counts["windows_that_begin_a_user"] == 3
    assert events.filter(pl.col("user") == "a")["item"].to_list() == ["1", "2", "3"]
    assert events.filter(pl.col("user") == "a#2")["item"].to_list() == ["1", "3", "5"]


@pytest.mark.parametrize(("windows", "users"), [("begin", 2), ("alone", 5)])
def test_windows_without_users(tmp_path, windows, users):
    text = "before,next\n1,2\n1 2,3\n2 3,5\n4,1\n4 1,2\n"
    counts, events = make(tmp_path, WINDOWS | {"user": "", "windows": windows}, {"log.csv": text})
    assert counts["windows_that_begin_a_user"] == events["user"].n_unique() == users
    lists = [rows["item"].to_list() for _, rows in events.group_by("user", maintain_order=True)]
    whole = [["1", "2", "3", "5"], ["4", "1", "2"]]
    each = [["1", "2"], ["1", "2", "3"], ["2", "3", "5"], ["4", "1"], ["4", "1", "2"]]
    assert lists == (whole if windows == "begin" else each)
    assert events["label"].count() == 5


def test_a_file_a_split_and_lists_of_candidates_by_name(tmp_path):
    """Artists by name, another name of one among them; the splits go on from one another."""
    held_out = {"history": "before", "item": "own", "named_by": "name", "candidates": "among"}
    valid = {"u": "a", "before": ["Two", "3"], "own": "Fünf", "among": ["One", "Fünf", "Two"]}
    test = {"u": "a", "before": ["3", "Five"], "own": "Four", "among": ["Four", "Two", "One"]}
    items = ITEMS.replace("Three", "3")  # a name like an id
    counts, events = make(
        tmp_path,
        WINDOWS,
        {
            "items.csv": items,
            "log.csv": "u,before,next\na,1,2\nb,4,1\na,1 2,3\nb,4 1,5\n",
            "v.jsonl": json.dumps(valid) + "\n",
            "t.jsonl": json.dumps(test) + "\n",
        },
        items={"aliases": [["Fünf", "Five"]]},
        valid={"path": "v.jsonl", **held_out},
        test={"path": "t.jsonl", **held_out},
    )
    of_a = events.filter(pl.col("user") == "a")
    assert of_a.select("item", "label", "split").rows() == [
        ("1", None, 0), ("2", 1, 0), ("3", 1, 0), ("5", 1, 1), ("4", 1, 2),
    ]  # fmt: skip
    assert of_a["candidates"].to_list() == [None, None, None, ["1", "5", "2"], ["4", "2", "1"]]
    assert counts["read_windows"] == 6


@pytest.mark.parametrize(
    ("among", "problem"),
    [
        (["One", "Two"], r"found a list of candidates, wanted the row's own item among them"),
        (["One", "Four", "One"], "found a list of candidates, wanted each of them once"),
        (["One", "Four", "Six"], r"found 'name Six' in a list of candidates, wanted items of items\.csv"),
        (["Four"], "found 1 in a list of candidates, wanted 2 items, as in the first list"),
    ],
)
def test_a_faulty_list_of_candidates_stops_it(tmp_path, among, problem):
    held_out = {"named_by": "name", "candidates": "among", "item": "own", "history": "before"}
    valid = {"u": "a", "before": ["One", "Two"], "own": "Three", "among": ["One", "Three"]}
    test = {"u": "a", "before": ["Two", "Three"], "own": "Four", "among": among}
    files = {
        "log.csv": "u,before,next\na,1,2\nb,4,1\nb,4 1,2\n",
        "v.jsonl": json.dumps(valid) + "\n",
        "t.jsonl": json.dumps(test) + "\n",
    }
    parts = {name: {"path": f"{name[0]}.jsonl", **held_out} for name in ("valid", "test")}
    with pytest.raises(ValueError, match=rf"^t\.jsonl row 1, column 'among': {problem} \(0 more"):
        make(tmp_path, WINDOWS, files, **parts)


def test_a_column_says_the_split(tmp_path):
    events = {"path": "log.csv", "user": "u", "item": "i", "split": "part"}
    events |= {"split_texts": ["tr", "dev", "te"]}
    text = "u,i,part\na,1,\na,2,tr\nb,1,tr\na,3,dev\nb,2,te\n"
    _, made = make(tmp_path, events, {"log.csv": text})
    assert made["split"].to_list() == [None, 0, 0, 1, 2]
    message = r"line 5, column 'part': found 'dve', wanted one of tr, dev, te \(source\.events\.split_texts\)"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, events, {"log.csv": text.replace("dev", "dve")})


def test_a_name_of_several_items_is_refused(tmp_path):
    named = WINDOWS | {"named_by": "name"}
    files = {"items.csv": ITEMS.replace("Two", "One"), "log.csv": "u,before,next\na,Three,One\n"}
    with pytest.raises(ValueError, match=r"items\.csv, column 'name': 'One' is the name of 2 items"):
        make(tmp_path, named, files)
    with pytest.raises(
        ValueError, match=r"named_by='nmae' is no column of items\.csv, wanted one of item, ti"
    ):
        make(tmp_path, WINDOWS | {"named_by": "nmae"}, files)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layout": "windows"}, "source.events.history=''"),
        ({"history": "before"}, "source.events.history='before'"),
        ({"user": ""}, "source.events.user=''"),
        ({"layout": "windows", "history": "before", "user": ""}, "source.events.windows='continue'"),
        ({"layout": "sequences", "windows": "begin"}, "source.events.windows='begin'"),
        ({"split_texts": ["a", "b"]}, "source.events.split_texts"),
        ({"list_separator": ""}, "source.events.list_separator=''"),
    ],
)
def test_wrong_keys_are_told_before_a_file_is_read(tmp_path, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        make(tmp_path, {"path": "log.csv", "user": "u", "item": "i"} | changes, {})


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"valid": {"path": "v.csv"}}, "source.valid.path='v.csv'"),
        ({"test": {"item": "own"}}, "source.test.path=''"),
        ({"items": {"aliases": [["one"]]}}, "source.items.aliases"),
    ],
)
def test_wrong_sections_are_told_before_a_file_is_read(tmp_path, sections, problem):
    with pytest.raises(ConfigError, match=problem):
        make(tmp_path, {"path": "log.csv", "user": "u", "item": "i"}, {}, **sections)
