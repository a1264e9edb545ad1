"""What tests of plans ask of one."""

from recllm.config.request import parse
from recllm.pipeline.graph import Plan
from recllm.pipeline.manifest import Manifest, describe_outputs
from recllm.pipeline.stage_file import StageFile


def needed(*words):
    return {node.folder: node for node in Plan(parse(words)).needed()}


def rules(root):
    """What was planned last: the rules' path."""
    return max((root / "plans").glob("*.mk"), key=lambda path: path.stat().st_mtime_ns)


def of_stage(nodes, stage):
    return {folder for folder in nodes if folder.startswith(f"{stage}/")}


def finish(plan):
    """Pretend that everything the plan needs was done, parents first."""
    for node in plan.needed():
        folder = plan.root / node.folder
        (folder / "out").write_text(node.folder)
        Manifest(
            stage=node.stage.name,
            dataset=node.dataset,
            choice=node.file.choice,
            parents={p.folder: Manifest.read(plan.root / p.folder).identity for p in node.above},
            config_sha256=StageFile.read(folder).sha256,
            outputs=describe_outputs(folder, [folder / "out"]),
            metrics={},
            seed=0,
            started="",
            finished="",
            seconds=0.0,
            commit="abc",
            hardware="",
        ).write(folder)


def states(*words):
    return {node.folder: state for node, state, _ in Plan(parse(words)).states()}


def configs(root):
    return {str(path.parent.relative_to(root)): path.read_text() for path in root.rglob("config.yaml")}
