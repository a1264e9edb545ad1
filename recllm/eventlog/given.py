"""What a data set says itself: which split an event is of, and among which candidates it is ranked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.ids import SPLITS, UNUSED

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Given:
    """Splits and candidate lists that the data set says itself.

    Attributes:
        split: code of each event's split, -1 for none, int8 `[N]`; None: the data set says none.
        rows: the rows that have a list, ascending, int64 `[R]`.
        lists: their candidates, int32 `[R, C]`.
    """

    split: Array | None
    rows: Array
    lists: Array

    @classmethod
    def taken_from(cls, columns: dict[str, Array], config: PrepareConfig) -> Given:
        """Takes them out of the columns of a log.

        Raises:
            ValueError: `prepare.split` wants what the data set does not say, or lists are of another length
                than those that are drawn.
        """
        split = columns.pop("given_split", None)
        if split is None and config.split == "given":
            raise ValueError(
                "prepare.split=given, but events.parquet has no column split; wanted source.events.split, or "
                "source.valid.path and source.test.path, in conf/dataset/"
            )
        rows = columns.pop("given_rows", np.zeros(0, np.int64))
        lists = columns.pop("given_lists", np.zeros((0, config.candidates), np.int32))
        if len(rows) and lists.shape[1] != config.candidates:
            raise ValueError(
                f"the data set's lists have {lists.shape[1]} candidates, wanted prepare.candidates="
                f"{config.candidates}; ARGS='prepare.candidates={lists.shape[1]}'"
            )
        return cls(split, rows, lists)

    def of(self, rows: Array) -> tuple[Array, Array]:
        """Those of the rows that have a list, in their order, and the lists."""
        place = np.searchsorted(self.rows, rows)
        has_list = np.isin(rows, self.rows)
        return rows[has_list], self.lists[place[has_list]]

    def splits_with_lists(self, split: Array) -> list[str]:
        """Names of the held-out splits some of whose samples have a list."""
        present = split[self.rows]
        return [name for name in ("valid", "test") if (present == SPLITS[name]).any()]


def given_columns(frame: pl.DataFrame) -> dict[str, Array]:
    """What the data set says itself, as far as it does; see `Given`."""
    columns: dict[str, Array] = {}
    if "split" in frame.columns:
        columns["given_split"] = frame["split"].fill_null(UNUSED).to_numpy()
    if "candidates" in frame.columns:
        has_list = frame["candidates"].is_not_null()
        lists = frame["candidates"].filter(has_list).to_list()
        if lists:  # of none it is not known how long they would be
            columns["given_rows"] = np.flatnonzero(has_list.to_numpy())
            columns["given_lists"] = np.array(lists, np.int32)
    return columns
