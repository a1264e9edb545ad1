"""What all trained stages share: a Lightning trainer that selects, stops early, and resumes to the bit."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor
from torchmetrics import MeanMetric

from recllm import paths
from recllm.callbacks import Curves, Last, StepSeed, Stop, broken, rows_of
from recllm.data.loader import Loaders
from recllm.lm.score import candidate_logps
from recllm.lm.shard import ShardedStrategy, shard
from recllm.metrics import ranking_values
from recllm.run import Run, StageError, is_first_process, say
from recllm.schema import FitConfig, TrainerConfig
from recllm.sparse import RowAdamW


class AdapterModule(lightning.LightningModule):
    """A frozen LM with an adapter; its checkpoints hold only what trains: frozen LM weights are in none."""

    def __init__(self, model: Any) -> None:
        """Train the adapter of `model`."""
        super().__init__()
        self.model = model
        self.rows_of_step: list[int] = []
        self.sharded = False
        self.hr, self.ndcg = MeanMetric(), MeanMetric()

    def configure_model(self) -> None:
        """Shard the frozen LM, where the strategy says so."""
        if isinstance(self.trainer.strategy, ShardedStrategy) and not self.sharded:
            say(shard(self, self.model, self.trainer.strategy.root_device))
            self.sharded = True

    def score_candidates(self, batch: dict[str, Any]) -> Tensor:
        """Update and log `valid/hr@1`, `valid/ndcg@10` of a batch of candidates; their scores `[B, C]`."""
        logps = candidate_logps(self.model, batch)
        values = ranking_values(logps.float().cpu().numpy(), batch["chosen"].cpu().numpy())
        for name, metric in (("hr@1", self.hr), ("ndcg@10", self.ndcg)):
            metric.update(torch.from_numpy(values[name]).float())
            self.log(f"valid/{name}", metric, add_dataloader_idx=False)
        return logps

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Stop before a gradient that is no number reaches the weights."""
        if self.trainer.precision == "16-mixed":
            return  # its scaler meets such gradients by design, skips the step and lowers the scale
        grads = [value.grad for value in self.parameters() if value.grad is not None]
        if grads and not torch.stack([grad.isfinite().all() for grad in grads]).all():
            raise StageError(broken("a gradient", self.trainer.global_step, self.rows_of_step))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Remember which rows of the log the step reads."""
        self.rows_of_step = rows_of(batch)

    def load_best(self, run: Run, monitor: str) -> None:
        """Take the adapter weights of the checkpoint with the best score of a monitor."""
        state = torch.load(best(run, monitor), weights_only=True)["state_dict"]
        self.on_load_checkpoint({"state_dict": state})
        self.load_state_dict(state, strict=False)

    @property  # type: ignore[misc]
    def strict_loading(self) -> bool:
        """False: a checkpoint lacks the frozen weights; `on_load_checkpoint` checks the others."""
        return False

    def _trainable(self) -> set[str]:
        return {name for name, value in self.named_parameters() if value.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop what is frozen."""
        names = self._trainable()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not hold exactly what trains."""
        if differing := self._trainable() ^ set(checkpoint["state_dict"]):
            raise StageError(
                f"the checkpoint differs from this model in {min(differing)}; remove the stage's checkpoints "
                "and run make again"
            )


def optimizer(module: torch.nn.Module, fit: FitConfig, steps: int) -> dict[str, Any]:
    """AdamW on everything that trains; the learning rate rises over the warm-up and falls linearly to 0.

    Biases, norms and other vectors get no weight decay. Tables with row-sparse gradients get `RowAdamW`.
    """
    trainable = {name: value for name, value in module.named_parameters() if value.requires_grad}
    vectors = {
        name: value
        for name, value in trainable.items()  # gates of several modules stack theirs into one tensor
        if value.ndim <= 1 or name.rpartition(".")[2].startswith(("bias", "norm"))
    }
    sparse = any(isinstance(part, torch.nn.Embedding) and part.sparse for part in module.modules())
    kind = RowAdamW if sparse else torch.optim.AdamW
    groups = [
        {
            "params": [value for name, value in trainable.items() if name not in vectors],
            "weight_decay": fit.weight_decay,
        },
        {"params": list(vectors.values()), "weight_decay": 0.0},
    ]
    # Under mixed precision Lightning clips gradients only for optimizers that are not fused.
    fused = fit.precision.endswith("true")
    adam = kind([group for group in groups if group["params"]], lr=fit.lr, fused=fused)
    rise = max(1, round(fit.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise)))
    )
    return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def device_of(trainer: TrainerConfig) -> torch.device:
    """Where work outside of training runs: the GPU where training would use one, else the CPU."""
    gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def as_in_training(model: torch.nn.Module, precision: str) -> AbstractContextManager[Any]:
    """A context in which a model computes as Lightning lets it under this precision.

    Weights that train in 16 bits are turned to them at once, as `fit` would.
    """
    kinds = {"bf16": torch.bfloat16, "16": torch.float16}
    bits, _, kind = precision.partition("-")
    if bits not in kinds:
        return nullcontext()
    device = next(model.parameters()).device
    if kind == "true":
        model.to(kinds[bits])
        return nullcontext()
    return torch.autocast(device.type, kinds[bits])


def strategy(trainer: TrainerConfig) -> str | Strategy:
    """Lightning's strategy; `ddp` gets the process group that its accelerator can use.

    `sharded` is `ddp` where no frozen LM is trained around.
    """
    kinds = {"ddp": DDPStrategy, "sharded": ShardedStrategy}
    if trainer.strategy not in kinds:
        return trainer.strategy
    cpu = trainer.accelerator == "cpu" or not torch.cuda.is_available()
    return kinds[trainer.strategy](process_group_backend="gloo" if cpu else None)


def fit(
    run: Run,
    module: lightning.LightningModule,
    loaders: Loaders,
    settings: FitConfig,
    interval: int,
    monitors: list[str],
    first: bool = False,
    callbacks: Sequence[Callback] = (),
) -> lightning.Trainer:
    """Train, or go on where a killed run left off.

    Args:
        run: the stage; checkpoints and curves go into its folder.
        module: what trains.
        loaders: its batches.
        settings: precision, clipping, patience.
        interval: steps between validations.
        monitors: scores of which the best checkpoint is kept, higher is better; the first one stops early.
        first: validate before the first step, so that the curve starts with what no training gives.
        callbacks: what else watches the training.

    Returns:
        The trainer; `best(run, monitor)` is where the checkpoints are.
    """
    quiet()
    config = run.config.trainer
    if config.threads:
        torch.set_num_threads(config.threads)
    if settings.batch_size % config.devices:
        raise StageError(
            f"batch_size={settings.batch_size} cannot be dealt to {config.devices} devices; wanted a multiple"
        )
    folder = run.folder / paths.CHECKPOINTS
    last = _resumable(run, folder)
    selections = [
        ModelCheckpoint(
            dirpath=folder,
            filename=best(run, monitor).stem,
            monitor=monitor,
            mode="max",
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        for monitor in monitors
    ]
    watching: list[Callback] = [
        StepSeed(run.config.seed or 0),
        Curves(run.folder / paths.LOGS / "metrics.csv", max(1, loaders.steps // 50)),
        Stop(monitors[0], mode="max", patience=settings.patience, min_delta=0.0),
        *selections,
        *callbacks,
        Last(run, config.checkpoint_every, interval),
    ]
    trainer = lightning.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        strategy=strategy(config),
        precision=settings.precision,  # type: ignore[arg-type]
        max_epochs=1,
        max_steps=loaders.steps,
        val_check_interval=interval,
        gradient_clip_val=settings.clip or None,
        callbacks=watching,
        logger=_loggers(run),
        deterministic=config.deterministic or None,
        num_sanity_val_steps=0,
        enable_progress_bar=config.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        # Validation before the first step and in training share metric states: no inference tensors.
        inference_mode=False,
        default_root_dir=run.folder,
    )
    if config.recompute and isinstance(module, AdapterModule):
        # Not reentrant: an adapter's gate is shared by all layers, and their inputs need no gradient.
        module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(run.config.seed or 0)
    if first and last is None:
        trainer.validate(module, datamodule=loaders, verbose=False)
    trainer.fit(module, datamodule=loaders, ckpt_path=last, weights_only=True)
    trainer.strategy.barrier()
    return trainer


def _loggers(run: Run) -> list[Any]:
    """Where curves go besides `logs/metrics.csv`."""
    loggers: list[Any] = []
    if run.config.trainer.tensorboard:
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(run.folder, name=paths.LOGS, version=""))
    if run.config.trainer.wandb:
        from lightning.pytorch.loggers import WandbLogger

        # The id is that of what is trained, so that a resumed run goes on in the same curve.
        project = f"recllm-{run.root.name}"
        wandb = WandbLogger(run.name, run.folder, id=run.fingerprint, project=project, resume="allow")
        loggers.append(wandb)
    return loggers


def compiled(module: lightning.LightningModule, batch: Any) -> None:
    """Compiles `module.model` (torch.compile), or says why not and leaves it as it is.

    A compiler shows what it cannot do when it is used, so it is used here: on a batch of training, forward
    and backward, before anything depends on it.

    Args:
        module: what trains; `module.model` is compiled in place, so that names of weights stay.
        batch: a batch of training, on the module's device.
    """
    model: Any = module.model
    model.compile()
    try:
        step: Any = module.training_step(batch, 0)
        step["loss"].backward()
    except Exception as error:  # the compiler raises many types, of its own and of what it calls
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        say(f"not compiled, {type(error).__name__}: {line.strip()[:160]}")
        model._compiled_call_impl = None
    finally:
        module.zero_grad(set_to_none=True)


def best(run: Run, monitor: str) -> Path:
    """The checkpoint with the best score of a monitor: `best-auc.ckpt` for `valid/auc`."""
    return run.folder / paths.CHECKPOINTS / f"best-{monitor.rpartition('/')[2].replace('@', '')}.ckpt"


def best_scores(run: Run, monitor: str, untrained: bool = False) -> dict[str, float]:
    """The row of the curve at which `monitor` was best: step and all validation scores there.

    Args:
        run: the stage.
        monitor: name of the score.
        untrained: whether step 0, of which there is no checkpoint, may be the best.
    """
    with (run.folder / paths.LOGS / "metrics.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get(monitor)]
    rows = [row for row in rows if untrained or int(row["step"])]
    row = max(rows, key=lambda row: float(row[monitor]))
    return {
        name: float(value)
        for name, value in row.items()
        if value and (name == "step" or name.startswith("valid/"))
    }


def _resumable(run: Run, folder: Path) -> Path | None:
    """`last.ckpt` of an interrupted run of the same configuration and parents; others are removed."""
    mark, last = folder / "made-for.json", folder / paths.LAST
    mine = {"fingerprint": run.fingerprint}
    same = mark.exists() and json.loads(mark.read_text()) == mine
    if is_first_process():
        if folder.exists() and not same:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(mine))
    if not (same and last.exists()):
        return None
    step = torch.load(last, weights_only=True, mmap=True)["global_step"]
    say(f"resumes at step {step}")
    return last


def quiet() -> None:
    """Leave out Lightning's hints that do not concern these loaders."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (
        ".*does not have many workers.*",
        ".*Checkpoint directory.*",
        ".*treespec.*",
        ".*litlogger.*",
        ".*in eval mode at the start.*",
    ):
        warnings.filterwarnings("ignore", text)
