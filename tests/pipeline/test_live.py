"""What a terminal shows of a command at work, with the times set by hand."""

import io
import json
import time

import pytest
from rich.console import Console

from recllm import console
from recllm.console import Progress, seen_live, speak_as
from recllm.pipeline.expected import Expected
from recllm.pipeline.live import AtWork, LiveView, Remaining, at_work

STAGES = [Expected("log", 10.0), Expected("stage1/din", 100.0), Expected("stage1/sim", 40.0)]


@pytest.fixture
def root(tmp_path):
    return tmp_path / "artifacts"


def finish(root, folder):
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "manifest.json").write_text("{}")


def test_a_run_is_seen_from_its_start_to_its_end_and_tells_once_a_second(tmp_path, monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(console, "_speaker", "")
    monkeypatch.setenv(console.LIVE, str(tmp_path))
    speak_as("stage1/din")
    with seen_live():
        assert at_work(tmp_path) == [AtWork("stage1/din", None, "")]
        progress = Progress("steps", 80)
        seconds[0] += 2
        progress.reached(20)  # ten a second, and 60 are left
        told = AtWork("stage1/din", 0.25, "20 of 80 steps, 10.0 a second, 6 s left")
        assert at_work(tmp_path) == [told]
        seconds[0] += 0.5
        progress.reached(40)
        assert at_work(tmp_path) == [told]
        seconds[0] += 0.5
        progress.reached(60)
        assert at_work(tmp_path)[0].share == 0.75
    assert at_work(tmp_path) == []


def test_nobody_looks_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(console.LIVE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_speaker", "stage1/din")
    with seen_live():
        progress = Progress("steps", 80)
        time.sleep(0.01)
        progress.reached(40)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_half_written_is_not_shown(tmp_path):
    (tmp_path / "log.json").write_text('{"share": 0.')
    assert at_work(tmp_path) == []


def test_work_left_is_what_was_expected_without_what_was_done(root, monkeypatch):
    now = [1_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    remaining = Remaining(root, STAGES)
    remaining.begun = 0.0  # manifests below are written by the real clock
    assert remaining.seconds([]) == 150
    finish(root, "log")
    din = AtWork("stage1/din", 0.5, "")
    assert remaining.seconds([din]) == 140
    now[0] += 30
    assert remaining.seconds([din]) == 110
    now[0] += 100  # it takes longer than was expected
    assert remaining.seconds([din]) == 40
    assert [stage.folder for stage in remaining.open()] == ["stage1/din", "stage1/sim"]


def test_work_left_is_unknown_while_a_stage_of_unknown_length_is_open(root):
    remaining = Remaining(root, [*STAGES, Expected("neighbors", None)])
    assert remaining.seconds([]) is None
    finish(root, "neighbors")
    assert remaining.seconds([]) == 150


def test_a_manifest_of_an_earlier_command_does_not_count(root):
    finish(root, "log")
    remaining = Remaining(root, STAGES)
    remaining.begun = time.time() + 10
    assert len(remaining.open()) == 3


def test_a_line_for_each_stage_at_work_and_one_for_all(tmp_path, root):
    screen = Console(file=io.StringIO(), width=100, force_terminal=False)
    told = tmp_path / "told"
    view = LiveView(told, root, STAGES, screen)
    (told / "stage1").mkdir(parents=True)
    state = {"share": 0.5, "text": "20 of 40 steps, 2.0 a second, 10 s left"}
    (told / "stage1" / "din.json").write_text(json.dumps(state))
    finish(root, "log")
    screen.print(view.draw())
    lines = [line for line in screen.file.getvalue().splitlines() if line.strip()]
    assert lines[0].startswith("stage1/din ━━━━━━━━━━━━ ")  # 12 of 24 columns
    assert lines[0].rstrip().endswith("20 of 40 steps, 2.0 a second, 10 s left")
    assert lines[1].startswith("all        ━━━━━━━━ ")  # a third of them
    assert lines[1].rstrip().endswith("1 of 3 stages, 0 s so far, about 2 min of work left")


def test_what_a_stage_prints_stays_as_it_is(tmp_path, root):
    screen = Console(file=io.StringIO(), width=40)
    with LiveView(tmp_path, root, STAGES, screen) as view:
        view.say("[stage1/din] [bold]12,570,208 tokens of text, 4,500,000 to train on")
    assert "[stage1/din] [bold]12,570,208 tokens of text, 4,500,000 to train on\n" in screen.file.getvalue()
