"""Caser's convolutions against literal loops."""

from __future__ import annotations

import torch

from recllm.crm import CrmConfig
from recllm.crm.caser import Convolutions
from tests.crm.contract import CrmContract


class TestCaser(CrmContract):
    variant = "caser"


def test_convolutions_equal_literal_ones():
    torch.manual_seed(0)
    dim, length, filters = 3, 6, 2
    config = CrmConfig(name="caser", heights=[1, 3, 4], filters=filters, vertical=2)
    convolutions = Convolutions(dim, config).double()
    torch.nn.init.normal_(convolutions.bias)
    counts = [6, 4, 2, 1, 0]
    mask = torch.stack([torch.arange(length) >= length - count for count in counts])
    events = torch.randn(5, length, dim, dtype=torch.float64) * mask[..., None]
    got = convolutions(events, mask)
    assert got.shape == (5, 3 * filters + 2 * dim)
    rows = convolutions.rows.weight.view(-1, filters, dim)  # [row of a filter, filter, d_e]
    for b, count in enumerate(counts):
        history = events[b, length - count :]  # the events alone
        padded = torch.cat([torch.zeros(3, dim, dtype=torch.float64), history])
        wanted, first = [], 0
        for number, height in enumerate([1, 3, 4]):
            for k in range(filters):
                scores = [
                    (padded[3 + t - height + 1 : 3 + t + 1] * rows[first : first + height, k]).sum()
                    for t in range(count)
                ]
                bias = convolutions.bias[number * filters + k]
                wanted.append(torch.relu(max(scores) + bias) if scores else torch.zeros_like(bias))
            first += height
        for k in range(2):
            back = convolutions.vertical[:count, k].flip(0)  # row 0 weighs the latest event
            wanted.extend((back[:, None] * history).sum(0))
        torch.testing.assert_close(got[b], torch.stack(wanted), rtol=1e-9, atol=1e-12)


def test_histories_longer_than_the_positions_keep_the_latest(make_model, make_batch):
    model = make_model("caser").eval()
    batch = make_batch(4, 300)
    latest = {name: value[:, -256:] if name.startswith("recent") else value for name, value in batch.items()}
    torch.testing.assert_close(model(batch)[0], model(latest)[0])
