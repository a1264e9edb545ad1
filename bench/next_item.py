"""RecTools' sequential models on the split of a finished event log, by the measure of `make evaluate`.

It trains RecTools' SASRec with sampled softmax, in an environment of its own, on exactly the log's training
events in the log's order, and looks each test row's item up in what it recommends: the whole catalog without
the items of the row's history, the validation row's among them. The validation rows alone choose the epoch.
`--models` names others: eSASRec (LiGR blocks), HSTU as RecTools has it, which is told the second at which an
item is wanted, HSTU without times, and HSTU of eight blocks.

Settings are those that were published for the data set (`SETTINGS`), and are written down beside the figures:
of SASRec and eSASRec in the configurations of the repository of the eSASRec paper (RecSys 2025), of HSTU in
RecTools' tutorial. Of a data set that has none, those of `ml-1m` are taken.

Every seed is trained once, in a process of its own, and kept in `.bench/next/`: a run that was broken off
goes on where it was. `--quick` trains two epochs of three steps, to see that everything works.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.clock import REPOSITORY, keep
from recllm.cache import Cache
from recllm.errors import StageError
from recllm.evaluation import bootstrap
from recllm.evaluation.bootstrap import Resampled
from recllm.evaluation.next import GAINS, HITS, TOP, by_coldness, by_ties, is_tied, of_lists
from recllm.evaluation.results import HEADLINE, ResultRow, merge, of_seed, read, write
from recllm.evaluation.tables import print_table
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.queries import LogRows
from recllm.files import now
from recllm.metrics import means, values_by_place
from recllm.pipeline.finished import Finished
from recllm.pipeline.manifest import commit, hardware
from recllm.systems.cascade import places_in, retrieve
from recllm.systems.catalog import CatalogScorer, Excluded
from recllm.systems.catalog_counting import CatalogPopularity
from recllm.systems.crm import Crm
from recllm.systems.retriever import Retriever
from stages.report import DECIMALS, TABLE

PLACE = REPOSITORY / ".bench"
PYTHON = PLACE / "rectools" / "bin" / "python"
PEER = "bench.peers.rectools_next"
LISTED = 500
"""Items that a user is recommended, at most; as many as `evaluate.next.retrieved`."""

MOST_PRODUCTS = 20_000
"""Items of the largest catalog for which a CPU computes all logits and takes those of the negatives."""

SASREC = {
    "n_factors": 64,
    "n_blocks": 2,
    "n_heads": 1,
    "dropout_rate": 0.1,
    "session_max_len": 200,
    "loss": "sampled_softmax",
    "n_negatives": 256,
    "lr": 0.001,
    "batch_size": 128,
}
HSTU = {
    **SASREC,
    "n_factors": 50,
    "dropout_rate": 0.2,
    "n_negatives": 128,
    "lightning_module_kwargs": {"logits_t": 0.05},
}
SHORT = {"n_factors": 256, "n_blocks": 1, "dropout_rate": 0.2, "session_max_len": 50}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "ml-1m": {
        "sasrec": SASREC,
        "esasrec": SASREC,
        "hstu": HSTU,
        "hstu-untimed": {**HSTU, "relative_time_attention": False},
        "hstu-large": {**HSTU, "n_blocks": 8, "n_heads": 2},
    },
    "amazon14-beauty": {
        "sasrec": {**SASREC, **SHORT},
        "esasrec": {**SASREC, **SHORT},
        "hstu-untimed": {**HSTU, "session_max_len": 50, "relative_time_attention": False},
    },
}
"""Data set -> model -> the settings that its authors published; everything else is RecTools' default.

The HSTU of `amazon14-beauty` is the one of `ml-1m` with shorter histories: RecTools published none.
"""
TRAINING = {
    "ml-1m": {"epochs": 100, "patience": 50},
    "amazon14-beauty": {"epochs": 200, "patience": 50},
}
"""Epochs at most, and without a better HR@10 on validation before training ends."""


@dataclass(frozen=True)
class Split:
    """A leave-one-out log as RecTools is handed it.

    Attributes:
        log: the event log.
        train: int64 `[n]`, training events in the log's order.
        valid: int64, the validation rows, one of a user at most.
        test: int64 `[R]`, the test rows, one of a user.
    """

    log: EventLog
    train: Rows
    valid: Rows
    test: Rows

    @classmethod
    def of(cls, log: EventLog, kind: str) -> Split:
        """The rows of a log.

        Args:
            log: the event log.
            kind: `prepare.split`.

        Raises:
            StageError: another split than `last`, or more than one row of a user in it.
        """
        test = np.sort(log.rows("test", "all"))
        valid = np.sort(log.rows("valid", "all"))
        alone = all(len(np.unique(log.user[rows])) == len(rows) for rows in (valid, test))
        if kind != "last" or not alone or max(valid.max(), test.max()) >= log.n_events:
            raise StageError(
                f"prepare.split={kind} with {len(test):,} test rows; wanted a log of one event of a user in "
                "each held-out split: make prepare EXPERIMENT=leave-one-out"
            )
        train = np.flatnonzero(log.train_events()[: log.n_events])
        return cls(log, train, valid, test)

    def write(self, path: Path) -> None:
        """Write training events, validation rows, and of the test rows user and second."""
        log = self.log
        rows = np.sort(np.concatenate([self.train, self.valid]))
        # Of a log without times the place in the user's events says which is the later one.
        second = log.timestamp if log.timed else np.arange(len(log.user)) - log.offsets[log.user]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            user=log.user[rows],
            item=log.item[rows],
            second=np.asarray(second[rows], np.int64),
            held=np.isin(rows, self.valid),
            test_user=log.user[self.test],
            test_second=np.asarray(second[self.test], np.int64),
        )


def train(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Train one model with one seed, unless that is done; how it went.

    Args:
        folder: of this model and seed; what lies there of another job is removed.
        job: what `bench/peers/rectools_next.py` reads.

    Raises:
        SystemExit: it failed; what it said stands above.
    """
    written = folder / "job.json"
    if written.exists() and json.loads(written.read_text()) != job:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps(job, indent=1) + "\n")
    finished = folder / "fit.json"
    if not finished.exists():
        done = subprocess.run([str(PYTHON), "-m", PEER, str(folder)], cwd=REPOSITORY)
        if done.returncode:
            raise SystemExit(f"error: {PEER} ended with {done.returncode} in {folder}; see above")
    return dict(json.loads(finished.read_text()))


def measure(split: Split, items: NDArray[np.int32]) -> tuple[dict[str, float], NDArray[np.float64]]:
    """Figures of lists, and the headline metric of each row, as `make evaluate TASK=next` has them.

    Args:
        split: whose test rows are looked up.
        items: int32 `[R, 500]`, best first; 0 behind the last one.
    """
    log = split.log
    own = log.item[split.test]
    columns = places_in(items, own)
    values = values_by_place(columns, HITS, GAINS)
    figures = means(values)
    figures[f"recall@{LISTED}"] = float((columns >= 0).mean())
    figures |= of_lists(log, items[:, :TOP])
    figures |= by_coldness(log, own, values, columns >= 0, LISTED)
    figures |= by_ties(values, is_tied(log, split.test))
    return figures, values[HEADLINE["next"]]


def resampled(split: Split, values: NDArray[np.float64]) -> Resampled:
    """Resamples of a mean, by users."""
    return bootstrap.of_mean(values, split.log.user[split.test])


def beside(split: Split, retriever: Path | None) -> dict[str, Resampled]:
    """What the peer is compared with on the same rows: popularity, and a finished retriever of ours."""
    scorers: dict[str, CatalogScorer] = {"popularity": CatalogPopularity(split.log)}
    if retriever is not None:
        stage = Finished.open(retriever)
        crm = Crm.open(stage, split.log, None, Cache(stage.root / "cache"))
        scorers["retriever"] = Retriever("retriever", crm, split.log)
    others = {}
    for name, scorer in scorers.items():
        asked = LogRows(split.log, split.test)
        lists = retrieve(scorer, asked, LISTED, Excluded.seen(split.log, split.test)).items
        figures, values = measure(split, lists)
        print(f"{name}: HR@10 {figures['hr@10']:.4f}, NDCG@10 {figures['ndcg@10']:.4f}", flush=True)
        others[name] = resampled(split, values)
    return others


def row(
    split: Split,
    model: str,
    folder: Path,
    fit: Mapping[str, Any],
    others: Mapping[str, Resampled],
    variant: str,
) -> ResultRow:
    """The line of the table of a finished run."""
    figures, values = measure(split, np.load(folder / "lists.npz")["items"])
    figures["milliseconds"] = fit["milliseconds"]
    figures["valid_hr@10"] = max(fit["valid_hr@10_by_epoch"])
    figures["seconds_of_training"] = fit["seconds_of_training"]
    own = resampled(split, values)
    differences = {name: asdict(own.minus(other)) for name, other in others.items()}
    return ResultRow(
        system=f"{model}-rectools",
        stage="peer",
        task="next",
        row_set="test/all/any",
        rows=len(split.test),
        metrics=figures,
        candidates="unseen",
        variant=variant or None,
        paired_with="popularity",
        **differences.pop("popularity"),
        against=differences,
        split="last",
        commit=commit(),
        date=now(),
        hardware=hardware(),
        command=os.environ.get("RECLLM_COMMAND") or "python -m bench.next_item",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is asked for, show the table, and keep it where that is wanted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="a finished event log, artifacts/<dataset>/log...")
    parser.add_argument("--models", nargs="+", default=["sasrec"], choices=SETTINGS["ml-1m"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--like", choices=SETTINGS, help="whose settings; the data set's own by default")
    parser.add_argument("--retriever", type=Path, help="a finished retriever of ours on the same log")
    parser.add_argument("--variant", default="leave-one-out", help="of the table that the rows belong to")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--quick", action="store_true", help="two epochs of three steps")
    parser.add_argument("--table", action="store_true", help="merge into results/<dataset>/table.json")
    given = parser.parse_args(arguments)
    if not PYTHON.exists():
        raise SystemExit(
            f"error: no environment for RecTools at {PYTHON}; run `make .bench/rectools/.installed`"
        )
    if given.quick and given.table:
        raise SystemExit("error: --quick trains nothing worth a table; wanted one of --quick and --table")
    stage = Finished.open(given.log)
    dataset = stage.file.dataset
    like = given.like or (dataset if dataset in SETTINGS else "ml-1m")
    log = EventLog.open(stage.folder)
    split = Split.of(log, str(stage.config.prepare.split))
    unknown = [model for model in given.models if model not in SETTINGS[like]]
    unknown += [model for model in given.models if model in ("hstu", "hstu-large") and not log.timed]
    if unknown:
        raise SystemExit(
            f"error: no {unknown[0]} for {dataset}: its settings are not known for {like}, or it reads times "
            "and there are none; wanted another of --models"
        )
    place = PLACE / "next" / dataset / (stage.folder.name + ("+quick" if given.quick else ""))
    split.write(place / "events.npz")
    others = beside(split, given.retriever)
    rows: list[ResultRow] = []
    runs: dict[str, Any] = {}
    for model in given.models:
        for seed in given.seeds:
            job = {
                "model": model,
                "seed": seed,
                "settings": SETTINGS[like][model],
                **TRAINING[like],
                "steps": None,
                "catalog_products": given.device == "cpu" and log.n_items <= MOST_PRODUCTS,
                "device": given.device,
                "threads": given.threads,
                "log": stage.identity,
            }
            if given.quick:
                job |= {"epochs": 2, "steps": 3}
            folder = place / model / f"seed-{seed}"
            print(f"{model}, seed {seed}: {folder.relative_to(REPOSITORY)}", flush=True)
            fit = train(folder, job)
            runs.setdefault(model, {})[f"seed {seed}"] = {"job": job, **fit}
            rows = merge(rows, [of_seed(row(split, model, folder, fit, others, given.variant), seed)])
            write(place / "rows.json", rows)
    print_table(rows)
    print(f"{place.relative_to(REPOSITORY) / 'rows.json'}")
    if given.table:
        table = REPOSITORY / "results" / dataset / TABLE
        table.parent.mkdir(parents=True, exist_ok=True)
        write(table, merge(read(table), rows), DECIMALS)
        settings = keep("rectools", {"runs": runs}, dataset)
        print(f"merged into {table.relative_to(REPOSITORY)}; settings: {settings.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
