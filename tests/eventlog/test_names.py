import pytest

from recllm.errors import ConfigError
from recllm.eventlog.names import (
    ENOUGH_ROWS,
    CandidateKind,
    RowSet,
    check_candidates,
    check_hold_out,
    check_rows,
    sized,
)


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("all", "all", 1.0),
        ("first30000", "first", 30_000),
        ("last70000", "last", 70_000),
        ("uniform500", "uniform", 500),
        ("0.1", "fraction", 0.1),
        ("0.00001", "fraction", 1e-5),
        ("1.0", "fraction", 1.0),
    ],
)
def test_a_row_set_is_read_and_written(text, kind, amount):
    row_set = RowSet.parse(text)
    assert row_set == RowSet(kind, amount)
    assert str(row_set) == text


@pytest.mark.parametrize(("text", "short"), [(".5", "0.5"), ("0.250", "0.25"), ("1.00", "1.0")])
def test_row_sets_that_are_the_same_are_equal(text, short):
    assert RowSet.parse(text) == RowSet.parse(short)
    assert str(RowSet.parse(text)) == short


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("all", 70),
        ("first20", 20),
        ("last90", 70),
        ("uniform0", 0),
        ("0.25", 18),
        ("1.0", 70),
        ("0.25max20", 18),
        ("0.25max9", 9),
    ],
)
def test_how_many_of_70_rows(text, count):
    assert RowSet.parse(text).count(70) == count  # a quarter is 17.5, and the even neighbor is taken


@pytest.mark.parametrize(
    "text", ["", "none", "some", "uniform", "first-3", "1.5", "0", "1", "10%", "all2", " all", "last3 "]
)
def test_other_words_are_refused_in_one_line(text):
    with pytest.raises(ConfigError, match=r"row set '.*' is unknown; wanted all, first<n>, last<n>") as error:
        RowSet.parse(text)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"^subsample=.*wanted all, first<n>"):
        check_rows("subsample", text)


@pytest.mark.parametrize("text", ["none", "uniform20", "last20", "0.1", ".1", "0.0"])
def test_what_nests_may_be_held_out(text):
    check_hold_out("stage1.hold_out", text)


@pytest.mark.parametrize("text", ["", "all", "first20", "1.0", "1.5", "uniform"])
def test_what_does_not_nest_or_is_all_may_not(text):
    with pytest.raises(ConfigError, match=r"^stage1.hold_out=.*wanted none, uniform<n>, last<n>"):
        check_hold_out("stage1.hold_out", text)


@pytest.mark.parametrize(
    ("text", "kind", "size"),
    [("uniform20", "uniform", 20), ("popular5", "popular", 5), ("hard20", "hard", 20)],
)
def test_a_kind_of_candidates_is_read_and_written(text, kind, size):
    assert CandidateKind.parse(text) == CandidateKind(kind, size)
    assert str(CandidateKind(kind, size)) == text
    check_candidates("evaluate.candidates", text)


@pytest.mark.parametrize("text", ["", "uniform", "20", "random20", "hard20 ", "hard-20"])
def test_other_candidates_are_refused_in_one_line(text):
    with pytest.raises(ConfigError, match=r"candidates '.*' are unknown; wanted uniform<n>, popular<n> or"):
        CandidateKind.parse(text)
    with pytest.raises(ConfigError, match=r"^evaluate\.candidates=.*wanted uniform<n>, popular<n> or"):
        check_candidates("evaluate.candidates", text)


def test_a_large_split_is_measured_on_as_many_rows_as_an_auc_needs():
    assert sized("auto", 97_002) == sized("auto", ENOUGH_ROWS) == "all"
    assert sized("auto", ENOUGH_ROWS + 1) == f"uniform{ENOUGH_ROWS}"
    assert sized("all", 10**7) == "all"
    assert sized("first30000", 10**7) == "first30000"
    # Hanley and McNeil (1982), likes and dislikes n / 2 each, AUC A: half of the 95 % interval.
    area = 0.8
    one = area / (2 - area) - area**2
    other = 2 * area**2 / (1 + area) - area**2
    half = ENOUGH_ROWS / 2
    variance = (area * (1 - area) + (half - 1) * (one + other)) / half**2
    assert 0.0018 < 1.96 * variance**0.5 < 0.002


@pytest.mark.parametrize(
    ("larger", "smaller", "holds"),
    [
        ("all", "last5", True),
        ("uniform70000", "uniform70000", True),
        ("uniform80000", "uniform70000", True),
        ("uniform60000", "uniform70000", False),
        ("0.2", "0.1", True),
        ("last10", "last20", False),
        ("last20", "uniform10", False),
        ("0.1", "uniform10", False),  # of 50 rows .1 is 5
        ("0.1", "0.1max10", True),
        ("0.1max10", "0.1", False),
        ("0.2max10", "0.1max10", True),
        ("0.2max9", "0.1max10", False),
        ("uniform10", "0.1max10", True),
        ("uniform9", "0.1max10", False),
    ],
)
def test_a_row_set_holds_another_where_it_does_in_a_split_of_any_size(larger, smaller, holds):
    assert (RowSet.parse(smaller) in RowSet.parse(larger)) is holds
