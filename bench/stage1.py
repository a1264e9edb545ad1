"""Training of stage 1 beside FuxiCTR and RecBole: samples a second, and the AUC of one pass over equal data.

`make bench-stage1` makes the log of `bench/loader.py` (a million events, five user and three item fields) and
trains the same models on it: embedding 16, history 30, attention 64, MLP 128-64, batch 4,096, on one and two
threads, each run in a process and an environment of its own, taking turns; of each the best of the rounds. A
step is the library's own: its loader, forward, backward, clipping, and Adam at a learning rate of 1e-3.
Nobody regularizes, neither by dropout nor by a norm nor by masked ids, so that AUCs can be compared.

What is not the same: our events carry their rating besides (the peers' models have no place for it), which
makes our AUC higher; `+unrated` is the same model, with as much work, on histories that do not tell it.
FuxiCTR's DeepFM pools the history's items and genres, as ours does; RecBole's reads no history, nor does
`deepfm-flat` (one event). FuxiCTR's SIM is soft search over 100 events, 20 kept, 30 recent, so `sim-soft` is
its like; `sim-hard` finds its 20 by category before the model. RecBole makes its own split, and its AUC is of
that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch.nn import functional

from bench.clock import REPOSITORY, keep, rate
from bench.loader import BATCH, CLOCKS, ITEM_FIELDS, PLACE, USER_FIELDS, make_log, write_for_peers
from recllm.crm import CrmConfig, Fields, Model, build
from recllm.crm.inputs import CrmInputs
from recllm.eventlog.log import EventLog
from recllm.metrics import auc
from recllm.retrieval.category import SameCategory
from recllm.training.loaders import Stream

HISTORY, LONG, KEPT, SECONDS = 30, 100, 20, 6.0
SIM = {"name": "sim", "soft_k": KEPT, "soft_recent": HISTORY}
OURS: dict[str, tuple[dict[str, Any], int, int]] = {  # settings, recent events, retrieved ones
    "din": ({"name": "din"}, HISTORY, 0),
    "deepfm": ({"name": "deepfm"}, HISTORY, 0),
    "deepfm-flat": ({"name": "deepfm"}, 1, 0),
    "sim-soft": ({**SIM, "retrieval": "soft"}, LONG, 0),
    "sim-hard": ({**SIM, "retrieval": "hard"}, HISTORY, KEPT),
}
SHAPE = {"embedding_dim": 16, "event_dim": 16, "mlp": [128, 64], "attention_mlp": [64], "interval": False}
PLAIN = {"dropout": 0.0, "embedding_dropout": 0.0, "l2": 0.0, "mask_users": 0.0, "mask_items": 0.0}
PEERS = {
    "fuxictr": ("bench.peers.fuxictr_train", ["DIN", "DeepFM", "SIM"]),
    "recbole": ("bench.peers.recbole_train", ["DIN", "DeepFM"]),
}
AGAINST = {
    "din": ("fuxictr DIN", "recbole DIN"),
    "deepfm": ("fuxictr DeepFM",),
    "deepfm-flat": ("recbole DeepFM",),
    "sim-soft": ("fuxictr SIM",),
    "sim-hard": ("fuxictr SIM",),
}


def write_long(folder: Path, log: EventLog) -> None:
    """What FuxiCTR's SIM reads: rows with the place in their user's history, histories, items."""
    length = np.arange(len(log.user)) - log.offsets[log.user]
    for split in ("train", "valid"):
        rows = log.rows(split, "all")
        user = log.user_fields[log.user[rows]]
        columns = {name: user[:, place] for place, name in enumerate(["user_id", *USER_FIELDS])}
        columns |= {"user_index": log.user[rows], "item_index": log.item[rows], "seq_len": length[rows]}
        pl.DataFrame(columns | {"label": log.label[rows].astype(np.int32)}).write_parquet(
            folder / f"long_{split}.parquet"
        )
    histories = np.split(np.asarray(log.item, np.int64), log.offsets[1:-1])
    pl.DataFrame({"full_item_seq": histories}).write_parquet(folder / "user_info.parquet")
    items = {name: log.item_fields[:, place] for place, name in enumerate(["item_id", *ITEM_FIELDS])}
    pl.DataFrame({"item_index": np.arange(len(log.item_fields)), **items}).write_parquet(
        folder / "item_info.parquet"
    )


def step(model: Model, adam: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    """One step of training as stage 1 does it; the loss."""
    loss = functional.binary_cross_entropy_with_logits(model(batch)[0], batch["label"])
    (loss + model.l2(batch)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return loss.item()


def ours(folder: Path, name: str, threads: int, whole: bool) -> None:
    """Print the rates of training as JSON; `whole`: the AUC after one pass instead.

    `name` may end in `+unrated`: no event of a history then tells its rating.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    log = EventLog.open(folder / "log")
    name, _, unrated = name.partition("+")
    if unrated:
        log.rating = np.zeros_like(log.rating)
    settings, recent, retrieved = OURS[name]
    inputs = CrmInputs(log, recent, retrieved, searcher=SameCategory(log) if retrieved else None)
    sizes = {side: tuple(f["size"] for f in log.meta[f"{side}_fields"]) for side in ("user", "item")}
    fields = Fields(sizes["user"], sizes["item"], log.codes, log.meta["category_field"])
    model = build(fields, CrmConfig(**settings, **SHAPE, **PLAIN))
    rows, valid = log.rows("train", "all"), log.rows("valid", "all")
    steps = len(rows) // BATCH
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    stream = Stream(len(rows), BATCH, seed=0)

    def losses() -> Iterator[float]:
        for number in itertools.count():
            yield step(model, adam, inputs(rows[stream.indices(number)]))

    if not whole:
        print(json.dumps(rate(losses(), BATCH, SECONDS)))
        return
    for _ in itertools.islice(losses(), steps):
        pass
    model.eval()
    with torch.inference_mode():
        logits = torch.cat(
            [model(inputs(part))[0] for part in np.array_split(valid, len(valid) // BATCH + 1)]
        )
    print(json.dumps({"auc": auc(logits.numpy(), log.label[valid])}))


def trained_by(name: str) -> list[str]:
    """The command that trains one of ours; the folder, the threads and `--whole` follow."""
    return [sys.executable, "-m", "bench.stage1", "--ours", name]


def commands() -> dict[str, list[str]]:
    """Every system's command; the folder, the threads and `--whole` follow."""
    by_system = {f"recllm {name}": trained_by(name) for name in OURS}
    for peer, (module, models) in PEERS.items():
        python = PLACE / peer / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"error: no environment for {peer} at {python}; run `make bench-stage1`")
        by_system |= {f"{peer} {model}": [str(python), "-m", module, model] for model in models}
    return by_system


def call(command: list[str], folder: Path, threads: int, *words: str) -> dict[str, float]:
    """The figures that a command prints as its last line."""
    # Threads wait as their library has it by default, not as the Makefile asks of them for shared cores.
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [*command, str(folder), str(threads), *words],
        cwd=REPOSITORY,
        env=environment | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


Rates = dict[str, dict[str, dict[str, float]]]


def one_round(folder: Path, threads: list[int], best: Rates) -> None:
    """Every system once by threads, taking turns; `best` keeps the best rates."""
    for count in threads:
        rates = best.setdefault(f"{count} threads", {})
        for system, command in commands().items():
            got = call(command, folder, count)
            rates[system] = {clock: round(max(got[clock], rates.get(system, got)[clock])) for clock in CLOCKS}


def over_peers(best: Rates) -> Rates:
    """Our best rates over the peers'."""
    return {
        count: {
            f"{name} / {peer}": {
                clock: round(rates[f"recllm {name}"][clock] / rates[peer][clock], 2) for clock in CLOCKS
            }
            for name, peers in AGAINST.items()
            for peer in peers
        }
        for count, rates in best.items()
    }


def main(threads: list[int], rounds: int) -> None:
    """Make the data, train everything; after every round, keep the figures so far and print them."""
    commands()
    folder = PLACE / "stage1"
    make_log(folder)
    log = EventLog.open(folder / "log")
    write_for_peers(folder, log, HISTORY)
    write_long(folder, log)
    passes = commands() | {f"recllm {name}+unrated": trained_by(f"{name}+unrated") for name in OURS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # side by side: nothing is timed
        whole = pool.map(lambda command: call(command, folder, 1, "--whole"), passes.values())
        aucs = {system: round(got["auc"], 4) for system, got in zip(passes, whole, strict=True)}
    print(json.dumps({"auc_after_one_pass": aucs}, indent=1), flush=True)
    best: Rates = {}
    for number in range(1, rounds + 1):
        one_round(folder, threads, best)
        figures = {"samples_a_second": best, "times_the_peers": over_peers(best)}
        settings = {"batch_size": BATCH, "threads": threads, "rounds": number}
        path = keep("bench", {**settings, "auc_after_one_pass": aucs, **figures}, "stage1")
        print(json.dumps({"round": number, **figures["times_the_peers"]}), flush=True)
    print(f"figures: {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    if "--ours" in sys.argv:
        ours(Path(sys.argv[3]), sys.argv[2], int(sys.argv[4]), "--whole" in sys.argv)
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
        parser.add_argument("--rounds", type=int, default=5)
        given = parser.parse_args()
        main(given.threads, given.rounds)
