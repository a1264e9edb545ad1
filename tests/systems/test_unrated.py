"""Baselines of items that nobody rated, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from recllm.eventlog.log import EventLog
from recllm.systems.system import Task
from recllm.systems.unrated import CategoryPopularity, TextKnn


@pytest.fixture
def log(tmp_path):
    """User 2 likes 2, dislikes 3, likes 4; items 2, 3, 6 are of category 2, 4 and 5 of 3."""
    n_items = 7
    fields = np.array([[0, 0], [1, 1], [2, 2], [3, 2], [4, 3], [1, 3], [1, 2]], np.int32)
    arrays = {
        "user": np.full(4, 2, np.int32),
        "item": np.array([2, 3, 4, 5], np.int32),
        "rating": np.zeros(4, np.int16),
        "label": np.array([1, 0, 1, 1], np.int8),
        "timestamp": np.arange(4, dtype=np.int64),
        "split": np.array([0, 0, 0, 2], np.int8),
        "training": np.array([True, True, True, False]),
        "offsets": np.array([0, 0, 0, 4], np.int64),
        "user_fields": np.zeros((3, 1), np.int32),
        "item_fields": fields,
        "item_count": np.array([0, 0, 1, 1, 1, 0, 0], np.int32),
        "item_likes": np.array([0, 0, 1, 0, 1, 0, 0], np.int32),
    }
    return EventLog(
        tmp_path, arrays, {"category_field": 1, "n_items": n_items, "n_users": 3, "rating_levels": []}
    )


def test_an_unrated_item_is_as_popular_as_its_category(log):
    system = CategoryPopularity(log, prior=2.0)
    assert system.tasks == (Task.CTR, Task.RANKING, Task.NEXT)
    rate = 2.5 / 4  # two likes of three events, half an event of each kind
    drama = (1 + 2 * rate) / (1 + 2)  # category 3: item 4
    war = (1 + 2 * rate) / (2 + 2)  # category 2: items 2 and 3
    (score,) = system.ctr(np.array([3]))  # item 5, of category 3
    assert score == pytest.approx(np.log(drama / (1 - drama)))
    (liked,) = system.ctr(np.array([0]))
    own = (1 + 2 * war) / (1 + 2)
    assert liked == pytest.approx(np.log(own / (1 - own)))
    # mean events an item are 1, everywhere and in both categories
    assert system.rank(np.array([3]), np.array([[5, 6, 2]], np.int32))[0] == pytest.approx([1, 1, 1])
    scores = system.scores(log, np.array([3, 3]))
    assert scores.shape == (2, 7)
    assert np.isneginf(scores[:, :2]).all()


def test_text_knn_likes_what_reads_like_what_was_liked(log):
    angle = np.pi / 3
    vectors = np.zeros((7, 2), np.float32)
    vectors[2] = [1, 0]
    vectors[3] = [0, 1]
    vectors[4] = [np.cos(angle), np.sin(angle)]
    vectors[5] = [1, 0]
    system = TextKnn(log, vectors, sharpness=1.0, prior=1.0)
    mean = 2.5 / 4
    # row 3 is of item 5; its history: 2 liked (cosine 1), 3 disliked (0), 4 liked (1/2)
    weight = np.exp([0.0, -1.0, -0.5])
    share = (weight[0] + weight[2] + mean) / (weight.sum() + 1)
    (score,) = system.ctr(np.array([3]))
    assert score == pytest.approx(np.log(share / (1 - share)), rel=1e-6)
    # last liked 4 weighs 1, the one before, 2, weighs 1/2
    ranked = system.rank(np.array([3]), np.array([[5, 3, 6]], np.int32))[0]
    assert ranked == pytest.approx([0.5 + 0.5, np.sin(angle), 0.0], rel=1e-6)
    scores = system.scores(log, np.array([3]))[0]
    assert scores[[5, 3]] == pytest.approx(ranked[:2], rel=1e-6)
    assert np.isneginf(scores[[0, 1, 6]]).all()  # no text: cannot be recommended
    # a first event has no history: the mean, and nothing to rank by
    assert system.ctr(np.array([0]))[0] == pytest.approx(np.log(mean / (1 - mean)), rel=1e-6)
    assert not system.rank(np.array([0]), np.array([[5, 3]], np.int32)).any()
