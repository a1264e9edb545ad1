"""One user's export is an ordinary LoRA for stock PEFT."""

import json
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from recllm.reclora import RecLoraConfig, export_user

STOCK = """
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM
base, adapter, ids, out = sys.argv[1:]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float64), adapter).eval()
assert "recllm" not in sys.modules
torch.save(model(torch.load(ids)).logits.detach(), out)
"""


def reclora(**arguments):
    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
        )
    ).to(torch.float64)
    base = {name: value.clone() for name, value in lm.state_dict().items()}
    config = RecLoraConfig(
        r=2, num_meta=3, lora_alpha=5, representation_dim=4, gate_temperature=0.3, **arguments
    )
    model = get_peft_model(lm, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model, base


@pytest.mark.parametrize(("gate", "rescale"), [("shared", True), ("module", False)])
def test_exported_user_equals_gated_in_stock_peft(tmp_path, gate, rescale):
    model, base = reclora(gate=gate, rescale=rescale)
    ids, users = torch.randint(0, 40, (2, 6)), torch.randn(2, 4, dtype=torch.float64)
    export_user(model, users[0], tmp_path / "user")
    LlamaForCausalLM(model.get_base_model().config).to(torch.float64).save_pretrained(
        tmp_path / "base", state_dict=base
    )
    torch.save(ids, tmp_path / "ids.pt")
    paths = [str(tmp_path / name) for name in ("base", "user", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", STOCK, *paths], check=True, cwd=tmp_path)
    stock = torch.load(tmp_path / "logits.pt")

    gated = model(ids, representation=users[:1].expand(2, -1)).logits
    torch.testing.assert_close(stock, gated, rtol=1e-9, atol=1e-9)
    other = model(ids, representation=users[1:].expand(2, -1)).logits
    assert (stock - other).abs().max() > 1e-3


def test_file_holds_lora_and_nothing_else(tmp_path):
    model, _ = reclora()
    export_user(model, torch.randn(4), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    expected = {
        f"{prefix}.{i}.self_attn.{m}.lora_{x}.weight"
        for i in (0, 1)
        for m in ("q_proj", "v_proj")
        for x in "AB"
    }
    assert set(tensors) == expected
    assert tensors[f"{prefix}.0.self_attn.q_proj.lora_A.weight"].shape == (6, 16)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == 6
    assert config["lora_alpha"] == 15
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_wrong_arguments_are_refused(tmp_path):
    model, _ = reclora()
    with pytest.raises(ValueError, match=r"shape \[1, 4\], wanted \[dim\]"):
        export_user(model, torch.zeros(1, 4), tmp_path)
    with pytest.raises(ValueError, match="3 wide, wanted 4"):
        export_user(model, torch.zeros(3), tmp_path)
    with pytest.raises(ValueError, match="without RecLoRA"):
        export_user(model.get_base_model(), torch.zeros(4), tmp_path)
    assert not list(tmp_path.iterdir())
