"""A finished stage, opened for reading: the one way in for children, for serving, and for a notebook."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from recllm import paths
from recllm.config.schema import Config
from recllm.errors import StageError
from recllm.pipeline.manifest import Manifest
from recllm.pipeline.stage_file import Role, StageFile, StageFolder


@dataclass(frozen=True)
class Finished(StageFolder):
    """A stage that is done. Opening one takes no lock, writes nothing and deletes nothing.

    Attributes:
        folder: where it lies, `artifacts/<dataset>/<stage>/<choice>`.
        file: what its `config.yaml` says.
        manifest: what it read, made and measured.
    """

    folder: Path
    file: StageFile
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Finished:
        """Open the stage in a folder, e.g. `artifacts/demo/stage2/reclora`.

        Raises:
            StageError: its `config.yaml` is missing or of another layout, it is not finished, or an output is
                gone.
        """
        folder = Path(folder)
        file = StageFile.read(folder)
        manifest = Manifest.read(folder)
        if (gone := manifest.missing_output(folder)) is not None:
            raise StageError(
                f"{folder / gone} is gone or has changed its size since the stage was finished; "
                f"remove {folder / paths.MANIFEST} and run make again"
            )
        return cls(folder, file, manifest)

    @cached_property
    def config(self) -> Config:
        """The configuration that made it; sections that did not reach it are None."""
        return self.file.sections()

    @property
    def identity(self) -> str:
        """What a child remembers of it: its configuration and its outputs' content, no times."""
        return self.manifest.identity

    @property
    def made_of(self) -> list[Role]:
        """Roles of the parents that it reads when it is used; what chose its settings is none of them."""
        return [Role(role) for role in self.file.parents if role != Role.CHOSEN]

    def parent(self, role: Role) -> Finished:
        """A stage that it was made from.

        Raises:
            StageError: it has no such parent, or that is not finished any more.
        """
        if role not in self.file.parents:
            raise StageError(f"{self.name} has no parent {role}; it has {', '.join(self.file.parents)}")
        return Finished.open(paths.stage(self.root, self.file.parents[role]))


def check_lineage(parents: Iterable[Finished]) -> None:
    """Refuse parents that were not built from one another.

    Raises:
        StageError: one was built from another version of an ancestor than the one that is there now.
    """
    for parent in parents:
        for ancestor, wanted in parent.manifest.parents.items():
            got = Manifest.read(paths.stage(parent.root, ancestor)).identity
            if got != wanted:
                raise StageError(
                    f"{parent.name} was built from {ancestor} {wanted[:12]}, but {ancestor} is now "
                    f"{got[:12]}; remove {parent.folder / paths.MANIFEST} and run make again"
                )
