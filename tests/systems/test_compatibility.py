"""How a gate reads a CRM, and what a prompt shows."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from recllm.errors import StageError
from recllm.eventlog.ids import UNKNOWN
from recllm.eventlog.rowsets import aligned_rows, check_ranking_rows, drawn_lists
from recllm.systems.compatibility import check_same_prompts, retrieves, subsample
from recllm.systems.crm import Crm
from recllm.systems.lm import Lm

ITEMS = 50


class Cache:
    """Stands for a CRM: the representation of (row, target) is (row, target)."""

    def get(self, rows, targets=None):
        targets = np.asarray(rows) % 7 + 2 if targets is None else targets
        return np.zeros(len(rows)), np.stack([rows, targets], 1).astype(np.float32)


def crm(gate_input="target", seed=0):
    return Crm(None, Cache(), None).read_as(gate_input, seed)


def test_what_reads_nothing_gets_nothing():
    assert crm(None) is None
    rows = np.array([9, 4])
    assert crm().representations(rows).tolist() == [[9, 4], [4, 6]]
    lists = np.array([[2, 4], [3, 7]], np.int32)
    assert crm().representations(rows, lists).tolist() == [[9, 3], [4, 5]]  # means of the targets


def test_the_user_alone_is_asked_for_with_an_unknown_item():
    rows, lists = np.array([9, 4]), np.array([[2, 4], [3, 7]], np.int32)
    for targets in (None, lists):
        assert crm("user").representations(rows, targets).tolist() == [[9, UNKNOWN], [4, UNKNOWN]]


def test_shuffled_gives_every_row_another_ones():
    rows = np.arange(100, 160)
    for targets in (None, np.full((60, 2), 3, np.int32)):
        found = crm("shuffled").representations(rows, targets)
        own = crm().representations(rows, targets)
        assert not (found == own).all(1).any()
        assert sorted(found.tolist()) == sorted(own.tolist())
        assert torch.equal(found, crm("shuffled").representations(rows, targets))
        assert not torch.equal(found, crm("shuffled", seed=1).representations(rows, targets))


def test_mixed_prompts_show_every_row_with_both_histories(tiny_lm, demo_log, demo_config):
    nearest = SimpleNamespace(nearest=lambda rows, k: np.tile(rows[:, None] - 1, (1, k)))
    lm = Lm(None, None, tiny_lm.prompts, demo_log, demo_config, nearest)
    rows = demo_log.rows("train", "uniform300")[:5]
    once, twice = lm.answers(rows, None, True), lm.answers(rows, crm(), True, mixed=True)
    assert (len(once), len(twice)) == (5, 10)
    assert (twice.rows == np.concatenate([rows, rows])).all()
    assert (twice.history[:5] == once.history).all()
    assert (twice.history[5:] == demo_log.recent(rows, demo_config.prompt.history)).all()
    assert torch.equal(twice.representation[:5], twice.representation[5:])
    assert torch.equal(twice.label, once.label.repeat(2))


@pytest.mark.parametrize("rows", ["uniform40", "last40", "0.5"])
def test_rows_of_stage_3_follow_outside_the_subsample(demo_log, demo_config, rows):
    tuned = subsample(dataclasses.replace(demo_config, subsample=rows), demo_log)
    count = int(demo_log.label[demo_log.rows("train", "all")].sum())
    aligned = aligned_rows(demo_log, tuned, count)
    assert len(aligned) == len(set(aligned.tolist())) == count
    assert (demo_log.label[aligned] == 1).all()
    inside = np.isin(aligned, tuned)
    assert (np.diff(inside.astype(int)) >= 0).all()  # the subsample's come last
    assert 0 < inside.sum() < count
    permutation = demo_log.rows("train", "1.0").tolist()
    for part in (aligned[~inside], aligned[inside]):
        assert (np.diff([permutation.index(row) for row in part]) > 0).all()


@pytest.fixture
def tuned(tmp_path):
    """A run whose parents are a system of stage 2 and what stage 3 made of it."""
    prompt, wording = {"history": 20, "retrieved": False}, {"question": "Any\ngood?"}
    of = {"stage2/tallrec": ("stage2", {}), "stage3/s-dpo": ("stage3", {"stage2": "stage2/tallrec"})}
    for folder, (stage, parents) in of.items():
        (tmp_path / folder).mkdir(parents=True)
        shown = prompt | ({"retrieved": True} if stage == "stage3" else {})
        content = {"stage": stage, "parents": parents, "config": {"prompt": shown, "wording": wording}}
        (tmp_path / folder / "config.yaml").write_text(yaml.safe_dump(content))
    return SimpleNamespace(
        root=tmp_path,
        parents={"stage2": "stage2/tallrec", "aligned:s-dpo": "stage3/s-dpo"},
        parent=lambda role: tmp_path / ("stage2/tallrec" if role == "stage2" else "stage3/s-dpo"),
        content={"config": {"prompt": prompt | {"retrieved": True}, "wording": dict(wording)}},
    )


def test_a_system_is_asked_with_the_prompts_that_it_was_tuned_on(tuned):
    for role in tuned.parents:
        check_same_prompts(tuned, role)  # retrieved or not is the system's own choice
    tuned.content["config"]["prompt"]["history"] = 10
    with pytest.raises(
        StageError, match=r"^stage2/tallrec was tuned with prompt.history=20, and .* with 10;"
    ):
        check_same_prompts(tuned, "stage2")
    tuned.content["config"]["prompt"]["history"] = 20
    tuned.content["config"]["wording"]["question"] = "Good?"
    with pytest.raises(StageError, match=r"wording\.question") as error:
        check_same_prompts(tuned, "aligned:s-dpo")
    assert "\n" not in str(error.value)


def test_what_is_aligned_is_asked_as_what_it_started_from(tuned):
    assert [retrieves(tuned, folder) for folder in tuned.parents.values()] == [False, False]


def test_lists_are_as_long_as_the_stored_ones(demo_log):
    rows = demo_log.rows("train", "uniform6")
    log = copy.copy(demo_log)
    log.meta = {**demo_log.meta, "candidates": 5}
    assert (demo_log.candidate_kinds, log.candidate_kinds) == (
        ("uniform20", "popular20"),
        ("uniform5", "popular5"),
    )
    lists = drawn_lists(log, rows, 0)
    assert lists.shape == (6, 5)
    assert ((lists == log.item[rows][:, None]).sum(1) == 1).all()


def test_a_log_whose_validation_rows_are_not_ranked_selects_nothing(demo_log):
    check_ranking_rows(demo_log)
    log = copy.copy(demo_log)
    log.ranking = lambda split, kind: (np.zeros(int(kind == "uniform20"), np.int64), None)
    with pytest.raises(StageError, match=r"wanted prepare\.ranking_valid_rows above 0"):
        check_ranking_rows(log)
