"""The mixtures in a model: equal to their literal loops, and to plain LoRA where they must be."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from recllm.reclora import RecLoraConfig, RecLoraLinear
from tests.reclora.gated import D, N, R, config, perturb, tiny_lm


def reclora(lm, **arguments):
    return get_peft_model(lm, config(**arguments))


def inputs(batch=3, seq=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 40, (batch, seq), generator=generator), torch.randn(
        batch, D, generator=generator, dtype=dtype
    )


class Literal(nn.Module):
    """W x + the mixture of A and B (less that of A0 and B0), row by row and k by k."""

    def __init__(self, base, pairs, mixture, gates, s):
        super().__init__()
        self.base, self.pairs, self.mixture, self.gates, self.s = base, pairs, mixture, gates, s

    def update(self, a, b, gate):
        """[d_out, d_in] of one row."""
        if self.mixture == "core":
            return self.s * b @ gate @ a
        every = [(a[k * R : (k + 1) * R], b[:, k * R : (k + 1) * R]) for k in range(N)]
        if self.mixture == "product":
            return self.s * sum(gate[k] * b_k @ a_k for k, (a_k, b_k) in enumerate(every))
        a_u = sum(gate[k] * a_k for k, (a_k, _) in enumerate(every))
        b_u = sum(gate[k] * b_k for k, (_, b_k) in enumerate(every))
        return self.s * b_u @ a_u

    def forward(self, x):
        rows = []
        for row, gate in zip(x, self.gates, strict=True):
            updates = [self.update(a, b, gate) for a, b in self.pairs]
            rows.append(row @ self.base.weight.T + row @ (updates[0] - sum(updates[1:])).T)
        return torch.stack(rows)


def pairs_of(layer):
    """(A, B), and (A0, B0) where there is a start that is subtracted."""
    pairs = [(layer.reclora_A["default"], layer.reclora_B["default"])]
    if "default" in layer.reclora_A0:
        pairs.append((layer.reclora_A0["default"], layer.reclora_B0["default"]))
    return pairs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("gate", ["shared", "module"])
@pytest.mark.parametrize(
    ("mixture", "rescale", "init"),
    [
        ("product", False, "gaussian"),
        ("product", True, "gaussian"),
        ("product", False, "milora"),
        ("factor", False, "gaussian"),
        ("factor", False, "pissa"),
        ("core", False, "gaussian"),
        ("core", False, "pissa"),
    ],
)
def test_every_mixture_equals_its_literal_loops(dtype, tolerance, gate, mixture, rescale, init):
    model = perturb(
        reclora(tiny_lm(dtype), lora_alpha=6, gate=gate, rescale=rescale, mixture=mixture, init=init)
    )
    ids, representation = inputs(dtype=dtype)
    got = model(ids, representation=representation).logits

    gates = model.alpha(representation)  # [batch, ...] or [batch, modules, ...]
    literal = tiny_lm(dtype)
    for index, (name, layer) in enumerate(model.base_model.layers("default")):
        parent, child = name.rsplit(".", 1)
        own = gates if gate == "shared" else gates[:, index]
        s = 6 / R * (N if rescale else 1)
        new = Literal(layer.base_layer, pairs_of(layer), mixture, own, s)
        setattr(literal.get_submodule(parent), child, new)
    expected = literal(ids).logits
    base = tiny_lm(dtype)(ids).logits
    assert (expected - base).abs().max() > 1e-3  # the update is not lost in the tolerance
    assert (gates[0] - gates[1]).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def made_uniform(model):
    gate = model.base_model.reclora_gate["default"]
    gate.weight_2.data.zero_()
    gate.bias_2.data.zero_()


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
    model = perturb(reclora(tiny_lm(), lora_alpha=6, rescale=rescale))
    made_uniform(model)
    ids, representation = inputs()
    plain = plain_lora(model, N * R, 6 * (N if rescale else 1))
    torch.testing.assert_close(
        model(ids, representation=representation).logits, plain(ids).logits, rtol=1e-9, atol=1e-9
    )


def test_factor_with_a_uniform_gate_equals_plain_lora_of_mean_a_and_mean_b():
    model = perturb(reclora(tiny_lm(), lora_alpha=6, mixture="factor"))
    made_uniform(model)
    ids, representation = inputs()
    plain = get_peft_model(
        tiny_lm(), LoraConfig(r=R, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    ).eval()
    for name, layer in model.base_model.layers("default"):
        target = plain.base_model.model.get_submodule(name)
        a, b = layer.reclora_A["default"], layer.reclora_B["default"]
        target.lora_A["default"].weight.data = torch.stack(a.split(R)).mean(0)
        target.lora_B["default"].weight.data = torch.stack(b.split(R, 1)).mean(0)
    torch.testing.assert_close(
        model(ids, representation=representation).logits, plain(ids).logits, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("mixture", ["product", "factor"])
@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_without_a_gate_nothing_is_read_and_the_mixture_is_uniform(mixture, init):
    gated = perturb(reclora(tiny_lm(), mixture=mixture, init=init, rescale=True))
    made_uniform(gated)
    model = reclora(tiny_lm(), mixture=mixture, init=init, rescale=True, gate_input="none")
    assert not list(model.base_model.reclora_gate)
    for (_, own), (_, other) in zip(*(m.base_model.layers("default") for m in (model, gated)), strict=True):
        own.load_state_dict(other.state_dict())
    ids, representation = inputs()
    expected = gated(ids, representation=representation).logits
    assert (expected - tiny_lm()(ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(model(ids, representation=representation).logits, model(ids).logits)


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


@pytest.mark.parametrize("mixture", ["product", "factor", "core"])
@pytest.mark.parametrize("init", ["gaussian", "milora", "pissa", "random-svd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_start_is_the_base_to_the_bit_for_every_gate(mixture, init, dtype):
    model = reclora(tiny_lm(dtype), mixture=mixture, init=init)
    gate = model.base_model.reclora_gate["default"]
    ids, representation = inputs()
    at_first = model.alpha(representation)
    gate.weight_2.data.normal_()
    assert (model.alpha(representation) - at_first).abs().max() > 0.05
    assert torch.equal(model(ids, representation=representation).logits, tiny_lm(dtype)(ids).logits)


def test_bf16_base_keeps_float32_adapters_and_its_own_output_dtype():
    model = perturb(reclora(tiny_lm(torch.bfloat16)))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    ids, representation = inputs(dtype=torch.float32)
    logits = model(ids, representation=representation).logits
    assert logits.dtype == torch.bfloat16
    exact = copy.deepcopy(model).float()(ids, representation=representation).logits
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_bf16_autocast_is_near_float32():
    model = perturb(reclora(tiny_lm(torch.float32)))
    ids, representation = inputs(dtype=torch.float32)
    exact = model(ids, representation=representation).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, representation=representation).logits
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
