"""The makefile of a plan: what Make follows."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from recllm import paths
from recllm.config.merge import merge
from recllm.config.schema import EXECUTION, Config
from recllm.files import digest, replace_text
from recllm.pipeline.graph import Node, Plan
from recllm.pipeline.stages import ENDS_WITH_TABLE, SHARED

SHOWN = "shown.txt"

ALONE = ("lm-text", "lm-prompts", "encoder")
"""Stages that only their like run beside: an LM in training uses all cores well, small models do not."""


def write(plan: Plan) -> Path:
    """Write changed `config.yaml` files and the rules; returns the rules' path."""
    for node in plan.needed():
        path = plan.root / node.folder / paths.CONFIG
        text = OmegaConf.to_yaml(OmegaConf.create(node.content))
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    shown = plan.root / SHOWN
    names = "\n".join(node.folder for node in plan.goals["evaluate"]) + "\n"
    if not shown.exists() or shown.read_text() != names:
        shown.write_text(names)
    text = rules(plan)
    path = plan.root / "plans" / f"{digest(text)[:8]}.mk"  # two commands side by side follow each its own
    path.parent.mkdir(exist_ok=True)
    replace_text(path, text)
    return path


def rules(plan: Plan) -> str:
    """The makefile of a plan: a folder's manifest depends on its `config.yaml` and its parents' manifests."""
    trainer = {key: value for key, value in plan.request.overrides.items() if key.startswith(EXECUTION)}
    base = dataclasses.asdict(merge(plan.layers(), trainer))[EXECUTION]
    default = dataclasses.asdict(Config())[EXECUTION]
    execution = " ".join(f"{EXECUTION}.{key}={value}" for key, value in base.items() if value != default[key])
    lines = ["# Written by stages/plan.py; read by the Makefile.", f"EXECUTION := {execution}"]
    if base["devices"] > 1:  # one stage has them all
        lines.append(".NOTPARALLEL:")
    for goal in plan.request.goals:
        targets = [target(plan, node) for node in plan.goals[goal]]
        if goal in ENDS_WITH_TABLE:
            targets = [str(plan.root / paths.RESULTS)]
        lines += [f".PHONY: {goal}", f"{goal}: {' '.join(targets)}"]
    evaluated = " ".join(str(plan.manifest(node)) for node in plan.goals["evaluate"])
    folders = " ".join(node.folder for node in plan.goals["evaluate"])
    lines += [
        f"{plan.root / paths.RESULTS}: {plan.root / SHOWN} {evaluated}",
        f"\t@$(PYTHON) -m stages.report show {plan.root} {folders}",
    ]
    needed = plan.needed()
    above = ancestors(needed)
    later = {node.folder: [lm for lm in needed if comes_later(node, lm, above)] for node in needed}
    for name, lms in later.items():
        above[name].update(*(above[lm.folder] | {lm.folder} for lm in lms))
    for node in needed:
        folder = plan.root / node.folder
        # By the plan alone: what is done already must not change the numbers of the rest.
        related = {other for other in above if other in above[node.folder] or node.folder in above[other]}
        threads = "" if len(related) == len(needed) - 1 else "$(SHARE) "
        parents = " ".join(str(plan.manifest(parent)) for parent in node.parents.values())
        order = "".join(f" {plan.manifest(lm)}" for lm in later[node.folder])
        raw = ""
        if node.stage == "tables" and plan.request.raw:
            raw = " " + shlex.quote(f"raw={plan.request.raw}").replace("$", "$$")
        lines += [f".PHONY: {folder}"] if node.stage in SHARED else []
        lines += [
            f"{target(plan, node)}: {folder / paths.CONFIG} {parents}{' |' if order else ''}{order}",
            f"\t@{threads}$(PYTHON) -m {node.command} {folder} $(EXECUTION){raw}",
        ]
    return "\n".join(lines) + "\n"


def ancestors(needed: Sequence[Node]) -> dict[str, set[str]]:
    """Folder of each node -> folders of all that lead to it."""
    above: dict[str, set[str]] = {}
    for node in needed:  # parents first
        parents = {parent.folder for parent in node.parents.values()}
        above[node.folder] = parents.union(*(above[folder] for folder in parents))
    return above


def comes_later(node: Node, lm: Node, above: dict[str, set[str]]) -> bool:
    """Whether a stage that neither leads to an LM in training nor needs it waits for it all the same."""
    apart = node.folder not in above[lm.folder] and lm.folder not in above[node.folder]
    return apart and lm.stage in ALONE and node.stage not in ALONE


def target(plan: Plan, node: Node) -> str:
    """What Make sees of a node: its manifest; of a study, which has no end, the folder."""
    return str(plan.root / node.folder if node.stage in SHARED else plan.manifest(node))
