"""DIN: shapes, inert padding, extremes of history, and whether it learns what only target attention can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from recllm.crm import DIN, CrmConfig, Fields, build

FIELDS = Fields(user_sizes=(50, 4), item_sizes=(40, 40, 8), rating_levels=5, category=2)
SMALL = CrmConfig(name="din", embedding_dim=8, mlp=[32, 16], attention_mlp=[16], embedding_std=0.1)


def random_batch(size: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(1, high, shape, generator=generator)

    real = draw(length + 1, size, 1) if length else torch.zeros(size, 1)
    return {
        "user": torch.stack([draw(high, size) for high in FIELDS.user_sizes], 1),
        "item": torch.stack([draw(high, size) for high in FIELDS.item_sizes], 1),
        "recent_item": torch.stack([draw(high, size, length) for high in FIELDS.item_sizes], 2),
        "recent_rating": draw(6, size, length),
        "recent_interval": draw(32, size, length),
        "recent_mask": torch.arange(length)[None] >= length - real,  # padded on the left
    }


def test_shapes() -> None:
    model = build(FIELDS, SMALL)
    assert isinstance(model, DIN)
    logit, representation = model(random_batch(7, 6))
    assert logit.shape == (7,)
    assert representation.shape == (7, 16)


@pytest.mark.parametrize("key", ["recent_item", "recent_rating", "recent_interval"])
@pytest.mark.parametrize("training", [False, True])
def test_what_stands_in_padding_changes_nothing(key: str, training: bool) -> None:
    torch.manual_seed(0)
    model = build(FIELDS, SMALL).train(training)
    batch = random_batch(64, 6)
    padding = ~batch["recent_mask"]
    assert padding.any()
    altered = dict(batch)
    altered[key] = batch[key].clone()
    altered[key][padding] = 3
    assert not torch.equal(batch[key], altered[key])
    results = []
    for one in (batch, altered):
        torch.manual_seed(1)  # dropout and masking alike
        model.zero_grad()
        logit, representation = model(one)
        functional.binary_cross_entropy_with_logits(logit, torch.ones(64)).backward()
        grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        results.append([logit, representation, *grads])
    assert len(results[0]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("key", ["recent_item", "recent_rating", "recent_interval"])
def test_real_events_do_change_the_logit(key: str) -> None:
    torch.manual_seed(0)
    model = build(FIELDS, SMALL).eval()
    batch = random_batch(16, 6)
    altered = dict(batch)
    altered[key] = torch.where(batch[key] == 3, 4, 3)
    assert (model(batch)[0] != model(altered)[0]).all()


def test_more_padding_is_the_same_sample() -> None:
    torch.manual_seed(0)
    model = build(FIELDS, SMALL).eval()
    batch = random_batch(16, 6)
    longer = dict(batch)
    for name, value in batch.items():
        if name.startswith("recent_"):
            longer[name] = torch.cat([torch.zeros_like(value[:, :3]), value], 1)
    torch.testing.assert_close(model(longer)[0], model(batch)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_empty_and_full_histories_are_finite(full: bool) -> None:
    torch.manual_seed(0)
    model = build(FIELDS, SMALL)
    batch = random_batch(8, 60)
    batch["recent_mask"] = torch.full((8, 60), full)
    logit, representation = model(batch)
    (logit.sum() + model.l2(batch)).backward()
    assert logit.isfinite().all()
    assert representation.isfinite().all()
    assert all(
        parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None
    )


def test_learns_the_rating_that_the_target_had_in_the_history() -> None:
    """Label = the category of the target was rated high in the own history: needs target x event x rating."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    size, length, categories = 6_000, 6, 6
    # Each category once per history, in random order; ratings 1 or 5 by coin.
    category = torch.rand(size, categories, generator=generator).argsort(1)[:, :length] + 2
    rating = torch.where(torch.rand(size, length, generator=generator) < 0.5, 1, 5)
    slot = torch.randint(0, length, (size, 1), generator=generator)
    ones = torch.ones(size, dtype=torch.int64)
    target = category.gather(1, slot)[:, 0]
    data = {
        "user": torch.stack([ones, ones], 1),
        "item": torch.stack([ones, ones, target], 1),
        "recent_item": torch.stack([torch.ones_like(category), torch.ones_like(category), category], 2),
        "recent_rating": rating,
        "recent_interval": torch.ones_like(category),
        "recent_mask": torch.ones_like(category, dtype=torch.bool),
    }
    label = (rating.gather(1, slot)[:, 0] == 5).float()
    model = build(FIELDS, SMALL)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    test = slice(5_000, size)
    for _ in range(4):
        for rows in torch.randperm(5_000, generator=generator).split(250):
            optimizer.zero_grad()
            logit, _ = model({name: value[rows] for name, value in data.items()})
            functional.binary_cross_entropy_with_logits(logit, label[rows]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        logit, _ = model({name: value[test] for name, value in data.items()})
    liked, other = logit[label[test] == 1], logit[label[test] == 0]
    auc = (liked[:, None] > other[None]).float().mean().item()
    assert auc > 0.9
