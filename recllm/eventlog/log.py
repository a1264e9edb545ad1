"""The event log: flat arrays on disk in which a sample is a row and its history is the rows above it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recllm.eventlog.candidates import KINDS
from recllm.eventlog.ids import SPLITS
from recllm.eventlog.names import CandidateKind, RowSet
from recllm.files import load_array

Rows = NDArray[np.int64]

ARRAYS = (
    "user",
    "item",
    "rating",
    "label",
    "timestamp",
    "split",
    "training",
    "offsets",
    "user_fields",
    "item_fields",
    "item_count",
    "item_likes",
)
OPTIONAL_ARRAYS = ("history_end", "anchor", "item_split", "held_count")
"""Arrays that are there only where histories are not simply the rows above (see `EventLog.history`), or items
are held out."""


class EventLog:
    """All events sorted by (user, timestamp, external item id), memory-mapped and read-only.

    Behind the events there may be sampled negatives (`prepare.sampled_negatives`): samples with label 0 that
    stand at a liked event and share its user, time, split and history, but are no events and in no history.
    Between the two there may be the events of held-out items (`prepare.split=items`), which nobody knows of:
    they are in no history either (`held_rows`).

    Attributes:
        user, item: int32 `[N]` dense ids (0 padding, 1 unknown, real ids from 2 on).
        rating: int16 `[N]` code of what a history shows; 0 = nothing, code c reads `rating_levels[c - 1]`.
            With `shows_labels` two codes follow the levels, for events without a rating: disliked, liked.
        label: int8 `[N]`, 1 = liked.
        timestamp: int64 `[N]` seconds.
        split: int8 `[N]`, 0 train, 1 valid, 2 test, -1 unused.
        training: bool `[N]`, the training events (`recllm.eventlog.splits`).
        offsets: int64 `[n_users + 1]`; user u owns the rows `offsets[u]:offsets[u + 1]`.
        user_fields: int32 `[n_users, F_u]`, item_fields: int32 `[n_items, F_i]`: CRM ids, column 0
            the user or item itself; a value without a training event reads 1.
        item_count, item_likes: int32 `[n_items]` training events and liked training events of an item.
        item_split: int8 `[n_items]`, the split that an item is held out for, 0 for none; None: no item is.
        held_count: int32 `[n_items]`, of a held-out item 1 + its events in the span of training, else 0: what
            popular candidates are drawn by, and nothing else reads; None: no item is held out.
        meta: field names and sizes, rating levels, counts (`meta.json`).
    """

    user: NDArray[np.int32]
    item: NDArray[np.int32]
    rating: NDArray[np.int16]
    label: NDArray[np.int8]
    timestamp: NDArray[np.int64]
    split: NDArray[np.int8]
    training: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    user_fields: NDArray[np.int32]
    item_fields: NDArray[np.int32]
    item_count: NDArray[np.int32]
    item_likes: NDArray[np.int32]

    def __init__(self, folder: Path, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> None:
        """Take arrays that are already open; users call `open`."""
        self.folder = folder
        self.meta = meta
        for name in ARRAYS:
            setattr(self, name, arrays[name])
        self._history_end: Rows | None = arrays.get("history_end")
        self._anchor: Rows | None = arrays.get("anchor")
        self.item_split: NDArray[np.int8] | None = arrays.get("item_split")
        self.held_count: NDArray[np.int32] | None = arrays.get("held_count")

    @classmethod
    def open(cls, folder: str | Path) -> EventLog:
        """Map the log that `stages/prepare.py` wrote.

        Raises:
            FileNotFoundError: where the folder holds no log.
        """
        folder = Path(folder)
        if not (folder / "meta.json").exists():
            raise FileNotFoundError(f"no event log in {folder}; wanted meta.json there; run `make prepare`")
        present = [name for name in OPTIONAL_ARRAYS if (folder / f"{name}.npy").exists()]
        # Plain arrays over the mapped memory: np.memmap, a subclass, would make every small gather slower.
        arrays = {name: load_array(folder / f"{name}.npy") for name in (*ARRAYS, *present)}
        return cls(folder, arrays, json.loads((folder / "meta.json").read_text()))

    @property
    def n_items(self) -> int:
        """Dense item ids, the reserved ones included."""
        return int(self.meta["n_items"])

    @property
    def n_users(self) -> int:
        """Dense user ids, the reserved ones included."""
        return int(self.meta["n_users"])

    @property
    def n_events(self) -> int:
        """Rows that are events; those of held-out items, and sampled negatives, come after them."""
        return int(self.offsets[-1])

    @property
    def held_rows(self) -> Rows:
        """Rows of the events of held-out items, samples among them; behind the events, in no history."""
        count = 0 if self.item_split is None else int(self.meta["n_held"])
        return np.arange(self.n_events, self.n_events + count)

    def is_drawn(self, rows: Rows) -> NDArray[np.bool_]:
        """Which rows are sampled negatives: nobody met the item there, bool `[B]`."""
        return np.asarray(rows) >= self.n_events + len(self.held_rows)

    @property
    def timed(self) -> bool:
        """Whether events have times; without, `timestamp` is 0 everywhere."""
        return bool(self.meta["timed"])

    @property
    def strict_ties(self) -> bool:
        """Whether histories leave out events of the sample's own second (`prepare.ties=strict`)."""
        return self._history_end is not None

    @property
    def shows_labels(self) -> bool:
        """Whether histories show the label of an event that has no rating (`prepare.history_labels`)."""
        return bool(self.meta.get("shows_labels", False))

    @property
    def repeats(self) -> int:
        """How many events are of an item that their user had met before."""
        return int(self.meta.get("repeats", 0))

    @property
    def ranks_repeats(self) -> bool:
        """Whether such events are rows of the ranking task (`prepare.repeats`)."""
        return bool(self.meta.get("ranks_repeats", False))

    @property
    def draws_met(self) -> bool:
        """Whether negatives may be items that the user had met before (`prepare.draw_met`)."""
        return bool(self.meta.get("draws_met", False))

    @property
    def codes(self) -> int:
        """How many codes `rating` has beside 0."""
        return len(self.meta["rating_levels"]) + (2 if self.shows_labels else 0)

    def anchors(self, rows: Rows) -> Rows:
        """The event at which each row stands, int64 `[B]`: itself, a sampled negative's liked event.

        A row of a held-out item stands at the first event of its user that is behind its own history, and
        where there is none at the row behind the user's last one.
        """
        rows = np.asarray(rows, np.int64)
        if self._anchor is None:
            return rows
        return np.where(rows < self.n_events, rows, self._anchor[np.maximum(rows - self.n_events, 0)])

    def history(self, rows: Rows) -> tuple[Rows, Rows]:
        """First row (inclusive) and last row (exclusive) of each row's history, int64 `[B]` each.

        The rows above the event at which the row stands; with `prepare.ties=strict` without those of its own
        second, with `prepare.window` the last ones.
        """
        rows = np.asarray(rows, np.int64)
        at = self.anchors(rows)
        start = self.offsets.take(self.user.take(rows))
        end = at if self._history_end is None else self._history_end.take(at)
        return np.maximum(start, end - self.window) if self.window else start, end

    def recent(self, rows: Rows, k: int) -> Rows:
        """The last k rows of each history in time order, int64 `[B, k]`, padded with -1 on the left."""
        start, end = self.history(rows)
        positions = end[:, None] + np.arange(-k, 0)
        return np.where(positions >= start[:, None], positions, -1)

    def train_events(self) -> NDArray[np.bool_]:
        """Rows `[N]` that may feed statistics, text and vectors; no held-out or drawn sample is one."""
        return np.asarray(self.training)

    def rows(self, split: str, name: str) -> Rows:
        """The row set `name` of a split.

        Args:
            split: `train`, `valid` or `test`.
            name: `all` (time order; that of the log where it has no times), `first<n>` or `last<n>` (the
                first or the last n of it), `uniform<n>` (n drawn with the stored permutation, so that a
                smaller set lies in a larger one), or a fraction such as `0.1` of the same permutation. A set
                larger than the split is the whole split. See `recllm.eventlog.names.RowSet`.

        Raises:
            ValueError: for another split or name.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        row_set = RowSet.parse(name)
        rows = self._stored_rows(f"permutation_{split}" if row_set.is_drawn else f"order_{split}")
        count = row_set.count(len(rows))
        return rows[len(rows) - count :] if row_set.kind == "last" else rows[:count]

    def _stored_rows(self, name: str) -> Rows:
        return load_array(self.folder / f"{name}.npy")

    @property
    def window(self) -> int:
        """Most events of a history, the latest ones; 0: all (`prepare.window`)."""
        return int(self.meta.get("window", 0))

    @property
    def candidate_kinds(self) -> tuple[str, ...]:
        """Kinds of lists that are stored for `valid`, as `ranking` takes them: `uniform20`, `given20`.

        The last one is the one to go by where one kind selects: the data set's own, where it has some.
        """
        size = self.meta["candidates"]
        kinds = [*KINDS, "given"] if "valid" in self.meta.get("given_candidates", ()) else KINDS
        return tuple(str(CandidateKind.parse(f"{kind}{size}")) for kind in kinds)

    def ranking(self, split: str, kind: str, folder: Path | None = None) -> tuple[Rows, NDArray[np.int32]]:
        """Rows `[R]` of the ranking task of `valid` or `test`, and their stored candidates `[R, C]`.

        Args:
            split: `valid` or `test`.
            kind: how the negatives were drawn, and how long a list is: `uniform20`, `popular20`, `hard20`;
                `given20`: the data set's own lists.
            folder: where the lists lie; the log's own folder by default.

        Raises:
            ValueError: there are no such lists, or the text is no kind of them.
        """
        folder = self.folder if folder is None else folder
        path = folder / f"candidates_{split}_{CandidateKind.parse(kind)}.npy"
        if not path.exists():
            stored = sorted(file.stem.rpartition("_")[2] for file in folder.glob(f"candidates_{split}_*.npy"))
            raise ValueError(
                f"no candidates of kind {kind} in {folder}; there are {', '.join(stored) or 'none'}; "
                "set evaluate.candidates, or prepare.candidates (retrieval.hard for hard ones)"
            )
        return load_array(self.folder / f"ranking_{split}.npy", mapped=False), load_array(path, mapped=False)


def chronological(positions: NDArray[np.integer]) -> Rows:
    """Positions `[B, k]` sorted into time order; padding (-1) comes to stand on the left."""
    return np.sort(np.asarray(positions, np.int64), axis=1)
