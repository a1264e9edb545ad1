"""Which of a row's candidates are rejected in a pass over the training rows.

Every choice is a function of (seed, pass, row) and, for hard ones, of scores that know no chosen one. Which
candidate is the chosen decides only that it is not among them.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog import draws
from recllm.eventlog.config import RejectedFrom
from recllm.eventlog.log import Rows

KINDS: tuple[str, ...] = get_args(RejectedFrom)

Bools = NDArray[np.bool_]


def usable(texts: NDArray[np.integer[Any]], chosen: NDArray[np.integer[Any]]) -> Bools:
    """Candidates that may be rejected: a title that says nothing, or what another one says, teaches nothing.

    Out are the chosen one, every title with the same text as it, titles without text, and of several with the
    same text all but the first.

    Args:
        texts: `[n, C]`, equal where candidates read the same, 0 where there is no text.
        chosen: `[n]` place of the chosen one.

    Returns:
        bool `[n, C]`.
    """
    own = np.take_along_axis(texts, chosen[:, None], 1)
    first = (texts[:, :, None] == texts[:, None, :]).argmax(2) == np.arange(texts.shape[1])
    return (texts != own) & (texts != 0) & first


def draw(
    rows: Rows,
    chosen: NDArray[np.integer[Any]],
    allowed: Bools,
    count: int,
    seed: int | Rows,
    kind: str = "random",
    scores: NDArray[np.floating[Any]] | None = None,
) -> tuple[NDArray[np.int64], Bools]:
    """The chosen candidate of each row and its rejected ones.

    Args:
        rows: int64 `[B]` rows of the log, with the seed what the draw depends on.
        chosen: `[B]` place of the chosen one.
        allowed: bool `[B, C]`, see `usable`.
        count: rejected ones wanted, K.
        seed: of this pass; or int64 `[B]`, that of each row's own pass.
        kind: one of `KINDS`.
        scores: `[B, C]` by which candidates are hard, higher is harder; not read by `random`.

    Returns:
        Places `[B, 1 + K]`, the chosen one first, and which of them are there `[B, 1 + K]`: a row with fewer
        than K that may be rejected has them first, then nothing.

    Raises:
        ValueError: for an unknown kind, or one that needs scores and has none.
    """
    if kind not in KINDS or (kind != "random" and scores is None):
        raise ValueError(
            f"rejected titles of kind {kind!r} without scores; wanted one of {', '.join(KINDS)}, and scores"
        )
    seeds = np.broadcast_to(seed, len(rows))
    key = np.empty(allowed.shape)
    for one in np.unique(seeds):
        of_pass = seeds == one
        key[of_pass] = draws.uniform(int(one), rows[of_pass], allowed.shape[1])
    if scores is not None and kind != "random":
        order = np.argsort(np.where(allowed, -scores, np.inf), axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(allowed.shape[1])[None], 1)
        hardest = -(-count // 2) if kind == "half" else count
        key = np.where(rank < hardest, rank - float(allowed.shape[1]), key)
    key[~allowed] = np.inf
    np.put_along_axis(key, np.asarray(chosen)[:, None], -np.inf, 1)
    places = np.argsort(key, axis=1, kind="stable")[:, : 1 + count]
    return places, np.take_along_axis(key, places, 1) < np.inf
