"""Exports are ordinary LoRAs for stock PEFT, in a process that has no recllm."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from recllm.reclora import AdapterCard, RecLoraConfig, export_mean, export_user, export_users, pick_user

STOCK = """
import sys, torch
sys.modules["recllm"] = None  # importing it fails
from peft import PeftModel
from transformers import LlamaForCausalLM
base, ids, out, *adapters = sys.argv[1:]
logits = {}
for adapter in adapters:
    lm = LlamaForCausalLM.from_pretrained(base, dtype=torch.float64)
    model = PeftModel.from_pretrained(lm, adapter, autocast_adapter_dtype=False).eval()
    logits[adapter] = model(torch.load(ids)).logits.detach()
torch.save(logits, out)
"""

CASES = {
    "product": (8, {"rescale": True}),
    "product-module": (8, {"gate": "module"}),
    "product-milora": (16, {"init": "milora", "gate": "module"}),  # 2 * 3 * 2, filled up
    "product-head": (8, {"target_modules": ["q_proj", "lm_head"]}),
    "factor": (8, {"mixture": "factor"}),
    "factor-pissa": (8, {"mixture": "factor", "init": "pissa", "gate": "module"}),
    "core": (8, {"mixture": "core", "gate": "module"}),
    "core-pissa": (16, {"mixture": "core", "init": "pissa", "r": 5}),
    "no-gate": (8, {"gate_input": "none", "init": "pissa", "num_meta": 1, "r": 4}),
}
USERS = {"users": {"rescale": True}, "users-module": {"gate": "module", "init": "milora", "rescale": True}}


MEANS = {
    "mean-factor": (8, {"mixture": "factor", "rescale": True}),
    "mean-factor-module": (8, {"mixture": "factor", "init": "pissa", "gate": "module"}),
    "mean-core": (8, {"mixture": "core"}),
    "mean-core-pissa": (16, {"mixture": "core", "init": "pissa", "gate": "module", "r": 5}),
    "mean-product": (16, {"r": 4, "gate": "module"}),  # 3 * 4, filled up
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """All exports, and what stock PEFT makes of them in a process without recllm: folder, name -> logits."""
    folder = tmp_path_factory.mktemp("exports")
    ids, users = inputs()
    for name, (_, arguments) in CASES.items():
        model = reclora(**arguments)
        export_user(model, None if name == "no-gate" else users[0], folder / name)
    for name, (_, arguments) in MEANS.items():
        export_mean(reclora(**arguments), users, folder / name)
    names = [*CASES, *MEANS]
    for name, arguments in USERS.items():
        model = reclora(**arguments)
        export_users(model, users, folder / name)
        export_mean(model, users, folder / f"{name}-mean")
        pick_user(folder / name, 1, folder / f"{name}-1")
        names += [name, f"{name}-mean", f"{name}-1"]
    tiny_lm().save_pretrained(folder / "base")
    torch.save(ids, folder / "ids.pt")
    command = [sys.executable, "-c", STOCK, "base", "ids.pt", "logits.pt", *names]
    subprocess.run(command, check=True, cwd=folder)
    return folder, torch.load(folder / "logits.pt")


def tiny_lm():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).to(torch.float64).eval()


def reclora(**arguments):
    values = {"r": 2, "num_meta": 3, "lora_alpha": 40, "representation_dim": 4, "gate_temperature": 0.3}
    model = get_peft_model(tiny_lm(), RecLoraConfig(**(values | arguments))).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def inputs():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 40, (2, 6), generator=generator), torch.randn(
        3, 4, generator=generator, dtype=torch.float64
    )


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_exported_user_equals_gated_in_stock_peft(exported, name):
    folder, stock = exported
    rank, arguments = CASES[name]
    config = json.loads((folder / name / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", rank, rank)
    model, (ids, users) = reclora(**arguments), inputs()
    close(stock[name], model(ids, representation=users[:1].expand(2, -1)).logits)
    other = tiny_lm() if name == "no-gate" else model
    extra = {} if name == "no-gate" else {"representation": users[1:2].expand(2, -1)}
    assert (stock[name] - other(ids, **extra).logits).abs().max() > 1e-5  # far above the equality's 1e-9


@pytest.mark.parametrize("name", MEANS)
def test_the_mean_export_is_the_gated_model_at_the_mean_gate(exported, name, monkeypatch):
    folder, stock = exported
    rank, arguments = MEANS[name]
    config = json.loads((folder / name / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", rank, rank)
    model, (ids, users) = reclora(**arguments), inputs()
    one = model(ids, representation=users[:1].expand(2, -1)).logits
    assert (stock[name] - one).abs().max() > 1e-6  # a user's own gate is another
    head = model.base_model.reclora_gate["default"]
    mean = head(users[:, None]).mean(1, keepdim=True)  # [gates, users, 1, ...]

    def forward(representation):
        return mean.expand(-1, *representation.shape[:2], *mean.shape[3:])

    monkeypatch.setattr(head, "forward", forward)
    close(stock[name], model(ids, representation=users[:2]).logits)


@pytest.mark.parametrize("name", USERS)
def test_many_users_are_one_stack_and_a_file_of_gates(exported, name):
    folder, stock = exported
    model, (ids, users) = reclora(**USERS[name]), inputs()
    alpha = load_file(folder / name / "gates.safetensors")["alpha"]
    assert torch.equal(alpha, model.alpha(users))
    assert alpha.shape == ((3, 3) if name == "users" else (3, 4, 3))
    names = set(load_file(folder / name / "adapter_model.safetensors"))
    assert all(".lora_" in key for key in names)  # vLLM refuses anything else in there
    one = stock[f"{name}-1"]
    close(one, model(ids, representation=users[1:2].expand(2, -1)).logits)
    head = model.base_model.reclora_gate["default"]
    with torch.no_grad():
        head.weight_2.zero_()
        head.bias_2.zero_()
        close(stock[name], model(ids, representation=users[:2]).logits)
        # One gate for everybody that gives the mean alpha: beta = t_p log alpha.
        head.bias_2.copy_(head.temperature * alpha.mean(0).reshape(head.bias_2.shape).log())
        close(stock[f"{name}-mean"], model(ids, representation=users[:2]).logits)
    assert (stock[f"{name}-mean"] - one).abs().max() > 1e-5
    assert (stock[name] - one).abs().max() > 1e-5
    with pytest.raises(ValueError, match="row 3 is none of the 3 gates"):
        pick_user(folder / name, 3, folder / "none")


def test_file_holds_lora_and_nothing_else_and_the_card_says_what_it_is(tmp_path):
    model = reclora()
    model.peft_config["default"].base_model_name_or_path = "somebody/an-lm"
    card = AdapterCard(data="ml-1m, 77,600 rows", metrics={"AUC": 0.80123}, license="MIT")
    export_user(model, torch.randn(4), tmp_path, card=card)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    expected = {
        f"{prefix}.{i}.self_attn.{m}.lora_{x}.weight"
        for i in (0, 1)
        for m in ("q_proj", "v_proj")
        for x in "AB"
    }
    assert set(tensors) == expected
    a, b = (tensors[f"{prefix}.0.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
    assert a.shape == (8, 16)  # 3 meta-LoRAs of rank 2, filled up to 8
    assert a[6:].abs().max() == b[:, 6:].abs().max() == 0
    assert a[:6].abs().min() > 0
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    page = (tmp_path / "README.md").read_text()
    head = page.split("---")[1].splitlines()
    assert {"base_model: somebody/an-lm", "license: MIT"} <= set(head)
    data = ModelCard.load(tmp_path / "README.md").data  # as the hub reads it
    assert (data.library_name, data.tags) == ("peft", ["lora", "recommendation", "recllm"])
    for line in (
        "| data | ml-1m, 77,600 rows |",
        "| AUC | 0.8012 |",
        "| method | LORA, rank 8, lora_alpha 8 |",
    ):
        assert line in page.splitlines()
    assert "import recllm" not in page


def test_wrong_arguments_are_refused(tmp_path):
    model = reclora()
    cases = [
        (model, torch.zeros(1, 4), r"shape \[1, 4\], wanted \[dim\]"),
        (model, None, r"got None|has None, wanted \[dim\]"),
        (model, torch.zeros(3), "3 wide, wanted 4"),
        (model.get_base_model(), torch.zeros(4), "without RecLoRA"),
        (reclora(soft_prompt=2), torch.zeros(4), "soft prompt of 2 tokens, which a LoRA cannot hold"),
    ]
    for wrong, representation, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            export_user(wrong, representation, tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="mixture='factor', wanted 'product'"):
        export_users(reclora(mixture="factor"), torch.zeros(2, 4), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_same_users_give_the_same_bytes(tmp_path):
    """The order of safetensors' metadata is drawn anew each time."""
    model, users = reclora(), torch.randn(3, 4, generator=torch.Generator().manual_seed(4))
    for number in range(8):
        export_users(model, users, tmp_path / str(number))
    for file in (tmp_path / "0").iterdir():
        assert {(tmp_path / str(number) / file.name).read_bytes() for number in range(8)} == {
            file.read_bytes()
        }
    with safe_open(tmp_path / "0" / "gates.safetensors", "pt") as file:
        metadata = file.metadata()
        assert torch.equal(file.get_tensor("alpha"), model.alpha(users))
    assert {"modules", "num_meta", "r"} == metadata.keys()
    assert (metadata["num_meta"], metadata["r"]) == ("3", "2")


def test_chosen_layers_are_exported_alone_and_whole_modules_not_at_all(tmp_path):
    ids, users = inputs()
    model = reclora(layers_to_transform=[1])
    export_user(model, users[0], tmp_path)
    stock = PeftModel.from_pretrained(tiny_lm(), str(tmp_path), autocast_adapter_dtype=False)
    assert sum("lora_A" in name for name, _ in stock.named_parameters()) == 2
    close(stock(ids).logits, model(ids, representation=users[:1].expand(2, -1)).logits)
    whole = reclora(modules_to_save=["lm_head"])
    with pytest.raises(
        ValueError, match=r"trains whole modules \(lm_head\), which a LoRA cannot hold"
    ) as error:
        export_user(whole, users[0], tmp_path / "none")
    assert "\n" not in str(error.value)
