"""Representations and their cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from recllm import crm
from recllm.cache import Cache
from recllm.crm import CrmConfig, Fields
from recllm.crm.features import FeatureCache, representations, score

FIELDS = Fields(user_sizes=(100,), item_sizes=(90, 5), rating_levels=5, category=1)


class ToyInputs:
    """Histories of row r are functions of r; counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, rows: NDArray[np.int64], targets: NDArray[np.int32] | None = None
    ) -> dict[str, Tensor]:
        self.calls += 1
        row = torch.from_numpy(rows)
        target = row % 88 + 2 if targets is None else torch.from_numpy(targets.astype(np.int64))
        past = row[:, None] + torch.arange(3)
        return {
            "user": row[:, None] % 100,
            "item": torch.stack([target, target % 5], 1),
            "recent_item": torch.stack([past % 90, past % 5], 2),
            "recent_rating": past % 6,
            "recent_interval": past % 32,
            "recent_mask": past % 4 > 0,
        }


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return crm.build(FIELDS, CrmConfig(embedding_dim=4, mlp=[8, 6], attention_mlp=[4], embedding_std=0.5))


def test_representations_are_the_models_in_eval_mode(model: torch.nn.Module) -> None:
    rows = np.arange(25)
    model.train()
    logits, vectors = representations(model, ToyInputs(), rows, batch_size=10)
    assert model.training  # put back
    assert logits.dtype == np.float32
    assert logits.shape == (25,)
    assert vectors.dtype == np.float32
    assert vectors.shape == (25, 6)
    model.eval()
    with torch.no_grad():
        logit, vector = model(ToyInputs()(rows))
    np.testing.assert_allclose(logits, logit.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vectors, vector.numpy(), rtol=1e-5, atol=1e-6)


def test_targets_are_aligned_with_rows(model: torch.nn.Module) -> None:
    rows, targets = np.array([4, 4, 9]), np.array([7, 8, 7], np.int32)
    logits, _ = representations(model, ToyInputs(), rows, targets)
    single = [
        representations(model, ToyInputs(), rows[i : i + 1], targets[i : i + 1])[0][0] for i in range(3)
    ]
    np.testing.assert_allclose(logits, single, rtol=1e-5, atol=1e-6)
    assert len(set(logits.tolist())) == 3
    with pytest.raises(ValueError, match="one target a row"):
        representations(model, ToyInputs(), rows, targets[:2])
    with pytest.raises(ValueError, match="rows of shape"):
        representations(model, ToyInputs(), rows[:, None])


def test_cache_equals_direct_and_computes_once(model: torch.nn.Module, tmp_path: Path) -> None:
    inputs, rows = ToyInputs(), np.arange(25)
    cache = FeatureCache(Cache(tmp_path / "features"), model, inputs, batch_size=10)
    vectors = cache.representations(rows)
    assert isinstance(vectors, np.memmap)
    assert inputs.calls == 3
    got = cache.logits(rows), vectors
    assert inputs.calls == 3  # the logits were kept with them
    direct = representations(model, ToyInputs(), rows, batch_size=10)
    for one, other in zip(got, direct, strict=True):
        assert not one.flags.writeable
        np.testing.assert_array_equal(one, other)
    again = FeatureCache(Cache(tmp_path / "features"), model, inputs, batch_size=10).representations(rows)
    assert inputs.calls == 3
    np.testing.assert_array_equal(again, direct[1])
    assert len(list((tmp_path / "features").iterdir())) == 2  # logits and representations, nothing else


def test_whoever_asks_for_logits_keeps_no_representations(model: torch.nn.Module, tmp_path: Path) -> None:
    inputs, rows = ToyInputs(), np.arange(25)
    cache = FeatureCache(Cache(tmp_path), model, inputs, batch_size=10)
    logits = cache.logits(rows)
    np.testing.assert_array_equal(logits, representations(model, ToyInputs(), rows, batch_size=10)[0])
    np.testing.assert_array_equal(logits, score(model, ToyInputs(), rows, batch_size=10))
    assert [path.name.rpartition("-")[0] for path in tmp_path.iterdir()] == ["crm-logits"]
    cache.logits(rows)
    assert inputs.calls == 3


def test_cache_tells_rows_targets_models_and_identities_apart(model: torch.nn.Module, tmp_path: Path) -> None:
    inputs, rows, items = ToyInputs(), np.arange(5), np.arange(3, 8, dtype=np.int32)
    cache = FeatureCache(Cache(tmp_path), model, inputs)
    sets: list[tuple[NDArray[np.int64], NDArray[np.int32] | None]] = [
        (rows, None),
        (rows[::-1], None),
        (rows, items),
        (rows, items + 1),
    ]
    for asked in sets:
        got = cache.logits(*asked)
        np.testing.assert_array_equal(got, representations(model, ToyInputs(), *asked)[0])
    assert len(list(tmp_path.iterdir())) == 4
    FeatureCache(Cache(tmp_path), model, inputs, identity="other neighbors").logits(rows)
    assert len(list(tmp_path.iterdir())) == 5
    with torch.no_grad():
        next(model.parameters())[7] += 1.0
    retrained = FeatureCache(Cache(tmp_path), model, inputs).logits(rows)
    np.testing.assert_array_equal(retrained, representations(model, ToyInputs(), rows)[0])
    assert len(list(tmp_path.iterdir())) == 6


def test_a_failure_leaves_nothing_behind(model: torch.nn.Module, tmp_path: Path) -> None:
    class Broken(ToyInputs):
        def __call__(
            self, rows: NDArray[np.int64], targets: NDArray[np.int32] | None = None
        ) -> dict[str, Tensor]:
            if self.calls:
                raise RuntimeError("killed")
            return super().__call__(rows, targets)

    with pytest.raises(RuntimeError, match="killed"):
        FeatureCache(Cache(tmp_path), model, Broken(), batch_size=10).representations(np.arange(25))
    assert list(tmp_path.iterdir()) == []


def test_no_rows_are_no_features(model: torch.nn.Module, tmp_path: Path) -> None:
    cache = FeatureCache(Cache(tmp_path), model, ToyInputs())
    assert cache.logits(np.arange(0)).shape == (0,)
    assert cache.representations(np.arange(0)).shape == (0, 6)
