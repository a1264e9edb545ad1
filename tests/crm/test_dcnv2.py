"""DCN V2's cross layers against literal loops."""

from __future__ import annotations

import torch

from recllm.crm.dcnv2 import CrossNetwork
from tests.crm.contract import CrmContract


class TestDCNv2(CrmContract):
    variant = "dcnv2"


def test_cross_layers_equal_the_paper():
    torch.manual_seed(0)
    cross = CrossNetwork(4, 3).double()
    inputs = torch.randn(2, 4, dtype=torch.float64)
    got = cross(inputs)
    for b in range(2):
        x0 = inputs[b].tolist()
        x = list(x0)
        for layer in cross.layers:
            weight, bias = layer.weight.tolist(), layer.bias.tolist()
            product = [sum(weight[i][j] * x[j] for j in range(4)) + bias[i] for i in range(4)]
            x = [x0[i] * product[i] + x[i] for i in range(4)]
        torch.testing.assert_close(got[b], torch.tensor(x, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_a_layer_by_hand():
    """x0 = (2, 3), W = ((0, 1), (0, 0)), b = (1, 0): W x + b = (4, 0), so x1 = (2 * 4 + 2, 3 * 0 + 3)."""
    cross = CrossNetwork(2, 1)
    with torch.no_grad():
        cross.layers[0].weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        cross.layers[0].bias.copy_(torch.tensor([1.0, 0.0]))
    assert cross(torch.tensor([[2.0, 3.0]])).tolist() == [[10.0, 3.0]]
