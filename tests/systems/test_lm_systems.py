"""The LM as a system: opened once for all that is asked of it, and scored once by every seed."""

from types import SimpleNamespace

import numpy as np
import pytest

from recllm.cache import Cache
from recllm.paths import ADAPTER
from recllm.pipeline.stage_file import Group, Role
from recllm.retrieval.stored import Retrieval
from recllm.systems import lm_systems
from recllm.systems.crm import Crm, CrmSystem
from recllm.systems.lm_systems import AlignedLm, Opened, OpenLm, TunedLm, UntunedLm
from tests.systems.contract import SystemContract

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
        task = SimpleNamespace(count_cut=lambda: 3, prompts=SimpleNamespace(max_length=64))
        lm = SimpleNamespace(answers=lambda *_: task, titles=lambda *_, has_chosen: task)
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
    monkeypatch.setattr(lm_systems, "adapter_inputs", lambda path: ("target", virtual_tokens[path.name]))
    monkeypatch.setattr(lm_systems, "adapter_folder", lambda folder, name: folder / name)
    task = SimpleNamespace(count_cut=lambda: 0)
    lm = SimpleNamespace(prompts=SimpleNamespace(pieces="pieces"), answers=lambda *_: task)
    crm = SimpleNamespace(representations=lambda rows: rows)
    load = OpenLm._load

    def gated(self, stage, adapter):
        load(self, stage, adapter)
        return Opened(lm, "lm" if not adapter else stage.name, crm if adapter else None, True)

    monkeypatch.setattr(OpenLm, "_load", gated)
    monkeypatch.setattr(OpenLm, "_load_untuned", lambda self: gated(self, stage("lm"), ""))
    monkeypatch.setattr(lm_systems, "held_out_text", lambda *given: given)
    monkeypatch.setattr(lm_systems, "fix_gate_at_mean", lambda model, rows: f"{model} at {rows}")
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


@pytest.fixture
def new_untuned(new_run, demo_log):
    """`new_untuned()` -> the LM of an evaluation, untuned, with all that gates its adapters."""

    def make(**measured):
        run = new_run(**measured)
        retrieval = Retrieval.open(run.parents[Role.NEIGHBORS].folder, demo_log)
        crms = [
            CrmSystem(name, Crm.open(finished, demo_log, retrieval, run.cache))
            for name, finished in run.systems[Group.CRMS].items()
        ]
        return UntunedLm(OpenLm(run, demo_log, retrieval, crms))

    return make


def tuned(untuned, name, **options):
    return TunedLm(name, untuned, untuned.open_lm.run.systems[Group.TUNED][name], **options)


def aligned(start, name):
    return AlignedLm(name, start.open_lm.run.systems[Group.ALIGNED][name], start)


class TestUntuned(SystemContract):
    @pytest.fixture
    def make(self, new_untuned):
        return new_untuned

    def test_answers_do_not_depend_on_the_batch(self, make, rows):
        logits = np.array(make().ctr(rows))
        self.same(make(batch_size=3).ctr(rows), logits)

    def test_decoding_says_how_often_a_title_is_met(self, system, listed):
        figures = system.decoding(*listed, 3)
        assert list(figures) == ["constrained_hr@1", "valid_ratio", "generated_hr@1"]
        assert all(0 <= value <= 1 for value in figures.values())
        assert list(system.decoding(*listed, 0)) == ["constrained_hr@1"]


class TestPlain(SystemContract):
    @pytest.fixture
    def make(self, new_untuned):
        return lambda: tuned(new_untuned(), "lora")

    def test_it_mixes_nothing(self, system):
        assert not system.mixes_loras
        assert system.start is None


class TestGated(SystemContract):
    @pytest.fixture
    def make(self, new_untuned):
        return lambda: tuned(new_untuned(), "reclora")

    def test_what_it_says_is_not_what_the_untuned_lm_says(self, system, rows, listed):
        untuned = system.untuned
        assert system.mixes_loras
        assert np.abs(system.ctr(rows) - untuned.ctr(rows)).max() > 1e-3
        assert np.abs(system.rank(*listed) - untuned.rank(*listed)).max() > 1e-3
        rise = system.forgetting()["text_loss"] - untuned.forgetting()["text_loss"]
        assert system.forgetting()["forgotten"] == rise
        assert system.cost()["tuning_rows"] == 300
        assert system.labels_read() == untuned.labels_read()

    def test_each_task_has_the_adapter_that_was_selected_for_it(self, system, rows):
        by_titles = tuned(system.untuned, "reclora", answers=system.titles)
        assert np.abs(system.ctr(rows) - by_titles.ctr(rows)).max() > 1e-3


class TestAligned(SystemContract):
    @pytest.fixture
    def make(self, new_untuned):
        return lambda: aligned(tuned(new_untuned(), "reclora"), "s-dpo-k7")

    def test_k_has_a_column_of_its_own(self, system):
        assert (system.name, system.table_name, system.k) == ("s-dpo-k7", "s-dpo", 7)
        control = aligned(system.start, "sft-continued")
        assert (control.table_name, control.k) == ("sft-continued", None)


class TestPointwise(SystemContract):
    @pytest.fixture
    def make(self, new_untuned):
        def make():
            start = tuned(new_untuned(), "reclora", titles=ADAPTER, pointwise=True)
            return aligned(start, "s-dpo-pointwise")

        return make

    def test_it_writes_no_titles(self, system, listed):
        assert system.decoding(*listed, 3) == {}
        assert system.start.decoding(*listed, 3) == {}
