"""A service in this process, asked over a socket: its server runs in a thread."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn

from recllm.files import now
from recllm.serving.server.app import create_app
from recllm.serving.server.served import Served
from recllm.serving.server.service import Service
from recllm.serving.server.settings import Settings


def served(recommender, bundle="first"):
    """A recommender as a bundle that is loaded."""
    return Served(recommender, bundle, None, now())


def until(condition):
    """Wait for what another thread does; a test that waits in vain fails after a minute."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


class Live:
    """A running service: `client` asks it, `blocked()` holds its model back meanwhile."""

    def __init__(self, service, server, url):
        self.service = service
        self.server = server
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=60)
        self.loop = None

    def post(self, path, body, **more):
        return self.client.post(path, json=body, **more)

    @property
    def waiting(self):
        return self.service.batcher.waiting

    @contextmanager
    def blocked(self):
        """The model answers nothing within the block."""
        begun, released = threading.Event(), threading.Event()

        def hold(_):
            begun.set()
            released.wait(60)

        call = self.service.batcher.call(self.service.current, hold)
        held = asyncio.run_coroutine_threadsafe(call, self.loop)
        assert begun.wait(60)
        try:
            yield
        finally:
            released.set()
            held.result(60)

    def in_turn(self, asks, questions):
        """Answers of calls, each in a thread, which all wait for the model before it answers any.

        `questions` says how many each of them has; the next one is asked when those of the former wait.
        """
        answers = [None] * len(asks)

        def one(place):
            answers[place] = asks[place]()

        threads = [threading.Thread(target=one, args=(place,)) for place in range(len(asks))]
        with self.blocked():
            for thread, count in zip(threads, questions, strict=True):
                before = self.waiting
                thread.start()
                until(lambda wanted=before + count: self.waiting == wanted)
        for thread in threads:
            thread.join()
        return answers

    def metric(self, name, **labels):
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def live(load, api_key=None, before_ready=None, events=None, **settings):
    """A service with these settings, ready; `before_ready` is called with it while it is not."""
    service = Service(Settings(**settings), load, api_key, events=events)
    config = uvicorn.Config(
        create_app(service), host="127.0.0.1", port=0, log_config=None, access_log=False, ws="none"
    )
    server = uvicorn.Server(config)
    it = Live(service, server, "")

    async def serve():
        it.loop = asyncio.get_running_loop()
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        it.url = f"http://127.0.0.1:{port}"
        it.client = httpx.Client(base_url=it.url, timeout=60)
        if before_ready is not None:
            before_ready(it)
        until(lambda: service.status == "ready")
        yield it
    finally:
        it.client.close()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def lines(caplog):
    """What the service logged, as its formatter writes it."""
    from recllm.serving.server.logs import JsonLines

    return [json.loads(JsonLines().format(record)) for record in caplog.records]
