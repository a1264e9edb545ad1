"""Hard search against a literal one, and nothing at or below a row in its reach."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from recllm.crm.inputs import CrmInputs
from recllm.retrieval.category import SameCategory


def literal(log, row, target, k):
    """One row at a time: walk back through its history, keep what has the target's category."""
    category = log.item_fields[:, log.meta["category_field"]]
    (start,), (end,) = log.history(np.array([row]))
    found = [
        position
        for position in range(end - 1, start - 1, -1)
        if category[log.item[position]] == category[target] and category[target] > 1
    ]
    return (found + [-1] * k)[:k]


def rows_and_targets(log):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(log.user), 300)
    rows[:20] = log.offsets[log.user[rows[:20]]]  # first events: an empty history
    return rows, rng.integers(1, log.n_items, 300).astype(np.int32)


@pytest.mark.parametrize("k", [1, 4, 200])
def test_hard_search_equals_the_literal_one(demo_log, k):
    rows, targets = rows_and_targets(demo_log)
    search = SameCategory(demo_log).search
    own, other = search(rows, k=k), search(rows, targets, k)
    assert own.tolist() == [
        literal(demo_log, row, item, k) for row, item in zip(rows, demo_log.item[rows], strict=True)
    ]
    assert other.tolist() == [
        literal(demo_log, row, item, k) for row, item in zip(rows, targets, strict=True)
    ]
    assert (own >= 0).any()
    assert (own < 0).any()


def test_histories_that_end_earlier_are_kept_to(demo_log):
    """With `history.ties=strict` the history ends before the rows of the same second."""
    strict = copy.copy(demo_log)
    strict._history_end = np.maximum(np.arange(len(demo_log.user)) - 3, demo_log.offsets[demo_log.user])
    rows, _ = rows_and_targets(demo_log)
    found = SameCategory(strict).search(rows, k=5)
    assert found.tolist() == [
        literal(strict, row, item, 5) for row, item in zip(rows, demo_log.item[rows], strict=True)
    ]
    assert (found < np.maximum(rows[:, None] - 3, 0)).all()


def test_an_unknown_category_matches_nothing(demo_log):
    log = copy.copy(demo_log)
    log.item_fields = np.array(demo_log.item_fields)
    log.item_fields[:, log.meta["category_field"]] = 1
    assert (SameCategory(log).search(np.arange(100, 200), k=3) == -1).all()


def test_the_batch_holds_what_was_found_in_time_order_with_its_rank(demo_log):
    rows, targets = rows_and_targets(demo_log)
    searcher = SameCategory(demo_log)
    batch = CrmInputs(demo_log, recent=2, retrieved=4, searcher=searcher)(rows, targets)
    category = demo_log.meta["category_field"]
    same = batch["retrieved_item"][..., category] == batch["item"][:, None, category]
    assert same[batch["retrieved_mask"]].all()
    for row in range(50):
        found = [position for position in searcher.search(rows[[row]], targets[[row]], 4)[0] if position >= 0]
        items = demo_log.item_fields[demo_log.item[found[::-1]], 0].tolist()
        mask = batch["retrieved_mask"][row]
        assert batch["retrieved_item"][row, mask, 0].tolist() == items
        # The latest is the first: ranks fall towards the end.
        assert batch["retrieved_rank"][row, mask].tolist() == list(range(len(found), 0, -1))
