import polars as pl
import pytest

from recllm.tables import canonical

EVENTS = pl.DataFrame(
    {"user": [1, 2], "item": [7, 8], "rating": [4.0, None], "label": [1, 0], "timestamp": [5, 6]},
    schema={
        "user": pl.Int64,
        "item": pl.Int64,
        "rating": pl.Float32,
        "label": pl.Int8,
        "timestamp": pl.Int64,
    },
)
ITEMS = pl.DataFrame({"item": [7, 8], "title": ["A (1999)", "B (2000)"], "genre": ["Drama", None]})
USERS = pl.DataFrame({"user": [1, 2]})


def test_what_is_written_is_read(tmp_path):
    canonical.write(tmp_path, EVENTS.lazy(), ITEMS, USERS)
    events, items, users = canonical.read(tmp_path)
    assert events.collect().equals(EVENTS)
    assert items.equals(ITEMS)
    assert users.equals(USERS)


def test_types_of_events_are_cast_on_writing(tmp_path):
    loose = EVENTS.with_columns(pl.col("rating").cast(pl.Float64), pl.col("label").cast(pl.Int64))
    canonical.write(tmp_path, loose.lazy(), ITEMS, USERS)
    assert canonical.read(tmp_path)[0].collect().equals(EVENTS)


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
    canonical.write(tmp_path, EVENTS.lazy(), ITEMS, USERS)
    (tmp_path / f"{table}.parquet").unlink()
    if content is not None:
        content.write_parquet(tmp_path / f"{table}.parquet")
    with pytest.raises(ValueError, match=message) as error:
        canonical.read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user", [1, 1], "all 2 events are of the user 1, wanted two users"),
        ("user", [1, None], "events.user is null in 1 rows"),
        ("item", [None, None], "events.item is null in 2 rows"),
        ("rating", [4.0, float("nan")], "events.rating is NaN or infinite in 1 rows"),
        ("rating", [float("inf"), None], "events.rating is NaN or infinite in 1 rows"),
        ("rating", [0.5, 5.5], "events.rating is 0.5 to 5.5, wanted 1 to 5"),
        ("label", [None, None], "none of 2 events has a label"),
        ("label", [2, 0], "events.label is 0 to 2, wanted 0 and 1"),
        ("timestamp", [-1, 5], "events.timestamp is -1 to 5, wanted seconds"),
        ("timestamp", [5, 1_700_000_000_000], "events.timestamp is 5 to 1700000000000, wanted seconds"),
    ],
)
def test_events_that_teach_nothing_leave_nothing_behind(tmp_path, column, values, message):
    wrong = EVENTS.with_columns(pl.Series(column, values, EVENTS.schema[column], strict=False))
    with pytest.raises(ValueError, match=message) as error:
        canonical.write(tmp_path / "tables", wrong.lazy(), ITEMS, USERS, scale=(1, 5))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tables").exists()


def test_no_event_and_too_many_levels(tmp_path):
    with pytest.raises(ValueError, match="events has no rows"):
        canonical.write(tmp_path, EVENTS.clear().lazy(), ITEMS, USERS)
    many = pl.concat([EVENTS] * 60).with_columns(rating=pl.int_range(120).cast(pl.Float32))
    with pytest.raises(ValueError, match="120 levels, wanted at most 100"):
        canonical.write(tmp_path, many.lazy(), ITEMS, USERS)
    canonical.write(tmp_path, many[:100].lazy(), ITEMS, USERS)


def test_clicks_and_logs_without_time_are_taken(tmp_path):
    nothing = {"rating": [None, None], "timestamp": [None, None], "label": [1, 1]}
    clicks = EVENTS.with_columns(
        pl.Series(name, values, EVENTS.schema[name]) for name, values in nothing.items()
    )
    canonical.write(tmp_path, clicks.lazy(), ITEMS, USERS)
    assert canonical.read(tmp_path)[0].collect().equals(clicks)


def test_an_error_leaves_the_tables_that_are_there_alone(tmp_path):
    canonical.write(tmp_path, EVENTS.lazy(), ITEMS, USERS)
    with pytest.raises(ValueError, match="the raw data cannot be read"):
        canonical.write(tmp_path, EVENTS.lazy().with_columns(rating=pl.lit("five")), ITEMS, USERS)
    assert canonical.read(tmp_path)[0].collect().equals(EVENTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "events.parquet",
        "items.parquet",
        "users.parquet",
    ]


def test_a_run_that_was_killed_leaves_nothing_in_the_way(tmp_path):
    (tmp_path / ".writing").mkdir()
    (tmp_path / ".writing" / "events.parquet").write_text("half")
    canonical.write(tmp_path, EVENTS.lazy(), ITEMS, USERS)
    assert not (tmp_path / ".writing").exists()
