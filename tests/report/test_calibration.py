"""Reliability diagrams of the report."""

from __future__ import annotations

import base64

from recllm.evaluation.results import ResultRow
from recllm.report.calibration import calibration_sections


def ctr_row(system: str, ece: float, reliability: list[list[float]], row_set: str = "test/all") -> ResultRow:
    figures = {"auc": 0.7, "ece": ece, "logloss": 0.5}
    return ResultRow(system, "stage1", "ctr", row_set, 10, figures, reliability=reliability)


def test_systems_stand_side_by_side_the_best_calibrated_first() -> None:
    rows = [
        ctr_row("din", 0.2, [[8, 0.25, 0.5], [0, 0.0, 0.0], [2, 0.875, 1.0]]),
        ctr_row("sim", 0.1, [[10, 0.4, 0.5]]),
        ctr_row("lm", 0.3, []),  # an older row
    ]
    (section,) = calibration_sections(rows)
    assert [cells[0] for cells in section.table.cells] == ["sim", "din", "lm"]
    # (8 * .25 + 2 * .875) / 10 = .375 and (8 * .5 + 2 * 1) / 10 = .6
    assert section.words == (
        "Reliability: sim predicts .4000 on average, liked were .5000; "
        "din predicts .3750 on average, liked were .6000"
    )
    assert section.image is not None
    svg = base64.b64decode(section.image.partition(",")[2]).decode()
    assert svg.index(">sim<") < svg.index(">din<")
    assert ">lm<" not in svg
    assert section == calibration_sections(rows)[0]  # the same file from the same data


def test_without_bins_there_is_a_table_and_no_picture() -> None:
    older = ctr_row("sim", 0.1, [])
    other = ctr_row("sim", 0.1, [[1, 0.5, 1.0]], "test/uniform2000")
    ranking = ResultRow("sim", "stage1", "ranking", "test/all", 10, {"hr@1": 0.5})
    of_all, of_sample = calibration_sections([older, other, ranking])
    assert of_all.image is None
    assert of_all.table.cells == [["sim", ".1000", ".5000"]]
    assert of_sample.image is not None
