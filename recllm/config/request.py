"""What the user asked make for: goals, variables, and keys of the configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recllm import paths
from recllm.config.merge import parse_overrides
from recllm.config.sweep import SweepValue, parse_sweep
from recllm.errors import ConfigError

VARIABLES = ("DATASET", "CRM", "SYSTEM", "LM", "SEED", "EXPERIMENT", "RAW", "KEY", "VALUES")
GOALS = ("prepare", "describe", "stage1", "stage2", "stage3", "evaluate", "report", "tune")
GATE = "sim"
START = "reclora"
ALIGNED = ("sft-continued", "dpo", "s-dpo")
NOTHING = "none"
"""`SYSTEM=none`: CRMs are evaluated alone, without any LM; `Request.systems` is then empty."""


@dataclass(frozen=True)
class Request:
    """What the user asked make for."""

    goals: tuple[str, ...]
    dataset: str
    crms: tuple[str, ...]
    systems: tuple[str, ...]
    lm: str
    seeds: tuple[int, ...]
    experiment: str
    raw: str
    overrides: dict[str, Any]
    points: tuple[SweepValue, ...]

    @property
    def gate(self) -> str:
        """The CRM whose representation gates stage 2: the last one named."""
        return self.crms[-1]


def parse(arguments: Sequence[str]) -> Request:
    """Read goals, `VARIABLE=...` and `key=value` words.

    Raises:
        ConfigError: a name that has no file, an unknown key, a seed that is no number, half a sweep.
    """
    values = dict.fromkeys(VARIABLES, "")
    goals, keys = [], []
    for word in arguments:
        name, equals, value = word.partition("=")
        if word in GOALS:
            goals.append(word)
        elif equals and name in VARIABLES:
            values[name] = value.strip()
        else:
            keys.append(word)
    conf = paths.repository() / "conf"
    dataset = values["DATASET"] or "demo"
    choice("DATASET", dataset, conf / "dataset")
    systems = values["SYSTEM"].split()
    alone = systems == [NOTHING]
    if alone and (bad := [goal for goal in goals if goal in ("stage2", "stage3")]):
        raise ConfigError(
            f"SYSTEM=none leaves {bad[0]} nothing to do; wanted evaluate or report, or a system"
        )
    systems = [] if alone else systems
    stage2 = [name for name in systems if (conf / "stage2" / f"{name}.yaml").exists()]
    stage3 = [name for name in systems if (conf / "stage3" / f"{name}.yaml").exists()]
    for name in systems:
        if name not in stage2 + stage3:
            known = ", ".join(
                sorted(file.stem for room in ("stage2", "stage3") for file in (conf / room).glob("*.yaml"))
            )
            raise ConfigError(f"SYSTEM={name} is not known; wanted some of {known}")
    crms = tuple(values["CRM"].split() or ("din", GATE))
    for crm in crms:
        choice("CRM", crm, conf / "stage1")
    if values["EXPERIMENT"]:
        choice("EXPERIMENT", values["EXPERIMENT"], conf / "experiment")
    lm = values["LM"] or "tiny"
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", lm)
    if not (conf / "lm" / f"{lm}.yaml").exists() and not Path(lm).exists() and not hub_id:
        known = ", ".join(sorted(file.stem for file in (conf / "lm").glob("*.yaml")))
        raise ConfigError(
            f"LM={lm} is not known; wanted one of {known}, a local path, or a hub id such as org/name"
        )
    seeds = values["SEED"].split() or ["0"]
    if bad := [seed for seed in seeds if not seed.isdigit()]:
        raise ConfigError(f"SEED={bad[0]} is no whole number; e.g. SEED='0 1 2'")
    overrides = parse_overrides(keys)
    if "seed" in overrides:
        raise ConfigError(f"ARGS=seed={overrides['seed']} is given as SEED={overrides['seed']}")
    if values["RAW"] and not Path(values["RAW"]).exists():
        raise ConfigError(f"RAW={values['RAW']} does not exist; wanted the folder or archive of the raw data")
    # Who names systems of stage 2 alone wants them evaluated, and nothing aligned for it.
    aligned = () if stage2 and set(goals) <= {"stage2", "evaluate", "report"} else ALIGNED
    points = parse_sweep(values["KEY"], values["VALUES"])
    if points and (other := {"stage3", "tune"} & set(goals)):
        raise ConfigError(
            f"KEY={values['KEY']} is no choice of make {other.pop()}; wanted make sweep, or stage2"
        )
    if points and alone:
        raise ConfigError(f"SYSTEM=none has no stage 2 to sweep KEY={values['KEY']} in; wanted a system")
    return Request(
        goals=tuple(goals) or ("report",),
        dataset=dataset,
        crms=crms,
        systems=() if alone else (*(stage2 or ("lora", "reclora")), *(stage3 or aligned)),
        lm=lm,
        seeds=tuple(int(seed) for seed in seeds),
        experiment=values["EXPERIMENT"],
        raw=values["RAW"],
        overrides=overrides,
        points=points,
    )


def choice(variable: str, name: str, folder: Path) -> None:
    """Refuse a name without a file in a folder of `conf`."""
    if not (folder / f"{name}.yaml").exists():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ConfigError(f"{variable}={name} is not known; wanted one of {known}")
