"""A finished stage is read-only: whoever opens one changes no byte on disk, and finds its parents again."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recllm import paths
from recllm.errors import StageError
from recllm.evaluation.results import read
from recllm.pipeline.finished import Finished, check_lineage
from recllm.pipeline.manifest import Manifest
from recllm.pipeline.run import main
from recllm.pipeline.stage_file import Role, StageFile
from tests.children import environment
from tests.systems.finished_demo import FinishedDemo

REPOSITORY = Path(__file__).parents[2]


def write_config(root, folder, parents=None, **config):
    """`config.yaml` of a folder as the plan writes it."""
    file = StageFile(
        stage={"log": "log", "stage1": "stage1", "stage3": "stage3"}[folder.partition("/")[0]],
        dataset="demo",
        folder=folder,
        module="",
        parents={str(role): name for role, name in (parents or {}).items()},
        config={"seed": 0, **config},
    )
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / paths.CONFIG).write_text(file.text())
    return root / folder


def make(folder, text="made"):
    """Do a stage's work: one output."""

    def work(run):
        (run.folder / "out.txt").write_text(text)
        run.finish([run.folder / "out.txt"], {"auc": 0.75})

    assert main(work, [str(folder)]) == 0
    return Manifest.read(folder)


@pytest.fixture
def family(tmp_path):
    """A finished log and a CRM that was made from it."""
    root = tmp_path / "demo"
    make(write_config(root, "log"))
    make(write_config(root, "stage1/sim", {Role.LOG: "log"}))
    return root


def snapshot(root):
    """Of each file and folder below a root: bytes and time of the last change."""
    found = {}
    for path in sorted(root.rglob("*")):
        found[str(path.relative_to(root))] = (
            path.read_bytes() if path.is_file() else None,
            path.stat().st_mtime_ns,
            path.stat().st_mode,
        )
    return found


def test_who_reads_finds_what_was_made(family):
    crm = Finished.open(family / "stage1/sim")
    assert (crm.name, crm.root, crm.file.stage) == ("stage1/sim", family, "stage1")
    assert crm.identity == Manifest.read(family / "stage1/sim").identity
    assert crm.config.seed == 0
    assert crm.config.stage3 is None  # no section that did not reach it
    assert crm.export == family / "stage1/sim/export"
    log = crm.parent(Role.LOG)
    assert log == Finished.open(family / "log")
    check_lineage([crm, log])
    with pytest.raises(StageError, match="stage1/sim has no parent lm; it has log"):
        crm.parent(Role.LM)


def test_reading_a_stage_whose_parent_was_remade_changes_no_byte(family):
    (family / "log" / paths.MANIFEST).unlink()
    make(family / "log", "another")
    before = snapshot(family)
    crm = Finished.open(family / "stage1/sim")
    assert crm.manifest.metrics == {"auc": 0.75}
    assert crm.parent(Role.LOG).identity != crm.manifest.parents["log"]
    with pytest.raises(StageError, match=r"stage1/sim was built from log .* run make again"):
        check_lineage([crm])
    assert snapshot(family) == before


def test_a_child_that_may_not_begin_changes_no_byte_either(family, capsys):
    child = write_config(family, "stage3/dpo", {Role.CRM: "stage1/sim"})
    (family / "log" / paths.MANIFEST).unlink()
    make(family / "log", "another")
    before = snapshot(family)

    def never(run):
        raise AssertionError("the parent is not what it was made from")

    capsys.readouterr()
    assert main(never, [str(child)]) == 2
    assert "stage1/sim was built from log" in capsys.readouterr().err
    assert snapshot(family) == before


def test_a_child_at_work_writes_into_its_own_folder_only(family):
    child = write_config(family, "stage3/dpo", {Role.CRM: "stage1/sim"})
    before = {name: state for name, state in snapshot(family).items() if not name.startswith("stage3")}
    make(child)
    after = {name: state for name, state in snapshot(family).items() if not name.startswith("stage3")}
    assert after == before


@pytest.mark.parametrize("harm", ["no config", "another layout", "not finished", "cut", "gone"])
def test_what_cannot_be_read_is_one_line(family, harm):
    folder = family / "stage1/sim"
    if harm == "no config":
        (folder / paths.CONFIG).unlink()
    if harm == "another layout":
        (folder / paths.CONFIG).write_text("stage: stage1\n")
    if harm == "not finished":
        (folder / paths.MANIFEST).unlink()
    if harm == "cut":
        (folder / "out.txt").write_text("m")
    if harm == "gone":
        (folder / "out.txt").unlink()
    before = snapshot(family)
    with pytest.raises(StageError, match="make") as error:
        Finished.open(folder)
    assert "\n" not in str(error.value)
    assert snapshot(family) == before


def test_parents_are_found_in_artifacts_that_are_only_read(family, tmp_path, monkeypatch):
    """In those, what their own parents were is found there too; what is finished here comes first."""
    own = tmp_path / "own" / "demo"
    child = write_config(own, "stage3/dpo", {Role.CRM: "stage1/sim", Role.LOG: "log"})
    assert main(lambda run: None, [str(child)]) == 2
    monkeypatch.setenv("RECLLM_PARENTS", str(tmp_path))
    before = snapshot(family)
    made = make(child)
    assert set(made.parents) == {"stage1/sim", "log"}
    assert Finished.open(child).parent(Role.CRM).folder == family / "stage1/sim"
    assert snapshot(family) == before
    make(write_config(own, "log"), "another")
    assert paths.stage(own, "log") == own / "log"
    assert paths.stage(own, "stage1/sim") == family / "stage1/sim"
    with pytest.raises(StageError, match="stage3/dpo was built from log"):
        check_lineage([Finished.open(child)])


def test_a_read_only_folder_can_be_evaluated_and_reported_from(
    demo_log, demo_config, tiny_lm, tmp_path, monkeypatch
):
    """By a process whom permissions bind; the cache and the evaluation lie elsewhere."""
    finished = tmp_path / "finished"
    monkeypatch.setenv("RECLLM_ARTIFACTS", str(finished))
    demo = FinishedDemo(finished / "demo", demo_log, demo_config, tiny_lm)
    own = tmp_path / "own" / "demo"
    evaluation = own / demo.evaluation.relative_to(demo.root)
    evaluation.mkdir(parents=True)
    shutil.copy(demo.evaluation / paths.CONFIG, evaluation / paths.CONFIG)
    shutil.rmtree(demo.root / "evaluate")
    for path in (demo.root, *demo.root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = snapshot(demo.root)
    inherited = environment(RECLLM_PARENTS=str(finished), RECLLM_CACHE=str(tmp_path / "cache"))

    def run(*words):
        command = [sys.executable, "-m", "tests.unprivileged", *words]
        done = subprocess.run(command, cwd=REPOSITORY, env=inherited, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    try:
        run("stages", str(evaluation), "trainer.accelerator=cpu")
        out = run("stages.report", "show", str(own), StageFile.read(evaluation).folder)
    finally:
        after = snapshot(demo.root)
        for path in (demo.root, *demo.root.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert after == before
    systems = {row.system for row in read(evaluation / paths.ROWS)}
    assert systems >= {"popularity", "sim", "lm", "lora", "reclora", "ctr-bert", "s-dpo", "blend-refit"}
    assert "reclora" in out
    assert list((tmp_path / "cache" / "demo").glob("*.npy"))
    assert not (own / "cache").exists()
    page = (own / paths.REPORT).read_text()
    assert "Nothing finished" not in page
    for name in ("log", "stage1/sim", "stage2/reclora", "stage3/s-dpo-k7"):
        assert f">{name}<" in page, name
