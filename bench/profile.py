"""Where a training step of a CRM goes: `make profile CRM=sim`, on one thread, in CPU time.

The CRM has the shape of `conf/stage1/<crm>.yaml` and reads a generated log of MovieLens-1M's shape
(`bench/loader.py`). A step is cut into its parts, from the order of the rows to the optimizer, each with its
share; of forward and backward the operators that take most, by PyTorch's profiler. Beside it stands what this
machine can do at best: one large product of matrices in float32, and a copy of more memory than caches hold.

Events that SIM reads as nearest ones are the latest here: finding them is no part of a step, and what the
model does with them is the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from bench.clock import REPOSITORY, fastest, keep
from bench.loader import PLACE, make_log
from recllm.config.merge import load_yaml, merge
from recllm.config.stages import Stage1Config
from recllm.crm import Model, build
from recllm.crm.inputs import CrmInputs, table_sizes
from recllm.eventlog.log import EventLog
from recllm.eventlog.statistics import Statistics
from recllm.retrieval.category import SameCategory
from recllm.training.loaders import Stream
from recllm.training.optimizer import clip_norm, optimizer

STEPS, PROFILED, OPERATORS = 40, 4, 10
WIDTH, COPIED = 2_048, 2**26
"""Rows of a large matrix; bytes of a large copy."""

Batch = dict[str, torch.Tensor]


def inputs_of(log: EventLog, config: Stage1Config) -> tuple[CrmInputs, Statistics | None]:
    """Batches without statistics, and what makes these, so that each has a time of its own."""
    stored = None
    searcher = None
    if config.crm.search == "semantic":
        latest = log.recent(np.arange(len(log.user)), config.retrieved)[:, ::-1]
        stored = np.ascontiguousarray(latest, np.int32)
    elif config.crm.search == "hard":
        searcher = SameCategory(log)
    retrieved = config.retrieved if config.crm.search else 0
    inputs = CrmInputs(log, config.recent, retrieved, stored, searcher)
    return inputs, Statistics(log) if config.crm.statistics else None


def losses(model: Model, batch: Batch) -> torch.Tensor:
    """The loss of a step without its regularizer, as stage 1 has it."""
    return functional.binary_cross_entropy_with_logits(model(batch)[0], batch["label"])


class Parts:
    """CPU seconds of the parts of a step, summed over steps."""

    def __init__(self) -> None:
        """Starts the clock."""
        self.seconds: dict[str, float] = {}
        self.last = time.process_time()

    def end(self, name: str) -> None:
        """What was done since the last part ended was this part."""
        now = time.process_time()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def steps(log: EventLog, config: Stage1Config, parts: Parts) -> Iterator[tuple[Model, Batch]]:
    """Training steps without end; the model and the batch of each, and its parts' times added to `parts`."""
    torch.manual_seed(0)
    model = build(table_sizes(log), config.crm)
    for table in model.id_tables():
        table.sparse = config.sparse_tables
    inputs, statistics = inputs_of(log, config)
    rows = log.rows("train", "all")
    if statistics is not None:
        statistics(rows)  # as in a training under way, all rows' codes are kept from now on
    stream = Stream(len(rows), config.fit.batch_size, seed=0)
    adam = optimizer(model, config.fit, 1_000)["optimizer"]
    for number in itertools.count():
        parts.last = time.process_time()
        chosen = rows[stream.indices(number)]
        parts.end("order")
        batch = inputs.gather(chosen)
        parts.end("gather")
        if statistics is not None:
            batch["statistics"] = torch.from_numpy(statistics(chosen))
            parts.end("statistics")
        batch = inputs.expand(batch)
        parts.end("expand")
        loss = losses(model, batch)
        parts.end("forward")
        loss = loss + model.l2(batch)
        parts.end("regularizer")
        loss.backward()
        parts.end("backward")
        clip_norm(model.parameters(), config.fit.clip)
        parts.end("clip")
        adam.step()
        adam.zero_grad(set_to_none=True)
        parts.end("optimizer")
        yield model, batch


def operators(model: Model, batch: Batch) -> dict[str, float]:
    """Shares of forward and backward that PyTorch's operators take themselves, largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        for _ in range(PROFILED):
            (losses(model, batch) + model.l2(batch)).backward()
            model.zero_grad(set_to_none=True)
    events = sorted(run.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    return {event.key: round(event.self_cpu_time_total / whole, 3) for event in events[:OPERATORS]}


def roofline() -> dict[str, float]:
    """What one thread does at best: GFLOP/s of a large float32 product, GB/s read and written by a copy."""
    left = torch.randn(WIDTH, WIDTH)
    right = torch.randn(WIDTH, WIDTH)
    source = torch.zeros(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    products = fastest(lambda: left @ right, 1, rounds=5)["cpu"]
    copies = fastest(lambda: target.copy_(source), 1, rounds=5)["cpu"]
    return {
        "product_gflops": round(2 * WIDTH**3 * products / 1e9, 1),
        "copy_gb_a_second": round(2 * COPIED * copies / 1e9, 1),
    }


def main(crm: str) -> None:
    """Measure, keep and print."""
    torch.set_num_threads(1)
    path = REPOSITORY / "conf" / "stage1" / f"{crm}.yaml"
    if not path.is_file():
        raise SystemExit(f"error: got CRM={crm}; wanted a file of conf/stage1, e.g. make profile CRM=sim")
    config = merge([(str(path), load_yaml(path))], {}).stage1
    if config.objective != "ctr" or config.crm.text_dim:
        raise SystemExit(f"error: got CRM={crm}; wanted one trained on labels, without texts, e.g. CRM=sim")
    folder = PLACE / "profile"
    make_log(folder)
    log = EventLog.open(folder / "log")
    parts = Parts()
    training = steps(log, config, parts)
    for _ in range(3):
        next(training)
    parts.seconds.clear()
    for _ in range(STEPS):
        model, batch = next(training)
    whole = sum(parts.seconds.values())
    figures = {
        "crm": crm,
        "batch_size": config.fit.batch_size,
        "threads": 1,
        "rows_a_cpu_second": round(STEPS * config.fit.batch_size / whole),
        "share_of_a_step": {name: round(spent / whole, 3) for name, spent in parts.seconds.items()},
        "operators_of_forward_and_backward": operators(model, batch),
        "roofline": roofline(),
    }
    print(json.dumps(figures, indent=1))
    path = keep(f"profile-{crm}", figures, "stage1")
    print(f"figures: {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("crm")
    main(parser.parse_args().crm)
