import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.eventlog import draws
from recllm.eventlog.candidates import (
    Seen,
    candidate_lists,
    count_new_items,
    hard_lists,
    have_new_items,
    met_before,
    negatives,
)


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
        draws_met=False,
        item_split=None,
        held_count=None,
        held_rows=np.zeros(0, np.int64),
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


@pytest.mark.parametrize("kind", ["uniform", "popular"])
@pytest.mark.parametrize("size", [0, 7 * 2 * 25 * (25 + 64)])
def test_draws_do_not_depend_on_how_many_rows_are_drawn_at_once(log, kind, size, monkeypatch):
    rows = np.arange(len(log.user))
    whole = negatives(log, rows, kind, 25, seed=1)  # more than many users' rejections fill
    monkeypatch.setattr("recllm.eventlog.candidates._BYTES", size)
    np.testing.assert_array_equal(negatives(log, rows, kind, 25, seed=1), whole)


def test_memory_of_long_lists_does_not_grow_with_the_rows():
    big = log_of([[2 + user] for user in range(1500)], 3000)
    rows = np.arange(1500)
    tracemalloc.start()
    drawn = negatives(big, rows, "uniform", 300, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # All rows at once: 1500 * 600 * 300 bytes, that is 270 MB.
    assert peak < 120e6
    np.testing.assert_array_equal(drawn[[700]], negatives(big, rows[[700]], "uniform", 300, seed=0))


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
    with pytest.raises(ValueError, match="row 1: 0 items of the training catalog are new") as error:
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


def unit(rng, *shape):
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def vectors(log):
    """Vectors of two folds, and the users' folds."""
    rng = np.random.default_rng(5)
    return unit(rng, 2, 60, 8), rng.integers(0, 2, log.user.max() + 1)


def test_hard_candidates_are_new_items_near_a_centre_near_the_target(log, vectors):
    rows = np.arange(len(log.user))[::-3]
    lists = hard_lists(log, rows, *vectors, nearest=8, n=6, seed=1)
    assert lists.dtype == np.int32
    trained = np.flatnonzero(log.item_count)
    for row, items in zip(rows, lists, strict=True):
        target = log.item[row]
        met = set(log.item[log.offsets[log.user[row]] : row])
        similar = vectors[0][vectors[1][log.user[row]]]

        def near(item, out, similar=similar):
            return sorted(set(trained) - out, key=lambda other: -float(similar[other] @ similar[item]))[:8]

        assert len(set(items)) == 6
        drawn = set(items) - {target}
        assert len(drawn) == 5
        assert any(drawn <= set(near(center, met | {target})) for center in near(target, {target}))
    keys = draws.hashes(draws.derive(1, "order"), rows[:, None], lists)
    assert (keys[:, 1:] > keys[:, :-1]).all()


def test_hard_candidates_depend_on_seed_and_row_only(log, vectors, monkeypatch):
    rows = np.arange(len(log.user))
    whole = hard_lists(log, rows, *vectors, nearest=8, n=6, seed=1)
    some = rows[::7][::-1]
    np.testing.assert_array_equal(hard_lists(log, some, *vectors, nearest=8, n=6, seed=1), whole[some])
    assert (hard_lists(log, rows, *vectors, nearest=8, n=6, seed=2) != whole).mean() > 0.5
    below = SimpleNamespace(**vars(log))
    below.item = np.array(log.item)
    below.item[41:] = 9
    np.testing.assert_array_equal(hard_lists(below, rows[:41], *vectors, 8, 6, 1), whole[:41])


def test_the_target_is_not_the_middle_of_its_hard_list():
    rng = np.random.default_rng(0)
    log = log_of([[item] for item in rng.integers(2, 500, 2_000)], 500)
    vectors = unit(rng, 1, 500, 6)
    lists = hard_lists(log, np.arange(2_000), vectors, np.zeros(2_002, int), nearest=40, n=10)
    middle = np.einsum("rcd,red->rc", vectors[0][lists], vectors[0][lists])
    assert ((lists == log.item[:, None]).argmax(1) == middle.argmax(1)).mean() < 0.1 + 0.02
    # One target, ten other items on a line: the two nearest to 2 are 3 and 4, and one of them is the center.
    # The negatives are the two nearest to the center, itself among them: 3 and 4, or 4 and 5.
    angle = np.r_[0, 0, np.arange(10)] * 0.1
    angle[5] -= 0.01  # nearer to 4 than 3 is
    line = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)[None]
    few = hard_lists(log_of([[2]] * 2_000, 12), np.arange(2_000), line, np.zeros(2_002, int), 2, 3)
    lists, times = np.unique(np.sort(few, axis=1), axis=0, return_counts=True)
    assert lists.tolist() == [[2, 3, 4], [2, 4, 5]]
    np.testing.assert_allclose(times / 2_000, 0.5, atol=0.05)  # standard error .011


def test_hard_candidates_of_a_target_without_a_vector_are_no_favorites():
    log = log_of([[2]] * 50, 40)
    zero = np.zeros((1, 40, 4), np.float32)
    few = hard_lists(log, np.arange(50), zero, np.zeros(52, int), nearest=10, n=5, seed=0)
    other = hard_lists(log, np.arange(50), zero, np.zeros(52, int), nearest=10, n=5, seed=1)
    assert len(set(few.ravel())) == 11  # ten in the seed's order of items, and the target
    assert set(few.ravel()) != set(other.ravel())


def test_too_few_items_for_hard_candidates_are_one_line(log, vectors):
    with pytest.raises(ValueError, match=r"19 of the 10 nearest items wanted; set retrieval.hard=19"):
        hard_lists(log, np.array([0]), *vectors, nearest=10)
    small = log_of([[2, 3, 4]], 6)
    with pytest.raises(ValueError, match="row 2: 1 items of the training catalog are new"):
        hard_lists(small, np.array([2]), np.zeros((1, 6, 2), np.float32), np.zeros(3, int), 10, 3)


@settings(max_examples=50, deadline=None)
@given(
    histories=st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=12), min_size=1, max_size=4),
    untrained=st.sets(st.integers(2, 9), max_size=3),
    wanted=st.integers(0, 8),
)
def test_new_items_are_counted_as_a_loop_does(histories, untrained, wanted):
    small = log_of(histories, 10, [0, 0, *(int(item not in untrained) for item in range(2, 10))])
    rows = np.arange(len(small.user))
    expected = [
        len(set(range(2, 10)) - untrained - set(history[: place + 1]))
        for history in histories
        for place in range(len(history))
    ]
    assert count_new_items(small, rows).tolist() == expected
    assert count_new_items(small, rows[::-2]).tolist() == expected[::-2]
    assert have_new_items(small, rows, wanted).tolist() == [count >= wanted for count in expected]
    enough = rows[have_new_items(small, rows, wanted)]
    assert negatives(small, enough, "uniform", wanted, seed=0).shape == (len(enough), wanted)


@pytest.mark.parametrize("kind", ["uniform", "popular"])
def test_a_log_that_draws_what_was_met_leaves_out_the_own_item_alone(log, kind):
    rows = np.arange(len(log.user))
    every = SimpleNamespace(**{**vars(log), "draws_met": True})
    drawn = negatives(every, rows, kind, 10, seed=1)
    met = met_before(log, rows, drawn)
    assert met.any()
    assert not met_before(log, rows, negatives(log, rows, kind, 10, seed=1)).any()
    assert not (drawn == log.item[:, None]).any()
    assert (log.item_count[drawn] > 0).all()
    assert all(len(set(line)) == 10 for line in drawn.tolist())
    catalog = int((log.item_count > 0).sum())
    wanted = catalog - (log.item_count[log.item] > 0)
    assert count_new_items(every, rows).tolist() == wanted.tolist()
    assert have_new_items(every, rows, catalog - 1).tolist() == (wanted >= catalog - 1).tolist()
    whole = negatives(every, rows[wanted == catalog - 1][:5], kind, catalog - 1, seed=1)
    assert all(len(set(line)) == catalog - 1 for line in whole.tolist())


def test_hard_lists_too_hold_what_was_met_where_the_log_draws_it():
    rng = np.random.default_rng(0)
    log = log_of([np.r_[2 + rng.permutation(10), 2 + rng.permutation(10)] for _ in range(30)], 40)
    every = SimpleNamespace(**{**vars(log), "draws_met": True})
    rows = np.flatnonzero(np.arange(len(log.user)) - log.offsets[log.user] == 15)
    vectors = rng.standard_normal((1, 40, 4)).astype(np.float32)
    lists = [hard_lists(one, rows, vectors, np.zeros(32, int), nearest=12, n=6) for one in (log, every)]
    met = [met_before(log, rows, of) & (of != log.item[rows, None]) for of in lists]
    assert [one.any() for one in met] == [False, True]
