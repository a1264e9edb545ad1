"""CRMs as systems: what was trained for clicks answers both tasks, what was trained to rank ranks."""

from types import SimpleNamespace

import pytest

from recllm.config.stages import Stage1Config
from recllm.pipeline.stage_file import Group
from recllm.systems.crm import Crm, CrmSystem
from recllm.systems.system import Task
from tests.systems.contract import SystemContract


@pytest.fixture
def open_crm(new_run, demo_log):
    """`open_crm("din")` -> the CRM as a system; one that needs no nearest events."""

    def make(name):
        run = new_run()
        return CrmSystem(name, Crm.open(run.systems[Group.CRMS][name], demo_log, None, run.cache))

    return make


class TestClicks(SystemContract):
    @pytest.fixture
    def make(self, open_crm):
        return lambda: open_crm("din")


class TestRanker(SystemContract):
    @pytest.fixture
    def make(self, open_crm):
        return lambda: open_crm("ranker")

    def test_tables_tell_it_from_what_clicks_trained(self, system):
        assert (system.name, system.tasks) == ("crm-ranker", (Task.RANKING,))


def crm(**settings):
    config = SimpleNamespace(stage1=Stage1Config(**settings))
    return Crm(None, None, SimpleNamespace(config=config))


def test_the_out_of_fold_version_is_the_one_with_the_same_settings():
    gate = crm(recent=30)
    assert crm(recent=30, hold_out="0.1").is_held_out_version_of(gate)
    assert not gate.is_held_out_version_of(gate)
    assert not crm(recent=20, hold_out="0.1").is_held_out_version_of(gate)
    both = crm(recent=30, hold_out="0.1")  # where every CRM leaves rows out, none is another's version
    assert not crm(recent=30, hold_out="0.2").is_held_out_version_of(both)
