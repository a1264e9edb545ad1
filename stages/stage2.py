"""Stage 2: tune the frozen LM with a LoRA, plain or personalized by the frozen CRM, on the subsample.

Two tasks in every batch: Yes/No on the row's own item, and (a share of the rows) the title of the next liked
item. Checkpoints are selected on validation AUC of the Yes/No score (`adapter/`) and, where titles are
learned, for stage 3 on their HR@1 (`adapter-ranking/`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC

from recllm.config.stages import Stage2Config
from recllm.console import say
from recllm.errors import StageError
from recllm.evaluation.gates import ENTROPY, GateRecord, asked_rows, entropy
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.rowsets import drawn_lists, has_ranking_rows, selection_rows, with_new_items
from recllm.lm import adalora
from recllm.lm.adapters import add_adapter, base_name, save_adapter
from recllm.lm.forwards import rows_for_scoring
from recllm.lm.logprobs import answer_logits, answer_loss, answer_score, title_logps
from recllm.lm.tasks import Batch, NextTitleLists, YesNoPrompts, sort_by_length
from recllm.metrics import auc
from recllm.paths import ADAPTER, GATE, RANKING_ADAPTER, SINGULAR_VECTORS
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.reclora import AdapterCard
from recllm.reclora.layer import RecLoraLinear
from recllm.retrieval.stored import Retrieval
from recllm.systems.crm import Crm
from recllm.systems.lm import Lm
from recllm.systems.lm_systems import untuned_states
from recllm.training.adapter_module import AdapterModule
from recllm.training.callbacks import WEIGHTS, at_once_at_sigterm
from recllm.training.checkpoints import best_scores, repeats
from recllm.training.fit import fit
from recllm.training.gate_first import check_logits, train_gate
from recllm.training.launch import start_processes
from recllm.training.loaders import Loaders, Stream, plan_steps
from recllm.training.micro_batches import token_budget
from recllm.training.optimizer import optimizer
from recllm.training.precision import device_of

VALID_BATCH = 128
"""Most rows of a forward of validation."""


class TuneModule(AdapterModule):
    """Cross-entropy of the answer over the vocabulary, plus weighted negative log-likelihood of titles."""

    def __init__(
        self, model: Any, answers: tuple[int, int], run: Run, steps: int, tuning_prompts: YesNoPrompts
    ) -> None:
        """Train the adapter of `model` on `tuning_prompts`; `answers`: token ids of yes and no."""
        super().__init__(model)
        self.answers, self.config, self.steps = answers, run.config.stage2, steps
        self.tuning_prompts = tuning_prompts
        self.run = run
        self.auc, self.entropy = BinaryAUROC(), MeanMetric()
        self.adalora = adalora.is_adalora(model)

    def on_fit_start(self) -> None:
        """The gate first, where training starts anew."""
        passes = self.config.gate_first
        if passes and self.config.adapter.gated and self.trainer.ckpt_path is None:
            with at_once_at_sigterm(), self.trainer.precision_plugin.forward_context():
                states, seed = untuned_states(self.run, self.tuning_prompts, self.model), self.run.config.seed
                loss = train_gate(
                    self.model, states, self.tuning_prompts, self.answers, passes, self.config.fit, seed
                )
            say(f"gate and LM head, {passes:g} passes alone: train/loss {loss:.4f}")

    def loss(self, batch: dict[str, Batch]) -> dict[str, Any]:
        """The loss of a micro-batch of answers, of titles, or of both; each is a mean over rows."""
        parts: dict[str, Tensor] = {}
        weights = {}
        losses = []
        if "answers" in batch:
            prompts = batch["answers"]
            logits = answer_logits(self.model, prompts["prompt"], prompts["representation"])
            parts["answer"] = answer_loss(logits, prompts["label"], *self.answers)
            weights["answer"] = prompts["loss_scale"]
            losses.append(parts["answer"] * prompts["loss_scale"])
        if "titles" in batch:
            titles = batch["titles"]
            parts["title"] = -title_logps(self.model, titles["prompt"], titles["representation"]).mean()
            weights["title"] = titles["loss_scale"]
            losses.append(self.config.title_weight * parts["title"] * titles["loss_scale"])
        if self.adalora and batch["is_last"]:
            losses.append(adalora.penalty(self.model))
        figures = {name: value.detach() for name, value in parts.items()}
        return {"loss": functools.reduce(torch.add, losses), **figures, WEIGHTS: weights}

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """AdaLoRA prunes after the optimizer's step, and before anything saves the weights."""
        super().optimizer_step(*arguments, **options)
        if self.adalora:
            adalora.allocate(self.model, self.global_step + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside the weights that train, AdaLoRA's allocation."""
        super().on_save_checkpoint(checkpoint)
        if self.adalora:
            checkpoint["adalora"] = adalora.state(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again; the best weights alone, which the end loads, come without."""
        super().on_load_checkpoint(checkpoint)
        if "adalora" in checkpoint:
            adalora.load_state(self.model, checkpoint["adalora"])

    def validation_step(self, batch: Batch, index: int, dataloader_idx: int = 0) -> None:
        """Loader 0: Yes/No scores; loader 1: log-probabilities of candidates."""
        if dataloader_idx == 0:
            logits = answer_logits(self.model, batch["prompt"], batch["representation"])
            self.auc.update(answer_score(logits, *self.answers), batch["label"].long())
            self.log("valid/auc", self.auc, add_dataloader_idx=False)
            if self.config.adapter.mixes:
                self.entropy.update(torch.from_numpy(entropy(alpha_of(self.model, batch["representation"]))))
                self.log(ENTROPY, self.entropy, add_dataloader_idx=False)
        else:
            self.score_candidates(batch)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and linear decay."""
        return optimizer(self, self.config.fit, self.steps)


@dataclass(frozen=True)
class Data:
    """The tasks of this stage; None where no titles are learned, or no validation rows are ranked."""

    train: YesNoPrompts
    train_titles: NextTitleLists | None
    valid: YesNoPrompts
    valid_titles: NextTitleLists | None


def rows_of_step(run: Run) -> tuple[int, int]:
    """Rows of a step that ask Yes/No and that ask for a title: `batch_size` together.

    Raises:
        StageError: where a process, or a part of a step, would get none of a kind.
    """
    config, trainer = run.config.stage2, run.config.trainer
    parts = trainer.processes * trainer.accumulate
    num_titles = round(config.title_share * config.fit.batch_size)
    num_answers = config.fit.batch_size - num_titles
    if num_answers < parts or 0 < num_titles < parts:
        raise StageError(
            f"stage2.fit.batch_size={config.fit.batch_size} and stage2.title_share={config.title_share} make "
            f"{num_answers} answers and {num_titles} titles a step for {trainer.processes} devices in "
            f"{trainer.accumulate} parts (trainer.accumulate); wanted some of each for all"
        )
    return num_answers, num_titles


def open_data(run: Run, lm: Lm, crm: Crm | None, num_titles: int, valid: Rows) -> Data:
    """Rows of the subsample and `valid` ones, with all representations that they need."""
    rows = lm.log.rows("train", run.config.subsample)
    liked = rows[lm.log.label[rows] == 1]
    retrieved = run.config.prompt.retrieved
    titles = None
    valid_titles = None
    if num_titles:
        liked = with_new_items(lm.log, liked, lm.log.meta["candidates"] - 1, "prepare.candidates")
        titles = lm.titles(liked, drawn_lists(lm.log, liked, run.config.seed), crm)
        if has_ranking_rows(lm.log):
            valid_titles = lm.valid_titles(run.config.stage2.valid_lists, crm)
    return Data(
        train=lm.answers(rows, crm, retrieved, run.config.stage2.mixed_prompts),
        train_titles=titles,
        valid=lm.answers(valid, crm, retrieved),
        valid_titles=valid_titles,
    )


def with_end(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Micro-batches of a step, of which each knows whether it is the last."""
    return [batch | {"is_last": place == len(batches) - 1} for place, batch in enumerate(batches)]


def loaders(run: Run, data: Data, model: Any, steps: int) -> Loaders:
    """Micro-batches of both tasks, in the shares of a step, as large as memory allows for `model`."""
    rows_a_step, num_titles = rows_of_step(run)
    lengths = data.train.lengths()
    answer_stream = Stream(len(data.train), rows_a_step, run.config.seed, lengths)
    title_stream = None
    title_lengths = lengths[:0]
    if data.train_titles is not None:
        title_lengths = data.train_titles.lengths(scored=False)
        title_stream = Stream(len(data.train_titles), num_titles, run.config.seed + 1, title_lengths)
        title_lengths = data.train_titles.forward_lengths(1)
    budget = token_budget(model, run.config.trainer, np.concatenate([lengths, title_lengths]), rows_a_step)

    def train(step: int, rank: int, world: int) -> list[dict[str, Any]]:
        indices = answer_stream.indices(step, rank, world)
        answers = []
        for part, loss_scale in answer_stream.micro_batches(step, rank, world, budget.tokens, lengths):
            answers.append({"answers": data.train(indices[part]) | {"loss_scale": loss_scale}})
        if title_stream is None or data.train_titles is None:
            return with_end(answers)
        indices = title_stream.indices(step, rank, world)
        titles = []
        for part, loss_scale in title_stream.micro_batches(step, rank, world, budget.tokens, title_lengths):
            chosen = indices[part]
            batch = data.train_titles(chosen, data.train_titles.chosen[chosen][:, None])
            titles.append({"titles": batch | {"loss_scale": loss_scale}})
        if len(answers) == len(titles) == 1:  # one forward of each fits, so that both share a backward pass
            return with_end([answers[0] | titles[0]])
        return with_end([*answers, *titles])

    valid = [task for task in (data.valid, data.valid_titles) if task is not None]
    valid_lengths = np.concatenate([task.lengths() for task in valid])
    return Loaders(
        train=train,
        steps=steps,
        valid=[sort_by_length(task) for task in valid],
        valid_batch=rows_for_scoring(valid_lengths, VALID_BATCH, device_of(run.config.trainer).type),
        budget=budget,
    )


def check_out_of_fold(run: Run, log: EventLog, gate: Crm) -> None:
    """Refuse an out-of-fold gate whose CRM was trained on tuning rows after all.

    Raises:
        StageError: how many it has seen.
    """
    rows = log.rows("train", run.config.subsample)
    if run.config.stage2.representation == "out_of_fold" and (seen := gate.trained_on(log, rows)):
        raise StageError(
            f"the gate's CRM was trained on {seen:,} of {len(rows):,} tuning rows "
            f"(stage1.hold_out={gate.made_by.config.stage1.hold_out}); wanted none of them: "
            f"leave stage1.hold_out away, or add ARGS=stage1.hold_out={run.config.subsample}"
        )


def check_head(model: Any, config: Stage2Config) -> None:
    """Refuse `gate_first` where the LM head, which it trains, has no meta-LoRAs, or does not give the logits.

    Raises:
        StageError: what is targeted, or what the LM is, and what is wanted.
    """
    if not config.gate_first or not config.adapter.gated:
        return
    if not isinstance(model.get_output_embeddings(), RecLoraLinear):
        raise StageError(
            f"stage2.gate_first={config.gate_first:g} trains gate and LM head, and the head is none of "
            f"stage2.adapter.target_modules={config.adapter.target_modules}; wanted it there, or gate_first=0"
        )
    check_logits(model, config.gate_first)


def save_best(run: Run, module: TuneModule, adapters: dict[str, Path], rows: int) -> None:
    """Save the best adapter of each monitor; the model ends as the one that is selected on AUC."""
    for monitor, folder in reversed(adapters.items()):
        module.load_best(run, monitor)
        card = AdapterCard(
            base=base_name(run.config.lm.model),
            data=f"{run.config.dataset.name}: {rows:,} training samples, Yes/No and next titles",
            metrics=best_scores(run, monitor),
            license=run.config.stage2.license,
            title=f"{run.name.partition('/')[2]}: LoRA of a recommender on {run.config.dataset.name}",
        )
        save_adapter(module.model, folder, card)


def record_gate(run: Run, model: Any, crm: Crm, log: EventLog) -> dict[str, float]:
    """Keep alpha of validation rows in `gate.npz`, for the report; returns how far it is from uniform."""
    rows = asked_rows(log)
    record = GateRecord(rows, alpha_of(model, crm.representations(rows)))
    record.save(run.folder / GATE)
    return record.summary()


def work(run: Run) -> None:
    """Train, keep the best adapter of each selection."""
    config, (rows_a_step, num_titles) = run.config.stage2, rows_of_step(run)
    log = EventLog.open(run.parents[Role.LOG].folder)
    valid = selection_rows(log, config.fit.valid_rows, "stage2.fit.valid_rows")
    retrieval = Retrieval.open(run.parents[Role.NEIGHBORS].folder, log)
    lm = Lm.open(run.config, run.parents[Role.LM], log, retrieval, config.adapter.soft_prompt)
    gate = Crm.open(run.parents[Role.CRM], log, retrieval, run.cache)
    check_out_of_fold(run, log, gate)
    start_processes(run.config.trainer)
    crm = gate.read_as(config.adapter.representation_kind, run.config.seed)
    data = open_data(run, lm, crm, num_titles, valid)
    steps, interval = plan_steps(len(data.train), rows_a_step, config.fit.epochs, config.fit.validations)
    model = add_adapter(
        lm.model,
        config.adapter,
        data.train.representation,
        run.config.seed,
        steps,
        run.cache.folder / SINGULAR_VECTORS,
    )
    check_head(model, config)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    say(
        f"{len(data.train):,} rows, {steps:,} steps of {rows_a_step} + {num_titles} titles, "
        f"{trained:,} weights train"
    )
    pieces = lm.prompts.pieces
    module = TuneModule(model, (pieces.yes_id, pieces.no_id), run, steps, data.train)
    adapters = {"valid/auc": run.folder / ADAPTER}
    if data.valid_titles is None:
        why = "no validation rows are ranked" if num_titles else "no titles are learned"
        say(f"{why}: one adapter is kept, the best on Yes/No")
    else:
        adapters["valid/hr@1"] = run.folder / RANKING_ADAPTER
    batches = loaders(run, data, model, steps)
    trainer = fit(run, module, batches, config.fit, interval, list(adapters), first=True)
    if not trainer.is_global_zero:
        return
    rows = np.unique(data.train.rows)
    save_best(run, module, adapters, len(rows))
    metrics: dict[str, Any] = {
        "steps": steps,
        "rows": len(rows),
        "prompts": len(data.train),
        "rows_crm_was_trained_on": gate.trained_on(log, rows),
        "trainable": trained,
        "tokens": int(data.train.lengths().mean() * rows_a_step * trainer.global_step),
        "cut_prompts": data.train.count_cut(),
        "cut_title_prompts": 0 if data.train_titles is None else data.train_titles.count_cut(),
        **best_scores(run, "valid/auc"),
    }
    if not repeats(run):  # else these rows train, too
        metrics["crm_auc_on_valid"] = auc(gate.logits(data.valid.rows), log.label[data.valid.rows])
    if log.label[rows].min() != log.label[rows].max():  # a small subsample may have one label only
        metrics["crm_auc_on_these_rows"] = auc(gate.logits(rows), log.label[rows])
    if data.valid_titles is not None:
        metrics["ranking"] = best_scores(run, "valid/hr@1")
    outputs = list(adapters.values())
    if crm is not None and config.adapter.mixes:
        metrics["gate"] = record_gate(run, model, crm, log)
        outputs.append(run.folder / GATE)
    run.finish(outputs, metrics)


@torch.no_grad()
def alpha_of(model: Any, representation: Tensor) -> NDArray[np.float32]:
    """Mixing weights `[n, G, N_m]` of representations `[n, d_c]`: one gate for all modules, or one each."""
    alpha: Tensor = model.base_model.alpha(representation)
    return (alpha if alpha.dim() == 3 else alpha[:, None]).float().cpu().numpy()
