"""The product form: one wide LoRA equals the paper's sum over k, and plain LoRA where it must."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from recllm.reclora import RecLoraConfig, RecLoraLinear

N, R, D = 3, 2, 5  # meta-LoRAs, rank, width of the representation


def tiny_lm(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def perturbed(model, seed=1):
    """Gives every trainable parameter a value, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def reclora(lm, **arguments):
    config = {
        "r": R,
        "num_meta": N,
        "representation_dim": D,
        "gate_hidden": 6,
        "gate_temperature": 0.5,
    } | arguments
    return get_peft_model(lm, RecLoraConfig(**config))


def inputs(batch=3, seq=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 40, (batch, seq), generator=generator), torch.randn(
        batch, D, generator=generator, dtype=dtype
    )


class LiteralSum(nn.Module):
    """y = W x + s sum_k alpha_k B_k (A_k x), row by row and k by k."""

    def __init__(self, base, a, b, alpha, scale):
        super().__init__()
        self.base, self.a, self.b, self.alpha, self.scale = base, a, b, alpha, scale

    def forward(self, x):
        rows = []
        for row, alpha in zip(x, self.alpha, strict=True):
            update = sum(
                alpha[k] * (row @ self.a[k * R : (k + 1) * R].T) @ self.b[:, k * R : (k + 1) * R].T
                for k in range(N)
            )
            rows.append(row @ self.base.weight.T + self.scale * update)
        return torch.stack(rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("gate", ["shared", "module"])
@pytest.mark.parametrize("rescale", [False, True])
def test_wide_lora_equals_the_literal_sum_over_k(dtype, tolerance, gate, rescale):
    model = perturbed(reclora(tiny_lm(dtype), lora_alpha=6, gate=gate, rescale=rescale))
    ids, representation = inputs(dtype=dtype)
    got = model(ids, representation=representation).logits

    alpha = model.alpha(representation)  # [batch, N] or [batch, modules, N]
    literal = tiny_lm(dtype)
    for index, (name, layer) in enumerate(model.base_model.layers("default")):
        parent, child = name.rsplit(".", 1)
        a, b = layer.reclora_A["default"], layer.reclora_B["default"]
        own = alpha if gate == "shared" else alpha[:, index]
        scale = 6 / R * (N if rescale else 1)
        setattr(literal.get_submodule(parent), child, LiteralSum(layer.base_layer, a, b, own, scale))
    expected = literal(ids).logits
    assert (
        expected - tiny_lm(dtype)(ids).logits
    ).abs().max() > 1e-3  # the update is not lost in the tolerance
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def plain_lora(model, rank, lora_alpha):
    """Stock LoRA with the stacked A and B of `model`."""
    plain = get_peft_model(
        tiny_lm(), LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules=["q_proj", "v_proj"])
    ).eval()
    for name, layer in model.base_model.layers("default"):
        target = plain.base_model.model.get_submodule(name)
        target.lora_A["default"].weight.data = layer.reclora_A["default"].data
        target.lora_B["default"].weight.data = layer.reclora_B["default"].data
    return plain


@pytest.mark.parametrize("rescale", [False, True])
def test_uniform_gate_equals_plain_lora(rescale):
    """s / N_m = lora_alpha / (N_m r): a plain LoRA of rank N_m r with the same lora_alpha; rescale: N_m
    times it."""
    model = perturbed(reclora(tiny_lm(), lora_alpha=6, rescale=rescale))
    gate = model.base_model.reclora_gate["default"]
    gate.weight_2.data.zero_()
    gate.bias_2.data.zero_()
    ids, representation = inputs()
    plain = plain_lora(model, N * R, 6 * (N if rescale else 1))
    torch.testing.assert_close(
        model(ids, representation=representation).logits, plain(ids).logits, rtol=1e-9, atol=1e-9
    )


def test_a_is_drawn_as_in_lora_and_the_draws_differ():
    layer = RecLoraLinear(nn.Linear(4096, 8), None, "default", RecLoraConfig(r=8, num_meta=4))
    a = layer.reclora_A["default"].detach()
    assert a.shape == (32, 4096)
    assert layer.reclora_B["default"].shape == (8, 32)
    bound = 1 / math.sqrt(4096)  # kaiming-uniform, a = sqrt(5), fan-in d_in
    assert a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    meta = a.view(4, 8 * 4096)
    correlation = torch.corrcoef(meta) - torch.eye(4)
    assert correlation.abs().max() < 0.05
    assert layer.reclora_B["default"].abs().max() == 0


def test_with_b_zero_the_start_is_the_base_for_every_gate():
    model = reclora(tiny_lm())
    model.base_model.reclora_gate["default"].weight_2.data.normal_()
    ids, representation = inputs()
    alpha = model.alpha(representation)
    assert (alpha - 1 / N).abs().max() > 0.05
    assert torch.equal(model(ids, representation=representation).logits, tiny_lm()(ids).logits)


def test_bf16_base_keeps_float32_adapters_and_its_own_output_dtype():
    model = perturbed(reclora(tiny_lm(torch.bfloat16)))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    ids, representation = inputs(dtype=torch.float32)
    logits = model(ids, representation=representation).logits
    assert logits.dtype == torch.bfloat16
    exact = copy.deepcopy(model).float()(ids, representation=representation).logits
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_bf16_autocast_is_near_float32():
    model = perturbed(reclora(tiny_lm(torch.float32)))
    ids, representation = inputs(dtype=torch.float32)
    exact = model(ids, representation=representation).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, representation=representation).logits
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
