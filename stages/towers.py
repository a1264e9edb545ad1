"""Stage 2 with two towers (CTR-BERT): tune a bidirectional encoder and a head on the subsample.

Apart from stages/stage2.py, since nothing of that is in it: no prompt, no adapter, no gate, no titles. Rows,
selection by validation AUC and the rows of the table are the same. All weights train.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import BinaryAUROC
from transformers.utils import logging

from recllm.config.stages import FitConfig
from recllm.console import say
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.rowsets import selection_rows
from recllm.files import load_weights
from recllm.lm.forwards import rows_for_scoring
from recllm.lm.tasks import Batch, TowerPairs, sort_by_length
from recllm.lm.towers import TwoTowers
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.systems.texts import encoder, tower_prompts
from recllm.training.checkpoints import best, best_scores
from recllm.training.fit import fit
from recllm.training.loaders import Loaders, Stream, plan_steps
from recllm.training.micro_batch_module import MicroBatchModule
from recllm.training.micro_batches import token_budget
from recllm.training.optimizer import optimizer
from recllm.training.precision import device_of

VALID_BATCH = 256
"""Rows of a validation batch, at most."""


class TowersModule(MicroBatchModule):
    """Binary cross-entropy of the CTR logit; every distinct item of a forward is read once."""

    def __init__(self, model: TwoTowers, settings: FitConfig, steps: int) -> None:
        """Train all of `model`."""
        super().__init__(model)
        self.settings, self.steps = settings, steps
        self.auc = BinaryAUROC()

    @property
    def transformer(self) -> Any:
        """See `MicroBatchModule`."""
        return self.model.encoder

    def logits(self, batch: Batch) -> Tensor:
        """CTR logits [B], float32."""
        users, items = self.model.encode(batch["user"]), self.model.encode(batch["item"])
        logits: Tensor = self.model(users, items[batch["pair"]]).float()
        return logits

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a micro-batch: mean over its rows."""
        loss = F.binary_cross_entropy_with_logits(self.logits(batch), batch["label"])
        return {"loss": loss * batch["loss_scale"]}

    def validation_step(self, batch: Batch, index: int) -> None:
        """AUC over all processes' rows."""
        self.auc.update(self.logits(batch), batch["label"].long())
        self.log("valid/auc", self.auc)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and linear decay."""
        return optimizer(self, self.settings, self.steps)


def loaders(run: Run, train: TowerPairs, valid: TowerPairs, model: TwoTowers, steps: int) -> Loaders:
    """Micro-batches of rows with user texts of like length, as large as memory allows for `model`."""
    settings = run.config.stage2.fit
    trainer = run.config.trainer
    user_lengths = train.lengths()
    stream = Stream(len(train), settings.batch_size, run.config.seed, user_lengths)
    lengths = user_lengths + train.item_lengths()
    budget = token_budget(model, trainer, lengths, settings.batch_size)

    def batch(step: int, rank: int, world: int) -> list[Batch]:
        indices = stream.indices(step, rank, world)
        parts = stream.micro_batches(step, rank, world, budget.tokens, lengths)
        return [train(indices[part]) | {"loss_scale": loss_scale} for part, loss_scale in parts]

    valid_lengths = valid.lengths() + valid.item_lengths()
    return Loaders(
        train=batch,
        steps=steps,
        valid=[sort_by_length(valid)],
        valid_batch=rows_for_scoring(valid_lengths, VALID_BATCH, device_of(trainer).type),
        budget=budget,
    )


def work(run: Run) -> None:
    """Train, keep the towers with the best validation AUC."""
    settings, log = run.config.stage2.fit, EventLog.open(run.parents[Role.LOG].folder)
    valid_rows = selection_rows(log, settings.valid_rows, "stage2.fit.valid_rows")
    named, tokenizer, context = encoder(run.parents[Role.ENCODER])
    prompts = tower_prompts(run.config, log, tokenizer, context)
    torch.manual_seed(run.config.seed)
    model = TwoTowers(named.requires_grad_(True), run.config.towers)

    def pairs(rows: Rows) -> TowerPairs:
        return TowerPairs(prompts, rows, log.recent(rows, run.config.prompt.history), tokenizer.pad_token_id)

    train = pairs(log.rows("train", run.config.subsample))
    valid = pairs(valid_rows)
    steps, interval = plan_steps(len(train), settings.batch_size, settings.epochs, settings.validations)
    weights = sum(value.numel() for value in model.parameters())
    say(f"{len(train):,} rows, {steps:,} steps of {settings.batch_size}, {weights:,} weights train")
    module = TowersModule(model, settings, steps)
    batches = loaders(run, train, valid, model, steps)
    trainer = fit(run, module, batches, settings, interval, ["valid/auc"])
    if not trainer.is_global_zero:
        return
    module.load_state_dict(load_weights(best(run, "valid/auc"))["state_dict"])
    logging.disable_progress_bar()
    model.save(run.export, tokenizer, context)
    facts = run.parents[Role.ENCODER].manifest.metrics
    metrics = {
        "steps": steps,
        "rows": len(train),
        "items": len(np.unique(log.item[train.rows])),
        "trainable": weights,
        "cut_prompts": train.count_cut(),
        "encoder": facts["name"],
        "ratings_as_text": facts["ratings_as_text"],
        "answers_as_text": 0,
        **best_scores(run, "valid/auc"),
    }
    run.finish([run.export], metrics)
