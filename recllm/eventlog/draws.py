"""Random numbers that are functions of (seed, row, draw): the same in any batch, order or process.

A generator with a state hands out numbers in the order of the calls, so a different batch size or a second
worker changes every draw. Here a draw is the hash of its own coordinates, by the finalizer of SplitMix64
(Steele, Lea and Flood, OOPSLA 2014), which is vectorized over numpy's uint64 and needs no state.
"""

import hashlib

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(
    0x9E3779B97F4A7C15
)  # SplitMix64's increment: the odd integer nearest to 2**64 / golden ratio
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive(seed: int, *names: str) -> int:
    """A seed of its own for each use of one seed, so that two uses never share their draws.

    Args:
        seed: the run's seed.
        names: what the draws are for, e.g. `derive(3, "permutation", "train")`.

    Returns:
        An integer in [0, 2**63).
    """
    text = "/".join((str(seed), *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def hashes(seed: int, *keys: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """64 random bits for every tuple of keys.

    Args:
        seed: any integer; equal seeds give equal bits.
        keys: integer arrays that broadcast against each other, e.g. rows `[B, 1]` and items `[B, C]`.

    Returns:
        uint64 of the broadcast shape.
    """
    state = np.full(1, seed % 2**64, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what is wanted
        state = _mix(state + _GOLDEN)
        for key in keys:
            state = _mix((state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN)
    return state.reshape(()) if not keys else state.reshape(np.broadcast_shapes(*map(np.shape, keys)))


def uniform(seed: int, rows: npt.ArrayLike, n: int, start: int = 0) -> npt.NDArray[np.float64]:
    """Draws `start` to `start + n` of each row, uniform in [0, 1).

    Args:
        seed: the seed of this use (see `derive`).
        rows: integers `[B]`.
        n: draws a row.
        start: the first draw's number, so that a row can be asked for more later.

    Returns:
        float64 `[B, n]`, multiples of 2**-53.
    """
    bits = hashes(seed, np.asarray(rows).reshape(-1, 1), np.arange(start, start + n))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows in a seeded order that depends on the set of rows only, not on the order they come in.

    Args:
        seed: the seed of this use (see `derive`).
        rows: distinct integers `[n]`.

    Returns:
        int64 `[n]`. A subset's permutation is this one with the other rows left out, so prefixes nest.
    """
    return rows[np.argsort(hashes(seed, rows))]


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
