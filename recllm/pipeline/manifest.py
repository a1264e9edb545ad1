"""The manifest of a finished stage: written last and atomically, and the target that Make sees."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recllm.errors import StageError
from recllm.files import digest, write_json
from recllm.paths import MANIFEST, repository

LIBRARIES = ("torch", "lightning", "transformers", "peft", "polars", "faiss-cpu", "numpy")


def commit() -> str:
    """This checkout's commit, `unknown` outside one; `+dirty` where files differ that are not `results/`."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
        return head + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(repository()), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def processor() -> str:
    """Processor model and cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    return f"{os.cpu_count()} cores {name}"


def hardware() -> str:
    """Processor model, cores and the GPU if torch sees one, in a line."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return processor() + gpu


def peak_memory_gb() -> float:
    """Most memory that this process has held, resident, in gigabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)


def peak_gpu_memory_gb() -> float:
    """Most memory of the GPU that this process has held, in gigabytes; 0 where there is none."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else 0.0


@dataclass(frozen=True)
class Manifest:
    """What a finished stage read, made and measured.

    Attributes:
        stage: name of the stage.
        dataset: name of the data set.
        choice: the folder within the stage that says everything that is not the default.
        parents: folder of each parent -> its identity when this stage read it.
        config_sha256: digest of the configuration that reaches this stage.
        outputs: `{"path", "bytes", "sha256"}` of each output, paths relative to the stage's folder.
        metrics: figures by name.
        seed: the run's seed.
        versions: versions of the libraries that shape numbers.
        commit: the code's commit.
        started: when the run that finished began, UTC.
        finished: when it ended, UTC.
        seconds: wall time over all attempts of this stage, in seconds.
        hardware: processor and GPU.
        peak_memory_gb: most memory that the process that finished held, resident; 0: not known.
        peak_gpu_memory_gb: the same of its GPU.
        kind: what kind of work it was, see `recllm.pipeline.workload`; empty: not known.
        amount: how much of it.
    """

    stage: str
    dataset: str
    choice: str
    parents: dict[str, str]
    config_sha256: str
    outputs: list[dict[str, Any]]
    metrics: dict[str, Any]
    seed: int
    started: str
    finished: str
    seconds: float
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in LIBRARIES})
    commit: str = field(default_factory=commit)
    hardware: str = field(default_factory=hardware)
    peak_memory_gb: float = 0.0
    peak_gpu_memory_gb: float = 0.0
    kind: str = ""
    amount: float = 0.0

    @property
    def identity(self) -> str:
        """What a child remembers of this stage: its configuration and its outputs' content, no times."""
        content = sorted((output["path"], output["sha256"]) for output in self.outputs)
        return digest([self.config_sha256, content])

    def write(self, folder: Path) -> None:
        """Write `manifest.json`; call it last."""
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def read(cls, folder: Path, name: str = MANIFEST) -> Manifest:
        """Read `manifest.json` of a finished stage, or a manifest of another name.

        Raises:
            StageError: the stage is not finished.
        """
        path = folder / name
        if not path.exists():
            raise StageError(f"{path} is missing, so that stage is not finished; run its make target first")
        return cls(**json.loads(path.read_text()))

    def missing_output(self, folder: Path) -> str | None:
        """The first output that is gone or has another size, or None."""
        for output in self.outputs:
            path = folder / output["path"]
            if not path.exists() or path.stat().st_size != output["bytes"]:
                return str(output["path"])
        return None


def describe_outputs(folder: Path, paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Path (relative to `folder`), size in bytes and SHA-256 of each file; folders are walked.

    A file whose name begins with a dot is a run's own bookkeeping, and no output where a pattern finds it.
    """
    found = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    files = sorted({file for file in found if file.is_file() and not file.name.startswith(".")})
    described = []
    for file in files:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        described.append(
            {"path": str(file.relative_to(folder)), "bytes": file.stat().st_size, "sha256": sha256},
        )
    return described
