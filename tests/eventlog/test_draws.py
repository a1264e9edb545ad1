import numpy as np
import pytest

from recllm.eventlog import draws


def test_splitmix64_of_the_reference():
    # SplitMix64 with state 1234567 gives 6457827717110365317 first (the value that many implementations are
    # checked by): one step adds the golden increment and mixes, which is what `hashes` without keys does.
    assert int(draws.hashes(1234567)) == 6457827717110365317


def test_draws_do_not_depend_on_the_batch():
    rows = np.array([5, 0, 12, 7, 5])
    together = draws.uniform(3, rows, 4)
    for place, row in enumerate(rows):
        np.testing.assert_array_equal(together[place], draws.uniform(3, [row], 4)[0])
    np.testing.assert_array_equal(draws.uniform(3, rows, 2, start=2), together[:, 2:])
    assert (together != draws.uniform(4, rows, 4)).all()


def test_uniform_fills_the_unit_interval_evenly():
    sample = draws.uniform(0, np.arange(20_000), 5)
    assert sample.min() >= 0
    assert sample.max() < 1
    counts = np.histogram(sample, bins=10, range=(0, 1))[0]
    # 100,000 draws: 10,000 a bin, standard deviation 95; five of them would be seen once in a million
    assert abs(counts - 10_000).max() < 5 * 95
    # neighbors in rows and in draws are uncorrelated: standard error 1 / sqrt(80,000) = 0.0035
    assert abs(np.corrcoef(sample[:-1, 0], sample[1:, 0])[0, 1]) < 0.03
    assert abs(np.corrcoef(sample[:, 0], sample[:, 1])[0, 1]) < 0.03


def test_keys_broadcast_and_do_not_commute():
    rows, items = np.array([1, 2, 3]), np.array([[3, 2, 1]])
    bits = draws.hashes(7, rows[:, None], items)
    assert bits.shape == (3, 3)
    assert bits[0, 1] == draws.hashes(7, 1, 2)
    assert bits[0, 1] != bits[1, 2]  # (1, 2) is not (2, 1)
    assert len(np.unique(bits)) == 9


def test_permutation_of_a_subset_is_the_permutation_without_the_others():
    rows = np.arange(100, 200)
    whole = draws.permutation(1, rows)
    assert sorted(whole) == list(rows)
    assert (whole != rows).any()
    half = rows[::2][::-1]
    np.testing.assert_array_equal(draws.permutation(1, half), whole[np.isin(whole, half)])


def test_derived_seeds_differ():
    seeds = [draws.derive(0, "a"), draws.derive(0, "b"), draws.derive(1, "a"), draws.derive(0, "a", "b")]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draws.derive(0, "a") == seeds[0]


@pytest.mark.parametrize("seed", [-1, 0, 2**63 - 1])
def test_any_integer_is_a_seed(seed):
    assert draws.uniform(seed, [0], 1).shape == (1, 1)
