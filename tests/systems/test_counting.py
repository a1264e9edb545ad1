"""Counting baselines on a log small enough to count by hand, and against a slow loop on a random one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from recllm.eventlog.log import EventLog
from recllm.systems import counting
from tests.systems.contract import SystemContract


def make_log(events: list[tuple[int, int, int, int]], n_users: int, n_items: int) -> EventLog:
    """A log from (user, item, label, split) in log order; timestamps are rows, later for valid and test."""
    user, item, label, split = (np.array(column) for column in zip(*events, strict=True))
    train = split == 0
    arrays = {
        "user": user.astype(np.int32),
        "item": item.astype(np.int32),
        "rating": np.zeros(len(user), np.int16),
        "label": label.astype(np.int8),
        "timestamp": np.arange(len(user)) + 10_000 * split.clip(0),
        "split": split.astype(np.int8),
        "training": train,
        "offsets": np.searchsorted(user, np.arange(n_users + 1)),
        "user_fields": np.zeros((n_users, 1), np.int32),
        "item_fields": np.zeros((n_items, 1), np.int32),
        "item_count": np.bincount(item[train], minlength=n_items).astype(np.int32),
        "item_likes": np.bincount(item[train & (label == 1)], minlength=n_items).astype(np.int32),
    }
    return EventLog(Path("nowhere"), arrays, {"n_users": n_users, "n_items": n_items})


EVENTS = [
    # user 2 likes 2, dislikes 5, likes 3, likes 4; then a test row
    (2, 2, 1, 0), (2, 5, 0, 0), (2, 3, 1, 0), (2, 4, 1, 0), (2, 6, 1, 2),
    # user 3 likes 2, then 3
    (3, 2, 1, 0), (3, 3, 1, 0), (3, 5, 0, 2),
    # user 4 likes 2 in training, then a test row whose history is item 2 alone
    (4, 2, 1, 0), (4, 3, 1, 2),
]  # fmt: skip


def test_popularity_by_hand() -> None:
    log = make_log(EVENTS, 5, 7)
    assert counting.popularity_rank(log).tolist() == [0, 0, 3, 2, 1, 1, 0]
    # 7 training events, 6 liked: mean (6 + .5) / (7 + 1); item 2 has 3 of 3
    mean = 6.5 / 8
    logits = counting.popularity_ctr(log, prior=2.0)
    rate = (3 + 2 * mean) / (3 + 2)
    assert logits[2] == pytest.approx(math.log(rate / (1 - rate)))
    assert logits[6] == pytest.approx(math.log(mean / (1 - mean)))  # no training event: the mean
    assert logits[5] < logits[6] < logits[4] < logits[2]


def test_sampled_negatives_are_events_that_no_like_answers() -> None:
    log = make_log(EVENTS, 5, 7)
    before = counting.popularity_ctr(log, prior=2.0)
    # Behind the events: of training item 2 and 6, of test 3 (not counted).
    log.item = np.append(log.item, [2, 6, 3])
    log.split = np.append(log.split, [0, 0, 2])
    mean = 6.5 / 10
    rates = {2: (3 + 2 * mean) / (4 + 2), 6: (0 + 2 * mean) / (1 + 2), 3: (2 + 2 * mean) / (2 + 2)}
    after = counting.popularity_ctr(log, prior=2.0)
    for item, rate in rates.items():
        assert after[item] == pytest.approx(math.log(rate / (1 - rate)))
    assert (after < before)[2:].all()


def test_undirected_is_the_cosine_of_the_sets_of_users() -> None:
    log = make_log(EVENTS, 5, 7)
    scores = counting.Cooccurrence(log, directed=False).rank(np.array([9]), np.array([[3, 4, 6, 2]]))
    # users who like 2: {2, 3, 4}; 3: {2, 3}; 4: {2}; 6: nobody in training
    np.testing.assert_allclose(scores[0], [2 / math.sqrt(3 * 2), 1 / math.sqrt(3), 0, 0], atol=1e-8)


def test_directed_counts_what_follows_within_the_window() -> None:
    log = make_log(EVENTS, 5, 7)
    one = counting.Cooccurrence(log, directed=True, window=1, discount=0.0)
    two = counting.Cooccurrence(log, directed=True, window=2, discount=0.0)
    candidates = np.array([[3, 4, 5, 2]])
    # after 2 comes 3 twice (the dislike between is no like), 4 once two likes later; 2 was liked 3 times
    np.testing.assert_allclose(one.rank(np.array([9]), candidates)[0], [2 / 3, 0, 0, 0], atol=1e-8)
    np.testing.assert_allclose(two.rank(np.array([9]), candidates)[0], [2 / 3, 1 / 3, 0, 0], atol=1e-8)
    halved = counting.Cooccurrence(log, directed=True, window=1, discount=0.5)
    np.testing.assert_allclose(halved.rank(np.array([9]), candidates)[0, 0], 2 / 3 / math.sqrt(2), atol=1e-8)


def test_recent_likes_weigh_more() -> None:
    log = make_log(EVENTS, 5, 7)
    # row 4: history 2, (5), 3, 4. The last three likes are 4, 3, 2; candidate 4 follows 3 (1 of 2 likes) only
    # at lag 1
    model = counting.Cooccurrence(log, directed=True, window=1, discount=0.0)
    np.testing.assert_allclose(model.rank(np.array([4]), np.array([[4]]))[0], [0.5 * (1 / 2)], atol=1e-8)
    model = counting.Cooccurrence(log, directed=True, window=1, discount=0.0, fade=0.0)
    np.testing.assert_allclose(model.rank(np.array([4]), np.array([[4]]))[0], [0.5], atol=1e-8)
    model = counting.Cooccurrence(log, directed=True, window=1, discount=0.0, recent=1)
    np.testing.assert_allclose(model.rank(np.array([4]), np.array([[4]]))[0], [0.0], atol=1e-8)


def test_without_history_popularity_decides() -> None:
    log = make_log(EVENTS, 5, 7)
    scores = counting.Cooccurrence(log, directed=True).rank(np.array([0]), np.array([[6, 2, 3, 4]]))
    assert np.argsort(-scores[0]).tolist() == [1, 2, 3, 0]
    assert scores.max() < 1e-8


@pytest.mark.parametrize("directed", [True, False])
def test_equals_a_loop_and_reads_only_training_and_the_own_past(directed: bool) -> None:
    rng = np.random.default_rng(0)
    n_items, events = 30, []
    for user in range(2, 22):
        split = np.sort(rng.choice([0, 0, 0, 1, 2], 40))
        events += [(user, int(rng.integers(2, n_items)), int(rng.random() < 0.6), int(s)) for s in split]
    log = make_log(events, 22, n_items)
    rows = np.flatnonzero(log.split == 2)[:25]
    candidates = rng.integers(2, n_items, (len(rows), 6))
    got = counting.Cooccurrence(log, directed, window=3, discount=0.3, recent=4, fade=1.0).rank(
        rows, candidates
    )

    liked_train = {u: [i for v, i, y, s in events if v == u and y and s == 0] for u in range(2, 22)}
    count = np.zeros((n_items, n_items))
    for items in liked_train.values():
        if directed:
            for place, i in enumerate(items):
                for j in items[place + 1 : place + 4]:
                    count[i, j] += 1
        else:
            for i in set(items):
                for j in set(items):
                    count[i, j] += 1
    np.fill_diagonal(count, 0)
    if directed:
        likes = np.maximum([sum(x.count(i) for x in liked_train.values()) for i in range(n_items)], 1)
        count = count / likes[:, None] / likes[None, :] ** 0.3
    else:
        users = np.maximum([sum(i in x for x in liked_train.values()) for i in range(n_items)], 1)
        count = count / np.sqrt(users[:, None] * users[None, :])
    for r, row in enumerate(rows):
        past = [i for v, i, y, _ in events[:row] if v == events[row][0] and y][-4:][::-1]
        wanted = [sum(count[i, c] / (p + 1) for p, i in enumerate(past)) for c in candidates[r]]
        np.testing.assert_allclose(got[r], wanted, atol=1e-6)

    # Altering rows at and below the samples changes nothing.
    events = [(u, i if s == 0 or n < rows[0] else 2, y if s == 0 or n < rows[0] else 0, s)
              for n, (u, i, y, s) in enumerate(events)]  # fmt: skip
    changed = make_log(events, 22, n_items)
    again = counting.Cooccurrence(changed, directed, window=3, recent=4).rank(rows[:1], candidates[:1])
    np.testing.assert_allclose(again, got[:1], atol=1e-7)


def test_what_was_met_before_by_hand(tmp_path):
    """User 2 plays 2 3 2 3, user 3 plays 4 2 4; then tests. Of met training samples 2 of 3 are liked."""
    events = [(2, 2, 1, 0), (2, 3, 0, 0), (2, 2, 1, 0), (2, 3, 0, 0), (2, 2, 1, 2), (2, 4, 0, 2)]
    events += [(3, 4, 0, 0), (3, 2, 1, 0), (3, 4, 1, 0), (3, 3, 1, 2)]
    log = make_log(events, n_users=4, n_items=5)
    np.save(tmp_path / "order_train.npy", np.flatnonzero(log.split == 0))
    log.folder = tmp_path
    system = counting.MetBefore(log)
    met, new = np.log(2.5 / 1.5), np.log(2.5 / 2.5)
    np.testing.assert_allclose(system.ctr(np.array([4, 5, 9])), [met, new, new])
    lists = np.array([[4, 2, 3], [3, 2, 4]], np.int32)
    assert system.rank(np.array([4, 9]), lists).tolist() == [[0, 1, 1], [0, 1, 1]]


class TestMetBefore(SystemContract):
    @pytest.fixture
    def make(self, demo_log):
        return lambda: counting.MetBefore(demo_log)


class TestPopularity(SystemContract):
    @pytest.fixture
    def make(self, demo_log):
        return lambda: counting.Popularity(demo_log)


class TestCooccurrence(SystemContract):
    @pytest.fixture(params=[False, True])
    def make(self, request, demo_log):
        return lambda: counting.Cooccurrence(demo_log, directed=request.param)

    def test_the_two_have_names_of_their_own(self, demo_log):
        names = [counting.Cooccurrence(demo_log, directed).name for directed in (False, True)]
        assert names == ["cooccurrence", "cooccurrence-directed"]
