"""From canonical tables to the event log: dense ids, counts, row orders, candidates.

The event log is sorted by (user, timestamp, external item id). A sample is a row of it, and its history is
the rows above it of the same user.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.columns import FIRST_ID, TRAIN, UNUSED
from recllm.data import candidates, draws, tables
from recllm.data.splits import PrepareConfig, split_by_time

Array = npt.NDArray[Any]


@dataclass
class _Histories:
    user: Array
    item: Array
    offsets: Array
    item_count: Array


def build_log(tables_folder: Path, out_folder: Path, config: PrepareConfig) -> dict[str, int | float]:
    """Writes the event log of a dataset.

    **Training events** are the rows of the training split and, of the rows that are no samples, those whose
    time is not after the last training sample: early history, known by the time that training ends. Only they
    give counts and vocabularies; an id or attribute value without one reads 1 (unknown) in the CRM's fields.

    Args:
        tables_folder: canonical tables, see `recllm.data.tables`.
        out_folder: the log's folder, e.g. `artifacts/demo/log`; created where absent.
        config: see `recllm.data.splits.PrepareConfig`.

    Returns:
        Metrics: `samples`, `train`, `valid`, `test`, `users`, `items`, `events`; dropped rows and rows that
            are no
        samples, by reason; `positive_rate_*`; `cold_user_share_*`: samples whose user has no training sample,
        `unknown_user_share_*`, `unknown_item_share_*`: those whose id reads 1, as it has no training event;
        `shared_second_share`: rows of the same user and second as the row above.

    Raises:
        ValueError: the tables or the config are wrong, one line each.
    """
    events, items, users = tables.read(tables_folder)
    frame, users, items, dropped = _dense(events, users, items)
    rating = frame["rating"].to_numpy()
    label = frame["label"].fill_null(-1).to_numpy()
    if config.label_threshold is not None:
        label = np.where(np.isnan(rating), label, rating > config.label_threshold).astype(np.int8)
    levels = np.unique(rating[~np.isnan(rating)])
    if len(levels) > 100:
        raise ValueError(
            f"{len(levels)} distinct ratings, wanted at most 100; round them in the dataset's recipe.py"
        )
    code = np.where(np.isnan(rating), 0, np.searchsorted(levels, rating) + 1).astype(np.int16)
    user, item, timestamp = (frame[name].to_numpy() for name in ("user", "item", "timestamp"))
    del frame, rating

    n_users, n_items = len(users) + FIRST_ID, len(items) + FIRST_ID
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=n_users))])
    same_second = np.zeros(len(user), dtype=bool)  # as the row above
    same_second[1:] = (user[1:] == user[:-1]) & (timestamp[1:] == timestamp[:-1])
    history_end = np.arange(len(user))
    if config.ties == "strict":
        history_end = np.maximum.accumulate(np.where(same_second, 0, history_end))
    enough = history_end - offsets[user] >= config.min_history
    split, order = split_by_time(timestamp, enough & (label >= 0))
    if not len(order["train"]) or not len(order["valid"]) or not len(order["test"]):
        raise ValueError(
            f"{sum(map(len, order.values()))} samples of {len(user)} events, wanted at least 10 with "
            f"{config.min_history} earlier events; lower it: ARGS='prepare.min_history=...'"
        )
    last = timestamp[order["train"][-1]]
    training = (split == TRAIN) | ((split == UNUSED) & (timestamp <= last))
    item_count = np.bincount(item[training], minlength=n_items).astype(np.int32)
    user_count = np.bincount(user[training], minlength=n_users)

    out_folder.mkdir(parents=True, exist_ok=True)
    save = _saver(out_folder)
    for name, values in {
        "user": user,
        "item": item,
        "rating": code,
        "label": label,
        "timestamp": timestamp,
    }.items():
        save(name, values)
    save("split", split)
    save("offsets", offsets)
    (out_folder / "history_end.npy").unlink(missing_ok=True)
    if config.ties == "strict":
        save("history_end", history_end)
    save("item_count", item_count)
    save("item_likes", np.bincount(item[training & (label == 1)], minlength=n_items).astype(np.int32))
    save("user_fields", _fields(users, "user", config.user_fields, user_count[FIRST_ID:] > 0))
    save("item_fields", _fields(items, "item", config.item_fields, item_count[FIRST_ID:] > 0))
    _placeholders(users, "user").write_parquet(out_folder / "users.parquet")
    _placeholders(items, "item").write_parquet(out_folder / "items.parquet")

    histories = _Histories(user, item, offsets, item_count)
    cold_targets = _row_orders(save, config, histories, order, label)
    meta = {
        "user_fields": _sizes(users, "user", config.user_fields),
        "item_fields": _sizes(items, "item", config.item_fields),
        "rating_levels": [f"{level:g}" for level in levels],
        "n_users": n_users,
        "n_items": n_items,
        "n_events": len(user),
        "category_field": 1 + config.item_fields.index(config.category),
    }
    (out_folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

    metrics: dict[str, int | float] = {"samples": sum(map(len, order.values()))}
    metrics |= {name: len(rows) for name, rows in order.items()}
    metrics |= {"users": len(users), "items": len(items), "events": len(user)} | dropped
    metrics |= {
        "not_sample_short_history": int((~enough).sum()),
        "not_sample_no_label": int((label < 0).sum()),
    }
    metrics |= {f"positive_rate_{name}": float(label[rows].mean()) for name, rows in order.items()}
    sampled = np.zeros(n_users, dtype=bool)
    sampled[user[order["train"]]] = True
    for name in ("valid", "test"):
        metrics[f"cold_user_share_{name}"] = float((~sampled[user[order[name]]]).mean())
        metrics[f"unknown_user_share_{name}"] = float((user_count[user[order[name]]] == 0).mean())
        metrics[f"unknown_item_share_{name}"] = float((item_count[item[order[name]]] == 0).mean())
    return metrics | cold_targets | {"shared_second_share": float(same_second.mean())}


def _dense(
    events: pl.LazyFrame, users: pl.DataFrame, items: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, dict[str, int | float]]:
    """Events with dense ids in the log's order; users and items that have events, in order of their ids."""
    total = events.select(pl.len()).collect().item()
    events = events.filter(pl.col("timestamp").is_not_null())
    met = []
    for name, table in (("user", users), ("item", items)):
        ids = events.select(pl.col(name).unique()).collect(engine="streaming")
        unknown = ids.join(table, on=name, how="anti")
        if unknown.height:
            raise ValueError(
                f"{unknown.height} {name}s of events.parquet (first: {unknown[name][0]}) are not in "
                f"{name}s.parquet, wanted all; mend the dataset's recipe.py"
            )
        known = table.join(ids, on=name, how="semi").sort(name)
        met.append(known.rename({name: "external"}).with_row_index(name, FIRST_ID).cast({name: pl.Int32}))
    users, items = met
    frame = (
        events.join(users.lazy().select("external", dense_user="user"), left_on="user", right_on="external")
        .join(items.lazy().select("external", dense_item="item"), left_on="item", right_on="external")
        .select(
            user="dense_user",
            item="dense_item",
            rating=pl.col("rating").fill_null(float("nan")),
            label="label",
            timestamp="timestamp",
        )
        .collect(engine="streaming")
    )
    timed = frame.height
    # Dense ids ascend with external ids. An event that is there twice is kept once; rating and label as last
    # keys make the order, and so the one that is kept, independent of the order that the join hands rows on
    # in.
    frame = frame.sort("user", "timestamp", "item", "rating", "label")
    twice = pl.all_horizontal(
        pl.col("user", "timestamp", "item") == pl.col("user", "timestamp", "item").shift()
    )
    frame = frame.filter(~twice.fill_null(False))
    return frame, users, items, {"dropped_no_time": total - timed, "dropped_duplicates": timed - frame.height}


def _fields(table: pl.DataFrame, name: str, columns: Sequence[str], trained: Array) -> Array:
    """CRM ids `[2 + rows, 1 + columns]` int32: the id, then each attribute's value; 1 where never trained."""
    fields = np.zeros((FIRST_ID + table.height, 1 + len(columns)), dtype=np.int32)
    fields[1] = 1
    fields[FIRST_ID:, 0] = np.where(trained, table[name].to_numpy(), 1)
    for place, column in enumerate(columns, start=1):
        ids = _value_ids(table, name, column)
        known = np.zeros(ids.max() + 1, dtype=bool)
        known[ids[trained]] = True
        fields[FIRST_ID:, place] = np.where(known[ids], ids, 1)
    return fields


def _value_ids(table: pl.DataFrame, name: str, column: str) -> Array:
    """Ids from 2 on for the distinct values in ascending order, 1 for null."""
    if column not in table.columns:
        raise ValueError(
            f"prepare.{name}_fields names {column!r}, wanted columns of {name}s.parquet: {table.columns[2:]}"
        )
    return table[column].rank("dense").cast(pl.Int64).fill_null(0).to_numpy() + 1


def _sizes(table: pl.DataFrame, name: str, columns: Sequence[str]) -> list[dict[str, str | int]]:
    sizes: list[dict[str, str | int]] = [{"name": name, "size": FIRST_ID + table.height}]
    return sizes + [
        {"name": column, "size": FIRST_ID + table[column].drop_nulls().n_unique()} for column in columns
    ]


def _placeholders(table: pl.DataFrame, name: str) -> pl.DataFrame:
    """The table with null rows for padding and unknown in front, so that row i describes dense id i."""
    empty = pl.DataFrame({name: pl.Series([0, 1], dtype=pl.Int32)})
    return pl.concat([empty, table], how="diagonal")


def _row_orders(
    save: Any, config: PrepareConfig, histories: _Histories, order: dict[str, Array], label: Array
) -> dict[str, int | float]:
    """Writes orders, permutations, ranking rows and candidate lists; counts ranking targets that are cold."""
    metrics: dict[str, int | float] = {}
    wanted = {"valid": config.ranking_valid_rows, "test": config.ranking_test_rows}
    for name, rows in order.items():
        save(f"order_{name}", rows)
        permuted = draws.permutation(draws.derive(config.seed, "permutation", name), rows)
        save(f"permutation_{name}", permuted)
        if name == "train":
            continue
        ranking = permuted[label[permuted] == 1][: wanted[name]]
        save(f"ranking_{name}", ranking)
        metrics[f"ranking_{name}_rows"] = len(ranking)
        metrics[f"ranking_{name}_cold_targets"] = int(
            (histories.item_count[histories.item[ranking]] == 0).sum()
        )
        for kind in candidates.KINDS:
            lists = candidates.candidate_lists(histories, ranking, kind, config.candidates, config.seed)
            save(f"candidates_{name}_{kind}{config.candidates}", lists)
    return metrics


def _saver(folder: Path) -> Any:
    def save(name: str, values: Array) -> None:
        np.save(folder / f"{name}.npy", np.ascontiguousarray(values))

    return save
