"""How much a stage has to do: what its time grows with."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from recllm.eventlog.names import RowSet, sized
from recllm.pipeline.stage_file import Group


@dataclass(frozen=True)
class Workload:
    """Work of a kind: stages of one kind take time in proportion to it, about.

    Attributes:
        kind: the stage and the model that it trains or asks, e.g. `stage1 sim`.
        amount: rows that it reads, all passes together; of an LM's pretraining tokens.
    """

    kind: str
    amount: float


def workload(
    stage: str,
    config: Mapping[str, Any],
    log: Mapping[str, Any],
    systems: Mapping[Group, Sized] = MappingProxyType({}),
) -> Workload | None:
    """What a stage has to do.

    Args:
        stage: its name.
        config: the sections that reach it, as plain values.
        log: figures of the event log that it reads: `train` and `test` samples.
        systems: of an evaluation, those that it asks. Where LMs are among them, nothing else takes long.

    Returns:
        None for a stage whose time depends on something else: a download.
    """
    samples = log.get("train", 0)
    if stage == "tables" or not samples:
        return None
    model = ""
    amount = float(samples)
    lm = config.get("lm", {}).get("model", {}).get("name", "")
    if stage in ("stage1", "tune"):
        own = config["stage1"]
        model = own["crm"]["name"]
        passes = own["fit"]["epochs"] + own["newest"]["share"]
        amount = passes * samples * (config["tune"]["trials"] if stage == "tune" else 1)
    elif stage in ("stage2", "towers"):
        own = config["stage2"]
        model = f"{lm} {own['adapter']['kind']}" if stage == "stage2" else "towers"
        passes = own["fit"]["epochs"] * (2 if own.get("mixed_prompts") else 1)
        amount = passes * RowSet.parse(config["subsample"]).count(samples)
    elif stage == "stage3":
        model = lm
        amount = config["stage3"]["fit"]["epochs"] * config["stage3"]["rows"]
    elif stage == "evaluate":
        rows = log.get("test", samples)
        num_crms = len(systems.get(Group.CRMS, ()))
        num_lms = sum(len(group) for group in systems.values()) - num_crms
        if num_lms:
            model = lm
            amount = float(RowSet.parse(sized(config["evaluate"]["ctr_rows"], rows)).count(rows) * num_lms)
        else:
            amount = float(rows * max(1, num_crms))
    elif stage in ("lm-text", "lm-prompts"):
        model = lm
        training = config["lm"]["training"]
        amount = float(training["text_tokens" if stage == "lm-text" else "prompt_tokens"])
    elif stage in ("lm-named", "neighbors", "next", "cascade"):
        model = lm
    return Workload(f"{stage} {model}".strip(), amount)
