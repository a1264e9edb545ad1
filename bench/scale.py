"""How preparation and retrieval grow with the log, up to 25 million events: `make bench-data`.

Each step runs in a process of its own, as `make` runs it, and is measured by the kernel's account of it: wall
time, CPU time, peak memory. Logs are generated (`bench/logs.py`) once and kept in `.bench/`; with RAW, the
preparation of MovieLens-1M from that folder or zip is measured as well, and its neighbors.

Neighbors (k = 10, for every sample of the log) are searched with co-occurrence vectors, and compared with a
search of one row at a time on a thousand random rows. On the smallest log the search is also killed halfway
and started again: the file must be the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench import logs
from bench.clock import REPOSITORY, cost, keep
from recllm.eventlog.ids import UNUSED
from recllm.eventlog.log import EventLog
from recllm.retrieval.neighbors import Neighbors, write_neighbors
from recllm.retrieval.vectors import cooccurrence_vectors, item_vectors

SIZES = (5_000_000, 12_500_000, 25_000_000)
K, CHECKED = 10, 1_000
PLACE = REPOSITORY / ".bench"
PYTHON = [sys.executable, "-m"]


def prepare(dataset: str, raw: Path, artifacts: Path) -> dict[str, Any]:
    """Raw files to tables to event log, as `make prepare` does it, from nothing."""
    shutil.rmtree(artifacts, ignore_errors=True)
    here, root = {"RECLLM_ARTIFACTS": str(artifacts)}, artifacts / dataset
    cost([*PYTHON, "stages.plan", "write", "prepare", f"DATASET={dataset}", f"RAW={raw}"], **here)
    steps = {
        "tables": cost([*PYTHON, "stages", str(root / "tables"), f"raw={raw}"], **here),
        "log": cost([*PYTHON, "stages", str(root / "log")], **here),
    }
    keys = [key for key in steps["log"] if key != "peak_gb"]
    whole = {key: round(sum(step[key] for step in steps.values()), 1) for key in keys}
    return whole | {"peak_gb": max(step["peak_gb"] for step in steps.values()), "steps": steps}


def retrieve(root: Path, kill: bool) -> dict[str, Any]:
    """Vectors and neighbors of a log, each in a process of its own, and how right the neighbors are."""
    path = root / "neighbors.npy"
    search = [*PYTHON, "bench.scale", "neighbors", str(root)]
    figures: dict[str, Any] = {
        "vectors of one fold": cost([*PYTHON, "bench.scale", "vectors", str(root)]),
        "neighbors": {"k": K} | cost(search),
        "checked": check(root),
    }
    if kill:
        whole = digest(path)
        path.unlink()
        process = subprocess.Popen(search, cwd=REPOSITORY)
        time.sleep(figures["neighbors"]["seconds"] / 2)
        process.kill()
        process.wait()
        stopped = json.loads((root / "neighbors.npy.progress").read_text())
        figures["killed"] = {"at_row": stopped["done"], "rows": stopped["rows"], "rest": cost(search)}
        figures["killed"]["same_file"] = digest(path) == whole
    return figures


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def vectors(root: Path) -> None:
    """Write co-occurrence vectors of all training events."""
    log = EventLog.open(root / "log")
    np.save(root / "vectors.npy", item_vectors("cooccurrence", cooccurrence=cooccurrence_vectors(log, 64)))


def neighbors(root: Path) -> None:
    """Write the neighbors of all samples; goes on where a killed run stopped."""
    log = EventLog.open(root / "log")
    search = Neighbors(log, np.load(root / "vectors.npy", mmap_mode="r"))
    write_neighbors(search, log.split != UNUSED, K, root / "neighbors.npy")


def check(root: Path) -> dict[str, Any]:
    """Compare random rows with a search of one row at a time, in float64.

    Returns:
        `rows` compared; `largest_difference` of a score from the one in its place; of the rows whose k-th
        score is more than 1e-5 above the next (`with_a_gap`), how many name the same events (`same_events`).
    """
    log = EventLog.open(root / "log")
    stored = np.load(root / "neighbors.npy", mmap_mode="r")
    table = np.load(root / "vectors.npy").astype(np.float64)
    rows = np.random.default_rng(0).choice(np.flatnonzero(log.split != UNUSED), CHECKED, replace=False)
    worst, gaps, same = 0.0, 0, 0
    for row in rows.tolist():
        start, end = (int(edge[0]) for edge in log.history(np.array([row])))
        score = table[log.item[start:end]] @ table[log.item[row]]
        order = np.argsort(-score)
        best = np.full(K, np.nan)
        got = stored[row].astype(np.int64) - start
        inside = (got >= 0) & (got < end - start)
        best[inside] = score[got[inside]]
        wanted = score[order[:K]]
        difference = np.abs(best[: len(wanted)] - wanted).max(initial=0.0)
        worst = max(worst, float("inf") if np.isnan(difference) else float(difference))
        if len(order) > K and wanted[-1] - score[order[K]] > 1e-5:
            gaps += 1
            same += set(got.tolist()) == set(order[:K].tolist())
    return {"rows": CHECKED, "largest_difference": worst, "with_a_gap": gaps, "same_events": same}


def main(arguments: argparse.Namespace) -> None:
    """Measure all sizes; figures are kept after each."""
    figures: dict[str, Any] = {}
    if arguments.raw:
        place = PLACE / "scale" / "ml-1m"
        part = {"prepare": prepare("ml-1m", arguments.raw.resolve(), place)}
        figures["ml-1m"] = part | retrieve(place / "ml-1m", kill=False)
    for events in arguments.sizes:
        raw, artifacts = PLACE / "logs" / str(events), PLACE / "scale" / str(events)
        if not (raw / "movies.csv").exists():
            logs.write(raw, events)
        part = {"prepare": prepare("ml-25m", raw, artifacts)}
        figures[f"{events:,} events"] = part | retrieve(
            artifacts / "ml-25m", kill=events == min(arguments.sizes)
        )
        path = keep("scale", figures)
    print(json.dumps(figures, indent=1))
    print(f"figures: {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["vectors"]:
        vectors(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["neighbors"]:
        neighbors(Path(sys.argv[2]))
    else:
        parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
        parser.add_argument("--raw", type=Path, help="folder or zip of MovieLens-1M")
        parser.add_argument(
            "--sizes", type=int, nargs="+", default=SIZES, help="events of the generated logs"
        )
        main(parser.parse_args())
