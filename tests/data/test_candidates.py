from types import SimpleNamespace

import numpy as np
import pytest

from recllm.data import draws
from recllm.data.candidates import Seen, candidate_lists, negatives


def log_of(histories, n_items, item_count=None):
    """A log from each user's list of dense items; users from 2 on."""
    lengths = [0, 0, *map(len, histories)]
    return SimpleNamespace(
        user=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        item=np.concatenate(histories).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        item_count=np.array(
            [0, 0] + [1] * (n_items - 2) if item_count is None else item_count, dtype=np.int32
        ),
        anchors=lambda rows: rows,
    )


@pytest.fixture(scope="module")
def log():
    rng = np.random.default_rng(0)
    count = np.r_[0, 0, rng.integers(1, 100, 58)]
    count[[5, 6]] = 0  # two items without a training event
    return log_of([2 + rng.permutation(58)[: rng.integers(1, 30)] for _ in range(50)], 60, count)


@pytest.mark.parametrize("kind", ["uniform", "popular"])
def test_negatives_are_new_distinct_and_trained(log, kind):
    rows = np.arange(len(log.user))
    drawn = negatives(log, rows, kind, 10, seed=1)
    assert drawn.dtype == np.int32
    for row in rows:
        met = set(log.item[log.offsets[log.user[row]] : row + 1])
        assert len(set(drawn[row])) == 10
        assert not met & set(drawn[row])
        assert not {0, 1, 5, 6} & set(drawn[row])


@pytest.mark.parametrize("kind", ["uniform", "popular"])
def test_draws_depend_on_seed_and_row_only(log, kind):
    rows = np.arange(len(log.user))
    drawn = negatives(log, rows, kind, 10, seed=1)
    some = rows[::7][::-1]
    np.testing.assert_array_equal(negatives(log, some, kind, 10, seed=1), drawn[some])
    np.testing.assert_array_equal(negatives(log, some, kind, 10, seed=1, seen=Seen(log)), drawn[some])
    assert (negatives(log, rows, kind, 10, seed=2) != drawn).mean() > 0.5


def test_what_lies_below_the_row_changes_nothing():
    before = log_of([[2, 3, 4, 5, 6], [7, 8, 9]], 30)
    after = log_of([[2, 3, 4, 20, 21], [7, 8, 9]], 30)
    for kind in ("uniform", "popular"):
        np.testing.assert_array_equal(
            negatives(before, np.array([2]), kind, 10, 0), negatives(after, np.array([2]), kind, 10, 0)
        )


def test_shares_of_uniform_and_popular_draws():
    # items 2, 3, 4 with 1, 2 and 7 training events; every user has met item 5 only, which has none
    log = log_of([[5]] * 20_000, 6, [0, 0, 1, 2, 7, 0])
    rows = np.arange(20_000)
    uniform = np.bincount(negatives(log, rows, "uniform", 1, 0)[:, 0], minlength=6)[2:5] / 20_000
    popular = np.bincount(negatives(log, rows, "popular", 1, 0)[:, 0], minlength=6)[2:5] / 20_000
    # standard error at most sqrt(.25 / 20,000) = .0035
    np.testing.assert_allclose(uniform, [1 / 3, 1 / 3, 1 / 3], atol=0.018)
    np.testing.assert_allclose(popular, [0.1, 0.2, 0.7], atol=0.018)


def test_exact_draws_after_the_rejections_have_the_same_shares():
    # Item 2 holds nearly all of the weight and is met by everybody, so rejection hardly ever succeeds; what
    # is left are items 3 and 4 in proportion 1 : 3.
    log = log_of([[2, 5]] * 8_000, 6, [0, 0, 10_000_000, 1, 3, 0])
    rows = np.arange(1, 16_000, 2)
    drawn = negatives(log, rows, "popular", 1, 0)[:, 0]
    assert set(drawn) == {3, 4}
    # standard error sqrt(.75 * .25 / 8,000) = .0048
    assert (drawn == 4).mean() == pytest.approx(0.75, abs=0.024)
    both = negatives(log, rows[:5], "popular", 2, 0)
    assert sorted(both[0]) == [3, 4]


def test_the_target_may_be_drawn_where_it_is_not_excluded():
    log = log_of([[2, 3]] * 200, 4)
    assert set(negatives(log, np.arange(1, 400, 2), "uniform", 1, 0, exclude_target=False)[:, 0]) == {3}
    with pytest.raises(ValueError, match="row 1: 0 items of the training catalogue are new") as error:
        negatives(log, np.array([1]), "uniform", 1, 0)
    assert "\n" not in str(error.value)


def test_unknown_kind():
    with pytest.raises(ValueError, match="'random', wanted one of uniform, popular"):
        negatives(log_of([[2]], 4), np.array([0]), "random", 1, 0)


def test_candidate_order_does_not_tell_the_target(log):
    rows = np.arange(len(log.user))
    lists = candidate_lists(log, rows, "uniform", 10, seed=3)
    for row in rows:
        assert len(set(lists[row])) == 10
        assert log.item[row] in lists[row]
    # The order is the one of a hash of (row, item), whichever candidate is the target ...
    keys = draws.hashes(draws.derive(3, "order"), rows[:, None], lists)
    assert (keys[:, 1:] > keys[:, :-1]).all()
    # ... so the target stands anywhere: 10 places, share .1 each
    big = log_of([[2]] * 5_000, 100)
    place = (candidate_lists(big, np.arange(5_000), "uniform", 10, 0) == 2).argmax(axis=1)
    # standard error sqrt(.1 * .9 / 5,000) = .0042
    np.testing.assert_allclose(np.bincount(place, minlength=10) / 5_000, 0.1, atol=0.02)
