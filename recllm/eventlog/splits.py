"""Which samples train, validate and test, and which events training may count.

| `prepare.split` | test | what it measures, and what it costs |
| --- | --- | --- |
| `time` | the latest samples of all users | the future from the past, as ReLLa and RecLoRA do |
| `last` | the latest samples of each user | nearly every user is known; the training events of one user may |
|  |  | be later than the test events of another |
| `user` | all samples of some users | new users only: every user of valid and test is cold |
| `items` | the latest samples, as of `time`, of some items | items that nobody has rated: every item of |
|  |  | valid and test is cold; samples of other items do not test |
| `random` | any samples | for logs without times; a later event may train what an earlier one tests, and |
|  |  | an event of the test split stands in later histories, so figures are too good |
| `given` | what the data set says: a column, or a file a split | what others measured on the same rows; |
|  |  | what it costs depends on how they split |

**Training events** are what training may count or learn the wording of: ids, attribute values, popularity,
co-occurrence, text of the LM, vectors. They are the rows of the training split and, of the rows that are no
samples (early history, no label),

- `time`: those not later than the last training sample;
- `last`: those above the first held-out sample of their user;
- `items`: as `time`, of the items that train;
- `user`: those of users without a held-out sample;
- `random`: all;
- `given`: those that are said to be of the training split, and of those that are of none the ones above the
  first held-out event of their user.

A held-out sample is never one. In any split it may stand in the history of a later sample, as a feature: in
`time`, `last` and `user` only of held-out samples, in `random`, and `given` as the case may be, also of
training samples. Running statistics
of an item (`recllm.eventlog.statistics`) count it for every sample of a later second, in all but `time` also
for training samples, as a running system would.

**Held-out items** (`items`). A seeded share of the items validates, another one tests (`prepare.held_items`).
What is known of them is what a catalog says, title and attributes; that anybody rated one is not: their
events are no events of the log, and stand in no history, no statistic, no count and no text. Those that are
samples lie behind the events (`EventLog.held_rows`), each with the history that its user had of other items.
Samples of an item that validates are those of the validation span of `time`, and of one that tests those of
the test span, so that training is earlier in time, too. Samples of other items in these spans are not asked,
but stand in later histories.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from recllm.eventlog import draws
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.ids import SPLITS, TEST, TRAIN, UNUSED, VALID

Array = npt.NDArray[Any]

BY_TIME = ("time", "items")
"""Splits that cut the samples of all users by time, and so want a log with times."""


def split_samples(
    config: PrepareConfig, user: Array, sample: Array, timestamp: Array | None, given: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """Splits the samples of a log.

    - `time`: sorted globally by (timestamp, user, item), the first share trains, the next validates, the rest
      tests.
    - `last`: the last `last_n` samples of each user test, as many before them validate, the others train. A
      user with no more than 2 last_n samples has none that trains.
    - `items`: as `time`; which of the samples are asked is for `held_items` to say.
    - `user`: users with samples in a seeded order, cut by the shares.
    - `random`: samples in a seeded order, cut by the shares.
    - `given`: as the data set says; what it says nothing of is no sample.

    Args:
        config: `split`, `shares`, `last_n` and `seed` are read.
        user: dense users `[N]`, ascending; in each user's rows time ascends.
        sample: bool `[N]`, the rows that are samples.
        timestamp: seconds `[N]`, or None for a log without times, which `time` and `items` do not split.
        given: the split that the data set says, as a code, -1 for none, int8 `[N]`; read by `given` only.

    Returns:
        split int8 `[N]` (0 train, 1 valid, 2 test, -1 no sample), and the rows of each split, int64, sorted
        globally by (timestamp, user, item); without times in the order of the log.
    """
    split = np.full(len(user), UNUSED, dtype=np.int8)
    rows = np.flatnonzero(sample)
    # Rows ascend by (user, ..., item), so a stable sort by time alone breaks its ties by user, then item.
    in_time = rows if timestamp is None else rows[np.argsort(timestamp[rows], kind="stable")]
    if config.split in BY_TIME:
        assert timestamp is not None
        order = dict(zip(SPLITS, np.split(in_time, _bounds(len(rows), config.shares)), strict=True))
        for name, part in order.items():
            split[part] = SPLITS[name]
        return split, order
    if config.split == "last":
        end = np.cumsum(np.bincount(user[rows], minlength=int(user.max(initial=0)) + 1))
        from_end = end[user[rows]] - 1 - np.arange(len(rows))
        split[rows] = np.select(
            [from_end < config.last_n, from_end < 2 * config.last_n], [TEST, VALID], TRAIN
        )
    elif config.split == "given":
        assert given is not None
        split[rows] = given[rows]
    elif config.split == "user":
        users, which = np.unique(user[rows], return_inverse=True)
        split[rows] = _draw_codes(draws.derive(config.seed, "split", "user"), users, config.shares)[which]
    else:
        split[rows] = _draw_codes(draws.derive(config.seed, "split", "random"), rows, config.shares)
    return split, {name: in_time[split[in_time] == code] for name, code in SPLITS.items()}


def training_events(
    config: PrepareConfig,
    user: Array,
    split: Array,
    order: dict[str, Array],
    timestamp: Array | None,
    given: Array | None = None,
) -> Array:
    """Rows that training may count, bool `[N]`; the rule is on top of this file.

    Args:
        config: `split` is read.
        user: dense users `[N]`, ascending.
        split: int8 `[N]`, as `split_samples` returns it.
        order: rows of each split, as it returns them; there is one that trains.
        timestamp: seconds `[N]`; read by `time` only.
        given: what the data set says of each event, as in `split_samples`; read by `given` only.
    """
    trains = split == TRAIN
    unused = split == UNUSED
    if config.split in BY_TIME:
        assert timestamp is not None
        return trains | (unused & (timestamp <= timestamp[order["train"][-1]]))
    if config.split == "random":
        return trains | unused
    if config.split == "given":
        assert given is not None
        trains = given == TRAIN
        split = given
        unused = given == UNUSED
    held_out = np.flatnonzero(split > TRAIN)
    first = np.full(int(user.max(initial=0)) + 1, len(user))
    first[user[held_out[::-1]]] = held_out[::-1]  # the topmost one is written last
    if config.split == "user":
        return trains | (unused & (first == len(user))[user])
    return trains | (unused & (np.arange(len(user)) < first[user]))


def held_items(config: PrepareConfig, items: int) -> Array:
    """The split that each of some items is held out for, int8 `[items]`; TRAIN: none.

    Args:
        config: `held_items` and `seed` are read.
        items: how many there are; which of them are held out is a function of the seed and of their number.
    """
    order = np.argsort(draws.hashes(draws.derive(config.seed, "split", "items"), np.arange(items)))
    valid, test = [int(items * Fraction(str(share))) for share in config.held_items]
    codes = np.full(items, TRAIN, np.int8)
    codes[order[:valid]] = VALID
    codes[order[valid : valid + test]] = TEST
    return codes


def _bounds(total: int, shares: list[float]) -> list[int]:
    """Where training and validation end; shares as they are written, so that .1 of 970,009 is 97,000."""
    train, valid = [int(total * Fraction(str(fraction))) for fraction in shares]
    return [train, train + valid]


def _draw_codes(seed: int, keys: Array, shares: list[float]) -> Array:
    """A split code for each of these distinct integers, int8: in an order drawn by hash, cut by shares."""
    codes = np.empty(len(keys), np.int8)
    order = np.argsort(draws.hashes(seed, keys))
    for code, part in zip(SPLITS.values(), np.split(order, _bounds(len(keys), shares)), strict=True):
        codes[part] = code
    return codes
