"""GoodReads on generated files: against a plain reading of the same files, and against cases done by hand."""

import gzip
import json
import threading
from datetime import datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import polars as pl
import pytest

from bench import goodreads
from recllm.eventlog.build import build_log
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.log import EventLog
from tests.recipes.contract import RecipeContract, load_recipe, read_tables

recipe = load_recipe("goodreads")

KINDS = ("unread", "unrated", "unknown_book", "no_time", "repeated")


def kept_and_dropped(truth):
    """What the recipe counts, from what the generator knows."""
    return {"events": truth["events"], **{f"dropped_events_{kind}": truth[kind] for kind in KINDS}}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    return folder, goodreads.write(folder, 30_000)


def records(path):
    return [json.loads(line) for line in gzip.open(path)]


def seconds(text):
    return int(datetime.strptime(text, "%a %b %d %H:%M:%S %z %Y").timestamp())


def test_events_are_those_of_a_plain_reading(generated, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "BUCKET", 100_000)  # bytes: some 15 buckets, as many GB would make
    folder, truth = generated
    counts = recipe.make(tmp_path / "tables", folder)
    assert counts == {
        "interactions": 30_000, "books": 500, "users": counts["users"], "dropped_events_no_id": 0,
        "untitled": 3, "published": False,
        **kept_and_dropped(truth),
    }  # fmt: skip
    assert min(truth.values()) > 0
    assert sum(kept_and_dropped(truth).values()) == truth["rows"] == 30_000
    events, items, users = read_tables(tmp_path / "tables")
    known = {int(book["book_id"]) for book in records(folder / "goodreads_books.json.gz")}
    wanted = {}
    for row in records(folder / "goodreads_interactions_dedup.json.gz"):
        date = row["date_updated"] or row["date_added"]
        if row["rating"] and int(row["book_id"]) in known and date:
            key, value = (row["user_id"], int(row["book_id"])), (seconds(date), row["rating"])
            wanted[key] = max(wanted.get(key, value), value)
    got = {(user, item): (time, rating) for user, item, rating, _, time in events.iter_rows()}
    assert got == wanted
    assert len(got) == events.height
    assert (events["label"] == (events["rating"] >= 4)).all()
    assert set(users["user"]) == {user for user, _ in wanted}
    assert set(items["item"]) == known
    assert [path.name for path in sorted((tmp_path / "tables").iterdir())] == [
        "events.parquet", "items.parquet", "users.parquet",
    ]  # fmt: skip


def test_books_are_those_of_a_plain_reading(generated, tmp_path):
    folder, _ = generated
    recipe.make(tmp_path / "tables", folder)
    items = {row["item"]: row for row in read_tables(tmp_path / "tables")[1].iter_rows(named=True)}
    names = {row["author_id"]: row["name"] for row in records(folder / "goodreads_book_authors.json.gz")}
    votes = {
        row["book_id"]: row["genres"] for row in records(folder / "goodreads_book_genres_initial.json.gz")
    }
    books = records(folder / "goodreads_books.json.gz")
    assert len(items) == len(books)
    for book in books:
        item, genres = items[int(book["book_id"])], votes[book["book_id"]]
        title = " ".join(book["title"].split()) or " ".join(book["title_without_series"].split())
        assert item["title"] == (title or "Untitled")
        author = names.get(book["authors"][0]["author_id"], "") if book["authors"] else ""
        assert item["author"] == (author or "unknown author")
        assert item["genre"] == (max(sorted(genres), key=genres.get) if genres else "no genre listed")
        for column, key in (("publisher", "publisher"), ("format", "format"), ("work", "work_id")):
            assert item[column] == (book[key] or None)
        assert item["language"] == (
            {"en-US": "eng"}.get(book["language_code"], book["language_code"]) or None
        )
        assert item["series"] == (book["series"][0] if book["series"] else None)
        assert item["pages"] == (int(book["num_pages"]) // 100 * 100 if book["num_pages"] else None)
        assert item["year"] == {"2007": 2007, "1999": 1999, "2015": 2015}.get(book["publication_year"])
        shelves = [
            shelf["name"] for shelf in book["popular_shelves"] if shelf["name"] not in goodreads.SHELVES
        ]
        assert item["shelf"] == (shelves[0] if shelves else None)


BOOK = {
    "book_id": "7", "work_id": "70", "title": " The \"Long\"\n Way ", "title_without_series": "",
    "series": [],
    "authors": [{"author_id": "1", "role": ""}, {"author_id": "2", "role": "Illustrator"}], "publisher": "",
    "format": "ebook", "language_code": "en-GB", "publication_year": "65535", "num_pages": "", "isbn": "",
    "popular_shelves": [{"count": "9", "name": name} for name in ("to-read", "own", "sf")],
}  # fmt: skip
ROW = {
    "user_id": "u", "book_id": "7", "review_id": "r", "is_read": True, "rating": 4,
    "review_text_incomplete": "", "date_added": "Wed Mar 22 11:37:04 -0700 2017", "date_updated": "",
    "read_at": "", "started_at": "",
}  # fmt: skip


def write_raw(folder, rows, name="goodreads_interactions_dedup.json.gz"):
    """Two books, and events of `ROW` with other values."""
    files = {
        name: [{**ROW, **row} for row in rows],
        "goodreads_books.json.gz": [BOOK, {**BOOK, "book_id": "8"}],
        "goodreads_book_authors.json.gz": [{"author_id": "1", "name": "Ann  Onymous"}],
        "goodreads_book_genres_initial.json.gz": [{"book_id": "7", "genres": {"poetry": 3, "fiction": 3}}],
    }
    for file, lines in files.items():
        with gzip.open(folder / file, "wt") as sink:
            sink.writelines(json.dumps(line) + "\n" for line in lines)


class TestGoodReads(RecipeContract):
    recipe = recipe
    configured = "goodreads"

    def write_raw(self, folder):
        write_raw(folder, [{}, {"book_id": "8", "rating": 2}, {"user_id": "v", "rating": 1}])


@pytest.fixture
def by_hand(tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()

    def write(rows=(), name="goodreads_interactions_dedup.json.gz"):
        write_raw(folder, rows, name)
        return folder

    return write


def test_a_book_and_an_event_by_hand(by_hand, tmp_path):
    recipe.make(tmp_path / "tables", by_hand([{}, {"user_id": "v", "rating": 3}]))
    events, items, users = read_tables(tmp_path / "tables")
    # 11:37:04 at -0700 is 18:37:04 UTC: 17,247 days since 1970, and 67,024 seconds
    assert sorted(events.rows()) == [
        ("u", 7, 4.0, 1, 17_247 * 86_400 + 67_024),
        ("v", 7, 3.0, 0, 17_247 * 86_400 + 67_024),
    ]
    assert items.row(0, named=True) == {
        "item": 7, "title": 'The "Long" Way', "author": "Ann Onymous", "genre": "fiction", "publisher": None,
        "shelf": "sf", "format": "ebook", "language": "eng", "series": None, "work": "70",
        "year": None, "pages": None,
    }  # fmt: skip
    assert items["genre"][1] == "no genre listed"
    assert users.rows() == [("u",), ("v",)]


def test_what_is_dropped_is_counted_once(by_hand, tmp_path):
    later = "Thu Mar 23 00:00:00 -0700 2017"
    folder = by_hand(
        [
            {},
            {"rating": 2, "date_updated": later},  # the last word on book 7
            {"rating": 0, "is_read": False},
            {"rating": 0, "is_read": False, "book_id": "99"},
            {"rating": 0},
            {"rating": None},
            {"book_id": "99"},
            {"book_id": "seven"},
            {"user_id": None},
            {"book_id": "8", "date_added": "yesterday"},
            {"book_id": "8", "date_added": "Wed Mar 22 11:37:04 -0700 1917"},
            {"user_id": "v"},
        ]
    )
    counts = recipe.make(tmp_path / "tables", folder)
    assert counts == {
        "interactions": 12, "books": 2, "users": 2, "events": 2, "dropped_events_unread": 2,
        "dropped_events_unrated": 2, "dropped_events_no_id": 2, "dropped_events_unknown_book": 1,
        "dropped_events_no_time": 2, "dropped_events_repeated": 1, "untitled": 0, "published": False,
    }  # fmt: skip
    assert sorted(read_tables(tmp_path / "tables")[0].rows())[0] == ("u", 7, 2.0, 0, 1_490_252_400)


def test_reviews_have_no_shelves(by_hand, tmp_path):
    folder = by_hand([{"is_read": None}], "goodreads_reviews_dedup.json.gz")
    path = folder / "goodreads_reviews_dedup.json.gz"
    rows = [{key: value for key, value in row.items() if key != "is_read"} for row in records(path)]
    rows = [*rows, {**rows[0], "user_id": "v", "rating": 0}, {**rows[0], "user_id": "w", "rating": 2}]
    with gzip.open(path, "wt") as sink:
        sink.writelines(json.dumps(row) + "\n" for row in rows)
    counts = recipe.make(tmp_path / "tables", folder, recipe.RecipeConfig(feedback="reviews"))
    dropped = [counts[f"dropped_events_{kind}"] for kind in ("unread", "unrated")]
    assert (counts["reviews"], *dropped, counts["events"]) == (3, 0, 1, 2)


@pytest.mark.parametrize("reviews", [False, True])
def test_a_genres_own_files(tmp_path, reviews):
    truth = goodreads.write(tmp_path / "given", 3000, subset="poetry", reviews=reviews)
    config = recipe.RecipeConfig("poetry", "reviews" if reviews else "interactions")
    counts = recipe.make(tmp_path / "tables", tmp_path / "given", config)
    assert counts | kept_and_dropped(truth) == counts
    assert truth["unread"] > 0 or reviews
    with pytest.raises(
        ValueError, match=r"has no goodreads_interactions_dedup.json.gz, wanted .*goodreads_books.json.gz"
    ):
        recipe.make(tmp_path / "tables", tmp_path / "given")


def test_the_log_calls_4_stars_liked_unless_told_otherwise(generated, tmp_path):
    folder, truth = generated
    recipe.make(tmp_path / "tables", folder)
    events = read_tables(tmp_path / "tables")[0]
    fields = [
        "title",
        "author",
        "genre",
        "shelf",
        "publisher",
        "format",
        "language",
        "series",
        "work",
        "year",
        "pages",
    ]
    for threshold, least in ((3.5, 4), (4, 5)):
        config = PrepareConfig(label_threshold=threshold, item_fields=fields)
        metrics = build_log(tmp_path / "tables", tmp_path / "log", config)
        log = EventLog.open(tmp_path / "log")
        assert metrics["events"] == truth["events"] == len(log.user)
        assert log.meta["rating_levels"] == ["1", "2", "3", "4", "5"]
        assert log.label.sum() == (events["rating"] >= least).sum()
        assert (log.label == (log.rating >= least)).all()  # code 4 is 4 stars


def spoil(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("interactions_dedup", lambda b: b[:-30], r"line 1 or after has a truncated or corrupt gzip stream"),
        ("interactions_dedup", lambda b: b"", r"is empty \(0 bytes\)"),
        (
            "interactions_dedup",
            lambda _: gzip.compress(b'{"user": 1}\n'),
            r"line 1 has user, wanted also user_id, book_id",
        ),
        (
            "interactions_dedup",
            lambda b: gzip.compress(gzip.decompress(b) + json.dumps({**ROW, "rating": 6}).encode()),
            r"line 3, column 'rating': found 6, wanted 0 to 5 \(0 more so",
        ),
        (
            "interactions_dedup",
            lambda b: gzip.compress(gzip.decompress(b) + json.dumps({**ROW, "rating": "6"}).encode()),
            r"line 3 has '{\"user_id\": .* \(cannot parse '6'",
        ),
        ("books", lambda b: b[:-30], r"line 1 or after has a truncated or corrupt gzip stream"),
        ("book_authors", lambda b: b[:30] + bytes(9) + b[39:], r"truncated or corrupt gzip stream"),
        ("book_genres_initial", lambda _: b"<html>", r"line 1 has '<html>', wanted a JSON object"),
    ],
)
def test_bad_files_are_one_line_and_leave_nothing(by_hand, tmp_path, name, change, message):
    folder = by_hand([{}, {"user_id": "v", "rating": 1}])
    spoil(folder, f"goodreads_{name}.json.gz", change)
    with pytest.raises(ValueError, match=rf"goodreads_{name}.json.gz,? .*{message}") as error:
        recipe.make(tmp_path / "tables", folder)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "tables").glob("*"))


def test_nothing_but_shelves_is_refused(by_hand, tmp_path):
    with pytest.raises(
        ValueError, match=r"interactions_dedup.json.gz has no row with stars, .*'unread': 1, .*wanted some"
    ):
        recipe.make(tmp_path / "tables", by_hand([{"rating": 0, "is_read": False}]))
    assert not list((tmp_path / "tables").glob("*"))


def test_a_folder_may_have_any_name(by_hand, tmp_path):
    folder = by_hand([{}, {"user_id": "v", "rating": 1}]).rename(tmp_path / "a [1]*?")
    assert recipe.make(tmp_path / "tables", folder)["events"] == 2


def test_what_a_killed_run_left_is_no_part_of_the_next(by_hand, tmp_path):
    left = tmp_path / "tables" / ".writing"
    left.mkdir(parents=True)
    pl.DataFrame({"user": ["x"], "item": [7], "rating": [1.0], "timestamp": [0]}).write_parquet(
        left / "events-9.parquet"
    )
    recipe.make(tmp_path / "tables", by_hand([{}, {"user_id": "v", "rating": 1}]))
    assert read_tables(tmp_path / "tables")[0].height == 2


@pytest.mark.parametrize("key", ["subset", "feedback"])
def test_other_parts_are_refused(key):
    with pytest.raises(ValueError, match=rf"source.{key} is 'cooking', wanted one of .*; ARGS=source.{key}="):
        recipe.RecipeConfig(**{key: "cooking"})


def test_a_download_takes_the_four_files_and_keeps_them(tmp_path, monkeypatch, capsys):
    goodreads.write(tmp_path / "served", 3000, subset="poetry")
    (tmp_path / "served" / "byGenre").mkdir()
    for path in (tmp_path / "served").glob("*_poetry.json.gz"):
        path.rename(path.parent / "byGenre" / path.name)
    served = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(recipe, "URL", f"http://127.0.0.1:{server.server_port}/")
        first = recipe.make(tmp_path / "set" / "tables", config=recipe.RecipeConfig("poetry"))
        server.shutdown()
    names = sorted(path.name for path in (tmp_path / "set" / "raw").iterdir())
    files = [
        "goodreads_book_authors.json.gz", "goodreads_book_genres_initial.json.gz",
        "goodreads_books_poetry.json.gz", "goodreads_interactions_poetry.json.gz",
    ]  # fmt: skip
    assert names == sorted([*files, *(f"{name}.sha256" for name in files), "license.txt"])
    assert "for academic use only" in capsys.readouterr().out
    assert (
        recipe.make(tmp_path / "set" / "tables", config=recipe.RecipeConfig("poetry")) == first
    )  # nobody serves now
    assert "for academic use only" not in capsys.readouterr().out
