"""The published protocols of conf/dataset, to the letter, on files that are no part of this repository."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recllm import metrics
from recllm.config.merge import load_yaml, merge
from recllm.eventlog.build import build_log
from recllm.eventlog.log import EventLog
from recllm.systems.counting import Cooccurrence, Popularity
from tests.recipes.own_recipe import recipe

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "datasets"


def prepared(name, folder):
    """Metrics and log of a data set as its YAML says."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not at hand; its license keeps it out of here")
    file = REPOSITORY / "conf" / "dataset" / f"{name}.yaml"
    config = merge([(str(file), load_yaml(file))], {})
    recipe.make(folder / "tables", SHARED / name, config.source)
    metrics = build_log(folder / "tables", folder / "log", config.prepare)
    log = EventLog.open(folder / "log")
    assert not log.shows_labels  # all events are alike, those that stand in lists only too
    return metrics, log


def externals(log):
    return [
        pl.read_parquet(log.folder / f"{name}.parquet")["external"].to_list() for name in ("users", "items")
    ]


def popularity(log, count, remove_seen):
    """HR@10 and NDCG@10 of all test rows, ties by the smaller id, over the whole catalog."""
    rows = log.rows("test", "all")
    order = np.argsort(-count[2:], kind="stable") + 2
    start, end = log.history(rows)
    places = []
    for row, first, last in zip(rows, start, end, strict=True):
        ranked = order[: 10 + last - first]
        if remove_seen:
            ranked = ranked[~np.isin(ranked, log.item[first:last])]
        found = np.flatnonzero(ranked[:10] == log.item[row])
        places.append(found[0] if len(found) else -1)
    places = np.array(places)
    hit = places >= 0
    return round(hit.mean(), 4), round((hit / np.log2(np.maximum(places, 0) + 2)).mean(), 4)


def test_amazon14_beauty(tmp_path):
    metrics, log = prepared("amazon14-beauty", tmp_path)
    assert [metrics[name] for name in ("users", "items", "events")] == [22_363, 12_101, 198_502]
    assert [metrics[name] for name in ("train", "valid", "test")] == [131_413, 22_363, 22_363]
    # Published popularity counts test events too (S3-Rec's PopRec); counted on training events it is lower.
    every = np.bincount(log.item[: log.n_events], minlength=log.n_items)
    assert popularity(log, every, remove_seen=True) == (0.0152, 0.0068)
    assert popularity(log, log.item_count, remove_seen=True) == (0.0115, 0.0055)


def test_minionerec_industrial(tmp_path):
    metrics, log = prepared("minionerec-industrial", tmp_path)
    assert [metrics[name] for name in ("train", "valid", "test", "items")] == [35_887, 4_532, 4_533, 3_686]
    assert metrics["train_after_held_out"] == 0
    users, items = externals(log)
    for split in ("valid", "test"):
        rows = log.rows(split, "all")
        found = sorted(
            (
                users[log.user[row]],
                " ".join(items[item] for item in log.item[first:last]),
                items[log.item[row]],
            )
            for row, first, last in zip(rows, *log.history(rows), strict=True)
        )
        with (SHARED / "minionerec-industrial" / f"{split}.csv").open() as file:
            wanted = [
                (line["user_id"], line["history_item_id"], line["item_id"]) for line in csv.DictReader(file)
            ]
        assert found == sorted(wanted)
    targets = np.bincount(log.item[log.rows("train", "all")], minlength=log.n_items)
    assert popularity(log, targets, remove_seen=False)[0] == pytest.approx(0.0556, abs=5e-4)  # ties


def test_sdpo_lastfm(tmp_path):
    metrics, log = prepared("sdpo-lastfm", tmp_path)
    assert [metrics[name] for name in ("train", "valid", "test", "items")] == [47_872, 2_767, 2_495, 4_606]
    titles = pl.read_parquet(log.folder / "items.parquet")["title"].to_list()
    respelled = {"Florence and the Machine": "Florence + the Machine", "Plus 44": "+44"}
    for split, name in (("valid", "val"), ("test", "test")):
        rows, lists = log.ranking(split, "given20")
        found = sorted(
            (
                [titles[item] for item in log.item[first:last]],
                [titles[item] for item in line],
                titles[log.item[row]],
            )
            for row, first, last, line in zip(rows, *log.history(rows), lists, strict=True)
        )
        wanted = []
        for text in (SHARED / "sdpo-lastfm" / f"sdpo_{name}.jsonl").read_text().splitlines():
            line = json.loads(text)
            history, among = (
                [respelled.get(each, each) for each in line[key]] for key in ("history", "candidates")
            )
            wanted.append((history, among, respelled.get(line["target"], line["target"])))
        assert found == sorted(wanted)
        assert lists.shape == (metrics[split], 20)


def test_sdpo_lastfm_has_one_order_of_artists_for_all_users(tmp_path):
    """So its lists are no one's listening in time, and what follows what is found by counting."""
    _, log = prepared("sdpo-lastfm", tmp_path)
    in_order = Counter()
    rows = log.rows("train", "all")
    for row, first, last in zip(rows, *log.history(rows), strict=True):
        in_order.update((item, int(log.item[row])) for item in set(log.item[first:last].tolist()))
    both = {pair: count for pair, count in in_order.items() if count + in_order[pair[::-1]] >= 5}
    assert len(both) > 6_000
    assert not any(pair[::-1] in both for pair in both)  # never once the other way around
    rows, lists = log.ranking("test", "given20")
    own = (lists == log.item[rows][:, None]).argmax(1)
    hits = {}
    for system in (Popularity(log), Cooccurrence(log, directed=False), Cooccurrence(log, directed=True)):
        values = metrics.ranking_values(system.rank(rows, lists), own)
        hits[system.name] = round(float(values["hr@1"].mean()), 3)
    assert hits == {"popularity": 0.257, "cooccurrence": 0.432, "cooccurrence-directed": 0.723}
