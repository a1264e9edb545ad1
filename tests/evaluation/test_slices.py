"""Slices of rows by what training has seen of their user and item."""

import math

import numpy as np
import pytest

from recllm import metrics
from recllm.evaluation.slices import SLICES, Slices


class Log:
    """Three users and four items; the first five events are of the training period."""

    n_users = 5
    user = np.array([2, 2, 2, 3, 3, 2, 3, 4, 4])
    item = np.array([2, 2, 3, 2, 3, 4, 2, 3, 2])
    item_count = np.array([0, 0, 3, 2, 0])

    def train_events(self):
        return np.arange(9) < 5


def test_bands_by_hand():
    rows = np.array(
        [5, 6, 7, 8]
    )  # users 2, 3, 4, 4 with 3, 2, 0, 0 training events; items 4, 2, 3, 2: 0, 3, 2, 3
    slices = Slices.of(Log(), rows)
    assert list(slices.masks) == list(SLICES)
    found = {name: rows[mask].tolist() for name, mask in slices.masks.items()}
    assert found == {
        "users_unseen": [7, 8], "users_seen": [5, 6], "users_low": [6], "users_mid": [], "users_high": [5],
        "items_unseen": [5], "items_low": [7], "items_mid": [6, 8], "items_high": [],
    }  # fmt: skip
    assert slices.upto == {"users_low": 2, "users_mid": 2, "items_low": 2, "items_mid": 3}


def test_seen_rows_are_cut_into_disjoint_thirds(demo_log):
    rows = demo_log.rows("test", "all")
    slices = Slices.of(demo_log, rows)
    for name in ("users", "items"):
        parts = [slices.masks[f"{name}_{part}"] for part in ("unseen", "low", "mid", "high")]
        assert (np.sum(parts, axis=0) == 1).all()
    events = np.bincount(demo_log.item[demo_log.train_events()], minlength=demo_log.n_items)
    counts = events[demo_log.item[rows]]
    low, high = slices.masks["items_low"], slices.masks["items_high"]
    assert counts[low].max() == slices.upto["items_low"] < counts[high].min()
    assert 0.2 < low.sum() / (counts > 0).sum() < 0.5
    assert (counts[slices.masks["items_unseen"]] == 0).all()


def test_metrics_are_those_of_the_rows_in_the_band(demo_log):
    rows = demo_log.rows("test", "all")
    slices, labels = Slices.of(demo_log, rows), demo_log.label[rows]
    logits = np.random.default_rng(0).normal(size=len(rows))
    figures = slices.metrics(logits, labels)
    mask = slices.masks["users_mid"]
    assert figures["auc/users_mid"] == metrics.auc(logits[mask], labels[mask])
    assert figures["logloss/users_mid"] == metrics.log_loss(logits[mask], labels[mask])
    assert figures["rows/users_mid"] == mask.sum() > 0
    seen, unseen = figures["rows/users_seen"], figures["rows/users_unseen"]
    assert seen + unseen == len(rows)


def test_an_empty_band_has_no_auc():
    figures = Slices.of(Log(), np.array([5])).metrics(np.array([0.3]), np.array([1]))
    assert figures["rows/users_unseen"] == 0
    assert math.isnan(figures["auc/users_unseen"])
    assert figures["logloss/users_seen"] == pytest.approx(math.log1p(math.exp(-0.3)))
