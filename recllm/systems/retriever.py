"""A CRM whose user vector meets item vectors in a dot product, as a system that scores a whole catalog."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from recllm.crm.inputs import CrmInputs
from recllm.eventlog.ids import FIRST_ID
from recllm.eventlog.log import EventLog, Rows
from recllm.systems.catalog import CatalogScorer, CatalogScores
from recllm.systems.crm import Crm, crm_inputs
from recllm.systems.system import Kind

_BATCH = 256
"""Rows of a forward pass."""


def retrieves(crm: Crm) -> bool:
    """Whether a CRM has vectors of users that know no target, and vectors of items."""
    return hasattr(crm.model, "user_vectors") and hasattr(crm.model, "item_vectors")


class Retriever(CatalogScorer):
    """User vectors times item vectors.

    Which items may be recommended: those with a training event, and of a CRM that reads texts
    (`stage1.crm.text_dim`) those with a text vector besides. Any other item has no vector of its own.

    Args:
        name: of the CRM.
        crm: one of which `retrieves` is true.
        log: the log that it was trained on.
        lm: name of the language model whose vectors of texts it reads; None: it reads none.
    """

    kind = Kind.CRM

    def __init__(self, name: str, crm: Crm, log: EventLog, lm: str | None = None) -> None:
        """Takes the item vectors."""
        super().__init__(name, made_by=crm.made_by, lm=lm)
        self.crm = crm
        self._model = cast(Any, crm.model)
        with torch.inference_mode():
            vectors = self._model.item_vectors().float().cpu().numpy()
        ids, known = _item_ids(self._model, log)
        self._vectors = np.ascontiguousarray(vectors[ids])
        self._unknown = np.flatnonzero(~known)
        self._by_text = np.flatnonzero(known & (log.item_count == 0))
        self._inputs: tuple[EventLog, CrmInputs] | None = None

    @property
    def item_vectors(self) -> NDArray[np.float32]:
        """Vectors float32 `[n_items, d]` by dense item id."""
        return self._vectors

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """Which items have a vector of their own, bool `[n_items]`."""
        known = np.ones(len(self._vectors), np.bool_)
        known[self._unknown] = False
        return known

    @property
    def by_text(self) -> NDArray[np.int64]:
        """Items without a training event that a text makes known, dense int64 `[n]`, ascending."""
        return self._by_text

    @property
    def by_text_sentence(self) -> str:
        """How many items it may recommend, and how many of them by a text alone, in words."""
        return (
            f"{len(self._by_text):,} of {int(self.is_known.sum()):,} items that it may recommend have no "
            "training event, only a text"
        )

    def users(self, log: EventLog, rows: Rows) -> NDArray[np.float32]:
        """Vectors float32 `[B, d]` of the rows' users at the rows' seconds.

        Args:
            log: as of `scores`.
            rows: int64 `[B]`.
        """
        inputs = self._inputs_of(log)
        parameter = next(self._model.parameters())
        parts = [np.empty((0, self._vectors.shape[1]), np.float32)]
        with torch.inference_mode():
            for first in range(0, len(rows), _BATCH):
                batch = inputs(rows[first : first + _BATCH])
                moved = {name: value.to(parameter.device) for name, value in batch.items()}
                parts.append(self._model.user_vectors(moved).float().cpu().numpy())
        return np.concatenate(parts)

    def scores(self, log: EventLog, rows: Rows) -> CatalogScores:
        """See `CatalogScorer`."""
        scores = cast(CatalogScores, self.users(log, np.asarray(rows, np.int64)) @ self._vectors.T)
        scores[:, self._unknown] = -np.inf
        return scores

    def _inputs_of(self, log: EventLog) -> CrmInputs:
        """What makes batches of a log's rows; that of the last log is kept."""
        if self._inputs is None or self._inputs[0] is not log:
            self._inputs = (log, crm_inputs(log, self.crm.made_by.config.stage1.inputs, None))
        return self._inputs[1]


def _item_ids(model: Any, log: EventLog) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
    """The row of the item table that each item reads, and whether its vector is its own, `[n_items]` each.

    Without texts an item that has no training event reads the unknown item's row, as the log's fields say it;
    with texts every item reads its own, whose vector is then made of the unknown item's and its text's.
    """
    texts = getattr(model, "texts", None)
    if texts is None:
        fields = log.item_fields[:, 0]
        return fields, fields >= FIRST_ID
    ids = np.arange(log.n_items, dtype=np.int32)
    has_text = texts.ne(0).any(dim=1) | model.trained
    return ids, (ids >= FIRST_ID) & has_text.cpu().numpy()
