"""The blend: known weights come back, and it beats its parts; the controls as systems."""

from __future__ import annotations

import numpy as np
import pytest

from recllm import metrics
from recllm.evaluation.stacking import Blend, Refit, apply_blend, logistic_blend
from recllm.pipeline.stage_file import Group
from recllm.systems.counting import Popularity
from recllm.systems.crm import Crm, CrmSystem
from tests.systems.contract import SystemContract


def test_blend_recovers_known_weights() -> None:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(60_000, 2)) * [1.0, 10.0] + [3.0, 0.0]
    true = np.array([1.5, -0.1, -4.0])
    labels = rng.random(60_000) < 1 / (1 + np.exp(-(x @ true[:2] + true[2])))
    weights = logistic_blend(x, labels)
    np.testing.assert_allclose(weights, true, rtol=0.06)
    # the gradient of the log loss vanishes there
    residual = 1 / (1 + np.exp(-apply_blend(x, weights))) - labels
    np.testing.assert_allclose(np.append(x.T @ residual, residual.sum()) / 60_000, 0, atol=1e-6)


def test_blend_is_no_worse_than_its_parts_and_survives_separable_labels() -> None:
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 2, 3000)
    parts = rng.normal(size=(3000, 2)) + labels[:, None]
    blended = apply_blend(parts, logistic_blend(parts, labels))
    for part in parts.T:
        assert metrics.log_loss(blended, labels) < metrics.log_loss(part, labels)
        assert metrics.auc(blended, labels) > metrics.auc(part, labels)
    separable = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    weights = logistic_blend(separable, [0, 0, 1, 1])
    assert np.isfinite(weights).all()
    assert metrics.auc(apply_blend(separable, weights), [0, 0, 1, 1]) == 1.0


@pytest.fixture
def open_din(new_run, demo_log):
    """`open_din()` -> a CRM."""

    def make():
        run = new_run()
        return Crm.open(run.systems[Group.CRMS]["din"], demo_log, None, run.cache)

    return make


class TestRefit(SystemContract):
    @pytest.fixture
    def make(self, open_din, demo_log):
        return lambda: Refit("refit", demo_log, open_din(), demo_log.rows("train", "uniform300"))

    def test_it_is_fitted_on_its_rows(self, system, demo_log):
        """Its log loss there is below that of a rate alone, which it could be."""
        labels = demo_log.label[system.rows]
        rate = np.full(len(labels), np.log(labels.mean() / (1 - labels.mean())))
        fitted = metrics.log_loss(system.ctr(system.rows), labels)
        assert fitted < metrics.log_loss(rate, labels)
        assert system.stands_at({"key": "stage2.adapter.r", "value": "4"})


class TestBlend(SystemContract):
    @pytest.fixture
    def make(self, open_din, demo_log):
        def make():
            parts = [Popularity(demo_log), CrmSystem("din", open_din())]
            return Blend("blend", demo_log, parts, demo_log.rows("valid", "uniform200"), "tiny")

        return make
