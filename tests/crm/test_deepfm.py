"""DeepFM's terms against literal loops."""

from __future__ import annotations

import pytest
import torch

from recllm.crm.deepfm import pairs
from tests.crm.contract import CrmContract


class TestDeepFM(CrmContract):
    variant = "deepfm"


def test_the_fm_term_is_the_sum_of_inner_products_of_pairs():
    torch.manual_seed(0)
    fields = torch.randn(4, 5, 3, dtype=torch.float64)
    wanted = torch.zeros(4, dtype=torch.float64)
    for b in range(4):
        for f in range(5):
            for g in range(f + 1, 5):
                wanted[b] += sum(fields[b, f, i] * fields[b, g, i] for i in range(3))
    torch.testing.assert_close(pairs(fields), wanted, rtol=1e-12, atol=1e-12)
    # By hand: (1,2).(3,4) + (1,2).(5,6) + (3,4).(5,6) = 11 + 17 + 39
    assert pairs(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])).item() == 67


def test_the_logit_is_first_order_plus_pairs_plus_mlp(make_model, make_batch):
    model = make_model("deepfm").double().eval()
    for value in model.weights.parameters():
        torch.nn.init.normal_(value)
    batch = make_batch(6, 5)
    logit, representation = model(batch)
    tables = [*model.embeddings.user, *model.embeddings.item]
    ids = torch.cat([batch["user"], batch["item"]], 1)
    history = model.history(model.embeddings, batch)
    for b in range(6):
        fields = [table.weight[ids[b, f]] for f, table in enumerate(tables)] + list(history[b])
        mlp, last = model.tower(torch.cat(fields)[None])
        first = sum(table.weight[ids[b, f], 0] for f, table in enumerate(model.weights))
        second = pairs(torch.stack(fields)[None])
        torch.testing.assert_close(logit[b], (first + second + mlp)[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(representation[b], last[0], rtol=1e-9, atol=1e-12)


def test_history_fields_are_weighted_means_of_events(make_model, make_batch):
    model = make_model("deepfm").double().eval()
    batch = make_batch(6, 5)
    batch["recent_mask"][1] = False
    got = model.history(model.embeddings, batch)
    assert got.shape == (6, 5, 8)
    table, fields = model.embeddings, model.history
    for b in range(6):
        wanted = torch.zeros(4, 8, dtype=torch.float64)
        mean = torch.zeros(8, dtype=torch.float64)
        count = int(batch["recent_mask"][b].sum())
        for t in range(5):
            if batch["recent_mask"][b, t]:
                rating = table.rating.weight[batch["recent_rating"][b, t]]
                interval = table.interval.weight[batch["recent_interval"][b, t]]
                mean += torch.cat([rating, interval]) / count
                weights = fields.of_rating(rating) + fields.of_interval(interval)
                item, category = batch["recent_item"][b, t, 0], batch["recent_item"][b, t, 2]
                for c in range(2):
                    wanted[c] += weights[c] * table.item[0].weight[item] / count
                    wanted[2 + c] += weights[c] * table.item[2].weight[category] / count
        torch.testing.assert_close(got[b, :4], wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got[b, 4], fields.join(mean), rtol=1e-9, atol=1e-12)
    assert not got[1, :4].any()


def test_events_without_a_rating_train_the_weight_that_they_have(make_model, make_batch):
    model = make_model("deepfm").double().eval()
    batch = make_batch(6, 5)
    batch["recent_rating"][:, ::2] = 0  # events all the same
    bias = model.history.of_rating.bias

    def total():
        return model.history(model.embeddings, batch).sin().sum()

    total().backward()
    with torch.no_grad():
        for place in range(2):
            values = []
            for step in (1e-6, -1e-6):
                bias[place] += step
                values.append(float(total()))
                bias[place] -= step
            assert bias.grad[place] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)
