"""How long the model's thread waits for the next requests."""

import threading

import pytest

from recllm.serving.server.batching import Batcher, Job, Kind
from recllm.serving.server.metrics import Metrics
from recllm.serving.server.settings import Settings

LONG = 120.0
"""Seconds that no test waits for: one that would fails by its list."""


@pytest.fixture
def batcher():
    """A queue whose thread is not started; its patience has no end of its own."""
    return Batcher(Settings(gather_ms=1000 * LONG), Metrics())


def ask(batcher, users=1):
    job = Job(None, Kind.LISTS, ["question"] * users, None)
    with batcher._changed:
        batcher._queue[job] = None
        batcher._changed.notify()
    return job


def taken(batcher, requests, seconds, arriving=0):
    """Jobs of the next batch after one of so many requests and seconds; some arrive while it waits."""
    batches = []
    thread = threading.Thread(target=lambda: batches.append(batcher._take(requests, seconds)))
    thread.start()
    jobs = [ask(batcher) for _ in range(arriving)]
    thread.join(LONG / 2)
    assert not thread.is_alive()
    return [job for job, _ in batches[0]], jobs


def test_after_a_batch_of_several_it_waits_for_as_many(batcher):
    first = ask(batcher)
    batch, arrived = taken(batcher, requests=3, seconds=4 * LONG, arriving=2)
    assert batch == [first, *arrived]


def test_after_a_request_that_was_alone_it_does_not_wait(batcher):
    first = ask(batcher)
    assert taken(batcher, requests=1, seconds=4 * LONG)[0] == [first]


def test_it_waits_no_longer_than_half_of_what_the_batch_took(batcher):
    first = ask(batcher)
    assert taken(batcher, requests=3, seconds=0.002)[0] == [first]


def test_a_full_batch_waits_for_nobody(batcher):
    first = ask(batcher, users=Settings.batch_users)
    assert taken(batcher, requests=3, seconds=4 * LONG)[0] == [first] * Settings.batch_users
