import datetime

import polars as pl
import pytest

from recllm.tables import parse

UTC = datetime.UTC
NOON = 1_709_294_400  # 2024-03-01 12:00:00 UTC: 19,783 days and a half


def one(expression, values, dtype=None):
    frame = pl.DataFrame({"x": pl.Series(values, dtype=dtype, strict=False)})
    return frame.select(y=expression(frame.schema["x"]))["y"].to_list()


def test_noon_is_what_it_is():
    assert datetime.datetime(2024, 3, 1, 12, tzinfo=UTC).timestamp() == NOON


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2024-03-01T12:00:00Z", NOON),
        ("2024-03-01 12:00:00 UTC", NOON),
        (" 2024-03-01 12:00:00 ", NOON),
        ("2024-03-01T12:00:00.999", NOON),
        ("2024-03-01T14:00:00+02:00", NOON),
        ("2024-03-01 07:30:00-0430", NOON),
        ("2024-03-01T12:00", NOON),
        ("2024-03-01", NOON - 43_200),
        ("1970-01-01T00:00:01Z", 1),
        ("1969-12-31T23:59:59Z", -1),
        ("2024-02-30", None),
        ("1709294400", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_iso_times(text, wanted):
    assert one(lambda dtype: parse.seconds("x", dtype, "iso"), [text]) == [wanted]


@pytest.mark.parametrize(
    ("values", "dtype", "unit", "wanted"),
    [
        (["5", "5.9", "-0.5", " 7 ", None], pl.String, "seconds", [5, 5, -1, 7, None]),
        (["x", "nan", "inf", "-inf"], pl.String, "seconds", [None] * 4),
        (["1709294400999", "-1"], pl.String, "milliseconds", [NOON, -1]),
        ([1709294400999, -1], pl.Int64, "milliseconds", [NOON, -1]),
        ([1709294400.9, None], pl.Float64, "seconds", [NOON, None]),
        ([NOON * 10**6 + 999_999], pl.Int64, "microseconds", [NOON]),
        (["01.03.2024 12:00", "2024"], pl.String, "%d.%m.%Y %H:%M", [NOON, None]),
        (["Fri Mar 01 04:00:00 -0800 2024"], pl.String, "%a %b %d %H:%M:%S %z %Y", [NOON]),
        ([datetime.date(2024, 3, 1)], pl.Date, "seconds", [NOON - 43_200]),
        ([datetime.datetime(2024, 3, 1, 12)], pl.Datetime("ns"), "iso", [NOON]),
        ([datetime.datetime(2024, 3, 1, 12, tzinfo=UTC)], pl.Datetime("ms", "Asia/Tokyo"), "iso", [NOON]),
    ],
)  # fmt: skip
def test_times_of_other_units_and_types(values, dtype, unit, wanted):
    assert one(lambda dtype: parse.seconds("x", dtype, unit), values, dtype) == wanted


@pytest.mark.parametrize(
    ("values", "dtype", "wanted"),
    [
        ([" a ", "", " ", None, "007", "9" * 30], pl.String, ["a", None, None, None, "007", "9" * 30]),
        ([2**31, -1, None], pl.Int64, ["2147483648", "-1", None]),
        ([2**64 - 1], pl.UInt64, ["18446744073709551615"]),
        ([1.0, 2.5, None], pl.Float64, ["1", "2.5", None]),
        ([True, None], pl.Boolean, ["true", None]),
        (["a", None], pl.Categorical, ["a", None]),
    ],
)
def test_ids_are_text(values, dtype, wanted):
    assert one(lambda dtype: parse.text("x", dtype), values, dtype) == wanted


def test_numbers():
    texts = ["4", " 4.5 ", "1e1", "4,5", "vier", "", None]
    assert one(lambda dtype: parse.number("x", dtype), texts) == [4.0, 4.5, 10.0, None, None, None, None]
    assert one(lambda dtype: parse.number("x", dtype, True), texts)[3] == 4.5
    assert one(lambda dtype: parse.number("x", dtype), [4, None]) == [4.0, None]


def test_text_for_prompts():
    texts = ["Ap\r\nple\tpie\x00 ", "e\u0301", "עברית", "👩\u200d🍳", "a\u202eb", " \u00a0\n", 'He said "no"']
    wanted = ["Ap ple pie", "\u00e9", "עברית", "👩\u200d🍳", "ab", None, 'He said "no"']
    assert one(lambda dtype: parse.clean(pl.col("x")), texts) == wanted


@pytest.mark.parametrize(
    ("values", "dtype", "separator", "wanted"),
    [
        (["red| sweet |"], pl.String, "|", [("red, sweet", "red")]),
        (["", None, "|"], pl.String, "|", [(None, None)] * 3),
        ([["red", None, "sweet"]], pl.List(pl.String), None, [("red, sweet", "red")]),
        ([[], None], pl.List(pl.String), None, [(None, None)] * 2),
        ([[1, 2]], pl.List(pl.Int64), "|", [("1, 2", "1")]),
        (["red|sweet"], pl.String, None, [("red|sweet",)]),
        ([3, None], pl.Int32, None, [(3,), (None,)]),
        ([datetime.date(2024, 3, 1)], pl.Date, None, [("2024-03-01",)]),
    ],
)  # fmt: skip
def test_attributes(values, dtype, separator, wanted):
    frame = pl.DataFrame({"x": pl.Series(values, dtype=dtype)})
    got = frame.select(parse.attribute("x", frame.schema["x"], separator))
    assert got.rows() == wanted
    assert got.columns == ["x", "x_first"][: len(wanted[0])]


@pytest.mark.parametrize("dtype", [pl.Struct({"a": pl.Int64}), pl.Binary, pl.List(pl.List(pl.Int64))])
def test_what_is_no_attribute(dtype):
    assert parse.attribute("x", dtype) == []
