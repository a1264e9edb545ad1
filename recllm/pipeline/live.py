"""What a terminal shows of a command at work: a bar a stage, and how much is left."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from recllm import paths
from recllm.console import duration
from recllm.pipeline.expected import Expected

BAR = 24
"""Columns of a bar."""


@dataclass(frozen=True)
class AtWork:
    """How far a stage is that runs now.

    Attributes:
        folder: within `artifacts/<dataset>`.
        share: of its loop that is done; None: it has no loop to tell of.
        text: the same in words.
    """

    folder: str
    share: float | None
    text: str


def at_work(progress_folder: Path) -> list[AtWork]:
    """The stages that run now, by name, from the files that they write (`recllm.console.seen_live`)."""
    running = []
    for file in sorted(progress_folder.rglob("*.json")):
        try:
            state = json.loads(file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # it ended, or is about to be written
            continue
        running.append(AtWork(str(file.relative_to(progress_folder).with_suffix("")), **state))
    return running


class Remaining:
    """Which stages of a command are done, and how much work is left.

    Args:
        root: `artifacts/<dataset>`.
        expected: the stages that the command will run.
    """

    def __init__(self, root: Path, expected: Sequence[Expected]) -> None:
        """The command begins now."""
        self.root = root
        self.expected = expected
        self.begun = time.time()
        self._seen_since: dict[str, float] = {}

    def open(self) -> list[Expected]:
        """The stages without a manifest of this command."""
        return [stage for stage in self.expected if not self._is_done(stage.folder)]

    def _is_done(self, folder: str) -> bool:
        manifest = self.root / folder / paths.MANIFEST
        return manifest.exists() and manifest.stat().st_mtime >= self.begun

    def seconds(self, running: Sequence[AtWork]) -> float | None:
        """Work that is left, in seconds one after another; None: nobody knows of some of it.

        Of a stage at work it is what was expected without the time since it was first seen.
        """
        now = time.time()
        for seen in running:
            self._seen_since.setdefault(seen.folder, now)
        left = 0.0
        for stage in self.open():
            if stage.seconds is None:
                return None
            left += max(0.0, stage.seconds - (now - self._seen_since.get(stage.folder, now)))
        return left


class LiveView:
    """The lines that stages print, and below them a bar for each stage at work and one for all.

    Args:
        progress_folder: folder where stages tell how far they are.
        root: `artifacts/<dataset>`.
        expected: the stages that the command will run.
        console: the terminal.
    """

    def __init__(
        self, progress_folder: Path, root: Path, expected: Sequence[Expected], console: Console
    ) -> None:
        """Nothing is drawn yet."""
        self.progress_folder = progress_folder
        self.remaining = Remaining(root, expected)
        self.console = console
        self._live = Live(get_renderable=self.draw, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> LiveView:
        """Draw from now on."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Clear what is drawn; the lines stay."""
        self._live.stop()

    def say(self, line: str) -> None:
        """Show a line above the bars, as it is."""
        self.console.print(Text(line), soft_wrap=True)

    def draw(self) -> Group:
        """A line for each stage at work, and one for the whole command."""
        running = at_work(self.progress_folder)
        remaining = self.remaining
        total = len(remaining.expected)
        done = total - len(remaining.open())
        left = remaining.seconds(running)
        words = f"{done} of {total} stages, {duration(time.time() - remaining.begun)} so far"
        if left:
            words += f", about {duration(left)} of work left"
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(width=BAR)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for stage in running:
            share = 0.0 if stage.share is None else stage.share
            bar = ProgressBar(total=1.0, completed=share, pulse=stage.share is None, width=BAR)
            table.add_row(stage.folder, bar, stage.text)
        table.add_row(Text("all", style="bold"), ProgressBar(total=total, completed=done, width=BAR), words)
        return Group(Text(), table)
