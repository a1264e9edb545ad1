"""Why ids of one table are not found in another."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.tables import joins


@pytest.mark.parametrize(
    ("missing", "present", "found"),
    [
        (["a", "7.0"], ["7", "8"], "; it looks like whole numbers written as 1.0: '7.0' here, '7' there"),
        (
            ["17850"],
            ["17850.0"],
            "; it looks like whole numbers written as 1.0: '17850' here, '17850.0' there",
        ),
        (["7"], ["007"], "; it looks like leading zeros: '7' here, '007' there"),
        (["B00X"], ["b00x"], "; it looks like capital and small letters: 'B00X' here, 'b00x' there"),
        (["7.5", "x"], ["7", "y"], ""),
        ([], ["7"], ""),
    ],
)
def test_what_it_looks_like(missing, present, found):
    assert joins.unlike(pl.Series(missing, dtype=pl.String), pl.Series(present)) == found


@given(ids=st.lists(st.integers(0, 2**70), min_size=1, max_size=5), gap=st.integers(1, 9))
def test_a_hint_names_two_ids_that_are_there(ids, gap):
    missing = pl.Series([f"{number}.0" for number in ids])
    assert f"{missing[0]!r} here, '{ids[0]}' there" in joins.unlike(missing, pl.Series([str(n) for n in ids]))
    others = pl.Series([str(2**71 + gap)])
    assert joins.unlike(missing, others) == ""
