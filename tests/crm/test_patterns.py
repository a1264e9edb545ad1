"""Planted patterns: each model learns what it is for, and what it cannot express leaves it at AUC .5.

All samples have the same six categories in their history, each once, and everything else of an event is
constant: nothing but the planted thing tells. What no model can know is in `contract.py`.
"""

from __future__ import annotations

import pytest

from tests.crm.contract import ERROR, noise, rated

SETS = ["deepfm", "autoint", "dcnv2", "din", "sim"]
SEQUENCES = ["gru4rec", "caser", "sasrec"]


def order():
    """Liked if category 2 comes before category 3 in the history."""
    data = noise()
    place = data["recent_item"][..., 2].argsort(1)
    return {**data, "label": (place[:, 0] < place[:, 1]).float()}


def crossed():
    """Liked if the user's field is 2 and the target's category is even, or neither: no field tells alone."""
    data = noise()
    return {**data, "label": ((data["user"][:, 1] == 2) == (data["item"][:, 2] % 2 == 0)).float()}


@pytest.mark.parametrize("variant", SEQUENCES)
def test_sequential_models_learn_the_order_of_events(variant, make_model, reached):
    assert reached(make_model(variant), order()) > 0.9


@pytest.mark.parametrize("variant", ["deepfm", "autoint", "dcnv2"])
def test_feature_interaction_models_learn_a_cross_of_fields(variant, make_model, reached):
    assert reached(make_model(variant), crossed()) > 0.9


@pytest.mark.parametrize("variant", ["din", "sim"])
def test_target_attention_learns_the_rating_of_what_resembles_the_target(variant, make_model, reached):
    assert reached(make_model(variant), rated("recent")) > 0.9


def test_soft_sim_finds_the_event_that_the_latest_ones_do_not_hold(make_model, reached):
    """It attends to the latest event only, and to the one that its search finds among six."""
    data = rated("recent")
    assert reached(make_model("sim-soft", soft_k=2, soft_recent=1), data, passes=8) > 0.9


@pytest.mark.parametrize("variant", SETS)
def test_models_of_sets_cannot_know_the_order_of_events(variant, make_model, reached):
    """The intervals, which would tell it, are constant here."""
    assert abs(reached(make_model(variant), order()) - 0.5) < 3 * ERROR
