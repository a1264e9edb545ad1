"""Stage 3: align a stage-2 adapter to preferences with Softmax-DPO over several rejected titles.

The reference is stage 2's adapter with its gate, frozen; its log-probabilities of all candidates are computed
once, so that the rejected titles are drawn anew in every pass at no cost. Selected on validation HR@1, with
no update as a candidate: where nothing is better, stage 2's adapter comes out, and the manifest says so.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recllm import parents
from recllm.data import draws
from recllm.data.loader import Loaders, Stream, plan_steps
from recllm.data.log import Rows
from recllm.lm.adapters import base_name, load_adapter, save_adapter
from recllm.lm.infer import title_scores
from recllm.lm.score import title_logps
from recllm.lm.tasks import Batch, Titles, by_length
from recllm.losses import preference_loss, preference_statistics
from recllm.manifest import digest
from recllm.paths import ADAPTER, FEATURES, RANKING_ADAPTER
from recllm.run import Run, main, say
from recllm.schema import Stage3Config
from recllm.training import AdapterModule, best_scores, device_of, fit, optimizer

VALID_TITLES = 500


class AlignModule(AdapterModule):
    """Softmax-DPO against cached reference log-probabilities; as a control, the chosen title's likelihood."""

    def __init__(self, model: Any, config: Stage3Config, steps: int) -> None:
        """Train the adapter of `model`, the policy."""
        super().__init__(model)
        self.config, self.steps = config, steps

    def training_step(self, batch: Batch, index: int) -> dict[str, Tensor]:
        """One optimizer step; column 0 of the scored titles is the chosen one."""
        self.model.train()
        policy = title_logps(self.model, batch["prompt"], batch["representation"])
        if self.config.loss == "sft":
            return {"loss": -policy[:, 0].mean() * batch["share"]}
        config, reference = self.config, batch["reference"]
        loss = preference_loss(
            config.loss,
            policy,
            reference,
            config.beta,
            lengths=batch["lengths"],
            length_normalize=config.length_normalize,
            sft_weight=config.sft_weight,
            label_smoothing=config.label_smoothing,
        )
        statistics = preference_statistics(policy, reference, config.beta)
        return {"loss": loss.mean() * batch["share"], **statistics}

    def validation_step(self, batch: Batch, index: int) -> None:
        """Log-probabilities of all candidates of the stored validation rows."""
        self.score_titles(batch)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and linear decay, no weight decay."""
        return optimizer(self, self.config.fit, self.steps)


def reference(run: Run, model: Any, task: Titles) -> Tensor:
    """Log-probabilities `[n, C]` of all candidates under the frozen reference, computed once.

    They lie with the stage-2 adapter that they are of, so that every K and loss shares them; the file's name
    holds what they depend on: adapter, LM, rows, candidates and the form of the prompts.
    """
    made_of = [run.manifest(role).identity for role in ("stage2", "lm", "stage1", "log")]
    form = [run.content["config"][section] for section in ("prompt", "wording")]
    name = digest([made_of, form, task.rows.tolist(), task.candidates.tolist()])[:32]
    path = run.parent("stage2") / FEATURES / f"reference-{name}.npy"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npy")
        np.save(temporary, title_scores(model.to(device_of(run.config.trainer)), task))
        temporary.replace(path)
    return torch.from_numpy(np.load(path))


def rejected(task: Titles, indices: Rows, count: int, seed: int) -> NDArray[np.int64]:
    """Places `[B, 1 + count]` of the chosen candidate and `count` rejected ones, by seed and row."""
    order = draws.uniform(seed, task.rows[indices], task.candidates.shape[1])
    # The chosen one comes first, whatever it drew; the others follow in drawn order.
    np.put_along_axis(order, task.chosen[indices][:, None], -1.0, 1)
    return np.argsort(order, axis=1, kind="stable")[:, : 1 + count]


def loaders(run: Run, task: Titles, logps: Tensor, valid: Titles, steps: int) -> Loaders:
    """Batches of rows with their chosen title and K rejected ones, drawn anew in every pass."""
    config = run.config.stage3
    stream = Stream(len(task), config.fit.batch_size, run.config.seed, task.lengths(scored=False))
    negatives = 0 if config.loss == "sft" else config.negatives

    def train(step: int, rank: int, world: int) -> Batch:
        indices = stream.indices(step, rank, world)
        epoch = step * config.fit.batch_size // len(task)
        columns = rejected(task, indices, negatives, draws.derive(run.config.seed, "rejected", str(epoch)))
        batch = task(indices, columns)
        batch["share"] = stream.share(rank, world)
        batch["reference"] = logps[indices].gather(1, torch.from_numpy(columns))
        return batch

    return Loaders(train=train, steps=steps, valid=[by_length(valid)], valid_batch=64)


def work(run: Run) -> None:
    """Train, and keep what is best on validation: an update, or none."""
    config = run.config.stage3
    log = parents.event_log(run)
    retrieval = parents.Retrieval.open(run, log)
    lm = parents.Lm.open(run, log, retrieval)
    start = run.parent("stage2") / RANKING_ADAPTER
    model = load_adapter(lm.model, start, trainable=True)
    gated = model.peft_config["default"].peft_type == "RECLORA"
    crm = parents.Crm.open(run, log, retrieval) if gated else None
    rows = parents.aligned_rows(run.config, log, config.rows)
    fresh = int((~np.isin(rows, parents.subsample(run.config, log))).sum())
    task = lm.titles(rows, parents.mixed_lists(log, rows, run.config.seed), crm)
    valid = lm.valid_titles(VALID_TITLES, crm)
    logps = reference(run, model.eval(), task) if config.loss != "sft" else torch.zeros(task.candidates.shape)
    steps, interval = plan_steps(len(rows), config.fit.batch_size, config.fit.epochs, config.fit.validations)
    say(f"  {len(rows):,} rows ({fresh:,} not seen by stage 2), {steps:,} steps of {config.fit.batch_size}")
    module = AlignModule(model, config, steps)
    trainer = fit(
        run, module, loaders(run, task, logps, valid, steps), config.fit, interval, ["valid/hr@1"], first=True
    )
    if not trainer.is_global_zero:
        return
    scores = best_scores(run, "valid/hr@1", untrained=True)
    gained = scores["step"] > 0
    if gained:
        module.load_best(run, "valid/hr@1")
    else:
        say("  no update is better than stage 2's adapter on validation HR@1; that adapter is kept")
        model = load_adapter(model.unload(), start)
    save_adapter(model, run.folder / ADAPTER, base_name(run.config.lm.model))
    figures = {"steps": steps, "rows": len(rows), "rows_not_in_stage2": fresh, "gained": gained}
    if crm is not None:
        figures["rows_crm_was_trained_on"] = crm.trained_on(log, rows)
    run.finish([run.folder / ADAPTER], {**figures, "k": config.negatives, **scores})


if __name__ == "__main__":
    sys.exit(main(work, sys.argv[1:]))
