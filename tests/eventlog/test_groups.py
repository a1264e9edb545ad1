"""Ranges of grouped events: against a loop, where numbers are large, and how much memory they take."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.eventlog import groups
from recllm.eventlog.groups import CategoryHistories, Groups


@given(
    events=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=30),
    queries=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10)), min_size=1, max_size=10),
    scale=st.sampled_from([1, 1000, 2**57]),
)
def test_a_range_holds_the_events_of_its_group_before_its_place(events, queries, scale):
    """Keys of groups times 2**57 and 10 places are beyond 64 bits."""
    group, place = np.array(events).T
    asked, until = np.array(queries).T
    found = Groups(group * scale, place, 10, np.arange(len(events)))
    first, end = found.before(asked * scale, until)
    for low, high, number, limit in zip(first, end, asked, until, strict=True):
        inside = [row for row, event in enumerate(events) if event[0] == number and event[1] < limit]
        assert sorted(found.values[low:high].tolist()) == inside


@given(events=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=30))
def test_before_each_event_is_what_a_query_of_it_finds(events):
    group, place = np.array(events).T
    found = Groups(group, place, 10, np.arange(len(events)))
    first, end = found.before_each()
    for bounds, wanted in zip((first, end), found.before(group, place), strict=True):
        assert bounds.tolist() == wanted.tolist()


def test_numbered_anew_the_ranges_are_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    group, place = rng.integers(0, 50, 300), rng.integers(0, 20, 300)
    asked, until = rng.integers(0, 60, 100), rng.integers(0, 21, 100)
    plain = Groups(group, place, 20, np.arange(300))
    monkeypatch.setattr(groups, "_MOST", 100)
    anew = Groups(group, place, 20, np.arange(300))
    assert np.array_equal(plain.values, anew.values)
    for one, other in zip(plain.before(asked, until), anew.before(asked, until), strict=True):
        assert np.array_equal(one[asked < 50], other[asked < 50])
    first, end = anew.before(asked, until)
    assert (first == end)[~np.isin(asked, group)].all()


@pytest.mark.parametrize("categories", [20, 60_000])
def test_memory_goes_by_events_and_not_by_users_times_categories(categories):
    rng = np.random.default_rng(0)
    users, count = 20_000, 50_000
    user = np.sort(rng.integers(0, users, count)).astype(np.int32)
    fields = np.arange(categories, dtype=np.int32)[:, None]
    log = SimpleNamespace(
        user=user, item=rng.integers(0, categories, count).astype(np.int32), item_fields=fields,
        n_events=count, meta={"category_field": 0},
    )  # fmt: skip
    tracemalloc.start()
    CategoryHistories(log, np.arange(count))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * count + 16 * categories  # users times categories would be 9.6 GB
