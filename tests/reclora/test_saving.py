"""The tuner: saved and loaded, switched off, several adapters side by side."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.reclora.gated import D, config, inputs, perturb, tiny_lm, trained

ROOT = Path(__file__).parents[2]

RELOAD = """
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM
import recllm.reclora
base, adapter, batch, out = sys.argv[1:]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float64), adapter).eval()
ids, representation = torch.load(batch)
logits = model(ids, representation=representation).logits
torch.save((logits.detach(), model.alpha(representation).detach()), out)
"""


@pytest.mark.parametrize("gate", ["shared", "module"])
def test_saved_and_loaded_is_exact_in_a_fresh_process(tmp_path, gate):
    model = trained(gate=gate)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(2 * D, D, generator=generator)
    model.set_statistics(torch.randn(D, generator=generator), torch.cov(rows.T))
    ids, representation = inputs()
    model.save_pretrained(tmp_path / "adapter")
    tiny_lm().save_pretrained(tmp_path / "base")
    torch.save((ids, representation), tmp_path / "batch.pt")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "batch.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", RELOAD, *paths], check=True, cwd=ROOT)
    logits, alpha = torch.load(tmp_path / "out.pt")
    assert torch.equal(alpha, model.alpha(representation))
    assert torch.equal(logits, model(ids, representation=representation).logits)
    model.set_statistics(torch.zeros(D), torch.eye(D))
    assert not torch.equal(alpha, model.alpha(representation))  # so the statistics were in the file


def test_saved_keys_name_no_adapter_and_loading_takes_any_name(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    gate = ("weight_1", "bias_1", "norm_weight", "norm_bias", "weight_2", "bias_2", "mean", "whiten")
    assert set(saved) == {f"base_model.reclora_gate.{name}" for name in gate} | {
        f"base_model.model.model.layers.{layer}.self_attn.{m}.reclora_{x}"
        for layer in (0, 1) for m in ("q_proj", "v_proj") for x in "AB"
    }  # fmt: skip
    ids, representation = inputs()
    expected = model(ids, representation=representation).logits
    for lean in (False, True):  # lean: weights made on the meta device, then filled
        loaded = PeftModel.from_pretrained(
            tiny_lm(), str(tmp_path), adapter_name="user", low_cpu_mem_usage=lean
        )
        assert torch.equal(loaded(ids, representation=representation).logits, expected)
        assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(tiny_lm(), str(tmp_path), is_trainable=True)
    assert sum(p.requires_grad for p in trainable.parameters()) == sum(
        p.requires_grad for p in model.parameters()
    )


def test_disabled_adapter_is_the_base_with_and_without_representation():
    model = trained()
    ids, representation = inputs()
    base = tiny_lm()(ids).logits
    before = model(ids, representation=representation).logits
    assert (before - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids, representation=representation).logits, base)
    assert torch.equal(model(ids, representation=representation).logits, before)


def test_adapters_side_by_side_have_their_own_gates():
    first, second = trained(), perturb(get_peft_model(tiny_lm(), config(num_meta=2, gate="module")), seed=5)
    model = trained()
    model.add_adapter("second", config(num_meta=2, gate="module", target_modules=["k_proj", "v_proj"]))
    ids, representation = inputs()
    assert torch.equal(
        model(ids, representation=representation).logits, first(ids, representation=representation).logits
    )
    assert all("second" not in name for name, p in model.named_parameters() if p.requires_grad)
    assert any("gate.default" in name for name, p in model.named_parameters() if p.requires_grad)
    model.delete_adapter("second")

    model.add_adapter("second", config(num_meta=2, gate="module"))
    model.set_adapter("second")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("second" in name for name in names)
    for name, parameter in model.named_parameters():
        if "second" in name:
            parameter.data = second.get_parameter(name.replace("second", "default")).data
    assert torch.equal(
        model(ids, representation=representation).logits, second(ids, representation=representation).logits
    )
    assert model.alpha(representation).shape == (3, 4, 2)
    assert model.alpha(representation, "default").shape == (3, 3)
    model.set_adapter("default")
    assert torch.equal(
        model(ids, representation=representation).logits, first(ids, representation=representation).logits
    )


def test_loading_a_frozen_adapter_beside_leaves_the_trained_one_trainable(tmp_path):
    model = trained()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), adapter_name="reference")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    ids, representation = inputs()
    expected = model(ids, representation=representation).logits
    model.set_adapter("reference")
    assert torch.equal(model(ids, representation=representation).logits, expected)
