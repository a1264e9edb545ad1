"""What the LM stages take from a frozen CRM: logits and representations, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Arrays = tuple[NDArray[np.float32], NDArray[np.float32]]


class Inputs(Protocol):
    """What builds a CRM's batch: `recllm.crm.inputs.CrmInputs`."""

    def __call__(
        self, rows: NDArray[np.int64], targets: NDArray[np.int32] | None = None
    ) -> dict[str, Tensor]:
        """Batch of the rows' histories with the given target items (their own ones by default)."""


def _width(model: nn.Module) -> int:
    return int(model.config.mlp[-1])  # type: ignore[union-attr,index]


def _fill(
    model: nn.Module,
    inputs: Inputs,
    rows: NDArray[np.int64],
    targets: NDArray[np.int32] | None,
    batch_size: int,
    out: Arrays,
) -> None:
    logits, vectors = out
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(rows), batch_size):
                part = slice(start, start + batch_size)
                batch = inputs(rows[part], None if targets is None else targets[part])
                batch = {name: value.to(device) for name, value in batch.items()}
                logit, vector = model(batch)
                logits[part] = logit.float().cpu().numpy()
                vectors[part] = vector.float().cpu().numpy()
    finally:
        model.train(training)


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
    out = np.empty(len(rows), np.float32), np.empty((len(rows), _width(model)), np.float32)
    _fill(model, inputs, rows, targets, batch_size, out)
    return out


class FeatureCache:
    """Keeps `representations` of each asked (rows, targets) set in a folder, computed once.

    A set is a sub-folder `<hash>/{logits,representations}.npy`; the hash covers the model's weights,
    `identity`, rows and targets, so that a retrained CRM never answers with the old one's features. The
    sub-folder is written under another name and renamed when complete: a killed or a second writer leaves no
    half set.

    Args:
        folder: made when the first set is written.
        model: the CRM.
        inputs: builds the batches.
        identity: what else the features depend on (e.g. the neighbors' config hash), hashed in.
        batch_size: pairs a forward pass.
    """

    def __init__(
        self, folder: str | Path, model: nn.Module, inputs: Inputs, identity: str = "", batch_size: int = 4096
    ) -> None:
        """Hashes the weights; computes nothing yet."""
        self.folder = Path(folder)
        self.model = model
        self.inputs = inputs
        self.batch_size = batch_size
        self._base = hashlib.sha256(identity.encode())
        for name, value in sorted(model.state_dict().items()):
            self._base.update(f"|{name}|{tuple(value.shape)}|".encode())
            self._base.update(np.ascontiguousarray(value.detach().cpu().numpy()).data)

    def _path(self, rows: NDArray[np.int64], targets: NDArray[np.int32] | None) -> Path:
        digest = self._base.copy()
        digest.update(f"|rows {len(rows)}|".encode())
        digest.update(rows.data)
        if targets is not None:
            digest.update(b"|targets|")
            digest.update(targets.data)
        return self.folder / digest.hexdigest()[:32]

    def get(self, rows: NDArray[np.int64], targets: NDArray[np.int32] | None = None) -> Arrays:
        """Features of (row, target) pairs, memory-mapped read-only; arguments as in `representations`.

        Returns:
            Logits float32 [n] and representations float32 [n, d_c].
        """
        rows, targets = _checked(rows, targets)
        path = self._path(rows, targets)
        if not path.is_dir():
            self._write(path, rows, targets)
        return (
            np.load(path / "logits.npy", mmap_mode="r"),
            np.load(path / "representations.npy", mmap_mode="r"),
        )

    def _write(self, path: Path, rows: NDArray[np.int64], targets: NDArray[np.int32] | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # A folder, so that one rename publishes both files. mkdtemp makes it private; readers may be others.
        scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.folder))
        scratch.chmod(0o755)
        try:
            # Filled batch by batch in the file itself: tens of millions of pairs need not fit in memory.
            shapes = {"logits": (len(rows),), "representations": (len(rows), _width(self.model))}
            logits, vectors = (
                np.lib.format.open_memmap(scratch / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape)
                for name, shape in shapes.items()
            )
            _fill(self.model, self.inputs, rows, targets, self.batch_size, (logits, vectors))
            logits.flush()
            vectors.flush()
            try:
                scratch.rename(path)
            except OSError:
                if not path.is_dir():  # otherwise another process was first, with the same numbers
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
