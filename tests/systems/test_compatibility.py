"""How a gate reads a CRM, and what a prompt shows."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recllm.errors import StageError
from recllm.eventlog.ids import UNKNOWN
from recllm.eventlog.rowsets import aligned_rows, check_ranking_rows, drawn_lists
from recllm.pipeline.stage_file import Role
from recllm.pipeline.stages import STAGES
from recllm.systems.compatibility import check_same_prompts, retrieves
from recllm.systems.crm import Crm
from recllm.systems.lm import Lm

ITEMS = 50


class Cache:
    """Stands for a CRM: the representation of (row, target) is (row, target)."""

    def representations(self, rows, targets=None):
        targets = np.asarray(rows) % 7 + 2 if targets is None else targets
        return np.stack([rows, targets], 1).astype(np.float32)


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
def test_rows_of_stage_3_follow_outside_the_subsample(demo_log, rows):
    tuned = demo_log.rows("train", rows)
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
def tuned(demo_config):
    """A system of stage 2, and what stage 3 made of it, whose own prompts show nearest events."""
    prompt = dataclasses.replace(demo_config.prompt, history=20, retrieved=False)
    config = dataclasses.replace(demo_config, prompt=prompt)
    start = SimpleNamespace(
        name="stage2/tallrec", config=config, file=SimpleNamespace(stage="stage2", table=STAGES["stage2"])
    )
    aligned = SimpleNamespace(
        name="stage3/s-dpo",
        config=dataclasses.replace(config, prompt=dataclasses.replace(prompt, retrieved=True)),
        file=SimpleNamespace(stage="stage3", table=STAGES["stage3"]),
        parent=lambda role: {Role.START: start}[role],
    )
    return start, aligned


def test_a_system_is_asked_with_the_prompts_that_it_was_tuned_on(tuned):
    start, aligned = tuned
    for system in tuned:
        for retrieved in (False, True):  # the system's own choice
            prompt = dataclasses.replace(start.config.prompt, retrieved=retrieved)
            check_same_prompts(system, dataclasses.replace(start.config, prompt=prompt))
    other = dataclasses.replace(start.config.prompt, history=10)
    with pytest.raises(
        StageError, match=r"^stage2/tallrec was tuned with prompt.history=20, and .* with 10;"
    ):
        check_same_prompts(start, dataclasses.replace(start.config, prompt=other))
    wording = dataclasses.replace(start.config.wording, question="Any\ngood?")
    with pytest.raises(StageError, match=r"wording\.question") as error:
        check_same_prompts(aligned, dataclasses.replace(start.config, wording=wording))
    assert "\n" not in str(error.value)


def test_what_is_aligned_is_asked_as_what_it_started_from(tuned):
    assert [retrieves(system) for system in tuned] == [False, False]


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
