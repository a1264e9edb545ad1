"""A folder of the artifacts: the stage that makes it, from what, and how it is named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recllm.config.sweep import SweepValue, short
from recllm.files import digest
from recllm.pipeline.stage_file import Group, Role, StageFile
from recllm.pipeline.stages import Stage

KINDS = ("crm", "start", "lm", "vectors", "experiment", "args", "measure", "sweep", "data", "seed")
"""Kinds of name parts, in the order in which a folder's name says them."""

TELLING_RESULTS_APART = ("crm", "start", "vectors", "experiment", "args")
"""Those of them that a row of results needs besides its system, LM, row set and seed."""

DIGESTED = ("args", "measure")
"""Kinds of which a name may have any number: keys of `ARGS`, those that say how much is measured apart."""

SPELLED = 3
"""Keys of `ARGS` that a folder's name spells out; of more it holds a digest."""


@dataclass(frozen=True)
class NamePart:
    """Something that is not the default, as a folder's name says it; children inherit it.

    Attributes:
        kind: one of `KINDS`.
        text: e.g. `din`, `num_meta-4`, or of a seed its number.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Node:
    """One folder of `artifacts/<dataset>` and how it is made.

    Attributes:
        stage: the stage that makes it.
        dataset: name of the data set.
        folder: within `artifacts/<dataset>`.
        module: what runs the stage.
        parents: role -> node.
        config: the sections that reach it, as plain values.
        name_parts: what is not the default, its ancestors' included.
        sweep: the value of a sweep that it stands at; None: none.
        systems: of an evaluation, its further parents by group and system.
    """

    stage: Stage
    dataset: str
    folder: str
    module: str
    parents: dict[Role, Node]
    config: dict[str, Any]
    name_parts: frozenset[NamePart]
    sweep: SweepValue | None = None
    systems: dict[Group, dict[str, Node]] = field(default_factory=dict)

    @property
    def above(self) -> list[Node]:
        """All parents, each once."""
        grouped = [node for group in self.systems.values() for node in group.values()]
        return list({node.folder: node for node in (*self.parents.values(), *grouped)}.values())

    @property
    def file(self) -> StageFile:
        """What the folder's `config.yaml` is to say."""
        variant = suffix(self.name_parts, TELLING_RESULTS_APART).removeprefix("+")
        return StageFile(
            stage=self.stage.name,
            dataset=self.dataset,
            folder=self.folder,
            module=self.module,
            parents={str(role): parent.folder for role, parent in self.parents.items()},
            config=self.config,
            systems={
                str(group): {name: node.folder for name, node in systems.items()}
                for group, systems in self.systems.items()
            },
            sweep={"key": self.sweep.key, "value": self.sweep.text} if self.sweep else {},
            variant=variant if self.stage.goal == "evaluate" and variant else None,
        )


def suffix(parts: Iterable[NamePart], kinds: Iterable[str] = KINDS) -> str:
    """`+din+quick+num_meta-4+s2`: what of these kinds is not the default.

    Up to three keys of `ARGS` are spelled out; more are a digest, so that a name fits a line.
    """
    chosen = [part for part in parts if part.kind in set(kinds)]
    spelled = [(KINDS.index(part.kind), part.text) for part in chosen if part.kind not in DIGESTED]
    for kind in DIGESTED:
        keys = sorted(part.text for part in chosen if part.kind == kind)
        if len(keys) > SPELLED:
            keys = [f"{kind}-{digest(keys)[:8]}"]
        spelled += [(KINDS.index(kind), text) for text in keys]
    words = [f"s{text}" if KINDS[place] == "seed" else text for place, text in sorted(spelled)]
    return "".join(f"+{word}" for word in words)


def of_arguments(values: Mapping[str, Any], kind: str = "args") -> set[NamePart]:
    """Name parts of keys that were given another value than they would have had: `lr-0.001`.

    Args:
        values: dotted key -> its value.
        kind: of the parts.
    """
    return {NamePart(kind, f"{short(key)}-{_spelled(value)}") for key, value in values.items()}


def _spelled(value: Any) -> str:
    """A value within a folder's name: itself where it can stand there, else a digest of it."""
    if isinstance(value, float):
        text = f"{value:g}"
    elif isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, list) and all(isinstance(part, str | int) for part in value):
        text = ",".join(map(str, value))
    else:
        text = str(value)
    return text if re.fullmatch(r"[\w.,-]{1,24}", text) else digest(value)[:8]
