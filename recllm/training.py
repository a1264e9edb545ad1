"""What all trained stages share: a Lightning trainer that selects, stops early, and resumes to the bit."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torchmetrics import MeanMetric

from recllm import paths
from recllm.data.loader import Loaders
from recllm.lm.score import title_logps
from recllm.metrics import ranking_values
from recllm.run import Run, StageError, is_first_process, say
from recllm.schema import FitConfig, TrainerConfig


class StepSeed(Callback):
    """Seeds torch before every step from (seed, step, rank).

    So the random state at a step does not depend on how often the run was interrupted, and a checkpoint needs
    no generator state.
    """

    def __init__(self, seed: int) -> None:
        """Take the run's seed."""
        self.seed = seed

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Seed."""
        torch.manual_seed((self.seed * 1_000_003 + trainer.global_step) * 1_009 + trainer.global_rank)


class Curves(Callback):
    """Keeps training loss and validation scores by step, and writes them to `logs/metrics.csv`.

    The rows travel in the checkpoint, so that a resumed run writes the curve of the whole run
    (Lightning's CSVLogger starts an empty file).
    """

    def __init__(self, path: Path, every: int) -> None:
        """Write to `path`; a row of training loss every `every` steps."""
        self.path, self.every = path, every
        self.rows: list[dict[str, float]] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        self._clock = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        sums = {name: float(value) for name, value in self._sums.items()}
        return {"rows": self.rows, "sums": sums, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the rows of the interrupted run."""
        self.rows, self._count = state["rows"], state["count"]
        self._sums = {name: torch.tensor(value) for name, value in state["sums"].items()}

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        """Sum what the step returned."""
        for name, value in outputs.items():
            if not torch.isfinite(value).all():
                raise StageError(
                    f"train/{name} is {float(value)} at step {trainer.global_step}; lower the learning rate "
                    "and run make again"
                )
            self._sums[name] = self._sums.get(name, torch.zeros(())) + value.detach().float().cpu()
        self._count += 1
        if trainer.global_step % self.every == 0:
            self._flush(trainer)

    def _flush(self, trainer: lightning.Trainer, **scores: float) -> None:
        losses = {
            f"train/{name}": float(value) / self._count for name, value in self._sums.items() if self._count
        }
        if not self.rows or self.rows[-1]["step"] != trainer.global_step:
            self.rows.append({"step": trainer.global_step})
        self.rows[-1] |= {**losses, **scores}
        self._sums, self._count = {}, 0

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Add the scores, print them, write the file."""
        scores = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("valid/")
        }
        self._flush(trainer, **scores)
        losses = {name: value for name, value in self.rows[-1].items() if name.startswith("train/loss")}
        text = "  ".join(f"{name} {value:.4f}" for name, value in {**losses, **scores}.items())
        say(f"  step {trainer.global_step:>5}  {text}  ({time.monotonic() - self._clock:.0f} s)")
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            names = list(dict.fromkeys(name for row in self.rows for name in row))
            with self.path.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, names)
                writer.writeheader()
                writer.writerows(self.rows)


class Last(Checkpoint):
    """Writes `last.ckpt` every so many steps and after every validation; from it a killed run resumes."""

    def __init__(self, run: Run, every: int, interval: int) -> None:
        """Write every `every` steps; `interval` steps lie between validations."""
        self.run, self.every, self.interval = run, every, interval
        self.path = run.folder / paths.CHECKPOINTS / paths.LAST

    def _save(self, trainer: lightning.Trainer) -> None:
        # Lightning writes elsewhere and moves; between file systems that is a copy: a kill leaves a part.
        partial = self.path.with_name(f"{self.path.name}.partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            partial.replace(self.path)
            self.run.tick()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save between validations; at a validation's step it is saved after the validation."""
        step = trainer.global_step
        if step % self.every == 0 and step % self.interval:
            self._save(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save after the selection and the early stopping have taken the new score."""
        if trainer.state.fn == "fit":
            self._save(trainer)


class Stop(EarlyStopping):
    """Early stopping that a resumed run remembers, also if it was killed right after the last validation."""

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        """Stop at once where the interrupted run had already decided to."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class AdapterModule(lightning.LightningModule):
    """A frozen LM with an adapter; its checkpoints hold only what trains: frozen LM weights are in none."""

    def __init__(self, model: Any) -> None:
        """Train the adapter of `model`."""
        super().__init__()
        self.model = model
        self.hr, self.ndcg = MeanMetric(), MeanMetric()

    def score_titles(self, batch: dict[str, Any]) -> None:
        """Update and log `valid/hr@1` and `valid/ndcg@10` with a batch of the next-title task."""
        logps = title_logps(self.model, batch["prompt"], batch["representation"])
        values = ranking_values(logps.float().cpu().numpy(), batch["chosen"].cpu().numpy())
        for name, metric in (("hr@1", self.hr), ("ndcg@10", self.ndcg)):
            metric.update(torch.from_numpy(values[name]).float())
            self.log(f"valid/{name}", metric, add_dataloader_idx=False)

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

    Biases, norms and other vectors get no weight decay.
    """
    trainable = [value for value in module.parameters() if value.requires_grad]
    groups = [
        {"params": [value for value in trainable if value.ndim > 1], "weight_decay": fit.weight_decay},
        {"params": [value for value in trainable if value.ndim <= 1], "weight_decay": 0.0},
    ]
    # Under mixed precision Lightning clips gradients only for optimizers that are not fused.
    fused = fit.precision.endswith("true")
    adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=fit.lr, fused=fused)
    rise = max(1, round(fit.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise)))
    )
    return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def device_of(trainer: TrainerConfig) -> torch.device:
    """Where work outside of training runs: the GPU where training would use one, else the CPU."""
    gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def strategy(trainer: TrainerConfig) -> str | Strategy:
    """Lightning's strategy; `ddp` gets the process group that its accelerator can use."""
    if trainer.strategy == "ddp" and (trainer.accelerator == "cpu" or not torch.cuda.is_available()):
        return DDPStrategy(process_group_backend="gloo")
    return trainer.strategy


def fit(
    run: Run,
    module: lightning.LightningModule,
    loaders: Loaders,
    settings: FitConfig,
    interval: int,
    monitors: list[str],
    first: bool = False,
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
    callbacks: list[Callback] = [
        StepSeed(run.config.seed or 0),
        Curves(run.folder / paths.LOGS / "metrics.csv", max(1, loaders.steps // 50)),
        Stop(monitors[0], mode="max", patience=settings.patience, min_delta=0.0),
        *selections,
        Last(run, config.checkpoint_every, interval),
    ]
    logger: Any = False
    if config.tensorboard:
        from lightning.pytorch.loggers import TensorBoardLogger

        logger = TensorBoardLogger(run.folder, name=paths.LOGS, version="")
    trainer = lightning.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        strategy=strategy(config),
        precision=settings.precision,  # type: ignore[arg-type]
        max_epochs=1,
        max_steps=loaders.steps,
        val_check_interval=interval,
        gradient_clip_val=settings.clip or None,
        callbacks=callbacks,
        logger=logger,
        num_sanity_val_steps=0,
        enable_progress_bar=config.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        # Validation before the first step and in training share metric states: no inference tensors.
        inference_mode=False,
        default_root_dir=run.folder,
    )
    torch.manual_seed(run.config.seed or 0)
    if first and last is None:
        trainer.validate(module, datamodule=loaders, verbose=False)
    trainer.fit(module, datamodule=loaders, ckpt_path=last, weights_only=True)
    trainer.strategy.barrier()
    return trainer


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
    say(f"[{run.name}] resumes at step {step}")
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
