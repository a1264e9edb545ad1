"""Running counts and shares: six events by hand, and samples of the demo against a plain loop."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from recllm.eventlog import statistics
from recllm.eventlog.statistics import LEVELS, OWN_ROWS, PRIOR, STATISTICS, Statistics, words


def hand_log(**changed):
    """Users 2 and 3; items 2 and 4 have category 7, item 3 has 8; 1/2 of the training events are liked."""
    log = SimpleNamespace(
        user=np.array([2, 2, 2, 2, 3, 3], np.int32),
        item=np.array([2, 3, 4, 2, 2, 4], np.int32),
        label=np.array([1, 0, 1, 0, 1, -1], np.int8),
        timestamp=np.array([10, 20, 20, 40, 15, 40]),
        item_fields=np.array([[0, 0], [1, 1], [2, 7], [3, 8], [4, 7]], np.int32),
        item_likes=np.array([0, 0, 2, 0, 0], np.int32),
        item_count=np.array([0, 0, 2, 1, 1], np.int32),
        offsets=np.array([0, 0, 0, 4, 6]),
        n_events=6,
        meta={"category_field": 1},
    )
    for name, value in changed.items():
        setattr(log, name, value)
    log.history = lambda rows: (log.offsets[log.user[rows]], np.asarray(rows))
    return log


def count_code(n):
    return 1 + math.floor(2 * math.log2(1 + n))


def share_code(likes, n, wider):
    return 1 + math.floor(46 * (likes + 5 * wider) / (n + 5))


def test_by_hand():
    assert (LEVELS, PRIOR) == (48, 5.0)
    last_of_2, last_of_3 = Statistics(hand_log())(np.array([3, 5])).tolist()
    # Row 3: user 2 has met three films and liked two. Film 2 was met at 10 and 15, and liked both times. Of
    # category 7 the user has met two films and liked both.
    user = (2 + 2.5) / 8
    assert user == 0.5625
    assert last_of_2 == [5, share_code(2, 3, 0.5), 4, share_code(2, 2, 0.5), 4, share_code(2, 2, user)]
    assert last_of_2 == [5, 26, 4, 30, 4, 32]  # 46 (.5625, 4.5 / 7, 4.8125 / 7) = 25.9, 29.6, 31.6
    # Row 5: user 3 liked its one film, of category 7. Film 4 was met at 20, and liked.
    assert last_of_3 == [3, share_code(1, 1, 0.5), 3, share_code(1, 1, 0.5), 3, share_code(1, 1, 3.5 / 6)]


def test_other_targets_and_nothing_known():
    log = hand_log()
    known = Statistics(log)
    found = known(np.array([3, 0]), np.array([3, 1], np.int32))
    # Row 3 with film 3: met at 20 and not liked; the user's one film of category 8 is that one.
    assert found[0].tolist() == [5, 26, 3, share_code(0, 1, 0.5), 3, share_code(0, 1, 0.5625)]
    assert found[1].tolist() == [1, 24, 1, 24, 1, 24]  # nobody has met anything: 46 / 2
    assert found.dtype == np.int32
    assert found.shape == (2, len(STATISTICS))


def test_the_same_second_tells_nothing_of_the_item():
    # At 20 user 2 meets films 3 and 4, and another user film 4 as well: not yet known at 20, known at 40.
    log = hand_log(timestamp=np.array([10, 20, 20, 40, 20, 40]), item=np.array([2, 3, 4, 2, 4, 4], np.int32))
    found = Statistics(log)(np.array([2, 5]))
    assert found[0, 2:4].tolist() == [1, 24]
    assert found[1, 2:4].tolist() == [count_code(2), share_code(2, 2, 0.5)]


def test_a_log_without_times_knows_nothing_of_items():
    found = Statistics(hand_log(timestamp=np.zeros(6, np.int64)))(np.arange(6))
    assert set(map(tuple, found[:, 2:4].tolist())) == {(1, 24)}
    assert found[3, 0] == 5  # the user's history has its stated order


@pytest.mark.parametrize("all_rows", [False, True])
def test_all_rows_at_once_have_the_codes_that_each_has_alone(demo_log, monkeypatch, all_rows):
    monkeypatch.setattr(statistics, "CHUNK", 700)
    log = demo_log
    rows = np.random.default_rng(1).permutation(log.n_events)
    if not all_rows:
        rows = rows[: log.n_events // OWN_ROWS - 1]
    known = Statistics(log)
    found = known(rows)
    assert found.dtype == np.int32
    assert ("_own" in vars(known)) == all_rows
    assert np.array_equal(found, known(rows, log.item[rows]))


@pytest.mark.parametrize("others", [False, True])
def test_against_a_loop(demo_log, others):
    log, rng = demo_log, np.random.default_rng(0)
    rows = rng.choice(np.flatnonzero(log.split >= 0), 300, replace=False)
    targets = rng.integers(2, log.n_items, len(rows)).astype(np.int32) if others else None
    found = Statistics(log)(rows, targets)
    share = log.label[log.training].mean()
    category = log.item_fields[:, log.meta["category_field"]]
    for row, target, codes in zip(rows, log.item[rows] if targets is None else targets, found, strict=True):
        history = np.arange(log.offsets[log.user[row]], row)
        earlier = np.flatnonzero((log.item == target) & (log.timestamp < log.timestamp[row]))
        alike = history[category[log.item[history]] == category[target]]
        likes = [int(log.label[events].sum()) for events in (history, earlier, alike)]
        of_user = (likes[0] + 5 * share) / (len(history) + 5)
        wanted = []
        for events, liked, wider in zip(
            (history, earlier, alike), likes, (share, share, of_user), strict=True
        ):
            wanted += [count_code(len(events)), share_code(liked, len(events), wider)]
        assert codes.tolist() == wanted


def test_words_say_what_a_code_means():
    counts, shares = words("user_count"), words("item_likes")
    assert len(counts) == len(shares) == LEVELS
    for n in (0, 1, 2, 3, 5, 7, 11, 90, 181, 1448):  # the least count of a code
        assert counts[count_code(n)] == f" {float(f'{n:.2g}'):.0f}"
        assert n == 0 or count_code(n - 1) < count_code(n)
    assert counts[count_code(200)] == counts[count_code(181)] == " 180"
    for share, said in ((0.0, "0%"), (0.501, "50%"), (0.62, "60%"), (0.64, "65%"), (1.0, "100%")):
        assert shares[1 + math.floor(46 * share)] == f" {said}"
