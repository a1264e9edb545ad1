"""What all trained stages share: a Lightning trainer that selects, stops early, and resumes to the bit."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from recllm import paths, processes
from recllm.config.schema import TrainerConfig
from recllm.config.stages import FitConfig
from recllm.console import say
from recllm.errors import StageError
from recllm.lm.forwards import is_out_of_memory
from recllm.pipeline.run import Run
from recllm.pipeline.stage_file import Role
from recllm.training.adapter_module import AdapterModule
from recllm.training.adapter_precision import AdapterPrecision
from recllm.training.callbacks import Curves, InStep, Last, SaveAt, StepSeed, Stop, Waiting
from recllm.training.checkpoints import Selected, best, forget_others, repeats, resumable
from recllm.training.launch import backend, start_processes
from recllm.training.loaders import Loaders
from recllm.training.micro_batch_module import MicroBatchModule
from recllm.training.sharding import ShardedStrategy


def strategy(trainer: TrainerConfig) -> str | Strategy:
    """Lightning's strategy; `ddp` gets the process group that its accelerator can use.

    `sharded` is `ddp` where no frozen LM is trained around.
    """
    kinds = {"ddp": DDPStrategy, "sharded": ShardedStrategy}
    if trainer.strategy not in kinds:
        return trainer.strategy
    return kinds[trainer.strategy](process_group_backend=backend(trainer))


def fit(
    run: Run,
    module: lightning.LightningModule,
    loaders: Loaders,
    settings: FitConfig,
    interval: int,
    monitors: list[str],
    first: bool = False,
    callbacks: Sequence[Callback] = (),
    stops_after: int = 0,
) -> lightning.Trainer:
    """Train, or go on where a killed run left off.

    A stage with a chosen one among its parents (`Role.CHOSEN`) trains as far as the best checkpoints of that
    one: nothing is validated, and nothing stops early. "As far" is the same share of the planned steps, so
    that over more rows there are as many passes, under the same schedule of the learning rate.

    Args:
        run: the stage; checkpoints and curves go into its folder.
        module: what trains.
        loaders: its batches.
        settings: precision, clipping, patience.
        interval: steps between validations.
        monitors: scores of which the best checkpoint is kept, higher is better; the first one stops early.
        first: validate before the first step, so that the curve starts with what no training gives.
        callbacks: what else watches the training.
        stops_after: steps up to which nothing stops early.

    Returns:
        The trainer; `best(run, monitor)` is where the checkpoints are. Behind it every process works alone.

    Raises:
        StageError: a step's rows cannot be dealt to devices and parts; memory does not do for a step.
        SystemExit: at SIGTERM, behind at most one micro-batch more, with a checkpoint of all whole steps.
    """
    quiet()
    config = run.config.trainer
    if config.threads:
        torch.set_num_threads(config.threads)
    if settings.batch_size % config.processes:
        raise StageError(
            f"batch_size={settings.batch_size} cannot be dealt to {config.processes} devices; "
            "wanted a multiple"
        )
    check_parts(loaders.step_rows or settings.batch_size, config)
    start_processes(config)
    folder = run.folder / paths.CHECKPOINTS
    last = processes.from_first(lambda: resumable(run, folder))
    steps = loaders.steps
    if repeats(run):
        chosen = run.parents[Role.CHOSEN]
        repeated = Selected.of(chosen, monitors).repeated(steps)
        steps = max(repeated.values())
        ends = " and ".join(f"{step:,} ({monitor})" for monitor, step in repeated.items())
        say(f"ends at step {ends} of {loaders.steps:,}, as far as {chosen.name} was best on validation")
        selections: list[Callback] = [SaveAt({best(run, name): step for name, step in repeated.items()})]
    else:
        selections = _selections(run, settings, monitors, stops_after)
    in_step = InStep()
    watching: list[Callback] = [
        in_step,
        StepSeed(run.config.seed or 0),
        Curves(run.folder / paths.LOGS / "metrics.csv", max(1, loaders.steps // 50), monitors),
        *selections,
        *callbacks,
        Last(
            run,
            config.checkpoint_every,
            loaders.steps + 1 if repeats(run) else interval,
            config.checkpoint_minutes,
        ),
        Waiting(steps),
    ]
    plugins: list[Any] = []
    if settings.precision == "bf16-true" and isinstance(module, AdapterModule):
        plugins.append(AdapterPrecision("bf16-true"))
    trainer = lightning.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=strategy(config),
        precision=None if plugins else settings.precision,
        plugins=plugins,
        max_epochs=1,
        max_steps=steps,
        accumulate_grad_batches=config.accumulate,
        val_check_interval=interval * config.accumulate,  # of batches, which are parts of steps
        limit_val_batches=0 if repeats(run) else None,
        gradient_clip_val=settings.clip or None,
        callbacks=watching,
        logger=_loggers(run),
        deterministic=config.deterministic or None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,  # `recllm.console.Progress` tells how far it is
        enable_model_summary=False,
        use_distributed_sampler=False,
        # Validation before the first step and in training share metric states: no inference tensors.
        inference_mode=False,
        default_root_dir=run.folder,
    )
    if config.recompute and isinstance(module, MicroBatchModule):
        module.recompute()
    torch.manual_seed(run.config.seed or 0)
    try:
        if first and last is None and not repeats(run):
            trainer.validate(module, datamodule=loaders, verbose=False)
        trainer.fit(module, datamodule=loaders, ckpt_path=last, weights_only=True)
    except SIGTERMException as stopped:
        done = f"{trainer.global_step:,} of {steps:,} steps are done"
        say(f"stopped by SIGTERM, {done}; run make again to go on")
        raise SystemExit(128 + signal.SIGTERM) from stopped
    except RuntimeError as error:
        keys = memory_keys(
            loaders.step_rows or settings.batch_size, config, isinstance(module, MicroBatchModule)
        )
        if not (in_step.is_open and keys and is_out_of_memory(error)):
            raise
        raise StageError(
            f"out of memory in step {trainer.global_step + 1}; add ARGS={' or ARGS='.join(keys)}, which "
            "leaves the steps what they are, and run make again: it goes on at the last checkpoint"
        ) from error
    trainer.strategy.barrier()
    processes.leave()
    forget_others(folder)
    return trainer


def _selections(run: Run, settings: FitConfig, monitors: list[str], stops_after: int) -> list[Callback]:
    """What stops early by the first monitor, and keeps the best checkpoint of each."""
    stop = Stop(
        monitors[0],
        after=stops_after,
        mode="max",
        patience=settings.patience,
        min_delta=0.0,
        check_on_train_epoch_end=False,
    )
    kept = [
        ModelCheckpoint(
            dirpath=run.folder / paths.CHECKPOINTS,
            filename=best(run, monitor).stem,
            monitor=monitor,
            mode="max",
            save_top_k=1,
            # Where a validation follows each step, Lightning takes the interval 1 for a whole epoch.
            save_on_train_epoch_end=False,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        for monitor in monitors
    ]
    return [stop, *kept]


def check_parts(rows: int, trainer: TrainerConfig) -> None:
    """Refuse more parts of a step than its rows fill.

    Raises:
        StageError: the most parts that they do.
    """
    if rows < trainer.processes * trainer.accumulate:
        raise StageError(
            f"trainer.accumulate={trainer.accumulate} parts of a step of {rows} rows leave some without any; "
            f"wanted at most {max(1, rows // trainer.processes)}"
        )


def memory_keys(rows: int, trainer: TrainerConfig, recomputes: bool) -> list[str]:
    """Which keys make a step need less memory and leave it what it is.

    Args:
        rows: of a step.
        trainer: how it is computed now.
        recomputes: whether `trainer.recompute` means anything for what trains.
    """
    keys = []
    if rows >= 2 * trainer.accumulate * trainer.processes:
        keys.append(f"trainer.accumulate={2 * trainer.accumulate}")
    if recomputes and not trainer.recompute:
        keys.append("trainer.recompute=true")
    return keys


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
