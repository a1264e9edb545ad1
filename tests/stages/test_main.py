"""What `python -m stages FOLDER` calls."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from stages.__main__ import work


@pytest.mark.parametrize(("stage", "wanted"), [("stage1", "trained"), ("tune", "searched")])
def test_a_study_searches_and_every_other_stage_works(monkeypatch, stage, wanted):
    """The same module trains a CRM and searches its settings: which, the stage says."""
    called = []
    module = ModuleType("stages.of_this_test")
    module.work = lambda run: called.append("trained")
    module.tune = lambda run: called.append("searched")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    work(SimpleNamespace(stage=stage, file=SimpleNamespace(module=module.__name__)))
    assert called == [wanted]
