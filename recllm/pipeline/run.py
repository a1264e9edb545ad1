"""One run of one stage: its resolved configuration, its verified parents, and the manifest at the end."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from recllm import paths
from recllm.cache import Cache
from recllm.config.schema import Config
from recllm.console import duration, is_first_process, pulse, say, seen_live, speak_as
from recllm.errors import Busy, ConfigError, StageError
from recllm.files import digest, now, write_json
from recllm.pipeline.finished import Finished, check_lineage
from recllm.pipeline.manifest import Manifest, describe_outputs, peak_gpu_memory_gb, peak_memory_gb
from recllm.pipeline.stage_file import Group, Role, StageFile, StageFolder
from recllm.pipeline.workload import workload

BEFORE = ".manifest-before.json"
"""The manifest of an earlier run whose outputs still lie in the folder of one that is at work."""
CLOCK = ".seconds"


@dataclass
class Run(StageFolder):
    """A stage at work.

    Attributes:
        folder: where it writes, `artifacts/<dataset>/<stage>/<choice>`.
        file: what its `config.yaml` says.
        config: the sections that reach this stage.
        parents: the finished stages that it is made from, by role.
        systems: of an evaluation, further ones by group and system.
        raw: folder or archive given by `RAW=`, for recipes; None to download.
        done: whether a finished run of the same configuration and parents is already there.
    """

    folder: Path
    file: StageFile
    config: Config
    parents: dict[Role, Finished]
    systems: dict[Group, dict[str, Finished]]
    raw: Path | None
    started: str = field(default_factory=now)
    done: bool = False
    _clock: float = field(default_factory=time.monotonic)
    _lock: IO[str] | None = None
    _seconds_before: float = 0.0

    @classmethod
    def start(cls, arguments: Sequence[str]) -> Run:
        """Read the configuration, verify the parents, and take the folder for this process.

        It is for who makes the stage. Who only reads a finished one opens it with `Finished.open`.

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
        file = StageFile.read(folder)
        root = file.root(folder)
        opened = {name: Finished.open(paths.stage(root, name)) for name in file.folders()}
        check_lineage(opened.values())
        run = cls(
            folder=folder,
            file=file,
            config=file.sections(execution),
            parents={Role(role): opened[name] for role, name in file.parents.items()},
            systems={
                Group(group): {system: opened[name] for system, name in systems.items()}
                for group, systems in file.systems.items()
            },
            raw=raw[0] if raw else None,
        )
        run.done = run._is_done()
        if is_first_process() and not run.done and not file.table.shared:
            run._take()
        speak_as(run.name)
        say("nothing has changed" if run.done else "starts")
        return run

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.file.stage

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.file.dataset

    @property
    def cache(self) -> Cache:
        """Where arrays are kept that can be computed again."""
        return Cache(paths.cache(self.root))

    @property
    def everyone(self) -> list[Finished]:
        """All parents, each once."""
        grouped = [parent for group in self.systems.values() for parent in group.values()]
        return list({parent.name: parent for parent in (*self.parents.values(), *grouped)}.values())

    def _is_done(self) -> bool:
        if not (self.folder / paths.MANIFEST).exists():
            return False
        manifest = Manifest.read(self.folder)
        same = manifest.config_sha256 == self.file.sha256 and manifest.parents == self.identities
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
        if (self.folder / paths.MANIFEST).exists():
            (self.folder / paths.MANIFEST).replace(self.folder / BEFORE)
        self._seconds_before = self._clock_before()

    def close(self) -> None:
        """Give the folder back to other processes; at the latest, that is when this one ends."""
        if self._lock is not None:
            self._lock.close()

    def _clock_before(self) -> float:
        """Wall time of earlier attempts that this one resumes, in seconds."""
        clock = self.folder / CLOCK
        same = clock.exists() and clock.read_text().partition(" ")[0] == self.fingerprint
        return float(clock.read_text().partition(" ")[2]) if same else 0.0

    def tick(self) -> None:
        """Keep the wall time so far beside what is done, for a run of the same fingerprint that goes on."""
        (self.folder / CLOCK).write_text(f"{self.fingerprint} {self.seconds:.1f}")

    def resume_clock(self, seconds: float) -> None:
        """Count the wall time of earlier attempts, in seconds, as the checkpoint that is resumed tells it."""
        self._seconds_before = seconds

    @property
    def seconds(self) -> float:
        """Wall time over all attempts, in seconds."""
        return self._seconds_before + time.monotonic() - self._clock

    @property
    def identities(self) -> dict[str, str]:
        """Folder of each parent -> its identity now."""
        return {parent.name: parent.identity for parent in self.everyone}

    @property
    def fingerprint(self) -> str:
        """What a checkpoint must match to be resumed: configuration and parents."""
        return digest([self.file.sha256, self.identities])[:16]

    @property
    def _seed(self) -> int:
        """The seed that made the outputs: of stages that all seeds share that of their own section."""
        section = self.file.config.get(self.file.table.seed_section, self.file.config)
        return int(section.get("seed", 0))

    def finish(self, outputs: Iterable[Path], metrics: dict[str, Any]) -> None:
        """Write `metrics.json`, then the manifest; only the first process does."""
        if not is_first_process():
            return
        write_json(self.folder / paths.METRICS, metrics)
        files = [*outputs, self.folder / paths.METRICS]
        log = self.parents[Role.LOG].manifest.metrics if Role.LOG in self.parents else metrics
        work = workload(self.stage, self.file.config, log, self.systems)
        manifest = Manifest(
            stage=self.stage,
            dataset=self.file.dataset,
            choice=self.file.choice,
            parents=self.identities,
            config_sha256=self.file.sha256,
            outputs=describe_outputs(self.folder, files),
            metrics=metrics,
            seed=self._seed,
            started=self.started,
            finished=now(),
            seconds=round(self.seconds, 1),
            peak_memory_gb=peak_memory_gb(),
            peak_gpu_memory_gb=peak_gpu_memory_gb(),
            kind=work.kind if work else "",
            amount=work.amount if work else 0.0,
        )
        (self.folder / CLOCK).unlink(missing_ok=True)
        self._remove_what_is_no_output_now(manifest)
        manifest.write(self.folder)
        gpu = f", {manifest.peak_gpu_memory_gb:.1f} GB of the GPU" if manifest.peak_gpu_memory_gb else ""
        say(f"done in {manifest.seconds:.0f} s, {manifest.peak_memory_gb:.1f} GB at most{gpu}")

    def _remove_what_is_no_output_now(self, manifest: Manifest) -> None:
        """Remove outputs of the folder's earlier run that this one did not make: nobody shall read them."""
        before = self.folder / BEFORE
        if not before.exists():
            return
        listed = {output["path"] for output in manifest.outputs}
        for output in Manifest.read(self.folder, BEFORE).outputs:
            if output["path"] not in listed:
                path = self.folder / output["path"]
                path.unlink(missing_ok=True)
                while (path := path.parent) != self.folder and path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
        before.unlink()


def main(work: Callable[[Run], None], arguments: Sequence[str]) -> int:
    """Run a stage's `work(run)` and turn its expected errors into one line and a non-zero status."""
    try:
        run = Run.start(arguments)
        if not run.done:
            at_work = pulse(lambda: f"at work for {duration(run.seconds)}, {peak_memory_gb():.1f} GB at most")
            with seen_live(), at_work:
                work(run)
    except (StageError, ConfigError, ValueError, FileNotFoundError) as error:
        if os.environ.get("RECLLM_TRACEBACK"):
            raise
        line = " ".join(str(error).split())
        print(f"error: {line} (RECLLM_TRACEBACK=1 shows where)", file=sys.stderr, flush=True)
        return 2
    return 0
