"""Starts by singular vectors: the published ones, dealt out to the meta-LoRAs, computed once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from recllm.reclora import RecLoraConfig
from recllm.reclora.init import singular_start

ROOT = Path(__file__).parents[2]


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight
    return layer


def rotated(singular, shape, seed=0):
    """A float64 weight with the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(n, n, generator=generator, dtype=torch.float64) for n in shape]
    u, v = (torch.linalg.qr(draw)[0] for draw in draws)
    count = len(singular)
    return u[:, :count] @ torch.diag(torch.tensor(singular, dtype=torch.float64)) @ v[:count]


def config(**arguments):
    return RecLoraConfig(**({"r": 2, "num_meta": 3, "lora_alpha": 8, "init": "pissa"} | arguments))


def tiny_lm(dtype=torch.float64):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).to(dtype).eval()


VALUES = [8.0, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize(("init", "taken"), [("pissa", [8, 7, 6, 5, 4, 3]), ("milora", [6, 5, 4, 3, 2, 1])])
def test_triplets_are_dealt_out_like_cards(init, taken):
    """Six triplets to three meta-LoRAs of rank 2: the first and the fourth to the first, and so on."""
    weight = rotated(VALUES, (8, 10))
    a, b = singular_start(linear(weight), config(init=init))
    s = 8 / 2
    for k in range(3):
        own_a, own_b = a[2 * k : 2 * k + 2], b[:, 2 * k : 2 * k + 2]
        expected = torch.tensor([taken[k], taken[k + 3]], dtype=torch.float64) / s
        for gram in (own_a @ own_a.T, own_b.T @ own_b):
            torch.testing.assert_close(gram, torch.diag(expected), rtol=1e-9, atol=1e-9)
    together = a @ a.T  # the meta-LoRAs are orthogonal to each other
    assert (together - torch.diag(together.diagonal())).abs().max() < 1e-9
    # s B A is the triplets' part of W: what is left has the other singular values.
    left = torch.linalg.svdvals(weight - s * b @ a)
    others = sorted(set(VALUES) - set(taken), reverse=True)
    torch.testing.assert_close(left[:2], torch.tensor(others, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert left[2:].max() < 1e-9


def test_random_triplets_are_some_of_w_and_the_same_in_every_process():
    weight = rotated(VALUES, (8, 8))
    a, b = singular_start(linear(weight), config(init="random-svd", num_meta=2))
    left = torch.linalg.svdvals(weight - 4 * b @ a)[:4]
    others = {round(float(value)) for value in left}
    assert len(others) == 4
    assert others <= set(VALUES)
    assert others not in ({5, 6, 7, 8}, {1, 2, 3, 4})
    torch.manual_seed(123)
    again = singular_start(linear(weight), config(init="random-svd", num_meta=2))
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])


def test_small_singular_values_are_floored_so_that_none_is_dead():
    weight = rotated([4.0, 2, 2, 2, 0, 0], (6, 6))
    a, _ = singular_start(linear(weight), config(init="milora", num_meta=1))
    # 1e-3 of the median 2, divided by s = 4; the vectors have length 1.
    torch.testing.assert_close(
        (a @ a.T).diagonal(), torch.full((2,), 2e-3 / 4, dtype=torch.float64), rtol=1e-9, atol=0
    )
    with pytest.raises(ValueError, match=r"more than half of the singular values of .* \[6, 6\] are zero"):
        singular_start(linear(rotated([1.0, 1], (6, 6))), config(num_meta=1))


def test_too_many_are_refused_in_one_line():
    with pytest.raises(
        ValueError, match=r"takes num_meta \* r = 3 \* 2 = 6 .* shape \[4, 9\] has 4; lower"
    ) as e:
        get_peft_model(nn.Sequential(nn.Linear(9, 4)), config(target_modules=["0"]))
    assert "\n" not in str(e.value)
    singular_start(linear(rotated([3.0, 2, 1, 1], (4, 9))), config(mixture="core"))  # has one, of rank 2


@pytest.mark.parametrize("init", ["milora", "pissa"])
def test_one_meta_lora_is_the_published_method(init):
    """W_res x + s B A x with W_res = W - s B0 A0, literally."""
    layer, x = linear(rotated(VALUES, (8, 10))), torch.randn(1, 4, 10, dtype=torch.float64)
    a0, b0 = singular_start(layer, config(init=init, num_meta=1))
    u, values, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    part = slice(None, 2) if init == "pissa" else slice(-2, None)
    own = u[:, part] @ torch.diag(values[part]) @ v[part]
    torch.testing.assert_close(4 * b0 @ a0, own, rtol=1e-9, atol=1e-9)
    model = get_peft_model(
        nn.Sequential(layer), config(init=init, num_meta=1, gate_input="none", target_modules=["0"])
    )
    tuned = model.base_model.model[0]
    for parameter in (tuned.reclora_A["default"], tuned.reclora_B["default"]):
        parameter.data += 0.1 * torch.randn_like(parameter)
    a, b = tuned.reclora_A["default"], tuned.reclora_B["default"]
    expected = x @ (layer.weight - own).T + 4 * x @ a.T @ b.T
    torch.testing.assert_close(tuned(x), expected, rtol=1e-9, atol=1e-9)


def test_trained_it_stays_stock_pissa():
    """Five steps of SGD beside PEFT's own PiSSA, which changes the base."""
    arguments = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}
    own = {"num_meta": 1, "gate_input": "none", "init": "pissa"}
    ours = get_peft_model(tiny_lm(torch.float32), RecLoraConfig(**arguments, **own))
    stock = get_peft_model(tiny_lm(torch.float32), LoraConfig(**arguments, init_lora_weights="pissa"))
    ids = torch.randint(0, 40, (3, 6))
    start = ours(ids).logits
    for model in (ours, stock):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(ids).logits[:, -1], ids[:, 0]).backward()
            optimizer.step()
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
    assert (ours(ids).logits - start).abs().max() > 1e-2
    with ours.disable_adapter():  # the base is what it was
        assert torch.equal(ours(ids).logits, tiny_lm(torch.float32)(ids).logits)


def test_decomposed_once_and_kept_by_the_weights(tmp_path, monkeypatch):
    layer = linear(rotated(VALUES, (8, 8)))
    cached = config(svd_cache=str(tmp_path / "svd"))
    fresh = singular_start(layer, config())
    first = singular_start(layer, cached)
    files = list((tmp_path / "svd").iterdir())
    assert len(files) == 1
    monkeypatch.setattr(torch.linalg, "svd", None)
    second = singular_start(layer, cached)
    for parts in zip(fresh, first, second, strict=True):
        assert torch.equal(parts[0], parts[1])
        assert torch.equal(parts[0], parts[2])
    monkeypatch.undo()
    with torch.no_grad():
        layer.weight[0, 0] += 1e-12
    singular_start(layer, cached)
    singular_start(layer, config(init="milora", svd_cache=str(tmp_path / "svd")))
    assert len(list((tmp_path / "svd").iterdir())) == 3
    assert not list((tmp_path / "svd").glob("*.tmp"))


RELOAD = """
import sys, torch
torch.linalg.svd = None
from peft import PeftModel
from transformers import LlamaForCausalLM
import recllm.reclora
base, adapter, batch, out = sys.argv[1:]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float64), adapter).eval()
ids, representation = torch.load(batch)
torch.save(model(ids, representation=representation).logits.detach(), out)
"""


def gated(lm, **arguments):
    return get_peft_model(lm, config(representation_dim=5, gate_temperature=0.5, **arguments)).eval()


@pytest.mark.parametrize("init", ["milora", "pissa"])
def test_the_start_is_in_the_file_and_is_not_computed_again(tmp_path, init):
    model = gated(tiny_lm(), init=init)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    ids, representation = torch.randint(0, 40, (2, 6)), torch.randn(2, 5, dtype=torch.float64)
    model.save_pretrained(tmp_path / "adapter")
    tiny_lm().save_pretrained(tmp_path / "base")
    torch.save((ids, representation), tmp_path / "batch.pt")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "batch.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", RELOAD, *paths], check=True, cwd=ROOT)
    expected = model(ids, representation=representation).logits
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
    for lean in (False, True):
        loaded = PeftModel.from_pretrained(tiny_lm(), str(tmp_path / "adapter"), low_cpu_mem_usage=lean)
        assert torch.equal(loaded(ids, representation=representation).logits, expected)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(name.endswith(("reclora_A0", "reclora_B0")) for name in saved) == 2 * 4
    # An own start and a loaded one side by side; a configuration of a file alone makes no silent zero.
    loaded.add_adapter("second", config(representation_dim=5, init=init))
    loaded.set_adapter("second")
    assert torch.equal(loaded(ids, representation=representation).logits, tiny_lm()(ids).logits)
    alone = get_peft_model(tiny_lm(), RecLoraConfig.from_pretrained(str(tmp_path / "adapter")))
    assert alone(ids, representation=representation).logits.isnan().all()


def test_start_vectors_do_not_train():
    model = gated(tiny_lm(), init="pissa")
    ids, representation = torch.randint(0, 40, (2, 6)), torch.randn(2, 5, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert any("reclora_A0" in name for name in before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(ids, representation=representation).logits.square().mean().backward()
    optimizer.step()
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name])
    assert not any("0.default" in name for name, p in model.named_parameters() if p.requires_grad)
