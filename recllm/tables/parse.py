"""Columns as files hold them, text or typed, to ids, numbers, times and clean text: polars expressions."""

from __future__ import annotations

import re

import polars as pl

from recllm.tables.config import ISO, TIME_UNITS

LATEST = 4_102_444_800
"""The year 2100 in seconds since 1970; times after it are read in the wrong unit."""
EARLIEST_CLOCK = 100_000_000
"""March 1973: a log that ends before it is read in the wrong unit, where the unit is no second."""

# Dates with a time; the T between them, Z and UTC are taken out before.
_ISO_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
_ISO_WITH_ZONE = "%Y-%m-%d %H:%M:%S%.f%#z"
# Marks that override a direction of writing turn what follows, too; no script needs them.
_TURNS = r"[\x{202A}-\x{202E}\x{2066}-\x{2069}\x{FEFF}]"
_ZONES = ("%z", "%:z", "%#z", "%+")


def text(column: str, dtype: pl.DataType) -> pl.Expr:
    """Text without blanks around it, null where nothing is left; whole numbers in floats lose their .0."""
    value = pl.col(column)
    if dtype.is_float():  # pandas writes whole numbers so where some are missing
        whole = value.is_finite() & (value == value.floor())
        return (
            pl.when(whole)
            .then(value.cast(pl.Int64, strict=False).cast(pl.String))
            .otherwise(value.cast(pl.String))
        )
    value = value.cast(pl.String).str.strip_chars()
    return pl.when(value != "").then(value)


def number(column: str, dtype: pl.DataType, decimal_comma: bool = False) -> pl.Expr:
    """Float64; null where there is none, or what is there is no number."""
    if dtype.is_numeric() or dtype == pl.Boolean:
        return pl.col(column).cast(pl.Float64)
    value = pl.col(column).cast(pl.String).str.strip_chars()
    if decimal_comma:
        value = value.str.replace(",", ".", literal=True)
    return value.cast(pl.Float64, strict=False)


def seconds(column: str, dtype: pl.DataType, unit: str) -> pl.Expr:
    """Int64 seconds since 1970, fractions cut off; null where there is no time, or none that can be read.

    Args:
        column: integers, floats, dates, or text of them.
        dtype: the column's; dates are what they are, whatever the unit.
        unit: see `EventsSource.time_unit`; text without a zone is UTC.
    """
    value = pl.col(column)
    if dtype.is_temporal():
        return value.cast(pl.Datetime("us")).dt.epoch("s")
    if unit in TIME_UNITS:
        if dtype.is_integer():
            return value.cast(pl.Int64).floordiv(TIME_UNITS[unit])
        moment = number(column, dtype)
        return (moment / TIME_UNITS[unit]).floor().cast(pl.Int64, strict=False)
    value = value.cast(pl.String).str.strip_chars()
    if unit != ISO:
        zone = "UTC" if any(sign in unit for sign in _ZONES) else None
        if _has_hour_alone(unit):  # polars wants a minute beside it
            return _epoch(value + " 00", f"{unit} %M", zone)
        return _epoch(value, unit, zone)
    plain = value.str.strip_suffix("UTC").str.strip_suffix("Z").str.strip_chars_end()
    plain = plain.str.replace("T", " ", literal=True)
    naive = [_epoch(plain, form, None) for form in _ISO_FORMATS]
    return pl.coalesce(*naive, _epoch(plain, _ISO_WITH_ZONE, "UTC"))


def check_format(unit: str) -> None:
    """Refuse a strptime format that polars cannot read.

    Args:
        unit: see `EventsSource.time_unit`.

    Raises:
        ValueError: it is such a format.
    """
    if unit in TIME_UNITS or unit == ISO:
        return
    try:
        pl.DataFrame({"at": [""]}).select(seconds("at", pl.String(), unit))
    except pl.exceptions.PolarsError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"source.events.time_unit={unit!r} is no strptime format that can be read ({reason}); wanted "
            "e.g. '%d.%m.%Y %H:%M'"
        ) from error


def _has_hour_alone(form: str) -> bool:
    """Whether a strptime format has an hour and no minute."""
    signs = set(re.findall("%[-_0]?(.)", form))
    return bool(signs & set("HIkl")) and not signs & set("MTRXcrs+")


def _epoch(value: pl.Expr, form: str, zone: str | None) -> pl.Expr:
    return value.str.to_datetime(form, strict=False, exact=True, time_unit="us", time_zone=zone).dt.epoch("s")


def clean(value: pl.Expr) -> pl.Expr:
    """Text as a prompt can hold it: one line, blanks one wide, composed (NFC), no marks of direction."""
    value = value.cast(pl.String).str.replace_all(_TURNS, "").str.replace_all(r"[\s\p{Cc}]+", " ")
    value = value.str.strip_chars().str.normalize("NFC")
    return pl.when(value != "").then(value)


def attribute(column: str, dtype: pl.DataType, separator: str | None = None) -> list[pl.Expr]:
    """An attribute of an item or a user, under its own name: text, or a number where the file has numbers.

    Several values, in a column of lists or of text with a separator, become text with commas, and
    `<column>_first` the first of them. What can be neither shown nor counted gives nothing.
    """
    value = pl.col(column)
    if separator is not None and not isinstance(dtype, pl.List):
        value = value.cast(pl.String).str.split(separator)
        dtype = pl.List(pl.String)
    if isinstance(dtype, pl.List) and not dtype.inner.is_nested():
        value = value.list.eval(clean(pl.element())).list.drop_nulls()
        joined = value.list.join(", ")
        return [
            pl.when(joined != "").then(joined).alias(column),
            value.list.first().alias(f"{column}_first"),
        ]
    if dtype.is_numeric():
        return [value]
    if dtype.is_nested() or dtype in (pl.Binary, pl.Object):
        return []
    return [clean(value).alias(column)]
