"""The command of the README on a log of any size, from raw files to the table: `make bench-whole`.

`make stage1 stage2 stage3` runs in a folder of its own (`.bench/whole/<events>`), with the defaults of the
data set. On the way it is killed by SIGKILL, with all that it started, as often as is asked, and started
again; at the end it runs once more, when there is nothing to do. Of each stage stand seconds over all
attempts and peak memory, from the manifests; of the command wall time, the attempts added.

    make bench-whole                                # 25 million generated events in MovieLens-25M's layout
    make bench-whole ARGS="--events 1000000 --kills 120 300 -- CRM=sim"
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from bench import logs
from bench.clock import REPOSITORY, keep
from recllm import paths
from recllm.pipeline.manifest import Manifest

PLACE = REPOSITORY / ".bench"
GOALS = ("stage1", "stage2", "stage3")
DATASET = "ml-25m"  # whose layout the generated logs have


def attempt(command: list[str], artifacts: Path, seconds: float | None) -> tuple[float, bool]:
    """Run the command, or kill it and all that it started after so many seconds.

    Returns:
        Wall time in seconds, and whether it came to its end.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    begun = time.perf_counter()
    # Not what the make above this one was given: its ARGS are this script's.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    environment["RECLLM_ARTIFACTS"] = str(artifacts)
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True)
    try:
        status = process.wait(seconds)
    except BaseException as stop:  # Ctrl-C too, which a session of its own does not get
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(stop, subprocess.TimeoutExpired):
            raise
        return time.perf_counter() - begun, False
    if status:
        raise subprocess.CalledProcessError(status, command)
    return time.perf_counter() - begun, True


def stages(root: Path) -> dict[str, dict[str, Any]]:
    """Of each finished stage seconds over all attempts, peak memory in GB, and what its time grows with."""
    manifests = {
        str(path.parent.relative_to(root)): Manifest.read(path.parent) for path in root.rglob(paths.MANIFEST)
    }
    return {
        folder: {
            "seconds": manifest.seconds,
            "peak_gb": round(manifest.peak_memory_gb, 2),
            "kind": manifest.kind,
            "amount": manifest.amount,
        }
        for folder, manifest in sorted(manifests.items(), key=lambda entry: entry[1].finished)
    }


def main(arguments: argparse.Namespace) -> None:
    """Run, kill, run to the end, run again; keep and print the figures."""
    raw = PLACE / "logs" / str(arguments.events)
    if not (raw / "movies.csv").exists():
        logs.write(raw, arguments.events)
    artifacts = PLACE / "whole" / str(arguments.events)
    shutil.rmtree(artifacts, ignore_errors=True)
    command = ["make", *GOALS, f"DATASET={DATASET}", f"RAW={raw}", *arguments.words]
    walls = []
    for seconds in (*arguments.kills, None):
        wall, has_ended = attempt(command, artifacts, seconds)
        walls.append(round(wall, 1))
        if has_ended:
            break
    again, _ = attempt(command, artifacts, None)
    made = stages(artifacts / DATASET)
    figures = {
        "events": arguments.events,
        "attempts_seconds": walls,
        "killed": len(walls) - 1,
        "seconds": round(sum(walls), 1),
        "again_seconds": round(again, 1),
        "peak_gb": max(stage["peak_gb"] for stage in made.values()),
        "stages": made,
    }
    print(json.dumps(figures, indent=1))
    path = keep(f"whole-{arguments.events}", figures)
    print(f"figures: {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=25_000_000, help="of the generated log")
    parser.add_argument(
        "--kills", type=float, nargs="*", default=[], help="seconds after which an attempt is killed"
    )
    parser.add_argument("words", nargs="*", help="what else is given to make, e.g. CRM=sim")
    main(parser.parse_args())
