"""DIN against a literal reference."""

from __future__ import annotations

import torch

from tests.crm.contract import RECENT, CrmContract, ModelContract


class TestDIN(CrmContract):
    variant = "din"


class TestDinLm(ModelContract):
    variant = "din-lm"
    reads = (*RECENT, "recent_dense")


def test_din_equals_ten_literal_lines(make_model, make_batch):
    model = make_model("din").double().eval()
    batch = make_batch(8, 6)
    tables, unit = model.embeddings, model.attention
    logit, representation = model(batch)
    for b in range(8):
        users = [table.weight[batch["user"][b, f]] for f, table in enumerate(tables.user)]
        items = [table.weight[batch["item"][b, f]] for f, table in enumerate(tables.item)]
        target = torch.cat([items[0], items[2]])
        interest = torch.zeros(tables.event_dim, dtype=torch.float64)
        for t in batch["recent_mask"][b].nonzero()[:, 0]:
            ids = (batch["recent_item"][b, t, 0], batch["recent_item"][b, t, 2])
            what = torch.cat([tables.item[0].weight[ids[0]], tables.item[2].weight[ids[1]]])
            rating = tables.rating.weight[batch["recent_rating"][b, t]]
            event = torch.cat([what, rating, tables.interval.weight[batch["recent_interval"][b, t]]])
            hidden = torch.relu(unit.first(torch.cat([event, target, what - target, what * target])))
            interest += unit.rest[0](hidden) * event
        wanted = model.tower(torch.cat([*users, *items, interest])[None])
        torch.testing.assert_close(logit[b], wanted[0][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(representation[b], wanted[1][0], rtol=1e-9, atol=1e-12)
