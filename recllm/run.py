"""One run of one stage: its resolved configuration, its verified parents, and the manifest at the end."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from recllm import paths
from recllm.checks import ConfigError
from recllm.config import empty, freeze, override, parse_overrides
from recllm.manifest import Manifest, check_parents, describe_outputs, digest, now, write_json
from recllm.schema import EXECUTION, Config


class StageError(RuntimeError):
    """A stage that cannot go on; its text is one line for the user."""


class Busy(StageError):
    """Another process is at work in the folder."""


_speaker = ""  # name of the run that this process is at, once there is one

SHARED = ("tune",)
"""Stages that several processes may be at work in; they see to it themselves."""

OWN_SEED = {
    "log": "prepare",
    "lm-text": "lm",
    "lm-prompts": "lm",
    "neighbours": "retrieval",
    "encoder": "encoder",
}
"""Stages that all seeds share -> the section that has a seed of their own."""


def is_first_process() -> bool:
    """Whether this process writes: rank 0, also before torch.distributed is up."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


def say(text: str) -> None:
    """Print a line for the user, once over all processes; the run's name tells it from those beside it."""
    if is_first_process():
        # The end of the line in the same write: runs side by side share the terminal.
        print(f"[{_speaker}] {text}\n" if _speaker else f"{text}\n", end="", flush=True)


def read_config(folder: Path) -> dict[str, Any]:
    """The stage's `config.yaml` as the plan wrote it.

    Raises:
        StageError: where there is none.
    """
    path = folder / paths.CONFIG
    if not path.exists():
        raise StageError(f"{path} is missing; stages are run by make, e.g. `make stage1`, which writes it")
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def config_digest(content: dict[str, Any]) -> str:
    """Digest of what reaches a stage: its sections and which parents it reads; no execution key."""
    return digest([content["stage"], content["dataset"], content["parents"], content["config"]])


def load_sections(content: dict[str, Any], execution: Iterable[str] = ()) -> Config:
    """The frozen configuration; sections that do not reach the stage are None: none is read by mistake."""
    merged = OmegaConf.merge(empty(), content["config"])
    for key, value in parse_overrides(execution).items():
        if not key.startswith(f"{EXECUTION}."):
            raise ConfigError(f"{key} is no execution key; give it to make as ARGS={key}={value}")
        merged = override(merged, key, value)
    config = freeze(merged)
    unread: dict[str, Any] = {
        f.name: None for f in dataclasses.fields(Config) if f.name not in (*content["config"], EXECUTION)
    }
    return dataclasses.replace(config, **unread)


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
        global _speaker
        _speaker = run.name
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
