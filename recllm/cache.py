"""Arrays that are computed once and kept under the digest of what made them.

The cache is no part of any stage: it lies in a folder of its own, may be deleted at any time, and is bounded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from recllm import processes
from recllm.console import say
from recllm.errors import StageError
from recllm.files import digest, is_at_work, is_temporary, load_array, publish, write_array

GIGABYTES = 20.0
"""How large a cache may get, unless RECLLM_CACHE_GB says otherwise."""

Shapes = Mapping[str, tuple[tuple[int, ...], DTypeLike]]
"""Name of each array of a set -> its shape and type."""


class Cache:
    """A folder of arrays, each under a name for people and a digest of everything that it depends on.

    Safe with several writers: a file appears whole, and who comes second replaces it by the same numbers.
    Before every write the files that were used longest ago are removed until all fit into the bound; a
    process that has one of them open keeps what it has mapped. Processes of one stage compute together what
    one of them lacks.

    Args:
        folder: made when something is written.
        gigabytes: largest total size; None: RECLLM_CACHE_GB, or 20.
    """

    def __init__(self, folder: str | Path, gigabytes: float | None = None) -> None:
        """See the class; reads and writes nothing yet."""
        self.folder = Path(folder)
        stated = os.environ.get("RECLLM_CACHE_GB") or GIGABYTES
        self.bytes = int(float(stated if gigabytes is None else gigabytes) * 1e9)

    def array(self, name: str, identity: object, compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The stored array, memory-mapped read-only, or what `compute` returns, stored.

        Args:
            name: what it is of, for people; it is said when it was computed.
            identity: everything that it depends on, as JSON takes it.
            compute: called only where the array is not there yet.
        """
        path = self._path(name, digest(identity))
        stored = self._read(path)
        if processes.all_agree(stored is not None):
            assert stored is not None
            return stored
        self._check_writable()
        values = compute()
        self._make_room(values.nbytes)
        write_array(path, values)
        say(f"scored {name}")
        return self._reread(path, values)

    def arrays(
        self, name: str, sha256: str, shapes: Shapes, fill: Callable[[dict[str, NDArray[Any]]], None]
    ) -> dict[str, NDArray[Any]]:
        """Several arrays that are made together, in the file itself: they need not fit into memory.

        Args:
            name: what they are of.
            sha256: digest (hex) of everything that they depend on.
            shapes: of each array.
            fill: writes all values into the arrays that it is given.

        Returns:
            The arrays by name, memory-mapped read-only.
        """
        paths = {part: self._path(f"{name}-{part}", sha256) for part in shapes}
        stored = {part: self._read(path) for part, path in paths.items()}
        if processes.all_agree(all(values is not None for values in stored.values())):
            return {part: values for part, values in stored.items() if values is not None}
        self._check_writable()
        self._make_room(sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in shapes.values()))
        return self._fill(paths, shapes, fill)

    def _fill(
        self, paths: Mapping[str, Path], shapes: Shapes, fill: Callable[[dict[str, NDArray[Any]]], None]
    ) -> dict[str, NDArray[Any]]:
        """Open a file an array, fill them, and publish all of them."""
        written: dict[str, Any] = {}
        with ExitStack() as stack:
            for part, (shape, kind) in shapes.items():
                temporary = stack.enter_context(publish(paths[part]))
                written[part] = np.lib.format.open_memmap(temporary, mode="w+", dtype=kind, shape=shape)
            fill(written)
            for values in written.values():
                values.flush()
        # What was written stays mapped, also where another process has removed the file since.
        for values in written.values():
            values.flags.writeable = False
        return written

    def _path(self, name: str, sha256: str) -> Path:
        return self.folder / f"{name.replace(':', '-').replace('/', '-')}-{sha256[:32]}.npy"

    def _read(self, path: Path) -> NDArray[Any] | None:
        """The array of a file, which counts as used now; None where there is none."""
        try:
            values = load_array(path)
        except (OSError, ValueError, EOFError):
            return None  # not there, or no whole array: it is made anew
        with suppress(OSError):  # a cache that may be read only is used as it is
            os.utime(path)
        return values

    def _reread(self, path: Path, values: NDArray[Any]) -> NDArray[Any]:
        stored = self._read(path)
        return values if stored is None else stored

    def _check_writable(self) -> None:
        """Refuse a folder that cannot be written to, before anything is computed in vain."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise StageError(
                f"the cache {self.folder} cannot be written to; wanted a folder of yours: "
                "RECLLM_CACHE=<folder>"
            )

    def _make_room(self, wanted: int) -> None:
        """Remove the files used longest ago until `wanted` bytes more keep the cache within its bound.

        What is being written is not there yet: it neither counts nor goes, unless its writer is gone.
        """
        files = []
        for path in self.folder.rglob("*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process removed it
            if path.is_file() and not (is_temporary(path) and is_at_work(path)):
                files.append((status.st_mtime, status.st_size, path))
        size = sum(size for _, size, _ in files) + wanted
        for _, freed, path in sorted(files):
            if size <= self.bytes:
                return
            path.unlink(missing_ok=True)
            size -= freed


class Hasher:
    """A SHA-256 over arrays and words, for identities that would be long as JSON."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self._hash = hashlib.sha256()

    def add(self, name: str, values: Any = None) -> Hasher:
        """Take in a word, and an array with its shape and type."""
        self._hash.update(f"|{name}|".encode())
        if values is not None:
            array = np.ascontiguousarray(values)
            self._hash.update(f"{array.shape}{array.dtype}".encode())
            self._hash.update(array.data)
        return self

    def copy(self) -> Hasher:
        """One of its own that goes on from here."""
        other = Hasher()
        other._hash = self._hash.copy()
        return other

    def hexdigest(self) -> str:
        """The digest so far."""
        return self._hash.hexdigest()
