"""What reads the representation, against hand arithmetic."""

import math

import pytest
import torch

from recllm.reclora import Gate, RecLoraConfig
from recllm.reclora.heads import SoftPrompt
from tests.reclora.gated import D, inputs, trained


def small_gate(num_gates=1, **arguments):
    torch.manual_seed(0)
    config = RecLoraConfig(**({"num_meta": 2, "representation_dim": 2, "gate_hidden": 6} | arguments))
    return Gate(num_gates, config).double()


def test_alpha_starts_uniform_whatever_the_representation():
    alpha = Gate(3, RecLoraConfig(num_meta=4, representation_dim=5))(torch.randn(2, 1, 5) * 100)
    assert alpha.shape == (3, 2, 1, 4)
    torch.testing.assert_close(alpha, torch.full_like(alpha, 0.25), rtol=0, atol=0)


def test_alpha_by_hand():
    gate = small_gate(gate_hidden=2, gate_temperature=2.0)
    with torch.no_grad():
        gate.weight_1.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
        gate.bias_1.copy_(torch.tensor([[0.0, 1.0]]))
        gate.norm_weight.fill_(3.0)
        gate.norm_bias.fill_(1.0)
        gate.weight_2.copy_(torch.tensor([[[1.0, 0.5], [0.0, 2.0]]]))
        gate.bias_2.copy_(torch.tensor([[0.0, 1.0]]))
    # x = (5, 1): W_1 x + b_1 = (5, 2): mean 3.5, variance 2.25. LN: (1.5, -1.5) / sqrt(2.25 + 1e-5).
    # times 3 plus 1: (+, -), ReLU: (h, 0). beta = (h, 1). alpha_0 = 1 / (1 + exp((1 - h) / 2)).
    h = 3 * 1.5 / math.sqrt(2.25 + 1e-5) + 1
    expected = 1 / (1 + math.exp((1 - h) / 2))
    alpha = gate(torch.tensor([[[5.0, 1.0]]], dtype=torch.float64))
    torch.testing.assert_close(alpha[0, 0, 0], torch.tensor([expected, 1 - expected], dtype=torch.float64))


def test_statistics_whiten_the_input():
    gate, plain = small_gate(), small_gate()
    with torch.no_grad():
        gate.weight_2.normal_()
    plain.load_state_dict(gate.state_dict())
    # Variance 4 along (3, 4) / 5, none across it, a floor of 1e-4 of it: 1 / sqrt(4.0004), 1 / sqrt(.0004).
    along, across = torch.tensor([0.6, 0.8]).double(), torch.tensor([0.8, -0.6]).double()
    gate.set_statistics(torch.tensor([1.0, 7.0]), 4 * torch.outer(along, along))
    raw = torch.tensor([[[1.0, 7.0]]]).double() + 3 * along + 0.5 * across
    by_hand = 3 / math.sqrt(4.0004) * along + 0.5 / math.sqrt(0.0004) * across
    torch.testing.assert_close(gate(raw), plain(by_hand[None, None]), rtol=1e-6, atol=1e-9)
    assert not torch.allclose(gate(raw), plain(raw))


def test_whitened_rows_vary_alike_in_all_directions_but_the_narrowest():
    torch.manual_seed(1)
    gate = small_gate(representation_dim=3)
    spread = torch.tensor([10.0, 3.0, 0.01]).double()
    rows = torch.randn(500, 3).double() * spread @ torch.linalg.qr(torch.randn(3, 3).double())[0]
    covariance = torch.cov(rows.T, correction=0)
    gate.set_statistics(rows.mean(0), covariance)
    white = torch.linalg.eigvalsh(torch.cov(((rows - gate.mean) @ gate.whiten).T, correction=0))
    variance = torch.linalg.eigvalsh(covariance)
    torch.testing.assert_close(white, variance / (variance + 1e-4 * variance[-1]), rtol=1e-4, atol=1e-6)
    assert white[1] > 0.8
    assert white[0] < 0.05


def test_without_variance_the_representation_is_only_centred():
    gate = small_gate()
    gate.set_statistics(torch.tensor([1.0, 7.0]), torch.zeros(2, 2))
    assert torch.equal(gate.whiten, torch.eye(2).double())


def test_stacked_gates_equal_single_ones():
    stacked = small_gate(num_gates=3)
    with torch.no_grad():
        stacked.weight_2.normal_()
    x = torch.randn(4, 2, 2, dtype=torch.float64)
    alphas = stacked(x)
    assert not torch.allclose(alphas[0], alphas[1])
    for index in range(3):
        single = small_gate()
        for name, parameter in single.named_parameters():
            parameter.data.copy_(dict(stacked.named_parameters())[name][index : index + 1])
        torch.testing.assert_close(single(x)[0], alphas[index], rtol=0, atol=1e-12)


def test_alpha_keeps_its_precision_under_autocast():
    gate = Gate(1, RecLoraConfig(num_meta=4, representation_dim=8))
    with torch.no_grad():
        gate.weight_2.normal_()
    x = torch.randn(3, 1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        alpha = gate(x)
    assert alpha.dtype == torch.float32
    torch.testing.assert_close(alpha, gate(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (torch.zeros(3), torch.eye(2), r"mean has shape \[3\], wanted \[2\]"),
        (torch.zeros(2), torch.ones(2), r"covariance has shape \[2\], wanted \[2, 2\]"),
        (torch.zeros(2), torch.diag(torch.tensor([1.0, -1.0])), "negative"),
        (torch.zeros(2), -torch.eye(2), "negative"),
        (torch.tensor([0.0, float("nan")]), torch.eye(2), "not finite"),
    ],
)
def test_wrong_statistics_are_refused(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        small_gate().set_statistics(mean, covariance)


def test_core_starts_at_the_identity_and_adds_what_the_head_gives():
    gate = small_gate(num_gates=2, mixture="core", r=3)
    x = torch.randn(4, 1, 2, dtype=torch.float64)
    assert torch.equal(gate(x), torch.eye(3, dtype=torch.float64).expand(2, 4, 1, 3, 3))
    with torch.no_grad():
        gate.bias_2[1] = torch.arange(9.0)
    expected = torch.tensor([[1.0, 1, 2], [3, 5, 5], [6, 7, 9]], dtype=torch.float64)  # row by row, plus I
    assert torch.equal(gate(x)[1, 0, 0], expected)
    assert torch.equal(gate(x)[0, 0, 0], torch.eye(3, dtype=torch.float64))


def test_a_soft_prompt_starts_as_tokens_of_the_vocabulary_whoever_asks():
    torch.manual_seed(0)
    table = torch.randn(7, 4)
    prompt = SoftPrompt(RecLoraConfig(soft_prompt=3, representation_dim=2), table)
    tokens = prompt(torch.randn(5, 2, 2))
    assert tokens.shape == (5, 2, 3, 4)
    assert torch.equal(tokens, tokens[:1, :1].expand(5, 2, -1, -1))
    for token in tokens[0, 0]:
        assert (token == table).all(1).any()
    prompt.weight_2.data.normal_()
    tokens = prompt(torch.randn(5, 2, 2))
    assert not torch.allclose(tokens[0, 0], tokens[1, 0])


@pytest.mark.parametrize("convert", [
    lambda model: model.half(),
    lambda model: model.bfloat16(),
    lambda model: model.to(torch.bfloat16),
    lambda model: model.to(device="cpu", dtype=torch.float16),
    lambda model: model.type(torch.bfloat16),
    lambda model: model.bfloat16().half().to(torch.bfloat16),
])  # fmt: skip
def test_in_16_bit_heads_stay_what_they_are(convert):
    """Lightning's `bf16-true` converts so; whitening entries of thousands would be off by 8."""
    model = trained(soft_prompt=2).float()
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(100, D, generator=generator) * torch.tensor([0.3, 1e-2, 1e-3, 1e-4, 2e-5])
    model.base_model.set_statistics(sample.mean(0), torch.cov(sample.T))
    assert model.base_model.reclora_gate["default"].whiten.abs().max() > 300
    expected = model.base_model.alpha(sample)
    before = {name: value.clone() for name, value in model.base_model.reclora_gate.state_dict().items()}
    convert(model)
    after = model.base_model.reclora_gate.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert torch.equal(model.base_model.alpha(sample), expected)
    heads = (*model.base_model.reclora_gate.values(), *model.base_model.reclora_prompt.values())
    assert {value.dtype for head in heads for value in head.state_dict().values()} == {torch.float32}
    layer = model.base_model.layers("default")[0][1]
    assert {layer.reclora_A["default"].dtype, layer.base_layer.weight.dtype} <= {
        torch.bfloat16,
        torch.float16,
    }
    ids, _ = inputs()
    assert model(ids, representation=sample[:3]).logits.dtype == layer.base_layer.weight.dtype


def test_wider_and_other_devices_are_taken():
    model = trained().float()
    gate = model.base_model.reclora_gate["default"]
    assert gate.mean.dtype == gate.weight_1.dtype == torch.float32
    before = gate.weight_1.detach().clone()
    model.double()
    assert gate.weight_1.dtype == torch.float64
    model.half()
    assert gate.weight_1.dtype == torch.float64
    model.float()
    assert torch.equal(gate.weight_1, before)
    gate.weight_1.grad = torch.ones_like(gate.weight_1)
    model.bfloat16()
    assert gate.weight_1.grad.dtype == torch.float32
    assert model.to("meta").base_model.reclora_gate["default"].weight_1.is_meta
