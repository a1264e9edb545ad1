"""Rows that select a checkpoint: a figure that cannot be computed selects nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.errors import StageError
from recllm.eventlog.rowsets import selection_rows
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
