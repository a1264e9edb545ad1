"""Arrays that are computed once and kept under the digest of what made them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.console import say
from recllm.files import digest


class ScoreCache:
    """Scores in a folder: an interrupted or extended evaluation computes only what is missing."""

    def __init__(self, folder: Path) -> None:
        """Keep in `folder`, made when something is kept."""
        self.folder = folder

    def get(self, name: str, identity: object, compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The stored scores, or those that `compute` returns, stored.

        Args:
            name: what they are of, for people.
            identity: everything that they depend on, as JSON takes it.
            compute: called only where they are not there yet.
        """
        path = self.folder / f"{name.replace(':', '-')}-{digest(identity)[:16]}.npy"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.npy")
            np.save(temporary, compute())
            temporary.replace(path)
            say(f"scored {name}")
        return np.load(path)
