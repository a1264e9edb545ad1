"""Fixtures of the CRMs' tests: a small model, a random batch, the AUC after a short training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recllm.crm import Model, build
from tests.crm.contract import FIELDS, config, random_batch, train_and_score


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
    """`train_and_score`."""
    return train_and_score
