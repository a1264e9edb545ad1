"""Conventional recommendation models (CRMs): one paper, one file; built, exported and loaded from here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recllm.crm.config import CrmConfig, Fields

if TYPE_CHECKING:
    from recllm.crm.layers import Model
    from recllm.crm.models import build, export, load

__all__ = ["CrmConfig", "Fields", "Model", "build", "export", "load"]


def __getattr__(name: str) -> Any:
    """Imports the models when asked for one: what reads the configuration alone does not wait for torch."""
    if name in ("Model", "build", "export", "load"):
        from recllm.crm import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
