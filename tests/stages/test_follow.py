"""Make below a live view, and signals that reach it, with small makefiles of their own."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

TEXT = """
good: ; @echo '[log] one line'
bad: ; @echo 'error: got none' >&2; exit 2
slow: ; @trap 'echo kept; exit 0' TERM; echo begins; for i in $$(seq 100); do sleep 0.1; done
"""


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "artifacts" / "plans" / "1a.mk"
    path.parent.mkdir(parents=True)
    path.write_text(TEXT)
    path.with_suffix(".json").write_text('{"log": null}')
    return path


def command(rules, goal):
    return [sys.executable, "-m", "stages.follow", str(rules), "make", "-f", str(rules), goal]


def on_a_terminal(rules, goal):
    """Everything that a terminal would get, and the status."""
    master, slave = pty.openpty()
    child = subprocess.Popen(command(rules, goal), cwd=REPOSITORY, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    try:
        while part := os.read(master, 4096):
            seen += part
    except OSError:  # the terminal's other end is closed
        pass
    return seen.decode(), child.wait()


def test_without_a_terminal_there_are_the_lines_alone(rules):
    done = subprocess.run(command(rules, "good"), cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[log] one line\n"


def test_on_a_terminal_lines_stand_above_a_bar(rules):
    seen, status = on_a_terminal(rules, "good")
    assert status == 0
    assert "[log] one line" in seen
    assert "0 of 1 stages" in seen


@pytest.mark.parametrize("run", [on_a_terminal, None], ids=["terminal", "plain"])
def test_an_error_is_shown_and_its_status_handed_on(rules, run):
    if run:
        seen, status = run(rules, "bad")
    else:
        done = subprocess.run(command(rules, "bad"), cwd=REPOSITORY, capture_output=True, text=True)
        seen, status = done.stderr, done.returncode
    assert status == 2
    assert "error: got none" in seen


def test_sigterm_reaches_what_make_runs(rules):
    child = subprocess.Popen(command(rules, "slow"), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "begins\n"
    child.send_signal(signal.SIGTERM)
    rest = child.stdout.read()
    assert child.wait() != 0
    assert rest.startswith("kept")
