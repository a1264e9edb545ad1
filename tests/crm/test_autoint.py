"""AutoInt's interacting layer against literal loops."""

from __future__ import annotations

import math

import torch

from recllm.crm.autoint import InteractingLayer
from tests.crm.contract import CrmContract


class TestAutoInt(CrmContract):
    variant = "autoint"


def test_the_interacting_layer_equals_the_paper():
    torch.manual_seed(0)
    fields, dim, hidden, heads = 4, 3, 6, 2
    width = hidden // heads
    layer = InteractingLayer(dim, hidden, heads).double()
    inputs = torch.randn(2, fields, dim, dtype=torch.float64)
    query, key, value, residual = layer.project.weight.split(hidden)
    got = layer(inputs)
    assert got.shape == (2, fields, hidden)
    for b in range(2):
        e = inputs[b]
        for m in range(fields):
            joined = []
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                psi = [((query[part] @ e[m]) @ (key[part] @ e[k])).item() for k in range(fields)]
                total = sum(math.exp(one) for one in psi)
                joined.append(sum(math.exp(psi[k]) / total * (value[part] @ e[k]) for k in range(fields)))
            wanted = torch.relu(torch.cat(joined) + residual @ e[m])
            torch.testing.assert_close(got[b, m], wanted, rtol=1e-9, atol=1e-12)


def test_the_mlp_reads_fields_and_what_becomes_of_them(make_model, make_batch):
    model = make_model("autoint").eval()
    batch = make_batch(5, 6)
    tables = [*model.embeddings.user, *model.embeddings.item]
    ids = torch.cat([batch["user"], batch["item"]], 1)
    own = torch.stack([table(ids[:, f]) for f, table in enumerate(tables)], 1)
    fields = torch.cat([own, model.history(model.embeddings, batch)], 1)
    assert len(model.interacting) == 2
    out = model.interacting[1](model.interacting[0](fields))
    wanted = model.tower(torch.cat([fields.flatten(1), out.flatten(1)], 1))
    torch.testing.assert_close(model(batch)[0], wanted[0])
    torch.testing.assert_close(model(batch)[1], wanted[1])
