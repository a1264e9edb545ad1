"""Files of one's own to tables: one oddity after the other."""

import re

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.tables.config import SourceConfig
from tests.recipes.contract import RecipeContract
from tests.recipes.own_recipe import SOURCE, config_of, recipe

ITEMS = 'sku,name,kind\nA,Apple,fruit\nB,"Bread, ""dark""",food\n'
EVENTS = "who,sku,stars,at\n1,A,5,100\n1,B,2,200\n2,A,3,300\n"


def source(changes):
    sections = {section: dict(keys) for section, keys in SOURCE.items()}
    for key, value in changes.items():
        section, _, last = key.partition("__")
        if last:
            sections.setdefault(section, {})[last] = value
        else:
            sections[section] = value
    return config_of(sections)


def make(folder, changes=None, **files):
    """Counts, and the rows of events, items and users; `events="..."` is the content of events.csv."""
    for name, content in {"events": EVENTS, "items": ITEMS, **files}.items():
        path = folder / f"{name}.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    counts = recipe.make(folder / "tables", folder, source(changes or {}))
    return counts, *(
        pl.read_parquet(folder / "tables" / f"{name}.parquet") for name in ("events", "items", "users")
    )


class TestOwn(RecipeContract):
    recipe = recipe
    configured = None

    def write_raw(self, folder):
        (folder / "events.csv").write_text(EVENTS)
        (folder / "items.csv").write_text(ITEMS)

    def make(self, out, raw):
        return recipe.make(out, raw, source({}))


ROWS = [("1", "A", 5.0, 1, 100), ("1", "B", 2.0, 0, 200), ("2", "A", 3.0, 0, 300)]


def test_what_a_plain_shop_becomes(tmp_path):
    counts, events, items, users = make(
        tmp_path, {"users__path": "users.csv", "users__user": "id"}, users="id,age\n1,20\n3,30\n"
    )
    assert events.rows() == ROWS
    assert items.rows() == [("A", "Apple", "fruit"), ("B", 'Bread, "dark"', "food")]
    assert items.columns == ["item", "title", "kind"]
    assert users.rows() == [("1", "20"), ("3", "30"), ("2", None)]  # 2 is in no file of users
    assert counts == {
        "read_items": 2, "read_events": 3, "read_users": 2, "users_without_attributes": 1,
        "events": 3, "events_without_label": 0, "items": 2, "users": 3,
    }  # fmt: skip


def test_a_users_file_that_has_none_of_the_users_stops_it(tmp_path):
    """Ids that went through pandas are 1.0 in the log, and 1 in the file."""
    events = "who,sku,stars,at\n1.0,A,5,100\n1.0,B,2,200\n2.0,A,3,300\n"
    changes = {"users__path": "users.csv", "users__user": "id"}
    with pytest.raises(ValueError, match=r"^users\.csv, column 'id': none of the 2 users") as error:
        make(tmp_path, changes, events=events, users="id,age\n2,20\n1,30\n")
    assert str(error.value) == (
        "users.csv, column 'id': none of the 2 users of the events is there, wanted the same ids; in the "
        "events '1.0', in the file '2'; it looks like whole numbers written as 1.0: '1.0' here, '1' there; "
        "write them alike, or leave the file out with source.users.path: ''"
    )
    assert make(tmp_path, {}, events=events)[3].rows() == [("1.0",), ("2.0",)]


def test_users_that_are_not_in_their_file_are_told(tmp_path, capsys):
    changes = {"users__path": "users.csv", "users__user": "id"}
    make(tmp_path, changes, users="id,age\n02,20\n1,30\n")
    assert capsys.readouterr().out == (
        "users.csv, column 'id': 1 of 2 users, with 33.3% of the events, are not there and have no "
        "attributes; in the events '2', in the file '02'; it looks like leading zeros: '2' here, '02' there\n"
    )
    make(tmp_path, changes, users="id,age\n2,20\n1,30\n3,40\n")
    assert capsys.readouterr().out == ""


def test_events_most_of_which_have_no_item_are_told(tmp_path, capsys):
    items = "sku,name\n1,Apple\n2,Bread\n"
    events = "who,sku,stars,at\n1,1.0,5,1\n1,2.0,2,2\n2,1.0,3,3\n1,1,5,4\n2,2,1,5\n"
    hint = "it looks like whole numbers written as 1.0: '1.0' here, '1' there"
    with pytest.raises(ValueError, match=f"line 2, column 'sku': found '1.0', wanted an item of.*{hint}"):
        make(tmp_path, items=items, events=events)
    counts = make(tmp_path, {"faulty": "drop"}, items=items, events=events)[0]
    assert counts["dropped_events_unknown_item"] == 3
    told = (
        "events.csv, column 'sku': 3 of 5 events (60.0%) are of no item of items.csv: in the events '1.0', "
    )
    assert capsys.readouterr().out == f"{told}there '1'; {hint}\n"
    only = "\n".join(events.splitlines()[:4]) + "\n"
    with pytest.raises(ValueError, match=rf"no usable row of 3.*3 of 3 events \(100.0%\).*{hint}$"):
        make(tmp_path, {"faulty": "drop"}, items=items, events=only)


def test_without_users_a_user_is_its_id(tmp_path):
    assert make(tmp_path)[3].rows() == [("1",), ("2",)]


@pytest.mark.parametrize(
    ("events", "changes", "rows"),
    [
        ("who,sku,at\n1,A,5\n2,B,7\n", {"events__rating": "", "label__rule": "clicks"},
         [("1", "A", None, 1, 5), ("2", "B", None, 1, 7)]),
        ("who,sku,stars\n2,B,1\n1,A,5\n2,A,\n", {"events__timestamp": ""},
         [("2", "B", 1.0, 0, None), ("1", "A", 5.0, 1, None), ("2", "A", None, None, None)]),
        ("who,sku,do,at\n1,A,buy,1\n1,B,see,2\n2,B,hold,3\n2,A,,4\n",
         {"events__rating": "", "label__rule": "column", "label__column": "do", "label__liked": ["buy"],
          "label__disliked": ["see"], "label__history": ["hold"]},
         [("1", "A", None, 1, 1), ("1", "B", None, 0, 2), ("2", "B", None, None, 3),
          ("2", "A", None, None, 4)]),
        ("who;sku;stars;at\n1;A;4,5;1\n2;B;1;2\n", {"events__separator": ";", "events__decimal_comma": True},
         [("1", "A", 4.5, 1, 1), ("2", "B", 1.0, 0, 2)]),
        ("1,A,4.26,1\n2,B,0,2\n2,B,1.1,3\n",
         {"events__columns": ["who", "sku", "stars", "at"], "events__not_rated": 0,
          "events__rating_step": 0.5},
         [("1", "A", 4.5, 1, 1), ("2", "B", None, None, 2), ("2", "B", 1.0, 0, 3)]),
        ("who,sku,stars,at\n1,A,5,NA\n2,B,2,2024-03-01T12:00:00Z\n1,A,4,2024-03-01\n",
         {"events__time_unit": "iso", "events__nulls": ["NA"], "faulty": "drop"},
         [("2", "B", 2.0, 0, 1_709_294_400), ("1", "A", 4.0, 1, 1_709_251_200)]),
        (f"who,sku,stars,at\n{2**31},A,5,1\n007,B,2,2\n7,B,2,2\n", {},
         [("2147483648", "A", 5.0, 1, 1), ("007", "B", 2.0, 0, 2), ("7", "B", 2.0, 0, 2)]),
    ],
)  # fmt: skip
def test_forms_of_logs(tmp_path, events, changes, rows):
    counts, got, _, _ = make(tmp_path, changes, events=events)
    assert got.rows() == rows
    assert counts["events"] == len(rows)
    assert counts["events_without_label"] == sum(row[3] is None for row in rows)


@pytest.mark.parametrize(
    ("items", "changes", "rows"),
    [
        ("sku,name\nA,\nB, \n", {"items__untitled": "Item {item}"}, [("A", "Item A"), ("B", "Item B")]),
        ("sku\nA\nB\n", {"items__title": "", "items__untitled": "{item}!"}, [("A", "A!"), ("B", "B!")]),
        ("sku,name,tags\nA,Apple,red|sweet\nB,Bread,\n", {"items__lists": ["tags"]},
         [("A", "Apple", "red, sweet", "red"), ("B", "Bread", None, None)]),
        ("sku,name,item\nA,Apple,1\nB,Bread,2\n", {}, [("A", "Apple"), ("B", "Bread")]),
        ('sku,name\nA,"Ap\n  ple 🍎"\nB,"""לחם"""\n', {}, [("A", "Ap ple 🍎"), ("B", '"לחם"')]),
    ],
)  # fmt: skip
def test_forms_of_items(tmp_path, items, changes, rows):
    assert sorted(make(tmp_path, changes, items=items)[2].rows()) == rows


def test_nulls_and_escapes(tmp_path):
    items = 'sku,name,kind\nA,"The \\"Good\\" Life",\\N\nB,\\N,NULL\n'
    changes = {"items__escape": "\\", "items__nulls": ["NULL", r"\N"], "items__untitled": "Item {item}"}
    assert make(tmp_path, changes, items=items)[2].rows() == [
        ("A", 'The "Good" Life', None),
        ("B", "Item B", None),
    ]


def test_hours_without_minutes(tmp_path):
    events = "who,sku,stars,at\n1,A,5,2024-03-01 05\n2,B,2,2024-03-01 17\n"
    got = make(tmp_path, {"events__time_unit": "%Y-%m-%d %H"}, events=events)[1]
    assert got["timestamp"].to_list() == [1_709_269_200, 1_709_312_400]
    events = "who,sku,stars,at\n1,A,5,01.03.24 5 AM\n2,B,2,01.03.24 5 PM\n"
    got = make(tmp_path, {"events__time_unit": "%d.%m.%y %-I %p"}, events=events)[1]
    assert got["timestamp"].to_list() == [1_709_269_200, 1_709_312_400]
    with pytest.raises(ValueError, match=r"^source.events.time_unit='%Y-%m-%d :%M' is no strptime") as error:
        make(tmp_path, {"events__time_unit": "%Y-%m-%d :%M"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("threshold", "step", "labels"),
    [(2, 0.1, [1, 0, 0, None]), (0.7, 0.1, [1, 0, 0, None]), (0.66, 0.5, [1, 1, 0, None])],
)
def test_labels_go_by_the_number_in_the_file(tmp_path, threshold, step, labels):
    """Rounded, 2.02 is 2, 0.66 is 0.7, and 7 * 0.1 is above 0.7."""
    events = "who,sku,stars,at\n1,A,2.02,1\n1,B,0.7,2\n2,A,0.66,3\n2,B,-1,4\n"
    changes = {"events__rating_step": step, "events__rating_scale": [0, 3], "events__not_rated": -1}
    got = make(tmp_path, changes | {"label__threshold": threshold}, events=events)[1]
    assert got["label"].to_list() == labels
    rounded = [round(number / step) * step for number in (2.02, 0.7, 0.66)]
    assert got["rating"].to_list() == [*map(pytest.approx, rounded), None]


@settings(max_examples=20, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 500), min_size=2, max_size=20),
    threshold=st.integers(0, 500),
    step=st.sampled_from([0.1, 0.25, 0.5, 1]),
    comma=st.booleans(),
)
def test_rounding_moves_no_label(tmp_path_factory, numbers, threshold, step, comma):
    numbers = [0, 501, *numbers]
    texts = [f"{number / 100}".replace(".", "," if comma else ".") for number in numbers]
    lines = [f'{place % 2};A;"{text}";{place}' for place, text in enumerate(texts)]
    changes = {
        "events__rating_step": step, "events__rating_scale": [0, 6], "events__separator": ";",
        "events__decimal_comma": comma, "label__threshold": threshold / 100,
    }  # fmt: skip
    events = "who;sku;stars;at\n" + "\n".join(lines) + "\n"
    got = make(tmp_path_factory.mktemp("shop"), changes, events=events)[1]
    assert got["label"].to_list() == [int(number > threshold) for number in numbers]


def test_columns_that_are_left_out_are_named(tmp_path, capsys):
    make(tmp_path, items="sku,name,user\nA,Apple,x\nB,Bread,y\n")
    assert "items: column 'user' of items.csv is left out" in capsys.readouterr().out


FAULTS = [  # a row of events.csv, its column, the reason, and what the message says
    (",A,5,1", "who", "no_user", "found nothing, wanted an id"),
    ("1, ,5,1", "sku", "no_item", "found ' ', wanted an id"),
    ("1,Z,5,1", "sku", "unknown_item", "found 'Z', wanted an item of items.csv"),
    ("1,A,five,1", "stars", "rating_no_number", "found 'five', wanted a number from 1 to 5"),
    ("1,A,nan,1", "stars", "rating_not_finite", "found 'nan', wanted a number from 1 to 5"),
    ("1,A,-inf,1", "stars", "rating_not_finite", "found '-inf', wanted a number from 1 to 5"),
    ("1,A,5.01,1", "stars", "rating_out_of_scale", "found '5.01', wanted a number from 1 to 5"),
    ("1,A,5,", "at", "no_time", "found nothing, wanted a time (seconds)"),
    ("1,A,5,2024-01-01", "at", "time_unreadable", "it looks like source.events.time_unit: iso"),
    ("1,A,5,-1", "at", "time_out_of_range", "found '-1', wanted a time from 1970 to 2100"),
    ("1,A,5,1700000000000", "at", "time_out_of_range", "looks like source.events.time_unit: milliseconds"),
    ("1,A,5,1700000000000000", "at", "time_out_of_range", "looks like source.events.time_unit: microseconds"),
]


@pytest.mark.parametrize(("row", "column", "reason", "message"), FAULTS)
def test_a_faulty_row_is_an_error_or_is_counted(tmp_path, row, column, reason, message):
    events = EVENTS + f"\n{row}\n{row}\n2,B,4,400\n"
    with pytest.raises(ValueError, match=r"\(1 more such rows\)$") as error:
        make(tmp_path, events=events)
    assert str(error.value).startswith(f"events.csv line 6, column '{column}': ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tables").exists()
    counts, got, _, _ = make(tmp_path, {"faulty": "drop"}, events=events)
    assert {name: count for name, count in counts.items() if name.startswith("dropped")} == {
        f"dropped_events_{reason}": 2
    }
    assert (counts["read_events"], counts["events"]) == (6, 4)
    assert got.rows() == [*ROWS, ("2", "B", 4.0, 1, 400)]


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        ({"events": ""}, {}, "events.csv is empty"),
        ({"events": "who,sku,stars,at\n"}, {}, "events.csv has no rows, wanted the events"),
        ({"events": "who,sku,stars,at\n\n,,,\n"}, {}, "events.csv has no usable row of 2 (all are empty)"),
        ({"items": ""}, {}, "items.csv is empty"),
        ({"events": EVENTS.replace("stars", "stras")}, {},
         "wanted also 'stars' (source.events.rating); the nearest is 'stras'"),
        ({"events": EVENTS + "1,A\n"}, {}, "events.csv line 5 has 2 fields, wanted 4"),
        ({"items": ITEMS + 'C,5" pipe,x\n'}, {}, "items.csv line 4 has a quote within a field"),
        ({"items": ITEMS + 'C,"x"y,x\n'}, {}, "items.csv line 4 opens a quote that closes within a field"),
        ({"items": ITEMS + 'C,"x,y\n'}, {}, "items.csv line 4 opens a quote that is never closed"),
        ({"items": (ITEMS + "C,café,x\n").encode("latin-1")}, {}, "items.csv line 4 is not in utf-8"),
        ({"items": ITEMS + "A,Apfel,fruit\n"}, {}, "line 4, column 'sku': found 'A', wanted one row an id"),
        ({"items": ITEMS + "C,,fruit\n"}, {}, "line 4, column 'name': found nothing, wanted a title"),
        ({"items": ITEMS + ",Cake,fruit\n"}, {}, "line 4, column 'sku': found nothing, wanted an id"),
        ({}, {"items__lists": ["color"]}, "has other columns kind, wanted 'color' (source.items.lists)"),
        ({"users": "who\n1\n1\n"}, {"users__path": "users.csv"}, "wanted also 'user' (source.users.user)"),
        ({"users": "user,a\n1,x\n1,y\n"}, {"users__path": "users.csv"}, "users.csv line 3, column 'user'"),
        ({"events": EVENTS.replace("2,A", "1,A")}, {}, "all 3 events are of the user '1'"),
        ({"events": EVENTS.replace(",5,", ",1,")}, {}, "all 3 labels are 0"),
        ({}, {"events__time_unit": "milliseconds"}, "the latest time is of 1970"),
        ({}, {"events__time_unit": "iso"}, "it looks like source.events.time_unit: seconds or milliseconds"),
        ({"events": EVENTS.replace("A", "a").replace("B", "b")}, {"faulty": "drop"},
         "no usable row of 3 (3 unknown_item)"),
        ({}, {"events__path": "shop/log.csv"}, "shop/log.csv (source.events.path) does not exist"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_leave_nothing_behind(tmp_path, files, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(tmp_path, changes, **files)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tables").exists()


def test_items_that_are_there_twice(tmp_path):
    again = ITEMS + "A,Apple,fruit\n"
    assert make(tmp_path, items=again)[0]["dropped_items_repeated"] == 1
    counts, _, items, _ = make(tmp_path, {"faulty": "drop"}, items=again + "B,Brot,food\nC,,\nC,Cake,food\n")
    assert items["title"].to_list() == ["Apple", 'Bread, "dark"', "Cake"]
    dropped = {
        name.removeprefix("dropped_items_"): n
        for name, n in counts.items()
        if name.startswith("dropped_items")
    }
    assert dropped == {"repeated": 1, "second_row_of_an_id": 1, "no_title": 1}


def test_raw_must_be_a_folder_and_source_must_be_given(tmp_path):
    (tmp_path / "x.zip").write_text("")
    with pytest.raises(ValueError, match=r"RAW=.*x\.zip is no folder"):
        recipe.make(tmp_path / "tables", tmp_path / "x.zip", source({}))
    with pytest.raises(ValueError, match=r"source.events.path is empty"):
        recipe.make(tmp_path / "tables", tmp_path, SourceConfig())


def test_broken_lines_are_faulty_rows(tmp_path, capsys):
    """A wrong number of fields and quotes that cannot be read, in the log and in the items file."""
    events = EVENTS + '1,A\n1,"A,5,400\n2,B,4,400\n1,B,x,500\n'
    items = ITEMS + 'C,5" pipe,x\nD,Dates,fruit\n'
    hint = r"; mend the line, or leave such lines out with source.faulty: drop$"
    with pytest.raises(
        ValueError, match=rf"^events.csv line 5 has 2 fields, wanted 4 fields as in line 1{hint}"
    ):
        make(tmp_path, events=events)
    assert not (tmp_path / "tables").exists()
    counts, got, catalog, _ = make(tmp_path, {"faulty": "drop"}, events=events, items=items)
    assert {name: count for name, count in counts.items() if name.startswith(("dropped", "read"))} == {
        "read_events": 7, "dropped_events_broken_line": 2, "dropped_events_rating_no_number": 1,
        "read_items": 4, "dropped_items_broken_line": 1,
    }  # fmt: skip
    assert got.rows() == [*ROWS, ("2", "B", 4.0, 1, 400)]
    assert catalog["item"].to_list() == ["A", "B", "D"]
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("items.csv line 4 has a quote within a field")
    assert told[1] == (
        "events.csv line 5 has 2 fields, wanted 4 fields as in line 1; 2 such lines are left out "
        "(source.faulty: drop)"
    )
