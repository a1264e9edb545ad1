"""The whole command's benchmark ends what it started."""

import signal
import subprocess

import pytest

from bench.whole import attempt


def test_an_attempt_that_takes_too_long_is_killed(tmp_path):
    seconds, has_ended = attempt(["sleep", "60"], tmp_path, 0.1)
    assert seconds < 30
    assert not has_ended


def test_ctrl_c_ends_what_was_started(tmp_path, monkeypatch):
    processes = []
    wait = subprocess.Popen.wait

    def interrupted(process, timeout=None):
        if not processes:
            processes.append(process)
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attempt(["sleep", "60"], tmp_path, None)
    assert processes[0].returncode == -signal.SIGKILL
