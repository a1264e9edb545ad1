"""Adapters of every kind: at the LM's own output at first, trained, saved, loaded; AdaLoRA's loop."""

import copy

import pytest
import torch
from torch.nn import functional as F

from recllm.errors import ConfigError
from recllm.lm import adalora
from recllm.lm.adapters import adapter_folder, adapter_inputs, add_adapter, load_adapter, save_adapter
from recllm.lm.config import AdapterConfig
from recllm.paths import ADAPTER, RANKING_ADAPTER
from recllm.reclora import AdapterCard

KINDS = {
    "lora": {"kind": "lora"},
    "dora": {"kind": "dora"},
    "rslora": {"kind": "rslora"},
    "vera": {"kind": "vera"},
    "adalora": {"kind": "adalora"},
    "pissa": {"kind": "lora", "init": "pissa"},
    "milora": {"kind": "lora", "init": "milora"},
    "reclora": {"kind": "reclora", "num_meta": 2},
    "factor": {"kind": "reclora", "num_meta": 2, "mixture": "factor", "gate": "module"},
    "core": {"kind": "reclora", "mixture": "core"},
    "uniform": {"kind": "reclora", "num_meta": 2, "gate_input": "none"},
    "reclora-milora": {"kind": "reclora", "num_meta": 2, "init": "milora"},
    "user": {"kind": "reclora", "num_meta": 2, "gate_input": "user"},
}


def batch():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 40, (4, 6), generator=generator)
    return ids, torch.randn(4, 5, generator=generator)


def logits(model, reads):
    ids, representation = batch()
    return model(ids, **({"representation": representation} if reads else {})).logits


def train(model, reads, steps, first=0):
    """SGD as Lightning orders it: gradients live until the next step's."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(model, reads)[:, -1], batch()[0][:, 0])
        if adalora.is_adalora(model):
            loss = loss + adalora.penalty(model)
        loss.backward()
        optimizer.step()
        if adalora.is_adalora(model):
            adalora.allocate(model, step + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_starts_at_the_lm_trains_and_comes_back(tiny_lm, tmp_path, kind):
    lm = copy.deepcopy(tiny_lm.model)
    config = AdapterConfig(r=2, lora_alpha=4, **KINDS[kind])
    expected = lm(batch()[0]).logits
    model = add_adapter(lm, config, batch()[1] if config.representation_kind else None, seed=0, steps=10)
    assert {p.requires_grad for name, p in model.named_parameters() if "embed_tokens" in name} == {False}
    torch.testing.assert_close(logits(model, config.representation_kind), expected, rtol=1e-5, atol=1e-5)
    train(model, config.representation_kind, 10)
    after = logits(model, config.representation_kind)
    assert (after - expected).abs().max() > 1e-5
    save_adapter(model, tmp_path, AdapterCard(base="tiny", data="the demo", metrics={"valid/auc": 0.75}))
    page = (tmp_path / "README.md").read_text()
    for line in ("| base model | tiny |", "| data | the demo |", "| valid/auc | 0.7500 |"):
        assert line in page.splitlines()
    assert adapter_inputs(tmp_path) == (config.representation_kind, 0)
    loaded = load_adapter(copy.deepcopy(tiny_lm.model), tmp_path).eval()
    assert torch.equal(logits(loaded, config.representation_kind), after)
    with model.disable_adapter():  # the LM underneath is what it was
        assert torch.equal(logits(model, config.representation_kind), expected)


def test_what_a_soft_prompt_needs(tiny_lm, tmp_path):
    config = AdapterConfig(r=2, gate_input="none", soft_prompt=3)
    model = add_adapter(copy.deepcopy(tiny_lm.model), config, batch()[1], seed=0)
    save_adapter(model, tmp_path, AdapterCard(base="tiny"))
    assert adapter_inputs(tmp_path) == ("target", 3)
    assert config.representation_kind == "target"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dora", "init": "pissa"}, r"init=pissa is not usable; wanted gaussian, since .*kind=dora"),
        ({"kind": "lora", "soft_prompt": 2}, r"soft_prompt=2 is not usable; wanted 0, since .*kind=lora"),
        ({"mixture": "core", "gate_input": "none"}, r"gate_input=none is not usable; wanted a gate for"),
        ({"kind": "qlora"}, r"kind=qlora is not usable; wanted one of lora, reclora, dora"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        AdapterConfig(**arguments)
    assert "\n" not in str(error.value)


def adalora_model(tiny_lm):
    config = AdapterConfig(kind="adalora", r=2)
    return add_adapter(copy.deepcopy(tiny_lm.model), config, None, seed=0, steps=20)


def test_adaloras_penalty_is_pefts(tiny_lm):
    """PEFT adds it to a loss that the LM computes itself."""
    model = adalora_model(tiny_lm)
    ids = batch()[0]
    with_penalty = model(ids, labels=ids).loss
    plain = model.base_model.model(ids, labels=ids).loss
    torch.testing.assert_close(adalora.penalty(model), with_penalty - plain, rtol=1e-4, atol=1e-5)
    # Four modules of rank 3 with A and B near zero: each ||A A^T - I||_F is near sqrt(3), times 0.5.
    assert adalora.penalty(model).item() == pytest.approx(0.5 * 3**0.5, rel=0.05)


def test_adalora_prunes_to_its_budget(tiny_lm):
    model = adalora_model(tiny_lm)
    modules = sum("lora_E" in name for name, _ in model.named_parameters())
    train(model, False, 20)
    kept = sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)
    assert kept == 2 * modules < 3 * modules


def test_adalora_resumed_equals_uninterrupted(tiny_lm):
    straight = adalora_model(tiny_lm)
    train(straight, False, 20)
    broken = adalora_model(tiny_lm)
    train(broken, False, 5)
    state = copy.deepcopy(adalora.state(broken))
    weights = {name: p.clone() for name, p in broken.named_parameters() if p.requires_grad}
    resumed = adalora_model(tiny_lm)
    resumed.load_state_dict(weights, strict=False)
    adalora.load_state(resumed, state)
    train(resumed, False, 15, first=5)
    assert torch.equal(logits(resumed, False), logits(straight, False))


def test_where_no_titles_were_learned_one_adapter_stands_for_both(tmp_path):
    (tmp_path / ADAPTER).mkdir()
    assert adapter_folder(tmp_path, RANKING_ADAPTER) == tmp_path / ADAPTER
    (tmp_path / RANKING_ADAPTER).mkdir()
    assert adapter_folder(tmp_path, RANKING_ADAPTER) == tmp_path / RANKING_ADAPTER
    assert adapter_folder(tmp_path, ADAPTER) == tmp_path / ADAPTER
