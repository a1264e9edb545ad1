"""What is printed for the user, once over all processes."""

from __future__ import annotations

import os

_speaker = ""  # name of the run that this process is at, once there is one


def speak_as(name: str) -> None:
    """From now on lines carry this name of a run, which tells them from those of runs beside it."""
    global _speaker
    _speaker = name


def is_first_process() -> bool:
    """Whether this process writes: rank 0, also before torch.distributed is up."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


def say(text: str) -> None:
    """Print a line for the user, once over all processes; the run's name tells it from those beside it."""
    if is_first_process():
        # The end of the line in the same write: runs side by side share the terminal.
        print(f"[{_speaker}] {text}\n" if _speaker else f"{text}\n", end="", flush=True)
