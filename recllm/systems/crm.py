"""A trained CRM as later stages ask it, logits and representations of pairs, and as a system of the table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recllm.cache import Cache
from recllm.crm import Model, load
from recllm.crm.features import FeatureCache, Features, Uncached
from recllm.crm.inputs import CrmInputs
from recllm.eventlog.ids import UNKNOWN
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.queries import Queries
from recllm.eventlog.statistics import Statistics
from recllm.pipeline.finished import Finished
from recllm.retrieval.category import SameCategory
from recllm.retrieval.stored import Retrieval
from recllm.systems.system import Kind, Scores, System, Task


@functools.lru_cache(maxsize=1)
def _statistics(log: EventLog) -> Statistics:
    """Running statistics of a log, sorted once however many CRMs of an evaluation read them."""
    return Statistics(log)


def crm_inputs(log: EventLog, inputs: Mapping[str, Any], retrieval: Retrieval | None) -> CrmInputs:
    """Batches for a CRM.

    Args:
        log: the event log.
        inputs: what it reads, `Stage1Config.inputs`.
        retrieval: nearest events, for a CRM that reads them.
    """
    recent = inputs["recent"]
    retrieved = inputs["retrieved"]
    statistics = _statistics(log) if inputs["statistics"] else None
    if inputs["search"] == "semantic":
        assert retrieval is not None  # the plan makes the neighbors a parent
        return CrmInputs(log, recent, retrieved, retrieval.stored, retrieval.searcher, statistics)
    searcher = SameCategory(log) if inputs["search"] else None
    return CrmInputs(log, recent, retrieved, searcher=searcher, statistics=statistics)


@dataclass(frozen=True)
class Crm:
    """A trained CRM, its inputs, and its cached representations."""

    model: Model
    cache: Features
    made_by: Finished
    gate_input: str = "target"
    seed: int = 0

    @classmethod
    def open(cls, stage: Finished, log: EventLog, retrieval: Retrieval | None, cache: Cache) -> Crm:
        """Load what a finished stage 1 exported.

        Args:
            stage: the CRM's stage.
            log: the event log that it was trained on.
            retrieval: nearest events, for a CRM that reads them.
            cache: where logits and representations are kept.
        """
        model = load(stage.export)
        inputs = crm_inputs(log, stage.config.stage1.inputs, retrieval)
        return cls(model, FeatureCache(cache, model, inputs, stage.identity), stage)

    @classmethod
    def open_uncached(cls, stage: Finished, log: EventLog, retrieval: Retrieval | None) -> Crm:
        """The same, of which nothing is kept: for what is asked once."""
        model = load(stage.export)
        return cls(model, Uncached(model, crm_inputs(log, stage.config.stage1.inputs, retrieval)), stage)

    def for_queries(self, queries: Queries) -> Crm:
        """The same CRM, asked of queries; nothing of them is kept."""
        inputs = self.cache.inputs
        assert isinstance(inputs, CrmInputs)
        return dataclasses.replace(self, cache=Uncached(self.model, inputs.for_queries(queries)))

    @property
    def reads_texts(self) -> bool:
        """Whether it reads an LM's vectors of texts (`stage1.crm.text_dim`)."""
        return self.made_by.config.stage1.crm.text_dim > 0

    @property
    def ranks(self) -> bool:
        """Whether it was trained to tell liked items from drawn ones: its logit is then no click's."""
        return self.made_by.config.stage1.objective != "ctr"

    def read_as(self, gate_input: str | None, seed: int) -> Crm | None:
        """The CRM as a gate reads it (`AdapterConfig.gate_input`), or None where nothing is read.

        Args:
            gate_input: `user` asks for every row with an unknown item; `shuffled` gives every row another
                row's representation, by a permutation of all rows of a call; `target` changes nothing.
            seed: of the permutation.
        """
        return None if gate_input is None else dataclasses.replace(self, gate_input=gate_input, seed=seed)

    def representations(self, rows: Rows, targets: NDArray[np.int32] | None = None) -> torch.Tensor:
        """float32 `[n, d_c]` for pairs, or the mean over targets `[n, C]` of each row."""
        if self.gate_input == "user":
            targets = np.full(len(rows), UNKNOWN, np.int32)
        if targets is None or targets.ndim == 1:
            vectors = np.array(self.cache.representations(rows, targets))
        else:
            flat = self.cache.representations(np.repeat(rows, targets.shape[1]), targets.ravel())
            vectors = np.array(flat).reshape(*targets.shape, -1).mean(1)
        if self.gate_input == "shuffled":
            # The next one on a random circle through all rows: no row keeps its own.
            circle = np.random.default_rng(self.seed).permutation(len(rows))
            vectors[circle] = vectors[np.roll(circle, 1)]
        return torch.from_numpy(vectors)

    def each(self, rows: Rows, targets: NDArray[np.int32]) -> torch.Tensor:
        """float32 `[n, C, d_c]` for targets `[n, C]`: every pair's own."""
        flat = self.representations(np.repeat(rows, targets.shape[1]), targets.ravel())
        return flat.view(*targets.shape, -1)

    def trained_on(self, log: EventLog, rows: Rows) -> int:
        """How many of these training samples the CRM was trained on."""
        hold_out = self.made_by.config.stage1.hold_out
        if hold_out == "none":
            return len(rows)
        return int((~np.isin(rows, log.rows("train", hold_out))).sum())

    def is_held_out_version_of(self, other: Crm) -> bool:
        """Whether it has the other one's settings, but left training samples out that the other has seen."""
        ours = self.made_by.config.stage1
        theirs = other.made_by.config.stage1
        alike = dataclasses.replace(ours, hold_out=theirs.hold_out) == theirs
        return alike and theirs.hold_out == "none" and ours.hold_out != "none"

    def logits(self, rows: Rows, targets: NDArray[np.int32] | None = None) -> NDArray[np.float32]:
        """float32 `[n]` for pairs, `[n, C]` for targets `[n, C]`."""
        if targets is None or targets.ndim == 1:
            return np.array(self.cache.logits(rows, targets))
        flat = self.cache.logits(np.repeat(rows, targets.shape[1]), targets.ravel())
        return np.array(flat).reshape(targets.shape)


class CrmSystem(System):
    """A CRM as a system: it answers what it was trained for, clicks or ranks; a click's logit ranks too.

    Args:
        name: of the CRM; tables call one that was trained to rank `crm-<name>`.
        crm: the CRM.
        lm: name of the language model whose vectors of texts it reads; None: it reads none.
    """

    kind = Kind.CRM

    def __init__(self, name: str, crm: Crm, lm: str | None = None) -> None:
        """See the class."""
        by_list = crm.made_by.config.stage1.objective == "rank"
        super().__init__(f"crm-{name}" if by_list else name, made_by=crm.made_by, lm=lm)
        self.crm = crm
        if crm.ranks:
            self.tasks = (Task.RANKING,)

    def ctr(self, rows: Rows) -> Scores:
        """See `System`."""
        if self.crm.ranks:
            raise self._unanswered(Task.CTR)
        return self.crm.logits(rows)

    def rank(self, rows: Rows, lists: NDArray[np.int32]) -> Scores:
        """See `System`: the logit of every candidate."""
        return self.crm.logits(rows, lists)
