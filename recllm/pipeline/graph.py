"""The DAG: which folders the asked-for systems need, their configuration, and whether they are up to date.

tables -> log -> lm text -> neighbors -> lm prompts -> stage2 -> stage3
           |                    |                         ^         |
           +--------------------+--> stage1 --------------+         v
                                        +----------------------> evaluate -> report

A CRM has the neighbors as a parent only where it reads them: all others depend on the log alone. Stage 2
with two towers depends on neither LM, neighbors nor CRM: log -> encoder -> stage2.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from pathlib import Path
from typing import Any

from recllm import paths
from recllm.config.merge import load_yaml, merge, parse_overrides
from recllm.config.request import ALIGNED, GATE, GOALS, START, Request, choice
from recllm.config.schema import Config, check_own
from recllm.config.sweep import SweepValue, covering, fewest
from recllm.crm.config import CrmConfig
from recllm.errors import ConfigError
from recllm.files import digest
from recllm.pipeline.finished import config_digest, read_config
from recllm.pipeline.manifest import Manifest
from recllm.pipeline.node import Node, suffix
from recllm.pipeline.stages import ENDS_WITH_TABLE, GOAL_OF, READS, UNREAD
from recllm.tables.config import SourceConfig

VECTORS = "both"


class Plan:
    """All nodes that a request needs, parents before children."""

    def __init__(self, request: Request) -> None:
        """Resolve and validate everything; nothing is written yet."""
        self.request = request
        self.root = paths.artifacts() / request.dataset
        self.nodes: dict[str, Node] = {}
        self.goals: dict[str, list[Node]] = {goal: [] for goal in GOALS}
        self.conf = paths.repository() / "conf"
        self.read = functools.cache(load_yaml)  # most files say something of many folders
        self.experiment = (
            self.read(self.conf / "experiment" / f"{request.experiment}.yaml") if request.experiment else {}
        )
        self._build()

    def layers(self, *files: str) -> list[tuple[str, dict[str, Any]]]:
        """What is merged over the schema, weakest first: (source, content) of each YAML file.

        A choice's `stage1/din.yaml` may have a `stage1/<dataset>/din.yaml` beside it, which wins over it.
        """
        request = self.request
        dataset = f"dataset/{request.dataset}.yaml"
        layers = [(f"conf/{dataset}", self.read(self.conf / dataset))]
        lm_file = self.conf / "lm" / f"{request.lm}.yaml"
        if lm_file.exists():
            layers.append((f"conf/lm/{request.lm}.yaml", self.read(lm_file)))
        else:
            layers.append((f"LM={request.lm}", {"lm": {"model": {"name": self.lm_name, "path": request.lm}}}))
        for file in files:
            stage, choice = file.split("/")
            own = f"{stage}/{request.dataset}/{choice}"
            names = [file, own] if (self.conf / own).exists() else [file]
            layers += [(f"conf/{name}", self.read(self.conf / name)) for name in names]
        return [*layers, (f"conf/experiment/{request.experiment}.yaml", self.experiment)]

    @property
    def lm_name(self) -> str:
        """Folder name of the LM: its file in conf/lm, or the end of its path and a digest of the whole."""
        lm = self.request.lm
        if (self.conf / "lm" / f"{lm}.yaml").exists():
            return lm
        whole = str(Path(lm).resolve()) if Path(lm).exists() else lm
        return f"{Path(lm).name}-{digest(whole)[:4]}"

    def _node(
        self,
        stage: str,
        name: str,
        command: str,
        parents: dict[str, Node],
        files: tuple[str, ...] = (),
        seed: int = 0,
        tags: tuple[str, ...] = (),
        settings: dict[str, Any] | None = None,
        point: SweepValue | None = None,
    ) -> Node:
        """Resolve one folder; the same folder asked for twice is the same node.

        A sweep's point is set, and named, where the stage reads its key; children inherit the name.
        """
        request, reads = self.request, READS[stage]
        inherited = {tag for parent in parents.values() for tag in parent.tags}
        own = {f"experiment:{request.experiment}"} if set(self.experiment) & set(reads) else set()
        own |= {f"seed:{seed}"} if "seed" in reads and seed else set()
        set_here = point.settings(reads) if point else {}
        own |= {f"point:{point.tag}"} if point and set_here else set()
        all_tags = frozenset(inherited | own | set(tags))
        folder = name + suffix(all_tags, skip=tags if stage in ("lm-text", "lm-prompts", "neighbors") else ())
        if stage in ("lm-text", "lm-prompts"):
            folder += "/" + stage.removeprefix("lm-")
        if folder in self.nodes:
            return self.nodes[folder]
        unread = UNREAD.get(stage, ())
        given = {
            key: value
            for key, value in request.overrides.items()
            if not any(f"{key}.".startswith(f"{name}.") for name in unread)
        }
        overrides = {key: value for key, value in given.items() if key.split(".")[0] in reads}
        overrides = {**self._held(stage, folder), **overrides}
        config = merge(self.layers(*files), {**overrides, **(settings or {}), **set_here, "seed": seed})
        resolved = dataclasses.asdict(config)
        sections = {section: resolved[section] for section in reads}
        for key in unread:
            *above, name = key.split(".")
            del functools.reduce(operator.getitem, above, sections)[name]
        if config.source == SourceConfig():  # says nothing: a recipe that needs none knows no such section
            sections.pop("source", None)
        at = point if point and f"point:{point.tag}" in all_tags else None
        node = Node(stage, request.dataset, folder, command, parents, sections, overrides, all_tags, at)
        self.nodes[folder] = node
        return node

    def _held(self, stage: str, folder: str) -> dict[str, Any]:
        """Overrides that a finished stage was made with; they hold unless the stage itself is a goal."""
        done = (self.root / folder / paths.MANIFEST).exists()
        goals = {*self.request.goals}
        goals |= {"evaluate"} if goals & set(ENDS_WITH_TABLE) else set()
        if GOAL_OF.get(stage, stage) in goals or not done or not (self.root / folder / paths.CONFIG).exists():
            return {}
        return dict(read_config(self.root / folder)["overrides"])

    def _build(self) -> None:
        request = self.request
        tables = self._node("tables", "tables", f"data.{self._recipe()}.recipe", {})
        log = self._node("log", "log", "stages.prepare", {"tables": tables})
        lm_tag = (f"lm:{self.lm_name}",) if self.lm_name != "tiny" else ()
        text = self._node("lm-text", f"lm/{self.lm_name}", "stages.lm", {"log": log}, tags=lm_tag)
        vectors = self._configured().retrieval.vectors
        tag = (f"vectors:{vectors}-vectors",) if vectors != VECTORS else ()
        parents = {"log": log, "lm": text}
        neighbors = self._node("neighbors", f"neighbors/{vectors}", "stages.retrieve", parents, tags=tag)
        trained = text.config["lm"]["model"]["path"] is None
        lm = self._trained(log, text, neighbors, lm_tag) if trained else text
        self.goals["prepare"].append(log)
        self.goals["describe"].append(log)
        for seed in request.seeds:
            for point in request.points or (None,):
                self._systems(seed, log, neighbors, lm, point)

    def _trained(self, log: Node, text: Node, neighbors: Node, tags: tuple[str, ...]) -> Node:
        """The LM after its second phase.

        In a sweep over subsamples all points share an LM of their own: it has read the answers of the
        smallest subsample only, each once a pass, else the others' would teach the small ones. An LM that
        holds out every point's rows has read none of them, and serves as it is.
        """
        name, settings = f"lm/{self.lm_name}", {}
        few, held = fewest(self.request.points), text.config["lm"]["training"]["hold_out"]
        if few and covering(self.request.points, held) != held:
            name += f"+answers-{few}"
            settings = {**text.overrides, "subsample": few, "lm.training.question_share": 0.0}
            text = self._node("lm-text", name, "stages.lm", {"log": log}, tags=tags, settings=settings)
        parents = {"log": log, "lm": text, "neighbors": neighbors}
        return self._node("lm-prompts", name, "stages.lm", parents, tags=tags, settings=settings)

    def _recipe(self) -> str:
        """Name of the folder in `data/` whose recipe writes the tables."""
        name, config = self.request.dataset, self._configured()
        if config.source.given:
            check_own(config)
            return paths.OWN
        recipe = paths.recipe_folder(name)
        if recipe == paths.OWN or not (paths.repository() / "data" / recipe / "recipe.py").exists():
            raise ConfigError(
                f"DATASET={name} has no data/{recipe}/recipe.py of its own and no source.events.path in "
                f"conf/dataset/{name}.yaml; wanted one of the two: docs/own-data.md tells how"
            )
        return recipe

    def _systems(self, seed: int, log: Node, neighbors: Node, lm: Node, point: SweepValue | None) -> None:
        """CRMs, systems and evaluation of a seed; at a point of a sweep stage 2 and what gates it only."""
        request = self.request
        data = {"log": log, "neighbors": neighbors}
        ranks = request.systems and self._configured().evaluate.candidates
        named = (*request.crms, "ranker") if ranks else request.crms
        if point:
            named = (request.gate,)
        crms = {crm: self._crm(crm, seed, log, neighbors, point) for crm in dict.fromkeys(named)}
        gate = crms[request.gate]
        self.goals["stage1"] += [node for crm, node in crms.items() if crm in request.crms]
        if "tune" in request.goals:
            self.goals["tune"] += [self._tuned(crm, crms[crm], seed) for crm in request.crms]
        if not request.systems:
            self._alone(crms, gate, seed, neighbors)
            return
        gate_tag = (f"crm:{request.gate}",) if request.gate != GATE else ()
        tuned: dict[str, Node] = {}
        towers: dict[str, Node] = {}
        shown = dict(crms)
        for system in self._tuned_systems(point is not None):
            file = f"stage2/{system}.yaml"
            if self._has_towers(system):
                encoder = self._node("encoder", "encoder", "stages.encoder", {"log": log})
                parents = {"log": log, "encoder": encoder}
                name = f"stage2/{system}"
                towers[system] = self._node(
                    "towers", name, "stages.towers", parents, (file,), seed, point=point
                )
                continue
            parents = {**data, "lm": lm, "stage1": gate}
            name, command = f"stage2/{system}", "stages.stage2"
            node = self._node("stage2", name, command, parents, (file,), seed, gate_tag, point=point)
            if node.config["stage2"]["representation"] == "out_of_fold":
                rows = node.config["subsample"]
                if fewest(request.points):  # they nest: one CRM that leaves out the largest serves all points
                    rows = covering(request.points, self._configured().subsample)
                own = self._held_out(gate, rows, seed, point)
                shown |= {f"{request.gate}-heldout": own} if own is not gate else {}
                node = dataclasses.replace(node, parents={**parents, "stage1": own})
                self.nodes[node.folder] = node
            tuned[system] = node
        aligned = {}
        for system in [] if point else self._of("stage3"):
            file = f"stage3/{system}.yaml"
            start = self._start(file)
            parents = {**data, "lm": lm, "stage1": tuned[start].parents["stage1"], "stage2": tuned[start]}
            tags = (*gate_tag, f"start:{start}") if start != START else gate_tag
            name, command = f"stage3/{system}", "stages.stage3"
            aligned[system] = self._node("stage3", name, command, parents, (file,), seed, tags)
        roles = {f"crm:{name}": node for name, node in shown.items()}
        roles |= {f"tuned:{name}": node for name, node in tuned.items()}
        roles |= {f"towers:{name}": node for name, node in towers.items()}
        roles |= {f"aligned:{name}": node for name, node in aligned.items()}
        start = next(iter(tuned)) if point else self._start()
        parents = {**data, "lm": lm, "stage1": gate, "stage2": tuned[start], **roles}
        asked = ",".join(dict.fromkeys(request.crms + request.systems)) if self._is_special() else "all"
        name = f"evaluate/{','.join((*tuned, *towers)) if point else asked}"
        settings: dict[str, Any] = {"evaluate.candidates": []} if point else {}
        evaluate = self._node(
            "evaluate", name, "stages.evaluate", parents, (), seed, gate_tag, settings, point
        )
        self.goals["stage2"] += [*tuned.values(), *towers.values()]
        self.goals["stage3"] += aligned.values()
        self.goals["evaluate"].append(evaluate)

    def _alone(self, crms: dict[str, Node], gate: Node, seed: int, neighbors: Node) -> None:
        """An evaluation of CRMs without any LM: what they read is a parent besides, and hard candidates."""
        read = {role: parent for crm in crms.values() for role, parent in crm.parents.items()}
        if any(kind.startswith("hard") for kind in self._configured().evaluate.candidates):
            read["neighbors"] = neighbors
        parents = {**read, "stage1": gate, **{f"crm:{name}": node for name, node in crms.items()}}
        name = f"evaluate/{','.join(crms)}"
        self.goals["evaluate"].append(self._node("evaluate", name, "stages.evaluate", parents, (), seed))

    def _crm(self, crm: str, seed: int, log: Node, neighbors: Node, point: SweepValue | None) -> Node:
        """A CRM reads the neighbors, and so depends on the LM, only where its configuration says so."""
        name, command, files = f"stage1/{crm}", "stages.stage1", (f"stage1/{crm}.yaml",)
        node = self._node("stage1", name, command, {"log": log}, files, seed, point=point)
        if CrmConfig(**node.config["stage1"]["crm"]).search != "semantic":
            return node
        del self.nodes[node.folder]  # with the neighbors as parent its name says the LM too
        parents = {"log": log, "neighbors": neighbors}
        return self._node("stage1", name, command, parents, files, seed, point=point)

    def _tuned(self, crm: str, node: Node, seed: int) -> Node:
        """The study of a CRM's settings: what the CRM depends on, and the space."""
        file = f"stage1/{crm}.yaml"
        tuned = self._node("tune", f"tune/{crm}", node.command, node.parents, (file,), seed)
        for searched in tuned.config["tune"]["space"]:
            parse_overrides([f"{searched['key']}=0"], "tune.space")
            if not searched["key"].startswith("stage1."):
                raise ConfigError(f"{searched['key']} (tune.space) is no key of stage1")
        return tuned

    def _held_out(self, gate: Node, rows: str, seed: int, point: SweepValue | None) -> Node:
        """The gate's CRM with the same settings, trained without the samples that stage 2 tunes on.

        Its folder names the rows, so that two subsamples never share one. Where `stage1.hold_out` is given,
        every CRM leaves those rows out, and stage 2 checks that they cover its own.
        """
        if gate.config["stage1"]["hold_out"] != "none":
            return gate
        crm = self.request.gate
        name, files = f"stage1/{crm}+heldout-{rows}", (f"stage1/{crm}.yaml",)
        settings = {**gate.overrides, "stage1.hold_out": rows}
        return self._node(
            "stage1", name, gate.command, gate.parents, files, seed, settings=settings, point=point
        )

    def _configured(self) -> Config:
        """The configuration without any system's file."""
        return merge(self.layers(), self.request.overrides)

    def _has_towers(self, system: str) -> bool:
        """Whether a system of stage 2 is two towers, not an LM with an adapter."""
        return "towers" in self.read(self.conf / "stage2" / f"{system}.yaml")

    def _start(self, *files: str) -> str:
        """The stage-2 system that a stage 3 starts from; without files the one that the table calls `sft`."""
        start = merge(self.layers(*files), self.request.overrides).stage3.start
        choice("stage3.start", start, self.conf / "stage2")
        if self._has_towers(start):
            raise ConfigError(
                f"stage3.start={start} has no LM to align; wanted a system with one, e.g. reclora"
            )
        return start

    def _of(self, room: str) -> list[str]:
        """The asked-for systems that have a file in a room of `conf`."""
        return [name for name in self.request.systems if (self.conf / room / f"{name}.yaml").exists()]

    def _tuned_systems(self, alone: bool) -> list[str]:
        """Systems of stage 2: the asked-for ones and, but `alone`, those that stage 3 starts from."""
        asked = self._of("stage2")
        if not alone:
            asked += [self._start(f"stage3/{name}.yaml") for name in self._of("stage3")] + [self._start()]
        elif all(map(self._has_towers, asked)):
            raise ConfigError(f"SYSTEM={' '.join(asked)} has no LM to sweep; wanted one that has")
        return list(dict.fromkeys(asked))

    def _is_special(self) -> bool:
        return (self.request.crms, self.request.systems) != (("din", GATE), ("lora", "reclora", *ALIGNED))

    def needed(self) -> list[Node]:
        """The goals' nodes and all their ancestors, parents first."""
        found: dict[str, Node] = {}

        def visit(node: Node) -> None:
            for parent in node.parents.values():
                visit(parent)
            found.setdefault(node.folder, node)

        for goal in self.request.goals:
            for node in (*self.goals[goal], *(self.goals["evaluate"] if goal in ENDS_WITH_TABLE else ())):
                visit(node)
        return list(found.values())

    def manifest(self, node: Node) -> Path:
        """Path of a node's manifest: the target that Make sees."""
        return self.root / node.folder / paths.MANIFEST

    def states(self) -> list[tuple[Node, str, Manifest | None]]:
        """Each needed node with `done`, `stale` or `missing`, and its manifest if there is one."""
        found: dict[str, tuple[Node, str, Manifest | None]] = {}
        for node in self.needed():
            if not self.manifest(node).exists():
                started = (self.root / node.folder / paths.CHECKPOINTS / paths.LAST).exists()
                found[node.folder] = (node, "interrupted" if started else "missing", None)
                continue
            manifest = Manifest.read(self.root / node.folder)
            parents = {parent.folder: found[parent.folder] for parent in node.parents.values()}
            fresh = manifest.config_sha256 == config_digest(node.content) and all(
                state == "done" and parent is not None and manifest.parents.get(folder) == parent.identity
                for folder, (_, state, parent) in parents.items()
            )
            found[node.folder] = (node, "done" if fresh else "stale", manifest)
        return list(found.values())
