"""A bundle: one folder with all that recommending needs, of the stages that a cascade is made of.

It is a pruned copy of their folders: of each `config.yaml`, `manifest.json` and the outputs that are read, so
that the same code opens it (`recllm.pipeline.finished.Finished`), and `bundle.json` besides, which says the
bundle's version and the digest of every file. Nothing in it names the machine that made it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recllm import __version__, paths
from recllm.errors import StageError
from recllm.eventlog.log import ARRAYS, OPTIONAL_ARRAYS
from recllm.files import digest, now, write_json, write_text
from recllm.pipeline.finished import Finished
from recllm.pipeline.manifest import Manifest
from recllm.pipeline.stage_file import Role
from recllm.serving.opening import Fitted

LAYOUT = 1
"""Layout of bundles; a bundle of another one is refused."""
CARD = "README.md"
LOGS = ("log", "log-all")
"""Stages that make an event log: one that holds samples out, and one that holds nothing out."""

_LOG = {f"{name}.npy" for name in (*ARRAYS, *OPTIONAL_ARRAYS)} | {
    "meta.json",
    "items.parquet",
    "users.parquet",
}


def version_of(folder: Path) -> str:
    """Hash of all that a bundle holds, or of what a finished cascade was made of."""
    path = folder / paths.BUNDLE
    if path.exists():
        return digest(json.loads(path.read_text(encoding="utf-8"))["files"])
    return digest((folder / paths.MANIFEST).read_text(encoding="utf-8"))


def write_bundle(cascade: Finished, folder: Path) -> dict[str, Any]:
    """Write the bundle of a cascade.

    It is made beside its place and moved there whole; a bundle that is there is replaced.

    Args:
        cascade: the finished stage.
        folder: where it is to be.

    Returns:
        What `bundle.json` says.

    Raises:
        StageError: the LM is of a local folder outside the artifacts, which a bundle cannot name.
    """
    stages = _stages(cascade)
    _check_lm(cascade)
    making = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    try:
        for stage in stages:
            _copy(stage, making / stage.name)
        write_text(making / CARD, model_card(cascade, stages))
        files = {}
        for path in sorted(path for path in making.rglob("*") if path.is_file()):
            files[str(path.relative_to(making))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        facts = {
            "layout": LAYOUT,
            "recllm": __version__,
            "dataset": cascade.file.dataset,
            "cascade": cascade.name,
            "made": now(),
            "files": files,
        }
        write_json(making / paths.BUNDLE, facts)
        put_in_place(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return facts


def put_in_place(making: Path, folder: Path) -> None:
    """Put a whole folder where another one may stand, which neither an error nor a kill loses."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # killed between the two moves
        old.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    try:
        making.replace(folder)
    except OSError:
        if old.exists():
            old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_bundle(folder: Path, verify: bool = True) -> str:
    """See that a bundle can be used; returns the folder of its cascade within.

    Args:
        folder: the bundle.
        verify: whether the digest of every file is computed, too; sizes are looked at in any case.

    Raises:
        StageError: it is of another version, or a file is missing or has another content.
    """
    try:
        facts = json.loads((folder / paths.BUNDLE).read_text(encoding="utf-8"))
        layout, files, cascade = facts["layout"], facts["files"], facts["cascade"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"{folder / paths.BUNDLE} cannot be read ({error}); make the bundle anew") from error
    if layout != LAYOUT:
        raise StageError(
            f"{folder} is a bundle of layout {layout}, made by recllm {facts.get('recllm')}; wanted layout "
            f"{LAYOUT}, as recllm {__version__} reads it: make it anew, or install the version that made it"
        )
    for name, wanted in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != wanted["bytes"]:
            got = "is missing" if size is None else f"has {size:,} bytes"
            raise StageError(
                f"{path} {got}; wanted {wanted['bytes']:,} bytes: copy the bundle again, or make it anew"
            )
        if verify and _sha256(path) != wanted["sha256"]:
            raise StageError(
                f"{path} has changed since the bundle was made (its SHA-256 is another); copy the bundle "
                "again, or make it anew"
            )
    return str(cascade)


def _stages(cascade: Finished) -> list[Finished]:
    """The cascade and all that it reads, each once: its parents, and the CRM that gates its LM."""
    stages = [cascade, *(cascade.parent(role) for role in cascade.made_of)]
    for stage in list(stages):
        if stage.file.stage in ("stage2", "stage3"):
            stages.append(stage.parent(Role.CRM))
            if stage.file.stage == "stage3":  # whether prompts show nearest events is said there
                stages.append(stage.parent(Role.START))
    return list({stage.name: stage for stage in stages}.values())


def _is_needed(stage: Finished, path: str) -> bool:
    """Whether recommending reads this output of a stage."""
    kind = stage.file.stage
    if kind in LOGS:
        return path in _LOG
    if kind == "neighbors":
        return path in (paths.VECTORS, paths.FOLDS)
    first = path.partition("/")[0]
    return first in (paths.EXPORT, paths.ADAPTER, paths.RANKING_ADAPTER)


def _copy(stage: Finished, folder: Path) -> None:
    """Copy what is needed of a stage; its manifest lists what is there."""
    outputs = [output for output in stage.manifest.outputs if _is_needed(stage, output["path"])]
    for output in outputs:
        path = folder / output["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(stage.folder / output["path"], path)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(stage.folder / paths.CONFIG, folder / paths.CONFIG)
    dataclasses.replace(stage.manifest, outputs=outputs).write(folder)


def _check_lm(cascade: Finished) -> None:
    lm = cascade.config.lm.model
    path = lm.path
    if Role.SYSTEM in cascade.file.parents and not lm.is_exported and Path(str(path)).exists():
        raise StageError(
            f"the LM is the local folder {path}, which a bundle cannot hold; wanted LM=tiny, or a hub id"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_card(cascade: Finished, stages: Iterable[Finished]) -> str:
    """A page about the bundle: data, steps, figures, license, use."""
    by_stage = {stage.name: stage for stage in stages}
    log = next(stage for stage in by_stage.values() if stage.file.stage in LOGS).manifest.metrics
    chosen = cascade.file.parents.get(Role.CHOSEN)
    license = next(
        (stage.config.stage2.license for stage in by_stage.values() if stage.file.stage == "stage2"), ""
    )
    lines = [
        f"# {cascade.file.dataset}: {cascade.name}",
        "",
        f"A recommender of recllm {__version__}: " + " -> ".join(_step_names(cascade)) + ".",
        "",
        "    import recllm",
        "",
        '    recommender = recllm.Recommender.load("this-folder")',
        "    recommender.recommend([1, 2, 3], k=10)",
        "",
        "## Data",
        "",
        _about_data(log, chosen),
        "",
        "## Figures",
        "",
        _about_figures(chosen),
        "",
        "| figure | value |",
        "| --- | --- |",
    ]
    measured = {**Fitted.read(cascade.export / paths.CASCADE).measured, **cascade.manifest.metrics}
    figures = {name: value for name, value in measured.items() if isinstance(value, float)}
    lines += [f"| {name} | {value:.4f} |" for name, value in sorted(figures.items())]
    if chosen is not None:
        lines += ["", "## How long it was trained", "", *_training_lengths(by_stage.values())]
    lines += ["", "## Made from", "", "| stage | commit | finished (UTC) |", "| --- | --- | --- |"]
    for stage in by_stage.values():
        manifest: Manifest = stage.manifest
        lines.append(f"| {stage.name} | {manifest.commit} | {manifest.finished[:19].replace('T', ' ')} |")
    lines += ["", "## License", "", license or "Not stated (`stage2.license`).", ""]
    return "\n".join(lines)


def _about_data(log: Mapping[str, Any], chosen: str | None) -> str:
    """What trained, in a paragraph."""
    size = f"{log.get('users', 0):,} users, {log.get('items', 0):,} items, {log.get('events', 0):,} events; "
    if chosen is not None:
        return (
            f"{size}all {log.get('train', 0):,} samples train, those of the validation and the test split "
            "among them. Nothing that is measured on these data says anything of these models."
        )
    return (
        f"{size}{log.get('train', 0):,} samples train, {log.get('valid', 0):,} validate, "
        f"{log.get('test', 0):,} test. Models were trained on the training split only; histories of known "
        "users hold all events."
    )


def _about_figures(chosen: str | None) -> str:
    """What the figures are of, in a paragraph."""
    if chosen is None:
        return "On validation queries, by which the steps' weights were fitted; they are no test figures."
    return (
        f"No test figure is of these models: they have read the test split. What follows is of `{chosen}`, "
        "the same cascade trained on the training split alone, on validation queries, by which the weights "
        "that are used here were fitted. Figures of the index are of this one."
    )


def _training_lengths(stages: Iterable[Finished]) -> list[str]:
    """Of each model that repeats one of the training split, how far it was trained, and as which."""
    lines = [
        "Each model took as large a share of its planned steps, so as many passes over its rows, as the best "
        "checkpoint on validation of the same model that was trained on the training split alone.",
        "",
        "| model | steps | planned | as |",
        "| --- | --- | --- | --- |",
    ]
    for stage in stages:
        metrics = stage.manifest.metrics
        if Role.CHOSEN in stage.file.parents and "steps" in metrics:
            steps = [int(metrics["step"])]
            if "ranking" in metrics:
                steps.append(int(metrics["ranking"]["step"]))
            named = " and ".join(f"{step:,}" for step in steps)
            lines.append(
                f"| {stage.name} | {named} | {metrics['steps']:,} | {stage.file.parents[Role.CHOSEN]} |"
            )
    return lines


def _step_names(cascade: Finished) -> list[str]:
    settings = cascade.config.cascade
    names = [f"{settings.first} (first {settings.retrieved})"]
    if settings.crm and Role.CRM in cascade.file.parents:
        names.append(cascade.file.parents[Role.CRM])
    if Role.SYSTEM in cascade.file.parents:
        names.append(f"{cascade.file.parents[Role.SYSTEM]} (first {settings.ranked})")
    return names
