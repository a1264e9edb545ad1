"""Which systems are compared: the row's own comparison first."""

import numpy as np

from recllm.evaluation.bootstrap import Resampled
from recllm.evaluation.comparisons import alignment_comparisons, compare, ctr_comparisons, ranking_comparisons
from recllm.systems.system import Kind, System


class Named(System):
    """A system of which comparisons know all that they ask."""

    mixes_loras = False
    start = None

    def __init__(self, name, kind, mixes_loras=False, start=None):
        super().__init__(name)
        self.kind = kind
        self.mixes_loras = mixes_loras
        self.start = start


def systems_of(**kinds):
    return {name.replace("_", "-"): Named(name.replace("_", "-"), kind) for name, kind in kinds.items()}


def names(comparisons):
    return {system.name: [other.name for other in others] for system, others in comparisons.items()}


def test_ctr_comparisons_begin_with_the_rows_own():
    systems = systems_of(popularity=Kind.COUNTING, din=Kind.CRM, sim=Kind.CRM, lm=Kind.LM, lora=Kind.TUNED,
                         rella=Kind.TUNED, refit=Kind.STACKED, blend=Kind.STACKED)  # fmt: skip
    systems["mine"] = Named("mine", Kind.TUNED, mixes_loras=True)
    found = names(ctr_comparisons(systems.values(), systems["sim"]))
    assert {system: others[:1] for system, others in found.items()} == {
        "popularity": [], "din": ["popularity"], "sim": ["din"], "lm": ["sim"], "lora": ["sim"],
        "rella": ["sim"], "mine": ["lora"], "refit": ["sim"], "blend": ["sim"],
    }  # fmt: skip
    assert found["mine"] == ["lora", "sim", "lm", "rella", "refit", "blend"]
    assert all(system not in others for system, others in found.items())


def test_ctr_comparisons_without_the_usual_partner():
    systems = systems_of(popularity=Kind.COUNTING, din=Kind.CRM)
    systems["reclora"] = Named("reclora", Kind.TUNED, mixes_loras=True)
    found = names(ctr_comparisons(systems.values(), systems["din"]))
    assert found == {"popularity": [], "din": ["popularity"], "reclora": ["din"]}
    assert names(ctr_comparisons(systems.values(), None))["reclora"] == []


def test_a_crm_with_vectors_of_texts_stands_against_the_same_one_without():
    systems = systems_of(popularity=Kind.COUNTING, sim=Kind.CRM, **{"sim-lm": Kind.CRM, "din-lm": Kind.CRM})
    found = names(ctr_comparisons(systems.values(), systems["sim-lm"]))
    assert found["sim-lm"] == ["sim", "popularity"]
    assert found["din-lm"] == ["popularity"]  # DIN is not there
    assert found["sim"] == ["popularity"]


def test_ranking_comparisons_begin_with_the_rows_own():
    systems = systems_of(popularity=Kind.COUNTING, sim=Kind.CRM, crm_ranker=Kind.CRM, ctr_bert=Kind.TOWERS,
                         lm=Kind.LM, lora=Kind.TUNED, sft=Kind.TUNED, sft_pointwise=Kind.TUNED)  # fmt: skip
    starts = {"sft-continued": "sft", "s-dpo": "sft", "s-dpo-pointwise": "sft-pointwise"}
    for name, start in starts.items():
        systems[name] = Named(name, Kind.ALIGNED, start=systems[start])
    ordered = [systems[name] for name in sorted(systems)]
    found = names(ranking_comparisons(ordered))
    assert {system: others[0] for system, others in found.items() if others} == {
        "sim": "popularity", "crm-ranker": "popularity", "ctr-bert": "popularity", "lm": "popularity",
        "lora": "lm", "sft": "lm", "sft-pointwise": "lm", **starts,
    }  # fmt: skip
    assert found["s-dpo"] == ["sft", "lm", "sft-continued", "crm-ranker", "popularity"]
    assert found["lm"] == ["popularity", "sft", "sft-continued", "crm-ranker"]
    cost = names(alignment_comparisons(ordered))
    assert {system: others for system, others in cost.items() if others} == {
        system: [start] for system, start in starts.items()
    }


def test_compare_keeps_the_order():
    systems = systems_of(a=Kind.CRM, b=Kind.CRM, c=Kind.CRM)
    values = {"a": 3.0, "b": 1.0, "c": 2.0}
    resampled = {systems[name]: Resampled(value, np.array([value])) for name, value in values.items()}
    found = compare(systems["a"], [systems["c"], systems["b"]], resampled)
    assert [(other.name, difference.delta) for other, difference in found.items()] == [("c", 1.0), ("b", 2.0)]
