"""The public code's layer, as it is measured, computes what the mixture `factor` computes."""

import torch
from torch import nn

from bench.anchors import GeneratedLora
from recllm.reclora import RecLoraConfig
from recllm.reclora.mixture import plain_lora, weigh


def test_generated_weights_are_the_mixture_factor():
    torch.manual_seed(0)
    layer = GeneratedLora(nn.Linear(6, 5, bias=False), num_meta=3, r=2, dim=4, scale=2.0)
    nn.init.normal_(layer.b.weight)
    x, layer.representation = torch.randn(2, 7, 6), torch.randn(2, 4)
    config = RecLoraConfig(r=2, lora_alpha=4, num_meta=3, mixture="factor", representation_dim=4)
    a = layer.a.weight.view(2, 6, 3).permute(2, 0, 1).flatten(0, 1)  # [3 * 2, 6]
    b = layer.b.weight.view(5, 2, 3).permute(0, 2, 1).flatten(1)  # [5, 3 * 2]
    y = layer(x)
    for row in range(2):
        alpha = torch.softmax(layer.gate(layer.representation[row]) / 5, -1)
        left, right = plain_lora(a, b, weigh(alpha, config), config)
        expected = layer.base(x[row]) + x[row] @ left.T @ right.T
        torch.testing.assert_close(y[row], expected, rtol=1e-5, atol=1e-6)
