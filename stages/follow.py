"""Runs what the plan wrote, and says at the end where the time went.

    python -m stages.follow RULES make -j2 -f RULES stage1

On a terminal the lines of the stages stand above a bar for each one at work; elsewhere there are the lines
alone. A signal that ends this process ends Make, which ends the stages: each keeps what it has done.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from recllm.console import LIVE
from recllm.pipeline.expected import kept
from recllm.pipeline.spent import spent


def start(
    command: Sequence[str],
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start Make, to which SIGTERM is handed on; Ctrl-C reaches it by the terminal.

    Args:
        command: what to run.
        stdout: as `subprocess.Popen` has it.
        stderr: likewise.
        env: likewise.
    """
    child = subprocess.Popen(command, text=True, stdout=stdout, stderr=stderr, env=env)

    def hand_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return child


def follow_live(rules: Path, command: Sequence[str]) -> int:
    """Run Make below a live view; its status."""
    from rich.console import Console

    from recllm.pipeline.live import LiveView

    with tempfile.TemporaryDirectory(prefix="recllm-") as progress_folder:
        errors = subprocess.STDOUT if sys.stderr.isatty() else None
        environment = {**os.environ, LIVE: progress_folder}
        child = start(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        with LiveView(Path(progress_folder), rules.parent.parent, kept(rules), Console()) as view:
            assert child.stdout is not None
            for line in child.stdout:
                view.say(line.rstrip("\n"))
        return child.wait()


def main(arguments: Sequence[str]) -> int:
    """Run the command, and print the table of its times if it succeeds; its status."""
    rules, command = Path(arguments[0]), arguments[1:]
    status = follow_live(rules, command) if sys.stdout.isatty() and kept(rules) else start(command).wait()
    if status < 0:  # a signal ended Make
        return 128 - status
    if status == 0:
        for line in spent(rules):
            print(line)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
