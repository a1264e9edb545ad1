import numpy as np
import pytest

from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.splits import split_samples, training_events


def split(config, user, sample, timestamp=None):
    split, order = split_samples(config, user, sample, timestamp)
    return split, order, training_events(config, user, split, order, timestamp)


def test_time_breaks_ties_by_row():
    timestamp = np.array([5, 7, 7, 1, 7, 9, 7, 7, 7, 7, 7, 7])
    sample = np.ones(12, dtype=bool)
    sample[1] = False
    codes, order, training = split(PrepareConfig(), np.full(12, 2), sample, timestamp)
    # 11 samples: 11 * 8 // 10 = 8, 11 // 10 = 1, rest 2
    assert order["train"].tolist() == [3, 0, 2, 4, 6, 7, 8, 9]
    assert order["valid"].tolist() == [10]
    assert order["test"].tolist() == [11, 5]
    assert codes.tolist() == [0, -1, 0, 0, 0, 2, 0, 0, 0, 0, 1, 2]
    # row 1 is no sample, but not later than the last training sample: both are of second 7
    assert np.flatnonzero(~training).tolist() == [5, 10, 11]
    timestamp[1] = 8
    assert not split(PrepareConfig(), np.full(12, 2), sample, timestamp)[2][1]


def test_shares_are_what_is_written():
    # .29 * 100 is 28.999999999999996 in floating point, and .57 * 100 is 56.99999999999999
    config = PrepareConfig(shares=[0.57, 0.29])
    _, order, _ = split(config, np.zeros(100, int), np.ones(100, bool), np.arange(100))
    assert [len(rows) for rows in order.values()] == [57, 29, 14]
    for n in (970_009, 24_187_390):
        config = PrepareConfig(split="random") if n < 1_000_000 else PrepareConfig()
        _, order, _ = split(config, np.zeros(n, int), np.ones(n, bool), np.zeros(n, int))
        assert [len(rows) for rows in order.values()] == [n * 8 // 10, n // 10, n - n * 8 // 10 - n // 10]


def three_users():
    """Users 2, 3, 4 with 7, 3 and 1 rows; the first two rows of each are no samples, nor is row 5."""
    user = np.array([2] * 7 + [3] * 3 + [4])
    sample = np.array([0, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0], bool)
    return user, sample


def test_last_by_hand():
    user, sample = three_users()
    timestamp = np.array([1, 2, 3, 4, 5, 6, 7, 0, 0, 2, 9])
    codes, order, training = split(PrepareConfig(split="last"), user, sample, timestamp)
    # user 2 has the samples 2 3 4 6, so two train, 4 validates, 6 tests; user 3 has 9 alone, which tests
    assert codes.tolist() == [-1, -1, 0, 0, 1, -1, 2, -1, -1, 2, -1]
    assert {name: rows.tolist() for name, rows in order.items()} == {
        "train": [2, 3],
        "valid": [4],
        "test": [9, 6],
    }
    # row 5 is no sample, but comes after the held-out row 4; user 4 has nothing held out
    assert np.flatnonzero(training).tolist() == [0, 1, 2, 3, 7, 8, 10]
    codes, _, _ = split(PrepareConfig(split="last", last_n=2), user, sample, timestamp)
    assert codes.tolist() == [-1, -1, 1, 1, 2, -1, 2, -1, -1, 2, -1]


def test_users_are_split_whole():
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(2, 42, 2_000))
    sample = rng.random(2_000) < 0.9
    sample[user == 7] = False
    codes, order, training = split(PrepareConfig(split="user"), user, sample, rng.integers(0, 9, 2_000))
    of_user = {u: set(codes[(user == u) & sample]) for u in range(2, 42)}
    assert of_user.pop(7) == set()
    assert all(len(found) == 1 for found in of_user.values())
    # 39 users with samples: 39 * 8 // 10 = 31, 39 // 10 = 3, rest 5
    assert [sum(found == {code} for found in of_user.values()) for code in (0, 1, 2)] == [31, 3, 5]
    # nothing of a held-out user counts, not even its early rows; all of the others does, and of user 7
    held_out = {u for u, found in of_user.items() if found != {0}}
    np.testing.assert_array_equal(training, ~np.isin(user, list(held_out)))
    assert sorted(np.concatenate(list(order.values()))) == np.flatnonzero(sample).tolist()
    other = split(PrepareConfig(split="user", seed=1), user, sample)[0]
    assert (other != codes).any()


def test_random_is_a_function_of_seed_and_rows():
    user, sample = np.sort(np.arange(1_000) % 30), np.arange(1_000) % 7 > 0
    codes, order, training = split(PrepareConfig(split="random"), user, sample)
    n = int(sample.sum())
    assert [len(rows) for rows in order.values()] == [n * 8 // 10, n // 10, n - n * 8 // 10 - n // 10]
    assert all((np.diff(rows) > 0).all() for rows in order.values())  # no times: the order of the log
    np.testing.assert_array_equal(training, ~np.isin(codes, [1, 2]))
    np.testing.assert_array_equal(split(PrepareConfig(split="random"), user, sample)[0], codes)
    assert (split(PrepareConfig(split="random", seed=1), user, sample)[0] != codes).any()
    # no part of the log is preferred: about a tenth of each half tests
    halves = [(codes[half] == 2).sum() for half in (slice(500), slice(500, 1_000))]
    assert halves == pytest.approx([43, 43], abs=20)


@pytest.mark.parametrize("kind", ["time", "last", "user", "random"])
def test_no_held_out_sample_is_a_training_event(kind):
    rng = np.random.default_rng(1)
    user = np.sort(rng.integers(2, 52, 3_000))
    timestamp = rng.integers(0, 400, 3_000)
    timestamp = timestamp[np.lexsort((timestamp, user))]
    codes, order, training = split(PrepareConfig(split=kind), user, rng.random(3_000) < 0.8, timestamp)
    assert not training[codes > 0].any()
    assert training[codes == 0].all()
    for name, code in (("train", 0), ("valid", 1), ("test", 2)):
        assert sorted(order[name]) == np.flatnonzero(codes == code).tolist()
        assert (np.diff(timestamp[order[name]]) >= 0).all()
