"""What the CRMs' tests share: all models in a small size, random batches, a short training, an AUC."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from recllm.crm import CrmConfig, Fields, Model, build
from recllm.eventlog.statistics import LEVELS, STATISTICS

FIELDS = Fields(user_sizes=(50, 4), item_sizes=(40, 40, 8), rating_levels=5, category=2)
VARIANTS = {
    "deepfm": {},
    "autoint": {"hidden": 16},
    "dcnv2": {},
    "gru4rec": {"layers": 1},
    "caser": {"filters": 4, "vertical": 2},
    "sasrec": {},
    "din": {},
    "sim": {},
    "sim-hard": {"retrieval": "hard"},
    "sim-soft": {"retrieval": "soft", "soft_k": 3, "soft_recent": 2},
}
"""Every model, small; the name before the hyphen is the model's."""


def config(variant: str, **settings: object) -> CrmConfig:
    """The settings of a variant; `settings` win."""
    small = {
        "name": variant.partition("-")[0],
        "embedding_dim": 8,
        "event_dim": 4,
        "mlp": [32, 16],
        "attention_mlp": [16],
        "hidden": 12,
        "embedding_std": 0.1,
    }
    return CrmConfig(**{**small, **VARIANTS[variant], **settings})  # type: ignore[arg-type]


def random_batch(size: int, recent: int, retrieved: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Any ids, also in the padding; `recent` is padded on the left, `retrieved` anywhere; row 0 is full."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(1, high, shape, generator=generator)

    batch = {
        "user": torch.stack([draw(high, size) for high in FIELDS.user_sizes], 1),
        "item": torch.stack([draw(high, size) for high in FIELDS.item_sizes], 1),
        "label": draw(3, size).float() - 1,
        "retrieved_rank": torch.rand(size, retrieved, generator=generator).argsort(1) + 1,
        "statistics": draw(LEVELS, size, len(STATISTICS)),
    }
    for kind, length in (("recent", recent), ("retrieved", retrieved)):
        batch[f"{kind}_item"] = torch.stack([draw(high, size, length) for high in FIELDS.item_sizes], 2)
        batch[f"{kind}_rating"] = draw(6, size, length)
        batch[f"{kind}_interval"] = draw(32, size, length)
    real = draw(recent + 1, size, 1)
    real[0] = recent
    batch["recent_mask"] = torch.arange(recent) >= recent - real
    batch["retrieved_mask"] = torch.rand(size, retrieved, generator=generator) < 0.7
    return batch


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """Each model in turn."""
    return str(request.param)


@pytest.fixture
def make_model() -> Callable[..., Model]:
    """`make_model("sim-soft", dropout=0.0)` -> the model, from seed 0."""

    def make(variant: str, **settings: object) -> Model:
        torch.manual_seed(0)
        return build(FIELDS, config(variant, **settings))

    return make


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """`random_batch`."""
    return random_batch


@pytest.fixture
def reached() -> Callable[..., float]:
    """`reached(model, data)` -> AUC on the last quarter of the samples after training on the others."""

    def reach(model: Model, data: dict[str, Tensor], passes: int = 4) -> float:
        label = data["label"]
        count = len(label) * 3 // 4
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(passes):
            for rows in torch.randperm(count, generator=generator).split(250):
                batch = {name: value[rows] for name, value in data.items()}
                optimizer.zero_grad()
                logit, _ = model(batch)
                loss = functional.binary_cross_entropy_with_logits(logit, batch["label"])
                (loss + model.l2(batch)).backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            logit, _ = model({name: value[count:] for name, value in data.items()})
        # Rounded, so that the order of a sum is no score; ties count half.
        logit, label = logit.mul(1e3).round(), label[count:]
        liked, other = logit[label == 1][:, None], logit[label == 0][None]
        return ((liked > other).float() + 0.5 * (liked == other)).mean().item()

    return reach
