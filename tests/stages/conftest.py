"""What tests of plans share: an empty folder of artifacts."""

from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The demo's artifacts, none yet; commands are run in the repository."""
    monkeypatch.setenv("RECLLM_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.chdir(Path(__file__).parents[2])
    return tmp_path / "artifacts" / "demo"
