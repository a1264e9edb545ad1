import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recllm.crm.inputs import INTERVAL_BUCKETS, CrmInputs
from recllm.eventlog.log import chronological


def hand_log():
    """One user, four events at seconds 0, 0, 3, 1000; items 2..5 with a category each."""
    log = SimpleNamespace(
        user=np.full(4, 2, np.int32),
        item=np.array([2, 3, 4, 5], np.int32),
        rating=np.array([1, 0, 2, 2], np.int16),
        label=np.array([0, 1, 1, 0], np.int8),
        timestamp=np.array([0, 0, 3, 1000]),
        user_fields=np.array([[0, 0], [1, 1], [2, 7]], np.int32),
        item_fields=np.array([[0, 0], [1, 1], [2, 8], [3, 9], [4, 8], [1, 9]], np.int32),
    )

    log.history = lambda rows: (np.zeros_like(rows), rows)
    log.timed = True
    return log


def test_a_batch_by_hand():
    batch = CrmInputs(hand_log(), recent=3)(np.array([3, 1]))
    assert batch["user"].tolist() == [[2, 7], [2, 7]]
    assert batch["item"].tolist() == [[1, 9], [3, 9]]  # item 5 has no training event: its id reads 1
    assert batch["label"].tolist() == [0.0, 1.0]
    assert batch["recent_item"].tolist() == [[[2, 8], [3, 9], [4, 8]], [[0, 0], [0, 0], [2, 8]]]
    assert batch["recent_rating"].tolist() == [[1, 0, 2], [0, 0, 1]]
    assert batch["recent_mask"].tolist() == [[True, True, True], [False, False, True]]
    # 1 + floor(log2(1 + seconds)): 1000 s: log2(1001) = 9.97, so 10; 997 s: log2(998) = 9.96, so 10; 0 s: 1
    assert batch["recent_interval"].tolist() == [[10, 10, 10], [0, 0, 1]]
    assert batch["recent_elapsed"][0].tolist() == [1000, 1000, 997]
    assert batch["dense"].tolist() == [5, 3]
    assert batch["recent_dense"][0].tolist() == [2, 3, 4]
    dtypes = {name: value.dtype for name, value in batch.items()}
    assert dtypes.pop("recent_elapsed") == torch.int64
    assert dtypes.pop("label") == torch.float32
    assert dtypes.pop("recent_mask") == torch.bool
    assert set(dtypes.values()) == {torch.int32}
    assert "retrieved_item" not in batch


def test_intervals_end_in_the_last_bucket():
    log = hand_log()
    log.timestamp = np.array([0, 2**40, 2**40 + 1, 2**40 + 2])
    interval = CrmInputs(log, recent=2)(np.array([2]))["recent_interval"]
    assert interval.tolist() == [[INTERVAL_BUCKETS - 1, 2]]


def several_users(lengths, strict):
    """A log of users with these many events, drawn at random; some share a second."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    size = len(user)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    timestamp = np.sort(rng.integers(0, 3 * size, size)) * 977
    end = np.arange(size)
    if strict:
        same = np.r_[False, (user[1:] == user[:-1]) & (timestamp[1:] == timestamp[:-1])]
        end = np.maximum.accumulate(np.where(same, 0, end))
        assert (end < np.arange(size)).any()
    return SimpleNamespace(
        user=user,
        item=rng.integers(2, 30, size).astype(np.int32),
        rating=rng.integers(0, 6, size).astype(np.int16),
        label=rng.integers(0, 2, size).astype(np.int8),
        timestamp=timestamp,
        user_fields=rng.integers(1, 9, (len(lengths), 3)).astype(np.int32),
        item_fields=np.concatenate([[[0, 0, 0]], rng.integers(1, 9, (29, 3))]).astype(np.int32),
        history=lambda rows: (offsets[user[rows]], end[rows]),
        timed=True,
    )


def test_a_log_without_times_has_no_intervals():
    log = hand_log()
    log.timed = False
    assert not CrmInputs(log, recent=3)(np.array([3]))["recent_interval"].any()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("recent", [1, 4, 9, 60, 100])
def test_a_batch_is_what_each_row_alone_has_above_it(recent, strict):
    """Against a loop over rows: first rows of the log, short and long histories, a log shorter than one."""
    log = several_users([0, 0, 3, 40, 1, 12, 30], strict)
    size = len(log.user)
    rng = np.random.default_rng(1)
    stored = np.full((size, 3), -1, np.int32)
    for row in range(size):
        start, end = log.history(row)
        found = rng.permutation(np.arange(start, end))[:3]
        stored[row, : len(found)] = found
    rows = rng.permutation(size)
    batch = CrmInputs(log, recent, 3, stored)(rows)
    for place, row in enumerate(rows):
        start, end = log.history(row)
        found = np.sort(stored[row][stored[row] >= 0])
        shown = {"recent": np.arange(start, end)[-recent:], "retrieved": found}
        for name, events in shown.items():
            part = {key: batch[f"{name}_{key}"][place] for key in ("item", "rating", "interval", "mask")}
            width, count = len(part["mask"]), len(events)
            assert part["mask"].tolist() == [False] * (width - count) + [True] * count
            for value in part.values():
                assert not value[: width - count].any()
            assert part["item"][width - count :].tolist() == log.item_fields[log.item[events]].tolist()
            assert part["rating"][width - count :].tolist() == log.rating[events].tolist()
            seconds = log.timestamp[row] - log.timestamp[events]
            wanted = [1 + math.floor(math.log2(1 + s)) for s in seconds.tolist()]
            assert part["interval"][width - count :].tolist() == wanted
        ranks = [stored[row].tolist().index(event) + 1 for event in shown["retrieved"]]
        assert batch["retrieved_rank"][place].tolist() == [0] * (3 - len(ranks)) + ranks
    assert batch["user"].tolist() == log.user_fields[log.user[rows]].tolist()
    assert batch["item"].tolist() == log.item_fields[log.item[rows]].tolist()
    assert batch["label"].tolist() == log.label[rows].tolist()


def test_another_target_changes_the_item_and_what_is_retrieved_only():
    log = hand_log()
    asked = {}

    class Searcher:
        def search(self, rows, targets, k):
            asked.update(rows=rows, targets=targets, k=k)
            return np.array([[2, 0]])

    stored = np.array([[-1, -1, -1]] * 3 + [[1, 0, 2]], np.int32)
    inputs = CrmInputs(log, recent=2, retrieved=2, stored=stored, searcher=Searcher())
    own, other = inputs(np.array([3])), inputs(np.array([3]), np.array([4], np.int32))
    assert own["item"].tolist() == [[1, 9]]
    assert other["item"].tolist() == [[4, 8]]
    assert own["retrieved_item"][0, :, 0].tolist() == [2, 3]  # rows 1 and 0 of the store, in time order
    assert other["retrieved_item"][0, :, 0].tolist() == [2, 4]
    assert (asked["targets"].tolist(), asked["k"]) == ([4], 2)
    for name in ("user", "label", "recent_item", "recent_rating", "recent_interval", "recent_mask"):
        assert torch.equal(own[name], other[name]), name


def test_retrieved_padding_comes_to_stand_on_the_left():
    assert chronological(np.array([[5, 9, -1], [-1, -1, -1]])).tolist() == [[-1, 5, 9], [-1, -1, -1]]
    stored = np.array([[-1, -1, -1]] * 2 + [[1, 0, -1]] * 2, np.int32)
    batch = CrmInputs(hand_log(), recent=1, retrieved=3, stored=stored)(np.array([2]))
    assert batch["retrieved_mask"].tolist() == [[False, True, True]]
    assert batch["retrieved_item"].tolist() == [[[0, 0], [2, 8], [3, 9]]]
    assert batch["retrieved_rating"].tolist() == [[0, 1, 0]]
    assert batch["retrieved_interval"].tolist() == [[0, 3, 3]]  # 3 s: 1 + log2(4)


def test_what_is_missing_is_refused_with_the_command_that_mends_it():
    log = hand_log()
    with pytest.raises(ValueError, match="make stage1"):
        CrmInputs(log, recent=1, retrieved=2)
    with pytest.raises(ValueError, match=r"1 neighbors are stored, 2 wanted.*retrieval.k=2"):
        CrmInputs(log, recent=1, retrieved=2, stored=np.zeros((4, 1), np.int32))
    inputs = CrmInputs(log, recent=1, retrieved=1, stored=np.zeros((4, 1), np.int32))
    with pytest.raises(ValueError, match="no searcher"):
        inputs(np.array([3]), np.array([2], np.int32))
