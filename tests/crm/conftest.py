"""Fixtures of the CRMs' tests: a small model, a random batch, the AUC after a short training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recllm.crm import Model, build
from tests.crm.contract import FIELDS, TEXTS, config, random_batch, train_and_score


@pytest.fixture
def make_model() -> Callable[..., Model]:
    """`make_model("sim-soft", dropout=0.0)` -> the model, from seed 0, with `TEXTS` where it reads texts."""

    def make(variant: str, **settings: object) -> Model:
        torch.manual_seed(0)
        model = build(FIELDS, config(variant, **settings))
        if model.config.text_dim:
            model.set_texts(TEXTS, torch.ones(len(TEXTS), dtype=torch.bool))
        return model

    return make


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """`random_batch`."""
    return random_batch


@pytest.fixture
def reached() -> Callable[..., float]:
    """`train_and_score`."""
    return train_and_score
