"""The LM as a system: opened once for all that is asked of it, and scored once by every seed."""

from types import SimpleNamespace

import numpy as np
import pytest

from recllm.cache import Cache
from recllm.pipeline.stage_file import Role
from recllm.systems import lm_systems
from recllm.systems.lm_systems import Opened, OpenLm, TunedLm, UntunedLm

ROWS, LISTS = np.arange(3), np.arange(6).reshape(3, 2)


def stage(name, **config):
    return SimpleNamespace(name=name, identity=f"identity of {name}", config=SimpleNamespace(**config))


def run_of(root, seed):
    """A run of one seed: its own adapters, the LM and the cache of all."""
    return SimpleNamespace(
        parents={Role.LM: stage("lm"), Role.NEIGHBORS: stage("neighbors"), Role.LOG: stage("log")},
        cache=Cache(root / "cache"),
        file=SimpleNamespace(config={"prompt": {"history": 10}}),
        config=SimpleNamespace(
            seed=seed,
            prompt=SimpleNamespace(history=10),
            lm=SimpleNamespace(model=SimpleNamespace(name="tiny"), training=SimpleNamespace(block=32)),
            evaluate=SimpleNamespace(batch_size=40),
        ),
    )


def lora(untuned, seed=0, **options):
    return TunedLm("lora", untuned, stage(f"stage2/lora+s{seed}"), **options)


@pytest.fixture
def loaded(monkeypatch):
    """What was loaded, in order; a system's scores tell its number."""
    asked = []

    def load(self, stage, adapter):
        asked.append((stage.name, adapter))
        task = SimpleNamespace(cut=lambda: 3, prompts=SimpleNamespace(max_length=64))
        lm = SimpleNamespace(answers=lambda *_: task, titles=lambda *_: task)
        return Opened(lm, "model", None, True)

    monkeypatch.setattr(OpenLm, "_load", load)
    monkeypatch.setattr(OpenLm, "_load_untuned", lambda self: load(self, stage("lm"), ""))
    for name, rows, shape in (("answer_scores", 40, 3), ("title_choices", 10, (3, 2, 2))):

        def score(model, task, size, rows=rows, shape=shape):
            assert size == rows  # of a forward pass: of lists of titles a quarter
            return np.full(shape, len(asked), np.float32)

        monkeypatch.setattr(lm_systems, name, score)
    return asked


def test_the_untuned_lm_is_scored_once_for_all_seeds(tmp_path, loaded, capsys):
    for seed in (0, 1):
        untuned = UntunedLm(OpenLm(run_of(tmp_path, seed), None, None, []))
        assert untuned.ctr(ROWS).tolist() == [1, 1, 1]
        assert (untuned.rank(ROWS, LISTS) == 1).all()
        assert lora(untuned, seed).ctr(ROWS).tolist() == [2 + seed] * 3
    assert loaded == [("lm", ""), ("stage2/lora+s0", "adapter"), ("stage2/lora+s1", "adapter")]
    cut = "3 prompts are longer than 64 tokens and lose their oldest events"
    assert capsys.readouterr().out.count(cut) == 4  # said of everything that is computed
    assert len(list((tmp_path / "cache").glob("*-lm-*"))) == 2


def test_a_system_is_loaded_once_for_all_that_is_asked_of_it(tmp_path, loaded):
    untuned = UntunedLm(OpenLm(run_of(tmp_path, 0), None, None, []))
    by_titles = lora(untuned, answers="adapter-ranking")
    for lists in (LISTS, LISTS + 1):
        by_titles.rank(ROWS, lists)
    by_titles.ctr(ROWS)
    assert loaded == [("stage2/lora+s0", "adapter-ranking")]
    lora(untuned).ctr(ROWS)  # another adapter is another system
    by_titles.rank(ROWS, LISTS + 2)  # so are other candidates
    assert loaded[1:] == [("stage2/lora+s0", "adapter"), ("stage2/lora+s0", "adapter-ranking")]
    lora(untuned).rank(ROWS, LISTS)  # the same adapter and lists, under whatever name
    assert len(loaded) == 3


def test_what_tuning_changed_is_kept_by_name(tmp_path, loaded, monkeypatch):
    virtual_tokens = {"adapter": 0, "soft": 4}
    monkeypatch.setattr(lm_systems, "needs", lambda path: ("target", virtual_tokens[path.name]))
    monkeypatch.setattr(lm_systems, "selected", lambda folder, name: folder / name)
    task = SimpleNamespace(cut=lambda: 0)
    lm = SimpleNamespace(prompts=SimpleNamespace(pieces="pieces"), answers=lambda *_: task)
    crm = SimpleNamespace(representations=lambda rows: rows)
    load = OpenLm._load

    def gated(self, stage, adapter):
        load(self, stage, adapter)
        return Opened(lm, "lm" if not adapter else stage.name, crm if adapter else None, True)

    monkeypatch.setattr(OpenLm, "_load", gated)
    monkeypatch.setattr(OpenLm, "_load_untuned", lambda self: gated(self, stage("lm"), ""))
    monkeypatch.setattr(lm_systems, "held_out", lambda *given: given)
    monkeypatch.setattr(lm_systems, "at_mean_gate", lambda model, rows: f"{model} at {rows}")
    monkeypatch.setattr(lm_systems, "text_loss", lambda model, log, *_: {"lm": 2.0}.get(model, 2.25))
    monkeypatch.setattr(lm_systems, "update_size", lambda model: {"update": 0.5, f"update/{model}": 0.125})
    log = SimpleNamespace(rows=lambda split, rows: f"{split} {rows}")
    untuned = UntunedLm(OpenLm(run_of(tmp_path, 0), log, None, []))
    stage2 = SimpleNamespace(fit=SimpleNamespace(valid_rows="uniform7"))
    made_by = stage("stage2/reclora", stage2=stage2)
    made_by.folder = tmp_path
    reclora = TunedLm("reclora", untuned, made_by)
    wanted = {
        "text_loss": 2.25,
        "update": 0.5,
        "update/stage2/reclora at valid uniform7": 0.125,
        "forgotten": 0.25,
    }
    assert untuned.forgetting() == {"text_loss": 2.0}
    for _ in range(2):
        assert reclora.forgetting() == wanted
    assert TunedLm("soft", untuned, made_by, answers="soft").forgetting() == {}
    assert loaded == [("lm", ""), ("stage2/reclora", "adapter")]
    reclora.ctr(ROWS)  # the gated adapter was taken off: it is loaded again
    assert loaded[2:] == [("stage2/reclora", "adapter")]
