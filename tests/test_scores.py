"""Scores on disk: computed once, found again, and the untuned LM's by every seed."""

from types import SimpleNamespace

import numpy as np
import pytest

from recllm import scores
from recllm.scores import Kept, LmSystems

ROWS, LISTS = np.arange(3), np.arange(6).reshape(3, 2)


def test_what_is_kept_is_not_computed_again(tmp_path, capsys):
    kept = Kept(tmp_path / "scores")
    calls = []

    def compute():
        calls.append(1)
        return np.arange(3, dtype=np.float32) + len(calls)

    assert kept.get("ctr-tuned:lora", ["a", 1], compute).tolist() == [1, 2, 3]
    assert kept.get("ctr-tuned:lora", ["a", 1], compute).tolist() == [1, 2, 3]
    assert kept.get("ctr-tuned:lora", ["a", 2], compute).tolist() == [2, 3, 4]
    assert len(calls) == 2
    assert capsys.readouterr().out.count("scored ctr-tuned:lora") == 2
    assert [path.name for path in (tmp_path / "scores").iterdir() if "tmp" in path.name] == []


def run_of(root, seed):
    """A run of one seed: its own folder and adapters, the LM of all."""
    own = root / f"evaluate+s{seed}"
    return SimpleNamespace(
        folder=own,
        parent=lambda role: root / ("lm" if role == "lm" else f"{role}+s{seed}".replace(":", "-")),
        manifest=lambda role: SimpleNamespace(identity=role if role == "lm" else f"{role}-{seed}"
                                              if role.startswith("tuned") else role),
        content={"config": {"prompt": {"history": 10}}},
    )  # fmt: skip


@pytest.fixture
def opened(monkeypatch):
    """What was opened and asked, in order; a system's scores tell their number."""
    asked = []

    def open_(self, role, adapter):
        asked.append((role, adapter))
        tasks = SimpleNamespace(answers=lambda *_: "answers", titles=lambda *_: "titles")
        return tasks, "model", None, True

    monkeypatch.setattr(LmSystems, "_load", open_)
    for name, shape in (("answer_scores", 3), ("title_choices", (3, 2, 2))):
        monkeypatch.setattr(scores, name, lambda *_, shape=shape: np.full(shape, len(asked), np.float32))
    return asked


def test_the_untuned_lm_is_scored_once_for_all_seeds(tmp_path, opened):
    for seed in (0, 1):
        lms = LmSystems(run_of(tmp_path, seed), None, None, {})
        assert lms.logits("lm", "adapter", ROWS, 8).tolist() == [1, 1, 1]
        assert (lms.titles("lm", "adapter", "uniform20", ROWS, LISTS) == 1).all()
        tuned = lms.logits("tuned:lora", "adapter", ROWS, 8)
        assert tuned.tolist() == [2 + seed] * 3
    assert opened == [("lm", "adapter"), ("tuned:lora", "adapter"), ("tuned:lora", "adapter")]
    assert len(list((tmp_path / "lm" / "scores").iterdir())) == 2


def test_a_system_is_opened_once_for_all_that_is_asked_of_it(tmp_path, opened):
    lms = LmSystems(run_of(tmp_path, 0), None, None, {})
    for kind in ("uniform20", "popular20"):
        lms.titles("tuned:lora", "adapter-ranking", kind, ROWS, LISTS)
    lms.logits("tuned:lora", "adapter-ranking", ROWS, 8)
    assert opened == [("tuned:lora", "adapter-ranking")]
    lms.logits("tuned:lora", "adapter", ROWS, 8)  # another adapter is another system
    lms.titles("tuned:lora", "adapter-ranking", "uniform20", ROWS, LISTS + 1)  # so are other candidates
    assert opened[1:] == [("tuned:lora", "adapter"), ("tuned:lora", "adapter-ranking")]
