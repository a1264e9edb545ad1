"""Merging rows of results, their file, and how tables look."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from recllm.evaluation import results, tables
from recllm.evaluation.results import ResultRow


def row(system: str, auc: float, seed: int = 0, **changes: object) -> ResultRow:
    base = ResultRow(system, "stage2", "ctr", "test/all", 1000, {"auc": auc, "logloss": 1 - auc})
    return results.of_seed(replace(base, **changes), seed)  # type: ignore[arg-type]


def test_merge_is_idempotent_and_adds_seeds() -> None:
    first = results.merge([], [row("sim", 0.75), row("reclora", 0.8, lm="tiny")])
    assert results.merge(first, first) == first
    second = results.merge(first, [row("reclora", 0.9, seed=1, lm="tiny", commit="new")])
    assert [r.system for r in second] == ["sim", "reclora"]
    reclora = second[1]
    assert reclora.metrics["auc"] == pytest.approx(0.85)
    assert [entry["seed"] for entry in reclora.seeds] == [0, 1]
    assert reclora.commit == "new"
    again = results.merge(
        second, [row("reclora", 0.7, seed=1, lm="tiny")]
    )  # the same seed replaces its figures
    assert again[1].metrics["auc"] == pytest.approx(0.75)
    assert len(again[1].seeds) == 2


def test_merge_does_not_depend_on_the_order_of_seeds() -> None:
    a, b = row("sim", 0.7, 0), row("sim", 0.8, 1)
    one, two = results.merge([a], [b])[0], results.merge([b], [a])[0]
    assert (one.metrics, one.seeds) == (two.metrics, two.seeds)


@pytest.mark.parametrize(
    "change",
    [{"row_set": "valid"}, {"k": 3}, {"lm": "other"}, {"candidates": "popular20"}, {"task": "ranking"}],
)
def test_every_part_of_the_key_makes_another_line(change: dict[str, object]) -> None:
    assert len(results.merge([row("dpo", 0.5)], [row("dpo", 0.5, **change)])) == 2


def test_other_rows_replace_instead_of_averaging() -> None:
    merged = results.merge([row("sim", 0.7)], [row("sim", 0.9, seed=1, rows=500)])
    assert len(merged) == 1
    assert merged[0].metrics["auc"] == 0.9
    assert [entry["seed"] for entry in merged[0].seeds] == [1]


def test_intervals_over_seeds() -> None:
    pairs = {"paired_with": "sim"}
    one = row("reclora", 0.8, 0, delta=0.01, interval95=[0.0, 0.02], p_value=0.04, **pairs)
    two = row("reclora", 0.8, 1, delta=0.03, interval95=[0.02, 0.04], p_value=0.002, **pairs)
    merged = results.merge([one], [two])[0]
    assert merged.delta == pytest.approx(0.02)
    assert merged.interval95 == pytest.approx([0.01, 0.03])
    assert merged.p_value == 0.04


def test_bins_of_seeds_are_pooled() -> None:
    one = row("sim", 0.7, 0, reliability=[[1, 0.1, 1.0], [0, 0.0, 0.0]])
    two = row("sim", 0.7, 1, reliability=[[3, 0.3, 0.0], [2, 0.6, 0.5]])
    merged = results.merge([one], [two])[0]
    assert merged.reliability == [[4, pytest.approx(0.25), 0.25], [2, 0.6, 0.5]]
    assert merged.seeds[1]["reliability"] == two.reliability
    assert results.merge([row("sim", 0.7, 0)], [two])[0].reliability == []  # an older row kept none


def test_variants_stand_in_tables_of_their_own() -> None:
    rows = results.merge([row("sim", 0.81), row("din", 0.79)], [row("sim", 0.80, 1, variant="quick")])
    assert [(r.system, r.variant, len(r.seeds)) for r in rows] == [
        ("din", None, 1), ("sim", None, 1), ("sim", "quick", 1),
    ]  # fmt: skip
    plain, quick = tables.result_tables(rows, "ctr")
    assert quick.title == f"{plain.title}, quick"
    assert (len(plain.cells), len(quick.cells)) == (2, 1)


def test_further_differences_over_seeds_are_those_that_every_seed_has() -> None:
    blend = {"delta": 0.01, "interval95": [0.0, 0.02], "p_value": 0.04}
    more = {"delta": 0.03, "interval95": [0.02, 0.04], "p_value": 0.002}
    one = results.of_seed(row("reclora", 0.8, paired_with="lora", against={"blend": blend, "sim": blend}), 0)
    two = results.of_seed(row("reclora", 0.8, paired_with="lora", against={"blend": more}), 1)
    (merged,) = results.merge([one], [two])
    assert merged.against.keys() == {"blend"}
    assert merged.against["blend"]["delta"] == pytest.approx(0.02)
    assert merged.against["blend"]["interval95"] == pytest.approx([0.01, 0.03])
    assert merged.against["blend"]["p_value"] == 0.04
    (table,) = tables.difference_tables([merged, row("sim", 0.79, paired_with="din", delta=0.001)])
    assert table.heading == ["system", "blend"]
    assert table.cells == [["reclora, 2 seeds", "+.0200 [+.0100, +.0300]"]]


def test_file_round_trip_and_nan(tmp_path: Path) -> None:
    path = tmp_path / "a" / "results.json"
    assert results.read(path) == []
    rows = results.merge([], [row("sim", 0.75, interval95=[0.0, 0.1]), row("din", float("nan"))])
    results.write(path, rows)
    assert "NaN" not in path.read_text()
    back = results.read(path)
    assert [r.system for r in back] == ["din", "sim"]
    assert back[0].metrics["auc"] is None
    assert back[1] == rows[1]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]  # no temporary file stays
    third = row("sim", 1 / 3, interval95=[1 / 7, 2 / 3])
    for decimals, kept in ((None, third), (6, row("sim", 0.333333, interval95=[0.142857, 0.666667]))):
        results.write(path, [third], decimals)
        assert results.read(path) == [kept]
    path.write_text(json.dumps([{"sistem": "x"}]))
    with pytest.raises(ValueError, match="sistem"):
        results.read(path)
    with pytest.raises(ValueError, match="ctr or ranking"):
        row("x", 0.5, task="other")


def text(rows: list[ResultRow], terminal: bool) -> str:
    out = io.StringIO()
    tables.print_table(rows, Console(file=out, width=100, force_terminal=terminal, color_system=None))
    return out.getvalue()


ROWS = [
    row("sim", 0.8123),
    row(
        "reclora-shuffled", 0.8023, lm="HuggingFaceTB/SmolLM2-135M", delta=-0.01, interval95=[-0.015, 0.005],
        paired_with="reclora-uniform", crm_auc_same_rows=0.8123, rows=97_002,
    ),
    *(
        ResultRow(
            "s-dpo", "stage3", "ranking", "test/all", 2000, {"hr@1": hr, "hr@5": 0.9, "ndcg@10": 0.7, "mrr":
            0.5, "valid_ratio": 1.0}, candidates=c, k=k, lm="tiny", delta=0.0123, interval95=[0.01, 0.0146],
            paired_with="sft-continued",
        )
        for c in ("uniform20", "popular20") for k, hr in ((1, 0.3), (3, 0.4))
    ),
]  # fmt: skip


def test_table_fits_100_columns_and_is_plain_when_piped() -> None:
    piped = text(ROWS, terminal=False)
    assert "\x1b" not in piped
    assert max(map(len, piped.splitlines())) <= 100
    assert "…" not in piped
    for wanted in (".8123*", ".1877*", "reclora-shuffled", "97,002", "-.0100 [-.0150, +.0050]",
    "reclora-uniform",
                   "s-dpo K=3 (tiny)", ".4000*", "1.0000", "sft-continued", "popular20"):  # fmt: skip
        assert wanted in piped, wanted
    assert ".8023*" not in piped
    assert ".3000*" not in piped
    assert piped.index("uniform20") < piped.index("popular20")


def test_best_is_bold_on_a_terminal() -> None:
    out = io.StringIO()
    tables.print_table(ROWS, Console(file=out, width=100, force_terminal=True, color_system="standard"))
    assert "\x1b[1m.8123" in out.getvalue().replace("\x1b[1m ", "\x1b[1m")
    assert "*" not in out.getvalue()


def test_missing_tasks_are_said() -> None:
    assert "No ranking results." in text([ROWS[0]], terminal=False)
    assert "No ctr results." in text([], terminal=False)


def test_bands_are_shown_with_their_rows_and_edges() -> None:
    figures = {
        "auc/users_unseen": None,
        "rows/users_unseen": 0.0,
        "auc/users_low": 0.71,
        "rows/users_low": 400.0,
    }
    figures |= {"upto/users_low": 1053.0, "logloss/users_low": 0.5}
    better = {**figures, "auc/users_low": 0.72}
    rows = [row("din", 0.7, metrics=figures), row("sim", 0.8, metrics=better), row("lm", 0.6)]
    (table,) = tables.slice_tables(rows)
    assert table.heading == ["system", "rows", "user: few events (<= 1,053), 400 rows"]
    assert table.cells == [["din", "1,000", ".7100"], ["sim", "1,000", ".7200"]]
    assert table.best == {(1, 2)}


def test_less_time_is_better_and_no_popularity_is_best():
    figures = [{"ndcg@10": 0.2, "milliseconds": 3.0, "popularity_bias@10": 5.0}]
    figures.append({"ndcg@10": 0.1, "milliseconds": 2.0, "popularity_bias@10": 6.0})
    rows = [row(name, 0.0, task="next", metrics=own) for name, own in zip("ab", figures, strict=True)]
    (table,) = tables.result_tables(rows, "next")
    assert {(line, table.heading[column]) for line, column in table.best} == {
        (0, "NDCG@10"),
        (1, "ms a user"),
    }


def test_the_crm_beside_is_averaged_over_seeds_too():
    rows = []
    for seed, auc in ((0, 0.80), (2, 0.90), (1, 0.82)):
        rows = results.merge(rows, [results.of_seed(row("lora", 0.8, crm_auc_same_rows=auc), seed)])
    assert rows[0].crm_auc_same_rows == pytest.approx(0.84)
