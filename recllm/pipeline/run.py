"""One run of one stage: its resolved configuration, its verified parents, and the manifest at the end."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from recllm import paths
from recllm.config.schema import Config
from recllm.console import is_first_process, say, speak_as
from recllm.errors import Busy, ConfigError, StageError
from recllm.files import digest, now, write_json
from recllm.pipeline.finished import config_digest, load_sections, read_config
from recllm.pipeline.manifest import Manifest, check_parents, describe_outputs
from recllm.pipeline.stages import OWN_SEED, SHARED


@dataclass
class Run:
    """A stage at work.

    Attributes:
        stage: name of the stage.
        folder: where it writes, `artifacts/<dataset>/<stage>/<choice>`.
        root: `artifacts/<dataset>`.
        config: the sections that reach this stage.
        parents: role -> folder of each parent, relative to `root`.
        manifests: folder -> manifest of each parent.
        done: whether a finished run of the same configuration and parents is already there.
        raw: folder or archive given by `RAW=`, for recipes; None to download.
    """

    stage: str
    folder: Path
    root: Path
    config: Config
    parents: dict[str, str]
    manifests: dict[str, Manifest]
    config_sha256: str
    content: dict[str, Any]
    raw: Path | None
    started: str = field(default_factory=now)
    done: bool = False
    _clock: float = field(default_factory=time.monotonic)
    _lock: IO[str] | None = None
    _seconds_before: float = 0.0

    @classmethod
    def start(cls, arguments: Sequence[str]) -> Run:
        """Read the configuration, verify the parents, and take the folder for this process.

        Args:
            arguments: the stage's folder, then execution keys (`trainer.devices=2`), `raw=PATH` among them.

        Raises:
            StageError, ConfigError, ValueError, FileNotFoundError: one line each.
        """
        if not arguments:
            raise StageError("no folder given; stages are run by make, e.g. `make stage1`")
        folder = Path(arguments[0])
        raw = [Path(word.removeprefix("raw=")) for word in arguments[1:] if word.startswith("raw=")]
        execution = [word for word in arguments[1:] if not word.startswith("raw=")]
        content = read_config(folder)
        root = paths.artifacts() / content["dataset"]
        parents: dict[str, str] = content["parents"]
        manifests = {parent: Manifest.read(root / parent) for parent in parents.values()}
        check_parents(root, manifests)
        run = cls(
            stage=content["stage"],
            folder=folder,
            root=root,
            config=load_sections(content, execution),
            parents=parents,
            manifests=manifests,
            config_sha256=config_digest(content),
            content=content,
            raw=raw[0] if raw else None,
        )
        run.done = run._is_done()
        if is_first_process() and not run.done and run.stage not in SHARED:
            run._take()
        speak_as(run.name)
        say("nothing has changed" if run.done else "starts")
        return run

    @property
    def name(self) -> str:
        """The folder within `artifacts/<dataset>`, e.g. `stage2/reclora+din`."""
        return str(self.folder.relative_to(self.root))

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return str(self.content["dataset"])

    def parent(self, role: str) -> Path:
        """Folder of the parent with this role."""
        return self.root / self.parents[role]

    def manifest(self, role: str) -> Manifest:
        """Manifest of the parent with this role."""
        return self.manifests[self.parents[role]]

    def _is_done(self) -> bool:
        if not (self.folder / paths.MANIFEST).exists():
            return False
        manifest = Manifest.read(self.folder)
        same = manifest.config_sha256 == self.config_sha256 and manifest.parents == self.identities
        if not same or manifest.missing_output(self.folder) is not None:
            return False
        if is_first_process():
            # Make compares times: a stage whose parents were remade to the same content is up to date.
            (self.folder / paths.MANIFEST).touch()
        return True

    def _take(self) -> None:
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Busy(f"another process is at work in {self.folder}; wait for it, or stop it") from error
        # From here on a manifest would speak of files that are about to change.
        (self.folder / paths.MANIFEST).unlink(missing_ok=True)
        self._seconds_before = self._clock_before()

    def close(self) -> None:
        """Give the folder back to other processes; at the latest, that is when this one ends."""
        if self._lock is not None:
            self._lock.close()

    def _clock_before(self) -> float:
        """Wall time of earlier attempts that this one resumes, in seconds."""
        clock = self.folder / ".seconds"
        same = clock.exists() and clock.read_text().partition(" ")[0] == self.fingerprint
        return float(clock.read_text().partition(" ")[2]) if same else 0.0

    def tick(self) -> None:
        """Keep the wall time so far, so that a resumed run can tell the whole."""
        (self.folder / ".seconds").write_text(f"{self.fingerprint} {self.seconds:.1f}")

    @property
    def seconds(self) -> float:
        """Wall time over all attempts, in seconds."""
        return self._seconds_before + time.monotonic() - self._clock

    @property
    def identities(self) -> dict[str, str]:
        """Folder of each parent -> its identity now."""
        return {folder: parent.identity for folder, parent in self.manifests.items()}

    @property
    def fingerprint(self) -> str:
        """What a checkpoint must match to be resumed: configuration and parents."""
        return digest([self.config_sha256, self.identities])[:16]

    @property
    def _seed(self) -> int:
        """The seed that made the outputs: of stages that all seeds share that of their own section."""
        section = self.content["config"].get(OWN_SEED.get(self.stage, ""), self.content["config"])
        return int(section.get("seed", 0))

    def finish(self, outputs: Iterable[Path], metrics: dict[str, Any]) -> None:
        """Write `metrics.json`, then the manifest; only the first process does."""
        if not is_first_process():
            return
        write_json(self.folder / paths.METRICS, metrics)
        files = [*outputs, self.folder / paths.METRICS]
        manifest = Manifest(
            stage=self.stage,
            dataset=self.content["dataset"],
            choice=self.content["choice"],
            parents=self.identities,
            config_sha256=self.config_sha256,
            outputs=describe_outputs(self.folder, files),
            metrics=metrics,
            seed=self._seed,
            started=self.started,
            finished=now(),
            seconds=round(self.seconds, 1),
        )
        (self.folder / ".seconds").unlink(missing_ok=True)
        manifest.write(self.folder)
        say(f"done in {manifest.seconds:.0f} s")


def main(work: Any, arguments: Sequence[str]) -> int:
    """Run a stage's `work(run)` and turn its expected errors into one line and a non-zero status."""
    try:
        run = Run.start(arguments)
        if not run.done:
            work(run)
    except (StageError, ConfigError, ValueError, FileNotFoundError) as error:
        if os.environ.get("RECLLM_TRACEBACK"):
            raise
        line = " ".join(str(error).split())
        print(f"error: {line} (RECLLM_TRACEBACK=1 shows where)", file=sys.stderr, flush=True)
        return 2
    return 0
