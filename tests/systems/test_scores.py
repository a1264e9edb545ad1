"""Scores on disk: computed once, found again, and the untuned LM's by every seed."""

from types import SimpleNamespace

import numpy as np
import pytest

from recllm.cache import ScoreCache
from recllm.systems import scores
from recllm.systems.scores import LmSystems

ROWS, LISTS = np.arange(3), np.arange(6).reshape(3, 2)


def test_what_is_kept_is_not_computed_again(tmp_path, capsys):
    kept = ScoreCache(tmp_path / "scores")
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
        config=SimpleNamespace(
            prompt=SimpleNamespace(history=10),
            lm=SimpleNamespace(training=SimpleNamespace(block=32)),
            evaluate=SimpleNamespace(batch_size=40),
        ),
    )  # fmt: skip


@pytest.fixture
def opened(monkeypatch):
    """What was opened and asked, in order; a system's scores tell their number."""
    asked = []

    def open_(self, role, adapter):
        asked.append((role, adapter))
        task = SimpleNamespace(count_cut=lambda: 3, prompts=SimpleNamespace(max_length=64))
        return SimpleNamespace(answers=lambda *_: task, titles=lambda *_: task), "model", None, True

    monkeypatch.setattr(LmSystems, "_load", open_)
    for name, rows, shape in (("answer_scores", 40, 3), ("title_choices", 10, (3, 2, 2))):

        def score(model, task, size, rows=rows, shape=shape):
            assert size == rows  # of a forward pass: of lists of titles a quarter
            return np.full(shape, len(asked), np.float32)

        monkeypatch.setattr(scores, name, score)
    return asked


def test_the_untuned_lm_is_scored_once_for_all_seeds(tmp_path, opened, capsys):
    for seed in (0, 1):
        lms = LmSystems(run_of(tmp_path, seed), None, None, {})
        assert lms.logits("lm", "adapter", ROWS).tolist() == [1, 1, 1]
        assert (lms.titles("lm", "adapter", "uniform20", ROWS, LISTS) == 1).all()
        tuned = lms.logits("tuned:lora", "adapter", ROWS)
        assert tuned.tolist() == [2 + seed] * 3
    assert opened == [("lm", "adapter"), ("tuned:lora", "adapter"), ("tuned:lora", "adapter")]
    cut = "3 prompts are longer than 64 tokens and lose their oldest events"
    assert capsys.readouterr().out.count(cut) == 4  # said of everything that is computed
    assert len(list((tmp_path / "lm" / "scores").iterdir())) == 2


def test_what_tuning_changed_is_kept_by_name(tmp_path, opened, monkeypatch):
    folder = tmp_path / "tuned-reclora+s0"
    folder.mkdir()
    (folder / "config.yaml").write_text("config: {stage2: {fit: {valid_rows: uniform7}}}")
    inputs = {"adapter": ("target", 0), "soft": ("target", 4)}
    monkeypatch.setattr(scores, "adapter_inputs", lambda path: inputs[path.name])
    asked = SimpleNamespace(representations=lambda rows: rows)
    task = SimpleNamespace(count_cut=lambda: 0)
    lm = SimpleNamespace(prompts=SimpleNamespace(pieces="pieces"), answers=lambda *_: task)
    load = LmSystems._load

    def gated(self, role, adapter):
        load(self, role, adapter)
        return lm, role, None if role == "lm" else asked, True

    monkeypatch.setattr(LmSystems, "_load", gated)
    monkeypatch.setattr(scores, "held_out_text", lambda *given: given)
    monkeypatch.setattr(scores, "fix_gate_at_mean", lambda model, rows: f"{model} at {rows}")
    monkeypatch.setattr(scores, "text_loss", lambda model, log, *_: {"lm": 2.0}.get(model, 2.25))
    monkeypatch.setattr(scores, "update_size", lambda model: {"update": 0.5, f"update/{model}": 0.125})
    run, log = run_of(tmp_path, 0), SimpleNamespace(rows=lambda split, rows: f"{split} {rows}")
    lms = LmSystems(run, log, None, {})
    wanted = {
        "text_loss": 2.25,
        "update": 0.5,
        "update/tuned:reclora at valid uniform7": 0.125,
        "forgotten": 0.25,
    }
    assert lms.change("lm", "adapter") == {"text_loss": 2.0}
    for _ in range(2):
        assert lms.change("tuned:reclora", "adapter") == wanted
    assert lms.change("tuned:reclora", "soft") == {}
    assert opened == [("lm", "adapter"), ("tuned:reclora", "adapter")]
    lms.logits("tuned:reclora", "adapter", ROWS)  # the gated adapter was taken off: it is opened again
    assert opened[2:] == [("tuned:reclora", "adapter")]


def test_a_system_is_opened_once_for_all_that_is_asked_of_it(tmp_path, opened):
    lms = LmSystems(run_of(tmp_path, 0), None, None, {})
    for kind in ("uniform20", "popular20"):
        lms.titles("tuned:lora", "adapter-ranking", kind, ROWS, LISTS)
    lms.logits("tuned:lora", "adapter-ranking", ROWS)
    assert opened == [("tuned:lora", "adapter-ranking")]
    lms.logits("tuned:lora", "adapter", ROWS)  # another adapter is another system
    lms.titles("tuned:lora", "adapter-ranking", "uniform20", ROWS, LISTS + 1)  # so are other candidates
    assert opened[1:] == [("tuned:lora", "adapter"), ("tuned:lora", "adapter-ranking")]
