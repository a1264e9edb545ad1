"""How long stages are expected to take, by what finished ones of their kind took on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recllm import paths
from recllm.console import duration
from recllm.files import write_json
from recllm.pipeline.graph import Plan
from recllm.pipeline.manifest import processor
from recllm.pipeline.node import Node
from recllm.pipeline.stage_file import Role
from recllm.pipeline.workload import Workload, workload


@dataclass(frozen=True)
class Expected:
    """A stage that a command will run.

    Attributes:
        folder: within `artifacts/<dataset>`.
        seconds: about how long it takes; None: nothing of its kind has run here yet.
    """

    folder: str
    seconds: float | None


def rates(artifacts: Path) -> dict[str, float]:
    """Seconds a unit of work of each kind of stage, by the last one that finished on a processor like this.

    Args:
        artifacts: the folder of all data sets' artifacts.
    """
    here = processor()
    latest: dict[str, tuple[str, float]] = {}
    for path in artifacts.rglob(paths.MANIFEST):
        manifest = json.loads(path.read_text())
        amount = manifest.get("amount", 0)
        if not amount or not manifest["hardware"].startswith(here):
            continue
        entry = (manifest["finished"], manifest["seconds"] / amount)
        latest[manifest["kind"]] = max(latest.get(manifest["kind"], entry), entry)
    return {kind: seconds for kind, (_, seconds) in latest.items()}


def ahead(plan: Plan) -> tuple[list[Expected], int]:
    """Stages that are not done, in an order in which they can run; and how many are done."""
    states = plan.states()
    figures = {node.folder: manifest.metrics for node, _, manifest in states if manifest is not None}
    open_nodes = [node for node, state, _ in states if state != "done"]
    measured = rates(plan.root.parent) if open_nodes else {}
    expected = []
    for node in open_nodes:
        work = _workload(node, figures)
        rate = measured.get(work.kind) if work else None
        expected.append(Expected(node.folder, None if rate is None or work is None else rate * work.amount))
    return expected, len(states) - len(open_nodes)


def _workload(node: Node, figures: Mapping[str, Mapping[str, Any]]) -> Workload | None:
    """What a node has to do; None where its log is not made yet, so that nobody knows its rows.

    Args:
        node: the folder.
        figures: folder of each stage that was finished once -> the figures of its manifest.
    """
    log = node.parents.get(Role.LOG, node)
    if log.folder not in figures:
        return None
    return workload(node.stage.name, node.config, figures[log.folder], node.systems)


def keep(rules: Path, expected: Iterable[Expected]) -> None:
    """Write what a command will run beside the rules that it follows: folder -> seconds, null if unknown."""
    write_json(rules.with_suffix(".json"), {stage.folder: stage.seconds for stage in expected})


def kept(rules: Path) -> list[Expected]:
    """What `keep` has written."""
    stages = json.loads(rules.with_suffix(".json").read_text())
    return [Expected(folder, seconds) for folder, seconds in stages.items()]


def told(expected: Iterable[Expected], done: int) -> list[str]:
    """The lines that tell what will run: each stage with its time, and the sum of what is known."""
    stages = list(expected)
    if not stages:
        return []
    width = max(len(stage.folder) for stage in stages)
    lines = [
        f"  {stage.folder:<{width}}  {'?' if stage.seconds is None else 'about ' + duration(stage.seconds)}"
        for stage in stages
    ]
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    total = f", about {duration(sum(known))} one after another" if known else ""
    unknown = len(stages) - len(known)
    if known and unknown:
        total += f" and {unknown} of which nothing like it has run here yet"
    return [f"{len(stages)} stages to run, {done} are done{total}", *lines]
