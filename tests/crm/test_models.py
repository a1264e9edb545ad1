"""What holds of every CRM: shapes, inert padding wherever it stands, extremes of history, gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

KEYS = ["recent_item", "recent_rating", "recent_interval"]
RETRIEVED = ["retrieved_item", "retrieved_rating", "retrieved_interval", "retrieved_rank"]


def events_where(batch, key, real):
    """Which cells of `batch[key]` are events (or padding)."""
    mask = batch[key.partition("_")[0] + "_mask"] == real
    return mask[..., None].expand_as(batch[key]) if key.endswith("item") else mask


def altered(batch, key, real):
    """The batch with other values in the events (or the padding) of `key`."""
    # Ranks 1 to 4 fall into buckets below that of rank 8.
    other = torch.full_like(batch[key], 8) if key.endswith("rank") else torch.where(batch[key] == 3, 4, 3)
    return {**batch, key: torch.where(events_where(batch, key, real), other, batch[key])}


def test_shapes(variant, make_model, make_batch):
    logit, representation = make_model(variant)(make_batch(7, 6))
    assert logit.shape == (7,)
    assert representation.shape == (7, 16)


@pytest.mark.parametrize("training", [False, True])
def test_what_stands_in_padding_changes_nothing(variant, training, make_model, make_batch):
    model = make_model(variant).train(training)
    batch = make_batch(64, 6)
    changed = batch
    for key in [*KEYS, *RETRIEVED]:
        assert events_where(batch, key, False).any()
        changed = altered(changed, key, False)
    results = []
    for one in (batch, changed):
        torch.manual_seed(1)  # dropout and masked ids alike
        model.zero_grad()
        logit, representation = model(one)
        (functional.binary_cross_entropy_with_logits(logit, one["label"]) + model.l2(one)).backward()
        grads = [value.grad.clone() for value in model.parameters() if value.grad is not None]
        results.append([logit, representation, *grads])
    assert len(results[0]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_every_feature_of_an_event_changes_the_logit(variant, make_model, make_batch):
    model = make_model(variant).eval()
    batch = make_batch(16, 6)
    reads = [*KEYS, *(RETRIEVED if variant in ("sim", "sim-hard") else [])]
    for key in reads:
        has_events = events_where(batch, key, True).flatten(1).any(1)
        changed = model(altered(batch, key, True))[0] != model(batch)[0]
        assert changed[has_events].all(), key


def moved(batch, order):
    """The batch with the recent events reordered, `order` [B, T]."""
    new = dict(batch)
    for key in [*KEYS, "recent_mask"]:
        index = order[..., None].expand_as(batch[key]) if key.endswith("item") else order
        new[key] = batch[key].gather(1, index)
    return new


def test_it_does_not_matter_where_the_padding_stands(variant, make_model, make_batch):
    """On the right instead of the left, and in between: the events keep their order."""
    model = make_model(variant).eval()
    batch = make_batch(64, 6)
    logit, _ = model(batch)
    right = moved(batch, batch["recent_mask"].int().argsort(dim=1, descending=True, stable=True))
    assert right["recent_mask"][:, 0].all()
    assert not right["recent_mask"][:, -1].all()
    torch.testing.assert_close(model(right)[0], logit, rtol=1e-5, atol=1e-6)
    place = torch.rand(64, 6, generator=torch.Generator().manual_seed(3))
    place = torch.where(batch["recent_mask"], place.sort(1).values, place)
    torch.testing.assert_close(model(moved(batch, place.argsort(1)))[0], logit, rtol=1e-5, atol=1e-6)


def test_more_padding_is_the_same_sample(variant, make_model, make_batch):
    model = make_model(variant).eval()
    batch = make_batch(16, 6)
    longer = {
        name: torch.cat([torch.zeros_like(value[:, :3]), value], 1) if name.startswith("recent_") else value
        for name, value in batch.items()
    }
    torch.testing.assert_close(model(longer)[0], model(batch)[0], rtol=1e-5, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch(variant, make_model, make_batch):
    model = make_model(variant).eval()
    batch = make_batch(16, 6)
    for row in range(4):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        torch.testing.assert_close(model(alone)[0], model(batch)[0][row : row + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 60])
@pytest.mark.parametrize("full", ["none", "all", "one"])
def test_empty_and_full_histories_are_finite(variant, full, length, make_model, make_batch):
    model = make_model(variant)
    batch = make_batch(8, length)
    for kind in ("recent", "retrieved"):
        batch[f"{kind}_mask"] = torch.full_like(batch[f"{kind}_mask"], full == "all")
        batch[f"{kind}_mask"][-1] = full != "none"
    logit, representation = model(batch)
    (logit.sum() + representation.sum() + model.l2(batch)).backward()
    assert logit.isfinite().all()
    assert representation.isfinite().all()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


def test_every_weight_gets_a_gradient(variant, make_model, make_batch):
    """No table or layer is built in vain."""
    model = make_model(variant)
    batch = make_batch(64, 6)
    logit, _ = model(batch)
    (functional.binary_cross_entropy_with_logits(logit, batch["label"]) + model.l2(batch)).backward()
    idle = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not idle
