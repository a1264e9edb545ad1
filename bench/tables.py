"""Stage 1 by rows (`stage1.sparse_tables`): does a step's time or memory grow with the tables?

`make bench-tables` trains DIN (embedding 16, history 30, attention 64, MLP 128-64, batch 4,096, one thread)
with one item table of 1 and of 6 million rows, by rows and, beside it, dense (every step reads and writes the
table and its two moments). Each in a process of its own, taking turns; of each the best of the rounds (dense,
which is there for comparison: of one). Seconds are of the process's own CPU time, which other work on the
machine does not stretch; of wall time beside.

Ids are drawn uniformly: the hardest case, no row is in the cache for having been used a moment ago. Batches
are ready before the clock starts. A step is forward, backward, clipping, and optimizer.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch.nn import functional

from bench.clock import REPOSITORY, keep
from recllm.config.stages import FitConfig
from recllm.crm import CrmConfig, Fields, build
from recllm.training.optimizer import clip_norm, optimizer

BATCH, HISTORY, DIM, CATEGORIES = 4_096, 30, 16, 20
SIZES = {"1 million": 1_000_000, "6 million": 6_000_000}
STEPS = {"rows": 8, "dense": 2}
CLOCKS = ("cpu_seconds", "wall_seconds")
CONFIG = CrmConfig(name="din", embedding_dim=DIM, attention_mlp=[64], mlp=[128, 64])


def draw(rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A batch whose items are uniform over the table."""

    def ids(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(2, high, shape, generator=generator)

    target = torch.stack([ids(rows, BATCH), ids(CATEGORIES, BATCH)], -1)
    history = torch.stack([ids(rows, BATCH, HISTORY), ids(CATEGORIES, BATCH, HISTORY)], -1)
    return {
        "user": ids(1_000, BATCH, 1),
        "item": target,
        "recent_item": history,
        "recent_rating": torch.randint(1, 6, (BATCH, HISTORY), generator=generator),
        "recent_interval": torch.randint(1, 8, (BATCH, HISTORY), generator=generator),
        "recent_mask": torch.ones(BATCH, HISTORY, dtype=torch.bool),
        "label": torch.randint(0, 2, (BATCH,), generator=generator).float(),
    }


def measure(way: str, rows: int) -> dict[str, float]:
    """Median seconds of a step (CPU and wall time), peak memory, the table with its moments alone (GB)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = build(Fields((1_000,), (rows, CATEGORIES), rating_levels=5, category=1), CONFIG)
    for table in model.id_tables():
        table.sparse = way == "rows"
    adam = optimizer(model, FitConfig(clip=10.0), steps=1_000)["optimizer"]
    batches = [draw(rows, generator) for _ in range(STEPS[way] + 2)]
    cpu, wall = [], []
    for batch in batches:
        begin, own = time.perf_counter(), time.process_time()
        loss = functional.binary_cross_entropy_with_logits(model(batch)[0], batch["label"]) + model.l2(batch)
        loss.backward()
        clip_norm(model.parameters(), 10.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        cpu.append(time.process_time() - own)
        wall.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    table_gb = 3 * 4 * rows * DIM / 1e9
    spent = {"cpu_seconds": statistics.median(cpu[2:]), "wall_seconds": statistics.median(wall[2:])}
    return spent | {"peak_gb": peak, "table_and_moments_gb": table_gb}


def main(rounds: int) -> None:
    """Measure all in turns, keep and print the figures."""
    best: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for way in STEPS if number == 0 else ("rows",):
            for size, rows in SIZES.items():
                command = [sys.executable, "-m", "bench.tables", way, str(rows)]
                done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
                got = json.loads(done.stdout.strip().splitlines()[-1])
                name = f"{way}, {size} rows"
                for clock in CLOCKS:
                    got[clock] = min(got[clock], best.get(name, got)[clock])
                got["rest_gb"] = got["peak_gb"] - got["table_and_moments_gb"]
                best[name] = {key: round(value, 4) for key, value in got.items()}
    small, large = SIZES
    ratios = {
        way: {
            clock: round(best[f"{way}, {large} rows"][clock] / best[f"{way}, {small} rows"][clock], 2)
            for clock in CLOCKS
        }
        for way in STEPS
    }
    figures = {"batch_size": BATCH, "history": HISTORY, "embedding": DIM, "threads": 1, "rounds": rounds}
    path = keep("tables", {**figures, "of_a_step": best, "time_at_6_over_1_million": ratios}, "stage1")
    print(json.dumps({"of_a_step": best, "time_at_6_over_1_million": ratios}, indent=1))
    print(f"figures: {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in STEPS:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--rounds", type=int, default=5)
        main(parser.parse_args().rounds)
