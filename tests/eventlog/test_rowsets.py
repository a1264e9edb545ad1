"""Rows that select a checkpoint: a figure that cannot be computed selects nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.errors import StageError
from recllm.eventlog.rowsets import selection_rows, with_cold_share
from recllm.metrics import auc


def log_of(labels):
    """A log whose validation split has these labels; `uniform<n>` are the first n."""
    every = np.arange(len(labels))
    sets = {"all": every} | {f"uniform{n}": every[:n] for n in range(1, len(labels) + 1)}
    return SimpleNamespace(label=np.array(labels, np.int8), rows=lambda split, name: sets[name])


@given(labels=st.lists(st.integers(0, 1), min_size=1, max_size=12), data=st.data())
def test_rows_select_where_they_have_an_auc_and_a_remedy_helps(labels, data):
    log, count = log_of(labels), data.draw(st.integers(1, len(labels)))
    chosen = np.array(labels[:count])
    if not np.isnan(auc(np.zeros(count), chosen)):
        assert selection_rows(log, f"uniform{count}", "stage1.fit.valid_rows").tolist() == list(range(count))
        return
    with pytest.raises(StageError) as refused:
        selection_rows(log, f"uniform{count}", "stage1.fit.valid_rows")
    line = str(refused.value)
    assert (
        f"all {count} validation rows (stage1.fit.valid_rows=uniform{count}) have label {labels[0]}," in line
    )
    helps = len(set(labels)) == 2
    assert ("ARGS=stage1.fit.valid_rows=all" in line) == helps
    assert ("another prepare.split" in line) != helps
    if helps:
        selection_rows(log, "all", "stage1.fit.valid_rows")


COLD, WARM = [0, 1, 3, 4, 6, 7, 8, 9], [2, 5]


def log_of_users():
    """Validation rows 0 to 9, of which 2 and 5 have a user with a training sample; permuted: 9, 8 ... 0."""
    user = np.array([7] * 10 + [8, 8])
    user[WARM] = 8
    sets = {
        ("train", "all"): np.array([10, 11]),
        ("valid", "all"): np.arange(10),
        ("valid", "1.0"): np.arange(9, -1, -1),
    }
    label = np.array([1, 0] * 6, np.int8)
    return SimpleNamespace(user=user, label=label, rows=lambda split, name: sets[split, name])


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        (0.0, WARM),
        (1.0, COLD),
        (0.5, [2, 5, 8, 9]),  # 2 warm rows, so 2 cold ones: the first of the permutation
        (0.6, [2, 5, 7, 8, 9]),  # 3 of 5
        (0.8, list(range(10))),  # as they are
        (0.88, [0, 1, 3, 4, 5, 6, 7, 8, 9]),  # 8 cold rows, and round(0.12 / 0.88 * 8) = 1 warm one
    ],
)
def test_rows_with_a_share_of_cold_users_by_hand(share, wanted):
    log = log_of_users()
    assert with_cold_share(log, np.arange(10), share).tolist() == wanted


def test_a_share_that_no_row_can_give_is_refused():
    log = log_of_users()
    assert with_cold_share(log, np.array(WARM), 0.0).tolist() == WARM
    wanted = r"stage1.cold_share=0.5, but 0 of 2 validation rows .*; wanted 0, or null"
    with pytest.raises(StageError, match=wanted):
        with_cold_share(log, np.array(WARM), 0.5)
    with pytest.raises(StageError, match=r"but 8 of 8 validation rows .*; wanted 1, or null"):
        with_cold_share(log, np.array(COLD), 0.2)


def test_what_selects_has_the_share():
    assert selection_rows(log_of_users(), "all", "stage1.fit.valid_rows", 0.5).tolist() == [2, 5, 8, 9]
