"""Files of a known layout: generated ones, whose first fault is known here."""

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.tables.columns import Column, Layout

LAYOUT = Layout(
    {"user": Column(pl.Int64()), "item": Column(pl.Int64()), "stars": Column(pl.Float32(), 0.5, 5)},
)
KNOWN = {"item": ("an item of the list", pl.Series([7, 8, 2**50]))}
GOOD = st.tuples(
    st.integers(-(2**63), 2**63 - 1).map(str),
    st.sampled_from(["7", "8", str(2**50)]),
    st.sampled_from(["0.5", "3", "4.50", "5"]),
)
BROKEN = {
    "user": ["", "x", "1.5", "9223372036854775808", "nan", "é", "🎉", "user"],
    "item": ["", "x", "9", "-7"],
    "stars": ["", "five", "0.4", "5.01", "-3", "nan", "inf", "-inf", "1e99", "4,5"],
}
WRONG_LENGTH = ["7,7", "7,7,3,1", "7", ",,,"]


@st.composite
def rows(draw):
    """Cells, and the column at fault; `line` where there are too few or too many."""
    lines = [(cells, None) for cells in draw(st.lists(GOOD, min_size=2, max_size=8))]
    for column in draw(st.lists(st.sampled_from([*BROKEN, "line"]), max_size=3)):
        if column == "line":
            broken = draw(st.sampled_from(WRONG_LENGTH))
        else:
            cells = list(draw(GOOD))
            text = draw(st.sampled_from(BROKEN[column]))
            cells[list(BROKEN).index(column)] = f'"{text}"' if "," in text else text
            broken = tuple(cells)
        lines.insert(draw(st.integers(0, len(lines))), (broken, column))
    return lines


@settings(max_examples=120, deadline=None)
@given(
    lines=rows(),
    ends=st.lists(st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\n\r\n"]), min_size=12, max_size=12),
    quoted=st.booleans(),
    is_cut=st.booleans(),
)
def test_the_first_fault_is_named_or_all_is_read(tmp_path_factory, lines, ends, quoted, is_cut):
    path = tmp_path_factory.mktemp("x") / "x.csv"
    text, first = "user,item,stars" + ends[-1], {}
    for (cells, fault), end in zip(lines, ends, strict=False):
        if fault:
            kind = "line" if fault == "line" else "value"
            before = text.replace("\r\n", "\n").replace("\r", "\n")
            first.setdefault(kind, (before.count("\n") + 1, fault))
        is_whole = fault is None and quoted
        line = cells if isinstance(cells, str) else ",".join(f'"{c}"' if is_whole else c for c in cells)
        text += line + end
    path.write_bytes((text.rstrip("\r\n") if is_cut else text).encode())
    if first:
        with pytest.raises(ValueError, match="wanted") as error:
            LAYOUT.read(path, allowed=KNOWN)
        number, column = first.get("line") or first["value"]  # the number of fields is looked at first
        where = (
            f"{path} line {number} has" if column == "line" else f"{path} line {number}, column '{column}': "
        )
        assert str(error.value).startswith(where)
        assert "\n" not in str(error.value)
        return
    read, found = LAYOUT.read(path, allowed=KNOWN, distinct=["user"])
    wanted = [(int(user), int(item), float(stars)) for (user, item, stars), _ in lines]
    assert read.rows() == wanted
    assert found["user"].to_list() == sorted({user for user, _, _ in wanted})
    assert found["item"].to_list() == sorted({item for _, item, _ in wanted})
