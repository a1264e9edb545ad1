"""Rows of the table: how a system is named at a value of a sweep, and what it cost."""

from types import SimpleNamespace

import numpy as np

from recllm.evaluation.rows import row_name
from recllm.evaluation.stacking import Blend
from recllm.systems.system import Kind, System, tuning_cost


class Named(System):
    """Any system."""

    kind = Kind.CRM


def made_at(**sweep):
    return SimpleNamespace(file=SimpleNamespace(sweep=sweep))


def test_what_a_value_of_a_sweep_changes_carries_it():
    sweep = {"key": "stage2.adapter.num_meta", "value": "4"}
    systems = [
        Named("reclora", made_by=made_at(**sweep)),
        Named("sim-heldout", made_by=made_at(**sweep)),
        Blend("blend", None, [], np.arange(0), "tiny"),
        Named("sim", made_by=made_at()),
        Named("din", made_by=made_at(key="stage2.adapter.num_meta", value="40")),
        Named("popularity"),
    ]
    assert [row_name(system, sweep) for system in systems] == [
        "reclora+num_meta-4", "sim-heldout+num_meta-4", "blend+num_meta-4", "sim", "din", "popularity",
    ]  # fmt: skip
    assert [row_name(system, {}) for system in systems] == [system.name for system in systems]


def test_the_cost_is_what_stage_2_measured():
    # A stage 2 that was finished before tokens were counted says nothing of them.
    stage2 = SimpleNamespace(metrics={"rows": 300, "trainable": 12, "gate": {"entropy": 1.0}}, seconds=7.5)
    assert tuning_cost(stage2) == {"tuning_rows": 300.0, "tuning_trainable": 12.0, "tuning_seconds": 7.5}
