"""The report's sweeps: points that belong together, in order, with their cost."""

import base64
from pathlib import Path

import pytest

from recllm.config.sweep import tag
from recllm.evaluation.results import ResultRow, of_seed, write
from recllm.report.sweeps import sweeps
from tests.report.artifacts import write_stage


def point(
    folder: Path, key: str, value: str, auc: float, *, system="reclora", variant=None, seed=0, cost=7.0
):
    """An evaluated point as the stage leaves it: the gate's CRM, and one system."""
    at = tag(key, value)
    end = f"+s{seed}" if seed else ""
    choice = f"{system}{'+' + variant if variant else ''}+{at}{end}"
    figures = {"auc": auc, "logloss": 0.5, "tuning_rows": 100 * auc, "tuning_seconds": cost}
    figures |= {"tuning_trainable": 12_345.0, "tuning_tokens": 678_900.0}
    crm = ResultRow("sim", "stage1", "ctr", "test/all", 50, {"auc": 0.71})
    row = ResultRow(
        f"{system}+{at}", "stage2", "ctr", "test/all", 50, figures, lm="tiny", variant=variant, delta=0.02,
        interval95=[0.01, 0.03], paired_with=f"lora+{at}", crm_auc_same_rows=0.71,
    )  # fmt: skip
    path = folder / "evaluate" / choice
    write(path / "rows.json", [of_seed(crm, seed), of_seed(row, seed)])
    write_stage(folder, f"evaluate/{choice}", sweep={"key": key, "value": value}, seed=seed)


def test_points_stand_in_order_with_their_cost(tmp_path):
    for value, auc in (("16", 0.78), ("4", 0.75), ("8", 0.76)):
        point(tmp_path, "stage2.adapter.num_meta", value, auc)
    (sweep,) = sweeps(tmp_path, [])
    assert sweep.title == "stage2.adapter.num_meta (LM tiny, 50 rows test/all)"
    assert sweep.table.heading[:4] == ["system", "num_meta", "tuning rows", "AUC"]
    assert [line[1] for line in sweep.table.cells] == ["4", "8", "16"]
    assert sweep.table.cells[0] == [
        "reclora", "4", "75", ".7500", ".5000", ".7100", "7", "12,345", "678,900", "+.0200 [+.0100, +.0300]",
        "lora",
    ]  # fmt: skip
    svg = base64.b64decode(sweep.image.partition(",")[2]).decode()
    for word in ("AUC", "seconds", "num_meta", "reclora", "the gate's CRM", "16"):
        assert f">{word}<" in svg, word


def test_seeds_are_averaged_and_variants_kept_apart(tmp_path):
    point(tmp_path, "prompt.history", "10", 0.70)
    point(tmp_path, "prompt.history", "10", 0.74, seed=3, cost=9.0)
    point(tmp_path, "prompt.history", "5", 0.60, variant="quick")
    point(tmp_path, "stage2.adapter.r", "2", 0.61)
    found = {sweep.title.partition(",")[0]: sweep.table.cells for sweep in sweeps(tmp_path, [])}
    assert set(found) == {
        "prompt.history (LM tiny", "prompt.history (quick", "stage2.adapter.r (LM tiny",
    }  # fmt: skip
    (line,) = found["prompt.history (LM tiny"]
    assert line[0] == "reclora, 2 seeds"
    assert line[3] == ".7200"  # (.70 + .74) / 2
    assert line[6] == "8"  # (7 + 9) / 2


def test_systems_evaluated_apart_share_a_plot(tmp_path):
    for system in ("lora", "reclora"):
        point(tmp_path, "subsample", "0.1", 0.7, system=system)
    (sweep,) = sweeps(tmp_path, [])
    assert [line[0] for line in sweep.table.cells] == ["lora", "reclora"]
    assert ">tuning rows<" in base64.b64decode(sweep.image.partition(",")[2]).decode()


def test_words_stand_side_by_side(tmp_path):
    for value in ("product", "factor"):
        point(tmp_path, "stage2.adapter.mixture", value, 0.7)
    (sweep,) = sweeps(tmp_path, [])
    assert [line[1] for line in sweep.table.cells] == ["factor", "product"]


def test_unfinished_points_and_other_evaluations_are_none(tmp_path):
    assert sweeps(tmp_path, []) == []
    point(tmp_path, "prompt.history", "10", 0.7)
    (tmp_path / "evaluate/reclora+history-10/manifest.json").unlink()
    write_stage(tmp_path, "evaluate/all")
    missing = []
    assert sweeps(tmp_path, missing) == []
    assert missing == []
    point(tmp_path, "prompt.history", "5", 0.7)
    (tmp_path / "evaluate/reclora+history-5/config.yaml").write_text("config: {}\n")
    assert sweeps(tmp_path, missing) == []
    (line,) = missing
    assert line.startswith("evaluate/reclora+history-5 cannot be read: ")


@pytest.mark.parametrize("value", ["0.001", "uniform300"])
def test_a_subsample_stands_at_its_rows(tmp_path, value):
    point(tmp_path, "subsample", value, 0.3)
    point(tmp_path, "subsample", "0.9", 0.8)
    assert [line[2] for line in sweeps(tmp_path, [])[0].table.cells] == ["30", "80"]
