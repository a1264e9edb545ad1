"""Stage 1: train a conventional recommendation model (CRM) on all training samples; validation selects."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics.classification import BinaryAUROC
from torchmetrics.retrieval import RetrievalHitRate

from recllm.config.stages import NewestConfig, Stage1Config
from recllm.console import say
from recllm.crm import Model, build, export
from recllm.crm.inputs import CrmInputs, table_sizes
from recllm.errors import StageError
from recllm.eventlog.candidates import Seen, negatives
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.rowsets import check_ranking_rows, selection_rows, with_new_items
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.retrieval.stored import Retrieval
from recllm.systems.crm import crm_inputs
from recllm.systems.item_texts import text_vectors
from recllm.training.callbacks import WEIGHTS
from recllm.training.checkpoints import best_scores, load_best
from recllm.training.crm_module import CrmTraining
from recllm.training.fit import fit
from recllm.training.loaders import Course, Loaders, NewestLast, Stream
from recllm.training.precision import compile_model

Batch = dict[str, Tensor]


class CrmModule(CrmTraining):
    """Binary cross-entropy on logits; or, for a ranker, softmax of the liked item among sampled negatives."""

    def __init__(
        self,
        model: Model,
        config: Stage1Config,
        steps: int,
        compiles: bool = False,
        newest_steps: int = 0,
    ) -> None:
        """Train `model`; `compiles`: with torch.compile, where that works."""
        super().__init__(model, config, steps, newest_steps)
        self.compiles = compiles
        for table in model.id_tables():
            table.sparse = config.sparse_tables
        self.auc = BinaryAUROC()
        self.hits = RetrievalHitRate(top_k=1)

    def on_fit_start(self) -> None:
        """Compile where the model will train: on its device, in its precision."""
        if self.compiles:
            batch = self.trainer.datamodule.example(self.device)  # type: ignore[attr-defined]
            with self.trainer.precision_plugin.train_step_context():
                compile_model(self, batch)

    def training_step(self, batch: Batch, index: int) -> dict[str, Any]:
        """The loss of a step: mean over the batch, and the embeddings' regularizer."""
        logit, _ = self.model(batch)
        if self.config.objective == "ctr":
            loss = F.binary_cross_entropy_with_logits(logit, batch["label"], batch.get("weight"))
        else:
            scores = logit.view(-1, 1 + self.config.negatives)
            loss = F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))
        whole = (loss + self.model.l2(batch)) * batch["loss_scale"]
        return {"loss": whole, "data": loss.detach(), WEIGHTS: {"data": batch["loss_scale"]}}

    def validation_step(self, batch: Batch, index: int) -> None:
        """Scores of every row once; the metric is computed over all processes' rows."""
        logit, _ = self.model(batch)
        if self.config.objective == "ctr":
            self.auc.update(logit, batch["label"].long())
            self.log("valid/auc", self.auc)
        else:
            self.hits.update(logit, batch["target"], indexes=batch["query"])
            self.log("valid/hr@1", self.hits)


def training_rows(log: EventLog, name: str, hold_out: str) -> Rows:
    """The row set `name` of the training split, but for the samples of the row set `hold_out`.

    What is left out is left out as a sample: as an event of later histories it is still read.

    Raises:
        StageError: none is left.
    """
    rows = log.rows("train", name)
    remaining = rows
    if hold_out != "none":
        remaining = rows[~np.isin(rows, log.rows("train", hold_out))]
    if not len(remaining):
        raise StageError(
            f"stage1.hold_out={hold_out} leaves none of {len(rows):,} training rows; "
            "wanted fewer, e.g. ARGS=stage1.hold_out=0.1"
        )
    return remaining


def check_timed(log: EventLog, key: str, share: float) -> None:
    """Refuse a key that asks for the newest rows where the log has no times.

    Raises:
        StageError: it has none.
    """
    if share and not log.timed:
        raise StageError(f"{key}={share}, but the data set has no times to know the newest rows by; wanted 0")


def count_newest(log: EventLog, config: NewestConfig, train: Rows) -> int:
    """How many of the training rows, in time order, the last pass is over; 0: there is none.

    Raises:
        StageError: the log has no times.
    """
    check_timed(log, "stage1.newest.share", config.share)
    return round(config.share * len(train))


def age_weights(count: int, half_life: float) -> Tensor:
    """Weights in the loss of rows in time order, float32 `[count]`, with mean 1.

    Args:
        count: rows.
        half_life: share of them over which a weight halves.
    """
    age = torch.arange(count - 1, -1, -1, dtype=torch.float64) / count
    weight = 0.5 ** (age / half_life)
    return (weight / weight.mean()).float()


def plan_course(log: EventLog, config: Stage1Config, train: Rows) -> Course:
    """The steps of objective `ctr` over the training rows."""
    fit = config.fit
    newest = count_newest(log, config.newest, train)
    return Course.plan(len(train), newest, fit.batch_size, fit.epochs, fit.validations)


def ctr_loaders(run: Run, inputs: CrmInputs, train: Rows, steps: int, newest_steps: int = 0) -> Loaders:
    """Batches of training samples in seeded order, and all validation rows of the row set.

    Args:
        run: the stage.
        inputs: what batches are made of.
        train: the training rows in time order.
        steps: of the training.
        newest_steps: of them so many at the end, over the newest rows alone.
    """
    config, log = run.config.stage1, inputs.log
    valid = selection_rows(log, config.fit.valid_rows, "stage1.fit.valid_rows", config.cold_share)
    newest = count_newest(log, config.newest, train) if newest_steps else 0
    stream = NewestLast(len(train), newest, steps - newest_steps, config.fit.batch_size, run.config.seed)

    check_timed(log, "stage1.half_life", config.half_life)
    weights = age_weights(len(train), config.half_life) if config.half_life else None

    def batch(step: int, rank: int, world: int) -> Batch:
        indices = stream.indices(step, rank, world)
        gathered = inputs.gather(train[indices])
        if weights is not None:
            gathered["weight"] = weights[indices]
        return gathered | {"loss_scale": torch.tensor(stream.loss_scale(rank, world))}

    return Loaders(
        train=batch,
        steps=steps,
        valid=[(lambda indices: inputs.gather(valid[indices]), len(valid))],
        valid_batch=4096,
        finish=inputs.expand,
    )


def rank_loaders(run: Run, inputs: CrmInputs, liked: Rows, steps: int) -> Loaders:
    """Batches of liked rows with sampled negatives, drawn anew each pass; validation on popular lists."""
    config, log = run.config.stage1, inputs.log
    size = max(1, config.fit.batch_size // (1 + config.negatives))
    stream, seen = Stream(len(liked), size, run.config.seed), Seen(log)
    popular = config.negatives - config.negatives // 2

    def train(step: int, rank: int, world: int) -> Batch:
        rows = liked[stream.indices(step, rank, world)]
        passes = stream.passes(step, rank, world)  # a batch may reach over into the next
        drawn = np.empty((len(rows), config.negatives), np.int32)
        for number in np.unique(passes):
            chosen = passes == number
            seed = run.config.seed * 1_000 + int(number)
            halves = [
                negatives(log, rows[chosen], "uniform", config.negatives // 2, seed, seen=seen),
                negatives(log, rows[chosen], "popular", popular, seed, seen=seen),
            ]
            drawn[chosen] = np.concatenate(halves, 1)
        targets = np.concatenate([log.item[rows][:, None], drawn], 1)
        batch = inputs.gather(np.repeat(rows, targets.shape[1]), targets.ravel())
        own = (targets == targets[:, :1]).ravel()  # the others were drawn: what is liked of them is not known
        batch["label"] = torch.from_numpy(own).to(batch["label"])
        return batch | {"loss_scale": torch.tensor(stream.loss_scale(rank, world))}

    check_ranking_rows(log)
    rows, candidates = log.ranking("valid", log.candidate_kinds[-1])  # popular ones, the harder, or given
    rows, candidates = rows[:1000], candidates[:1000]

    def valid(indices: Rows) -> Batch:
        chosen = candidates[indices]
        batch = inputs.gather(np.repeat(rows[indices], chosen.shape[1]), chosen.ravel())
        batch["target"] = torch.from_numpy((chosen == log.item[rows[indices]][:, None]).ravel())
        batch["query"] = torch.from_numpy(np.repeat(indices, chosen.shape[1]))
        return batch

    return Loaders(
        train=train,
        steps=steps,
        valid=[(valid, len(rows))],
        valid_batch=200,
        finish=inputs.expand,
        step_rows=size,
    )


def data(run: Run) -> CrmInputs:
    """What batches are made of."""
    log, config = EventLog.open(run.parents[Role.LOG].folder), run.config.stage1
    retrieval = (
        Retrieval.open(run.parents[Role.NEIGHBORS].folder, log) if config.crm.search == "semantic" else None
    )
    return crm_inputs(log, config.inputs, retrieval)


def train(
    run: Run, inputs: CrmInputs, callbacks: Sequence[Callback] = ()
) -> tuple[Model, lightning.Trainer, dict[str, Any]]:
    """Train: the model after the last step, the trainer, and what the manifest says of the training."""
    config, log = run.config.stage1, inputs.log
    torch.manual_seed(run.config.seed)
    model = build(table_sizes(log), config.crm)
    if config.crm.text_dim:
        trained = torch.from_numpy(log.item_count > 0)
        model.set_texts(text_vectors(run.parents[Role.NEIGHBORS], config.crm.text_dim), trained)
    rows = training_rows(log, "all" if config.objective == "ctr" else "1.0", config.hold_out)
    if config.objective == "ctr":
        size = config.fit.batch_size
        course = plan_course(log, config, rows)
        loaders = ctr_loaders(run, inputs, rows, course.steps, course.newest_steps)
    else:
        of_a_kind = config.negatives - config.negatives // 2  # they are drawn in two halves
        rows = with_new_items(log, rows[log.label[rows] == 1], of_a_kind, "stage1.negatives")
        size = max(1, config.fit.batch_size // (1 + config.negatives))
        course = Course.plan(config.rank_rows, 0, size, 1.0, config.fit.validations)
        loaders = rank_loaders(run, inputs, rows, course.steps)
    held_out = "" if config.hold_out == "none" else f" ({config.hold_out} held out)"
    say(f"{len(rows):,} rows{held_out}, {course.steps:,} steps of {size}, validated every {course.interval}")
    if course.newest_steps:
        num_newest = count_newest(log, config.newest, rows)
        say(f"the last {course.newest_steps:,} steps are over the {num_newest:,} newest rows alone")
    module = CrmModule(model, config, course.steps, run.config.trainer.compile, course.newest_steps)
    trainer = fit(
        run,
        module,
        loaders,
        config.fit,
        course.interval,
        [config.monitor],
        callbacks=callbacks,
        stops_after=course.stops_after,
    )
    figures = {"steps": course.steps, "rows": len(rows), "hold_out": config.hold_out, "inputs": config.inputs}
    return model, trainer, figures


def work(run: Run) -> None:
    """Train, export the best checkpoint, and say what it reached."""
    config = run.config.stage1
    model, trainer, figures = train(run, data(run))
    if not trainer.is_global_zero:
        return
    load_best(run, config.monitor, model)
    facts = {"inputs": config.inputs, "config": dataclasses.asdict(config)}
    export(model, run.export, facts)
    run.finish([run.export], {**figures, **best_scores(run, config.monitor)})


def tune(run: Run) -> None:
    """Train trial after trial of a study, until its budget is spent."""
    from recllm.training.search import search

    search(run, data, train)
