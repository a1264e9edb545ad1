"""Finished stages with a system of every kind."""

import pytest

from tests.systems.finished_demo import FinishedDemo


@pytest.fixture(scope="session")
def finished_demo(tmp_path_factory, demo_log, demo_config, tiny_lm):
    """Finished stages; nobody writes into them."""
    root = tmp_path_factory.mktemp("finished") / "artifacts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLLM_ARTIFACTS", str(root))
        return FinishedDemo(root / "demo", demo_log, demo_config, tiny_lm)
