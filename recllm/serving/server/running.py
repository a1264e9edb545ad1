"""The process: flags, signals, and an end that loses no accepted request."""

from __future__ import annotations

import argparse
import ast
import asyncio
import dataclasses
import inspect
import ipaddress
import os
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from recllm import paths
from recllm.errors import ConfigError
from recllm.serving.server.app import create_app
from recllm.serving.server.logs import start_logs, tell
from recllm.serving.server.served import Served
from recllm.serving.server.service import Service
from recllm.serving.server.settings import Settings

KEY = "RECLLM_API_KEY"
LOOPBACK = "localhost,127.0.0.1,[::1]"


def parse(arguments: Sequence[str]) -> tuple[Path, Settings, str | None]:
    """Bundle, settings and API key of a command.

    Raises:
        ConfigError: a value cannot be used, or everybody could ask.
    """
    parser = argparse.ArgumentParser(
        prog="python -m recllm.serving",
        description=f"Serve a bundle over HTTP. {KEY} in the environment is the API key, if any.",
    )
    parser.add_argument("bundle", type=Path, help="folder that `make bundle` or `make cascade` wrote")
    parser.add_argument("--open", action="store_true", help="listen beyond this machine without an API key")
    meanings = _meanings()
    for setting in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=type(setting.default),
            default=setting.default,
            metavar="VALUE",
            help=f"{meanings[setting.name]} ({setting.default})".replace("%", "%%"),
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


class Server(uvicorn.Server):
    """A server that says that it stops before it does, and reloads at SIGHUP.

    Args:
        config: of uvicorn.
        service: what it serves.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        """See the class."""
        super().__init__(config)
        self.service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn; says in the log where it listens."""
        await super().startup(sockets)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.service.reload_on_signal)
        for server in getattr(self, "servers", []):
            for listening in server.sockets:
                host, port, *_ = listening.getsockname()
                tell("listening", host=host, port=port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """From now on not ready; what was accepted is answered still."""
        self.service.is_stopping = True
        tell("stopping", signal=signal.Signals(sig).name)
        super().handle_exit(sig, frame)


def run(bundle: Path, settings: Settings, key: str | None) -> int:
    """Serve until SIGTERM or SIGINT; the exit status."""
    # peft and transformers warn of what the project knows of.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
    start_logs()
    failures: list[str] = []

    def fail(line: str) -> None:
        failures.append(line)
        server.should_exit = True

    service = Service(settings, lambda: Served.load(bundle, settings.lms), key, fail)
    config = uvicorn.Config(
        create_app(service),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        # Every request but a reload ends by its deadline; a moment more for its answer to be sent.
        timeout_graceful_shutdown=int(settings.deadline) + 5,
    )
    server = Server(config, service)
    server.run()
    if failures:
        print(f"error: {failures[0]}", file=sys.stderr)
        return 2
    return 0
