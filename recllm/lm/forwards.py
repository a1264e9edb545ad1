"""Which rows go through an LM together: those of like length, in forwards of so many tokens at most."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Lengths = NDArray[np.integer]
Places = NDArray[np.int64]

LARGEST = {"cpu": 4_096}
"""Tokens of a forward without gradients beyond which a device gains no speed, and only needs more memory
(`make bench-lm`). A GPU does gain."""


def cut(lengths: Lengths, tokens: int, count: int = 1) -> list[Places]:
    """Rows dealt to micro-batches of at most `tokens` tokens, padding included, and at least one row.

    Args:
        lengths: tokens of each row, `[n]`, at least one row.
        tokens: most tokens of a micro-batch; 0: any number.
        count: how many micro-batches there must be at least, at most n.

    Returns:
        Places of each one's rows, shortest rows first; one micro-batch keeps the order of the rows.
    """
    if tokens == 0 and count == 1:
        return [np.arange(len(lengths))]
    order = np.argsort(lengths, kind="stable")
    groups: list[Places] = []
    first = 0
    for place in range(1, len(order) + 1):
        is_end = place == len(order)
        if is_end or (tokens and lengths[order[place]] * (place + 1 - first) > tokens):
            groups.append(order[first:place])
            first = place
    if len(groups) == count == 1:
        return [np.arange(len(lengths))]
    while len(groups) < count:
        widest = int(np.argmax([len(group) for group in groups]))
        half = len(groups[widest]) // 2
        groups[widest : widest + 1] = [groups[widest][:half], groups[widest][half:]]
    return groups


def cut_for_scoring(lengths: Lengths, size: int, device: str) -> list[Places]:
    """Rows dealt to the forwards that score them, rows of like length side by side.

    Args:
        lengths: tokens of each row, `[n]`.
        size: most rows of a forward.
        device: type of the device, e.g. `cpu`.

    Returns:
        Places of each forward's rows, shortest rows first.
    """
    order = np.argsort(lengths, kind="stable")
    most = LARGEST.get(device)
    forwards: list[Places] = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        forwards += [rows] if most is None else [rows[part] for part in cut(lengths[rows], most)]
    return forwards


def rows_for_scoring(lengths: Lengths, size: int, device: str) -> int:
    """Rows of a forward, at most `size`, where every forward has as many and rows may be of any length.

    Args:
        lengths: as of `cut_for_scoring`.
        size: as of `cut_for_scoring`.
        device: as of `cut_for_scoring`.
    """
    most = LARGEST.get(device)
    if most is None or not len(lengths):
        return size
    return max(1, min(size, most // int(lengths.max())))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory, of a GPU or the CPU, does not do."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
