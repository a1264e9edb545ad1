"""The service's state: what answers now, how it is replaced, whether it stops."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable

from fastapi import Request

from recllm.errors import ConfigError, StageError
from recllm.serving.server.batching import Batcher
from recllm.serving.server.events import EventStore
from recllm.serving.server.logs import tell
from recllm.serving.server.metrics import Metrics
from recllm.serving.server.refusals import Refusal
from recllm.serving.server.served import Served
from recllm.serving.server.settings import Settings


class Service:
    """One service process; routes find it as `app.state.service`.

    Args:
        settings: its limits.
        load: loads what is to answer, in a thread; again at every reload.
        api_key: what requests have to bring; None: nothing.
        on_failure: is told in a line why there is nothing that could answer at all.
        events: where events are stored, which the service closes at its end; None: nowhere.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Served],
        api_key: str | None = None,
        on_failure: Callable[[str], None] | None = None,
        events: EventStore | None = None,
    ) -> None:
        """Nothing is loaded before `start`."""
        self.settings = settings
        self.metrics = Metrics()
        self.batcher = Batcher(settings, self.metrics)
        self.events = events
        self.is_stopping = False
        self._load = load
        self._on_failure = on_failure
        self._key = None if api_key is None else _digest(api_key)
        self._current: Served | None = None
        self._reload: asyncio.Task[Served] | None = None

    @property
    def current(self) -> Served:
        """What answers requests that come now; a request keeps what it began with.

        Raises:
            Refusal: no model has answered yet.
        """
        if self._current is None:
            raise Refusal(503, "no model has answered yet; ask again soon", self.settings.retry_after)
        return self._current

    @property
    def status(self) -> str:
        """`ready`, `starting` or `stopping`."""
        if self.is_stopping:
            return "stopping"
        return "starting" if self._current is None else "ready"

    @property
    def has_key(self) -> bool:
        """Whether an API key is set."""
        return self._key is not None

    def check_key(self, given: str | None) -> None:
        """Refuse a request that does not bring the API key, if there is one.

        The time that it takes does not depend on how much of the key is right.
        """
        if self._key is not None and not hmac.compare_digest(_digest(given or ""), self._key):
            raise Refusal(401, "the API key is missing or another; send it as Authorization: Bearer <key>")

    async def start(self) -> None:
        """Begin to load; the service is ready when that is done."""
        self.batcher.start()
        self._begin()

    async def stop(self) -> None:
        """Answer what was accepted, and end."""
        self.is_stopping = True
        self.metrics.ready.set(0)
        await asyncio.to_thread(self.batcher.stop)
        if self.events is not None:
            await asyncio.to_thread(self.events.close)

    async def reload(self) -> tuple[str | None, Served]:
        """Load beside what answers now, and switch; the hash of what answered before, and what answers now.

        Raises:
            Refusal: a reload is at work already, or what was loaded cannot be used; nothing changes then.
        """
        if self._reload is not None and not self._reload.done():
            raise Refusal(409, "a bundle is being loaded already; ask again when that is done", 10)
        before = None if self._current is None else self._current.bundle
        # The task goes on when who asked for it has gone.
        return before, await asyncio.shield(self._begin())

    def reload_on_signal(self) -> None:
        """Reload; whether that was possible stands in the log."""
        if self._reload is None or self._reload.done():
            self._begin()
        else:
            tell("a bundle is being loaded already", level=logging.WARNING)

    def _begin(self) -> asyncio.Task[Served]:
        self._reload = asyncio.create_task(self._switch())
        self._reload.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._reload

    async def _switch(self) -> Served:
        tell("bundle loading")
        try:
            served = await asyncio.to_thread(self._load)
        except Exception as error:
            line = f"it cannot be loaded ({type(error).__name__})"
            if isinstance(error, StageError | ConfigError | OSError | ValueError):
                line = " ".join(str(error).split())
            self.metrics.reloads.labels("refused").inc()
            tell("bundle refused", level=logging.ERROR, error=error, reason=line)
            if self._current is None and self._on_failure is not None:
                self._on_failure(line)
            raise Refusal(422, f"the bundle is refused, and what answered before stays: {line}") from None
        before = self._current
        self._current = served
        if before is not None:
            self.metrics.bundle.remove(before.bundle)
        self.metrics.bundle.labels(served.bundle).set(1)
        self.metrics.reloads.labels("loaded").inc()
        self.metrics.ready.set(1)
        tell("bundle ready", bundle=served.bundle, before=before and before.bundle)
        return served


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


async def service_of(request: Request) -> Service:
    """The service that a request came to; for `Depends`."""
    service: Service = request.app.state.service
    return service
