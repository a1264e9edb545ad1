"""Folders of finished stages as the report reads them, in miniature."""

from recllm import paths
from recllm.pipeline.manifest import Manifest
from recllm.pipeline.stage_file import StageFile

STAGES = {
    "log": "log",
    "lm": "lm-prompts",
    "neighbors": "neighbors",
    "stage1": "stage1",
    "stage2": "stage2",
    "stage3": "stage3",
    "evaluate": "evaluate",
}
"""First part of a folder -> the stage that makes it."""


def write_stage(root, name, *, parents=None, config=None, sweep=None, **manifest):
    """A finished stage's folder with `config.yaml` and `manifest.json`; its outputs are the caller's."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    stage = STAGES[name.partition("/")[0]]
    file = StageFile(
        stage=stage,
        dataset=root.name,
        folder=name,
        module="",
        parents={str(role): parent for role, parent in (parents or {}).items()},
        config={"seed": 0} if config is None else config,
        sweep=sweep or {},
    )
    (folder / paths.CONFIG).write_text(file.text())
    values = {
        "parents": {}, "outputs": [], "metrics": {}, "seed": 0, "started": "", "finished": "", "seconds": 1.0,
        "versions": {}, "commit": "", "hardware": "", **manifest,
    }  # fmt: skip
    Manifest(stage=stage, dataset=root.name, choice=file.choice, config_sha256=file.sha256, **values).write(
        folder
    )
    return folder
