"""Row-sparse tables: the same training as dense ones where the two agree, and nothing else is touched."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from recllm.config.stages import FitConfig
from recllm.training.optimizer import RowAdamW, clip_norm, merged, optimizer


def table(rows=7, sparse=True, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Embedding(rows, 3, padding_idx=0, sparse=sparse, dtype=dtype)


def loss_of(tables, head, ids):
    """Two lookups of one table, so that gradients add up; ids repeat; row 0 is padding."""
    slopes = torch.linspace(-1, 2, ids.numel() * 3, dtype=torch.float64).view(*ids.shape, 3)
    return ((tables(ids) * slopes).sum(1) @ head.weight.t()).square().sum() + tables(ids.flip(0)).pow(3).sum()


IDS = torch.tensor([[1, 2, 2], [0, 5, 1]])


def both():
    """The same model dense and sparse, with gradients."""
    models = []
    for sparse in (False, True):
        lookup, head = table(sparse=sparse), nn.Linear(3, 2, bias=False, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(torch.arange(6.0).view(2, 3) / 7)
        loss_of(lookup, head, IDS).backward()
        models.append((lookup, head))
    return models


def test_merged_rows_are_those_of_coalesce_and_of_the_dense_gradient():
    (dense, _), (sparse, _) = both()
    grad = sparse.weight.grad
    assert not grad.is_coalesced()
    got, wanted = merged(grad), grad.coalesce()
    assert got.is_coalesced()
    assert merged(got) is got
    assert torch.equal(got.indices(), wanted.indices())
    assert got.indices().tolist() == [[1, 2, 5]]
    torch.testing.assert_close(got.values(), wanted.values(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.to_dense(), dense.weight.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("largest", [0.5, 1e6])
def test_clipping_is_that_of_the_dense_gradients(largest):
    (dense, head), (sparse, sparse_head) = both()
    wanted = nn.utils.clip_grad_norm_([dense.weight, head.weight], largest)
    got = clip_norm([sparse.weight, sparse_head.weight], largest)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)
    torch.testing.assert_close(sparse_head.weight.grad, head.weight.grad)


def trained(model, optimizer, batches):
    lookup, head = model
    for ids in batches:
        optimizer.zero_grad()
        loss_of(lookup, head, ids).backward()
        optimizer.step()
    return lookup.weight.detach(), head.weight.detach()


def optimizer_of(model, kind, weight_decay=0.0):
    lookup, head = model
    return kind([lookup.weight, head.weight], lr=0.1, weight_decay=weight_decay)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_where_every_step_touches_every_row_it_is_adamw(weight_decay):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    dense, sparse = both()
    wanted = trained(dense, optimizer_of(dense, torch.optim.AdamW, weight_decay), [ids] * 5)
    got = trained(sparse, optimizer_of(sparse, RowAdamW, weight_decay), [ids] * 5)
    # Row 0 is padding: it has no gradient, so only the dense optimizer decays it.
    torch.testing.assert_close(got[0][1:], wanted[0][1:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-10, atol=1e-12)


def test_rows_that_no_step_touches_stay_and_so_do_their_moments():
    _, model = both()
    before = model[0].weight.detach().clone()
    optimizer = optimizer_of(model, RowAdamW, weight_decay=0.3)
    after, _ = trained(model, optimizer, [IDS, IDS[:, :2]])
    moved = (after != before).any(1)
    assert moved.tolist() == [False, True, True, False, False, True, False]
    moments = optimizer.state[model[0].weight]
    for name in ("exp_avg", "exp_avg_sq"):
        assert (moments[name] != 0).any(1).tolist() == moved.tolist()


def test_it_is_sparse_adam_where_that_applies():
    _, model = both()
    other = copy.deepcopy(model)
    batches = [IDS, IDS[:, :2], IDS[:, 1:], IDS]
    head_of = torch.optim.AdamW([other[1].weight], lr=0.1, weight_decay=0)
    table_of = torch.optim.SparseAdam([other[0].weight], lr=0.1)
    got = trained(model, optimizer_of(model, RowAdamW), batches)
    for ids in batches:
        head_of.zero_grad()
        table_of.zero_grad()
        loss_of(*other, ids).backward()
        head_of.step()
        table_of.step()
    # It adds eps before the bias correction, AdamW after it.
    torch.testing.assert_close(got[0], other[0].weight.detach(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(got[1], other[1].weight.detach(), rtol=1e-5, atol=1e-9)


def test_its_state_survives_a_checkpoint_to_the_bit(tmp_path):
    _, model = both()
    whole, half = copy.deepcopy(model), copy.deepcopy(model)
    wanted = trained(whole, optimizer_of(whole, RowAdamW), [IDS, IDS[:, :2], IDS])
    optimizer = optimizer_of(half, RowAdamW)
    trained(half, optimizer, [IDS])
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    resumed = optimizer_of(half, RowAdamW)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True)["optimizer"])
    got = trained(half, resumed, [IDS[:, :2], IDS])
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_a_learning_rate_schedule_reaches_the_rows():
    moves = []
    for factor in (1.0, 0.5):
        model = (table(), nn.Linear(3, 2, bias=False, dtype=torch.float64))
        optimizer = optimizer_of(model, RowAdamW)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, factor=factor: factor)
        before = model[0].weight.detach().clone()
        moves.append(trained(model, optimizer, [IDS])[0] - before)
    torch.testing.assert_close(moves[1], moves[0] / 2, rtol=1e-9, atol=1e-12)


def test_float32_indices_beyond_int32_are_not_cut():
    rows = 2**31 + 10  # a gradient of a table that nobody has to hold
    indices = torch.tensor([[rows - 1, 3, rows - 1]])
    grad = torch.sparse_coo_tensor(indices, torch.ones(3, 1), (rows, 1), check_invariants=False)
    got = merged(grad)
    assert got._indices().tolist() == [[3, rows - 1]]
    assert got._values().tolist() == [[1.0], [2.0]]


def test_padding_is_never_trained():
    _, model = both()
    with torch.no_grad():
        model[0].weight[0] = 0
    after, _ = trained(model, optimizer_of(model, RowAdamW), [IDS] * 3)
    assert (after[0] == 0).all()
    assert functional.embedding(torch.tensor(1), after).abs().sum() > 0


def rates(**arguments):
    """The learning rate of each of 8 steps."""
    fit = FitConfig(lr=0.5, warmup=0.5)
    plan = optimizer(nn.Linear(2, 2), fit, 8, **arguments)
    adam, schedule = plan["optimizer"], plan["lr_scheduler"]["scheduler"]
    found = []
    for _ in range(8):
        found.append(adam.param_groups[0]["lr"])
        adam.step()
        schedule.step()
    return found


def test_rates_by_hand():
    """Up in 4 of 8 steps and down; with 4 last ones, up in 2 of 4 and down, twice, then a tenth as high."""
    assert rates() == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.375, 0.25, 0.125])
    once = [0.25, 0.5, 0.5, 0.25]
    last = [0.1 * rate for rate in once]
    assert rates(newest_steps=4, newest_lr=0.1) == pytest.approx(once + last)
