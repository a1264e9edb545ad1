"""Lists of the given vectors are the best items that a user has not met, and peers read the same arrays."""

from __future__ import annotations

import json

import numpy as np

from bench.recommend_peers import Asked, over_fastest_peer, search


def small(seed=0):
    rng = np.random.default_rng(seed)
    users, items = (rng.normal(size=(count, 8)).astype(np.float32) for count in (6, 40))
    met = [rng.choice(40, size, replace=False) for size in (0, 3, 10, 1, 20, 5)]
    ends = np.concatenate([[0], np.cumsum([len(own) for own in met])])
    return Asked(users, items, ends, np.concatenate(met).astype(np.int32)), met


def test_lists_hold_the_best_items_that_were_not_met(tmp_path, capsys):
    asked, met = small()
    asked.write(tmp_path)
    search(tmp_path, threads=1, k=4, kind="exact")
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"wall", "cpu", "peak_gb"}
    assert figures["wall"] > 0
    lists = np.load(tmp_path / "lists_recllm_exact.npy")
    for user, own in enumerate(met):
        scores = asked.items @ asked.users[user]
        scores[own] = -np.inf
        assert lists[user].tolist() == np.argsort(-scores)[:4].tolist()


def test_arrays_come_back_as_they_were_written(tmp_path):
    asked, met = small()
    asked.write(tmp_path)
    again = Asked.read(tmp_path)
    np.testing.assert_array_equal(again.items, asked.items)
    excluded = again.excluded()
    assert excluded.item[excluded.place == 2].tolist() == met[2].tolist()


def test_ratios_are_over_the_fastest_peer_by_each_clock():
    figures = {
        "recllm exact": {"wall": 30.0, "cpu": 30.0, "peak_gb": 1.0},
        "implicit als": {"wall": 10.0, "cpu": 5.0, "peak_gb": 1.0},
        "rectools als": {"wall": 5.0, "cpu": 20.0, "peak_gb": 1.0},
    }
    assert over_fastest_peer(figures) == {"recllm exact": {"wall": 3.0, "cpu": 1.5}}
