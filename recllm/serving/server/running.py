"""The process: its signals, and an end that loses no accepted request."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from types import FrameType

import uvicorn

from recllm.serving.server.app import create_app
from recllm.serving.server.events import EventStore
from recllm.serving.server.logs import start_logs, tell
from recllm.serving.server.served import Served
from recllm.serving.server.service import Service
from recllm.serving.server.settings import Settings


class Server(uvicorn.Server):
    """A server that stops when all that it accepted is answered, and reloads at SIGHUP.

    Args:
        config: of uvicorn.
        service: what it serves.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        """See the class."""
        super().__init__(config)
        self.service = service
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn; says in the log where it listens."""
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        self.loop.add_signal_handler(signal.SIGHUP, self.service.reload_on_signal)
        for server in getattr(self, "servers", []):
            for listening in server.sockets:
                host, port, *_ = listening.getsockname()
                tell("listening", host=host, port=port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not ready from now on, and soon gone, with status 0; what was accepted is answered before.

        A second SIGINT does not wait for that.
        """
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        self.service.is_stopping = True
        if self.loop is not None:  # a signal's handler may stand within another line that is being written
            self.loop.call_soon_threadsafe(lambda: tell("stopping", signal=signal.Signals(sig).name))


def run(
    load: Callable[[], Served], settings: Settings, key: str | None, events: EventStore | None = None
) -> int:
    """Serve until SIGTERM or SIGINT; the exit status.

    Args:
        load: loads what answers, at the start and at every reload.
        settings: limits.
        key: the API key; None: there is none.
        events: where events are stored; None: nowhere.
    """
    # peft and transformers warn of what the project knows of.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
    start_logs()
    failures: list[str] = []

    def fail(line: str) -> None:
        failures.append(line)
        server.should_exit = True

    tell("event store", url=events and events.address)
    service = Service(settings, load, key, fail, events)
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
