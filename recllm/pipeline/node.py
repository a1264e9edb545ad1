"""A folder of the artifacts: the stage that makes it, from what, and how it is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recllm.config.sweep import SweepValue

KINDS = ("crm", "start", "lm", "vectors", "experiment", "point", "seed")
"""Kinds of tags, in the order in which a folder's name says them."""


@dataclass(frozen=True)
class Node:
    """One folder of `artifacts/<dataset>` and how it is made."""

    stage: str
    dataset: str
    folder: str
    command: str
    parents: dict[str, Node]
    config: dict[str, Any]
    overrides: dict[str, Any]
    tags: frozenset[str]
    point: SweepValue | None = None

    @property
    def content(self) -> dict[str, Any]:
        """What `config.yaml` holds; `point` of a sweep's folders only, `variant` of evaluations only."""
        return {
            "stage": self.stage,
            "dataset": self.dataset,
            "choice": self.folder.partition("/")[2] or self.folder,
            "parents": {role: parent.folder for role, parent in self.parents.items()},
            "overrides": self.overrides,
            "config": self.config,
        } | self._told()

    def _told(self) -> dict[str, Any]:
        """What results are told apart by, where it is not the default."""
        told: dict[str, Any] = {}
        if self.point:
            told["point"] = {"key": self.point.key, "value": self.point.text}
        variant = suffix(self.tags, kinds=("crm", "start", "vectors", "experiment"))
        if self.stage == "evaluate" and variant:
            told["variant"] = variant.removeprefix("+")
        return told


def suffix(tags: frozenset[str], skip: Sequence[str] = (), kinds: Sequence[str] = KINDS) -> str:
    """`+din+quick+num_meta-4+s2`: what of these kinds is not the default.

    Args:
        tags: `kind:value`.
        skip: tags that are left out.
        kinds: kinds of tags that are said.
    """
    values = sorted(
        (KINDS.index(kind), value)
        for kind, _, value in (tag.partition(":") for tag in tags - set(skip))
        if kind in kinds
    )
    return "".join(f"+s{value}" if KINDS[kind] == "seed" else f"+{value}" for kind, value in values)
