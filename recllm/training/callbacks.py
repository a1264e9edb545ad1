"""What a training does besides its steps: seeds, curves, checkpoints to resume from, early stopping."""

from __future__ import annotations

import csv
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from lightning.pytorch.utilities.exceptions import SIGTERMException

from recllm import paths
from recllm.console import Progress, say
from recllm.errors import StageError
from recllm.files import publish
from recllm.pipeline.run import Run

FILE_ONLY = ("reward_chosen", "reward_rejected", "reward_accuracy", "margin", "rejected_logp", "gate_entropy")
"""Validation figures that the curves' file and the report show, and the terminal does not."""


WEIGHTS = "weights"
"""What a training step says of its other figures beside the loss: name -> how many of a part's rows they are
means over, against the mean over the parts of a step. 1 for those that it does not name."""


class NotFinite(StageError):
    """A loss that is no number any more."""


def part_of(trainer: lightning.Trainer, batch_index: int) -> int:
    """Which part of its step a batch is."""
    return batch_index % trainer.accumulate_grad_batches


def ends_step(trainer: lightning.Trainer, batch_index: int) -> bool:
    """Whether a batch is the last part of its step, behind which the optimizer steps."""
    return part_of(trainer, batch_index) == trainer.accumulate_grad_batches - 1


@contextmanager
def at_once_at_sigterm() -> Iterator[None]:
    """Within it SIGTERM ends the process at once, as outside of a training: there is nothing to keep yet."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StepSeed(Callback):
    """Seeds torch before every part of a step from (seed, step, rank), ranks as `StepLoader` counts them.

    So the random state at a step does not depend on how often the run was interrupted, and a checkpoint needs
    no generator state.
    """

    def __init__(self, seed: int) -> None:
        """Take the run's seed."""
        self.seed = seed

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, index: int) -> None:
        """Seed."""
        rank = part_of(trainer, index) * trainer.world_size + trainer.global_rank
        torch.manual_seed((self.seed * 1_000_003 + trainer.global_step) * 1_009 + rank)


class Curves(Callback):
    """Keeps training loss and validation scores by step, and writes them to `logs/metrics.csv`.

    The rows travel in the checkpoint, so that a resumed run writes the curve of the whole run
    (Lightning's CSVLogger starts an empty file).
    """

    def __init__(self, path: Path, every: int, monitors: Sequence[str] = ()) -> None:
        """Write to `path`; a row of training loss every `every` steps; `monitors` must be finite."""
        self.path, self.every, self.monitors = path, every, monitors
        self.rows: list[dict[str, float]] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, float] = {}
        self._at_step: tuple[dict[str, torch.Tensor], dict[str, float]] = (
            {},
            {},
        )  # without an open step's parts
        self._clock = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, and the sums of the steps behind the last one."""
        sums, counts = self._at_step
        return {"rows": self.rows, "sums": {k: float(value) for k, value in sums.items()}, "counts": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the rows of the interrupted run."""
        self.rows = state["rows"]
        self._sums = {name: torch.tensor(value) for name, value in state["sums"].items()}
        # Checkpoints of earlier versions have one count for all.
        self._counts = state["counts"] if "counts" in state else dict.fromkeys(self._sums, state["count"])
        self._keep_step()

    def _keep_step(self) -> None:
        self._at_step = dict(self._sums), dict(self._counts)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Sum what the step, or a part of it, returned."""
        weights = outputs.get(WEIGHTS, {})
        is_end = ends_step(trainer, index)
        for name, value in outputs.items():
            if name == WEIGHTS:
                continue
            if not torch.isfinite(value).all():
                step = trainer.global_step + (0 if is_end else 1)
                raise NotFinite(broken(f"train/{name}", step, rows_of(batch), float(value)))
            weight = float(weights.get(name, 1))
            count = weight
            if name == "loss":  # Lightning has divided it by the number of parts
                count = weight / trainer.accumulate_grad_batches
            self._sums[name] = self._sums.get(name, torch.zeros(())) + value.detach().float().cpu() * weight
            self._counts[name] = self._counts.get(name, 0) + count
        if is_end and trainer.global_step % self.every == 0:
            self._flush(trainer)
        elif is_end:
            self._keep_step()

    def _flush(self, trainer: lightning.Trainer, **scores: float) -> None:
        losses = {
            f"train/{name}": float(value) / self._counts[name]
            for name, value in self._sums.items()
            if self._counts[name]
        }
        for logger in trainer.loggers:  # the scores are logged by who measures them
            logger.log_metrics(losses, trainer.global_step)
        if not self.rows or self.rows[-1]["step"] != trainer.global_step:
            self.rows.append({"step": trainer.global_step})
        self.rows[-1] |= {**losses, **scores}
        self._sums = {}
        self._counts = {}
        self._keep_step()

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Add the scores, print them, write the file.

        Raises:
            NotFinite: a score that selects is none. Nothing has been selected or stopped by it yet.
        """
        scores = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("valid/")
        }
        for name in self.monitors:
            if name in scores and not math.isfinite(scores[name]):
                raise NotFinite(broken(name, trainer.global_step, [], scores[name]))
        self._flush(trainer, **scores)
        self._show(trainer, scores)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """What a training without validations ends with."""
        if trainer.limit_val_batches == 0:
            self._flush(trainer)
            self._show(trainer, {})

    def _show(self, trainer: lightning.Trainer, scores: dict[str, float]) -> None:
        losses = {name: value for name, value in self.rows[-1].items() if name.startswith("train/loss")}
        printed = {name: value for name, value in scores.items() if not name.endswith(FILE_ONLY)}
        text = "  ".join(f"{name} {value:.4f}" for name, value in {**losses, **printed}.items())
        say(f"step {trainer.global_step:>5}  {text}  ({time.monotonic() - self._clock:.0f} s)")
        if trainer.is_global_zero:
            names = list(dict.fromkeys(name for row in self.rows for name in row))
            with publish(self.path) as temporary, temporary.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, names)
                writer.writeheader()
                writer.writerows(self.rows)


class SaveAt(Checkpoint):
    """Writes a checkpoint at given steps, where no validation selects one.

    Args:
        steps: file -> its step.
    """

    def __init__(self, steps: Mapping[Path, int]) -> None:
        """See the class."""
        self.steps = steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Save what is due."""
        if not ends_step(trainer, index):
            return
        for path, step in self.steps.items():
            if step == trainer.global_step:
                _save(trainer, path)


def _save(trainer: lightning.Trainer, path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    # Lightning writes elsewhere and moves; between file systems that is a copy: a kill leaves a part.
    partial = path.with_name(f"{path.name}.partial")
    trainer.save_checkpoint(partial)
    if trainer.is_global_zero:
        partial.replace(path)


class Waiting(Callback):
    """Says how far a training or a validation is, where nothing was said for half a minute.

    Args:
        steps: of the training.
    """

    def __init__(self, steps: int) -> None:
        """See the class."""
        self.steps = steps
        self._training = Progress("steps", steps)
        self._validation = Progress("validation batches", 1)
        self._validated = 0
        self._tokens = 0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        """A resumed training has begun before."""
        self._training = Progress("steps", self.steps, trainer.global_step)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Count tokens, and tell."""
        self._tokens += tokens_of(batch)
        if ends_step(trainer, index) and trainer.global_step < self.steps:
            figures = f"train/loss {float(outputs['loss']):.4f}" if self._training.is_due() else ""
            if self._tokens and figures:
                figures += f", {self._tokens / self._training.seconds:,.0f} tokens a second"
            self._training.reached(trainer.global_step, figures)

    def on_validation_start(self, trainer: lightning.Trainer, module: Any) -> None:
        """The batches of all loaders are counted together."""
        counts = trainer.num_val_batches
        total = int(sum(counts)) if isinstance(counts, list) else int(counts)
        self._validation = Progress("validation batches", total)
        self._validated = 0

    def on_validation_batch_end(self, trainer: lightning.Trainer, *_: Any, **__: Any) -> None:
        """Tell."""
        self._validated += 1
        self._validation.reached(self._validated)


class Last(Checkpoint):
    """Writes `last.ckpt`, from which a killed run resumes.

    A checkpoint is always one of whole steps. One that is written in the middle of a step, at SIGTERM, says
    that the step has not begun. One that is written in a validation or before it says that the validation
    comes next; of the last validation there is none, as Lightning does not go on behind the last step.

    Args:
        run: whose it is.
        every: steps between two writes.
        interval: steps between validations, behind each of which it is written too.
        minutes: after so many without a write the next step's end writes it.
    """

    def __init__(self, run: Run, every: int, interval: int, minutes: float) -> None:
        """See the class."""
        self.run, self.every, self.interval = run, every, interval
        self.seconds = 60 * minutes
        self._written = time.monotonic()
        self._is_validating = False
        self.path = run.folder / paths.CHECKPOINTS / paths.LAST

    def _save(self, trainer: lightning.Trainer) -> None:
        _save(trainer, self.path)
        self._written = time.monotonic()

    def _is_late(self, trainer: lightning.Trainer) -> bool:
        # Processes write together: one clock decides.
        return bool(trainer.strategy.broadcast(time.monotonic() - self._written > self.seconds))

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Say how many parts the steps so far were computed in, how long they took, and what comes next."""
        parts = trainer.accumulate_grad_batches
        checkpoint["accumulate"] = parts
        checkpoint["seconds"] = self.run.seconds
        fit_loop = checkpoint["loops"]["fit_loop"]
        batches = fit_loop["epoch_loop.batch_progress"]
        if batches["total"]["processed"] < batches["total"]["ready"]:  # in the middle of a step
            for counts in (batches["total"], batches["current"]):
                counts |= dict.fromkeys(counts, trainer.global_step * parts)
            (loader,) = fit_loop["state_dict"]["combined_loader"]
            loader["next"] = trainer.global_step
        if self._is_validating:
            validated = fit_loop["epoch_loop.val_loop.batch_progress"]
            for counts in (validated["total"], validated["current"]):
                counts |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_load_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Count the batches so far as if they had been of the present number of parts.

        A checkpoint is written behind the last part of a step, whose batch may not count as completed yet.
        """
        self.run.resume_clock(checkpoint.get("seconds", 0.0))
        parts = checkpoint.get("accumulate", 1)
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (batches["total"], batches["current"]):
            open_batches = counts["ready"] - counts["completed"]
            counts["ready"] = counts["ready"] // parts * trainer.accumulate_grad_batches
            counts["started"] = counts["ready"]
            counts["processed"] = counts["ready"]
            counts["completed"] = counts["ready"] - open_batches

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Save between validations; at a validation's step it is saved after the validation."""
        step = trainer.global_step
        if not ends_step(trainer, index) or step % self.interval == 0:
            return
        if step % self.every == 0 or self._is_late(trainer):
            self._save(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """A validation may take long: what is late is saved before it."""
        if trainer.state.fn == "fit":
            self._is_validating = True
            if trainer.global_step < trainer.max_steps and self._is_late(trainer):
                self._save(trainer)

    def on_validation_epoch_end(self, *_: Any) -> None:
        """The scores are there; what is saved from now on has them."""
        self._is_validating = False

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Save after the selection and the early stopping have taken the new score."""
        if trainer.state.fn == "fit":
            self._save(trainer)

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        """At SIGTERM keep every step that is done.

        Of processes that train together only one may have got the signal: what they wrote last stays.
        """
        stopped = isinstance(exception, SIGTERMException) and trainer.state.fn == "fit"
        if stopped and trainer.world_size == 1 and 0 < trainer.global_step < trainer.max_steps:
            self._save(trainer)


class InStep(Callback):
    """Knows whether a training step is being computed: whether what fails there could do with less memory."""

    def __init__(self) -> None:
        """None is yet."""
        self.is_open = False

    def on_train_batch_start(self, *_: Any) -> None:
        """A part of a step begins."""
        self.is_open = True

    def on_train_batch_end(self, *_: Any) -> None:
        """It ends."""
        self.is_open = False


class Stop(EarlyStopping):
    """Early stopping that a resumed run remembers, also if it was killed right after the last validation.

    Args:
        monitor: the score, as Lightning names it.
        after: validations up to this step stop nothing.
        settings: further ones, of Lightning's `EarlyStopping`.
    """

    def __init__(self, monitor: str, after: int = 0, **settings: Any) -> None:
        """See the class."""
        super().__init__(monitor, **settings)
        self.after = after

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Look at the score, where it may stop the training."""
        if trainer.global_step > self.after:
            super().on_validation_end(trainer, module)

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        """Stop at once where the interrupted run had already decided to."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


def rows_of(batch: Any) -> list[int]:
    """Rows of the log that a batch reads, its parts' together; none where it does not say."""
    if isinstance(batch, list):
        return [row for part in batch for row in rows_of(part)]
    if not isinstance(batch, dict):
        return []
    own = batch["row"].tolist() if "row" in batch else []
    return own + [row for part in batch.values() for row in rows_of(part)]


def tokens_of(batch: Any) -> int:
    """Tokens of a batch and of all in it, padding included; 0 where it has none."""
    if isinstance(batch, list):
        return sum(tokens_of(part) for part in batch)
    if not isinstance(batch, dict):
        return 0
    own = batch["input_ids"].numel() if isinstance(batch.get("input_ids"), torch.Tensor) else 0
    return own + sum(tokens_of(part) for part in batch.values())


def broken(what: str, step: int, rows: list[int], value: float | None = None) -> str:
    """The line on which training stops where a number is none."""
    named = (
        f", rows {', '.join(map(str, rows[:10]))}{' ...' if len(rows) > 10 else ''} of the log"
        if rows
        else ""
    )
    number = "is not finite" if value is None else f"is {value}"
    return f"{what} {number} at step {step}{named}; lower the learning rate and run make again"
