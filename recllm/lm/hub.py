"""Where an LM or encoder is found, a hub id or a folder, and the one line that says what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from recllm.lm.config import LmConfig


def locate(config: LmConfig, path: str | Path | None, key: str = "lm.model") -> tuple[str, dict[str, Any]]:
    """Hub id or folder of an LM; nothing is read or downloaded.

    Args:
        config: Which one.
        path: Folder that is taken in place of `config.path`.
        key: Section of the configuration that errors name.

    Returns:
        What `from_pretrained` takes first, and the arguments that it needs besides (a revision on the hub).

    Raises:
        ValueError: The LM is not named, or its folder is not there.
    """
    source = str(path if path is not None else config.path or "")
    if not source:
        raise ValueError(
            f"lm.model.path is empty and LM {config.name!r} is not trained yet: set it, or make LM=tiny"
        )
    if path is not None or _is_local(source):
        source = os.path.expanduser(source)
        if not os.path.isdir(source):
            raise ValueError(
                f"{key}.path is {source!r}, no such folder: give a folder with weights, or a hub id"
            )
    options: dict[str, Any] = {}
    if config.revision and not os.path.isdir(source):
        options["revision"] = config.revision
    return source, options


def _is_local(source: str) -> bool:
    """Whether it can only be a folder: a hub id has one slash at most and does not begin like a path."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def loading_error(config: LmConfig, source: str, error: Exception, key: str = "lm.model") -> ValueError:
    """The one line that says why `source` cannot be loaded.

    Args:
        config: Which LM.
        source: As `locate` returned it.
        error: What the loading raised, often many lines.
        key: Section of the configuration that the line names.
    """
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"{key}.path {source!r} ({key}.revision {config.revision}) cannot be loaded: {reason}")


def text_config(config: Any) -> Any:
    """The part of an LM's configuration that is about text: the whole, but for LMs that see or hear too."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
