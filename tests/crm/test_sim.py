"""SIM: reads both histories, ignores their padding, refuses batches that were not retrieved for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recllm.crm import SIM, CrmConfig, Fields, build

FIELDS = Fields(user_sizes=(50, 4), item_sizes=(40, 40, 8), rating_levels=5, category=2)
SMALL = CrmConfig(name="sim", embedding_dim=8, mlp=[32, 16], attention_mlp=[16], embedding_std=0.1)


def random_batch(size: int, recent: int, retrieved: int) -> dict[str, Tensor]:
    batch = {
        "user": torch.stack([torch.randint(1, high, (size,)) for high in FIELDS.user_sizes], 1),
        "item": torch.stack([torch.randint(1, high, (size,)) for high in FIELDS.item_sizes], 1),
    }
    for kind, length in (("recent", recent), ("retrieved", retrieved)):
        columns = [torch.randint(1, high, (size, length)) for high in FIELDS.item_sizes]
        batch[f"{kind}_item"] = torch.stack(columns, 2)
        batch[f"{kind}_rating"] = torch.randint(1, 6, (size, length))
        batch[f"{kind}_interval"] = torch.randint(1, 32, (size, length))
        batch[f"{kind}_mask"] = torch.rand(size, length) < 0.7
    batch["retrieved_rank"] = torch.rand(size, retrieved).argsort(1) + 1
    return batch


def test_shapes() -> None:
    model = build(FIELDS, SMALL)
    assert isinstance(model, SIM)
    logit, representation = model(random_batch(7, 6, 4))
    assert logit.shape == (7,)
    assert representation.shape == (7, 16)


@pytest.mark.parametrize(
    ("kind", "what"),
    [(kind, what) for kind in ("recent", "retrieved") for what in ("item", "rating", "interval")]
    + [("retrieved", "rank")],
)
def test_padding_is_inert_and_events_are_not(kind: str, what: str) -> None:
    torch.manual_seed(0)
    model = build(FIELDS, SMALL).eval()
    batch = random_batch(32, 6, 4)
    key, mask = f"{kind}_{what}", batch[f"{kind}_mask"]
    # Ranks 1 to 4 fall into the buckets below that of rank 8.
    other = torch.full_like(batch[key], 8) if what == "rank" else torch.where(batch[key] == 3, 4, 3)
    where = mask[..., None] if what == "item" else mask
    logit, representation = model(batch)
    in_padding = model({**batch, key: torch.where(where, batch[key], other)})
    assert torch.equal(logit, in_padding[0])
    assert torch.equal(representation, in_padding[1])
    in_events = model({**batch, key: torch.where(where, other, batch[key])})
    has_events = mask.any(1)
    assert (logit != in_events[0])[has_events].all()


def test_the_two_histories_have_attention_of_their_own() -> None:
    torch.manual_seed(0)
    model = build(FIELDS, SMALL).eval()
    batch = random_batch(16, 5, 5)
    swapped = dict(batch)
    for what in ("item", "rating", "interval", "mask"):
        swapped[f"recent_{what}"], swapped[f"retrieved_{what}"] = (
            batch[f"retrieved_{what}"],
            batch[f"recent_{what}"],
        )
    assert not torch.equal(model(batch)[0], model(swapped)[0])


@pytest.mark.parametrize("kind", ["recent", "retrieved"])
def test_an_empty_history_is_finite(kind: str) -> None:
    torch.manual_seed(0)
    model = build(FIELDS, SMALL).eval()
    batch = random_batch(16, 5, 5)
    batch[f"{kind}_mask"] = torch.zeros(16, 5, dtype=torch.bool)
    logit, representation = model(batch)
    assert logit.isfinite().all()
    assert representation.isfinite().all()


def test_a_batch_without_retrieval_is_refused() -> None:
    model = build(FIELDS, SMALL)
    batch = {name: value for name, value in random_batch(4, 5, 5).items() if not name.startswith("retrieved")}
    with pytest.raises(ValueError, match="retrieved_item"):
        model(batch)
