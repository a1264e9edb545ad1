"""The best items of a catalog, by hand and against sorting everything; blocks; what is left out."""

from __future__ import annotations

import numpy as np
import pytest

from recllm.systems import catalog
from recllm.systems.catalog import CatalogScorer, Excluded, top
from recllm.systems.system import Kind
from tests.systems.test_counting import EVENTS, make_log

NEVER = -np.inf


def test_the_best_come_first_and_of_equal_ones_the_smaller_id():
    scores = np.array([[NEVER, NEVER, 1, 3, 3, 2, 1], [NEVER, NEVER, 0, 0, 0, 0, 5]], np.float32)
    items, values = top(scores, 4)
    assert items.tolist() == [[3, 4, 5, 2], [6, 2, 3, 4]]
    assert values.tolist() == [[3, 3, 2, 1], [5, 0, 0, 0]]
    assert items.dtype == np.int32
    assert values.dtype == np.float32


def test_where_too_few_are_left_padding_stands_at_the_end():
    scores = np.array([[NEVER, NEVER, 1, 3, 2], [NEVER, NEVER, NEVER, NEVER, NEVER]], np.float32)
    items, values = top(scores, 7, Excluded.of([[3], []]))
    assert items.tolist() == [[4, 2, 0, 0, 0, 0, 0], [0] * 7]
    assert values[0, :2].tolist() == [2, 1]
    assert np.isneginf(values[0, 2:]).all()
    assert np.isneginf(values[1]).all()


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_the_same_as_sorting_everything(levels):
    random = np.random.default_rng(levels)
    scores = catalog.hide_reserved(random.integers(0, levels, (50, 300)).astype(np.float32))
    scores[random.random(scores.shape) < 0.2] = NEVER
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :40]  # stable: the smaller id first
    items, values = top(scores.copy(), 40)
    assert (items == expected).all()
    assert (values == np.take_along_axis(scores, expected, axis=1)).all()


def test_what_cannot_be_ordered_is_refused():
    with pytest.raises(ValueError, match="lists of 0 items"):
        top(np.zeros((1, 4), np.float32), 0)
    with pytest.raises(ValueError, match="not a number"):
        top(np.array([[0, np.nan]], np.float32), 1)


def test_no_rows_give_no_lists():
    items, values = top(np.empty((0, 5), np.float32), 3)
    assert items.shape == values.shape == (0, 3)


def test_seen_items_are_those_above_the_row():
    log = make_log(EVENTS, 5, 7)
    seen = Excluded.seen(log, np.array([4, 5, 9]))
    assert seen.place.tolist() == [0, 0, 0, 0, 2]
    assert seen.item.tolist() == [2, 5, 3, 4, 2]
    assert seen.part(1, 3).place.tolist() == [1]
    assert seen.part(0, 1).item.tolist() == [2, 5, 3, 4]


class LastItemNext(CatalogScorer):
    """Scores item i by its distance to the last one of the history."""

    kind = Kind.COUNTING

    def scores(self, log, rows):
        last = log.item[log.history(rows)[1] - 1]
        distance = np.abs(np.arange(log.n_items)[None] - last[:, None])
        return catalog.hide_reserved(-distance.astype(np.float32))


def test_blocks_change_nothing(monkeypatch):
    log = make_log(EVENTS, 5, 7)
    rows = np.array([4, 6, 9])
    scorer = LastItemNext("last")
    whole = scorer.best(log, rows, 3, Excluded.seen(log, rows))
    assert whole[0].tolist() == [[6, 0, 0], [3, 4, 5], [3, 4, 5]]
    monkeypatch.setattr(catalog, "_BLOCK_BYTES", 4 * log.n_items)
    assert catalog.block_size(log.n_items) == 1
    blocks = scorer.best(log, rows, 3, Excluded.seen(log, rows))
    assert (whole[0] == blocks[0]).all()
    assert (whole[1] == blocks[1]).all()
