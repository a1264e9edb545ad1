"""What preference alignment did: implicit rewards of chosen and rejected titles, by stage 3."""

from __future__ import annotations

from dataclasses import dataclass

from recllm.evaluation.tables import ResultTable, number
from recllm.report.curves import Series, draw

COLUMNS = {
    "reward_chosen": "reward, chosen",
    "reward_rejected": "reward, rejected",
    "margin": "margin",
    "reward_accuracy": "accuracy",
    "chosen_logp": "log-probability, chosen",
    "rejected_logp": "log-probability, rejected",
    "kl": "KL",
}
"""Metrics of the validation pairs, in the order of the table."""


@dataclass(frozen=True)
class RewardSection:
    """The aligned systems in one table, and the curves of each.

    Attributes:
        table: rewards at the end of training, a system a line.
        images: folder -> its curves, a `data:` URI.
    """

    table: ResultTable
    images: list[tuple[str, str]]


def is_reward(name: str) -> bool:
    """Whether a curve, e.g. `valid/margin`, is one of rewards."""
    return name.rpartition("/")[2] in COLUMNS


def reward_section(curves: dict[str, dict[str, Series]]) -> RewardSection | None:
    """Rewards on validation pairs, of all runs that logged some.

    Args:
        curves: folder of a run -> its curves, as `read_series` returns them.

    Returns:
        The section; None where no run logged a reward.
    """
    aligned = {folder: series for folder, series in curves.items() if "valid/margin" in series}
    if not aligned:
        return None
    cells = []
    images = []
    for folder, series in aligned.items():
        steps, _ = series["valid/margin"]
        cells.append([folder, f"{steps[-1]:,.0f}", *(_last(series, name) for name in COLUMNS)])
        images.append((folder, draw({name: curve for name, curve in series.items() if is_reward(name)})))
    heading = ["folder", "step", *COLUMNS.values()]
    return RewardSection(ResultTable("", heading, cells, set()), images)


def _last(series: dict[str, Series], name: str) -> str:
    """The last value on validation; empty where it was not logged."""
    curve = series.get(f"valid/{name}")
    return "" if curve is None else number(float(curve[1][-1]))
