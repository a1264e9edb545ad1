"""The one door to disk: digests, files that appear whole or not at all, and safe loading."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def digest(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; at the end of the block it takes the name `path`, at once.

    So a reader sees the old file or the whole new one, and of two writers the later one wins. Where the block
    fails, nothing is left of it.

    Args:
        path: the file to be; its folder is made. The path given to the block has the same suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.stem}.{writer}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a file is what `publish` gave a block to write to."""
    return re.search(r"\.\d+-\d+\.tmp(\.\w+)?$", path.name) is not None


def is_at_work(temporary: Path) -> bool:
    """Whether the process that writes a temporary file may still be there: it runs, or was at it this day.

    A folder may be shared with other machines, whose processes are not known here.
    """
    writer = re.search(r"\.(\d+)-\d+\.tmp", temporary.name)
    if writer is None or Path(f"/proc/{writer[1]}").exists() or not Path("/proc").exists():
        return True
    try:
        return time.time() - temporary.stat().st_mtime < 24 * 60 * 60
    except FileNotFoundError:
        return False


def write_text(path: Path, text: str) -> None:
    """Publish a text file, UTF-8."""
    with publish(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Publish a value as JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_array(path: Path, values: NDArray[Any]) -> None:
    """Publish an array as `.npy`, in C order: the rows of a mapped array lie together."""
    with publish(path) as temporary:
        np.save(temporary, np.asarray(values, order="C"))


def load_array(path: Path, mapped: bool = True) -> NDArray[Any]:
    """An array of an `.npy` file, read-only and memory-mapped, or (not `mapped`) in memory."""
    return np.asarray(np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False))


def load_weights(path: Path, mapped: bool = False) -> Any:
    """A checkpoint's content: tensors and primitives only, so that no code of a file is ever run.

    Args:
        path: the file.
        mapped: whether tensors are memory-mapped, for who reads a few values of a large file.
    """
    import torch  # a process that reads configurations alone does not wait for it

    return torch.load(path, weights_only=True, mmap=mapped or None)


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
