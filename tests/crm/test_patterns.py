"""Planted patterns: each model learns what it is for, and what it cannot express leaves it at AUC .5.

All samples have the same six categories in their history, each once, and everything else of an event is
constant: nothing but the planted thing tells.
"""

from __future__ import annotations

import pytest
import torch

from recllm.eventlog.statistics import LEVELS, STATISTICS

SIZE, LENGTH = 6_000, 6
TESTED = SIZE // 4
# Standard error of the AUC of a score that knows nothing, at about as many positives as negatives.
ERROR = ((TESTED + 1) / (12 * (TESTED / 2) ** 2)) ** 0.5
SETS = ["deepfm", "autoint", "dcnv2", "din", "sim"]
SEQUENCES = ["gru4rec", "caser", "sasrec"]


def noise():
    """Samples in which nothing is planted."""
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
        data[f"{kind}_rating"], data[f"{kind}_interval"] = same, same
        data[f"{kind}_mask"] = torch.ones_like(category, dtype=torch.bool)
    return {**data, "retrieved_rank": torch.ones_like(category)}


def order():
    """Liked if category 2 comes before category 3 in the history."""
    data = noise()
    place = data["recent_item"][..., 2].argsort(1)
    return {**data, "label": (place[:, 0] < place[:, 1]).float()}


def crossed():
    """Liked if the user's field is 2 and the target's category is even, or neither: no field tells alone."""
    data = noise()
    return {**data, "label": ((data["user"][:, 1] == 2) == (data["item"][:, 2] % 2 == 0)).float()}


def rated(kind):
    """Liked if the event with the target's category was rated 5, not 1, in the history of that kind."""
    data = noise()
    generator = torch.Generator().manual_seed(2)
    rating = torch.where(torch.rand(SIZE, LENGTH, generator=generator) < 0.5, 1, 5)
    data[f"{kind}_rating"] = rating
    mine = data[f"{kind}_item"][..., 2] == data["item"][:, 2:]
    return {**data, "label": (rating[mine] == 5).float()}


def hidden():
    """Liked if the rating in a padded slot is 5, not 1; other ratings are 1 or 5 by coin."""
    data = rated("recent")
    data["recent_mask"][:, 0] = False
    return {**data, "label": (data["recent_rating"][:, 0] == 5).float()}


@pytest.mark.parametrize("variant", SEQUENCES)
def test_sequential_models_learn_the_order_of_events(variant, make_model, reached):
    assert reached(make_model(variant), order()) > 0.9


@pytest.mark.parametrize("variant", ["deepfm", "autoint", "dcnv2"])
def test_feature_interaction_models_learn_a_cross_of_fields(variant, make_model, reached):
    assert reached(make_model(variant), crossed()) > 0.9


@pytest.mark.parametrize("variant", ["din", "sim"])
def test_target_attention_learns_the_rating_of_what_resembles_the_target(variant, make_model, reached):
    assert reached(make_model(variant), rated("recent")) > 0.9


@pytest.mark.parametrize("variant", ["sim", "sim-hard"])
def test_sim_learns_from_what_was_retrieved(variant, make_model, reached):
    assert reached(make_model(variant), rated("retrieved")) > 0.9


def test_soft_sim_finds_the_event_that_the_latest_ones_do_not_hold(make_model, reached):
    """It attends to the latest event only, and to the one that its search finds among six."""
    data = rated("recent")
    assert reached(make_model("sim-soft", soft_k=2, soft_recent=1), data, passes=8) > 0.9


@pytest.mark.parametrize("variant", SETS)
def test_models_of_sets_cannot_know_the_order_of_events(variant, make_model, reached):
    """The intervals, which would tell it, are constant here."""
    assert abs(reached(make_model(variant), order()) - 0.5) < 3 * ERROR


@pytest.mark.parametrize("variant", [*SETS, *SEQUENCES, "sim-soft"])
def test_no_model_can_know_what_stands_in_padding(variant, make_model, reached):
    assert abs(reached(make_model(variant), hidden()) - 0.5) < 3 * ERROR


@pytest.mark.parametrize("variant", ["deepfm", "din", *SEQUENCES])
def test_models_that_retrieve_nothing_cannot_know_what_was_retrieved(variant, make_model, reached):
    assert abs(reached(make_model(variant), rated("retrieved")) - 0.5) < 3 * ERROR


def known():
    """Liked if the share of likes of the target's item so far is high: one of six statistics."""
    data = noise()
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(1, LEVELS, (SIZE, len(STATISTICS)), generator=generator)
    share = codes[:, STATISTICS.index("item_likes")]
    return {**data, "statistics": codes, "label": (share > LEVELS // 2).float()}


@pytest.mark.parametrize("statistics", [False, True])
def test_every_model_reads_statistics_where_it_is_asked_to(variant, statistics, make_model, reached):
    score = reached(make_model(variant, statistics=statistics), known())
    assert score > 0.9 if statistics else abs(score - 0.5) < 3 * ERROR
