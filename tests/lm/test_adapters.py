"""Adapters of every kind keep the contract; AdaLoRA's loop; which adapter stands for which."""

import copy
import itertools

import pytest
import torch

from recllm.errors import ConfigError
from recllm.lm import adalora
from recllm.lm.adapters import AdapterInputs, adapter_folder, add_adapter
from recllm.lm.config import AdapterConfig
from recllm.paths import ADAPTER, RANKING_ADAPTER
from tests.lm.contract import (
    AdapterContract,
    PersonalizedContract,
    SoftPromptContract,
    batch,
    logits,
    small,
    train,
)


class TestLora(AdapterContract):
    config = small(kind="lora")


class TestDora(AdapterContract):
    config = small(kind="dora")
    start_tolerance = 1e-5  # lengths are divided out and multiplied in again


class TestRslora(AdapterContract):
    config = small(kind="rslora")


class TestVera(AdapterContract):
    config = small(kind="vera")


class TestAdalora(AdapterContract):
    config = small(kind="adalora")


class TestPissa(AdapterContract):
    config = small(kind="lora", init="pissa")


class TestMilora(AdapterContract):
    config = small(kind="lora", init="milora")


class TestRandomSvd(AdapterContract):
    config = small(kind="lora", init="random-svd")


class TestProduct(PersonalizedContract):
    config = small(num_meta=2)


class TestProductMilora(PersonalizedContract):
    config = small(num_meta=2, init="milora")


class TestProductPissa(PersonalizedContract):
    config = small(num_meta=2, init="pissa")


class TestProductRandomSvd(PersonalizedContract):
    config = small(num_meta=2, init="random-svd")


class TestFactor(PersonalizedContract):
    config = small(num_meta=2, mixture="factor", gate="module")


class TestFactorMilora(PersonalizedContract):
    config = small(num_meta=2, mixture="factor", init="milora")


class TestFactorPissa(PersonalizedContract):
    config = small(num_meta=2, mixture="factor", init="pissa")


class TestCore(PersonalizedContract):
    config = small(mixture="core")


class TestCoreMilora(PersonalizedContract):
    config = small(mixture="core", init="milora")


class TestCorePissa(PersonalizedContract):
    config = small(mixture="core", init="pissa")


class TestUserGate(PersonalizedContract):
    config = small(num_meta=2, gate_input="user")
    inputs = AdapterInputs("user", 0)


class TestAdaptedHead(PersonalizedContract):
    config = small(num_meta=2, target_modules=["q_proj", "lm_head"])
    lr = 0.05


class TestUniform(AdapterContract):
    config = small(num_meta=2, gate_input="none")


class TestSoftPrompt(SoftPromptContract):
    config = small(num_meta=2, soft_prompt=2)
    inputs = AdapterInputs("target", 2)


class TestSoftPromptWithoutGate(SoftPromptContract):
    config = small(gate_input="none", soft_prompt=3)
    inputs = AdapterInputs("target", 3)


def configurations(contract=AdapterContract):
    """What is under contract in this file."""
    for kind in contract.__subclasses__():
        yield from configurations(kind)
        if kind.__name__.startswith("Test"):
            yield kind.config


def test_every_kind_and_every_start_is_under_contract():
    configs = list(configurations())
    kinds = {"lora", "dora", "rslora", "vera", "adalora", "reclora"}
    assert {config.kind for config in configs} == kinds
    starts = {config.init for config in configs if config.kind == "lora"}
    assert starts == {"gaussian", "milora", "pissa", "random-svd"}
    wanted = set(itertools.product(("product", "factor", "core"), ("gaussian", "milora", "pissa")))
    assert wanted <= {(config.mixture, config.init) for config in configs if config.kind == "reclora"}


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
    num_directions = sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)
    assert num_directions == 2 * modules < 3 * modules


def test_adalora_resumed_equals_uninterrupted(tiny_lm):
    straight = adalora_model(tiny_lm)
    train(straight, False, 20)
    interrupted = adalora_model(tiny_lm)
    train(interrupted, False, 5)
    state = copy.deepcopy(adalora.state(interrupted))
    weights = {name: p.clone() for name, p in interrupted.named_parameters() if p.requires_grad}
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
