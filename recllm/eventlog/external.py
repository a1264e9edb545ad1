"""Ids as users of this package know them, and the dense ones that the log counts by."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recllm.eventlog.ids import FIRST_ID, UNKNOWN

Items = NDArray[np.int32]


class ExternalIds:
    """External ids of the users or items of a log, and the dense id of each.

    Args:
        kind: what they are ids of, for messages: `user` or `item`.
        external: external ids by dense id; those of the reserved dense ids are null.
    """

    def __init__(self, kind: Literal["user", "item"], external: pl.Series) -> None:
        """Sorts the ids where they are not sorted."""
        self.kind = kind
        self.by_dense_id = external
        real = external[FIRST_ID:]
        order = np.arange(len(real)) if real.is_sorted() else real.arg_sort().to_numpy()
        self._sorted = real[order]
        self._dense = (order + FIRST_ID).astype(np.int32)

    @classmethod
    def open(cls, folder: Path, kind: Literal["user", "item"]) -> ExternalIds:
        """Read the ids that a log's folder holds in `users.parquet` or `items.parquet`."""
        return cls(kind, pl.read_parquet(folder / f"{kind}s.parquet", columns=["external"])["external"])

    @property
    def dtype(self) -> pl.DataType:
        """Type of the external ids."""
        return self.by_dense_id.dtype

    def series(self, ids: Any) -> pl.Series:
        """Ids as a column of the log's own type: null where an id cannot be one of that type.

        Args:
            ids: a column, an array or a list. A number may be given as text and the other way round; a number
                with a fraction is no id.
        """
        given = ids if isinstance(ids, pl.Series) else pl.Series(self.kind, list(ids), strict=False)
        if given.dtype == self.dtype:
            return given
        if given.dtype.is_float() and not self.dtype.is_float():
            is_whole = given.is_finite() & (given == given.floor())
            given = pl.select(pl.when(is_whole).then(given).cast(pl.Int64, strict=False)).to_series()
        return given.cast(self.dtype, strict=False)

    def dense(self, ids: Any) -> Items:
        """Dense id of each, int32 `[n]`; `UNKNOWN` where the log does not know it."""
        wanted = self.series(ids)
        if not len(wanted) or not len(self._sorted):
            return np.full(len(wanted), UNKNOWN, np.int32)
        found = np.asarray(self._sorted.search_sorted(wanted), np.int64)
        place = np.minimum(found, len(self._sorted) - 1)
        is_known = (self._sorted[place] == wanted).fill_null(False).to_numpy()
        return np.where(is_known, self._dense[place], UNKNOWN).astype(np.int32)

    def external(self, dense: NDArray[np.integer]) -> pl.Series:
        """External id of each dense one, in the type of the log; null of the reserved ones."""
        return self.by_dense_id[np.asarray(dense, np.int64)]
