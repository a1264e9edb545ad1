"""Stage 3: align a stage-2 adapter to preferences with Softmax-DPO over several rejected candidates.

What is compared is the log-probability of a title (`stage3.task=titles`) or of Yes to an item (`answers`).

The reference is stage 2's adapter with its gate, frozen; its log-probabilities of all candidates are computed
once, so that the rejected titles are drawn anew in every pass at no cost. Selected on validation HR@1, with
no update as a candidate: where nothing is better, stage 2's adapter comes out, and the manifest says so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MeanMetric

from recllm.cache import Hasher
from recllm.config.stages import Stage3Config
from recllm.console import say
from recllm.errors import StageError
from recllm.eventlog import draws
from recllm.eventlog.log import EventLog, Rows
from recllm.eventlog.rejected import draw, usable
from recllm.eventlog.rowsets import aligned_rows, check_ranking_rows, drawn_lists
from recllm.lm.adapters import adapter_folder, adapter_inputs, base_name, load_adapter, save_adapter
from recllm.lm.forwards import rows_for_scoring
from recllm.lm.logprobs import candidate_logps
from recllm.lm.predict import candidate_scores
from recllm.lm.tasks import Batch, NextTitleLists, YesNoCandidates, sort_by_length
from recllm.losses import REFERENCE_FREE, num_rows, preference_loss, preference_statistics
from recllm.paths import ADAPTER, RANKING_ADAPTER
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.reclora import AdapterCard
from recllm.retrieval.stored import Retrieval
from recllm.systems import compatibility
from recllm.systems.crm import Crm
from recllm.systems.lm import Lm
from recllm.training.adapter_module import AdapterModule
from recllm.training.callbacks import WEIGHTS
from recllm.training.checkpoints import best_scores
from recllm.training.fit import fit
from recllm.training.launch import start_processes
from recllm.training.loaders import Loaders, Stream, plan_steps
from recllm.training.micro_batches import token_budget
from recllm.training.optimizer import optimizer
from recllm.training.precision import device_of, training_precision

VALID_LISTS = {"titles": 500, "answers": 150}
"""`stage3.valid_lists` where it is 0."""
BATCH = {"titles": 64, "answers": 8}
"""Rows that are scored together."""
STATISTICS = (
    "reward_chosen",
    "reward_rejected",
    "margin",
    "reward_accuracy",
    "chosen_logp",
    "rejected_logp",
    "kl",
)


CandidateTask = NextTitleLists | YesNoCandidates
"""What is compared: candidates' titles, or Yes to each of them."""


class Compared(NamedTuple):
    """Candidates' log-probabilities under the reference `[n, C]`, and which are compared, bool `[n, C]`."""

    logps: Tensor
    allowed: Tensor


class AlignModule(AdapterModule):
    """A preference loss against cached reference log-probabilities; as a control, the chosen's likelihood."""

    def __init__(self, model: Any, config: Stage3Config, steps: int, valid: Compared) -> None:
        """Train the adapter of `model`, the policy; `valid` is the reference on the validation rows."""
        super().__init__(model)
        self.config, self.steps, self.valid = config, steps, valid
        self.statistics = torch.nn.ModuleDict({name: MeanMetric() for name in STATISTICS})

    def loss(self, batch: Batch) -> dict[str, Any]:
        """The loss of a micro-batch; column 0 of the scored titles is the chosen one."""
        config, present = self.config, batch["prompt"]["present"]
        policy = candidate_logps(self.model, batch)
        if config.loss == "sft":
            losses, statistics = -policy[:, 0], {"chosen_logp": policy[:, 0].detach().mean()}
        else:
            reference = None if config.loss in REFERENCE_FREE else batch["reference"]
            losses = preference_loss(
                config.loss,
                policy,
                reference,
                config.beta,
                present,
                lengths=batch["lengths"],
                length_normalize=config.length_normalize,
                sft_weight=config.sft_weight,
                label_smoothing=config.label_smoothing,
            )
            statistics = preference_statistics(policy, reference, config.beta, present)
        if not (finite := losses.isfinite()).all():
            bad = ", ".join(map(str, batch["row"][~finite].tolist()))
            raise StageError(
                f"the loss of rows {bad} of the log is not finite at step {self.trainer.global_step}; "
                "lower stage3.fit.lr and run make again"
            )
        share = {name: num_rows(name, present) / len(present) for name in statistics}
        weights = {name: share[name] * batch["loss_scale"] for name in statistics}
        return {"loss": losses.mean() * batch["loss_scale"], **statistics, WEIGHTS: weights}

    def validation_step(self, batch: Batch, index: int) -> None:
        """Ranks of the stored validation rows, and how far policy and reference are apart on them."""
        policy = self.score_candidates(batch)
        rows = batch["index"].cpu()
        # The chosen one first, as in training; the order of the others does not matter.
        order = torch.argsort(torch.arange(policy.shape[1]) != batch["chosen"].cpu()[:, None], stable=True)
        columns = [values[rows].gather(1, order).to(policy.device) for values in self.valid]
        policy = policy.gather(1, order.to(policy.device))
        statistics = preference_statistics(policy, columns[0], self.config.beta, columns[1])
        for name, metric in self.statistics.items():
            assert isinstance(metric, MeanMetric)
            metric.update(statistics[name], weight=num_rows(name, columns[1]))
            self.log(f"valid/{name}", metric)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and linear decay."""
        return optimizer(self, self.config.fit, self.steps)


def reference(run: Run, model: Any, task: CandidateTask) -> Compared:
    """Log-probabilities of all candidates under the frozen reference, computed once, and what is compared.

    Every K, loss and draw of negatives shares them. What they are cached by holds all that they depend on:
    adapter, gate, LM, data, every token of every text, rows, candidates, the prompts' form, and the
    precision, which is that of training.
    """
    made_of = [run.parents[role].identity for role in (Role.START, Role.LM, Role.CRM, Role.LOG)]
    pieces = task.prompts.pieces
    config = run.config.stage3
    form = [run.file.config["prompt"], config.task, config.gate, task.lists_candidates, config.fit.precision]
    # Hashed as arrays: the tokens of a large catalog take gigabytes as JSON.
    arrays = Hasher().add("tokens", pieces.table.tokens).add("offsets", pieces.table.offsets)
    arrays.add("rows", task.rows).add("candidates", task.candidates)

    def compute() -> NDArray[Any]:
        model.eval().to(device_of(run.config.trainer))
        with training_precision(model, config.fit.precision):
            return candidate_scores(model, task, BATCH[config.task])

    identity = [made_of, form, task.prompts.max_length, arrays.hexdigest()]
    logps = torch.from_numpy(np.array(run.cache.array("reference", identity, compute)))
    if not (finite := logps.isfinite().all(1)).all():
        rows = ", ".join(map(str, task.rows[~finite.numpy()][:10]))
        raise StageError(
            f"the reference's log-probabilities of rows {rows} of the log are not finite; "
            f"train {run.parents[Role.START].name} anew with a lower learning rate"
        )
    allowed = usable(task.texts, task.chosen)
    np.put_along_axis(allowed, task.chosen[:, None], True, 1)
    return Compared(logps, torch.from_numpy(allowed))


def loaders(
    run: Run,
    task: CandidateTask,
    hard: NDArray[Any] | None,
    logps: Tensor,
    valid: CandidateTask,
    model: Any,
    steps: int,
) -> Loaders:
    """Batches of rows with their chosen candidate and K rejected ones, drawn anew in every pass."""
    config = run.config.stage3
    stream = Stream(len(task), config.fit.batch_size, run.config.seed, task.lengths(scored=False))
    negatives = 0 if config.loss == "sft" else config.negatives
    allowed = usable(task.texts, task.chosen)
    lengths = task.forward_lengths(1 + negatives)
    budget = token_budget(model, run.config.trainer, lengths, config.fit.batch_size)

    def train(step: int, rank: int, world: int) -> list[Batch]:
        indices = stream.indices(step, rank, world)
        passes = stream.passes(step, rank, world)  # a batch may reach over into the next
        parts = stream.micro_batches(step, rank, world, budget.tokens, lengths)
        return [micro_batch(indices[part], passes[part], loss_scale) for part, loss_scale in parts]

    def micro_batch(indices: Rows, passes: Rows, loss_scale: float) -> Batch:
        seeds = [draws.derive(run.config.seed, "rejected", str(number)) for number in passes]
        scores = None if hard is None else hard[indices]
        columns, present = draw(
            task.rows[indices],
            task.chosen[indices],
            allowed[indices],
            negatives,
            np.array(seeds),
            config.negatives_from,
            scores,
        )
        most = present.sum(1).max()
        columns, present = columns[:, :most], present[:, :most]
        batch = task(indices, columns, present)
        batch["loss_scale"] = loss_scale
        batch["reference"] = logps[indices].gather(1, torch.from_numpy(columns))
        return batch

    return Loaders(
        train=train,
        steps=steps,
        valid=[sort_by_length(valid)],
        valid_batch=rows_for_scoring(valid.lengths(), BATCH[config.task], device_of(run.config.trainer).type),
        budget=budget,
    )


def check_negatives(config: Stage3Config, num_candidates: int) -> None:
    """Refuse more rejected titles than a row has other candidates; a loss that rejects none reads no K.

    Args:
        config: of the stage.
        num_candidates: candidates of a row, the chosen one included.

    Raises:
        StageError: what to set.
    """
    others = num_candidates - 1
    if config.loss != "sft" and config.negatives > others:
        raise StageError(
            f"stage3.negatives={config.negatives}, but a row has {others} other candidates; wanted "
            f"stage3.negatives={others} or fewer, or prepare.candidates={config.negatives + 1} or more"
        )


def check_comparable(valid: CandidateTask) -> None:
    """Refuse validation rows that rank nothing: none has a title to choose and another text to reject.

    Raises:
        StageError: what to set.
    """
    has_title = valid.texts[np.arange(len(valid)), valid.chosen] != 0
    if not (has_title & usable(valid.texts, valid.chosen).any(1)).any():
        raise StageError(
            f"none of {len(valid):,} validation rows has a title to choose and another one to reject, so "
            "there is no HR@1 to select by; wanted titles of more items, or more prepare.ranking_valid_rows"
        )


def answerable(task: CandidateTask) -> CandidateTask:
    """The task without rows that teach nothing: no title is chosen, or no other text is there to reject."""
    texts, place = task.texts, np.arange(len(task))
    untitled = texts[place, task.chosen] == 0
    alone = ~untitled & ~usable(texts, task.chosen).any(1)
    if untitled.any() or alone.any():
        say(
            f"{untitled.sum():,} rows left out whose chosen item has no title, "
            f"{alone.sum():,} without any other title to reject"
        )
    remaining = task.keep(~(untitled | alone))
    if not len(remaining):
        raise StageError(
            f"none of {len(task):,} rows has a title to choose and one to reject; see `wording.item`"
        )
    return remaining


def open_tasks(run: Run, lm: Lm, crm: Crm | None, rows: Rows) -> tuple[CandidateTask, CandidateTask]:
    """What is compared on training rows that teach something, and on validation rows."""
    config = run.config.stage3
    lists = drawn_lists(lm.log, rows, run.config.seed, config.lists)
    count = config.valid_lists or VALID_LISTS[config.task]
    retrieved = compatibility.retrieves(run.parents[Role.START])
    if config.task == "titles":
        each = config.gate == "item"
        return answerable(lm.titles(rows, lists, crm, each)), lm.valid_titles(count, crm, each)
    task = answerable(lm.verdicts(rows, lists, crm, retrieved))
    return task, lm.valid_verdicts(count, crm, retrieved)


def work(run: Run) -> None:
    """Train, and keep what is best on validation: an update, or none."""
    config = run.config.stage3
    compatibility.check_same_prompts(run.parents[Role.START], run.config)
    log = EventLog.open(run.parents[Role.LOG].folder)
    check_negatives(config, log.meta["candidates"])
    check_ranking_rows(log)
    retrieval = Retrieval.open(run.parents[Role.NEIGHBORS].folder, log)
    start = adapter_folder(
        run.parents[Role.START].folder, RANKING_ADAPTER if config.task == "titles" else ADAPTER
    )
    gate_input, num_virtual = adapter_inputs(start)
    if config.gate == "item" and gate_input in (None, "user"):
        raise StageError(
            f"stage3.gate=item from {run.parents[Role.START].name}, which reads nothing of an item; wanted "
            "stage3.gate=list, or a start whose gate reads the target (stage3.start=reclora)"
        )
    if num_virtual and config.gate == "item":
        raise StageError(
            f"stage3.gate=item with a soft prompt of {num_virtual} tokens, which a title cannot have of its "
            "own; wanted stage3.gate=list, or a start without one (stage2.adapter.soft_prompt=0)"
        )
    lm = Lm.open(run.config, run.parents[Role.LM], log, retrieval, num_virtual)
    model = load_adapter(lm.model, start, trainable=True)
    gate = Crm.open(run.parents[Role.CRM], log, retrieval, run.cache)
    crm = gate.read_as(gate_input, run.config.seed)
    start_processes(run.config.trainer)
    tuned = log.rows("train", run.parents[Role.START].config.subsample)
    task, valid = open_tasks(run, lm, crm, aligned_rows(log, tuned, config.rows))
    check_comparable(valid)
    rows = task.rows
    fresh = int((~np.isin(rows, tuned)).sum())
    hard = None
    logps = torch.zeros(task.candidates.shape)
    if config.negatives_from in ("reference", "half") or config.loss not in (*REFERENCE_FREE, "sft"):
        logps = reference(run, model, task).logps
    if config.negatives_from != "random":
        hard = gate.logits(rows, task.candidates) if config.negatives_from == "crm" else logps.numpy()
    steps, interval = plan_steps(len(rows), config.fit.batch_size, config.fit.epochs, config.fit.validations)
    say(f"{len(rows):,} rows ({fresh:,} not seen by stage 2), {steps:,} steps of {config.fit.batch_size}")
    module = AlignModule(model, config, steps, reference(run, model, valid))
    batches = loaders(run, task, hard, logps, valid, model, steps)
    trainer = fit(run, module, batches, config.fit, interval, ["valid/hr@1"], first=True)
    if not trainer.is_global_zero:
        return
    scores = best_scores(run, "valid/hr@1", untrained=True)
    gained = scores["step"] > 0
    if gained:
        module.load_best(run, "valid/hr@1")
    else:
        say("no update is better than stage 2's adapter on validation HR@1; that adapter is kept")
        model = load_adapter(model.unload(), start)
    card = AdapterCard(
        base=base_name(run.config.lm.model),
        data=f"{run.config.dataset.name}: {len(rows):,} liked training samples, {config.task} compared",
        metrics=scores,
        license=run.parents[Role.START].config.stage2.license,
        title=f"{run.name.partition('/')[2]}: LoRA of a recommender on {run.config.dataset.name}",
    )
    save_adapter(model, run.folder / ADAPTER, card)
    figures = {"steps": steps, "rows": len(rows), "rows_not_in_stage2": fresh, "gained": gained}
    figures["cut_prompts"] = task.count_cut()
    if crm is not None:
        figures["rows_crm_was_trained_on"] = crm.trained_on(log, rows)
    run.finish([run.folder / ADAPTER], {**figures, "k": config.negatives, **scores})
