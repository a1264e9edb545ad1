"""The makefile of a plan: what Make follows."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from recllm import paths
from recllm.config.schema import EXECUTION, Config
from recllm.files import digest, write_text
from recllm.pipeline.graph import ALL_DATA, Plan
from recllm.pipeline.node import Node
from recllm.pipeline.stages import ENDS_WITH_TABLE

SHOWN = "shown.txt"
"""Which evaluations the table shows: it is made anew where another command asks for others."""


def write(plan: Plan) -> Path:
    """Write changed `config.yaml` files and the rules; returns the rules' path."""
    for node in plan.needed():
        _write_changed(plan.root / node.folder / paths.CONFIG, node.file.text())
    evaluations = "".join(f"{node.folder}\n" for node in plan.goals["evaluate"])
    _write_changed(plan.root / SHOWN, evaluations)
    text = rules(plan)
    path = plan.root / "plans" / f"{digest(text)[:8]}.mk"  # two commands side by side follow each its own
    write_text(path, text)
    return path


def _write_changed(path: Path, text: str) -> None:
    """Write a file only where its content changes: Make compares times."""
    if not path.exists() or path.read_text() != text:
        write_text(path, text)


def rules(plan: Plan) -> str:
    """The makefile of a plan: a folder's manifest depends on its `config.yaml` and its parents' manifests."""
    trainer = dataclasses.asdict(plan.configured.trainer)  # how, not what
    default = dataclasses.asdict(Config().trainer)
    execution = " ".join(
        f"{EXECUTION}.{key}={value}" for key, value in trainer.items() if value != default[key]
    )
    lines = ["# Written by stages/plan.py; read by the Makefile.", f"EXECUTION := {execution}"]
    if plan.configured.trainer.processes > 1:  # one stage has them all
        lines.append(".NOTPARALLEL:")
    lines += [line for goal in plan.request.goals for line in _goal(plan, goal)]
    lines += _table(plan)
    needed = plan.needed()
    above = ancestors(needed)
    later = {node.folder: [lm for lm in needed if comes_later(node, lm, above)] for node in needed}
    for name, lms in later.items():
        above[name].update(*(above[lm.folder] | {lm.folder} for lm in lms))
    for node in needed:
        # By the plan alone: what is done already must not change the numbers of the rest.
        related = {other for other in above if other in above[node.folder] or node.folder in above[other]}
        alone = len(related) == len(needed) - 1
        lines += _rule(plan, node, later[node.folder], alone)
    return "\n".join(lines) + "\n"


def _goal(plan: Plan, goal: str) -> list[str]:
    """A goal and what it asks for."""
    targets = [target(plan, node) for node in plan.goals[goal]]
    if goal in ENDS_WITH_TABLE:
        targets = [str(plan.root / paths.RESULTS)]
    return [f".PHONY: {goal}", f"{goal}: {' '.join(targets)}"]


def _table(plan: Plan) -> list[str]:
    """The table and the report of all evaluations together."""
    evaluated = " ".join(str(plan.manifest(node)) for node in plan.goals["evaluate"])
    folders = " ".join(node.folder for node in plan.goals["evaluate"])
    return [
        f"{plan.root / paths.RESULTS}: {plan.root / SHOWN} {evaluated}",
        f"\t@$(PYTHON) -m stages.report show {plan.root} {folders}",
    ]


def _rule(plan: Plan, node: Node, later: Sequence[Node], alone: bool) -> list[str]:
    """How a folder is made.

    Args:
        plan: the plan.
        node: the folder.
        later: LMs in training that it waits for without reading them.
        alone: whether nothing can run beside it, so that it has all cores.
    """
    folder = plan.root / node.folder
    parents = " ".join(str(plan.manifest(parent)) for parent in node.above)
    order = "".join(f" {plan.manifest(lm)}" for lm in later)
    threads = "" if alone else "$(SHARE) "
    raw = ""
    if node.stage.name == "tables" and plan.request.raw:
        raw = " " + shlex.quote(f"raw={plan.request.raw}").replace("$", "$$")
    lines = [f".PHONY: {folder}"] if node.stage.shared else []
    return [
        *lines,
        f"{target(plan, node)}: {folder / paths.CONFIG} {parents}{' |' if order else ''}{order}",
        f"\t@{threads}$(PYTHON) -m stages {folder} $(EXECUTION){raw}",
    ]


def ancestors(needed: Sequence[Node]) -> dict[str, set[str]]:
    """Folder of each node -> folders of all that lead to it."""
    above: dict[str, set[str]] = {}
    for node in needed:  # parents first
        parents = {parent.folder for parent in node.above}
        above[node.folder] = parents.union(*(above[folder] for folder in parents))
    return above


def comes_later(node: Node, lm: Node, above: dict[str, set[str]]) -> bool:
    """Whether a stage that neither leads to an LM in training nor needs it waits for it all the same.

    What is made from all data comes behind the rest: nothing of the rest waits for its LM, or each would wait
    for the other's.
    """
    if ALL_DATA in lm.name_parts and ALL_DATA not in node.name_parts:
        return False
    apart = node.folder not in above[lm.folder] and lm.folder not in above[node.folder]
    return apart and lm.stage.trains_lm and not node.stage.trains_lm


def target(plan: Plan, node: Node) -> str:
    """What Make sees of a node: its manifest; of a study, which has no end, the folder."""
    return str(plan.root / node.folder if node.stage.shared else plan.manifest(node))
