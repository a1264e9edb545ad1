"""kill -9 of a service in the midst of `POST /events`: what it acknowledged is there once, nothing twice."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager

import httpx
import pytest
import sqlalchemy as sa

from recllm.tables.event_store import EVENTS, open_store

CLIENTS = 8


@contextmanager
def service(bundle, url):
    """A service's process, and the address where it listens; events are taken while the model still loads."""
    command = [sys.executable, "-m", "recllm.serving", str(bundle), "--port", "0"]
    process = subprocess.Popen(
        command, env={**os.environ, "EVENTS_URL": url}, stderr=subprocess.PIPE, text=True
    )
    lines = iter(process.stderr)
    try:
        listening = next(line for line in map(json.loads, lines) if line["event"] == "listening")
        # What it writes goes on being read, so that it never waits for a reader.
        reader = threading.Thread(target=lambda: list(lines), daemon=True)
        reader.start()
        yield process, f"http://127.0.0.1:{listening['port']}"
    finally:
        process.kill()
        process.wait(60)
        reader.join(60)
        process.stderr.close()


def send(address, keys, on_acknowledged):
    """Send an event a request, from several clients at once; each gives up when the service is gone."""
    waiting = queue.SimpleQueue()
    for key in keys:
        waiting.put(key)

    def work():
        with httpx.Client(base_url=address, timeout=60) as client:
            while True:
                try:
                    key = waiting.get_nowait()
                    body = {"events": [{"user": "u", "item": key, "timestamp": 1}]}
                    answer = client.post("/events", json=body, headers={"Idempotency-Key": key})
                except (queue.Empty, httpx.TransportError):
                    return
                assert answer.status_code == 200, answer.text
                on_acknowledged(key, answer.json())

    clients = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


def stored(url):
    """Item -> how often it is stored; an event's item is its key here."""
    engine = open_store(url)
    with engine.connect() as connection:
        counts = Counter(connection.execute(sa.select(EVENTS.c.item)).scalars())
    engine.dispose()
    return counts


@pytest.mark.parametrize(
    ("store", "count"),
    [
        ("sqlite", 200),
        pytest.param("sqlite", 10_000, marks=pytest.mark.slow),
        pytest.param("postgresql", 10_000, marks=pytest.mark.slow),
    ],
)
def test_killed_in_the_midst_of_events(cascades, request, tmp_path, store, count):
    url = f"sqlite:///{tmp_path}/events.db"
    if store == "postgresql":
        url = request.getfixturevalue("postgres").new_schema()
    keys = [f"key-{number}" for number in range(count)]
    acknowledged = []
    with service(cascades["reclora"].folder, url) as (process, address):

        def note(key, answer):
            assert answer == {"stored": 1, "repeated": 0}
            acknowledged.append(key)
            if len(acknowledged) == count // 2:
                process.send_signal(signal.SIGKILL)

        send(address, keys, note)
        assert process.wait(60) == -signal.SIGKILL
    counts = stored(url)
    assert count // 2 <= len(acknowledged) < count
    assert set(acknowledged) <= set(counts)
    assert set(counts.values()) == {1}
    # Each client may have had one that is stored and was not acknowledged.
    assert len(counts) <= len(acknowledged) + CLIENTS
    # After a restart everything is sent again: what is there is told to be, and nothing is there twice.
    answers = {}
    with service(cascades["reclora"].folder, url) as (_, address):
        send(address, keys, answers.__setitem__)
    assert {key for key, answer in answers.items() if answer["repeated"]} == set(counts)
    assert stored(url) == Counter(keys)


def test_a_store_that_cannot_be_opened_is_one_line_and_status_2(cascades, tmp_path):
    """Told at once: no model is imported before."""
    (tmp_path / "events.db").write_text("user,item\n" * 1000)
    command = [sys.executable, "-X", "importtime", "-m", "recllm.serving", str(cascades["reclora"].folder)]
    environment = {**os.environ, "EVENTS_URL": f"sqlite:///{tmp_path}/events.db"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    imported, said = [], []
    for line in done.stderr.splitlines():
        (imported if line.startswith("import time:") else said).append(line)
    assert done.returncode == 2
    assert said == [
        f"error: the event store sqlite:///{tmp_path}/events.db cannot be opened: file is not a database; "
        "wanted a database that answers"
    ]
    assert not [line for line in imported if line.split("|")[-1].strip() == "torch"]
