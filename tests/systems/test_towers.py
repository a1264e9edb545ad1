"""Two towers as a system."""

import pytest

from recllm.pipeline.stage_file import Group
from recllm.systems.towers import Towers
from tests.systems.contract import SystemContract


class TestTowers(SystemContract):
    @pytest.fixture
    def make(self, new_run, demo_log):
        def make():
            run = new_run()
            return Towers("ctr-bert", run.systems[Group.TOWERS]["ctr-bert"], run, demo_log)

        return make

    def test_its_labels_are_those_of_its_encoder(self, system):
        assert system.labels_read() == {"answers_as_text": 0.0, "ratings_as_text": 700.0}
        assert system.cost() == {"tuning_rows": 300.0, "tuning_seconds": 1.5}
        assert system.lm == "tiny"
