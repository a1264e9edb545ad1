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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixture": "sum"}, r"mixture='sum' is unknown; allowed: product"),
        ({"init": "orthogonal"}, r"init='orthogonal' is unknown; allowed: gaussian"),
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
