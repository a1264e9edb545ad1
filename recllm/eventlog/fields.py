"""Fields of users and items: the ids that a CRM reads, and counts; both know training events only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.eventlog.config import PrepareConfig
from recllm.eventlog.ids import FIRST_ID

Array = npt.NDArray[Any]


def trained_fields(
    user: Array,
    item: Array,
    label: Array,
    training: Array,
    users: pl.DataFrame,
    items: pl.DataFrame,
    config: PrepareConfig,
) -> dict[str, Array]:
    """What training events give: counts of items, and ids in which whatever has none reads 1.

    Args:
        user: dense user of every row of the log, `[N]`.
        item: dense item, `[N]`.
        label: 1 liked, 0 not, -1 unknown, `[N]`.
        training: whether training may count a row, bool `[N]`.
        users: their table, from dense id 2 on.
        items: theirs.
        config: `user_fields` and `item_fields` are read.

    Returns:
        `user_fields` and `item_fields`, see `crm_ids`; `item_count` and `item_likes`, int32 by dense id: how
        many training events an item has, and how many liked ones.
    """
    num_items = FIRST_ID + items.height
    item_count = np.bincount(item[training], minlength=num_items).astype(np.int32)
    user_count = np.bincount(user[training], minlength=FIRST_ID + users.height)
    liked = item[training & (label == 1)]
    return {
        "user_fields": crm_ids(users, "user", config.user_fields, user_count[FIRST_ID:] > 0),
        "item_fields": crm_ids(items, "item", config.item_fields, item_count[FIRST_ID:] > 0),
        "item_count": item_count,
        "item_likes": np.bincount(liked, minlength=num_items).astype(np.int32),
    }


def crm_ids(table: pl.DataFrame, name: str, columns: Sequence[str], trained: Array) -> Array:
    """CRM ids `[2 + rows, 1 + columns]` int32: the id, then each attribute's value; 1 where never trained."""
    fields = np.zeros((FIRST_ID + table.height, 1 + len(columns)), dtype=np.int32)
    fields[1] = 1
    fields[FIRST_ID:, 0] = np.where(trained, table[name].to_numpy(), 1)
    for place, column in enumerate(columns, start=1):
        ids = _value_ids(table, name, column)
        is_trained = np.zeros(ids.max() + 1, dtype=bool)
        is_trained[ids[trained]] = True
        fields[FIRST_ID:, place] = np.where(is_trained[ids], ids, 1)
    return fields


def _value_ids(table: pl.DataFrame, name: str, column: str) -> Array:
    """Ids from 2 on for the distinct values in ascending order, 1 for null."""
    if column not in table.columns:
        raise ValueError(
            f"prepare.{name}_fields names {column!r}, wanted columns of {name}s.parquet: {table.columns[2:]}"
        )
    return table[column].rank("dense").cast(pl.Int64).fill_null(0).to_numpy() + 1


def field_sizes(table: pl.DataFrame, name: str, columns: Sequence[str]) -> list[dict[str, str | int]]:
    """Name of each field, and how many ids it has, the reserved ones among them."""
    sizes: list[dict[str, str | int]] = [{"name": name, "size": FIRST_ID + table.height}]
    return sizes + [
        {"name": column, "size": FIRST_ID + table[column].drop_nulls().n_unique()} for column in columns
    ]
