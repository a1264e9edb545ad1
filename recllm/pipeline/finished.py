"""The configuration that a stage's folder holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from recllm import paths
from recllm.config.merge import empty, freeze, override, parse_overrides
from recllm.config.schema import EXECUTION, Config
from recllm.errors import ConfigError, StageError
from recllm.files import digest


def read_config(folder: Path) -> dict[str, Any]:
    """The stage's `config.yaml` as the plan wrote it.

    Raises:
        StageError: where there is none.
    """
    path = folder / paths.CONFIG
    if not path.exists():
        raise StageError(f"{path} is missing; stages are run by make, e.g. `make stage1`, which writes it")
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def config_digest(content: dict[str, Any]) -> str:
    """Digest of what reaches a stage: its sections and which parents it reads; no execution key."""
    return digest([content["stage"], content["dataset"], content["parents"], content["config"]])


def load_sections(content: dict[str, Any], execution: Iterable[str] = ()) -> Config:
    """The frozen configuration; sections that do not reach the stage are None: none is read by mistake."""
    merged = OmegaConf.merge(empty(), content["config"])
    for key, value in parse_overrides(execution).items():
        if not key.startswith(f"{EXECUTION}."):
            raise ConfigError(f"{key} is no execution key; give it to make as ARGS={key}={value}")
        merged = override(merged, key, value)
    config = freeze(merged)
    unread: dict[str, Any] = {
        f.name: None for f in dataclasses.fields(Config) if f.name not in (*content["config"], EXECUTION)
    }
    return dataclasses.replace(config, **unread)
