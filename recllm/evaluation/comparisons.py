"""Which systems a table compares with which: the row's own comparison first, further ones behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from recllm.evaluation.bootstrap import Difference, Resampled
from recllm.evaluation.stacking import CONTROLS

Pairs = dict[str, list[str]]
"""System -> those that it is compared with, on the same rows."""

OF_LMS = ("lm", "lora", "tallrec", "rella", *CONTROLS)
OF_RANKERS = (
    "lm",
    "sft",
    "sft-continued",
    "dpo",
    "dpo-item",
    "crm-ranker",
    "cooccurrence-directed",
    "popularity",
)
"""What every LM system is compared with besides, where it is there."""


def ctr_pairs(systems: Collection[str], crms: Collection[str], gate: str | None) -> Pairs:
    """Pairs of the CTR task.

    CRMs stand against `popularity`, the gate's against DIN, gated LMs against plain LoRA on the same rows,
    and all other LM systems and the stacking controls against the gate's CRM.

    Args:
        systems: all systems of the table.
        crms: those of them that are CRMs.
        gate: the CRM that gates, or another where that one is a ranker; None: there is no other.
    """
    pairs: Pairs = {}
    for system in systems:
        if system == "popularity":
            wanted: list[str] = []
        elif system in crms:
            wanted = ["din", "popularity"] if system == gate else ["popularity"]
        else:
            wanted = ["lora"] if system.startswith("reclora") else []
            wanted += [*([gate] if gate else []), *OF_LMS]
        pairs[system] = _present(system, wanted, systems)
    return pairs


def ranking_pairs(systems: Collection[str], lms: Collection[str], starts: Mapping[str, str]) -> Pairs:
    """Pairs of the ranking task.

    What is aligned stands against what it started from, other tuned LMs against the untuned one, all else
    against `popularity`.

    Args:
        systems: all systems of the table.
        lms: those of them that are LMs.
        starts: aligned system -> what it started from.
    """
    pairs: Pairs = {}
    for system in systems:
        wanted = [starts.get(system, "lm"), *OF_RANKERS] if system in lms else ["popularity"]
        pairs[system] = _present(system, ["popularity", *OF_RANKERS] if system == "lm" else wanted, systems)
    return pairs


def compare(system: str, others: Iterable[str], held: Mapping[str, Resampled]) -> dict[str, Difference]:
    """The differences of a system to others, in their order."""
    return {other: held[system].minus(held[other]) for other in others}


def _present(system: str, wanted: Iterable[str], systems: Collection[str]) -> list[str]:
    return [other for other in dict.fromkeys(wanted) if other in systems and other != system]
