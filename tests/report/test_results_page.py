import pytest

from recllm.evaluation.results import ResultRow, of_seed, write
from recllm.evaluation.tables import p_values
from recllm.report import results_page
from recllm.report.blocks import Block, Line, against, difference, metric, span
from recllm.report.results_page import fill


def row(system, auc, seed=0, **others):
    return of_seed(ResultRow(system, "stage2", "ctr", "test/all", 10, {"auc": auc}, **others), seed)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results with one table, and one block `two` of it."""
    tuned = row("lora", 0.75, delta=-0.0312, interval95=[-0.05, 0.01], p_value=0.0619, paired_with="sim")
    (tmp_path / "demo").mkdir()
    write(tmp_path / "demo" / "table.json", [row("sim", 0.8125), tuned])
    (tmp_path / "published.json").write_text('{"rows": [{"system": "sim", "auc": 0.8, "logloss": null}]}')
    columns = (metric("auc"), difference(), against("lora"), results_page.PAPER)
    block = Block("demo", "ctr", "test/all", [Line("sim"), Line("lora", "plain")], columns)
    monkeypatch.setattr(results_page, "BLOCKS", {"two": block})
    return tmp_path


def test_blocks_are_filled_and_prose_stays(results):
    page = "Before.\n\n<!-- generated: two -->\nold\n<!-- end -->\n\nAfter.\n"
    filled = fill(page, results)
    assert filled == (
        "Before.\n\n<!-- generated: two -->\n"
        "| system | AUC | difference | to `lora` | the paper |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| `sim` | .8125 |  |  | .8000 |\n"
        "| plain | .7500 | -.0312 [-.0500, +.0100] `sim`, p = .062 |  |  |\n"
        "<!-- end -->\n\nAfter.\n"
    )
    assert fill(filled, results) == filled


def test_an_unknown_block_is_told(results):
    with pytest.raises(ValueError, match="named 'three', want one of two"):
        fill("<!-- generated: three -->\n<!-- end -->\n", results)


def test_a_row_that_is_missing_is_told(results):
    write(results / "demo" / "table.json", [row("sim", 0.8125)])
    with pytest.raises(ValueError, match=r"has 0 rows of .*'lora'"):
        fill("<!-- generated: two -->\n<!-- end -->\n", results)


def test_p_values_go_from_the_least_to_the_largest():
    assert p_values([0.001998, 0.001998]) == "p <= .002"
    assert p_values([2 / 1001, 0.046]) == "p <= .002 to .046"
    assert p_values([0.002002]) == "p = .002"
    assert p_values([0.28, 0.004, None]) == "p .004 to .28"
    assert p_values([1.0]) == "p = 1.00"
    assert p_values([None]) == ""


def test_a_span_of_equal_seeds_is_empty():
    one = row("lm", 0.75)
    assert span("auc").show(one) == ""
    several = ResultRow("lm", "none", "ctr", "test/all", 10, {"auc": 0.76})
    several.seeds.extend({"seed": seed, "metrics": {"auc": auc}} for seed, auc in ((0, 0.77), (1, 0.75)))
    assert span("auc").show(several) == ".7500 to .7700"
