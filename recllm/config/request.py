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

VARIABLES = (
    "DATASET",
    "TASK",
    "CRM",
    "SYSTEM",
    "LM",
    "SEED",
    "EXPERIMENT",
    "RAW",
    "KEY",
    "VALUES",
    "ALL_DATA",
)
GOALS = ("prepare", "describe", "stage1", "stage2", "stage3", "evaluate", "report", "tune", "cascade")
GATE = "sim"
START = "reclora"
ALIGNED = ("sft-continued", "dpo", "s-dpo")
NOTHING = "none"
"""`SYSTEM=none`: CRMs are evaluated alone, without any LM; `Request.systems` is then empty. With `TASK=next`
also `CRM=none`: baselines alone."""
CASCADE = "cascade"
"""The goal behind `make bundle`, `make recommend` and `make score`."""
NEXT = "next"
"""`TASK=next`: evaluations are over the whole catalog."""
RETRIEVER = "retriever"


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
    """Values of a sweep, all of one key; empty where nothing is swept."""
    whole_catalog: bool = False
    """Whether evaluations are over the whole catalog."""
    all_data: bool = False
    """Whether cascades are of models that train once more, on the samples of all splits."""

    @property
    def gate(self) -> str:
        """The CRM whose representation gates stage 2: the last one named; there is one where an LM is."""
        return self.crms[-1]


@dataclass(frozen=True)
class Words:
    """The words of a make command, sorted but not understood yet.

    Attributes:
        goals: make targets.
        values: value of each of `VARIABLES`, empty where it was not given.
        keys: all others, `key=value` of the configuration if they are right.
    """

    goals: list[str]
    values: dict[str, str]
    keys: list[str]


def sort_words(arguments: Sequence[str]) -> Words:
    """Tell goals, `VARIABLE=...` and keys of the configuration apart."""
    words = Words(goals=[], values=dict.fromkeys(VARIABLES, ""), keys=[])
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument in GOALS:
            words.goals.append(argument)
        elif equals and name in VARIABLES:
            words.values[name] = value.strip()
        else:
            words.keys.append(argument)
    return words


def parse(arguments: Sequence[str]) -> Request:
    """Read goals, `VARIABLE=...` and `key=value` words.

    Raises:
        ConfigError: a name that has no file, an unknown key, a seed that is no number, half a sweep.
    """
    words = sort_words(arguments)
    values = words.values
    conf = paths.repository() / "conf"
    dataset = values["DATASET"] or "demo"
    choice("DATASET", dataset, conf / "dataset")
    whole_catalog = _is_whole_catalog(words)
    named = values["SYSTEM"].split() or ([NOTHING] if whole_catalog else [])
    systems = _systems(named, words.goals, conf)
    crms = _crms(values["CRM"].split(), whole_catalog, systems)
    for crm in crms:
        choice("CRM", crm, conf / "stage1")
    if values["EXPERIMENT"]:
        choice("EXPERIMENT", values["EXPERIMENT"], conf / "experiment")
    lm = values["LM"] or "tiny"
    _check_lm(lm, conf / "lm")
    seeds = _seeds(values["SEED"])
    overrides = _overrides(words.keys)
    if values["RAW"] and not Path(values["RAW"]).exists():
        raise ConfigError(f"RAW={values['RAW']} does not exist; wanted the folder or archive of the raw data")
    return Request(
        goals=tuple(words.goals) or ("report",),
        dataset=dataset,
        crms=crms,
        systems=systems,
        lm=lm,
        seeds=seeds,
        experiment=values["EXPERIMENT"],
        raw=values["RAW"],
        overrides=overrides,
        points=_sweep(words, systems),
        whole_catalog=whole_catalog,
        all_data=_trains_on_all(words),
    )


def _trains_on_all(words: Words) -> bool:
    """Whether `ALL_DATA=1` asks for models that have read all splits, which only recommend."""
    text = words.values["ALL_DATA"]
    if text not in ("", "0", "1"):
        raise ConfigError(f"ALL_DATA={text}; wanted 1 (train once more on all samples) or 0")
    others = [goal for goal in words.goals if goal != CASCADE]
    if text == "1" and (others or not words.goals):
        raise ConfigError(
            f"ALL_DATA=1 trains on the test split, too, so that {' and '.join(others) or 'report'} would "
            "measure nothing; wanted make bundle, recommend, score or cascade"
        )
    return text == "1"


def _is_whole_catalog(words: Words) -> bool:
    """Whether `TASK=` asks for an evaluation over the whole catalog."""
    task = words.values["TASK"]
    if not task:
        return False
    if task != NEXT:
        raise ConfigError(f"TASK={task} is not known; wanted {NEXT}, or none for clicks and candidate lists")
    if words.values["KEY"]:
        raise ConfigError(
            f"KEY={words.values['KEY']} is not swept over the whole catalog; wanted no TASK={NEXT}"
        )
    return True


def _crms(names: list[str], whole_catalog: bool, systems: tuple[str, ...]) -> tuple[str, ...]:
    """The CRMs that `CRM=` names, or the usual ones."""
    if names == [NOTHING] and whole_catalog:
        if systems:
            raise ConfigError(
                f"CRM=none leaves SYSTEM={' '.join(systems)} nothing to order; wanted a retriever"
            )
        return ()
    if whole_catalog:
        return tuple(names or (RETRIEVER,))
    return tuple(names or ("din", GATE))


def _systems(names: list[str], goals: list[str], conf: Path) -> tuple[str, ...]:
    """The systems that `SYSTEM=` names, with the usual ones of a stage of which it names none."""
    if names == [NOTHING]:
        for goal in goals:
            if goal in ("stage2", "stage3"):
                raise ConfigError(
                    f"SYSTEM=none leaves {goal} nothing to do; wanted evaluate or report, or a system"
                )
        return ()
    stage2_files = _names(conf / "stage2")
    stage3_files = _names(conf / "stage3")
    for name in names:
        if name not in (*stage2_files, *stage3_files):
            wanted = ", ".join(sorted(stage2_files + stage3_files))
            raise ConfigError(f"SYSTEM={name} is not known; wanted some of {wanted}")
    if goals == [CASCADE]:
        return tuple(names or [START])
    stage2 = [name for name in names if name in stage2_files]
    stage3 = [name for name in names if name in stage3_files]
    # Who names systems of stage 2 alone wants them evaluated, and nothing aligned for it.
    alone = stage2 and set(goals) <= {"stage2", "evaluate", "report"}
    usual_stage3 = () if alone else ALIGNED
    return (*(stage2 or ("lora", START)), *(stage3 or usual_stage3))


def _check_lm(lm: str, folder: Path) -> None:
    """Refuse what is no file of `conf/lm`, no local path, and does not look like a hub id."""
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w./-]+\.gguf)?", lm)
    if not (folder / f"{lm}.yaml").exists() and not Path(lm).exists() and not hub_id:
        wanted = ", ".join(_names(folder))
        raise ConfigError(
            f"LM={lm} is not known; wanted one of {wanted}, a local path, or a hub id such as org/name or "
            "org/name:file.gguf"
        )


def _seeds(text: str) -> tuple[int, ...]:
    """The seeds that `SEED=` names; 0 where it is empty."""
    seeds = text.split() or ["0"]
    for seed in seeds:
        if not seed.isdigit():
            raise ConfigError(f"SEED={seed} is no whole number; e.g. SEED='0 1 2'")
    return tuple(int(seed) for seed in seeds)


def _overrides(keys: list[str]) -> dict[str, Any]:
    """Keys of the configuration that `ARGS=` sets; the seed is a variable of its own."""
    overrides = parse_overrides(keys)
    if "seed" in overrides:
        raise ConfigError(f"ARGS=seed={overrides['seed']} is given as SEED={overrides['seed']}")
    return overrides


def _sweep(words: Words, systems: tuple[str, ...]) -> tuple[SweepValue, ...]:
    """The values that `KEY=` and `VALUES=` name, where the goals and systems can be swept."""
    key = words.values["KEY"]
    sweep_values = parse_sweep(key, words.values["VALUES"])
    if not sweep_values:
        return ()
    for goal in ("stage3", "tune"):
        if goal in words.goals:
            raise ConfigError(f"KEY={key} is no choice of make {goal}; wanted make sweep, or stage2")
    if not systems:
        raise ConfigError(f"SYSTEM=none has no stage 2 to sweep KEY={key} in; wanted a system")
    return sweep_values


def choice(variable: str, name: str, folder: Path) -> None:
    """Refuse a name without a file in a folder of `conf`."""
    if not (folder / f"{name}.yaml").exists():
        raise ConfigError(f"{variable}={name} is not known; wanted one of {', '.join(_names(folder))}")


def _names(folder: Path) -> list[str]:
    """Names of the YAML files in a folder of `conf`, in alphabetical order."""
    return sorted(file.stem for file in folder.glob("*.yaml"))
