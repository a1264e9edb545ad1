"""Which systems a table compares with which: the row's own comparison first, further ones behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from recllm.evaluation.bootstrap import Difference, Resampled
from recllm.evaluation.stacking import CONTROLS
from recllm.systems.system import Kind, System

Comparisons = dict[System, list[System]]
"""System -> those that it is compared with, on the same rows."""

CTR_BASELINES = ("lm", "lora", "tallrec", "rella", *CONTROLS)
RANKING_BASELINES = (
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

LMS = (Kind.LM, Kind.TUNED, Kind.ALIGNED)


def ctr_comparisons(systems: Collection[System], beside: System | None) -> Comparisons:
    """Comparisons of the CTR task.

    CRMs stand against `popularity`, the one beside the LMs against DIN, one with an LM's vectors against the
    same without them, LMs with a mixture of LoRAs against plain LoRA, and all other LM systems and the
    stacking controls against the CRM beside them.

    Args:
        systems: all systems of the table.
        beside: the CRM beside which LMs stand; None: there is none.
    """
    comparisons: Comparisons = {}
    for system in systems:
        wanted: list[str] = []
        if system.kind is Kind.CRM:
            wanted = ["din", "popularity"] if system is beside else ["popularity"]
            if system.name.endswith("-lm"):  # with an LM's vectors of texts against the same without them
                wanted.insert(0, system.name.removesuffix("-lm"))
        elif system.kind is not Kind.COUNTING:
            if system.mixes_loras:
                wanted.append("lora")
            if beside is not None:
                wanted.append(beside.name)
            wanted += CTR_BASELINES
        comparisons[system] = _present(system, wanted, systems)
    return comparisons


def alignment_comparisons(systems: Collection[System]) -> Comparisons:
    """What is aligned against what it started from, and nothing else."""
    return {system: [system.start] if system.start is not None else [] for system in systems}


def ranking_comparisons(systems: Collection[System]) -> Comparisons:
    """Comparisons of the ranking task.

    What is aligned stands against what it started from, tuned LMs against the untuned one, all else against
    `popularity`.

    Args:
        systems: all systems of the table.
    """
    comparisons: Comparisons = {}
    for system in systems:
        wanted: Sequence[str] = ("popularity",)
        if system.kind in LMS:
            first = "popularity" if system.kind is Kind.LM else "lm"
            if system.start is not None:
                first = system.start.name
            wanted = (first, *RANKING_BASELINES)
        comparisons[system] = _present(system, wanted, systems)
    return comparisons


def catalog_comparisons(systems: Collection[System], retrievers: Collection[System]) -> Comparisons:
    """Comparisons over the whole catalog.

    A cascade stands against what it begins with, all else against `popularity`, which stands against
    nothing; everything besides against the retrievers and the baselines.

    Args:
        systems: all systems of the table.
        retrievers: the CRMs among them that recommend by themselves.
    """
    baselines = [system.name for system in systems if system.kind is Kind.COUNTING]
    comparisons: Comparisons = {}
    for system in systems:
        before = getattr(system, "before", None)
        first = "popularity" if before is None else before.name
        wanted = [first, *(retriever.name for retriever in retrievers), *baselines]
        if system.name == first:
            wanted = []
        comparisons[system] = _present(system, wanted, systems)
    return comparisons


def compare(
    system: System, others: Iterable[System], resampled: Mapping[System, Resampled]
) -> dict[System, Difference]:
    """The differences of a system to others, in their order."""
    return {other: resampled[system].minus(resampled[other]) for other in others}


def _present(system: System, wanted: Iterable[str], systems: Collection[System]) -> list[System]:
    """Those of the wanted ones that are there, each once."""
    by_name = {other.name: other for other in systems}
    present = [by_name[name] for name in dict.fromkeys(wanted) if name in by_name]
    return [other for other in present if other is not system]
