"""Item vectors: hand arithmetic, the split's boundary, PCA, and the LM's masked mean."""

import tracemalloc

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

from recllm.retrieval.config import RetrievalConfig
from recllm.retrieval.vectors import (
    cooccurrence_vectors,
    embed_items,
    item_vectors,
    lm_vectors,
    normalize,
    scale,
    user_folds,
    vectors_of_folds,
)

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = [
    LlamaConfig(**SMALL, intermediate_size=24),
    GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    Qwen2Config(**SMALL, num_key_value_heads=1, intermediate_size=24),
]


def cosines(vectors):
    unit = normalize(vectors)
    return unit @ unit.T


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_embeddings_are_the_mean_or_the_last_of_own_tokens(config, pooling):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    rng = np.random.default_rng(0)
    lengths = np.array([0, 3, 9, 1, 0, 5, 3])
    tokens = rng.integers(0, 50, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    found = embed_items(model, tokens, offsets, 3, pooling)
    assert model.training  # dropout was off only meanwhile
    model.eval()
    assert found.shape == (7, 16)
    assert found.dtype == np.float32
    for i, length in enumerate(lengths):
        if length == 0:
            assert (found[i] == 0).all()
            continue
        ids = torch.from_numpy(tokens[offsets[i] : offsets[i + 1]].astype(np.int64))[None]
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1]  # one item alone, no padding
        wanted = hidden[0].mean(0) if pooling == "mean" else hidden[0, -1]
        np.testing.assert_allclose(found[i], wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "width"),
    [
        # A decoder that ends narrower than its layers are, and a width inside the part that reads text.
        (OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=8), 8),
        (
            Gemma3Config(
                text_config={**SMALL, "head_dim": 8, "intermediate_size": 24, "num_key_value_heads": 1},
                vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                               "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
            ),
            16,
        ),
    ],
    ids=["opt", "gemma3"],
)  # fmt: skip
def test_embeddings_are_as_wide_as_the_decoder_ends(config, width):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = np.arange(1, 9)
    found = embed_items(model, tokens, np.array([0, 0, 3, 8]))
    assert found.shape == (3, width)
    with torch.no_grad():
        wanted = model.get_decoder()(torch.from_numpy(tokens[None, 3:])).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(found[2], wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_embedding_never_runs_the_head():
    model = AutoModelForCausalLM.from_config(CONFIGS[0])
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the LM head ran"))
    embed_items(model, np.arange(4), np.array([0, 4]))


def test_embedding_refuses_offsets_of_other_tokens():
    with pytest.raises(ValueError, match=r"0\.\.3; wanted 0\.\.4"):
        embed_items(AutoModelForCausalLM.from_config(CONFIGS[0]), np.arange(4), np.array([0, 3]))


def test_pca_keeps_cosines_of_a_centered_subspace():
    # 40 centered points of a 3-dimensional subspace of R^10: PCA to 3 is a rotation of it.
    rng = np.random.default_rng(0)
    points = rng.standard_normal((20, 3)) @ np.linalg.qr(rng.standard_normal((10, 3)))[0].T
    hidden = np.vstack([points, -points]).astype(np.float32)
    found = lm_vectors(hidden, 3)
    assert found.shape == (40, 3)
    np.testing.assert_allclose(found @ found.T, cosines(hidden), atol=1e-5)
    # With one dimension fewer, some are lost: the test can fail.
    assert np.abs(cosines(lm_vectors(hidden, 2)) - cosines(hidden)).max() > 0.01


def test_pca_removes_what_all_texts_share_and_skips_items_without_text():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((30, 8)).astype(np.float32)
    shifted = hidden + 100
    empty = np.vstack([np.zeros((2, 8), np.float32), shifted])
    found = lm_vectors(empty, 5)
    assert (found[:2] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(found[2:], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(cosines(found[2:]), cosines(lm_vectors(hidden, 5)), atol=1e-3)


def test_pca_dimension_is_bounded_by_the_data():
    rng = np.random.default_rng(0)
    assert lm_vectors(rng.standard_normal((50, 8)).astype(np.float32), 64).shape == (50, 8)
    assert lm_vectors(rng.standard_normal((5, 8)).astype(np.float32), 64).shape == (5, 5)
    assert lm_vectors(np.zeros((5, 8), np.float32), 64).shape == (5, 0)


def test_cooccurrence_by_hand(write_log):
    # Users 2 and 3 saw items 2 and 3, users 4 and 5 items 4 and 5: two blocks, singular values 2 and 2.
    # Item 6 only occurs in the test split.
    rating = np.array([1, 5, 5, 1, 1, 5, 1, 5, 5], np.int16)
    split = np.array([0, 0, 0, 0, 0, 0, 0, 0, 2], np.int8)
    log = write_log([[2, 3], [2, 3], [4, 5], [4, 5, 6]], 7, rating=rating, split=split)
    found = cooccurrence_vectors(log, 2)
    assert found.shape == (7, 4)
    assert found.dtype == np.float32
    seen, residual = cosines(found[2:6, :2]), cosines(found[2:6, 2:])
    np.testing.assert_allclose(seen, np.kron(np.eye(2), np.ones((2, 2))), atol=1e-5)
    # Items 2, 3: means 3, 3, residuals of users 2, 3: (-2, 2) and (2, -2); the users' means of these are 0.
    # Items 4, 5: means 1, 5, nothing is left; their residual part has no direction.
    np.testing.assert_allclose(residual[:2, :2], [[1, -1], [-1, 1]], atol=1e-5)
    assert (found[4:6, 2:] == 0).all()
    assert (found[[0, 1, 6]] == 0).all()


@pytest.mark.parametrize("n_users", [25, 90], ids=["fewer users than items", "more users than items"])
def test_cooccurrence_equals_the_dense_svd(write_log, n_users):
    rng = np.random.default_rng(0)
    histories = [(2 + rng.permutation(40)[: rng.integers(5, 20)]).tolist() for _ in range(n_users)]
    n = sum(map(len, histories))
    rating = rng.integers(1, 6, n).astype(np.int16)
    log = write_log(histories, 42, rating=rating)
    user, item = log.user - 2, log.item - 2
    seen, value = np.zeros((n_users, 40)), np.zeros((n_users, 40))
    seen[user, item] = 1
    value[user, item] = rating
    for axis in (0, 1):
        value = np.where(seen, value - value.sum(axis, keepdims=True) / seen.sum(axis, keepdims=True), 0)
    found = cooccurrence_vectors(log, 6)[2:]
    for part, matrix, power in ((found[:, :6], seen, 0.5), (found[:, 6:], value, 1.0)):
        _, s, vt = np.linalg.svd(matrix, full_matrices=False)
        np.testing.assert_allclose(cosines(part), cosines(vt[:6].T * s[:6] ** power), atol=1e-3)
    # More dimensions than the matrix has: all of it, and columns of zeros.
    whole = cooccurrence_vectors(log, 50)[2:]
    assert whole.shape == (40, 100)
    np.testing.assert_allclose(cosines(whole[:, 50:]), cosines(value.T), atol=1e-4)


def test_cooccurrence_reads_training_events_only(write_log):
    rng = np.random.default_rng(0)
    histories = [(2 + rng.permutation(30)[:20]).tolist() for _ in range(20)]
    time = np.tile(np.arange(20), 20)
    split = np.select([time < 3, time < 12, time < 16], [-1, 0, 1], 2).astype(np.int8)
    split[time == 17] = -1  # unused, but later than the last training sample
    arrays = {"timestamp": time, "split": split, "rating": rng.integers(1, 6, 400).astype(np.int16)}
    before = cooccurrence_vectors(write_log(histories, 32, **arrays), 5)

    changed = [history[:12] + (2 + rng.permutation(30)[:8]).tolist() for history in histories]
    other = np.where(time < 12, arrays["rating"], 6 - arrays["rating"])
    after = cooccurrence_vectors(write_log(changed, 32, **{**arrays, "rating": other}), 5)
    assert (before == after).all()

    for first, last in ((0, 1), (5, 6)):  # an unused row and a training row of the training period are read
        changed = [[31 if first <= t < last else i for t, i in enumerate(history)] for history in histories]
        assert np.abs(before - cooccurrence_vectors(write_log(changed, 32, **arrays), 5)).max() > 0.01


def test_cooccurrence_is_deterministic_and_uses_labels_where_nothing_is_rated(write_log):
    rng = np.random.default_rng(0)
    histories = [(2 + rng.permutation(30)[:12]).tolist() for _ in range(30)]
    label = rng.integers(0, 2, 360).astype(np.int8)
    unrated = write_log(histories, 32, label=label, rating=np.zeros(360, np.int16))
    rated = write_log(histories, 32, rating=np.where(label, 4, 2).astype(np.int16))
    first = cooccurrence_vectors(unrated, 4, seed=1)
    assert (first == cooccurrence_vectors(unrated, 4, seed=1)).all()
    np.testing.assert_allclose(cosines(first), cosines(cooccurrence_vectors(unrated, 4, seed=2)), atol=1e-3)
    # Residuals of ratings 2, 4 are twice those of labels 0, 1: the same directions.
    np.testing.assert_allclose(
        cosines(first[:, 4:]), cosines(cooccurrence_vectors(rated, 4)[:, 4:]), atol=1e-3
    )


def test_codes_of_labels_are_no_ratings(write_log):
    """A log that marks labels in histories has the vectors of one that does not, with ratings and without."""
    rng = np.random.default_rng(0)
    histories = [(2 + rng.permutation(30)[:12]).tolist() for _ in range(30)]
    label = rng.integers(0, 2, 360).astype(np.int8)
    rated = np.where(rng.random(360) < 0.5, rng.integers(1, 4, 360), 0).astype(np.int16)
    for levels, rating in ((["1", "2", "3"], rated), ([], np.zeros(360, np.int16))):
        plain = write_log(histories, 32, label=label, rating=rating)
        codes = np.where(rating > 0, rating, len(levels) + 1 + label).astype(np.int16)
        marked = write_log(histories, 32, label=label, rating=codes)
        marked.meta |= {"rating_levels": levels, "shows_labels": True}
        assert (cooccurrence_vectors(marked, 4) == cooccurrence_vectors(plain, 4)).all()


def test_a_repeated_event_counts_once(write_log):
    histories = [[2, 3], [2, 4], [3, 4, 5], [5, 2]]
    once = cooccurrence_vectors(write_log(histories, 6), 2)[:, :2]
    repeated = cooccurrence_vectors(write_log([[2, 3, 2, 2, 2], *histories[1:]], 6), 2)[:, :2]
    np.testing.assert_allclose(cosines(once), cosines(repeated), atol=1e-4)


def test_no_training_events(write_log):
    log = write_log([[2, 3]], 5, split=np.full(2, -1, np.int8))
    assert cooccurrence_vectors(log, 3).tolist() == np.zeros((5, 6)).tolist()


def test_joined_vectors_by_hand():
    lm = np.array([[0, 0], [1, 0], [0, 1]], np.float32)
    cooccurrence = np.array([[0, 0], [1, 1], [0, 0]], np.float32)
    both = item_vectors("both", lm, cooccurrence, content_weight=0.5)
    # Item 1: (.5, 0, 1, 1) of length 1.5; item 2 has content only; item 0 nothing.
    np.testing.assert_allclose(both, [[0, 0, 0, 0], [1 / 3, 0, 2 / 3, 2 / 3], [0, 1, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(item_vectors("lm", lm), lm)
    np.testing.assert_allclose(item_vectors("cooccurrence", None, cooccurrence)[1], [0.5**0.5] * 2, rtol=1e-6)


def test_inner_product_keeps_proportions():
    lm = np.array([[0, 0], [3, 4], [0, 5], [0, 0]], np.float32)  # lengths 5, 5 and two without text
    met = np.array([[0], [6], [8], [0]], np.float32)
    # Root mean square lengths of the rows that are not zero: 5, and sqrt((36 + 64) / 2) = sqrt(50).
    parts = scale(lm, "inner"), scale(met, "inner")
    np.testing.assert_allclose(parts[0], lm / 5, rtol=1e-6)
    np.testing.assert_allclose(parts[1], met / np.sqrt(50), rtol=1e-6)
    found = item_vectors("both", *parts, content_weight=0.5, metric="inner")
    # Squared lengths: .25 + 36 / 50 = .97 and .25 + 64 / 50 = 1.53; the longest becomes 1.
    np.testing.assert_allclose((found**2).sum(1), [0, 0.97 / 1.53, 1, 0], rtol=1e-5)
    np.testing.assert_allclose(found[1] @ found[2], (0.25 * 4 / 5 + 48 / 50) / 1.53, rtol=1e-5)
    assert (item_vectors("lm", np.zeros((3, 2), np.float32), metric="inner") == 0).all()


def test_vectors_of_an_event_log_keep_their_lengths_for_the_inner_product(write_log):
    log = write_log([[2, 3, 4], [2, 3], [2, 5], [2, 4]], 6)
    cosine, inner = (cooccurrence_vectors(log, 2, metric=metric) for metric in ("cosine", "inner"))
    np.testing.assert_allclose(normalize(inner[:, :2]), cosine[:, :2], atol=1e-5)
    length = np.linalg.norm(inner[:, :2], axis=1)
    assert length[2] == length.max()  # met by all four users
    np.testing.assert_allclose((length[2:] ** 2).mean(), 1, rtol=1e-5)


def test_errors_name_what_was_given():
    vectors = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match="vectors=llm is not usable; wanted one of lm, cooccurrence, both"):
        RetrievalConfig(vectors="llm")
    with pytest.raises(ValueError, match=r"retrieval\.k=0"):
        RetrievalConfig(k=0)
    with pytest.raises(ValueError, match=r"content_weight=0 is not usable"):
        RetrievalConfig(content_weight=0)
    with pytest.raises(ValueError, match="got no cooccurrence vectors"):
        item_vectors("both", vectors)
    with pytest.raises(ValueError, match="lm vectors of 3 items, co-occurrence of 2"):
        item_vectors("both", vectors, vectors[:2])


def test_cooccurrence_without_a_fold_knows_nothing_of_its_users(write_log):
    rng = np.random.default_rng(3)
    histories = [(2 + rng.permutation(30)[:12]).tolist() for _ in range(40)]
    rating = rng.integers(1, 6, 480).astype(np.int16)
    log = write_log(histories, 32, rating=rating)
    fold = user_folds(log.n_users, 4, seed=1)
    assert np.bincount(fold).tolist() == [11, 11, 10, 10]
    mine = fold[log.user] == 2
    # Other ratings and other items of fold 2: its own vectors stand, those of another fold move.
    other, items = np.where(mine, 6 - rating, rating), [list(h) for h in histories]
    for user in np.flatnonzero(fold == 2):
        if user >= 2:
            items[user - 2] = items[user - 2][::-1][:6] + items[user - 2][:6]
    changed = write_log(items, 32, rating=other.astype(np.int16))
    kept = [cooccurrence_vectors(x, 5, without=fold == 2) for x in (log, changed)]
    moved = [cooccurrence_vectors(x, 5, without=fold == 1) for x in (log, changed)]
    assert (kept[0] == kept[1]).all()
    assert np.abs(moved[0] - moved[1]).max() > 0.01


@pytest.mark.parametrize("kind", ["lm", "cooccurrence", "both"])
@pytest.mark.parametrize("folds", [1, 3])
def test_vectors_of_all_folds_are_those_of_each(write_log, kind, folds):
    rng = np.random.default_rng(0)
    log = write_log([list(2 + rng.permutation(20)[:8]) for _ in range(30)], 22)
    config = RetrievalConfig(vectors=kind, svd_dim=4)
    fold = user_folds(log.n_users, folds)
    text = None if kind == "cooccurrence" else normalize(rng.normal(size=(22, 3)).astype(np.float32))
    done = []
    found = vectors_of_folds(log, config, fold, text, done.append)
    parts = []
    for number in range(folds):
        without = fold == number if folds > 1 else None
        met = None if kind == "lm" else cooccurrence_vectors(log, 4, config.seed, without, config.metric)
        parts.append(item_vectors(kind, text, met, config.content_weight, config.metric))
    np.testing.assert_allclose(found, np.stack(parts), rtol=1e-5, atol=1e-6)  # threads may move a last bit
    assert found.dtype == np.float32
    assert done == [*range(1, folds + 1)]


def test_vectors_of_all_folds_stand_in_memory_once(monkeypatch):
    def drawn(log, svd_dim, seed, without, metric):
        left = int(np.flatnonzero(without)[0])
        return np.random.default_rng(left).normal(size=(4000, 2 * svd_dim)).astype(np.float32)

    monkeypatch.setattr("recllm.retrieval.vectors.cooccurrence_vectors", drawn)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # one part in the making
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    config = RetrievalConfig(vectors="cooccurrence", svd_dim=32)
    tracemalloc.start()
    found = vectors_of_folds(None, config, np.arange(16), None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.shape == (16, 4000, 64)  # 16 MB; a part and what it is made of take four of one
    assert peak < 1.5 * found.nbytes


def test_the_log_says_how_many_groups_of_users_there_are():
    assert [RetrievalConfig().num_folds(events) for events in (800_000, 10_000_000, 10_000_001)] == [5, 5, 2]
    assert RetrievalConfig(folds=3).num_folds(20_000_000) == 3
    assert RetrievalConfig(vectors="lm", folds=3).num_folds(1_000) == 1
    with pytest.raises(ValueError, match=r"retrieval\.folds=-1"):
        RetrievalConfig(folds=-1)
