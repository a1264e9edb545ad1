"""Several processes at one stage: what of a whole each one computes, and how all come to have the whole.

All of them run the same program and ask for the same things in the same order. Work is dealt in whole
batches: each is computed as one process alone would compute it, and the whole is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Value = TypeVar("Value")

CHUNK = 1 << 26
"""Most bytes that are exchanged at a time."""

_is_joined = False  # whether this process works with others now


def join() -> None:
    """From here on this process shares its work with the others of its group (`torch.distributed`)."""
    global _is_joined
    _is_joined = True


def leave() -> None:
    """From here on this process works alone: the others may have ended."""
    global _is_joined
    _is_joined = False


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process works alone and what it is asked for is computed here, e.g. to be timed."""
    global _is_joined
    before = _is_joined
    _is_joined = False
    try:
        yield
    finally:
        _is_joined = before


def world() -> int:
    """How many processes share the work."""
    if not _is_joined:
        return 1
    import torch.distributed  # slow to import, and commands that only plan need none of it

    return torch.distributed.get_world_size()


def rank() -> int:
    """Which of them this one is, from 0."""
    if not _is_joined:
        return 0
    import torch.distributed

    return torch.distributed.get_rank()


def dealt(count: int) -> Iterator[tuple[int, bool]]:
    """Which of `count` batches this process computes: every `world()`-th one, in order.

    All processes get equally many, since a forward of a sharded LM waits for all of them: who has none left
    in the last round computes the last batch once more, in vain.

    Args:
        count: of the batches.

    Yields:
        Number of a batch, and whether this process is the one whose result counts.
    """
    for first in range(0, count, world()):
        number = first + rank()
        yield min(number, count - 1), number < count


def complete(values: NDArray[Any]) -> None:
    """Write what the other processes computed into an array, in place.

    Args:
        values: contiguous, of the same shape everywhere; what another process computes is 0 here.
    """
    if world() == 1:
        return
    import torch

    device = _device()
    # Sums of bytes of which all but one are 0: the numbers come out as they are, NaN and -0 too.
    bytes_ = values.reshape(-1).view(np.uint8)
    for start in range(0, len(bytes_), CHUNK):
        part = torch.from_numpy(np.array(bytes_[start : start + CHUNK])).to(device)
        torch.distributed.all_reduce(part)
        bytes_[start : start + CHUNK] = part.cpu().numpy()


def all_agree(value: bool) -> bool:
    """Whether it is so in every process."""
    if world() == 1:
        return value
    import torch

    agreed = torch.tensor(int(value), device=_device())
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN)
    return bool(agreed)


def from_first(make: Callable[[], Value]) -> Value:
    """What the first process makes, in all of them; only there it is made.

    Args:
        make: what it makes can be pickled.
    """
    if world() == 1:
        return make()
    import torch

    made: list[Any] = [make() if rank() == 0 else None]
    torch.distributed.broadcast_object_list(made, device=_device())
    value: Value = made[0]
    return value


def _device() -> Any:
    """Where tensors must lie to be exchanged."""
    import torch

    on_gpu = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
