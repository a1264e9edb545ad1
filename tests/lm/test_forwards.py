"""Which rows go through an LM together."""

import numpy as np

from recllm.lm import forwards
from recllm.lm.forwards import cut_for_scoring, rows_for_scoring

LENGTHS = np.array([7, 3, 5, 9, 4])


def test_rows_of_like_length_are_scored_together(monkeypatch):
    # Sorted: 3 4 5 7 9 are rows 1 4 2 0 3. A GPU: by rows alone.
    assert [part.tolist() for part in cut_for_scoring(LENGTHS, 2, "cuda")] == [[1, 4], [2, 0], [3]]
    # 4 rows of up to 7 are 28 tokens; 3 of up to 5 are 15, and the fourth is alone; then the fifth.
    monkeypatch.setitem(forwards.LARGEST, "cpu", 15)
    assert [part.tolist() for part in cut_for_scoring(LENGTHS, 4, "cpu")] == [[1, 4, 2], [0], [3]]


def test_a_row_that_is_too_long_goes_alone_and_none_is_lost(monkeypatch):
    monkeypatch.setitem(forwards.LARGEST, "cpu", 1)
    assert [part.tolist() for part in cut_for_scoring(LENGTHS, 256, "cpu")] == [[1], [4], [2], [0], [3]]
    assert cut_for_scoring(np.zeros(0, np.int64), 256, "cpu") == []


def test_rows_of_any_length_fit(monkeypatch):
    monkeypatch.setitem(forwards.LARGEST, "cpu", 20)
    assert rows_for_scoring(LENGTHS, 64, "cpu") == 2  # the longest has 9
    assert rows_for_scoring(LENGTHS, 1, "cpu") == 1
    assert rows_for_scoring(LENGTHS, 64, "cuda") == 64
    assert rows_for_scoring(np.array([21]), 64, "cpu") == 1
