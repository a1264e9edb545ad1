import polars as pl
import pytest

from recllm.data import tables

EVENTS = pl.DataFrame(
    {"user": [1, 1], "item": [7, 8], "rating": [4.0, None], "label": [1, 0], "timestamp": [5, 6]},
    schema={
        "user": pl.Int64,
        "item": pl.Int64,
        "rating": pl.Float32,
        "label": pl.Int8,
        "timestamp": pl.Int64,
    },
)
ITEMS = pl.DataFrame({"item": [7, 8], "title": ["A (1999)", "B (2000)"], "genre": ["Drama", None]})
USERS = pl.DataFrame({"user": [1]})


def test_what_is_written_is_read(tmp_path):
    tables.write(tmp_path, EVENTS.lazy(), ITEMS, USERS)
    events, items, users = tables.read(tmp_path)
    assert events.collect().equals(EVENTS)
    assert items.equals(ITEMS)
    assert users.equals(USERS)


def test_types_of_events_are_cast_on_writing(tmp_path):
    loose = EVENTS.with_columns(pl.col("rating").cast(pl.Float64), pl.col("label").cast(pl.Int64))
    tables.write(tmp_path, loose.lazy(), ITEMS, USERS)
    assert tables.read(tmp_path)[0].collect().equals(EVENTS)


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("events", EVENTS.drop("label"), r"wanted also \['label'\]"),
        ("events", EVENTS.cast({"timestamp": pl.Int32}), "events.timestamp is Int32, wanted Int64"),
        ("events", EVENTS.cast({"item": pl.String}), "item is String in events and Int64 in items"),
        ("items", ITEMS.drop("title"), r"wanted also \['title'\]"),
        ("items", ITEMS.with_columns(item=pl.lit(7, pl.Int64)), "items has 1 rows too many"),
        ("items", ITEMS.with_columns(title=pl.Series(["A", " "])), r"1 items have no title \(first: 8\)"),
        ("users", pl.DataFrame({"user": [1, None]}), "users.user has 1 nulls"),
        ("users", None, r"users.parquet is missing"),
    ],
)
def test_errors_are_one_line(tmp_path, table, content, message):
    tables.write(tmp_path, EVENTS.lazy(), ITEMS, USERS)
    (tmp_path / f"{table}.parquet").unlink()
    if content is not None:
        content.write_parquet(tmp_path / f"{table}.parquet")
    with pytest.raises(ValueError, match=message) as error:
        tables.read(tmp_path)
    assert "\n" not in str(error.value)
