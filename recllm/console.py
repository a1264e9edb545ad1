"""What is printed for the user, once over all processes; and what a live view of several runs is told."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SILENCE = 30.0
"""Seconds without a line after which a long loop says how far it is, and a stage that it is still at work."""

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""Where Lightning, torchrun and Slurm tell a process which one it is: the first is 0 in all that are set."""

LIVE = "RECLLM_LIVE"
"""Names the folder where runs tell a live view how far they are, each in a file; not set: nobody looks."""
LIVE_EVERY = 1.0
"""Seconds between two writings of such a file."""

_last_line = time.monotonic()
_speaker = ""  # name of the run that this process is at, once there is one


def speak_as(name: str) -> None:
    """From now on lines carry this name of a run, which tells them from those of runs beside it."""
    global _speaker
    _speaker = name


def is_first_process() -> bool:
    """Whether this process writes: rank 0, also before torch.distributed is up."""
    return all(int(os.environ.get(name, "0")) == 0 for name in RANKS)


def say(text: str) -> None:
    """Print a line for the user, once over all processes; the run's name tells it from those beside it."""
    global _last_line
    _last_line = time.monotonic()
    _print(text)


def _print(text: str) -> None:
    if is_first_process():
        # The end of the line in the same write: runs side by side share the terminal.
        print(f"[{_speaker}] {text}\n" if _speaker else f"{text}\n", end="", flush=True)


def _live_file() -> Path | None:
    folder = os.environ.get(LIVE)
    return Path(folder, f"{_speaker}.json") if folder and _speaker and is_first_process() else None


@contextmanager
def seen_live() -> Iterator[None]:
    """Until the block ends a live view shows this run, also while it has no loop to tell of."""
    file = _live_file()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"share": None, "text": ""}))
    try:
        yield
    finally:
        if file is not None:
            file.unlink(missing_ok=True)


@contextmanager
def pulse(state: Callable[[], str], every: float = 1.0) -> Iterator[None]:
    """Says `state()` wherever nothing was said for `SILENCE` seconds, until the block ends.

    It is for work that has no loop of its own to tell of: sorts, decompositions, libraries. A loop that tells
    how far it is does so as if this had said nothing.

    Args:
        state: what is said.
        every: seconds between two looks at the clock.
    """
    ended = threading.Event()
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        while not ended.wait(every):
            if time.monotonic() - max(_last_line, last) >= SILENCE:
                last = time.monotonic()
                _print(state())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Progress:
    """Says how far a loop is, with its rate and the time that is left, where nothing was said for a while.

    Args:
        what: is done, e.g. `prompts scored`.
        total: how much there is of it.
        done: how much of it was done before.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        """The clock begins to run."""
        self.what = what
        self.total = total
        self.begun_at = done
        self.start = time.monotonic()
        self._shown = self.start

    @property
    def seconds(self) -> float:
        """Since the loop began."""
        return time.monotonic() - self.start

    def is_due(self) -> bool:
        """Whether the loop has been silent for so long that a line would come."""
        return time.monotonic() - max(_last_line, self.start) >= SILENCE

    def reached(self, done: int, figures: str = "") -> None:
        """Tell how much is done; a line comes at most every `SILENCE` seconds.

        Args:
            done: of `total`.
            figures: what else the line says.
        """
        if done <= self.begun_at:
            return
        if self.is_due():
            say(self._line(done, figures))
        file = _live_file()
        if file is not None and time.monotonic() - self._shown >= LIVE_EVERY:
            self._shown = time.monotonic()
            file.write_text(json.dumps({"share": done / self.total, "text": self._line(done)}))

    def _line(self, done: int, figures: str = "") -> str:
        seconds = self.seconds / (done - self.begun_at)
        rate = f"{1 / seconds:,.1f} a second" if seconds < 1 else f"{seconds:.1f} s each"
        rest = f"{duration((self.total - done) * seconds)} left"
        parts = [f"{done:,} of {self.total:,} {self.what}", figures, rate, rest]
        return ", ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """A time in words: `40 s`, `12 min`, `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
