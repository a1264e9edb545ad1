"""The flags of `python -m recllm.serving`: a mistake in them is told before any model is imported."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import ipaddress
import json
import os
from collections.abc import Sequence
from pathlib import Path

from recllm import paths
from recllm.errors import ConfigError
from recllm.pipeline.stage_file import StageFile
from recllm.serving.server.settings import Settings

KEY = "RECLLM_API_KEY"
EVENTS = "EVENTS_URL"
LOOPBACK = "localhost,127.0.0.1,[::1]"


def parse(arguments: Sequence[str]) -> tuple[Path, Settings, str | None]:
    """Bundle, settings and API key of a command.

    Raises:
        ConfigError: a value cannot be used, or everybody could ask.
    """
    parser = argparse.ArgumentParser(
        prog="python -m recllm.serving",
        description=f"Serve a bundle over HTTP. {KEY} in the environment is the API key, if any, "
        f"and {EVENTS} the URL of the event store.",
    )
    parser.add_argument("bundle", type=Path, help="folder that `make bundle` or `make cascade` wrote")
    parser.add_argument("--open", action="store_true", help="listen beyond this machine without an API key")
    meanings = _meanings()
    for setting in dataclasses.fields(Settings):
        flag = f"--{setting.name.replace('_', '-')}"
        meaning = f"{meanings[setting.name]} ({setting.default})".replace("%", "%%")
        if isinstance(setting.default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=setting.default, help=meaning)
            continue
        parser.add_argument(
            flag, type=type(setting.default), default=setting.default, metavar="VALUE", help=meaning
        )
    given = vars(parser.parse_args(arguments))
    bundle: Path = given.pop("bundle")
    is_open = given.pop("open")
    settings = Settings(**given)
    key = os.environ.get(KEY) or None
    if not any((bundle / name).exists() for name in (paths.BUNDLE, paths.MANIFEST)):
        raise ConfigError(f"{bundle} is no bundle; wanted a folder that `make bundle` wrote")
    if _is_loopback(settings.host):
        settings = dataclasses.replace(settings, hosts=settings.hosts or LOOPBACK)
    elif key is None and not is_open:
        raise ConfigError(
            f"--host {settings.host} listens beyond this machine without an API key; wanted {KEY}, or --open"
        )
    return bundle, settings, key


def events_url(bundle: Path) -> str:
    """Where events are stored, as the environment says it; empty: nowhere.

    Where it says nothing, a file in the working directory with the name of the data set: users of two
    data sets may have the same ids.
    """
    if EVENTS in os.environ:
        return os.environ[EVENTS]
    path = bundle / paths.BUNDLE
    try:
        if path.exists():
            dataset = str(json.loads(path.read_text(encoding="utf-8"))["dataset"])
        else:
            dataset = StageFile.read(bundle).dataset
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); make the bundle anew") from error
    return f"sqlite:///events-{dataset}.db"


def _meanings() -> dict[str, str]:
    """What stands under each field of the settings."""
    (definition,) = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(definition, ast.ClassDef)
    meanings = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            meanings[field.target.id] = " ".join(str(text.value.value).split()).rstrip(".")
    return meanings


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
