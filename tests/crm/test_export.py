"""Export and load of CRMs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recllm import crm
from recllm.crm import CrmConfig, Fields

FIELDS = Fields(user_sizes=(9,), item_sizes=(8, 5), rating_levels=5, category=1)
SMALL = CrmConfig(embedding_dim=4, mlp=[8, 6], attention_mlp=[4])


def test_a_wrong_shape_is_one_line(tmp_path: Path) -> None:
    crm.export(crm.build(FIELDS, SMALL), tmp_path, {})
    description = json.loads((tmp_path / "config.json").read_text())
    description["fields"]["user_sizes"] = [10]
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(
        ValueError, match=r"got embeddings.user.0.weight \(9, 4\).*wanted \(10, 4\)"
    ) as caught:
        crm.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_weights_and_unknown_settings_are_refused(tmp_path: Path) -> None:
    crm.export(crm.build(FIELDS, SMALL), tmp_path, {})
    description = json.loads((tmp_path / "config.json").read_text())
    other = {**description, "crm": {**description["crm"], "mlp": [8, 6, 6]}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"tower.hidden.7.bias absent.*wanted \(6,\)"):
        crm.load(tmp_path)
    other = {**description, "crm": {**description["crm"], "color": 1}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="color"):
        crm.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"without model\.safetensors.*make stage1"):
        crm.load(tmp_path)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name=dim is not usable; wanted one of deepfm, .*, din, sim"):
        crm.build(FIELDS, CrmConfig(name="dim"))


def test_the_config_is_an_omegaconf_schema() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(CrmConfig), {"mlp": [8], "dropout": 0.5})
    assert OmegaConf.to_object(merged) == CrmConfig(mlp=[8], dropout=0.5)
