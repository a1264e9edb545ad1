"""Files of one's own to tables: one oddity after the other, and generated shops that are counted here."""

import csv
import datetime
import importlib.util
import io
import re
import sys
import unicodedata
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from recllm.data.source import SourceConfig

REPOSITORY = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("own_recipe", REPOSITORY / "data" / "own" / "recipe.py")
recipe = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = recipe
SPEC.loader.exec_module(recipe)

ITEMS = 'sku,name,kind\nA,Apple,fruit\nB,"Bread, ""dark""",food\n'
EVENTS = "who,sku,stars,at\n1,A,5,100\n1,B,2,200\n2,A,3,300\n"
SOURCE = {
    "events": {
        "path": "events.csv", "user": "who", "item": "sku", "rating": "stars", "rating_scale": [1, 5],
        "timestamp": "at",
    },
    "items": {"path": "items.csv", "item": "sku", "title": "name"},
    "label": {"threshold": 3},
}  # fmt: skip


def config_of(sections):
    """The section `source` alone: merging the whole configuration takes longer than reading a small shop."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), sections))


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


# Generated shops. Their numbers are counted here, in Python, from what was generated.

PIECES = [
    "Tea",
    '5"',
    "'",
    ",",
    ";",
    "\t",
    "\n",
    "\r\n",
    "\r",
    " ",
    "é",
    "e\u0301",
    "שלום",
    "🎉",
    "👩\u200d🍳",
    "{x}",
    "\\",
    "\x07",
]
TITLES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
IDS = st.one_of(
    st.integers(0, 2**70).map(str), st.sampled_from(["007", "sku-1", "é", "a b", "NULL", "1e5", "-1"])
)
BROKEN = {  # reason -> what stands in which column
    "no_user": (0, [""]),
    "no_item": (1, ["", "  "]),
    "unknown_item": (1, ["nowhere"]),
    "rating_no_number": (2, ["x", "4,5", "٤"]),
    "rating_not_finite": (2, ["nan", "inf", "1e999"]),
    "rating_out_of_scale": (2, ["0.4", "-3", "5.5"]),
    "no_time": (3, [""]),
    "time_unreadable": (3, ["soon", "2024-13-01"]),
    "time_out_of_range": (3, []),  # by unit
}
TOO_FAR = {
    "seconds": ["-5", "1700000000000"],
    "milliseconds": ["-5", "9999999999999"],
    "iso": ["1969-01-01", "2200-01-01"],
}


def tidy(title):
    return unicodedata.normalize("NFC", re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", title).strip())


@st.composite
def shops(draw):
    items = draw(st.dictionaries(IDS, TITLES.filter(tidy), min_size=2, max_size=5))
    users = draw(st.lists(IDS, min_size=2, max_size=4, unique=True))
    unit = draw(st.sampled_from(list(TOO_FAR)))
    pick = st.tuples(
        st.sampled_from(users), st.sampled_from(list(items)), st.sampled_from([None, 0.5, 3, 4, 5])
    )
    good = [
        (users[0], next(iter(items)), 5),
        (users[1], next(iter(items)), 1),
        *draw(st.lists(pick, max_size=12)),
    ]
    rows = []  # cells, reason or None
    for user, item, rating in good:
        second = draw(st.integers(10**9, 2 * 10**9))
        cells = [user, item, "" if rating is None else f"{rating:g}", write_time(second, unit)]
        rows.append((cells, None, (user, item, rating, second)))
    whole = rows[0][0]
    for reason in draw(st.lists(st.sampled_from(list(BROKEN)), max_size=4)):
        column, values = BROKEN[reason]
        cells = list(whole)
        cells[column] = draw(st.sampled_from(values or TOO_FAR[unit]))
        rows.insert(draw(st.integers(0, len(rows))), (cells, reason, None))
    return items, rows, unit


def write_time(second, unit):
    if unit == "iso":
        return datetime.datetime.fromtimestamp(second, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return str(second * (1000 if unit == "milliseconds" else 1))


LAYOUTS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["csv", "tsv", "txt", "parquet"]),
        "end": st.sampled_from(["\n", "\r\n", "\r"]),
        "encoding": st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
        "order": st.permutations(range(4)),
        "parts": st.integers(1, 3),
        "empty": st.booleans(),
    }
)


def write(folder, name, header, rows, layout, order):
    """Writes a table as the layout says; the keys of its source section, and each row's place in words."""
    separator = {"csv": ",", "tsv": "\t", "txt": ";"}.get(layout["kind"], ",")
    header, rows = [header[i] for i in order], [[row[i] for i in order] for row in rows]
    encoding = layout["encoding"]
    if encoding == "latin-1" and not all(ord(sign) < 256 for row in rows for cell in row for sign in cell):
        encoding = "utf-8"
    parts = layout["parts"] if len(rows) >= layout["parts"] else 1
    size = -(-len(rows) // parts)
    places = []
    for part in range(parts):
        chunk = rows[part * size : (part + 1) * size]
        shown = f"{name}.{layout['kind']}" if parts == 1 else f"{name}/{part}.{layout['kind']}"
        path = folder / shown
        path.parent.mkdir(exist_ok=True, parents=True)
        if layout["kind"] == "parquet":
            pl.DataFrame(chunk, schema=dict.fromkeys(header, pl.String), orient="row").write_parquet(path)
            places += [f"{shown} row {number + 1}" for number in range(len(chunk))]
            continue
        text = io.StringIO(newline="")
        # csv quotes a cell with a line break only if the break is the file's own kind of line end.
        broken = any(sign in cell for row in chunk for cell in row for sign in "\r\n")
        quoting = csv.QUOTE_ALL if broken else layout["quoting"]
        writer = csv.writer(text, delimiter=separator, lineterminator=layout["end"], quoting=quoting)
        writer.writerow(header)
        for row in chunk:
            if layout["empty"]:
                text.write(layout["end"])
            lines = text.getvalue().replace("\r\n", "\n").replace("\r", "\n").count("\n")
            places.append(f"{shown} line {lines + 1}")
            writer.writerow(row)
        path.write_bytes(text.getvalue().encode(encoding))
    where = f"{name}.{layout['kind']}" if parts == 1 else name
    return {"path": where, "separator": separator, "encoding": encoding.removesuffix("-sig")}, places


def generate(folder, shop, layout, faulty):
    items, rows, unit = shop
    header = ["who", "sku", "stars", "at"]
    events, places = write(folder, "log", header, [cells for cells, _, _ in rows], layout, layout["order"])
    catalogue, _ = write(folder, "goods", ["sku", "name"], list(map(list, items.items())), layout, [0, 1])
    sections = {
        "events": SOURCE["events"] | events | {"time_unit": unit, "rating_scale": [0.5, 5]},
        "items": SOURCE["items"] | catalogue,
        "label": {"threshold": 3},
        "faulty": faulty,
    }
    return config_of(sections), places


@settings(max_examples=30, deadline=None)
@given(shop=shops(), layout=LAYOUTS)
def test_any_shop_goes_through_with_what_was_counted_here(tmp_path_factory, shop, layout):
    folder = tmp_path_factory.mktemp("shop")
    config, places = generate(folder, shop, layout, "drop")
    items, rows, _ = shop
    out = folder / "artifacts" / "tables"
    counts = recipe.make(out, folder, config)
    good = [wanted for _, _, wanted in rows if wanted]
    assert pl.read_parquet(out / "events.parquet").rows() == [
        (user, item, rating, None if rating is None else int(rating > 3), second)
        for user, item, rating, second in good
    ]
    assert pl.read_parquet(out / "items.parquet").rows() == [
        (item, tidy(title)) for item, title in items.items()
    ]
    assert pl.read_parquet(out / "users.parquet").rows() == sorted({(user,) for user, *_ in good})
    reasons = [reason for _, reason, _ in rows if reason]
    assert counts == {
        "read_items": len(items), "read_events": len(rows), "events": len(good), "items": len(items),
        "events_without_label": sum(rating is None for _, _, rating, _ in good),
        "users": len({user for user, *_ in good}),
    } | {f"dropped_events_{reason}": reasons.count(reason) for reason in reasons}  # fmt: skip

    strict, _ = generate(folder, shop, layout, "error")
    if not reasons:
        assert recipe.make(folder / "again", folder, strict) == counts
        return
    with pytest.raises(ValueError, match="found") as error:
        recipe.make(folder / "again", folder, strict)
    first = next(place for place, (_, reason, _) in zip(places, rows, strict=True) if reason)
    assert str(error.value).startswith(f"{first}, column ")
    assert "\n" not in str(error.value)
    assert not (folder / "again").exists()


DAMAGES = {
    "emptied": lambda content: b"",
    "only the header": lambda content: content.partition(b"\n")[0] + b"\n",
    "last field cut off": lambda content: content.rstrip().rpartition(b"\x1f")[0] + b"\n",
    "a field too many": lambda content: content + b"a\x1fb\x1fc\x1fd\x1fe\n",
    "a column renamed": lambda content: content.replace(b"who", b"whose", 1),
    "not utf-8": lambda content: content + b"\xe9\x1f\x1f\x1f\n",
    "a zero byte": lambda content: content + b"a\x1f\x00\x1f\x1f\n",
    "a quote left open": lambda content: content + b'"a\x1fb\x1f4\x1f5\n',
    "utf-16": lambda content: content.decode().encode("utf-16"),
}


@settings(max_examples=30, deadline=None)
@given(shop=shops(), damage=st.sampled_from(list(DAMAGES)))
def test_any_damaged_file_is_one_line_and_leaves_nothing_behind(tmp_path_factory, shop, damage):
    """Fields are told apart by a sign that no field holds, so that a cut is where it is said to be."""
    folder = tmp_path_factory.mktemp("shop")
    plain = {
        "kind": "csv",
        "end": "\n",
        "encoding": "utf-8",
        "quoting": csv.QUOTE_ALL,
        "parts": 1,
        "empty": False,
    }
    config, _ = generate(folder, shop, plain | {"order": range(4)}, "drop")
    rows = [["who", "sku", "stars", "at"], *(cells for cells, _, _ in shop[1])]
    content = "".join("\x1f".join(cell.strip() for cell in row) + "\n" for row in rows).encode()
    (folder / "log.csv").write_bytes(content)
    sections = {
        "events": SOURCE["events"] | {"path": "log.csv", "separator": "\x1f", "rating_scale": [0.5, 5]}
    }
    sections["events"]["time_unit"] = config.events.time_unit
    sections |= {
        "items": SOURCE["items"] | {"path": "goods.csv"},
        "label": {"threshold": 3},
        "faulty": "drop",
    }
    config = config_of(sections)
    recipe.make(folder / "whole", folder, config)
    (folder / "log.csv").write_bytes(DAMAGES[damage](content))
    with pytest.raises(ValueError, match=r"^log\.csv ") as error:
        recipe.make(folder / "tables", folder, config)
    assert "\n" not in str(error.value)
    assert not (folder / "tables").exists()
