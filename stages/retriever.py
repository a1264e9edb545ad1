"""Stage 1, the retriever: it learns to find the next event of every history; validation selects."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics import MeanMetric

from recllm.config.stages import Stage1Config
from recllm.console import say
from recllm.crm import build, export
from recllm.crm.inputs import CrmInputs, table_sizes
from recllm.crm.retriever import Retriever
from recllm.crm.sequences import Sequences
from recllm.errors import StageError
from recllm.eventlog.ids import VALID
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.rowsets import validation_rows
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.systems.crm import crm_inputs
from recllm.systems.item_texts import text_vectors
from recllm.training.blocked_cross_entropy import blocked_cross_entropy
from recllm.training.callbacks import WEIGHTS
from recllm.training.checkpoints import best_scores, load_best
from recllm.training.crm_module import CrmTraining
from recllm.training.fit import fit
from recllm.training.loaders import Loaders, Stream, plan_steps

Batch = dict[str, Tensor]
TOP = 10
"""Validation reads the first so many items."""


class RetrieverModule(CrmTraining):
    """Softmax of the next item, over the catalog or over sampled items.

    Attributes:
        candidates: ids of the item table with a training event, int64 `[n]`.
        place: of each id of the table its place among them, -1 of what is none, int64 `[rows]`.
        offered: ids that a validation row's item is looked for among, int64 `[m]`.
        offered_place: as `place`, among those.
        log_drawn: log of the probability with which each candidate is drawn, float32 `[n]`.
        cumulative: how often they are to be found, as a cumulative share, float64 `[n]`.

    Args:
        model: what trains.
        config: of stage 1.
        steps: training steps.
        candidates: ids of the item table with a training event, int64 `[n]`, ascending.
        counts: how often each id of the table is to be found in a pass, `[rows]`.
        offered: ids that a validation row's item is looked for among: those that can be recommended.
    """

    model: Retriever
    candidates: Tensor
    place: Tensor
    offered: Tensor
    offered_place: Tensor
    log_drawn: Tensor
    cumulative: Tensor

    def __init__(
        self,
        model: Retriever,
        config: Stage1Config,
        steps: int,
        candidates: Tensor,
        counts: Tensor,
        offered: Tensor,
    ) -> None:
        """See the class."""
        super().__init__(model, config, steps)
        self.samples = len(candidates) > config.next.full_softmax
        for name, items in (("", candidates), ("offered_", offered)):
            place = torch.full((len(counts),), -1)
            place[items] = torch.arange(len(items))
            self.register_buffer(f"{name}place", place, persistent=False)
        self.register_buffer("candidates", candidates, persistent=False)
        self.register_buffer("offered", offered, persistent=False)
        frequency = counts[candidates].double() / counts.sum()
        # Half of the sampled items are uniform, half by frequency: an item is drawn with this probability.
        drawn = 0.5 * frequency + 0.5 / len(candidates)
        self.register_buffer("log_drawn", drawn.log().float(), persistent=False)
        self.register_buffer("cumulative", frequency.cumsum(0), persistent=False)
        for table in model.id_tables():
            table.sparse = config.sparse_tables and self.samples
        self.ndcg = MeanMetric()
        self.hits = MeanMetric()

    def training_step(self, batch: Batch, index: int) -> dict[str, Any]:
        """The loss of a step: mean over the events of the global batch that are to be found."""
        states = self.model.states(batch["items"], batch["ratings"], batch["seconds"])
        is_target = batch["target"] != 0
        users = states[is_target]
        target = batch["target"][is_target]
        loss = self._sampled(users, target) if self.samples else self._full(users, target)
        weights = {"data": len(target) * batch["loss_scale"]}
        return {"loss": loss * batch["loss_scale"], "data": loss.detach() / len(target), WEIGHTS: weights}

    def _full(self, users: Tensor, target: Tensor) -> Tensor:
        """Sum of negative log-likelihoods of targets `[n]` among all candidates, users `[n, hidden]`."""
        return blocked_cross_entropy(users, self.model.item_vectors(self.candidates), self.place[target])

    def _sampled(self, users: Tensor, target: Tensor) -> Tensor:
        """The same among the target and sampled items, whose sum is an estimate of that over all others.

        With S items drawn from q, the sum over j of exp(s_j) is estimated by 1/S sum exp(s_j - log q_j)
        (Bengio and Senecal 2008); a drawn item that is the target itself counts as nothing.
        """
        count = self.config.next.sampled
        half = count // 2
        uniform = torch.randint(len(self.candidates), (count - half,), device=users.device)
        chance = torch.rand(half, dtype=torch.float64, device=users.device)
        popular = torch.searchsorted(self.cumulative, chance).clamp(max=len(self.candidates) - 1)
        drawn = torch.cat([uniform, popular])
        scores = users @ self.model.item_vectors(self.candidates[drawn]).t()
        scores = scores - self.log_drawn[drawn] - float(np.log(count))
        scores = scores.masked_fill(self.candidates[drawn] == target[:, None], -torch.inf)
        own = (users * self.model.item_vectors(target)).sum(1, keepdim=True)
        scores = torch.cat([own, scores], dim=1)
        return F.cross_entropy(scores, torch.zeros_like(target), reduction="sum")

    def validation_step(self, batch: Batch, index: int) -> None:
        """NDCG and hit rate at 10 over all that is offered; every row once over all processes."""
        users = self.model.user_vectors(batch)
        scores = users @ self.model.item_vectors(self.offered).t()
        own = self.offered_place[batch["dense"].long()]
        target = scores.gather(1, own.clamp(min=0)[:, None])
        if self.config.next.seen == "removed":
            seen = self.offered_place[batch["seen"]]
            line = torch.arange(len(scores), device=scores.device)[:, None].expand_as(seen)
            there = (seen >= 0) & (seen != own[:, None])
            scores[line[there], seen[there]] = -torch.inf
        # Ties count half: a rank is how many are better, and half of the others that are as good.
        better = (scores > target).sum(1)
        rank = better + ((scores == target).sum(1) - 1).clamp(min=0) / 2
        hit = ((rank < TOP) & (own >= 0)).float()  # an item that is not offered is never found
        self.ndcg.update(hit / torch.log2(rank + 2))
        self.hits.update(hit)
        self.log("valid/ndcg@10", self.ndcg)
        self.log("valid/hr@10", self.hits)


def offered_items(log: EventLog) -> Tensor:
    """Items that validation looks for its targets among: those with a training event.

    Where items are held out, those that are held out for validation: among all items hardly one of them comes
    first, so that every checkpoint would score 0.
    """
    is_offered = log.item_count > 0 if log.item_split is None else log.item_split == VALID
    return torch.from_numpy(np.flatnonzero(is_offered))


def check_held_items(log: EventLog, config: Stage1Config) -> None:
    """Refuse a retriever of ids alone where all that is looked for has none.

    Raises:
        StageError: what to set.
    """
    if log.item_split is not None and not config.crm.text_dim:
        raise StageError(
            "prepare.split=items holds whole items out, and a retriever of ids (stage1.crm.text_dim=0) finds "
            "none of them; wanted one that reads texts: CRM=retriever-lm"
        )


def target_events(log: EventLog, config: Stage1Config) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The events that are to be found, bool `[N]`: training events, but for held-out samples.

    Raises:
        StageError: there is none.
    """
    is_target = np.array(log.train_events())
    if config.next.targets == "liked":
        is_target &= log.label == 1
    if config.hold_out != "none":
        is_target[log.rows("train", config.hold_out)] = False
    is_target[log.n_events :] = False
    if not is_target.any():
        raise StageError(
            f"no training event is to be found (stage1.next.targets={config.next.targets}); "
            "wanted some, e.g. ARGS=stage1.next.targets=any"
        )
    return is_target


def findable_rows(log: EventLog, config: Stage1Config) -> Rows:
    """Rows whose item is to be found, of the validation split's row set.

    Raises:
        StageError: there is none.
    """
    name = config.fit.valid_rows
    key = "stage1.fit.valid_rows"
    rows = validation_rows(log, name, key)
    rows = rows[~log.is_drawn(rows)]
    if config.next.targets == "liked":
        rows = rows[log.label[rows] == 1]
    if not len(rows):
        raise StageError(
            f"no row of the validation split ({key}={name}) is to be found; wanted some, e.g. ARGS={key}=all"
        )
    return rows


def loaders(run: Run, inputs: CrmInputs, sequences: Sequences, valid: Rows, steps: int) -> Loaders:
    """Batches of windows in seeded order, those of like length together; and all validation rows."""
    config = run.config.stage1
    log = inputs.log
    stream = Stream(len(sequences), config.fit.batch_size, run.config.seed, sequences.lengths)

    def train(step: int, rank: int, world: int) -> Batch:
        batch = sequences(stream.indices(step, rank, world))
        whole = int(sequences.targets[stream.indices(step)].sum())
        return batch | {"loss_scale": torch.tensor(world / whole)}

    def validate(indices: Rows) -> Batch:
        rows = valid[indices]
        batch = inputs.gather(rows)
        start, end = log.history(rows)
        longest = int((end - start).max())
        place = start[:, None] + np.arange(longest)
        items = log.item[np.minimum(place, log.n_events - 1)]
        batch["seen"] = torch.from_numpy(np.where(place < end[:, None], items, 0).astype(np.int64))
        return batch

    def finish(batch: Batch) -> Batch:
        return inputs.expand(batch) if "second" in batch else batch

    return Loaders(train=train, steps=steps, valid=[(validate, len(valid))], valid_batch=512, finish=finish)


def train(
    run: Run, inputs: CrmInputs, callbacks: Sequence[Callback] = ()
) -> tuple[Retriever, lightning.Trainer, dict[str, Any]]:
    """Train: the model after the last step, the trainer, and what the manifest says of the training."""
    config = run.config.stage1
    log = inputs.log
    torch.manual_seed(run.config.seed)
    model = cast(Retriever, build(table_sizes(log), config.crm))
    if config.crm.text_dim:
        trained = torch.from_numpy(log.item_count > 0)
        model.set_texts(text_vectors(run.parents[Role.NEIGHBORS], config.crm.text_dim), trained)
    check_held_items(log, config)
    is_target = target_events(log, config)
    sequences = Sequences(log, config.recent, is_target)
    valid = findable_rows(log, config)
    steps, interval = plan_steps(
        len(sequences), config.fit.batch_size, config.fit.epochs, config.fit.validations
    )
    counts = torch.from_numpy(sequences.counts())
    candidates = torch.from_numpy(np.flatnonzero(log.item_count))
    module = RetrieverModule(model, config, steps, candidates, counts, offered_items(log))
    softmax = f"sampled softmax of {config.next.sampled:,}" if module.samples else "softmax over all"
    say(
        f"{sequences.targets.sum():,} events to find in {len(sequences):,} sequences, {softmax} of "
        f"{len(module.candidates):,} items"
    )
    say(f"{steps:,} steps of {config.fit.batch_size} sequences, validated every {interval}")
    parts = loaders(run, inputs, sequences, valid, steps)
    trainer = fit(run, module, parts, config.fit, interval, [config.monitor], callbacks=callbacks)
    figures = {
        "steps": steps,
        "rows": int(sequences.targets.sum()),
        "hold_out": config.hold_out,
        "inputs": config.inputs,
        "items": len(module.candidates),
    }
    return model, trainer, figures


def data(run: Run) -> CrmInputs:
    """What validation batches are made of."""
    log = EventLog.open(run.parents[Role.LOG].folder)
    return crm_inputs(log, run.config.stage1.inputs, None)


def work(run: Run) -> None:
    """Train, export the best checkpoint, and say what it reached."""
    config = run.config.stage1
    model, trainer, figures = train(run, data(run))
    if not trainer.is_global_zero:
        return
    load_best(run, config.monitor, model)
    export(model, run.export, {"inputs": config.inputs, "config": dataclasses.asdict(config)})
    run.finish([run.export], {**figures, **best_scores(run, config.monitor)})


def tune(run: Run) -> None:
    """Train trial after trial of a study, until its budget is spent."""
    from recllm.training.search import search

    search(run, data, train)
