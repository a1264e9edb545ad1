"""Generated shops to tables. Their numbers are counted here, in Python, from what was generated."""

import csv
import datetime
import io
import re
import unicodedata

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.recipes.own_recipe import SOURCE, config_of, recipe

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
    catalog, _ = write(folder, "goods", ["sku", "name"], list(map(list, items.items())), layout, [0, 1])
    sections = {
        "events": SOURCE["events"] | events | {"time_unit": unit, "rating_scale": [0.5, 5]},
        "items": SOURCE["items"] | catalog,
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
BROKEN_LINES = ("last field cut off", "a field too many", "a quote left open")


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
    if damage in BROKEN_LINES:  # one line, which `drop` leaves out, if all else is well without it
        (folder / "log.csv").write_bytes(DAMAGES[damage](content))
        try:
            counts = recipe.make(folder / "left", folder, config)
            assert counts["dropped_events_broken_line"] == 1
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
        config = config_of(sections | {"faulty": "error"})
    (folder / "log.csv").write_bytes(DAMAGES[damage](content))
    with pytest.raises(ValueError, match=r"^log\.csv ") as error:
        recipe.make(folder / "tables", folder, config)
    assert "\n" not in str(error.value)
    assert not (folder / "tables").exists()
