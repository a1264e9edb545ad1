import json
import os
import subprocess
import sys
import time

import pytest

from recllm.errors import StageError
from recllm.pipeline.manifest import Manifest
from recllm.pipeline.run import Run, main


def write(run):
    """The work of a stage: one output."""
    (run.folder / "out.txt").write_text("made")
    run.finish([run.folder / "out.txt"], {"auc": 0.75})


def done(folder):
    assert main(write, [str(folder)]) == 0
    return Manifest.read(folder)


def error(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_run_writes_metrics_and_manifest(make_stage):
    log = make_stage("log")
    parent = done(log)
    folder = make_stage("stage1/sim", parents={"log": "log"})
    made = done(folder)
    assert (made.stage, made.dataset, made.choice, made.seed) == ("stage1", "demo", "sim", 0)
    assert made.parents == {"log": parent.identity}
    assert json.loads((folder / "metrics.json").read_text()) == {"auc": 0.75} == made.metrics
    assert [output["path"] for output in made.outputs] == ["metrics.json", "out.txt"]
    assert made.started <= made.finished


def test_a_manifest_has_the_seed_of_the_section_that_made_it(make_stage):
    assert done(make_stage("log", {"prepare": {"seed": 5}})).seed == 5
    assert done(make_stage("stage1/din", {"seed": 3, "stage1": {}})).seed == 3


def test_a_finished_run_does_nothing_but_touch_its_manifest(make_stage, capsys):
    folder = make_stage("stage1/sim")
    done(folder)
    manifest = folder / "manifest.json"
    text, inode = manifest.read_text(), manifest.stat().st_ino
    os.utime(manifest, (1000, 1000))

    def never(run):
        raise AssertionError("worked again")

    assert main(never, [str(folder)]) == 0
    assert "nothing has changed" in capsys.readouterr().out
    assert (manifest.read_text(), manifest.stat().st_ino) == (text, inode)
    assert manifest.stat().st_mtime > time.time() - 60


def test_another_configuration_parent_or_a_lost_output_is_worked_again(make_stage):
    log = make_stage("log")
    done(log)
    folder = make_stage("stage1/sim", parents={"log": "log"})
    times = []

    def work(run):
        times.append(run.file.sha256)
        write(run)

    def again():
        before = len(times)
        assert main(work, [str(folder)]) == 0
        return len(times) > before

    assert again()
    assert not again()
    make_stage("stage1/sim", {"seed": 1}, {"log": "log"})
    assert again()
    assert not again()
    make_stage("log", {"seed": 5})
    done(log)
    assert again()
    assert not again()
    (folder / "out.txt").unlink()
    assert again()
    assert not again()


def test_execution_keys_make_nothing_stale_and_others_are_refused(make_stage, capsys):
    folder = make_stage("stage1/sim")
    first = done(folder)
    keys = ["trainer.devices=2", "raw=/somewhere"]
    assert Run.start([str(folder), *keys]).done
    assert Manifest.read(folder).config_sha256 == first.config_sha256
    capsys.readouterr()
    assert main(write, [str(folder), "seed=2"]) == 2
    assert "execution key" in error(capsys)


def test_failing_work_leaves_no_manifest(make_stage, capsys):
    folder = make_stage("stage1/sim")
    done(folder)
    make_stage("stage1/sim", {"seed": 1})

    def fails(run):
        assert not (folder / "manifest.json").exists()  # gone before anything changes
        raise StageError("it broke\nin two lines")

    capsys.readouterr()
    assert main(fails, [str(folder)]) == 2
    assert "it broke in two lines" in error(capsys)
    assert not (folder / "manifest.json").exists()
    with pytest.raises(ZeroDivisionError):  # what nobody foresaw keeps its traceback
        main(lambda run: 1 / 0, [str(folder)])
    assert not (folder / "manifest.json").exists()
    done(folder)


def test_a_remade_stage_lists_none_of_its_own_bookkeeping(make_stage):
    """A stage that finds its outputs by a pattern, as the event log does, is finished when remade, too."""

    def writes(run):
        (run.folder / "meta.json").write_text("{}")
        run.finish(run.folder.glob("*.json"), {})

    folder = make_stage("stage1/sim")
    assert main(writes, [str(folder)]) == 0
    make_stage("stage1/sim", {"seed": 1})
    assert main(writes, [str(folder)]) == 0
    assert [output["path"] for output in Manifest.read(folder).outputs] == ["meta.json", "metrics.json"]
    assert Run.start([str(folder)]).done


def test_a_second_process_is_refused_while_the_first_is_at_work(make_stage):
    folder = make_stage("stage1/sim")
    run = Run.start([str(folder)])
    code = "import sys; from recllm.pipeline.run import main; sys.exit(main(lambda run: None, sys.argv[1:]))"
    second = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert second.returncode == 2
    assert "another process is at work" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    write(run)
    run._lock.close()
    assert Run.start([str(folder)]).done


def test_other_ranks_write_nothing(make_stage, monkeypatch):
    folder = make_stage("stage1/sim")
    monkeypatch.setenv("LOCAL_RANK", "1")
    run = Run.start([str(folder)])
    run.finish([], {"auc": 0.0})
    assert sorted(file.name for file in folder.iterdir()) == ["config.yaml"]


@pytest.mark.parametrize("case", ["no folder", "no config", "parent missing", "parent truncated"])
def test_what_cannot_start_is_one_line(make_stage, capsys, case):
    log = make_stage("log")
    folder = make_stage("stage1/sim", parents={"log": "log"})
    if case == "parent truncated":
        done(log)
        (log / "out.txt").write_text("m")
    if case == "no config":
        (folder / "config.yaml").unlink()
    capsys.readouterr()
    assert main(write, [] if case == "no folder" else [str(folder)]) == 2
    assert "make" in error(capsys)


def test_wall_time_adds_up_over_attempts_of_the_same_configuration(make_stage):
    folder = make_stage("stage1/sim")
    run = Run.start([str(folder)])
    run._clock -= 100  # it began 100 seconds ago
    run.tick()
    run._lock.close()
    resumed = Run.start([str(folder)])
    assert resumed.seconds == pytest.approx(100, abs=5)
    resumed._lock.close()
    make_stage("stage1/sim", {"seed": 1})
    other = Run.start([str(folder)])
    assert other.seconds == pytest.approx(0, abs=5)
    other._lock.close()


def family(make_stage):
    """The log, neighbors made from it, and a stage 1 that is to be made from both."""
    log = make_stage("log")
    done(log)
    neighbors = make_stage("neighbors/both", parents={"log": "log"})
    done(neighbors)
    return log, neighbors, make_stage("stage1/sim", parents={"log": "log", "neighbors": "neighbors/both"})


def test_parents_that_were_not_made_from_one_another_are_refused(make_stage, capsys):
    log, neighbors, stage1 = family(make_stage)
    done(stage1)
    old = Manifest.read(log).identity
    make_stage("log", {"seed": 5})
    new = done(log).identity  # the log is made anew, the neighbors are not
    capsys.readouterr()
    assert main(write, [str(stage1)]) == 2
    line = error(capsys)
    for word in ("neighbors/both", old[:12], new[:12], str(neighbors / "manifest.json"), "run make again"):
        assert word in line


def test_an_ancestor_that_is_no_parent_is_checked_too(make_stage, capsys):
    log, _, _ = family(make_stage)
    stage1 = make_stage("stage1/din", parents={"neighbors": "neighbors/both"})
    make_stage("log", {"seed": 5})
    done(log)
    capsys.readouterr()
    assert main(write, [str(stage1)]) == 2
    assert "neighbors/both was built from log" in error(capsys)


def test_what_an_earlier_run_made_and_this_one_did_not_is_gone(make_stage):
    folder = make_stage("stage2/lora")

    def two(run):
        for name in ("adapter/a.bin", "adapter-ranking/a.bin"):
            (run.folder / name).parent.mkdir(exist_ok=True)
            (run.folder / name).write_text(name)
        run.finish([run.folder / "adapter", run.folder / "adapter-ranking"], {})

    def one(run):
        (run.folder / "adapter/a.bin").write_text("other")
        run.finish([run.folder / "adapter"], {})

    def dies(run):
        raise StageError("killed")

    assert main(two, [str(folder)]) == 0
    make_stage("stage2/lora", {"seed": 1})
    assert main(dies, [str(folder)]) == 2  # what is there stays until another run is done
    assert (folder / "adapter-ranking/a.bin").exists()
    assert main(one, [str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "adapter", "config.yaml", "manifest.json", "metrics.json",
    ]  # fmt: skip
