"""Finished stages with a system of every kind, and evaluations of them."""

import pytest

from tests.systems.finished_demo import FinishedDemo


@pytest.fixture(scope="session")
def finished_demo(tmp_path_factory, demo_log, demo_config, tiny_lm):
    """Finished stages; nobody writes into them."""
    root = tmp_path_factory.mktemp("finished") / "artifacts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLLM_ARTIFACTS", str(root))
        return FinishedDemo(root / "demo", demo_log, demo_config, tiny_lm)


@pytest.fixture
def new_run(finished_demo, tmp_path, monkeypatch):
    """`new_run()` -> an evaluation at work with an empty cache; the one before is done."""
    count = 0

    def make(**measured):
        nonlocal count
        count += 1
        monkeypatch.setenv("RECLLM_CACHE", str(tmp_path / f"cache-{count}"))
        return finished_demo.run(**measured)

    return make
