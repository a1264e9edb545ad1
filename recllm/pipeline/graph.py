"""The DAG: which folders the asked-for systems need, their configuration, and whether they are up to date.

tables -> log -> lm text -> neighbors -> lm prompts -> stage2 -> stage3
           |                    |                         ^         |
           +--------------------+--> stage1 --------------+         v
                                        +----------------------> evaluate -> report

With `ALL_DATA=1` all of it stands there once more, from a log that holds nothing out; what is trained there
has its like of the plain graph as a parent, which says how long (`Role.CHOSEN`).

A CRM has the neighbors as a parent only where it reads them: all others depend on the log alone. Stage 2
with two towers depends on neither LM, neighbors nor CRM: log -> encoder -> stage2.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recllm import paths
from recllm.config.merge import keys, load_yaml, merge, parse_overrides, value_at
from recllm.config.request import ALIGNED, GATE, GOALS, START, Request, choice
from recllm.config.schema import Config, check_own
from recllm.config.sweep import SweepValue, covering, fewest
from recllm.crm.config import CrmConfig
from recllm.errors import ConfigError, StageError
from recllm.eventlog.names import RowSet
from recllm.files import digest
from recllm.pipeline.manifest import Manifest
from recllm.pipeline.node import NamePart, Node, of_arguments, suffix
from recllm.pipeline.stage_file import LAYOUT, Group, Role, older
from recllm.pipeline.stages import ENDS_WITH_TABLE, REPEATED, STAGES, Stage
from recllm.tables.config import SourceConfig

VECTORS = "both"
"""Default of `retrieval.vectors`."""
RETRIEVER_MODULE = "stages.retriever"
"""What trains a CRM to find the next item."""
ALL_DATA = NamePart("data", "all-data")
"""What the names of stages say that are made from the samples of all splits."""
NAMED_OTHERWISE = ("retrieval.vectors", "stage3.start")
"""Keys that a folder's name says in words of its own, however they were given."""


class Plan:
    """All nodes that a request needs, parents before children."""

    def __init__(self, request: Request) -> None:
        """Resolve and validate everything; nothing is written yet.

        Raises:
            ConfigError: a key, value or name that cannot be used.
            StageError: the data set's artifacts are of another layout.
        """
        self.request = request
        self.root = paths.artifacts() / request.dataset
        self.nodes: dict[str, Node] = {}
        self.goals: dict[str, list[Node]] = {goal: [] for goal in GOALS}
        self.conf = paths.repository() / "conf"
        self.read = functools.cache(load_yaml)  # most files say something of many folders
        self.experiment: dict[str, Any] = {}
        if request.experiment:
            self.experiment = self.read(self.conf / "experiment" / f"{request.experiment}.yaml")
        self._check_layout()
        self._build()

    # ---- the configuration of a folder

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

    @functools.cached_property
    def configured(self) -> Config:
        """The configuration without any system's file."""
        return merge(self.layers(), self.request.overrides)

    # ---- one folder

    def _node(
        self,
        stage: Stage,
        name: str,
        parents: dict[Role, Node],
        *,
        files: tuple[str, ...] = (),
        seed: int = 0,
        parts: Iterable[NamePart] = (),
        settings: Mapping[str, Any] | None = None,
        sweep: SweepValue | None = None,
        systems: dict[Group, dict[str, Node]] | None = None,
        module: str = "",
        within: str = "",
    ) -> Node:
        """Resolve one folder; the same folder asked for twice is the same node.

        Args:
            stage: what makes it.
            name: the folder, without what is not the default.
            parents: role -> node.
            files: of `conf`, merged over those that all stages share.
            seed: of `SEED=`.
            parts: what of this choice is not the default; folders of whatever is made from it say it too.
            settings: dotted keys that the plan itself sets; the folder's name says them already.
            sweep: a value of a sweep, which is set, and named, where the stage reads its key.
            systems: further parents of an evaluation.
            module: what runs the stage, where the table of stages does not say.
            within: folder below the one that says what is not the default.
        """
        settings = dict(settings or {})
        if sweep and stage.reached_by(sweep.key):
            settings[sweep.key] = sweep.value
        given = {key: value for key, value in self.request.overrides.items() if stage.reached_by(key)}
        sections, changed = self._sections(stage, files, given, {**settings, "seed": seed})
        above = [*parents.values(), *(node for group in (systems or {}).values() for node in group.values())]
        inherited = {part for parent in above for part in parent.name_parts}
        measures = {key: value for key, value in changed.items() if key.startswith("evaluate.")}
        others = {key: value for key, value in changed.items() if key not in measures}
        own = set(parts) | of_arguments(others) | of_arguments(measures, "measure")
        if any(stage.reached_by(key) for key in keys(self.experiment)):
            own.add(NamePart("experiment", self.request.experiment))
        if stage.seeded and seed:
            own.add(NamePart("seed", str(seed)))
        if sweep and sweep.key in settings:
            own.add(NamePart("sweep", sweep.tag))
        all_parts = frozenset(inherited | own)
        # What the name itself says is said once: `lm/smollm2-135m`, but `neighbors/both+smollm2-135m`.
        in_name = set(parts) if stage.folder in ("lm", "neighbors") else set()
        folder = name + suffix(all_parts - in_name) + (f"/{within}" if within else "")
        if folder in self.nodes:
            return self.nodes[folder]
        if ALL_DATA in all_parts and stage.name in REPEATED:
            chosen = name + suffix(all_parts - in_name - {ALL_DATA}) + (f"/{within}" if within else "")
            if chosen in self.nodes:  # not while it is only looked at: see `_crm`
                parents = {**parents, Role.CHOSEN: self.nodes[chosen]}
        swept = sweep and NamePart("sweep", sweep.tag) in all_parts
        node = Node(
            stage=stage,
            dataset=self.request.dataset,
            folder=folder,
            module=module or stage.module,
            parents=parents,
            config=sections,
            name_parts=all_parts,
            sweep=sweep if swept else None,
            systems=systems or {},
        )
        self.nodes[folder] = node
        return node

    def _sections(
        self, stage: Stage, files: tuple[str, ...], given: dict[str, Any], settings: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What reaches a stage, and which given keys have another value there than without being given.

        Returns:
            The sections as plain values, without keys that do not reach the stage; and dotted key -> value.
        """
        layers = self.layers(*files)
        resolved = dataclasses.asdict(merge(layers, {**given, **settings}))
        changed = {}
        if given:
            plain = dataclasses.asdict(merge(layers, settings))
            named = [key for key in given if key not in settings and key not in NAMED_OTHERWISE]
            changed = {
                key: value_at(resolved, key)
                for key in named
                if value_at(resolved, key) != value_at(plain, key)
            }
        sections = {section: resolved[section] for section in stage.sections}
        for key in stage.unread:
            above, _, last = key.rpartition(".")
            del value_at(sections, above)[last]
        if "source" in sections and self.configured.source == SourceConfig():
            del sections["source"]  # it says nothing: a recipe that needs none knows no such section
        if "source" in sections and not self.configured.source.events.store:
            del sections["source"]["events"]["store"]  # folders from before there was the key stay
        return sections, changed

    # ---- all folders

    def _build(self) -> None:
        request = self.request
        recipe = f"data.{self._recipe()}.recipe"
        tables = self._node(STAGES["tables"], "tables", {}, module=recipe)
        log = self._node(STAGES["log"], "log", {Role.TABLES: tables})
        text = self._text(log)
        neighbors = self._neighbors(log, text)
        trained = text.stage.name == "lm-text"
        lm = self._trained(log, text, neighbors) if trained else text
        self.goals["prepare"].append(log)
        self.goals["describe"].append(log)
        for seed in request.seeds:
            for sweep in request.points or (None,):
                self._systems(seed, log, neighbors, lm, sweep)
        if request.all_data:
            self._build_on_all_data(log)

    def _build_on_all_data(self, log: Node) -> None:
        """Everything once more from a log that holds nothing out; only its cascades are a goal."""
        chosen = {goal: list(nodes) for goal, nodes in self.goals.items()}
        whole = self._node(STAGES["log-all"], "log", {Role.LOG: log}, parts=(ALL_DATA,))
        text = self._text(whole)
        neighbors = self._neighbors(whole, text)
        lm = self._trained(whole, text, neighbors) if text.stage.name == "lm-text" else text
        for seed in self.request.seeds:
            self._systems(seed, whole, neighbors, lm, None)
        cascades = self.goals["cascade"][len(chosen["cascade"]) :]
        self.goals = {**chosen, "cascade": cascades}

    @property
    def _lm_parts(self) -> tuple[NamePart, ...]:
        return (NamePart("lm", self.lm_name),) if self.lm_name != "tiny" else ()

    def _text(self, log: Node) -> Node:
        """The LM that item vectors are made with: the tiny one after its first phase, any other as it is."""
        named = self.configured.lm.model.path is not None
        stage = STAGES["lm-named" if named else "lm-text"]
        return self._node(stage, f"lm/{self.lm_name}", {Role.LOG: log}, parts=self._lm_parts, within="text")

    def _neighbors(self, log: Node, text: Node) -> Node:
        vectors = self.configured.retrieval.vectors
        parts = (NamePart("vectors", f"{vectors}-vectors"),) if vectors != VECTORS else ()
        parents = {Role.LOG: log, Role.LM: text}
        return self._node(STAGES["neighbors"], f"neighbors/{vectors}", parents, parts=parts)

    def _trained(self, log: Node, text: Node, neighbors: Node) -> Node:
        """The LM after its second phase.

        In a sweep over subsamples all values share an LM of their own: it has read the answers of the
        smallest subsample only, each once a pass, else the others' would teach the small ones. An LM that
        holds out every value's rows has read none of them, and serves as it is.
        """
        name = f"lm/{self.lm_name}"
        settings: dict[str, Any] = {}
        few = fewest(self.request.points)
        held_out = text.config["lm"]["training"]["hold_out"]
        if few and covering(self.request.points, held_out) != held_out:
            name += f"+answers-{few}"
            settings = {"subsample": few, "lm.training.question_share": 0.0}
            text = self._node(
                STAGES["lm-text"],
                name,
                {Role.LOG: log},
                parts=self._lm_parts,
                settings=settings,
                within="text",
            )
        parents = {Role.LOG: log, Role.LM: text, Role.NEIGHBORS: neighbors}
        return self._node(
            STAGES["lm-prompts"], name, parents, parts=self._lm_parts, settings=settings, within="prompts"
        )

    def _recipe(self) -> str:
        """Name of the folder in `data/` whose recipe writes the tables."""
        name = self.request.dataset
        if self.configured.source.given:
            check_own(self.configured)
            return paths.OWN
        recipe = paths.recipe_folder(name)
        if recipe == paths.OWN or not (paths.repository() / "data" / recipe / "recipe.py").exists():
            raise ConfigError(
                f"DATASET={name} has no data/{recipe}/recipe.py of its own and no source.events.path in "
                f"conf/dataset/{name}.yaml; wanted one of the two: docs/own-data.md tells how"
            )
        return recipe

    def _systems(self, seed: int, log: Node, neighbors: Node, lm: Node, sweep: SweepValue | None) -> None:
        """CRMs, systems and evaluation of a seed; at a value of a sweep stage 2 and what gates it only."""
        request = self.request
        if not request.crms:
            self._evaluate_catalog(seed, {Role.LOG: log}, {})
            return
        crms = {crm: self._crm(crm, seed, log, neighbors, sweep) for crm in self._crms(sweep)}
        gate = crms[request.gate]
        self.goals["stage1"] += [node for crm, node in crms.items() if crm in request.crms]
        if "tune" in request.goals:
            self.goals["tune"] += [self._tuned(crm, crms[crm], seed) for crm in request.crms]
        if not request.systems:
            parents = {role: parent for crm in crms.values() for role, parent in crm.parents.items()}
            if request.whole_catalog:
                self._evaluate_catalog(seed, parents, {Group.CRMS: crms})
            else:
                self._evaluate_crms(crms, gate, seed, neighbors, parents)
            if "cascade" in request.goals:
                self._cascades(seed, {Role.LOG: log, **gate.parents, Role.CRM: gate}, {})
            return
        shared = {Role.LOG: log, Role.NEIGHBORS: neighbors, Role.LM: lm}
        evaluated_crms = dict(crms)
        tuned: dict[str, Node] = {}
        towers: dict[str, Node] = {}
        for system in self._tuned_systems(sweep is not None):
            if self._has_towers(system):
                towers[system] = self._tower_system(system, seed, log, sweep)
                continue
            tuned[system] = self._tuned_system(system, seed, shared, gate, evaluated_crms, sweep)
        aligned: dict[str, Node] = {}
        if not sweep:
            aligned = {
                system: self._aligned_system(system, seed, shared, tuned) for system in self._of("stage3")
            }
        if "cascade" in request.goals:
            ranking = {name: node for name, node in {**tuned, **aligned}.items() if name in request.systems}
            self._cascades(seed, {**shared, Role.CRM: gate}, ranking)
        self.goals["stage2"] += [*tuned.values(), *towers.values()]
        self.goals["stage3"] += aligned.values()
        systems = {
            Group.CRMS: evaluated_crms,
            Group.TUNED: tuned,
            Group.TOWERS: towers,
            Group.ALIGNED: aligned,
        }
        if request.whole_catalog:
            self._evaluate_catalog(seed, {**shared, Role.CRM: gate}, systems)
        else:
            self._evaluate(seed, {**shared, Role.CRM: gate}, systems, sweep)

    def _crms(self, sweep: SweepValue | None) -> list[str]:
        """CRMs to train: the asked-for ones, and a ranker where LMs rank beside it."""
        if sweep:
            return [self.request.gate]
        lists = self.configured.evaluate.candidates and not self.request.whole_catalog
        ranks = self.request.systems and lists
        return list(dict.fromkeys((*self.request.crms, "ranker") if ranks else self.request.crms))

    @property
    def _gate_parts(self) -> tuple[NamePart, ...]:
        return (NamePart("crm", self.request.gate),) if self.request.gate != GATE else ()

    def _tower_system(self, system: str, seed: int, log: Node, sweep: SweepValue | None) -> Node:
        files = (f"stage2/{system}.yaml",)
        own = "encoder" in self.read(self.conf / files[0])  # all other systems of two towers share one
        encoder = self._node(
            STAGES["encoder"],
            f"encoder+{system}" if own else "encoder",
            {Role.LOG: log},
            files=files if own else (),
        )
        parents = {Role.LOG: log, Role.ENCODER: encoder}
        return self._node(STAGES["towers"], f"stage2/{system}", parents, files=files, seed=seed, sweep=sweep)

    def _tuned_system(
        self,
        system: str,
        seed: int,
        shared: dict[Role, Node],
        gate: Node,
        evaluated_crms: dict[str, Node],
        sweep: SweepValue | None,
    ) -> Node:
        """A system of stage 2; the CRM that gates it joins the evaluated ones if it leaves rows out."""
        node = self._node(
            STAGES["stage2"],
            f"stage2/{system}",
            {**shared, Role.CRM: gate},
            files=(f"stage2/{system}.yaml",),
            seed=seed,
            parts=self._gate_parts,
            sweep=sweep,
        )
        if node.config["stage2"]["representation"] != "out_of_fold":
            return node
        rows = node.config["subsample"]
        if fewest(self.request.points):  # they nest: one CRM that leaves out the largest serves all values
            rows = covering(self.request.points, self.configured.subsample)
        own = self._held_out(gate, rows, seed, sweep)
        if own is not gate:
            evaluated_crms[f"{self.request.gate}-heldout"] = own
        node = dataclasses.replace(node, parents={**node.parents, Role.CRM: own})
        self.nodes[node.folder] = node
        return node

    def _aligned_system(
        self, system: str, seed: int, shared: dict[Role, Node], tuned: dict[str, Node]
    ) -> Node:
        file = f"stage3/{system}.yaml"
        start = self._start(file)
        parts = self._gate_parts
        if start != START:
            parts += (NamePart("start", start),)
        crm = tuned[start].parents[Role.CRM]
        parents = {**shared, Role.CRM: crm, Role.START: tuned[start]}
        return self._node(
            STAGES["stage3"], f"stage3/{system}", parents, files=(file,), seed=seed, parts=parts
        )

    def _evaluate(
        self,
        seed: int,
        parents: dict[Role, Node],
        systems: dict[Group, dict[str, Node]],
        sweep: SweepValue | None,
    ) -> None:
        """The evaluation of all systems; at a value of a sweep nothing is ranked."""
        request, tuned = self.request, systems[Group.TUNED]
        systems_named = "all"
        if sweep:
            systems_named = ",".join((*tuned, *systems[Group.TOWERS]))
        elif self._is_special():
            systems_named = ",".join(dict.fromkeys(request.crms + request.systems))
        settings: dict[str, Any] = {"evaluate.candidates": []} if sweep else {}
        node = self._node(
            STAGES["evaluate"],
            f"evaluate/{systems_named}",
            {**parents, **self._started_from(tuned)},
            seed=seed,
            parts=self._gate_parts,
            settings=settings,
            sweep=sweep,
            systems=systems,
        )
        self.goals["evaluate"].append(node)

    def _cascades(self, seed: int, parents: dict[Role, Node], ranking: dict[str, Node]) -> None:
        """A cascade for each system whose LM ranks; where there is none, one that ends with the CRM.

        Raises:
            ConfigError: a system has no LM that could rank.
        """
        for system in self.request.systems:
            if system not in ranking:
                raise ConfigError(
                    f"SYSTEM={system} has two towers, no LM that ranks titles; wanted e.g. SYSTEM={START}"
                )
        if self.configured.cascade.first == "retriever":
            retriever = self._crm("retriever", seed, parents[Role.LOG], parents[Role.LOG], None)
            parents = {**parents, Role.RETRIEVER: retriever}
        cascades = {name: {**parents, Role.SYSTEM: node} for name, node in ranking.items()}
        for name, above in (cascades or {self.request.gate: parents}).items():
            parts = self._gate_parts if cascades else ()
            node = self._node(STAGES["cascade"], f"cascade/{name}", above, seed=seed, parts=parts)
            self.goals["cascade"].append(node)

    def _evaluate_catalog(
        self, seed: int, parents: dict[Role, Node], systems: dict[Group, dict[str, Node]]
    ) -> None:
        """An evaluation over the whole catalog: baselines, and whatever retrieves or orders anew."""
        parents = {**parents, **self._started_from(systems.get(Group.TUNED, {}))}
        named = dict.fromkeys(self.request.crms + self.request.systems)
        name = f"next/{','.join(named) or 'baselines'}"
        parts = self._gate_parts if self.request.systems else ()
        node = self._node(STAGES["next"], name, parents, seed=seed, parts=parts, systems=systems)
        self.goals["evaluate"].append(node)

    def _evaluate_crms(
        self,
        crms: dict[str, Node],
        gate: Node,
        seed: int,
        neighbors: Node,
        parents: dict[Role, Node],
    ) -> None:
        """An evaluation of CRMs without any LM: what they read is a parent besides, and hard candidates."""
        parents = dict(parents)
        if any(kind.startswith("hard") for kind in self.configured.evaluate.candidates):
            parents[Role.NEIGHBORS] = neighbors
        parents[Role.CRM] = gate
        name, systems = f"evaluate/{','.join(crms)}", {Group.CRMS: crms}
        node = self._node(STAGES["evaluate"], name, parents, seed=seed, systems=systems)
        self.goals["evaluate"].append(node)

    def _crm(self, crm: str, seed: int, log: Node, neighbors: Node, sweep: SweepValue | None) -> Node:
        """A CRM reads the neighbors, and so depends on the LM, only where its configuration says so."""
        name, files = f"stage1/{crm}", (f"stage1/{crm}.yaml",)
        objective = merge(self.layers(*files), self.request.overrides).stage1.objective
        stage = STAGES["stage1"].of_objective(objective)
        node = self._node(stage, name, {Role.LOG: log}, files=files, seed=seed, sweep=sweep)
        module = RETRIEVER_MODULE if objective == "next" else node.module
        if not CrmConfig(**node.config["stage1"]["crm"]).reads_vectors:
            node = dataclasses.replace(node, module=module)
            self.nodes[node.folder] = node
            return node
        del self.nodes[node.folder]  # with the neighbors as parent its name says the LM too
        parents = {Role.LOG: log, Role.NEIGHBORS: neighbors}
        return self._node(stage, name, parents, files=files, seed=seed, sweep=sweep, module=module)

    def _tuned(self, crm: str, node: Node, seed: int) -> Node:
        """The study of a CRM's settings: what the CRM depends on, and the space."""
        files = (f"stage1/{crm}.yaml",)
        stage = STAGES["tune"].of_objective(node.config["stage1"]["objective"])
        tuned = self._node(stage, f"tune/{crm}", node.parents, files=files, seed=seed, module=node.module)
        for searched in tuned.config["tune"]["space"]:
            parse_overrides([f"{searched['key']}=0"], "tune.space")
            if not searched["key"].startswith("stage1."):
                raise ConfigError(f"{searched['key']} (tune.space) is no key of stage1")
        return tuned

    def _held_out(self, gate: Node, rows: str, seed: int, sweep: SweepValue | None) -> Node:
        """The gate's CRM with the same settings, trained without the samples that stage 2 tunes on.

        Its folder names the rows, so that two subsamples never share one. Where every CRM leaves them out
        (`stage1.hold_out`), the gate is that CRM already.
        """
        left_out = gate.config["stage1"]["hold_out"]
        if left_out != "none" and RowSet.parse(rows) in RowSet.parse(left_out):
            return gate
        crm = self.request.gate
        return self._node(
            gate.stage,
            f"stage1/{crm}+heldout-{rows}",
            gate.parents,
            files=(f"stage1/{crm}.yaml",),
            seed=seed,
            settings={"stage1.hold_out": rows},
            sweep=sweep,
            module=gate.module,
        )

    # ---- what was asked for

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

    def _started_from(self, tuned: dict[str, Node]) -> dict[Role, Node]:
        """The parent of an evaluation that its alignments start from; none where it is not asked for."""
        start = self._start()
        return {Role.START: tuned[start]} if start in tuned else {}

    def _of(self, room: str) -> list[str]:
        """The asked-for systems that have a file in a room of `conf`."""
        return [name for name in self.request.systems if (self.conf / room / f"{name}.yaml").exists()]

    def _tuned_systems(self, swept: bool) -> list[str]:
        """Systems of stage 2: the asked-for ones and those that stage 3 starts from.

        Two towers alone have no LM, and an evaluation has one: the usual start.

        Raises:
            ConfigError: a sweep without any LM.
        """
        systems = self._of("stage2")
        aligned = [] if swept else self._of("stage3")
        have_lm = not all(map(self._has_towers, systems))
        if swept and not have_lm:
            raise ConfigError(f"SYSTEM={' '.join(systems)} has no LM to sweep; wanted one that has")
        systems += [self._start(f"stage3/{name}.yaml") for name in aligned]
        if aligned or not have_lm:
            systems.append(self._start())
        return list(dict.fromkeys(systems))

    def _is_special(self) -> bool:
        return (self.request.crms, self.request.systems) != (("din", GATE), ("lora", "reclora", *ALIGNED))

    # ---- what is there

    def _check_layout(self) -> None:
        """Refuse artifacts of another layout before anything is written among them."""
        for path in sorted(self.root.glob("*/config.yaml")):
            first = path.read_text().partition("\n")[0]
            if first != f"layout: {LAYOUT}":
                raise StageError(older(self.root))

    def needed(self) -> list[Node]:
        """The goals' nodes and all their ancestors, parents first."""
        nodes: list[Node] = []
        for goal in self.request.goals:
            nodes += self.goals[goal]
            if goal in ENDS_WITH_TABLE:
                nodes += self.goals["evaluate"]
        return with_ancestors(nodes)

    def manifest(self, node: Node) -> Path:
        """Path of a node's manifest: the target that Make sees."""
        return self.root / node.folder / paths.MANIFEST

    def states(self, nodes: Iterable[Node] | None = None) -> list[tuple[Node, str, Manifest | None]]:
        """Each node, `done`, `stale`, `interrupted` or `missing`, and its manifest if there is one.

        Args:
            nodes: which, besides their ancestors; None: the needed ones.
        """
        states: dict[str, tuple[Node, str, Manifest | None]] = {}
        for node in self.needed() if nodes is None else with_ancestors(nodes):
            if not self.manifest(node).exists():
                started = (self.root / node.folder / paths.CHECKPOINTS / paths.LAST).exists()
                states[node.folder] = (node, "interrupted" if started else "missing", None)
                continue
            manifest = Manifest.read(self.root / node.folder)
            above = [states[parent.folder] for parent in node.above]
            fresh = manifest.config_sha256 == node.file.sha256 and all(
                state == "done"
                and parent is not None
                and manifest.parents.get(over.folder) == parent.identity
                for over, state, parent in above
            )
            states[node.folder] = (node, "done" if fresh else "stale", manifest)
        return list(states.values())


def with_ancestors(nodes: Iterable[Node]) -> list[Node]:
    """Nodes and all their ancestors, parents first, each once."""
    ordered: dict[str, Node] = {}

    def visit(node: Node) -> None:
        for parent in node.above:
            visit(parent)
        ordered.setdefault(node.folder, node)

    for node in nodes:
        visit(node)
    return list(ordered.values())
