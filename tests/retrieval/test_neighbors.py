"""Neighbors against hand examples and a naive search."""

import numpy as np
import pytest

from recllm.retrieval import neighbors as module
from recllm.retrieval.neighbors import Neighbors, write_neighbors
from recllm.retrieval.vectors import normalize

# Items 2..6 of the hand example: directions in the plane. 3 is another length of 2, 6 has no vector.
HAND = normalize(np.array([[0, 0], [0, 0], [1, 0], [5, 0], [0.6, 0.8], [0, 1], [0, 0]], np.float32))


def naive(log, vectors, row, target, k):
    """Scores and the k best rows by (score on the grid, recency), from the definition."""
    start, end = (int(x[0]) for x in log.history(np.array([row])))
    history = np.arange(start, end)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    score = unit[log.item[history]].astype(np.float64) @ unit[target].astype(np.float64)
    order = np.lexsort((-history, -np.round(score * 2**20)))[:k]
    return dict(zip(history.tolist(), score.tolist(), strict=True)), history[order]


def agrees(found, score, wanted):
    """Sorted scores equal to 1e-5, and the same events wherever the gap at k is larger."""
    got = found[found >= 0]
    assert (found[len(got) :] == -1).all()
    assert len(set(got.tolist())) == len(got) == min(len(found), len(score))
    np.testing.assert_allclose([score[p] for p in got], [score[p] for p in wanted], atol=1e-5)
    left_out = [value for row, value in score.items() if row not in set(wanted.tolist())]
    if not left_out or score[wanted[-1]] - max(left_out) > 1e-5:
        assert set(got.tolist()) == set(wanted.tolist())


def test_hand_example_with_ties(write_log):
    # rows:          0  1  2  3  4  5        6  7
    log = write_log([[2, 5, 3, 4, 2, 3], [5, 2]], 7)
    search = Neighbors(log, HAND).search
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


def test_events_without_vector_rank_between_positive_and_negative(write_log):
    vectors = np.array([[0], [0], [1], [-1], [0]], np.float32)
    log = write_log([[2, 3, 4, 4, 2]], 5)
    assert Neighbors(log, vectors).search(np.array([4]), k=5).tolist() == [[0, 3, 2, 1, -1]]


@pytest.mark.parametrize("few_vectors", [False, True], ids=["distinct", "ties everywhere"])
def test_equals_naive(write_log, monkeypatch, few_vectors):
    # Small blocks, batches and pieces, so that every boundary between them is crossed many times.
    monkeypatch.setattr(module, "BLOCK", 7)
    monkeypatch.setattr(module, "TILE", 3)
    monkeypatch.setattr(module, "CELLS", 200)
    monkeypatch.setattr(module, "SPAN", 16)
    rng = np.random.default_rng(0)
    n_items = 60
    histories = [rng.integers(1, n_items, size).tolist() for size in (1, 2, 5, 6, 40, 130, 3)]
    vectors = rng.integers(-1, 2, (n_items, 2)) if few_vectors else rng.standard_normal((n_items, 12))
    vectors = normalize(vectors.astype(np.float32))
    vectors[0] = 0
    log = write_log(histories, n_items)
    rows = rng.permutation(len(log.user))
    rows = np.concatenate([rows, rows[:50]])  # neither sorted nor distinct
    targets = rng.integers(1, n_items, (len(rows), 3))
    found = Neighbors(log, vectors).search(rows, targets, k=6)
    assert found.shape == (len(rows), 3, 6)
    assert found.dtype == np.int64
    for i, row in enumerate(rows):
        for c, target in enumerate(targets[i]):
            score, wanted = naive(log, vectors, row, target, 6)
            agrees(found[i, c], score, wanted)
            if few_vectors:  # whole numbers over a square root: equal scores are equal in any product
                assert found[i, c][found[i, c] >= 0].tolist() == wanted.tolist()


def test_reads_nothing_at_or_below_the_row(write_log):
    rng = np.random.default_rng(1)
    n_items = 30
    items = rng.integers(2, n_items, (3, 50))
    vectors = normalize(rng.standard_normal((n_items, 8)).astype(np.float32))
    rows = np.array([20, 30, 50 + 40, 100 + 25])  # row 20, 30 of user 2, row 40 of user 3, row 25 of user 4
    targets = rng.integers(2, n_items, len(rows))
    before = Neighbors(write_log(items.tolist(), n_items), vectors).search(rows, targets, k=8)
    later = items.copy()  # each user's last row asked for, and all below, become other items
    for user, position in ((0, 30), (1, 40), (2, 25)):
        later[user, position:] = rng.integers(2, n_items, 50 - position)
    after = Neighbors(write_log(later.tolist(), n_items), vectors).search(rows, targets, k=8)
    assert (before == after).all()
    # Vectors that only later rows carry are not read either: put them on new items.
    later[0, 30:] = n_items
    more = np.vstack([vectors, vectors[targets[:1]]])
    after = Neighbors(write_log(later.tolist(), n_items + 1), more).search(rows, targets, k=8)
    assert (before == after).all()
    start = np.array([0, 0, 50, 100])
    assert (before < rows[:, None]).all()
    assert (before >= start[:, None]).all()
    # The same search does see what changes above the row.
    later = items.copy()
    later[0, :20] = later[0, 0]
    seen = Neighbors(write_log(later.tolist(), n_items), vectors).search(rows, targets, k=8)
    assert (seen[:2] != before[:2]).any()
    assert (seen[2:] == before[2:]).all()


def test_strict_history_leaves_out_the_same_second(write_log):
    log = write_log([[2, 3, 2, 3, 2]], 7, history_end=np.array([0, 1, 1, 3, 3]))
    found = Neighbors(log, HAND).search(np.arange(5), k=3)
    assert found.tolist() == [[-1] * 3, [0, -1, -1], [0, -1, -1], [2, 1, 0], [2, 1, 0]]


def test_long_histories_as_they_are_searched(write_log):
    """With the real sizes: several blocks of queries, several pieces of history, folds; against naive."""
    rng = np.random.default_rng(5)
    log = write_log([rng.integers(2, 900, size).tolist() for size in (2600, 30, 1024, 1025)], 900)
    vectors = normalize(rng.standard_normal((2, 900, 24)).astype(np.float32))
    fold = np.arange(log.n_users) % 2
    rows = np.arange(len(log.user))
    found = Neighbors(log, vectors, fold).search(rows, k=10)
    for row in rng.choice(rows, 200, replace=False):
        agrees(found[row], *naive(log, vectors[fold[log.user[row]]], row, log.item[row], 10))


def test_result_does_not_depend_on_company(write_log):
    rng = np.random.default_rng(2)
    log = write_log([rng.integers(2, 40, size).tolist() for size in (200, 90, 91)], 40)
    search = Neighbors(log, normalize(rng.standard_normal((40, 6)).astype(np.float32))).search
    together = search(np.arange(381), k=10)
    alone = np.vstack([search(np.array([row]), k=10) for row in range(0, 381, 9)])
    assert (together[::9] == alone).all()


def test_inner_product_prefers_the_longer_of_two_alike(write_log):
    vectors = np.array([[0, 0], [0, 0], [0.5, 0], [0.9, 0.3], [0.1, 0]], np.float32)
    log = write_log([[3, 2, 4, 2]], 5)
    # Products with target 2: .45, .25, .05; cosines would be .95, 1, 1.
    assert Neighbors(log, vectors).search(np.array([3]), k=3).tolist() == [[0, 1, 2]]
    assert Neighbors(log, normalize(vectors)).search(np.array([3]), k=3).tolist() == [[2, 1, 0]]


@pytest.fixture
def three_users(write_log):
    rng = np.random.default_rng(3)
    log = write_log([rng.integers(2, 40, size).tolist() for size in (30, 50, 9)], 40)
    return Neighbors(log, normalize(rng.standard_normal((40, 6)).astype(np.float32)))


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_file_holds_the_search(three_users, tmp_path):
    asked = np.random.default_rng(4).random(89) < 0.7
    path, told = tmp_path / "neighbors.npy", []
    write_neighbors(
        three_users, asked, 5, path, block=16, on_progress=told.append
    )  # blocks cut through users
    stored = np.load(path, mmap_mode="r")
    assert stored.shape == (89, 5)
    assert stored.dtype == np.int32
    assert (stored[asked] == three_users.search(np.flatnonzero(asked), k=5)).all()
    assert (stored[~asked] == -1).all()
    assert files(tmp_path) == ["neighbors.npy"]
    assert told == [0, 16, 32, 48, 64, 80, 89]


def killed_in_the_third_block(search, path, monkeypatch, **settings):
    """Start to write, fail when row 32 or a later one is asked for."""

    def fail(rows, **kwargs):
        if rows.max() >= 32:
            raise KeyboardInterrupt
        return Neighbors.search(search, rows, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(search, "search", fail)
        with pytest.raises(KeyboardInterrupt):
            write_neighbors(search, np.ones(89, bool), 5, path, block=16, **settings)


def test_a_killed_write_leaves_no_file_and_goes_on(three_users, tmp_path, monkeypatch):
    path, told = tmp_path / "neighbors.npy", []
    killed_in_the_third_block(three_users, path, monkeypatch, identity="a")
    assert not path.exists()
    write_neighbors(three_users, np.ones(89, bool), 5, path, "a", 16, told.append)
    assert told == [32, 48, 64, 80, 89]
    assert (np.load(path) == three_users.search(np.arange(89), k=5)).all()
    assert files(tmp_path) == ["neighbors.npy"]


@pytest.mark.parametrize(("identity", "k"), [("b", 5), ("a", 4)])
def test_what_another_configuration_left_is_begun_anew(three_users, tmp_path, monkeypatch, identity, k):
    path, told = tmp_path / "neighbors.npy", []
    killed_in_the_third_block(three_users, path, monkeypatch, identity="a")
    write_neighbors(three_users, np.ones(89, bool), k, path, identity, 16, told.append)
    assert told[0] == 0
    assert (np.load(path) == three_users.search(np.arange(89), k=k)).all()


def test_no_rows(write_log):
    log = write_log([[2, 3]], 7)
    assert Neighbors(log, HAND).search(np.array([], np.int64), k=4).shape == (0, 4)


def test_errors_name_what_was_given(write_log):
    log = write_log([[2, 3, 4]], 7)
    with pytest.raises(ValueError, match="5 item vectors; wanted 7"):
        Neighbors(log, HAND[:5])
    with pytest.raises(ValueError, match="length nan; wanted finite numbers"):
        Neighbors(log, np.where(HAND == 1, np.nan, HAND).astype(np.float32))
    with pytest.raises(ValueError, match=r"length 2\.0; wanted finite numbers and lengths up to 1"):
        Neighbors(log, 2 * HAND)
    search = Neighbors(log, HAND).search
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
    search = Neighbors(log, np.stack([near_3, near_4]), np.array([0, 0, 0, 1])).search
    # Rows 3 and 7 ask for item 2; its own first event ties with the neighbor: the later one first.
    assert search(np.array([3, 7]), k=3).tolist() == [[1, 0, 2], [6, 4, 5]]
    with pytest.raises(ValueError, match="wanted 4 users, below 2"):
        Neighbors(log, np.stack([near_3, near_4]), np.array([0, 0, 0, 2]))
