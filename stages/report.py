"""The results: `results.json` and `report.html` of a data set, and the tracked table that runs add up to.

python -m stages.report show ROOT EVALUATION...    merge the evaluations, print the table, write the report
python -m stages.report table ROOT                 merge results.json into results/<dataset>/table.json
python -m stages.report quality ROOT               hold results.json against results/thresholds.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from recllm.errors import StageError
from recllm.evaluation.results import ResultRow, merge, read, write
from recllm.evaluation.tables import print_table
from recllm.evaluation.thresholds import hold, read_thresholds
from recllm.paths import REPORT, RESULTS, repository
from recllm.report import write_report

TABLE = "table.json"
THRESHOLDS = "thresholds.json"
DECIMALS = 6
"""Digits that a tracked table keeps of a figure: more are noise in its history."""


def show(root: Path, evaluations: Sequence[str]) -> None:
    """Merge what the evaluations computed, show it, and keep it."""
    rows: list[ResultRow] = []
    for evaluation in evaluations:
        rows = merge(rows, read(root / evaluation / "rows.json"))
    print_table(rows)
    for text in sorted({_labels_seen(row) for row in rows if "ratings_as_text" in row.metrics}):
        print(text)
    write(root / RESULTS, rows)
    write_report(root, root / REPORT)
    print(f"{root / RESULTS}, {root / REPORT}")


def _labels_seen(row: ResultRow) -> str:
    """How much of the training split's opinions the LM may have read before it was tuned.

    Its text says them, and is read as far as the budget of tokens goes.
    """
    answers, ratings = (int(row.metrics.get(f"{kind}_as_text") or 0) for kind in ("answers", "ratings"))
    return f"LM {row.lm}: pretrained on at most {ratings:,} ratings and {answers:,} answers of training rows."


def table(root: Path) -> None:
    """Add a data set's results to its tracked table."""
    target = repository() / "results" / root.name / TABLE
    target.parent.mkdir(parents=True, exist_ok=True)
    new = read(root / RESULTS)
    if not new:
        raise SystemExit(
            f"error: {root / RESULTS} holds no results; run `make evaluate DATASET={root.name}` first"
        )
    write(target, merge(read(target), new), DECIMALS)
    print(f"{len(new)} rows merged into {target}")


def quality(root: Path) -> None:
    """Say of every figure that the thresholds name whether it is as good as wanted; exit 1 if one is not."""
    try:
        thresholds = read_thresholds(repository() / "results" / THRESHOLDS, root.name)
    except StageError as error:
        raise SystemExit(f"error: {error}") from None
    rows = read(root / RESULTS)
    answers = [hold(threshold, rows) for threshold in thresholds]
    for is_met, line in answers:
        print(f"{'ok' if is_met else 'WORSE':<5} {line}")
    failed = sum(not is_met for is_met, _ in answers)
    if failed:
        raise SystemExit(
            f"error: {failed} of {len(answers)} figures of {root / RESULTS} are worse than "
            f"results/{THRESHOLDS} allows; wanted none"
        )


if __name__ == "__main__":
    if sys.argv[1] == "table":
        table(Path(sys.argv[2]))
    elif sys.argv[1] == "quality":
        quality(Path(sys.argv[2]))
    else:
        show(Path(sys.argv[2]), sys.argv[3:])
