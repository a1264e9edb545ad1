"""What later stages take from a frozen CRM: logits and representations, computed once and cached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recllm import processes
from recllm.cache import Cache, Hasher
from recllm.console import Progress

Arrays = tuple[NDArray[np.float32], NDArray[np.float32]]

LOGITS = "logits"
REPRESENTATIONS = "representations"


class Inputs(Protocol):
    """What builds a CRM's batch: `recllm.crm.inputs.CrmInputs`."""

    def __call__(
        self, rows: NDArray[np.int64], targets: NDArray[np.int32] | None = None
    ) -> dict[str, Tensor]:
        """Batch of the rows' histories with the given target items (their own ones by default)."""


def representations(
    model: nn.Module,
    inputs: Inputs,
    rows: NDArray[np.int64],
    targets: NDArray[np.int32] | None = None,
    batch_size: int = 4096,
) -> Arrays:
    """Runs a CRM over (row, target) pairs in eval mode, without gradients.

    Args:
        model: the CRM; its training mode is put back afterwards.
        inputs: builds the batches.
        rows: rows of the event log, int64 [n].
        targets: dense item ids, int32 [n], aligned with `rows`; None for the rows' own items.
        batch_size: pairs a forward pass.

    Returns:
        Logits float32 [n] and representations float32 [n, d_c].

    Raises:
        ValueError: `rows` is not a vector, or `targets` is not as long as `rows`.
    """
    rows, targets = _checked(rows, targets)
    logits = np.zeros(len(rows), np.float32)
    vectors = np.zeros((len(rows), _width(model)), np.float32)
    _fill(model, inputs, rows, targets, batch_size, logits, vectors)
    return logits, vectors


def score(
    model: nn.Module,
    inputs: Inputs,
    rows: NDArray[np.int64],
    targets: NDArray[np.int32] | None = None,
    batch_size: int = 4096,
) -> NDArray[np.float32]:
    """The logits of `representations` alone, float32 [n]; arguments as there.

    A representation is hundreds of numbers a pair: of millions of pairs they would be gigabytes.
    """
    rows, targets = _checked(rows, targets)
    logits = np.zeros(len(rows), np.float32)
    _fill(model, inputs, rows, targets, batch_size, logits)
    return logits


class Features(Protocol):
    """What gives logits and representations of pairs, from a store or anew.

    Arguments are those of `representations`.
    """

    model: nn.Module
    inputs: Inputs

    def logits(
        self, rows: NDArray[np.int64], targets: NDArray[np.int32] | None = None
    ) -> NDArray[np.float32]:
        """Logits float32 [n]."""

    def representations(
        self, rows: NDArray[np.int64], targets: NDArray[np.int32] | None = None
    ) -> NDArray[np.float32]:
        """Representations float32 [n, d_c]."""


class Uncached:
    """Computes features each time: for what is asked once, such as queries.

    Args:
        model: the CRM.
        inputs: builds the batches.
        batch_size: pairs a forward pass.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, batch_size: int = 4096) -> None:
        """See the class."""
        self.model = model
        self.inputs = inputs
        self.batch_size = batch_size

    def logits(
        self, rows: NDArray[np.int64], targets: NDArray[np.int32] | None = None
    ) -> NDArray[np.float32]:
        """See `Features`."""
        return score(self.model, self.inputs, rows, targets, self.batch_size)

    def representations(
        self, rows: NDArray[np.int64], targets: NDArray[np.int32] | None = None
    ) -> NDArray[np.float32]:
        """See `Features`."""
        return representations(self.model, self.inputs, rows, targets, self.batch_size)[1]


class FeatureCache:
    """Keeps features of each set of (row, target) pairs that was asked for, memory-mapped read-only.

    What a set is found by covers the model's weights, `identity`, rows and targets, so that a retrained CRM
    never answers with the old one's features. Who asks for representations gets the logits computed as well;
    who asks for logits alone, of millions of rows as it may be, no representations.

    Args:
        cache: where they are kept.
        model: the CRM.
        inputs: builds the batches.
        identity: what else the features depend on, e.g. the identity of the stage that trained the CRM.
        batch_size: pairs a forward pass.
    """

    def __init__(
        self, cache: Cache, model: nn.Module, inputs: Inputs, identity: str = "", batch_size: int = 4096
    ) -> None:
        """Hashes the weights; computes nothing yet."""
        self.cache = cache
        self.model = model
        self.inputs = inputs
        self.batch_size = batch_size
        self._made_of = Hasher().add(identity)
        for name, value in sorted(model.state_dict().items()):
            self._made_of.add(name, value.detach().cpu().numpy())

    def logits(
        self, rows: NDArray[np.int64], targets: NDArray[np.int32] | None = None
    ) -> NDArray[np.float32]:
        """See `Features`."""
        return self._kept(rows, targets, {LOGITS: ()})[LOGITS]

    def representations(
        self, rows: NDArray[np.int64], targets: NDArray[np.int32] | None = None
    ) -> NDArray[np.float32]:
        """See `Features`."""
        widths = {LOGITS: (), REPRESENTATIONS: (_width(self.model),)}
        return self._kept(rows, targets, widths)[REPRESENTATIONS]

    def _kept(
        self,
        rows: NDArray[np.int64],
        targets: NDArray[np.int32] | None,
        widths: Mapping[str, tuple[int, ...]],
    ) -> dict[str, NDArray[np.float32]]:
        """Arrays of one set of pairs; `widths`: name -> shape of a pair's value."""
        rows, targets = _checked(rows, targets)
        made_of = self._made_of.copy().add("rows", rows)
        if targets is not None:
            made_of.add("targets", targets)
        shapes = {name: ((len(rows), *width), np.float32) for name, width in widths.items()}

        def fill(arrays: dict[str, NDArray[np.float32]]) -> None:
            vectors = arrays.get(REPRESENTATIONS)
            _fill(self.model, self.inputs, rows, targets, self.batch_size, arrays[LOGITS], vectors)

        return self.cache.arrays("crm", made_of.hexdigest(), shapes, fill)


def _width(model: nn.Module) -> int:
    return int(model.representation_dim)  # type: ignore[arg-type]


def _fill(
    model: nn.Module,
    inputs: Inputs,
    rows: NDArray[np.int64],
    targets: NDArray[np.int32] | None,
    batch_size: int,
    logits: NDArray[np.float32],
    vectors: NDArray[np.float32] | None = None,
) -> None:
    """Write logits, and where they are wanted representations, of all pairs, 0 at first, batch by batch."""
    device = next(model.parameters()).device
    progress = Progress("rows scored by the CRM", len(rows))
    training = model.training
    if training:  # a walk through all modules, which a pair or two would feel
        model.eval()
    try:
        with torch.inference_mode():
            for number, is_own in processes.dealt(math.ceil(len(rows) / batch_size)):
                if not is_own:
                    continue
                part = slice(number * batch_size, (number + 1) * batch_size)
                batch = inputs(rows[part], None if targets is None else targets[part])
                batch = {name: value.to(device) for name, value in batch.items()}
                logit, vector = model(batch)
                logits[part] = logit.float().cpu().numpy()
                if vectors is not None:
                    vectors[part] = vector.float().cpu().numpy()
                progress.reached(min(part.stop, len(rows)))
    finally:
        if training:
            model.train()
    processes.complete(logits)
    if vectors is not None:
        processes.complete(vectors)


def _checked(rows: object, targets: object) -> tuple[NDArray[np.int64], NDArray[np.int32] | None]:
    checked = np.ascontiguousarray(rows, dtype=np.int64)
    if checked.ndim != 1:
        raise ValueError(f"got rows of shape {checked.shape}; wanted [n]; repeat the rows once a target")
    if targets is None:
        return checked, None
    items = np.ascontiguousarray(targets, dtype=np.int32)
    if items.shape != checked.shape:
        raise ValueError(
            f"got targets of shape {items.shape} for rows of shape {checked.shape}; wanted one target a row; "
            "repeat the rows once a target"
        )
    return checked, items
