"""The look at the data: every number counted by hand on a log of two users, prompts counted two ways."""

import base64
import re

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure

from recllm.eventlog.build import build_log
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.ids import SPLITS
from recllm.eventlog.log import EventLog
from recllm.report import describe
from recllm.report.describe import NO_LIMIT, Example, Part, PromptLengths
from recllm.tables import canonical
from recllm.text.prompts import Prompts


@pytest.fixture
def two_users(tmp_path):
    """User a rates x1 to x8 with 5 stars, b others with 2; a sample has two earlier events.

    Rows 0 to 7 are a's, in the seconds 1 to 8; 8 to 13 are b's: y1 y2 x1 x2 x3 y3 in the seconds 3 3 5 9 10
    11. By time the samples are 2, 3, 4 10, 5, 6, 7, 11 (train), 12 (valid), 13 (test).
    """
    rows = [("a", f"x{second}", 5.0, 1, second) for second in range(1, 9)]
    rows += [("b", item, 2.0, 0, at) for item, at in zip("y1 y2 x1 x2 x3 y3".split(), (3, 3, 5, 9, 10, 11),
                                                          strict=True)]  # fmt: skip
    schema = {
        "user": pl.String,
        "item": pl.String,
        "rating": pl.Float32,
        "label": pl.Int8,
        "timestamp": pl.Int64,
    }
    events = pl.DataFrame(rows, schema=schema, orient="row")
    names = sorted(set(events["item"]))
    items = pl.DataFrame({"item": names, "title": names, "genre": [name[0] for name in names]})
    canonical.write(tmp_path / "tables", events.lazy(), items, pl.DataFrame({"user": ["a", "b"]}))
    config = PrepareConfig(min_history=2, candidates=2, ranking_valid_rows=0, ranking_test_rows=0)
    metrics = build_log(tmp_path / "tables", tmp_path / "log", config)
    return EventLog.open(tmp_path / "log"), metrics


def parts(log):
    return {name: Part.of(log, name) for name in SPLITS}


def test_events_by_hand(two_users):
    assert describe.event_table(*two_users)[1] == [
        ["events", "14"],
        ["users", "2, with 7.0 events on average"],
        ["items", "11, with 1.3 events on average"],
        ["density", "63.64% of all pairs of a user and an item"],  # 14 of 22
        ["ratings", "2: 42.9%, 5: 57.1%"],  # 6 and 8 of 14
        ["time (UTC)", "1970-01-01 to 1970-01-01, 0 days"],
        ["events that are no samples: too few earlier ones", "4"],
    ]


def test_raw_counts_by_name():
    counts = {
        "read_events": 1_200,
        "dropped_events_no_user": 200,
        "events_without_label": 3,
        "published": False,
    }
    assert describe.raw_table(counts) == ([], [
        ["events read", "1,200"],
        ["events dropped: no user", "200"],
        ["events without label", "3"],
        ["published", "no"],
    ])  # fmt: skip


def test_splits_by_hand(two_users):
    log, metrics = two_users
    heading, lines = describe.split_table(log, parts(log))
    assert heading == ["", "train", "valid", "test"]
    assert dict((name, cells) for name, *cells in lines[:7]) == {
        "samples": ["8", "1", "1"],
        "liked": ["75.0%", "0.0%", "0.0%"],
        "users": ["2", "1", "1"],
        "items": ["8", "1", "1"],  # x3 to x8 of a, x1 and x2 of b
        "earlier events, median": ["3", "4", "5"],  # of 2 3 4 5 6 7 and 2 3: 2 2 3 [3] 4 5 6 7
        "... of the middle 80 %": ["2 to 6", "4 to 4", "5 to 5"],
        "... shortest and longest": ["2 to 7", "4 to 4", "5 to 5"],
    }
    assert lines[7:] == [
        ["from", *["1970-01-01"] * 3],
        ["to", *["1970-01-01"] * 3],
        ["cold users", "0", "0", "0"],
        ["... their samples", "0.00%", "0.00%", "0.00%"],
        ["cold items", "0", "0", "1"],  # y3
        ["... their samples", "0.00%", "0.00%", "100.00%"],
    ]
    assert metrics["cold_item_share_test"] == 1  # prepare's own count


def test_cold_shares_are_those_that_prepare_counts(demo_log, demo_config, tmp_path):
    config = PrepareConfig(split="user", ranking_valid_rows=0, ranking_test_rows=0)
    metrics = build_log(demo_log.folder.parent / "tables", tmp_path / "log", config)
    log = EventLog.open(tmp_path / "log")
    lines = describe.split_table(log, parts(log))[1]
    cold = lines[[name for name, *_ in lines].index("cold users") + 1]
    assert cold == ["... their samples", "0.00%", "100.00%", "100.00%"]
    assert metrics["cold_user_share_valid"] == 1
    items = lines[-1][1:]
    assert items[1:] == [f"{metrics[f'cold_item_share_{name}']:.2%}" for name in ("valid", "test")]


def test_popularity_by_hand(two_users):
    # Training events: x1 and x2 of both users, x3 to x8 of a, y1 and y2; not b's x3 (valid) and y3 (test).
    assert describe.popularity_table(two_users[0])[1] == [
        ["with a training event", "10"],
        ["with none (the CRM reads them as unknown)", "1"],
        ["training events of an item, median", "1"],
        ["training events of the 1 most popular (1%)", "16.7%"],  # 2 of 12
        ["training events of the 1 most popular (10%)", "16.7%"],
        ["with a training event, but fewer than 5", "10"],
    ]


def test_prompts_by_hand():
    tokens = np.array([50, 10, 40, 20, 30])
    asked = PromptLengths("yes or no", "test", tokens, np.array([31, 5, 5, 5, 5]), 30)
    cells = describe.prompt_table([asked])[1][0]
    assert cells == [
        "yes or no",
        "test",
        "5",
        "30",
        "10 to 40",
        "50",
        "30",
        "2 (40.0%), 1 even without history",
    ]
    assert describe.prompt_table([]) == ([], [])


@pytest.mark.parametrize("question", ["answers", "titles"])
def test_too_long_prompts_are_those_that_lose_events(demo_log, tiny_lm, question):
    rows = demo_log.rows("test", "uniform200")
    shown = demo_log.recent(rows, 10)
    free, none = Prompts(demo_log, tiny_lm.pieces, NO_LIMIT), np.full_like(shown, -1)
    if question == "answers":
        got, bare = free.ctr(rows, shown).lengths, free.ctr(rows, none).lengths
        limit = int(np.median(got))
        asked = describe.answer_lengths(free, "test", rows, shown, limit)
        cut = Prompts(demo_log, tiny_lm.pieces, limit).ctr(rows, shown).cut
    else:
        title = free.completions(demo_log.item[rows]).lengths
        got, bare = (free.ranking(rows, history).lengths + title for history in (shown, none))
        limit = int(np.median(got))
        asked = describe.title_lengths(free, "test", rows, shown, limit, None)
        cut = Prompts(demo_log, tiny_lm.pieces, limit).ranking(rows, shown).cut
    np.testing.assert_array_equal(asked.tokens, got)
    np.testing.assert_array_equal(asked.bare, bare)
    np.testing.assert_array_equal(asked.tokens > limit, cut)
    assert 0 < cut.sum() < len(rows)


def test_plots_show_what_was_counted(two_users):
    log, _ = two_users
    lengths, popularity, times = Figure().subplots(1, 3)
    describe._histories(parts(log), lengths)
    line = lengths.get_lines()[0]  # train: 2 2 3 3 4 5 6 7
    assert line.get_xdata().tolist() == [2, 3, 4, 5, 6, 7]
    assert line.get_ydata().tolist() == [2 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1]
    describe._popularity(log, popularity)
    line = popularity.get_lines()[0]
    assert line.get_xdata().tolist() == list(range(1, 11))
    assert line.get_ydata().tolist() == [2, 2, *[1] * 8]
    # Seconds 1 to 11 in 60 stretches: all samples are counted, the liked ones are those of seconds 3 to 8.
    assert describe._over_time(log, log.rows("train", "all")).sum() == 8
    describe._liked(log, parts(log), times)
    assert np.nansum(times.get_lines()[0].get_ydata()) == 5.5  # second 5: one of two
    describe._times(log, parts(log), times)
    describe._ratings(log, parts(log), times)
    assert [bar.get_height() for bar in times.patches[:2]] == [2 / 8, 6 / 8]


def test_the_page_holds_everything_and_is_written_alike(two_users, tmp_path):
    log, metrics = two_users
    asked = [PromptLengths("yes or no", "test", np.array([12_345]), np.array([5]), 30)]
    examples = [Example("Yes or no, liked", "<s>Will the user like\n", " Yes", 1_234)]
    pages = []
    for name in ("a", "b"):
        out = tmp_path / name / "describe.html"
        shown = describe.write_description(
            log, metrics, out, "two", "time", asked, examples, ["No <LM>."], {"dropped_events_no_item": 1_000}
        )
        pages.append(out.read_text())
    page = pages[0]
    assert page == pages[1]
    for _, (heading, lines) in shown:
        for cell in [*heading, *(cell for line in lines for cell in line)]:
            assert cell in page
    for wanted in ("two: the data", "events dropped: no item", "1,000",
                   "Samples by split (time)", "12,345", "No &lt;LM&gt;.", "(1,234 tokens)",
                   "&lt;s&gt;Will the user like\n<b> Yes</b>"):  # fmt: skip
        assert wanted in page
    assert "http" not in page
    svg = base64.b64decode(re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', page)[1]).decode()
    for title in ("Length of the history", "Popularity of the items", "Ratings", "Samples over time",
                  "Liked over time"):  # fmt: skip
        assert f">{title}<" in svg


def test_codes_of_labels_are_no_ratings(two_users):
    log, metrics = two_users
    log.meta |= {"shows_labels": True}
    log.rating = np.array([2] * 6 + [4, 0] + [3] * 4 + [1, 4], np.int16)  # of 5, 2, liked, not liked
    lines = describe.event_table(log, metrics)[1]
    assert ["ratings", "2: 14.3%, 5: 85.7%"] in lines
    assert ["events without a rating", "7"] in lines
    marks = "events without a rating, as histories show them"
    assert [marks, "2 liked, 4 not liked, 1 neither"] in lines
    axis = Figure().subplots()
    describe._ratings(log, parts(log), axis)
    assert [text.get_text() for text in axis.get_xticklabels()] == ["2", "5"]


def test_a_log_without_times_and_ratings_shows_the_rest(two_users, tmp_path):
    log, metrics = two_users
    log.meta |= {"timed": False, "rating_levels": []}
    log.rating = np.zeros_like(log.rating)
    shown = dict(describe.write_description(log, metrics, tmp_path / "describe.html", "two", "last"))
    assert ["ratings", "none"] in shown["Events"][1]
    assert ["time", "none; events of a user stand in the order of the file"] in shown["Events"][1]
    assert not [line for line in shown["Samples by split (last)"][1] if line[0] in ("from", "to")]
    page = (tmp_path / "describe.html").read_text()
    svg = base64.b64decode(re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', page)[1]).decode()
    assert ">Popularity of the items<" in svg
    assert ">Ratings<" not in svg
    assert ">Samples over time<" not in svg
