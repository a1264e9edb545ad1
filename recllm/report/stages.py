"""What a data set's artifacts hold: stages that are finished, and what there is to say of the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from recllm import paths
from recllm.errors import StageError
from recllm.pipeline.finished import Finished
from recllm.pipeline.stages import STAGES

UNREADABLE = (StageError, OSError, ValueError, TypeError, KeyError, YAMLError, OmegaConfBaseException)
"""What opening a stage may raise whose files are cut short, written by hand, or of another version."""


def reported() -> dict[str, str]:
    """First part of the folders that the report tells of -> the make target that fills them."""
    return {stage.folder: stage.goal for stage in STAGES.values() if stage.reported}


def finished_stages(folder: Path, missing: list[str]) -> dict[str, Finished]:
    """Finished stages by name, in pipeline order.

    Args:
        folder: `artifacts/<dataset>`; what is only read elsewhere (`RECLLM_PARENTS`) is told of besides.
        missing: lines of what is not there, cannot be read or is not finished are added.
    """
    found: dict[str, Finished] = {}
    for top, goal in reported().items():
        manifests = files(folder, top, paths.MANIFEST)
        for name, path in manifests.items():
            try:
                found[name] = Finished.open(path.parent)
            except UNREADABLE as error:
                missing.append(f"{name} cannot be read: {' '.join(str(error).split())}")
        if not manifests:
            missing.append(f"Nothing finished in {top}/: no {paths.MANIFEST}; `make {goal}` writes it.")
        begun = {*files(folder, top, paths.CHECKPOINTS), *files(folder, top, paths.LOGS)}
        missing += [f"{name} was begun and is not finished." for name in sorted(begun - manifests.keys())]
    return found


def files(folder: Path, top: str, name: str) -> dict[str, Path]:
    """Files or folders of a name in a stage's folders -> their paths, by the folder that they lie in.

    Args:
        folder: see `finished_stages`.
        top: first part of the stage's folders; those that say something besides count too.
        name: of the files.
    """
    found: dict[str, Path] = {}
    for root in paths.roots(folder):
        for path in sorted(_below(root, top, name)):
            found.setdefault(path.parent.relative_to(root).as_posix(), path)
    return found


def _below(root: Path, top: str, name: str) -> Iterator[Path]:
    for place in (root / top, *root.glob(f"{top}+*")):
        yield from place.rglob(name)
