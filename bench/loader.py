"""The loader alone against those of FuxiCTR and RecBole: rows a second, in the same run.

`make bench-loader` makes a log of MovieLens-1M's shape (a million events, five user and three item fields),
writes it in each library's own format, and lets the loaders deliver shuffled training batches of 4,096 rows
with 30 (then 60) recent events, taking turns, each in a process and an environment of its own, one thread, no
workers. All deliver user, item, their fields, the history's items, and the label. FuxiCTR adds the history's
categories; RecBole adds its labels and times, and so do we (ratings and times). What is left to do on the
model's device is measured beside it as `recllm-expanded`: categories, time intervals and masks as well.

Rows a second of wall time, of CPU time (which does not count the time that other work held the cores), and of
wall time in the fastest quarter of the batches; of each the best of the rounds.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from bench import logs
from bench.clock import REPOSITORY, keep, rate
from recllm.crm.inputs import CrmInputs
from recllm.eventlog.build import build_log
from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.log import EventLog
from recllm.tables import canonical
from recllm.training.loaders import Stream

EVENTS, FILMS, BATCH, ROUNDS = 1_000_000, 3_706, 4_096, 3
CLOCKS = ("wall", "cpu", "best")
USER_FIELDS = {"gender": 2, "age": 7, "occupation": 21, "zip": 100}
ITEM_FIELDS = ["year", "genre"]
PLACE = REPOSITORY / ".bench"
SYSTEMS = {
    "recllm": [sys.executable, "-m", "bench.loader", "gather"],
    "recllm-expanded": [sys.executable, "-m", "bench.loader", "expand"],
    "fuxictr": [str(PLACE / "fuxictr" / "bin" / "python"), "-m", "bench.peers.fuxictr_loader"],
    "recbole": [str(PLACE / "recbole" / "bin" / "python"), "-m", "bench.peers.recbole_loader"],
}


def make_log(folder: Path) -> None:
    """The event log of a million generated events."""
    drawn = logs.draw(EVENTS, FILMS)
    rng = np.random.default_rng(1)
    people = int(drawn["user"].max()) + 1
    events = pl.DataFrame(
        {
            "user": drawn["user"],
            "item": drawn["film"],
            "rating": drawn["rating"],
            "label": (drawn["rating"] > 3.0).astype(np.int8),
            "timestamp": drawn["seconds"],
        }
    )
    films = {"item": np.arange(FILMS), "title": [f"Film {n}" for n in range(FILMS)]}
    films |= {"year": rng.integers(1920, 2001, FILMS), "genre": rng.integers(0, 18, FILMS)}
    users = {"user": np.arange(people)} | {
        name: rng.integers(0, n, people) for name, n in USER_FIELDS.items()
    }
    canonical.write(folder / "tables", events.lazy(), pl.DataFrame(films), pl.DataFrame(users))
    config = PrepareConfig(user_fields=list(USER_FIELDS), item_fields=ITEM_FIELDS)
    build_log(folder / "tables", folder / "log", config)


def write_for_peers(folder: Path, log: EventLog, history: int) -> None:
    """Rows as FuxiCTR reads them (`train.npz`, `valid.npz`), the whole log as RecBole does (`atomic/`)."""
    for split in ("train", "valid"):
        rows = log.rows(split, "all")
        batch = {name: value.numpy() for name, value in CrmInputs(log, history)(rows).items()}
        columns = dict(zip(["user_id", *USER_FIELDS], batch["user"].T, strict=True))
        columns |= dict(zip(["item_id", *ITEM_FIELDS], batch["item"].T, strict=True))
        items = batch["recent_item"]
        columns |= {"history_item": items[..., 0], "history_genre": items[..., -1]}
        np.savez(folder / f"{split}.npz", **columns, label=batch["label"].astype(np.int32))
    atomic = folder / "atomic"
    atomic.mkdir(exist_ok=True)
    inter = {"user_id:token": log.user, "item_id:token": log.item, "label:float": log.label}
    sides = {"inter": pl.DataFrame(inter | {"timestamp:float": log.timestamp})}
    for side, names, table in (
        ("user", ["user_id", *USER_FIELDS], log.user_fields),
        ("item", ["item_id", *ITEM_FIELDS], log.item_fields),
    ):
        values = {f"{name}:token": table[2:, place] for place, name in enumerate(names)}
        sides[side] = pl.DataFrame(values | {f"{side}_id:token": np.arange(2, len(table))})
    for side, frame in sides.items():
        frame.write_csv(atomic / f"atomic.{side}", separator="\t")
    about = {
        "history": history,
        "batch_size": BATCH,
        "user_fields": list(USER_FIELDS),
        "item_fields": ITEM_FIELDS,
    }
    (folder / "about.json").write_text(json.dumps(about))


def ours(folder: Path, step: str) -> None:
    """Print the rates of stage 1's batches as JSON: as they leave the loader, or as a model reads them."""
    torch.set_num_threads(1)
    history = json.loads((folder / "about.json").read_text())["history"]
    log = EventLog.open(folder / "log")
    inputs, rows = CrmInputs(log, history), log.rows("train", "all")
    stream = Stream(len(rows), BATCH, seed=0)

    make = inputs if step == "expand" else inputs.gather

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for number in itertools.count():
            yield make(rows[stream.indices(number)])

    shapes = {name: list(value.shape) for name, value in next(batches()).items()}
    print(json.dumps(rate(batches(), BATCH) | {"batch": shapes, "rows": len(rows)}))


def measure(folder: Path, history: int) -> dict[str, Any]:
    """Best of the rounds for each system, and how many times ours it takes to make one of theirs."""
    write_for_peers(folder, EventLog.open(folder / "log"), history)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    best: dict[str, dict[str, Any]] = {}
    for _ in range(ROUNDS):
        for system, command in SYSTEMS.items():
            done = subprocess.run(
                [*command, str(folder)],
                cwd=REPOSITORY,
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            got = json.loads(done.stdout.strip().splitlines()[-1])
            for clock in CLOCKS:
                got[clock] = round(max(got[clock], best.get(system, got)[clock]))
            best[system] = got
    peers = [name for name in SYSTEMS if not name.startswith("recllm")]
    times = {
        clock: {name: round(best["recllm"][clock] / best[name][clock], 1) for name in peers}
        for clock in CLOCKS
    }
    return {"rows_a_second": best, "times_the_peers": times}


def main() -> None:
    """Make the data, measure both lengths, keep and print the figures."""
    for system, command in SYSTEMS.items():
        if not Path(command[0]).exists():
            raise SystemExit(f"error: no environment for {system} at {command[0]}; run `make bench-loader`")
    folder = PLACE / "loader"
    make_log(folder)
    figures = {f"history {history}": measure(folder, history) for history in (30, 60)}
    path = keep("loader", {"batch_size": BATCH, "threads": 1, "rounds": ROUNDS} | figures)
    print(json.dumps({name: part["times_the_peers"] for name, part in figures.items()}, indent=1))
    print(f"figures: {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    if sys.argv[1:]:
        ours(Path(sys.argv[2]), sys.argv[1])
    else:
        main()
