"""What holds of every CRM, as a class of tests that the tests of each one inherit."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from recllm import crm
from recllm.crm import CrmConfig, Fields, Model
from recllm.crm.table import Table
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
    "din-lm": {"text_dim": 6},
    "sim": {},
    "sim-lm": {"text_dim": 6},
    "sim-hard": {"retrieval": "hard"},
    "sim-soft": {"retrieval": "soft", "soft_k": 3, "soft_recent": 2},
    "retriever": {"hidden": 16},
    "retriever-hstu": {"hidden": 16, "block": "hstu"},
    "retriever-text": {"hidden": 16, "text_dim": 6},
}
"""Every CRM and its settings, small; the name before the hyphen is the CRM's (`stage1.crm.name`)."""

TEXTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(5))
"""Vectors of the items' texts, of variants that read some."""
TEXTS[:2] = 0.0

RECENT = ["recent_item", "recent_rating", "recent_interval"]
COLUMNS = [*RECENT, "recent_elapsed", "recent_dense"]
RETRIEVED = ["retrieved_item", "retrieved_rating", "retrieved_interval", "retrieved_rank"]

SIZE = 6_000
"""Samples of planted data; the last quarter of them tests."""
LENGTH = 6
"""Events of a history in planted data."""
TESTED = SIZE // 4
ERROR = ((TESTED + 1) / (12 * (TESTED / 2) ** 2)) ** 0.5
"""Standard error of the AUC of a score that knows nothing, at about as many positives as negatives."""


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
    batch["recent_elapsed"] = draw(100_000, size, recent).sort(1, descending=True).values
    batch["dense"] = batch["item"][:, 0]
    batch["recent_dense"] = batch["recent_item"][..., 0]
    batch["retrieved_dense"] = batch["retrieved_item"][..., 0]
    real = draw(recent + 1, size, 1)
    real[0] = recent
    batch["recent_mask"] = torch.arange(recent) >= recent - real
    batch["retrieved_mask"] = torch.rand(size, retrieved, generator=generator) < 0.7
    return batch


def noise() -> dict[str, Tensor]:
    """Samples in which nothing is planted.

    All have the same six categories in their history, each once, and everything else of an event is constant.
    """
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(SIZE, dtype=torch.int64)
    category = torch.rand(SIZE, LENGTH, generator=generator).argsort(1) + 2
    user = torch.stack([ones, torch.randint(2, 4, (SIZE,), generator=generator)], 1)
    target = torch.randint(0, LENGTH, (SIZE, 1), generator=generator)
    data = {
        "user": user,
        "item": torch.stack([ones, ones, category.gather(1, target)[:, 0]], 1),
        "label": torch.randint(0, 2, (SIZE,), generator=generator).float(),
    }
    for kind in ("recent", "retrieved"):
        same = torch.ones_like(category)
        data[f"{kind}_item"] = torch.stack([same, same, category], 2)
        data[f"{kind}_rating"] = same
        data[f"{kind}_interval"] = same
        data[f"{kind}_mask"] = torch.ones_like(category, dtype=torch.bool)
    return {**data, "retrieved_rank": torch.ones_like(category)}


def rated(kind: str) -> dict[str, Tensor]:
    """Liked if the event with the target's category was rated 5, not 1, in the history of that kind."""
    data = noise()
    generator = torch.Generator().manual_seed(2)
    rating = torch.where(torch.rand(SIZE, LENGTH, generator=generator) < 0.5, 1, 5)
    data[f"{kind}_rating"] = rating
    mine = data[f"{kind}_item"][..., 2] == data["item"][:, 2:]
    return {**data, "label": (rating[mine] == 5).float()}


def padded() -> dict[str, Tensor]:
    """Liked if the rating in a padded slot is 5, not 1; other ratings are 1 or 5 by coin."""
    data = rated("recent")
    data["recent_mask"][:, 0] = False
    return {**data, "label": (data["recent_rating"][:, 0] == 5).float()}


def counted() -> dict[str, Tensor]:
    """Liked if the share of likes of the target's item so far is high: one of six statistics."""
    data = noise()
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(1, LEVELS, (SIZE, len(STATISTICS)), generator=generator)
    liked_share = codes[:, STATISTICS.index("item_likes")]
    return {**data, "statistics": codes, "label": (liked_share > LEVELS // 2).float()}


def train_and_score(model: Model, data: dict[str, Tensor], passes: int = 4) -> float:
    """The AUC on the last quarter of the samples after training on the others."""
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
    logit = logit.mul(1e3).round()
    label = label[count:]
    liked = logit[label == 1][:, None]
    other = logit[label == 0][None]
    return ((liked > other).float() + 0.5 * (liked == other)).mean().item()


def cells(batch: dict[str, Tensor], key: str, real: bool) -> Tensor:
    """Which cells of `batch[key]` are events (or padding)."""
    mask = batch[key.partition("_")[0] + "_mask"] == real
    return mask[..., None].expand_as(batch[key]) if key.endswith("item") else mask


def altered(batch: dict[str, Tensor], key: str, real: bool) -> dict[str, Tensor]:
    """The batch with other values in the events (or the padding) of `key`."""
    # Ranks 1 to 4 fall into buckets below that of rank 8.
    other = torch.full_like(batch[key], 8) if key.endswith("rank") else torch.where(batch[key] == 3, 4, 3)
    return {**batch, key: torch.where(cells(batch, key, real), other, batch[key])}


def reordered(batch: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """The batch with the recent events in another order, `order` [B, T]."""
    new = dict(batch)
    for key in [*COLUMNS, "recent_mask"]:
        index = order[..., None].expand_as(batch[key]) if key.endswith("item") else order
        new[key] = batch[key].gather(1, index)
    return new


class ModelContract:
    """What must hold of any conventional recommendation model; the tests of each one inherit it.

    A new CRM `mine` is a subclass of `recllm.crm.layers.Model` in `recllm/crm/mine.py`, named in `NAMES`
    (`recllm/crm/config.py`) and in `recllm/crm/models.py`, where `build` finds it. It

    - takes `Fields` and a `CrmConfig`, and draws its weights from torch's global generator;
    - returns of a batch (`recllm.crm.inputs.CrmInputs.expand`) a logit [B] and a representation
      [B, config.mlp[-1]]; `Tower` does both;
    - reads events by way of `Embeddings.events` or `Embeddings.parts`, which zero what is padding, and does
      not ask where in the list the padding stands (`aligned` moves it);
    - has no parameter that no gradient reaches, and none that it needs beside the state dict to be loaded;
    - reads what it is asked for only: retrieved events, statistics.

    Its tests are in `tests/crm/test_mine.py`: its formula against literal loops, what it can learn and what
    it cannot (`test_patterns.py` has planted data), and, with a line in `VARIANTS`, this contract:

        class TestMine(CrmContract):
            variant = "mine"

    Attributes:
        variant: a key of `VARIANTS`.
        reads: columns of a recent event that the logit depends on.
        reads_retrieved: whether the model reads the events that were retrieved before it sees a batch.
    """

    variant: str
    reads: Sequence[str] = RECENT
    reads_retrieved = False

    def test_it_returns_a_logit_and_a_representation(self, make_model, make_batch):
        logit, representation = make_model(self.variant)(make_batch(7, 6))
        assert logit.shape == (7,)
        assert representation.shape == (7, 16)

    @pytest.mark.parametrize("training", [False, True])
    def test_what_stands_in_padding_changes_nothing(self, training, make_model, make_batch):
        model = make_model(self.variant).train(training)
        batch = make_batch(64, 6)
        changed = batch
        for key in [*COLUMNS, *RETRIEVED]:
            assert cells(batch, key, False).any()
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

    def test_it_does_not_matter_where_the_padding_stands(self, make_model, make_batch):
        """On the right instead of the left, and in between: the events keep their order."""
        model = make_model(self.variant).eval()
        batch = make_batch(64, 6)
        logit, _ = model(batch)
        right = reordered(batch, batch["recent_mask"].int().argsort(dim=1, descending=True, stable=True))
        assert right["recent_mask"][:, 0].all()
        assert not right["recent_mask"][:, -1].all()
        torch.testing.assert_close(model(right)[0], logit, rtol=1e-5, atol=1e-6)
        place = torch.rand(64, 6, generator=torch.Generator().manual_seed(3))
        place = torch.where(batch["recent_mask"], place.sort(1).values, place)
        between = reordered(batch, place.argsort(1))
        torch.testing.assert_close(model(between)[0], logit, rtol=1e-5, atol=1e-6)

    def test_more_padding_is_the_same_sample(self, make_model, make_batch):
        model = make_model(self.variant).eval()
        batch = make_batch(16, 6)
        longer = dict(batch)
        for name, value in batch.items():
            if name.startswith("recent_"):
                longer[name] = torch.cat([torch.zeros_like(value[:, :3]), value], 1)
        torch.testing.assert_close(model(longer)[0], model(batch)[0], rtol=1e-5, atol=1e-6)

    def test_a_sample_does_not_depend_on_its_batch(self, make_model, make_batch):
        model = make_model(self.variant).eval()
        batch = make_batch(16, 6)
        for row in range(4):
            alone = {name: value[row : row + 1] for name, value in batch.items()}
            for one, all_rows in zip(model(alone), model(batch), strict=True):
                torch.testing.assert_close(one, all_rows[row : row + 1], rtol=1e-5, atol=1e-6)

    def test_in_eval_mode_nothing_is_drawn(self, make_model, make_batch):
        model = make_model(self.variant, dropout=0.5, embedding_dropout=0.5, mask_users=0.5, mask_items=0.5)
        batch = make_batch(16, 6)
        model.eval()
        state = torch.get_rng_state()
        for one, again in zip(model(batch), model(batch), strict=True):
            assert torch.equal(one, again)
        assert torch.equal(torch.get_rng_state(), state)

    def test_every_feature_of_an_event_changes_the_logit(self, make_model, make_batch):
        model = make_model(self.variant).eval()
        batch = make_batch(16, 6)
        for key in [*self.reads, *(RETRIEVED if self.reads_retrieved else [])]:
            has_events = cells(batch, key, True).flatten(1).any(1)
            changed = model(altered(batch, key, True))[0] != model(batch)[0]
            assert changed[has_events].all(), key

    @pytest.mark.parametrize("length", [1, 60])
    @pytest.mark.parametrize("full", ["none", "all", "one"])
    def test_empty_and_full_histories_are_finite(self, full, length, make_model, make_batch):
        model = make_model(self.variant)
        batch = make_batch(8, length)
        for kind in ("recent", "retrieved"):
            batch[f"{kind}_mask"] = torch.full_like(batch[f"{kind}_mask"], full == "all")
            batch[f"{kind}_mask"][-1] = full != "none"
        logit, representation = model(batch)
        (logit.sum() + representation.sum() + model.l2(batch)).backward()
        assert logit.isfinite().all()
        assert representation.isfinite().all()
        assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)

    def test_every_weight_gets_a_gradient(self, make_model, make_batch):
        """No table or layer is built in vain."""
        model = make_model(self.variant)
        batch = make_batch(64, 6)
        logit, _ = model(batch)
        (functional.binary_cross_entropy_with_logits(logit, batch["label"]) + model.l2(batch)).backward()
        idle = [
            name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()
        ]
        assert not idle

    def test_what_is_exported_and_loaded_is_the_same_model(
        self, make_model: Callable[..., Model], make_batch: Callable[..., dict[str, Tensor]], tmp_path: Path
    ) -> None:
        model = make_model(self.variant, l2=0.2)
        crm.export(model, tmp_path / "export", {"recent": 30})
        loaded = crm.load(tmp_path / "export")
        assert type(loaded) is type(model)
        assert not loaded.training
        assert loaded.config == model.config
        assert loaded.fields == model.fields
        before = model.state_dict()
        after = loaded.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        batch = make_batch(5, 6)
        for one, other in zip(model.eval()(batch), loaded(batch), strict=True):
            assert torch.equal(one, other)
        assert json.loads((tmp_path / "export/config.json").read_text())["extra"] == {"recent": 30}


class CrmContract(ModelContract):
    """What must hold besides of a model that is trained on labels: what it learns, and what it cannot."""

    def test_no_training_learns_what_stands_in_padding(self, make_model):
        score = train_and_score(make_model(self.variant), padded())
        assert abs(score - 0.5) < 3 * ERROR

    def test_events_without_a_rating_or_a_time_train_no_padding(self, make_model, make_batch):
        """Code 0 of an event that is there reads row 0, which stays zero, by lookup and by counting."""
        batch = make_batch(64, 6)
        for kind in ("recent", "retrieved"):
            batch[f"{kind}_rating"][::2] = 0
            batch[f"{kind}_interval"][:] = 0
        model = make_model(self.variant).train()
        logit, _ = model(batch)
        (functional.binary_cross_entropy_with_logits(logit, batch["label"]) + model.l2(batch)).backward()
        tables = [module for module in model.embeddings.modules() if isinstance(module, Table)]
        assert len(tables) > 3
        for table in tables:
            assert not table.weight[0].any()
            assert table.weight.grad is None or not table.weight.grad[0].any()

    def test_it_learns_of_what_was_retrieved_if_it_reads_that_and_only_then(self, make_model):
        score = train_and_score(make_model(self.variant), rated("retrieved"))
        assert score > 0.9 if self.reads_retrieved else abs(score - 0.5) < 3 * ERROR

    @pytest.mark.parametrize("statistics", [False, True])
    def test_it_learns_of_statistics_if_it_is_asked_to_read_them_and_only_then(self, statistics, make_model):
        score = train_and_score(make_model(self.variant, statistics=statistics), counted())
        assert score > 0.9 if statistics else abs(score - 0.5) < 3 * ERROR
