"""Which systems are compared: the row's own comparison first."""

import numpy as np

from recllm.evaluation.bootstrap import Resampled
from recllm.evaluation.comparisons import compare, ctr_pairs, ranking_pairs


def test_ctr_pairs_begin_with_the_rows_own():
    systems = ["popularity", "din", "sim", "lm", "lora", "rella", "reclora", "refit", "blend"]
    pairs = ctr_pairs(systems, {"din", "sim"}, "sim")
    assert {system: others[:1] for system, others in pairs.items()} == {
        "popularity": [], "din": ["popularity"], "sim": ["din"], "lm": ["sim"], "lora": ["sim"],
        "rella": ["sim"], "reclora": ["lora"], "refit": ["sim"], "blend": ["sim"],
    }  # fmt: skip
    assert pairs["reclora"] == ["lora", "sim", "lm", "rella", "refit", "blend"]
    assert all(system not in others for system, others in pairs.items())


def test_ctr_pairs_without_the_usual_partner():
    pairs = ctr_pairs(["popularity", "din", "reclora"], {"din"}, "din")
    assert pairs == {"popularity": [], "din": ["popularity"], "reclora": ["din"]}


def test_ranking_pairs_begin_with_the_rows_own():
    lms = {"lm", "lora", "sft", "sft-continued", "s-dpo", "s-dpo-pointwise", "sft-pointwise"}
    systems = ["popularity", "sim", "crm-ranker", *sorted(lms)]
    starts = {"sft-continued": "sft", "s-dpo": "sft", "s-dpo-pointwise": "sft-pointwise"}
    pairs = ranking_pairs(systems, lms, starts)
    first = {system: others[0] for system, others in pairs.items() if others}
    assert first == {
        "sim": "popularity", "crm-ranker": "popularity", "lm": "popularity", "lora": "lm", "sft": "lm",
        "sft-pointwise": "lm", **starts,
    }  # fmt: skip
    assert pairs["s-dpo"] == ["sft", "lm", "sft-continued", "crm-ranker", "popularity"]


def test_compare_keeps_the_order():
    values = {"a": 3.0, "b": 1.0, "c": 2.0}
    held = {name: Resampled(value, np.array([value])) for name, value in values.items()}
    found = compare("a", ["c", "b"], held)
    assert [(other, difference.delta) for other, difference in found.items()] == [("c", 1.0), ("b", 2.0)]
