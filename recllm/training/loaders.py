"""Loaders in which a batch is a function of the step, so that resuming is starting at another step.

Training is one run over `steps` batches, however many passes over the rows that is. The order of the rows is
a function of (seed, pass); the batch of a step is a slice of that order, and a process takes its share of it.
So nothing has to be replayed after a kill, and two processes see, step for step, what one would see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from numpy.typing import NDArray

from recllm.errors import StageError
from recllm.eventlog.log import Rows
from recllm.training.micro_batches import TokenBudget, cut_alike

Batch = Any
WINDOW = 16  # batches among which rows of like length find each other


class Stream:
    """Endless passes over `count` rows, each in its own seeded order, cut into global batches.

    Args:
        count: rows.
        batch_size: rows of a global batch; one may reach from a pass into the next.
        seed: seed of the order.
        lengths: tokens of each row, `[count]`; rows of like length then share a batch, so that little is
            padded: every `WINDOW` batches of the order are sorted by length, then put in random order.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, lengths: NDArray[np.integer] | None = None
    ) -> None:
        """See the class."""
        if count < 1:
            raise ValueError("no rows to train on; wanted at least 1; use a larger subsample")
        self.count, self.batch_size, self.seed, self.lengths = count, batch_size, seed, lengths
        self._orders: dict[int, Rows] = {}

    def _order(self, number: int) -> Rows:
        if number not in self._orders:
            # A batch reaches over at most a few passes; older ones are not asked for again.
            self._orders = {k: v for k, v in self._orders.items() if k >= number - 1}
            rng = np.random.default_rng([self.seed, number])
            order = rng.permutation(self.count)
            self._orders[number] = order if self.lengths is None else self._by_length(order, number, rng)
        return self._orders[number]

    def _by_length(self, order: Rows, number: int, rng: np.random.Generator) -> Rows:
        assert self.lengths is not None
        position = number * self.count + np.arange(self.count)
        batch = position // self.batch_size
        window = batch // WINDOW
        order = order[np.lexsort((self.lengths[order], window))]
        # Batches change places within their window, but for those that reach over into another pass.
        batch -= batch[0]
        place = rng.random(batch[-1] + 1)
        place[0], place[-1] = -1, 2
        return order[np.lexsort((place[batch], window))]

    def indices(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        """This process's share of the step's batch: indices int64 into the rows."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[rank::world]
        passes, within = np.divmod(positions, self.count)
        result = np.empty(len(positions), np.int64)
        for number in np.unique(passes):
            chosen = passes == number
            result[chosen] = self._order(int(number))[within[chosen]]
        return result

    def micro_batches(
        self, step: int, rank: int, world: int, tokens: int, lengths: NDArray[np.integer]
    ) -> list[tuple[Rows, float]]:
        """A process's share of a step, cut by tokens.

        Args:
            step: of the training.
            rank: of the process, or of the part that it computes.
            world: processes, or parts of all.
            tokens: most tokens of a micro-batch; 0: one holds all.
            lengths: tokens that the forward of each row has, `[count]`.

        Returns:
            Of each micro-batch the places of its rows in `indices`, and its share of the loss, as of
            `loss_scale`.
        """
        of_ranks = [lengths[self.indices(step, other, world)] for other in range(world)]
        parts = cut_alike(of_ranks, rank, tokens)
        whole = self.loss_scale(rank, world)
        if len(parts) == 1:
            return [(parts[0], whole)]
        return [(part, whole * len(part) / len(of_ranks[rank])) for part in parts]

    def passes(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        """The number of the pass that each index of `indices` is of, int64, from 0."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[rank::world]
        return positions // self.count

    def loss_scale(self, rank: int, world: int) -> float:
        """How many rows this process has of a batch, against the mean over processes.

        A mean over a process's rows, times this, averages over processes to the mean over the batch. Parts
        that one process computes one after another count as processes.
        """
        return len(range(rank, self.batch_size, world)) * world / self.batch_size


class NewestLast:
    """A stream over rows in time order, and from a step on another one over the newest of them alone.

    Args:
        count: rows, the newest last.
        newest: so many of them are what the second stream is over; 0: there is none.
        first: steps before it.
        batch_size: rows of a global batch; none reaches from the first stream into the second.
        seed: seed of both orders.
    """

    def __init__(self, count: int, newest: int, first: int, batch_size: int, seed: int) -> None:
        """See the class."""
        self.first = first
        self.oldest = count - newest
        self._all = Stream(count, batch_size, seed)
        # Another seed, or the same draws would order both.
        self._newest = Stream(newest, batch_size, seed + 1_000) if newest else None

    def indices(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        """This process's share of the step's batch: indices int64 into the rows."""
        if self._newest is None or step < self.first:
            return self._all.indices(step, rank, world)
        return self.oldest + self._newest.indices(step - self.first, rank, world)

    def loss_scale(self, rank: int, world: int) -> float:
        """As `Stream.loss_scale`."""
        return self._all.loss_scale(rank, world)


def plan_steps(count: int, batch_size: int, epochs: float, validations: int) -> tuple[int, int]:
    """Steps of a training and steps between two validations.

    The last step is a validation: the number of steps is rounded up to a multiple of the interval.
    """
    steps = max(1, math.ceil(epochs * count / batch_size))
    interval = math.ceil(steps / min(validations, steps))
    return interval * math.ceil(steps / interval), interval


@dataclass(frozen=True)
class Course:
    """The steps of a training whose last ones may be over the newest rows alone.

    Attributes:
        steps: all of them.
        interval: steps between validations; the last step is one.
        newest_steps: steps at the end that are over the newest rows.
    """

    steps: int
    interval: int
    newest_steps: int

    @classmethod
    def plan(cls, count: int, newest: int, batch_size: int, epochs: float, validations: int) -> Course:
        """Steps for `epochs` passes over `count` rows and one over the newest of them, as of `plan_steps`."""
        steps, interval = plan_steps(count, batch_size, epochs + newest / count, validations)
        return cls(steps, interval, min(math.ceil(newest / batch_size), steps - 1))

    @property
    def stops_after(self) -> int:
        """Steps up to which nothing stops early: all before the newest rows, where they have steps."""
        return self.steps - self.newest_steps if self.newest_steps else 0


class StepLoader:
    """Yields `make(step, rank, world)` for every step; its state is the step.

    A process that computes a step in parts yields one after another what as many processes would have.
    """

    def __init__(
        self, make: Callable[[int, int, int], Batch], steps: int, rank: int, world: int, parts: int = 1
    ) -> None:
        """Take the function that builds the batch of a step for a process."""
        self.make, self.steps, self.rank, self.world, self.parts = make, steps, rank, world, parts
        self.next = 0

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[Batch]:
        while self.next < len(self):
            step, part = divmod(self.next, self.parts)
            self.next += 1
            yield self.make(step, part * self.world + self.rank, self.world * self.parts)

    def state_dict(self) -> dict[str, int]:
        """The step that comes next; between two parts, the one that they are of."""
        return {"next": self.next // self.parts}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at the first part of a stored step."""
        self.next = state["next"] * self.parts


class RowLoader:
    """Yields `make(indices)` over `count` rows in order; every row once over all processes.

    All processes have the same number of batches, none empty: a forward of a sharded LM waits for all of
    them. Where the rows of one would fill a batch less than those of another, its last batch is cut in two.
    """

    def __init__(
        self, make: Callable[[Rows], Batch], count: int, batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        """Take the function that builds a batch of row indices.

        Raises:
            StageError: a process has fewer rows than another one has batches.
        """
        self.make = make
        batches = math.ceil(math.ceil(count / world) / batch_size)
        if count // world < batches:
            raise StageError(
                f"{count} validation rows cannot be dealt to {world} processes in batches of {batch_size}: "
                "one would have none; wanted more rows, or fewer processes (trainer.devices)"
            )
        own = np.arange(count)[rank::world]
        cuts = list(range(batch_size, len(own), batch_size))
        if len(cuts) + 1 < batches:
            cuts.append(len(own) - 1)
        self.parts = np.split(own, cuts) if batches else []

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        for indices in self.parts:
            yield self.make(indices)


class Loaders(lightning.LightningDataModule):
    """Training and validation batches of a stage, for whichever process asks.

    Args:
        train: `(step, rank, world) -> batch`.
        steps: training steps.
        valid: one `(make, count)` per validation loader; `make(indices) -> batch`.
        valid_batch: rows of a validation batch.
        finish: what is left to do to a batch once it lies on its device.
        step_rows: rows of a step, where they are not its `fit.batch_size`.
        budget: by which `train` cuts a step; None: it cuts none.
    """

    def __init__(
        self,
        train: Callable[[int, int, int], Batch],
        steps: int,
        valid: list[tuple[Callable[[Rows], Batch], int]],
        valid_batch: int,
        finish: Callable[[Batch], Batch] | None = None,
        step_rows: int | None = None,
        budget: TokenBudget | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        self.train, self.steps, self.valid, self.valid_batch = train, steps, valid, valid_batch
        self.finish = finish
        self.step_rows = step_rows
        self.budget = budget

    def _place(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.global_rank, self.trainer.world_size

    def _step_loader(self) -> StepLoader:
        assert self.trainer is not None
        return StepLoader(self.train, self.steps, *self._place(), self.trainer.accumulate_grad_batches)

    def train_dataloader(self) -> StepLoader:
        """The training batches."""
        return self._step_loader()

    def val_dataloader(self) -> list[RowLoader]:
        """The validation batches, one loader for each task."""
        return [RowLoader(make, count, self.valid_batch, *self._place()) for make, count in self.valid]

    def example(self, device: torch.device) -> Batch:
        """The first training batch, on a device."""
        return self._on_device(next(iter(self._step_loader())), device)

    def cut_smaller(self, step: int, part: int, count: int, device: torch.device) -> Batch | None:
        """A step's batch on a device, in more micro-batches than before; so are all steps from now on.

        Args:
            step: of the training.
            part: of the step, as this process computes it.
            count: of its micro-batches before.
            device: of this process.

        Returns:
            The batch; None where each micro-batch is a row already, or where steps are not cut by a budget.
            That is so in all processes, or in none.
        """
        assert self.trainer is not None
        if self.budget is None:
            return None
        rank, world = self._place()
        parts = self.trainer.accumulate_grad_batches
        before = self.budget.tokens
        while self.budget.halve():
            batch = self.train(step, part * world + rank, world * parts)
            if len(batch) > count:
                return self._on_device(self.trainer.precision_plugin.convert_input(batch), device)
        self.budget.tokens = before
        return None

    def _on_device(self, batch: Batch, device: torch.device) -> Batch:
        return self.on_after_batch_transfer(move_data_to_device(batch, device), 0)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Finish a batch on its device."""
        return batch if self.finish is None else self.finish(batch)
