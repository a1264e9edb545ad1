"""RecLoraConfig: registration, checks, and the file it is saved to."""

import json

import pytest
from peft import PeftConfig
from peft.utils import PeftType

from recllm.reclora import RecLoraConfig


def test_reclora_is_a_peft_type():
    assert PeftType("RECLORA") is PeftType.RECLORA is RecLoraConfig().peft_type
    assert PeftType.RECLORA == "RECLORA"
    assert "RECLORA" in list(PeftType)


def test_defaults_are_the_papers():
    config = RecLoraConfig()
    assert (config.r, config.lora_alpha, config.num_meta, config.gate_temperature) == (8, 16, 16, 5.0)
    assert config.target_modules == ["q_proj", "v_proj"]
    assert config.scale == 2.0  # 16 / 8
    assert RecLoraConfig(rescale=True).scale == 32.0  # 16 * 16 / 8
    assert RecLoraConfig(rescale=True, mixture="factor").scale == 2.0  # of the product form only
    assert (RecLoraConfig().metas, RecLoraConfig(mixture="core").metas) == (16, 1)


def test_what_needs_a_representation():
    assert RecLoraConfig().reads_representation
    assert not RecLoraConfig(gate_input="none").reads_representation
    assert RecLoraConfig(gate_input="none", soft_prompt=2).reads_representation


def test_saved_config_loads_as_its_own_class(tmp_path):
    config = RecLoraConfig(
        r=3, num_meta=5, gate="module", target_modules=["v_proj", "k_proj", "v_proj"], rescale=True
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [
        "k_proj",
        "v_proj",
    ]
    assert PeftConfig.from_pretrained(str(tmp_path)) == config


def test_the_file_names_no_folder_of_this_machine_and_says_that_the_start_is_in_it(tmp_path):
    config = RecLoraConfig(init="milora", svd_cache="/home/somebody/cache")
    config.save_pretrained(tmp_path)
    assert "somebody" not in (tmp_path / "adapter_config.json").read_text()
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.init == "milora"
    assert (config.init_weights, loaded.init_weights, loaded.svd_cache) == (True, False, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixture": "sum"}, r"mixture='sum' is unknown; allowed: product, factor, core"),
        ({"init": "orthogonal"}, r"init='orthogonal' is unknown; allowed: gaussian, milora"),
        ({"gate_input": "items"}, r"gate_input='items' is unknown; allowed: target, user"),
        ({"mixture": "core", "gate_input": "none"}, r"core' with gate_input='none' is a plain LoRA; set"),
        ({"soft_prompt": -1}, r"soft_prompt=-1, wanted 0 or more tokens"),
        ({"gate": "layer"}, r"gate='layer' is unknown; allowed: shared, module"),
        ({"r": 0}, r"r=0, wanted a number above 0"),
        ({"gate_temperature": float("nan")}, r"gate_temperature=nan, wanted"),
        ({"target_modules": []}, r"target_modules is empty"),
    ],
)
def test_wrong_values_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        RecLoraConfig(**arguments)
    assert "\n" not in str(error.value)
