"""CRMs by name: built, exported and loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from recllm.crm.autoint import AutoInt
from recllm.crm.caser import Caser
from recllm.crm.config import CrmConfig, Fields
from recllm.crm.dcnv2 import DCNv2
from recllm.crm.deepfm import DeepFM
from recllm.crm.din import DIN
from recllm.crm.gru4rec import GRU4Rec
from recllm.crm.layers import Model
from recllm.crm.retriever import Retriever
from recllm.crm.sasrec import SASRec
from recllm.crm.sim import SIM
from recllm.files import write_json

_MODELS: dict[str, type[Model]] = {
    "deepfm": DeepFM,
    "autoint": AutoInt,
    "dcnv2": DCNv2,
    "gru4rec": GRU4Rec,
    "caser": Caser,
    "sasrec": SASRec,
    "din": DIN,
    "sim": SIM,
    "retriever": Retriever,
}


def build(fields: Fields, config: CrmConfig) -> Model:
    """Builds the model `config.name`, freshly initialized from torch's global generator.

    Raises:
        ValueError: no such model.
    """
    if config.name not in _MODELS:
        raise ValueError(f"got CRM {config.name!r}; wanted one of {', '.join(_MODELS)}; e.g. CRM=sim")
    return _MODELS[config.name](fields, config)


def export(model: Model, directory: str | Path, extra: dict[str, Any]) -> None:
    """Writes `model.safetensors` (weights) and `config.json` (all that `load` needs, and `extra`).

    Args:
        model: the trained CRM.
        directory: made if absent.
        extra: JSON-able facts for readers of the export (`recent`, `retrieved`, dataset ...).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors")
    description = {
        "fields": dataclasses.asdict(model.fields),
        "crm": dataclasses.asdict(model.config),
        "extra": extra,
    }
    write_json(directory / "config.json", description)


def load(directory: str | Path) -> Model:
    """Loads an exported CRM, on the CPU, in eval mode.

    Raises:
        ValueError: a file is missing, or the weights do not fit the configuration.
    """
    directory = Path(directory)
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise ValueError(f"got {directory} without {name}; wanted an exported CRM; run `make stage1`")
    description = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    weights = load_file(directory / "model.safetensors")
    try:
        # On the meta device no table is drawn just to be overwritten.
        with torch.device("meta"):
            model = build(Fields(**description["fields"]), CrmConfig(**description["crm"]))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"got {directory}/config.json of another layout ({error}); wanted that of this version; "
            "run `make stage1` again"
        ) from error
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise ValueError(
                f"got {name} {got.get(name, 'absent')} in {directory}/model.safetensors; "
                f"wanted {wanted.get(name, 'absent')} by its config.json; run `make stage1` again"
            )
    # Copies of their own: the file's tensors lie unaligned, where some processors round products otherwise.
    own = {name: value.clone() for name, value in weights.items()}
    model.load_state_dict(own, strict=True, assign=True)
    return model.eval()
