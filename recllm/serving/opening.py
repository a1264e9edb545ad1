"""A cascade, opened from the finished stages that it is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.config.schema import Config
from recllm.errors import StageError
from recllm.eventlog.log import EventLog
from recllm.files import write_json
from recllm.paths import CASCADE, ITEM_INDEX
from recllm.pipeline.finished import Finished
from recllm.pipeline.stage_file import Role
from recllm.retrieval.index import ItemIndex
from recllm.retrieval.stored import Retrieval
from recllm.serving.indexed import IndexedRetriever
from recllm.systems.cascade import Cascade, CrmStep, Reranker
from recllm.systems.catalog import CatalogScorer
from recllm.systems.catalog_counting import CatalogPopularity
from recllm.systems.crm import Crm
from recllm.systems.lm_step import LmStep
from recllm.systems.retriever import Retriever

RETRIEVER = "retriever"
"""Name of the retriever's scores in tables."""
CRM_STEP = "crm"
"""Name of the CRM's."""


@dataclass(frozen=True)
class Fitted:
    """What a cascade learned on validation, as `cascade.json` says it.

    Attributes:
        weights: name of each step behind the first -> weights of the steps up to it, in order.
        measured: figures on the validation queries, by name.
    """

    weights: dict[str, list[float]]
    measured: dict[str, float]

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, {"weights": self.weights, "measured": self.measured})

    @classmethod
    def read(cls, path: Path) -> Fitted:
        """Read what `write` wrote.

        Raises:
            StageError: it is not there, or says other things.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise StageError(f"{path} is missing or broken ({error}); run `make cascade` again") from error


@dataclass(frozen=True)
class Parts:
    """What a cascade is made of.

    Attributes:
        log: the trained log.
        cascade: its steps.
        crm: the CRM that ranks; None: none does.
        lm: the language model that ranks; None: none does.
        retrieval: nearest events and the items' vectors; None: no step reads them.
        retriever: what scores the catalog; None: popularity does.
    """

    log: EventLog
    cascade: Cascade
    crm: Crm | None
    lm: LmStep | None
    retrieval: Retrieval | None
    retriever: Retriever | None = None


def open_parts(config: Config, parents: Mapping[Role, Finished], export: Path | None = None) -> Parts:
    """Open the steps of a cascade.

    Args:
        config: of the cascade's stage.
        parents: the stages that it is made from.
        export: of the finished cascade, with its weights and index; None: they are not there yet, and the
            whole catalog is scored without an index.
    """
    fitted = None if export is None else Fitted.read(export / CASCADE)
    log = EventLog.open(parents[Role.LOG].folder)
    retrieval = None
    if Role.NEIGHBORS in parents:
        retrieval = Retrieval.open(parents[Role.NEIGHBORS].folder, log)
    settings = config.cascade
    crm = None
    if Role.CRM in parents and settings.crm:
        crm = Crm.open_uncached(parents[Role.CRM], log, retrieval)
    lm = None
    if Role.SYSTEM in parents:
        assert retrieval is not None
        lm = _open_lm(config, parents, log, retrieval, crm)
    first: CatalogScorer = CatalogPopularity(log)
    retriever = None
    if settings.first == "retriever":
        stage = parents[Role.RETRIEVER]
        retriever = first = Retriever(RETRIEVER, Crm.open_uncached(stage, log, None), log)
        if export is not None:
            first = IndexedRetriever(retriever, ItemIndex.open(export / ITEM_INDEX))
    rerankers = []
    if crm is not None:
        rerankers.append(Reranker(CrmStep(crm, CRM_STEP), settings.retrieved, _weights(fitted, CRM_STEP)))
    if lm is not None:
        rerankers.append(Reranker(lm, settings.ranked, _weights(fitted, LmStep.name)))
    return Parts(log, Cascade(first, settings.retrieved, rerankers), crm, lm, retrieval, retriever)


def _weights(fitted: Fitted | None, step: str) -> NDArray[np.float64] | None:
    return None if fitted is None else np.array(fitted.weights[step])


def _open_lm(
    config: Config, parents: Mapping[Role, Finished], log: EventLog, retrieval: Retrieval, crm: Crm | None
) -> LmStep:
    """The LM's step; its gate's CRM may be the one that ranks, or one that left the tuning rows out."""
    system = parents[Role.SYSTEM]
    gate: Any = system.parent(Role.CRM)
    if crm is not None and crm.made_by.name == gate.name:
        of_gate = crm
    else:
        of_gate = Crm.open_uncached(gate, log, retrieval)
    return LmStep(config, parents[Role.LM], system, log, retrieval, of_gate, config.cascade.batch_size)


def open_finished(stage: Finished) -> Parts:
    """The cascade of a finished stage.

    Raises:
        StageError: it is no cascade, or a stage that it is made from is not there.
    """
    if stage.file.stage != "cascade":
        raise StageError(
            f"{stage.folder} is of stage {stage.file.stage}; wanted a bundle, or what `make cascade` makes"
        )
    parents = {role: stage.parent(role) for role in stage.made_of}
    return open_parts(stage.config, parents, stage.export)
