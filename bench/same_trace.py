"""Whether two checkouts train the same: the curves of every stage, compared to the byte.

    python -m bench.same_trace OLD NEW [--command "make stage1 stage2 stage3"] [--keep FOLDER]
    python -m bench.same_trace --artifacts FOLDER_A FOLDER_B

OLD and NEW are commits (or `.` for the files as they are). Each is run in a clean folder with the same
Python, one process a stage and as many threads as the plan gives it, and every `logs/metrics.csv` and
`gate.npz` that they leave is compared: a refactor changes none of them. Rows of results are compared too, but
for dates, commits, commands and times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TRACES = ("logs/metrics.csv", "gate.npz")
"""What is compared to the byte, within each stage's folder."""
UNCOMPARED = ("commit", "date", "hardware", "command")
"""Keys of a results row that differ between any two runs."""
CLOCK = ("tuning_seconds",)
"""Metrics of a results row that are times."""


def check_out(commit: str, folder: Path) -> None:
    """Lay the tree of a commit into a folder; `.` copies the tracked files as they are."""
    folder.mkdir(parents=True)
    if commit == ".":
        listed = subprocess.run(
            ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for name in filter(None, listed.split("\0")):
            if (REPOSITORY / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, folder / name)
        return
    archive = subprocess.run(
        ["git", "-C", str(REPOSITORY), "archive", commit], check=True, capture_output=True
    )
    subprocess.run(["tar", "x", "-C", str(folder)], check=True, input=archive.stdout)


def run(checkout: Path, command: str) -> Path:
    """Run a command of the makefile in a checkout; returns the folder of its artifacts."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RECLLM_")}
    log = checkout / "trace.log"
    with log.open("w") as stream:
        done = subprocess.run(
            [*command.split(), f"PYTHON={sys.executable}"],
            cwd=checkout,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise SystemExit(f"error: `{command}` failed in {checkout}; see {log}")
    return checkout / "artifacts"


def traces(artifacts: Path) -> dict[str, bytes]:
    """Stage folder and file -> content of every trace; rows of results as canonical JSON."""
    contents = {}
    for name in TRACES:
        for path in artifacts.rglob(name):
            contents[path.relative_to(artifacts).as_posix()] = path.read_bytes()
    for path in artifacts.glob("*/results.json"):
        rows = [_comparable(row) for row in json.loads(path.read_text())]
        contents[path.relative_to(artifacts).as_posix()] = json.dumps(rows, indent=1, sort_keys=True).encode()
    return contents


def _comparable(row: dict) -> dict:
    """A results row without what any two runs differ in."""
    row = {key: value for key, value in row.items() if key not in UNCOMPARED}
    figures = [row["metrics"], *(seed["metrics"] for seed in row["seeds"])]
    for metrics in figures:
        for name in CLOCK:
            metrics.pop(name, None)
    return row


def differences(old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    """One line for each trace that is missing on a side, or is not the same."""
    lines = [f"only in the old one: {name}" for name in sorted(old.keys() - new.keys())]
    lines += [f"only in the new one: {name}" for name in sorted(new.keys() - old.keys())]
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name]:
            lines.append(f"differs: {name}{_first_difference(old[name], new[name])}")
    return lines


def _first_difference(old: bytes, new: bytes) -> str:
    """Where two texts part, e.g. `, line 3`; nothing of binary files."""
    if b"\0" in old + new:
        return ""
    pairs = zip(old.split(b"\n"), new.split(b"\n"), strict=False)
    line = next((number for number, (a, b) in enumerate(pairs, 1) if a != b), None)
    return ", length" if line is None else f", line {line}"


def main(arguments: list[str]) -> int:
    """Compare; the status is 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="commit, `.`, or with --artifacts a folder of artifacts")
    parser.add_argument("new", help="the same")
    parser.add_argument("--command", default="make stage1 stage2 stage3", help="what is run in each checkout")
    parser.add_argument("--artifacts", action="store_true", help="compare what two runs have left already")
    parser.add_argument("--keep", type=Path, help="where the checkouts stay; by default they are removed")
    given = parser.parse_args(arguments)
    if given.artifacts:
        sides = [traces(Path(given.old)), traces(Path(given.new))]
    else:
        root = given.keep or Path(tempfile.mkdtemp(prefix="same-trace-"))
        sides = []
        for name, commit in (("old", given.old), ("new", given.new)):
            check_out(commit, root / name)
            sides.append(traces(run(root / name, given.command)))
        if not given.keep:
            shutil.rmtree(root)
    if not sides[0]:
        raise SystemExit(
            f"error: {given.old} left no trace; wanted {' or '.join(TRACES)} in a stage's folder"
        )
    lines = differences(*sides)
    print("\n".join(lines) if lines else f"the same: {len(sides[0])} traces")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
