"""Neighbours against hand examples and a naive search, on both of its paths (packed keys, FAISS)."""

import numpy as np
import pytest

from recllm.retrieval import neighbours as module
from recllm.retrieval.neighbours import Neighbours, write_neighbours

PATHS = [pytest.param(10**9, id="keys"), pytest.param(1, id="faiss")]

# Items 2..6 of the hand example: directions in the plane. 3 is another length of 2, 6 has no vector.
HAND = np.array([[0, 0], [0, 0], [1, 0], [5, 0], [0.6, 0.8], [0, 1], [0, 0]], np.float32)


def naive(log, vectors, row, target, k):
    """Scores and the k best rows by (score on the grid, recency), from the definition."""
    start, end = (int(x[0]) for x in log.history(np.array([row])))
    history = np.arange(start, end)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    score = unit[log.item[history]].astype(np.float64) @ unit[target].astype(np.float64)
    order = np.lexsort((-history, -np.round(score * 2**20)))[:k]
    return dict(zip(history.tolist(), score.tolist(), strict=True)), history[order]


@pytest.mark.parametrize("faiss_from", PATHS)
def test_hand_example_with_ties(write_log, faiss_from):
    # rows:          0  1  2  3  4  5        6  7
    log = write_log([[2, 5, 3, 4, 2, 3], [5, 2]], 7)
    search = Neighbours(log, HAND, faiss_from=faiss_from).search
    rows = np.array([5, 4, 0, 7])
    # Row 5, target 3 = direction of 2: rows 4, 2, 0 score 1 (later first), row 3 scores .6, row 1 scores 0.
    assert search(rows, k=4).tolist() == [[4, 2, 0, 3], [2, 0, 3, 1], [-1] * 4, [6, -1, -1, -1]]
    assert search(rows, k=4, positions="time").tolist() == [
        [0, 2, 3, 4],
        [0, 1, 2, 3],
        [-1] * 4,
        [-1, -1, -1, 6],
    ]
    # k = 2 cuts through the tie of three: the two later ones.
    assert search(np.array([5]), k=2).tolist() == [[4, 2]]
    # Target 5 = direction (0, 1): row 1 scores 1, row 3 .8, the rest 0 and by recency.
    assert search(np.array([5]), np.array([5]), k=3).tolist() == [[1, 3, 4]]
    # Target 6 has no vector: the most recent.
    assert search(np.array([5]), np.array([6]), k=3).tolist() == [[4, 3, 2]]


@pytest.mark.parametrize("faiss_from", PATHS)
def test_events_without_vector_rank_between_positive_and_negative(write_log, faiss_from):
    vectors = np.array([[0], [0], [1], [-1], [0]], np.float32)
    log = write_log([[2, 3, 4, 4, 2]], 5)
    assert Neighbours(log, vectors, faiss_from=faiss_from).search(np.array([4]), k=5).tolist() == [
        [0, 3, 2, 1, -1]
    ]


@pytest.mark.parametrize("faiss_from", PATHS)
@pytest.mark.parametrize("few_vectors", [False, True], ids=["distinct", "ties everywhere"])
def test_equals_naive(write_log, monkeypatch, faiss_from, few_vectors):
    # Small blocks and chunks, so that every boundary between them is crossed many times.
    monkeypatch.setattr(module, "BLOCK", 7)
    monkeypatch.setattr(module, "SPAN", 20)
    monkeypatch.setattr(module, "CHUNK", 11)
    rng = np.random.default_rng(0)
    n_items = 60
    histories = [rng.integers(1, n_items, size).tolist() for size in (1, 2, 5, 6, 40, 130, 3)]
    vectors = rng.integers(-1, 2, (n_items, 2)) if few_vectors else rng.standard_normal((n_items, 12))
    vectors = vectors.astype(np.float32)
    vectors[0] = 0
    log = write_log(histories, n_items)
    rows = rng.permutation(len(log.user))
    rows = np.concatenate([rows, rows[:50]])  # neither sorted nor distinct
    targets = rng.integers(1, n_items, (len(rows), 3))
    found = Neighbours(log, vectors, faiss_from=faiss_from).search(rows, targets, k=6)
    assert found.shape == (len(rows), 3, 6)
    assert found.dtype == np.int64
    for i, row in enumerate(rows):
        for c, target in enumerate(targets[i]):
            score, wanted = naive(log, vectors, row, target, 6)
            got = found[i, c][found[i, c] >= 0]
            assert (found[i, c, len(got) :] == -1).all()
            assert len(set(got.tolist())) == len(got) == min(6, len(score))
            np.testing.assert_allclose([score[p] for p in got], [score[p] for p in wanted], atol=1e-5)
            assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("faiss_from", PATHS)
def test_reads_nothing_at_or_below_the_row(write_log, faiss_from):
    rng = np.random.default_rng(1)
    n_items = 30
    items = rng.integers(2, n_items, (3, 50))
    vectors = rng.standard_normal((n_items, 8)).astype(np.float32)
    rows = np.array([20, 30, 50 + 40, 100 + 25])  # row 20, 30 of user 2, row 40 of user 3, row 25 of user 4
    targets = rng.integers(2, n_items, len(rows))
    before = Neighbours(write_log(items.tolist(), n_items), vectors, faiss_from=faiss_from).search(
        rows, targets, k=8
    )
    later = items.copy()  # each user's last row asked for, and all below, become other items
    for user, position in ((0, 30), (1, 40), (2, 25)):
        later[user, position:] = rng.integers(2, n_items, 50 - position)
    after = Neighbours(write_log(later.tolist(), n_items), vectors, faiss_from=faiss_from).search(
        rows, targets, k=8
    )
    assert (before == after).all()
    # Vectors that only later rows carry are not read either: put them on new items.
    later[0, 30:] = n_items
    more = np.vstack([vectors, 100 * vectors[targets[:1]]])
    after = Neighbours(write_log(later.tolist(), n_items + 1), more, faiss_from=faiss_from).search(
        rows, targets, k=8
    )
    assert (before == after).all()
    start = np.array([0, 0, 50, 100])
    assert (before < rows[:, None]).all()
    assert (before >= start[:, None]).all()
    # The same search does see what changes above the row.
    later = items.copy()
    later[0, :20] = later[0, 0]
    seen = Neighbours(write_log(later.tolist(), n_items), vectors, faiss_from=faiss_from).search(
        rows, targets, k=8
    )
    assert (seen[:2] != before[:2]).any()
    assert (seen[2:] == before[2:]).all()


def test_strict_history_leaves_out_the_same_second(write_log):
    log = write_log([[2, 3, 2, 3, 2]], 7, history_end=np.array([0, 1, 1, 3, 3]))
    found = Neighbours(log, HAND).search(np.arange(5), k=3)
    assert found.tolist() == [[-1] * 3, [0, -1, -1], [0, -1, -1], [2, 1, 0], [2, 1, 0]]


def test_result_does_not_depend_on_company_or_scale(write_log):
    rng = np.random.default_rng(2)
    log = write_log([rng.integers(2, 40, 200).tolist()], 40)
    vectors = rng.standard_normal((40, 6)).astype(np.float32)
    search = Neighbours(log, vectors).search
    together = search(np.arange(200), k=10)
    alone = np.vstack([search(np.array([row]), k=10) for row in range(0, 200, 9)])
    assert (together[::9] == alone).all()
    scaled = Neighbours(log, vectors * np.arange(1, 41, dtype=np.float32)[:, None]).search(
        np.arange(200), k=10
    )
    assert (scaled == together).all()


def test_file_holds_the_search(write_log, tmp_path):
    rng = np.random.default_rng(3)
    log = write_log([rng.integers(2, 40, size).tolist() for size in (30, 50, 9)], 40)
    search = Neighbours(log, rng.standard_normal((40, 6)).astype(np.float32))
    rows = rng.permutation(89)[:60]
    path = tmp_path / "neighbours.npy"
    write_neighbours(search, rows, 5, path, block=16)  # blocks cut through users
    stored = np.load(path, mmap_mode="r")
    assert stored.shape == (89, 5)
    assert stored.dtype == np.int32
    assert (stored[rows] == search.search(rows, k=5)).all()
    assert (stored[np.setdiff1d(np.arange(89), rows)] == -1).all()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["neighbours.npy"]


def test_a_killed_write_leaves_no_file(write_log, tmp_path, monkeypatch):
    log = write_log([[2, 3, 2, 4]], 7)
    search = Neighbours(log, HAND)
    calls = iter([search.search(np.array([0, 1]), k=2)])  # the second block fails
    monkeypatch.setattr(search, "search", lambda *args, **kwargs: next(calls))
    with pytest.raises(StopIteration):
        write_neighbours(search, np.arange(4), 2, tmp_path / "neighbours.npy", block=2)
    assert not (tmp_path / "neighbours.npy").exists()


def test_no_rows(write_log):
    log = write_log([[2, 3]], 7)
    assert Neighbours(log, HAND).search(np.array([], np.int64), k=4).shape == (0, 4)


def test_errors_name_what_was_given(write_log):
    log = write_log([[2, 3, 4]], 7)
    with pytest.raises(ValueError, match="5 item vectors; wanted 7"):
        Neighbours(log, HAND[:5])
    with pytest.raises(ValueError, match="NaN"):
        Neighbours(log, np.where(HAND == 5, np.nan, HAND).astype(np.float32))
    search = Neighbours(log, HAND).search
    with pytest.raises(ValueError, match="k is 0"):
        search(np.array([1]), k=0)
    with pytest.raises(ValueError, match="'recency'"):
        search(np.array([1]), positions="recency")
    with pytest.raises(ValueError, match=r"rows 1\.\.3; wanted 0\.\.2"):
        search(np.array([1, 3]))
    with pytest.raises(ValueError, match="targets of 1 rows; wanted 2"):
        search(np.array([1, 2]), np.array([2]))
    with pytest.raises(ValueError, match="wanted ids below 7"):
        search(np.array([1]), np.array([7]))


def test_each_user_is_searched_with_the_vectors_of_his_fold(write_log):
    log = write_log([[2, 3, 4, 2], [2, 3, 4, 2]], 5)
    near_3, near_4 = np.zeros((2, 5, 2), np.float32)
    near_3[2:] = [[1, 0], [1, 0], [0, 1]]
    near_4[2:] = [[1, 0], [0, 1], [1, 0]]
    search = Neighbours(log, np.stack([near_3, near_4]), np.array([0, 0, 0, 1])).search
    # Rows 3 and 7 ask for item 2; its own first event ties with the neighbour: the later one first.
    assert search(np.array([3, 7]), k=3).tolist() == [[1, 0, 2], [6, 4, 5]]
    with pytest.raises(ValueError, match="wanted 4 users, below 2"):
        Neighbours(log, np.stack([near_3, near_4]), np.array([0, 0, 0, 2]))
