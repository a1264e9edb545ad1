"""Figures of mixing weights, by hand."""

import math

import numpy as np
import pytest

from recllm.evaluation.gates import GateRecord, asked_rows, distances, entropy, explained, grouped_mean


def test_entropy_is_a_share_of_a_uniform_gates():
    alpha = np.array([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    # log 4 / log 4; 0; log 2 / log 4
    np.testing.assert_allclose(entropy(alpha), [1.0, 0.0, 0.5], atol=1e-9)
    # -(.9 ln .9 + .1 ln .1) = .0948 + .2303 = .3251; over ln 2 = .6931 it is .4690
    np.testing.assert_allclose(entropy(np.array([[[0.9, 0.1]]])), [[0.4690]], atol=1e-4)
    assert entropy(np.ones((3, 1))).tolist() == [0, 0, 0]  # one meta-LoRA: nothing is mixed


def test_distance_is_the_weight_that_would_have_to_move():
    some = np.array([[0.5, 0.3, 0.2]])
    others = np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2]])
    np.testing.assert_allclose(distances(some, others), [[0.0, 0.3, 0.1]])
    np.testing.assert_allclose(distances(np.eye(2), np.eye(2)), [[0, 1], [1, 0]])


def test_variance_that_groups_explain():
    alpha = np.array([[0.1, 0.9], [0.3, 0.7], [0.5, 0.5], [0.7, 0.3]])
    # Group means .2 and .6: within 2 * 4 * .1^2 = .08; total 2 * (.3^2 + .1^2 + .1^2 + .3^2) = .4.
    assert explained(np.array([7, 7, 9, 9]), alpha) == pytest.approx(1 - (0.08 / 2) / (0.4 / 3))
    # Groups with means that are the same (.4): within is the total, so less than nothing: 1 - (.4/2)/(.4/3).
    assert explained(np.array([0, 1, 1, 0]), alpha) == pytest.approx(-0.5)
    assert math.isnan(explained(np.arange(4), alpha))  # every row its own group
    assert math.isnan(explained(np.array([0, 0, 1]), np.full((3, 2), 0.5)))  # nothing varies


def test_means_of_groups():
    alpha = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    np.testing.assert_allclose(grouped_mean(np.array([1, 0, 1]), alpha, 2), [[0, 1], [0.75, 0.25]])


def test_rows_are_of_whole_users_in_random_order(demo_log):
    rows = asked_rows(demo_log, each=3, most=20)
    valid = demo_log.rows("valid", "1.0")
    assert len(set(rows.tolist())) == len(rows) <= 20
    assert np.isin(rows, valid).all()
    users = demo_log.user[rows]
    changes = np.flatnonzero(np.diff(users)) + 1
    blocks = np.split(rows, changes)
    assert len(blocks) == len(set(users.tolist())) > 3  # a user's rows stand together
    of_valid = demo_log.user[valid]
    order = list(dict.fromkeys(of_valid.tolist()))
    assert [demo_log.user[block[0]] for block in blocks] == order[: len(blocks)]
    for block in blocks:  # the first rows of the user in the permutation, up to three
        own = valid[of_valid == demo_log.user[block[0]]]
        assert block.tolist() == own[:3].tolist()
    assert len(rows) + min(3, int((of_valid == order[len(blocks)]).sum())) > 20  # the next one had no place
    assert len(asked_rows(demo_log, each=10**6, most=10**9)) == len(valid)
    assert len(asked_rows(demo_log, each=3, most=1)) in (1, 2, 3)  # one user at least


def test_a_record_is_read_as_it_was_written_and_averaged_by_user(demo_log, tmp_path):
    rows = asked_rows(demo_log, each=2, most=10)
    alpha = np.random.default_rng(0).dirichlet(np.ones(4), (len(rows), 3)).astype(np.float32)
    GateRecord(rows, alpha).save(tmp_path / "gate.npz")
    record = GateRecord.read(tmp_path / "gate.npz")
    assert record.rows.tolist() == rows.tolist()
    assert (record.alpha == alpha).all()
    users, means, last = record.by_user(demo_log)
    assert users.tolist() == list(dict.fromkeys(demo_log.user[rows].tolist()))
    for user, mean, row in zip(users, means, last, strict=True):
        own = demo_log.user[rows] == user
        np.testing.assert_allclose(mean, alpha[own].mean((0, 1)), atol=1e-6)
        assert row == rows[own].max()


def test_the_summary_of_a_uniform_gate():
    record = GateRecord(np.arange(5), np.full((5, 1, 8), 0.125, np.float32))
    assert record.summary() == pytest.approx({"entropy": 1.0, "largest": 0.125, "spread": 0.0})
