"""What every request passes first: host, number at work, size and time of its body, deadline, client gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from recllm.serving.server.logs import tell
from recllm.serving.server.refusals import FAILED, Refusal
from recllm.serving.server.service import Service

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

UNCOUNTED = ("/health", "/metrics")
"""What is answered however much is at work."""
UNHURRIED = ("/admin/reload",)
"""What has no deadline."""
GONE = 499
"""Status in log and metrics of a request whose client has gone; nobody gets it."""


class Gate:
    """The outermost part of the application.

    Args:
        app: what is within.
        service: its limits.
    """

    def __init__(self, app: App, service: Service) -> None:
        """See the class."""
        self.app = app
        self.service = service
        self.at_work = 0
        hosts = service.settings.hosts
        self.hosts = frozenset(name.strip().lower() for name in hosts.split(",") if name.strip())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it; what became of it goes to metrics and log."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        answer = _Answer(send)
        self.at_work += 1
        self.service.metrics.at_work.set(self.at_work)
        try:
            await self._pass(scope, receive, answer)
        except Refusal as refusal:
            if not answer.status:
                await refusal.response()(scope, receive, answer)
        finally:
            self.at_work -= 1
            self.service.metrics.at_work.set(self.at_work)
            self._count(scope, answer.status or GONE, time.perf_counter() - start)

    async def _pass(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        settings = self.service.settings
        self._check_host(scope)
        if self.at_work > settings.max_requests and scope["path"] not in UNCOUNTED:
            raise Refusal(503, "too many requests are at work; ask again soon", settings.retry_after)
        end = asyncio.get_running_loop().time() + settings.deadline
        try:
            async with asyncio.timeout_at(end):
                body = await self._body(scope, receive)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {settings.deadline:g} seconds") from None
        if body is None:
            return
        gone = asyncio.Event()
        replay = _Replay(body, gone)
        work = asyncio.create_task(self._answer(scope, replay, answer))
        watch = asyncio.create_task(_disconnection(receive, gone))
        try:
            left = None if scope["path"] in UNHURRIED else end - asyncio.get_running_loop().time()
            await asyncio.wait({work, watch}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif not watch.done():
                raise Refusal(504, f"there was no answer within {settings.deadline:g} seconds; ask for less")
        finally:
            work.cancel()
            watch.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            tell("a request failed", level=logging.ERROR, error=error, route=_route(scope))
            if not answer.status:
                await Refusal(500, FAILED).response()(scope, receive, answer)

    def _check_host(self, scope: Scope) -> None:
        """A page of another site must not reach the service by a name of its own (DNS rebinding)."""
        if not self.hosts:
            return
        host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if name.lower() not in self.hosts:
            raise Refusal(400, "the Host header is none of this service's names (--hosts)")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None: the client has gone."""
        most = self.service.settings.max_body
        refusal = Refusal(413, f"the body has more than {most:,} bytes; send less")
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length) > most:
            raise refusal
        parts = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > most:
                raise refusal
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = _route(scope)
        # A client that makes methods up must not make series up.
        method = scope["method"] if scope["method"] in METHODS and route != UNMATCHED else "other"
        metrics = self.service.metrics
        metrics.requests.labels(route, method, str(status)).inc()
        metrics.seconds.labels(route).observe(seconds)
        tell("request", route=route, method=method, status=status, ms=round(1000 * seconds, 1))


UNMATCHED = "unmatched"
METHODS = ("GET", "POST")


def _route(scope: Scope) -> str:
    """The route's own path, `/users/{id}/history`: what was put in its place is nobody's business."""
    return str(getattr(scope.get("route"), "path", UNMATCHED))


class _Answer:
    """What is sent, with the status remembered."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self.send(message)


class _Replay:
    """Gives the body that was read already, and then waits until the client has gone."""

    def __init__(self, body: bytes, gone: asyncio.Event) -> None:
        self.body: bytes | None = body
        self.gone = gone

    async def __call__(self) -> Message:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def _disconnection(receive: Receive, gone: asyncio.Event) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()
